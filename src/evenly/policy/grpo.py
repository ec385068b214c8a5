"""GRPO: a rollout is compared with the others of its prompt, in units of their standard deviation.

.. math::
    A_i = \\frac{r_i - \\bar r_{j(i)}}{\\sigma_{j(i)} + \\epsilon}

where the mean and the standard deviation are those of the rewards of rollout i's group j. Without the division it
is the advantage of Dr. GRPO; with the standard deviation of the whole batch it is the one that does not weight
prompts by their difficulty.

Use it where every prompt has several rollouts and rewards have no natural unit. The standard deviation of 0/1 rewards
is a fixed function of the success rate; :class:`~evenly.policy.BNPO` fits that function to the batch.

References:
    Shao et al., *DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models*, 2024, arXiv
    2402.03300, section 4.1.2. Liu et al., *Understanding R1-Zero-Like Training: A Critical Perspective*, 2025, arXiv
    2503.20783 (without the division).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from evenly.policy._common import RewardNormalizer, Rollouts, Singletons, advantages, positive, spread, unbiased

__all__ = ["GRPO", "grpo_advantages"]


def grpo_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    scale: Literal["group", "batch"] | None = "group",
    eps: float = 1e-4,
    correction: float = 1,
    mask: Tensor | None = None,
    response_mask: Tensor | None = None,
    reward_weights: Tensor | Sequence[float] | None = None,
    num_groups: int | None = None,
    singletons: Singletons = "error",
) -> Tensor:
    """Advantages of GRPO from groups of any sizes. See :class:`GRPO` for the arguments.

    >>> grpo_advantages(torch.tensor([1.0, 0.0, 4.0, 8.0, 6.0]), torch.tensor([7, 7, 3, 3, 3]), eps=0.0)
    tensor([ 0.7071, -0.7071, -1.0000,  1.0000,  0.0000])
    """
    _check(scale, eps, correction)
    return advantages(
        lambda rollouts: _rule(rollouts, scale, eps, correction),
        rewards,
        group_ids,
        mask=mask,
        response_mask=response_mask,
        reward_weights=reward_weights,
        num_groups=num_groups,
        singletons=singletons,
    )


class GRPO(RewardNormalizer):
    """Advantages of GRPO: (reward - mean of the group) / (standard deviation + eps).

    Call it with ``(rewards, group_ids)``; the arguments of the call, its result and its errors are those of
    ``RewardNormalizer.forward``. It keeps no state.

    Args:
        num_rewards: reward components; each is normalized by itself and the advantages are averaged.
        scale: ``"group"`` (default): the group's standard deviation; ``"batch"``: that of all rewards; ``None``: 1.
        eps: added to the standard deviation, default 1e-4 as in TRL (verl: 1e-6). With 0, a group of equal rewards
            still has the advantage 0.
        correction: the variance divides by ``count - correction``; default 1.
        singletons: a group with one rollout is an ``"error"``, gets ``"zero"``, or keeps its ``"raw"`` reward.
        sync, process_group: gather the rollouts of all processes first.

    Raises:
        ValueError: a setting is out of range.

    >>> grpo = GRPO(scale=None)
    >>> grpo(torch.tensor([1.0, 0.0, 4.0, 8.0]), torch.tensor([7, 7, 3, 3]))
    tensor([ 0.5000, -0.5000, -2.0000,  2.0000])
    """

    def __init__(
        self,
        num_rewards: int = 1,
        *,
        scale: Literal["group", "batch"] | None = "group",
        eps: float = 1e-4,
        correction: float = 1,
        singletons: Singletons = "error",
        sync: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__(num_rewards, singletons=singletons, sync=sync, process_group=process_group)
        _check(scale, eps, correction)
        self.scale, self.eps, self.correction = scale, eps, correction

    def _rule(self, rollouts: Rollouts) -> Tensor:
        return _rule(rollouts, self.scale, self.eps, self.correction)

    def extra_repr(self) -> str:
        """The settings."""
        return f"scale={self.scale!r}, eps={self.eps}, correction={self.correction}, {super().extra_repr()}"


def _check(scale: str | None, eps: float, correction: float) -> None:
    if scale not in ("group", "batch", None):
        raise ValueError(f"scale={scale!r}, expected 'group', 'batch' or None.")
    positive("eps", eps)
    positive("correction", correction)


def _rule(rollouts: Rollouts, scale: str | None, eps: float, correction: float) -> Tensor:
    centred = rollouts.centred
    if scale is None:
        return centred
    if scale == "batch":
        std = spread(rollouts.values, rollouts.mask, correction)
        return _over(centred, std + eps)
    std = unbiased(rollouts.var, rollouts.count, correction).sqrt()
    if rollouts.raw:
        std = torch.where(rollouts.alone, std.new_ones(()), std)
    return _over(centred, rollouts.of_rows(std + eps))


def _over(centred: Tensor, scale: Tensor) -> Tensor:
    # 0/0 is a group of equal rewards without eps: nothing to learn from.
    return torch.where(centred == 0, centred.new_zeros(()), centred / scale)
