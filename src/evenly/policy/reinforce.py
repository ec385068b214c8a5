"""REINFORCE: the reward minus a baseline that does not depend on the rollout.

.. math::
    A_i = r_i - b

The baseline b is the mean of the rollout's group, of the batch, of the batches before this one (running), or a number.
With the mean of the group and ``scale="batch"`` it is the advantage of REINFORCE++ with a baseline; with the mean of
the group alone, the one that BNPO has with alpha = beta = 1.

Use the running baseline where a prompt has one rollout only, the group's where it has several.

References:
    Williams, *Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning*, Machine
    Learning 8, 1992, section 6 (reinforcement comparison: the running baseline). Hu, *REINFORCE++*, 2025, arXiv
    2501.03262 (the batch's standard deviation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

import evenly.core as core
from evenly.policy._common import (
    RewardNormalizer,
    Rollouts,
    Running,
    Singletons,
    advantages,
    centred_in_batch,
    positive,
    spread,
    state,
)

__all__ = ["Reinforce", "reinforce_advantages"]

_BASELINES = ("group", "batch", "running")


def reinforce_advantages(
    rewards: Tensor,
    group_ids: Tensor | None = None,
    *,
    baseline: Literal["group", "batch"] | float = "group",
    scale: Literal["batch"] | None = None,
    eps: float = 1e-4,
    mask: Tensor | None = None,
    response_mask: Tensor | None = None,
    reward_weights: Tensor | Sequence[float] | None = None,
    num_groups: int | None = None,
    singletons: Singletons = "error",
) -> Tensor:
    """Reward minus baseline. See :class:`Reinforce` for the arguments; it also has the running baseline.

    >>> reinforce_advantages(torch.tensor([1.0, 0.0, 4.0, 8.0]), torch.tensor([7, 7, 3, 3]))
    tensor([ 0.5000, -0.5000, -2.0000,  2.0000])
    >>> reinforce_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), baseline=0.5)
    tensor([ 0.5000, -0.5000,  0.5000,  0.5000])
    """
    if baseline == "running":
        raise ValueError("baseline='running' needs a place to be kept in: use evenly.policy.Reinforce.")
    _check(baseline, scale, eps)
    return advantages(
        lambda rollouts: _scaled(_centred(rollouts, baseline), rollouts, scale, eps),
        rewards,
        group_ids,
        mask=mask,
        response_mask=response_mask,
        reward_weights=reward_weights,
        num_groups=num_groups,
        singletons=singletons,
        grouped=baseline == "group",
    )


class Reinforce(RewardNormalizer):
    """Advantages of REINFORCE with a baseline: reward - b.

    Call it with ``(rewards, group_ids)``; labels are needed for the group's baseline only. The arguments of the call,
    its result and its errors are those of ``RewardNormalizer.forward``.

    Args:
        num_rewards: reward components; each is normalized by itself and the advantages are averaged.
        baseline: ``"group"`` (default): the mean of the group; ``"batch"``: of the batch; ``"running"``: of the
            batches before this one (of this one, if it is the first); or a number.
        decay: with ``"running"``: the weight of what was seen before fades by this factor a batch, default 0.9.
            1 keeps everything, 0 the last batch.
        scale: ``None`` (default), or ``"batch"``: divide by the standard deviation of the batch's advantages.
        eps: added to that standard deviation, default 1e-4.
        singletons: with ``"group"``: a group with one rollout is an ``"error"``, gets ``"zero"``, or keeps its
            ``"raw"`` reward.
        sync, process_group: gather the rollouts of all processes first.

    Attributes:
        count, running_mean, running_var: (K,) buffers of the running baseline: how many rewards it stands for, their
            mean and their biased variance. In evaluation mode they are used and left as they are.

    Raises:
        ValueError: a setting is out of range.

    >>> reinforce = Reinforce(baseline="running", decay=1.0)
    >>> reinforce(torch.tensor([1.0, 0.0])), reinforce(torch.tensor([1.0, 1.0]))
    (tensor([ 0.5000, -0.5000]), tensor([0.5000, 0.5000]))
    >>> reinforce.running_mean
    tensor([0.7500], dtype=torch.float64)
    """

    count: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_rewards: int = 1,
        *,
        baseline: Literal["group", "batch", "running"] | float = "group",
        decay: float = 0.9,
        scale: Literal["batch"] | None = None,
        eps: float = 1e-4,
        singletons: Singletons = "error",
        sync: bool = False,
        process_group: Any = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_rewards, singletons=singletons, sync=sync, process_group=process_group)
        _check(baseline, scale, eps)
        positive("decay", decay, below=1)
        self.baseline, self.decay, self.scale, self.eps = baseline, decay, scale, eps
        self._grouped = baseline == "group"
        if baseline == "running":
            for name in ("count", "running_mean", "running_var"):
                self.register_buffer(name, state(num_rewards, 0.0, device))

    def _rule(self, rollouts: Rollouts) -> Tensor:
        if self.baseline != "running":
            return _scaled(_centred(rollouts, self.baseline), rollouts, self.scale, self.eps)
        values = rollouts.values
        now = core.moments(values, "b k -> k", mask=rollouts.mask)
        before = Running(*(held.to(values) for held in (self.count, self.running_mean, self.running_var)))
        mean = torch.where(before.count > 0, before.mean, now.mean)
        if self.training:
            after = before.merged(now, self.decay)
            for held, value in zip((self.count, self.running_mean, self.running_var), after, strict=True):
                held.copy_(value)
        return _scaled(values - mean, rollouts, self.scale, self.eps)

    def extra_repr(self) -> str:
        """The settings."""
        shown = [f"baseline={self.baseline!r}"] + ([f"decay={self.decay}"] if self.baseline == "running" else [])
        return ", ".join([*shown, f"scale={self.scale!r}, eps={self.eps}", super().extra_repr()])


def _check(baseline: str | float, scale: str | None, eps: float) -> None:
    number = isinstance(baseline, int | float) and not isinstance(baseline, bool) and abs(baseline) < math.inf
    if baseline not in _BASELINES and not number:
        raise ValueError(f"baseline={baseline!r}, expected 'group', 'batch', 'running' or a finite number.")
    if scale not in ("batch", None):
        raise ValueError(f"scale={scale!r}, expected 'batch' or None.")
    positive("eps", eps)


def _centred(rollouts: Rollouts, baseline: str | float) -> Tensor:
    if baseline == "group":
        return rollouts.centred
    if baseline == "batch":
        return centred_in_batch(rollouts.values, rollouts.mask)
    return rollouts.values - float(baseline)


def _scaled(centred: Tensor, rollouts: Rollouts, scale: str | None, eps: float) -> Tensor:
    if scale is None:
        return centred
    scaled = centred / (spread(centred, rollouts.mask, 1) + eps)
    return torch.where(centred == 0, centred.new_zeros(()), scaled)
