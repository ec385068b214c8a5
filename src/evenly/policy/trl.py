"""Reward normalizers in TRL's trainers.

TRL's ``GRPOTrainer`` and ``RLOOTrainer`` compute rewards, turn them into advantages, and train on those.
:func:`grpo_trainer` makes a trainer whose advantages come from a reward normalizer of :mod:`evenly.policy`;
:class:`NormalizedAdvantages` is the mixin behind it, for a trainer class of your own::

    from evenly.policy import BNPO
    from evenly.policy.trl import grpo_trainer

    trainer = grpo_trainer(model, reward_funcs, normalizer=BNPO(), args=GRPOConfig(...), train_dataset=prompts)
    trainer.train()

Each reward function is a reward component: with several of them give the normalizer ``num_rewards``. A reward that is
``None`` does not count. ``reward_weights`` of the trainer's arguments are the factors of the components in the average;
``scale_rewards`` and ``multi_objective_aggregation`` are TRL's own ways to compute advantages and have no effect.
Everything else (the loss, logs, several processes, vLLM) is TRL's. A normalizer with state is saved beside each
checkpoint, and read again by ``train(resume_from_checkpoint=...)``.

How it is hooked in: the mixin notes what ``_calculate_rewards`` returns (the rewards of all processes, prompt by
prompt) and replaces ``"advantages"`` in what ``_generate_and_score_completions`` returns. Both methods are TRL's
internals; they have had this form since TRL 0.20, and where they have not, the trainer says so instead of training on
something else.

Needs ``pip install evenly[trl]``.

Reference:
    Xiao, Zhang & Cao, *BNPO: Beta Normalization Policy Optimization*, 2025, arXiv 2506.02864, which was trained with
    verl. TRL's option ``loss_type="bnpo"`` is a way to average over tokens, not this.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evenly.policy._common import RewardNormalizer

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["STATE_FILE", "NormalizedAdvantages", "grpo_trainer"]

#: The file in a checkpoint's folder that holds the state of the normalizer.
STATE_FILE = "reward_normalizer.pt"

_HOOKS = ("_calculate_rewards", "_generate_and_score_completions")


def grpo_trainer(*arguments: Any, normalizer: RewardNormalizer, base: type | None = None, **options: Any) -> Any:
    """Make a trainer of TRL whose advantages come from a reward normalizer.

    Args:
        *arguments, **options: those of the trainer: ``model``, ``reward_funcs``, ``args``, ``train_dataset``, ...
        normalizer: such as ``evenly.policy.BNPO()``, with ``num_rewards`` equal to the number of reward functions.
            A completion without a scorable sibling needs ``singletons="zero"``. Not with ``sync=True``: TRL has
            gathered the rewards of all processes already.
        base: the trainer's class, default ``trl.GRPOTrainer``; ``trl.RLOOTrainer`` or a subclass of either.

    Returns:
        An instance of a subclass of ``base``.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: the class has not the methods that this hooks into.
        TypeError, ValueError: the normalizer does not fit.

    >>> grpo_trainer(normalizer="bnpo")
    Traceback (most recent call last):
    TypeError: normalizer is a str, expected a reward normalizer such as evenly.policy.BNPO().
    """
    _check(normalizer)
    if base is None:
        base = _trl().GRPOTrainer
    cls = type(f"Normalized{base.__name__}", (NormalizedAdvantages, base), {"__doc__": NormalizedAdvantages.__doc__})
    return cls(*arguments, normalizer=normalizer, **options)


class NormalizedAdvantages:
    """A mixin for ``trl.GRPOTrainer`` or ``trl.RLOOTrainer``: their advantages come from ``normalizer``.

    Put it first: ``class Trainer(NormalizedAdvantages, trl.GRPOTrainer)``. The constructor takes one argument more than
    the trainer's, ``normalizer``; see :func:`grpo_trainer`.

    Raises:
        RuntimeError: the trainer has not the methods that this hooks into, or they behave in another way.

    >>> class Trainer(NormalizedAdvantages):
    ...     pass
    >>> from evenly.policy import GRPO
    >>> Trainer(normalizer=GRPO())
    Traceback (most recent call last):
    RuntimeError: Trainer has no _calculate_rewards. ...
    """

    def __init__(self, *arguments: Any, normalizer: RewardNormalizer, **options: Any) -> None:
        _check(normalizer)
        for name in _HOOKS:
            if not callable(getattr(super(), name, None)):
                raise RuntimeError(
                    f"{type(self).__name__} has no {name}. {_versions()} Put NormalizedAdvantages before "
                    f"trl.GRPOTrainer in the class, with a TRL that evenly[trl] allows."
                )
        super().__init__(*arguments, **options)
        # Not as an attribute of the model: it is no part of what is optimized, moved or saved with it.
        self.normalizer = normalizer
        self._rewards: Tensor | None = None
        components = len(self.reward_funcs)  # type: ignore[attr-defined]
        if normalizer.num_rewards != components:
            raise ValueError(
                f"There are {components} reward functions and normalizer has num_rewards={normalizer.num_rewards}: "
                f"make it with num_rewards={components}."
            )
        self.add_callback(_saver(normalizer))  # type: ignore[attr-defined]

    def _calculate_rewards(self, *arguments: Any, **options: Any) -> Tensor:
        rewards = super()._calculate_rewards(*arguments, **options)  # type: ignore[misc]
        if self._rewards is not None:
            raise RuntimeError(
                f"TRL computed rewards twice for one batch, which this hook does not know. {_versions()}"
            )
        self._rewards = rewards
        return rewards

    def _generate_and_score_completions(self, inputs: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        self._rewards = None
        output = super()._generate_and_score_completions(inputs, *arguments, **options)  # type: ignore[misc]
        rewards, self._rewards = self._rewards, None
        held = output.get("advantages") if isinstance(output, dict) else None
        process = self.accelerator.process_index  # type: ignore[attr-defined]
        size = len(inputs)
        if (
            rewards is None
            or not isinstance(held, Tensor)
            or held.shape[0] != size
            or held.ndim != 1
            or rewards.ndim != 2
            or rewards.shape[0] < (process + 1) * size
        ):
            raise RuntimeError(
                f"TRL's {_HOOKS[1]} did not return one advantage for each completion of rewards that it had "
                f"computed with {_HOOKS[0]}, which is where the normalizer is hooked in. {_versions()}"
            )
        advantages = self._normalized(rewards)
        output["advantages"] = advantages[process * size : (process + 1) * size].to(held.dtype)
        logs = getattr(self, "_logs", {}).get("advantages")
        if logs is not None:  # the completions table shows what is trained on
            kept = list(logs)[: max(len(logs) - len(advantages), 0)]
            logs.clear()
            logs.extend([*kept, *advantages.tolist()])
        return output

    def _normalized(self, rewards: Tensor) -> Tensor:
        training = self.model.training  # type: ignore[attr-defined]
        number = self.num_generations  # type: ignore[attr-defined]
        if not training:
            number = getattr(self, "num_generations_eval", number)
        if rewards.shape[0] % number:
            raise RuntimeError(
                f"TRL returned {rewards.shape[0]} rewards, which is not a multiple of the {number} completions of a "
                f"prompt. {_versions()}"
            )
        index = torch.arange(rewards.shape[0], device=rewards.device) // number
        self.normalizer.to(rewards.device).train(training)
        counts = ~rewards.isnan()
        return self.normalizer(
            rewards,
            index,
            mask=None if bool(counts.all()) else counts,
            reward_weights=self.reward_weights,  # type: ignore[attr-defined]
            num_groups=max(rewards.shape[0] // number, 1),
        )

    def train(self, resume_from_checkpoint: Any = None, *arguments: Any, **options: Any) -> Any:
        """Train, as the trainer does; a checkpoint that is resumed from gives the normalizer its state back."""
        if resume_from_checkpoint and self.normalizer.state_dict():
            folder = resume_from_checkpoint
            if folder is True:
                from transformers.trainer_utils import get_last_checkpoint

                folder = get_last_checkpoint(self.args.output_dir)  # type: ignore[attr-defined]
            file = Path(folder) / STATE_FILE if folder else None
            if file is None or not file.is_file():
                raise FileNotFoundError(
                    f"{file} is missing: the checkpoint was not written with a normalizer that has state. Load what "
                    f"you have with normalizer.load_state_dict, and resume the model without this mixin."
                )
            self.normalizer.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
        return super().train(resume_from_checkpoint, *arguments, **options)  # type: ignore[misc]


def _check(normalizer: Any) -> None:
    if not isinstance(normalizer, RewardNormalizer):
        raise TypeError(
            f"normalizer is a {type(normalizer).__name__}, expected a reward normalizer such as evenly.policy.BNPO()."
        )
    if normalizer.sync:
        raise ValueError(
            "normalizer has sync=True, and TRL has gathered the rewards of all processes already: make it without."
        )


def _saver(normalizer: RewardNormalizer) -> TrainerCallback:
    from transformers import TrainerCallback

    class Saver(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero and normalizer.state_dict():
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                if folder.is_dir():
                    torch.save(normalizer.state_dict(), folder / STATE_FILE)

    return Saver()


def _trl() -> Any:
    try:
        return importlib.import_module("trl")
    except ImportError as error:
        raise ImportError(
            "evenly.policy.trl needs TRL, which is not installed or not complete: pip install evenly[trl]"
        ) from error


def _versions() -> str:
    try:
        return f"(TRL {importlib.metadata.version('trl')} is installed.)"
    except importlib.metadata.PackageNotFoundError:
        return "(TRL is not installed.)"
