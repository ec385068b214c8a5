"""RLOO: a rollout is compared with the mean of the *other* rollouts of its prompt.

.. math::
    A_i = r_i - \\frac{1}{m_j - 1} \\sum_{k \\in j,\\, k \\ne i} r_k = \\frac{m_j}{m_j - 1} (r_i - \\bar r_j)

The baseline does not depend on the rollout itself, so that the estimate of the policy gradient is unbiased.

Use it where that matters, with few rollouts a prompt above all: with m of them the mean of the whole group shrinks the
gradient by (m - 1)/m.

References:
    Kool, van Hoof & Welling, *Buy 4 REINFORCE Samples, Get a Baseline for Free!*, ICLR 2019 workshop. Ahmadian et al.,
    *Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs*, 2024, arXiv
    2402.14740.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from evenly.policy._common import RewardNormalizer, Rollouts, Singletons, advantages, positive, spread

__all__ = ["RLOO", "rloo_advantages"]


def rloo_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    scale: Literal["batch"] | None = None,
    eps: float = 1e-4,
    mask: Tensor | None = None,
    response_mask: Tensor | None = None,
    reward_weights: Tensor | Sequence[float] | None = None,
    num_groups: int | None = None,
    singletons: Singletons = "error",
) -> Tensor:
    """Advantages over the mean of the other rollouts of the group. See :class:`RLOO` for the arguments.

    >>> rloo_advantages(torch.tensor([1.0, 0.0, 4.0, 8.0, 6.0]), torch.tensor([7, 7, 3, 3, 3]))
    tensor([ 1., -1., -3.,  3.,  0.])
    """
    _check(scale, eps)
    return advantages(
        lambda rollouts: _rule(rollouts, scale, eps),
        rewards,
        group_ids,
        mask=mask,
        response_mask=response_mask,
        reward_weights=reward_weights,
        num_groups=num_groups,
        singletons=singletons,
    )


class RLOO(RewardNormalizer):
    """Leave-one-out advantages: reward - mean of the group's other rewards.

    Call it with ``(rewards, group_ids)``; the arguments of the call, its result and its errors are those of
    ``RewardNormalizer.forward``. It keeps no state.

    Args:
        num_rewards: reward components; each is normalized by itself and the advantages are averaged.
        scale: ``None`` (default), or ``"batch"``: divide by the standard deviation of the batch's advantages, as
            TRL does with ``normalize_advantages``.
        eps: added to that standard deviation, default 1e-4.
        singletons: a group with one rollout is an ``"error"``, gets ``"zero"``, or keeps its ``"raw"`` reward.
        sync, process_group: gather the rollouts of all processes first.

    Raises:
        ValueError: a setting is out of range.

    >>> RLOO()(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([2, 2, 2]))
    tensor([ 1.0000, -0.5000, -0.5000])
    """

    def __init__(
        self,
        num_rewards: int = 1,
        *,
        scale: Literal["batch"] | None = None,
        eps: float = 1e-4,
        singletons: Singletons = "error",
        sync: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__(num_rewards, singletons=singletons, sync=sync, process_group=process_group)
        _check(scale, eps)
        self.scale, self.eps = scale, eps

    def _rule(self, rollouts: Rollouts) -> Tensor:
        return _rule(rollouts, self.scale, self.eps)

    def extra_repr(self) -> str:
        """The settings."""
        return f"scale={self.scale!r}, eps={self.eps}, {super().extra_repr()}"


def _check(scale: str | None, eps: float) -> None:
    if scale not in ("batch", None):
        raise ValueError(f"scale={scale!r}, expected 'batch' or None.")
    positive("eps", eps)


def _rule(rollouts: Rollouts, scale: str | None, eps: float) -> Tensor:
    factor = torch.where(rollouts.count > 1, rollouts.count / (rollouts.count - 1).clamp(min=1), 1.0)
    result = rollouts.centred * rollouts.of_rows(factor)
    if scale is None:
        return result
    scaled = result / (spread(result, rollouts.mask, 1) + eps)
    return torch.where(result == 0, result.new_zeros(()), scaled)
