"""BNPO: rewards minus the success rate of their prompt, divided by a Beta density fitted to the success rates.

.. math::
    A(q, o) = \\frac{R(q, o) - p(q)}{f_{\\rm Beta}(p(q); \\alpha, \\beta)}, \\qquad
    f_{\\rm Beta}(p; \\alpha, \\beta) = \\frac{p^{\\alpha - 1} (1 - p)^{\\beta - 1}}{B(\\alpha, \\beta)}

where p(q) is the mean reward of prompt q's rollouts. The success rates of the batch are taken to be Beta(a, b); with
their mean M and variance V over prompts, the method of moments gives

.. math::
    \\nu = \\frac{M (1 - M)}{V} - 1, \\quad a = \\nu M, \\quad b = \\nu (1 - M), \\qquad
    \\alpha = 1 + \\frac{a}{3}, \\quad \\beta = 1 + \\frac{b}{3},

which makes :math:`E_p[\\, p (1 - p) / f_{\\rm Beta}(p; \\alpha, \\beta)^2 ]`, the variance of the policy gradient up to
a constant, as small as it can be. With alpha = beta = 1 the advantage is that of REINFORCE with the mean of the group
as baseline; with alpha = beta = 3/2 it is that of GRPO times pi/8. The parameters are estimated anew in each batch, so
that the normalization follows the policy as it improves.

Use it in place of GRPO where rewards are 0/1, or at least bounded, and prompts differ in difficulty. It costs no more
than GRPO. TRL's ``loss_type="bnpo"`` is something else: a way to average over tokens.

Where the released code and the paper differ: the code keeps alpha and beta at 1 or above, bounds 1/f by 1e6, and takes
the divisor n - 1 in V, and so does this module. The code's advantages are NaN where all success rates are equal
(V = 0); here alpha = beta = 1 then. The code gives a prompt with one rollout the baseline 0; here it is an error,
unless ``singletons`` says otherwise.

Reference:
    Xiao, Zhang & Cao, *BNPO: Beta Normalization Policy Optimization*, 2025, arXiv 2506.02864: Beta normalization, its
    theorem on the variance of the gradient, and the advantage decomposition for several rewards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import evenly.core as core
from evenly.core import Moments
from evenly.policy._common import (
    RewardNormalizer,
    Rollouts,
    Running,
    Singletons,
    advantages,
    checked_range,
    positive,
    state,
    unbiased,
)

__all__ = ["BNPO", "beta_parameters", "bnpo_advantages"]

#: Below this variance of the success rates, prompts are equally hard and there is no Beta distribution to fit.
_EQUALLY_HARD = 1e-12


@torch.no_grad()
def beta_parameters(p: Tensor, clamp_min: float | None = 1.0) -> tuple[Tensor, Tensor]:
    """The parameters of BNPO's Beta density, from the success rates of the prompts of a batch.

    Args:
        p: (n,) or (n, K) success rates in [0, 1], one of each prompt; with K components each has its own density.
        clamp_min: keep alpha and beta at least here; default 1, as the released code does. ``None``: the theory's
            values, which differ where V is larger than M(1 - M), as can happen in small batches.

    Returns:
        (alpha, beta), scalars or (K,), float64 for float64 input, else float32. Both are 1 where there are fewer
        than two prompts or their success rates are equal (V <= 1e-12).

    Raises:
        TypeError: p is not floating-point.
        ValueError: p is not finite or not in [0, 1], or has another shape.

    >>> beta_parameters(torch.tensor([0.25, 0.75, 0.5, 0.5, 0.75, 0.25]))  # M = 1/2, V = 1/20
    (tensor(1.6667), tensor(1.6667))
    """
    if not isinstance(p, Tensor) or not p.is_floating_point():
        given = p.dtype if isinstance(p, Tensor) else type(p).__name__
        raise TypeError(f"p is {given}, expected a floating-point tensor of success rates.")
    if p.ndim not in (1, 2):
        raise ValueError(f"p has shape {tuple(p.shape)}, expected (prompts,) or (prompts, components).")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("p must lie in [0, 1]: it is the mean of rewards that do.")
    if clamp_min is not None:
        positive("clamp_min", clamp_min)
    rates = p.detach().to(torch.float32 if p.device.type == "mps" else torch.float64)
    rates = rates if p.ndim == 2 else rates.unsqueeze(1)
    if not len(rates):
        one = torch.ones(rates.shape[1:], device=p.device, dtype=rates.dtype)
        alpha = beta = one
    else:
        moments = core.moments(rates, "n k -> k")
        alpha, beta = _fit(moments.mean, unbiased(moments.var, moments.count, 1), moments.count, clamp_min)
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    alpha, beta = (one.to(dtype) if p.ndim == 2 else one[0].to(dtype) for one in (alpha, beta))
    return alpha, beta


def bnpo_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    reward_range: tuple[float, float] = (0.0, 1.0),
    max_weight: float = 1e6,
    clamp_min: float | None = 1.0,
    parameters: tuple[Tensor | float, Tensor | float] | None = None,
    mask: Tensor | None = None,
    response_mask: Tensor | None = None,
    reward_weights: Tensor | Sequence[float] | None = None,
    num_groups: int | None = None,
    singletons: Singletons = "error",
) -> Tensor:
    """Beta-normalized advantages of one batch, from groups of any sizes.

    Args:
        rewards: (B,), or (B, K) with K components: the advantages of the components are averaged, each computed
            with its own success rates and density.
        group_ids: (B,) integers: rollouts with the same label are of the same prompt, in any order.
        reward_range: lowest and highest possible reward; rewards are mapped to [0, 1] with it.
        max_weight: the largest factor 1/f. Lower it where rewards are not 0/1 and training is unstable.
        clamp_min: see :func:`beta_parameters`.
        parameters: (alpha, beta) in place of the estimated ones; numbers or (K,). (1, 1) is REINFORCE with the mean
            of the group, (1.5, 1.5) is GRPO times pi/8.
        mask, response_mask, reward_weights, num_groups: see :class:`BNPO`'s call.
        singletons: a group with one rollout is an ``"error"``; gets ``"zero"``, and does not count in M and V; or has
            the success rate 0, ``"raw"``, as in the released code.

    Returns:
        (B,), or (B, T) with ``response_mask``; float64 for float64 rewards, else float32. No gradient flows.

    Raises:
        TypeError: rewards are not floating-point, labels not integers.
        ValueError: rewards are not finite or outside ``reward_range``, shapes do not match, a setting is out of
            range, a group has one rollout.

    >>> rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    >>> prompts = torch.tensor([5, 5, 5, 5, 9, 9])
    >>> bnpo_advantages(rewards, prompts)
    tensor([ 0.7500, -0.2500, -0.2500, -0.2500,  0.0000,  0.0000])
    """
    reward_range = _check(reward_range, max_weight, clamp_min)
    given = None if parameters is None else _given(parameters)

    def rule(rollouts: Rollouts) -> Tensor:
        if given is None:
            new, _ = _measure(rollouts)
            alpha, beta = _fit(new.mean, unbiased(new.var, new.count, 1), new.count, clamp_min)
        else:
            alpha, beta = (one.to(rollouts.values) for one in given)
        return _weighted(rollouts, alpha, beta, max_weight)

    return advantages(
        rule,
        rewards,
        group_ids,
        mask=mask,
        response_mask=response_mask,
        reward_weights=reward_weights,
        num_groups=num_groups,
        reward_range=reward_range,
        singletons=singletons,
    )


class BNPO(RewardNormalizer):
    """Beta-normalized advantages, with the parameters of the density estimated online.

    Call it with ``(rewards, group_ids)``; the arguments of the call, its result and its errors are those of
    ``RewardNormalizer.forward``, and rewards outside ``reward_range`` are a ValueError.

    Args:
        num_rewards: reward components K; each has its own density, and the advantages are averaged.
        decay: how much of what earlier batches told about M and V is kept. 0 (default, the paper's): each batch
            is by itself. 1: all prompts so far count the same. Between them, the weight of a prompt fades by this
            factor a batch, which steadies alpha and beta where a batch has few prompts.
        reward_range: lowest and highest possible reward; rewards are mapped to [0, 1] with it.
        max_weight: the largest factor 1/f, default 1e6.
        clamp_min: keep alpha and beta at least here, default 1; ``None``: do not.
        correct_noise: take the variance that p has because it is a mean of few rollouts out of V. The paper and its
            code do not (default).
        singletons: a group with one rollout is an ``"error"``; gets ``"zero"``, and does not count in M and V; or has
            the success rate 0, ``"raw"``, as in the released code.
        sync, process_group: gather the rollouts of all processes first, so that M and V are those of the whole batch.
        device: of the buffers.

    Attributes:
        alpha, beta: (K,) the parameters used last; 1 before the first batch.
        count, running_mean, running_var, running_noise: (K,) how many prompts the estimates stand for, the mean and
            the biased variance of their success rates, and the mean variance that is due to few rollouts. All are in
            the ``state_dict``. In evaluation mode alpha and beta are used as they are, and nothing changes.

    Raises:
        ValueError: a setting is out of range.

    >>> bnpo = BNPO()
    >>> bnpo(torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]), torch.tensor([5, 5, 5, 5, 9, 9, 9, 9]))
    tensor([ 0.7166, -0.2389, -0.2389, -0.2389,  0.2389,  0.2389,  0.2389, -0.7166])
    >>> bnpo.alpha, bnpo.beta
    (tensor([1.1667], dtype=torch.float64), tensor([1.1667], dtype=torch.float64))
    """

    alpha: Tensor
    beta: Tensor
    count: Tensor
    running_mean: Tensor
    running_var: Tensor
    running_noise: Tensor

    def __init__(
        self,
        num_rewards: int = 1,
        *,
        decay: float = 0.0,
        reward_range: tuple[float, float] = (0.0, 1.0),
        max_weight: float = 1e6,
        clamp_min: float | None = 1.0,
        correct_noise: bool = False,
        singletons: Singletons = "error",
        sync: bool = False,
        process_group: Any = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_rewards, singletons=singletons, sync=sync, process_group=process_group)
        self._range = _check(reward_range, max_weight, clamp_min)
        self.reward_range = self._range
        self.decay = positive("decay", decay, below=1)
        self.max_weight, self.clamp_min, self.correct_noise = max_weight, clamp_min, correct_noise
        for name, value in {"alpha": 1, "beta": 1, "count": 0, "mean": 0, "var": 0, "noise": 0}.items():
            name = f"running_{name}" if name in ("mean", "var", "noise") else name
            self.register_buffer(name, state(num_rewards, float(value), device))

    def _rule(self, rollouts: Rollouts) -> Tensor:
        if self.training:
            self._update(rollouts)
        alpha, beta = self.alpha.to(rollouts.values), self.beta.to(rollouts.values)
        return _weighted(rollouts, alpha, beta, self.max_weight)

    def _update(self, rollouts: Rollouts) -> None:
        new, noise = _measure(rollouts)
        before = Running(*(held.to(new.mean) for held in (self.count, self.running_mean, self.running_var)))
        after = before.merged(new, self.decay)
        share = new.count / after.count.clamp(min=torch.finfo(after.count.dtype).tiny)
        noise = torch.lerp(self.running_noise.to(noise), noise, torch.where(new.count > 0, share, 0.0))
        variance = unbiased(after.var, after.count, 1)
        alpha, beta = _fit(
            after.mean, variance - noise if self.correct_noise else variance, after.count, self.clamp_min
        )
        names = ("count", "running_mean", "running_var", "running_noise", "alpha", "beta")
        for name, value in zip(names, (*after, noise, alpha, beta), strict=True):
            getattr(self, name).copy_(value)

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"decay={self.decay}, reward_range={self.reward_range}, max_weight={self.max_weight:g}, "
            f"clamp_min={self.clamp_min}, correct_noise={self.correct_noise}, {super().extra_repr()}"
        )


def _check(reward_range: tuple[float, float], max_weight: float, clamp_min: float | None) -> tuple[float, float]:
    positive("max_weight", max_weight, zero=False)
    if clamp_min is not None:
        positive("clamp_min", clamp_min)
    return checked_range(reward_range)


def _given(parameters: tuple[Tensor | float, Tensor | float]) -> tuple[Tensor, Tensor]:
    if not isinstance(parameters, tuple | list) or len(parameters) != 2:
        raise ValueError(f"parameters={parameters!r}, expected (alpha, beta).")
    alpha, beta = (torch.as_tensor(one, dtype=torch.float64) for one in parameters)
    if not ((alpha > 0) & (alpha < math.inf)).all() or not ((beta > 0) & (beta < math.inf)).all():
        raise ValueError(f"parameters={parameters!r}, expected finite numbers above 0.")
    return alpha, beta


def _measure(rollouts: Rollouts) -> tuple[Moments, Tensor]:
    """Moments of the success rates over prompts, and the mean variance of a success rate as a mean of rollouts."""
    known = rollouts.groups()
    new = core.moments(rollouts.mean, "g k -> k", mask=known)
    noise = unbiased(rollouts.var, rollouts.count, 1) / rollouts.count.clamp(min=1)
    return new, core.moments(noise, "g k -> k", mask=known).mean


def _fit(mean: Tensor, variance: Tensor, count: Tensor, clamp_min: float | None) -> tuple[Tensor, Tensor]:
    """alpha and beta from the moments of the success rates; 1 and 1 where there is nothing to fit."""
    fits = (count >= 2) & (variance > _EQUALLY_HARD)
    nu = mean * (1 - mean) / torch.where(fits, variance, variance.new_ones(())) - 1
    alpha, beta = 1 + nu * mean / 3, 1 + nu * (1 - mean) / 3
    if clamp_min is not None:
        alpha, beta = alpha.clamp(min=clamp_min), beta.clamp(min=clamp_min)
    one = alpha.new_ones(())
    return torch.where(fits, alpha, one), torch.where(fits, beta, one)


def _weighted(rollouts: Rollouts, alpha: Tensor, beta: Tensor, max_weight: float) -> Tensor:
    # 1/f in logarithms: at p = 0 and p = 1 the density is 0, and the bound comes before the exponential.
    p = rollouts.mean.clamp(0, 1)  # a mean of values in [0, 1] can round to a neighbour of 1
    log_beta = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
    log_density = torch.special.xlogy(alpha - 1, p) + torch.special.xlog1py(beta - 1, -p) - log_beta
    weight = (-log_density).clamp(max=math.log(max_weight)).exp()
    result = rollouts.centred * rollouts.of_rows(weight)
    # Rollouts that are all right or all wrong teach nothing, however large their factor.
    return torch.where(rollouts.centred == 0, result.new_zeros(()), result)
