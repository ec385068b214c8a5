"""What the reward normalizers share: checks, groups of rollouts, rows from other processes, running moments.

A reward normalizer measures what the rollouts of a group (of one prompt, usually) share and takes it out of their
rewards. :func:`advantages` does what is the same for each of them and asks the method for the rest: a rule that
gets :class:`Rollouts` and returns an advantage for each rollout and reward component.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import evenly.core as core
from evenly.core import Moments

__all__ = [
    "RewardNormalizer",
    "Rollouts",
    "Running",
    "Singletons",
    "advantages",
    "centred_in_batch",
    "checked_range",
    "positive",
    "spread",
    "state",
    "unbiased",
]

#: What becomes of a group with one rollout: refuse it, give it the advantage 0, or give it the baseline 0.
Singletons = Literal["error", "zero", "raw"]


class Rollouts(NamedTuple):
    """Rewards and what their groups share, in float64; B rollouts, K reward components, G groups.

    Attributes:
        values: (B, K) rewards, mapped to [0, 1] where the method has a reward range.
        mask: (B, K) which rewards count; None: all.
        index: (B,) the group of each rollout, in 0..G-1; None where there are no groups.
        centred: (B, K) rewards minus the mean of their group; exactly 0 in a group of equal rewards.
        mean, var, count: (G, K) of each group; the variance is the biased one.
        alone: (G, K) groups with one rollout that counts.
        raw: groups with one rollout have the baseline 0 and the scale 1.
    """

    values: Tensor
    mask: Tensor | None
    index: Tensor | None  # type: ignore[assignment]
    centred: Tensor
    mean: Tensor
    var: Tensor
    count: Tensor  # type: ignore[assignment]
    alone: Tensor
    raw: bool

    def of_rows(self, statistic: Tensor) -> Tensor:
        """A statistic of groups (G, K), for each rollout (B, K)."""
        assert self.index is not None
        return statistic.index_select(0, self.index)

    def groups(self) -> Tensor:
        """(G, K): the groups that have a baseline of their own."""
        return self.count > (0 if self.raw else 1)


Rule = Callable[[Rollouts], Tensor]


@torch.no_grad()
def advantages(
    rule: Rule,
    rewards: Tensor,
    group_ids: Tensor | None,
    *,
    mask: Tensor | None = None,
    response_mask: Tensor | None = None,
    reward_weights: Tensor | Sequence[float] | None = None,
    num_groups: int | None = None,
    reward_range: tuple[float, float] | None = None,
    singletons: Singletons = "error",
    grouped: bool = True,
    sync: bool = False,
    process_group: Any = None,
) -> Tensor:
    """Check the arguments, measure the groups, apply the rule, average the components, spread over the tokens."""
    values, ids, counts = _checked(rewards, group_ids, mask, num_groups, grouped)
    if singletons not in ("error", "zero", "raw"):
        raise ValueError(f"singletons={singletons!r}, expected 'error', 'zero' or 'raw'.")
    if response_mask is not None and (response_mask.ndim != 2 or response_mask.shape[0] != rewards.shape[0]):
        raise ValueError(
            f"response_mask has shape {tuple(response_mask.shape)}, expected ({rewards.shape[0]}, tokens): one row for "
            f"each reward."
        )
    rows = slice(0, values.shape[0])
    if sync:
        values, ids, counts, rows = _gathered(values, ids, counts, process_group)
    # From here on every process of a synchronized batch sees the same rows, and so the same errors.
    if counts is not None:
        values = torch.where(counts, values, values.new_zeros(()))
    if not values.isfinite().all():
        row = int((~values.isfinite()).any(1).nonzero()[0])
        raise ValueError(
            f"rewards has a value that is not finite (row {row}: {values[row].tolist()}). Say with mask= which "
            f"rewards count; the others get the advantage 0."
        )
    if reward_range is not None:
        values = _scaled(values, counts, reward_range)
    rollouts = _measured(values, counts, ids, num_groups, singletons) if grouped else _ungrouped(values, counts)
    result = rule(rollouts)
    if grouped and singletons == "zero":
        result = torch.where(rollouts.of_rows(rollouts.alone), result.new_zeros(()), result)
    if counts is not None:
        result = torch.where(counts, result, result.new_zeros(()))
    result = result[rows]
    weights = _weights(reward_weights, result)
    result = result.mean(1) if weights is None else (result * weights).mean(1)
    if response_mask is not None:
        result = torch.where(response_mask.bool(), result.unsqueeze(1), result.new_zeros(()))
    return result.to(torch.float64 if rewards.dtype == torch.float64 else torch.float32)


class RewardNormalizer(nn.Module):
    """The base of the reward normalizers: a module that turns rewards into advantages.

    A subclass calls ``super().__init__`` and writes ``_rule``, which gets :class:`Rollouts` and returns (B, K). It
    may keep buffers; what they hold is part of its ``state_dict``.

    Args:
        num_rewards: reward components K; rewards are (B,) or (B, K).
        singletons: what becomes of a group with one rollout, which has nothing to be compared with. ``"error"``
            (default): ValueError; ``"zero"``: its advantage is 0, and it does not count in statistics over groups;
            ``"raw"``: its baseline is 0 and its scale 1, as in verl.
        sync: gather the rollouts of all processes first, so that the result does not depend on how they are
            spread. The same label on two processes is the same group. Every process of the group must call.
        process_group: the processes that ``sync`` gathers from; default: all.

    Raises:
        ValueError, TypeError: a setting is out of range.
    """

    _grouped = True
    _range: tuple[float, float] | None = None

    def __init__(
        self, num_rewards: int = 1, *, singletons: Singletons = "error", sync: bool = False, process_group: Any = None
    ) -> None:
        super().__init__()
        if isinstance(num_rewards, bool) or not isinstance(num_rewards, int) or num_rewards < 1:
            raise ValueError(f"num_rewards={num_rewards!r}, expected a whole number of at least 1.")
        if singletons not in ("error", "zero", "raw"):
            raise ValueError(f"singletons={singletons!r}, expected 'error', 'zero' or 'raw'.")
        self.num_rewards = num_rewards
        self.singletons: Singletons = singletons
        self.sync = sync
        self.process_group = process_group

    def forward(
        self,
        rewards: Tensor,
        group_ids: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        response_mask: Tensor | None = None,
        reward_weights: Tensor | Sequence[float] | None = None,
        num_groups: int | None = None,
    ) -> Tensor:
        """Turn rewards into advantages. No gradient flows.

        Args:
            rewards: (B,) or (B, K), floating-point, a row a rollout. With K components each is normalized by
                itself and the advantages are averaged.
            group_ids: (B,) integers; rollouts with the same label are of the same group. In any order.
            mask: boolean, (B,) or (B, K): which rewards count. The others, NaN included, have no effect and get
                the advantage 0. Without it a reward that is not finite is refused.
            response_mask: (B, T), which tokens are the policy's.
            reward_weights: K factors of the components in the average, default 1.
            num_groups: labels are in ``[0, num_groups)``; saves sorting them.

        Returns:
            (B,) advantages, or (B, T) with ``response_mask``; float64 for float64 rewards, else float32.

        Raises:
            TypeError: rewards are not floating-point, labels not integers, masks not boolean.
            ValueError: shapes or devices do not match, rewards are not finite or out of range, a group has one
                rollout (see ``singletons``).
        """
        components = rewards.shape[1] if isinstance(rewards, Tensor) and rewards.ndim == 2 else 1
        if components != self.num_rewards:
            raise ValueError(
                f"rewards has {components} components, and {type(self).__name__} was made for {self.num_rewards}: "
                f"make it with num_rewards={components}."
            )
        return advantages(
            self._rule,
            rewards,
            group_ids,
            mask=mask,
            response_mask=response_mask,
            reward_weights=reward_weights,
            num_groups=num_groups,
            reward_range=self._range,
            singletons=self.singletons,
            grouped=self._grouped,
            sync=self.sync,
            process_group=self.process_group,
        )

    def _rule(self, rollouts: Rollouts) -> Tensor:
        raise TypeError(f"{type(self).__name__} has no rule: write _rule(rollouts) in the subclass.")

    def extra_repr(self) -> str:
        """The settings that are not the defaults of every normalizer."""
        shown = [f"num_rewards={self.num_rewards}", f"singletons={self.singletons!r}"]
        return ", ".join([*shown, *(["sync=True"] if self.sync else [])])


class Running(NamedTuple):
    """Mean, biased variance and count, merged batch after batch; each of shape (K,)."""

    count: Tensor  # type: ignore[assignment]
    mean: Tensor
    var: Tensor

    def merged(self, new: Moments, decay: float) -> Running:
        """Let the count of what was seen before fade by ``decay`` and join the new values to it.

        The formula is that of Chan, Golub & LeVeque (1983): with ``decay=1`` the result is that of all values at
        once. A component without new values stays as it is.
        """
        old = decay * self.count
        total = old + new.count
        share = new.count / total.clamp(min=torch.finfo(total.dtype).tiny)
        apart = new.mean - self.mean
        mean = self.mean + share * apart
        var = (1 - share) * self.var + share * (new.var + (1 - share) * apart.square())
        any_new = new.count > 0
        return Running(*(torch.where(any_new, a, b) for a, b in zip((total, mean, var), self, strict=True)))


def centred_in_batch(values: Tensor, mask: Tensor | None) -> Tensor:
    """(B, K) minus the mean over the rows; exactly 0 where all are equal."""
    if not values.shape[0]:
        return values
    lowest = (values if mask is None else torch.where(mask, values, math.inf)).amin(0)
    lowest = torch.where(lowest.isfinite(), lowest, lowest.new_zeros(()))
    return core.normalize(values - lowest, "b k -> k", scale=None, mask=mask)


def spread(x: Tensor, mask: Tensor | None, correction: float) -> Tensor:
    """(K,): the standard deviation over the rows of (B, K); 0 where there are not enough values for one."""
    moments = core.moments(x, "b k -> k", mask=mask)
    return unbiased(moments.var, moments.count, correction).sqrt()


def unbiased(var: Tensor, count: Tensor, correction: float) -> Tensor:
    """The variance with the divisor ``count - correction``; 0 where that is not positive."""
    left = count - correction
    return torch.where(left > 0, var * count / left.clamp(min=torch.finfo(var.dtype).tiny), torch.zeros_like(var))


def state(num_rewards: int, value: float, device: torch.device | str | None) -> Tensor:
    """A buffer of one number a component: float64, where the device has it."""
    wide = torch.device(device).type != "mps" if device is not None else True
    return torch.full((num_rewards,), value, dtype=torch.float64 if wide else torch.float32, device=device)


def positive(what: str, value: float, *, zero: bool = True, below: float = math.inf) -> float:
    """Refuse what is not a number in [0, below], or (0, below] with ``zero=False``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{what}={value!r}, expected a number.")
    if not (0 <= value <= below) or (value == 0 and not zero):
        low = "of at least 0" if zero else "above 0"
        end = "" if below == math.inf else f" and at most {below:g}"
        raise ValueError(f"{what}={value}, expected a number {low}{end}.")
    return float(value)


def checked_range(reward_range: tuple[float, float]) -> tuple[float, float]:
    """Refuse what is not a finite interval."""
    if not isinstance(reward_range, tuple | list) or len(reward_range) != 2:
        raise ValueError(f"reward_range={reward_range!r}, expected two numbers, (lowest, highest).")
    low, high = map(float, reward_range)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"reward_range={reward_range!r}, expected two finite numbers, the lower one first.")
    return low, high


def _checked(
    rewards: Tensor, group_ids: Tensor | None, mask: Tensor | None, num_groups: int | None, grouped: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if not isinstance(rewards, Tensor):
        raise TypeError(
            f"rewards is a {type(rewards).__name__}, expected a tensor. Convert with torch.tensor(rewards)."
        )
    if not rewards.is_floating_point():
        raise TypeError(f"rewards is {rewards.dtype}, expected floating-point values. Convert with rewards.float().")
    if rewards.ndim not in (1, 2) or (rewards.ndim == 2 and rewards.shape[1] == 0):
        raise ValueError(
            f"rewards has shape {tuple(rewards.shape)}, expected (rollouts,) or (rollouts, components). "
            f"Flatten groups of the same size with rewards.flatten() and label them."
        )
    size = rewards.shape[0]
    if group_ids is None:
        if grouped:
            raise TypeError(
                "group_ids is missing: give each rollout an integer label, the same for rollouts of one prompt."
            )
    elif not isinstance(group_ids, Tensor):
        raise TypeError(
            f"group_ids is a {type(group_ids).__name__}, expected a tensor of integers. Labels that are not numbers "
            f"become numbers with numpy.unique(labels, return_inverse=True)."
        )
    elif group_ids.is_floating_point() or group_ids.is_complex() or group_ids.dtype == torch.bool:
        raise TypeError(f"group_ids is {group_ids.dtype}, expected integers. Convert with group_ids.long().")
    elif tuple(group_ids.shape) != (size,):
        raise ValueError(
            f"group_ids has shape {tuple(group_ids.shape)}, expected ({size},): one label for each of the "
            f"{size} rollouts of rewards with shape {tuple(rewards.shape)}."
        )
    elif group_ids.device != rewards.device:
        raise ValueError(
            f"group_ids is on {group_ids.device} and rewards on {rewards.device}: move it with group_ids.to("
            f"rewards.device)."
        )
    if num_groups is not None:
        if not isinstance(num_groups, int) or num_groups < 1:
            raise ValueError(f"num_groups={num_groups!r}, expected a whole number of at least 1.")
        if group_ids is not None and size:
            low, high = map(int, group_ids.aminmax())
            if low < 0 or high >= num_groups:
                raise ValueError(
                    f"group_ids has labels from {low} to {high}, expected 0 to {num_groups - 1} (num_groups)."
                )
    # Counts and small differences are exact in float64; an accelerator without it takes float32.
    dtype = torch.float32 if rewards.device.type == "mps" else torch.float64
    values = rewards.detach().to(dtype)
    values = values.unsqueeze(1) if values.ndim == 1 else values
    counts = None
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask is {given}, expected a boolean tensor (true: the reward counts).")
        if mask.shape[:1] != rewards.shape[:1] or mask.shape not in (rewards.shape, rewards.shape[:1]):
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}, expected that of rewards, {tuple(rewards.shape)}, or one value "
                f"for each rollout, ({size},)."
            )
        counts = (mask if mask.ndim == 2 else mask.unsqueeze(1)).expand_as(values)
    return values, group_ids, counts


def _gathered(
    values: Tensor, ids: Tensor | None, counts: Tensor | None, process_group: Any
) -> tuple[Tensor, Tensor | None, Tensor | None, slice]:
    """The rows of all processes, in the order of their ranks, and where one's own are."""
    import torch.distributed as dist

    own = slice(0, values.shape[0])
    if not (dist.is_available() and dist.is_initialized()):
        return values, ids, counts, own
    group = process_group if process_group is not None else dist.group.WORLD
    world = dist.get_world_size(group)
    if world == 1:
        return values, ids, counts, own
    components = values.shape[1]
    # One process may bring a mask and another none: all bring one.
    counted = torch.ones_like(values, dtype=torch.bool) if counts is None else counts
    size = torch.tensor([values.shape[0]], device=values.device)
    sizes = [torch.empty_like(size) for _ in range(world)]
    dist.all_gather(sizes, size, group=group)
    lengths = [int(one) for one in sizes]

    def joined(rows: Tensor) -> Tensor:
        padded = rows.new_zeros((max(lengths), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    both = joined(torch.cat([values, counted.to(values.dtype)], 1))
    start = sum(lengths[: dist.get_rank(group)])
    values, counted = both[:, :components], both[:, components:] > 0
    every = None if bool(counted.all()) else counted
    return (
        values,
        None if ids is None else joined(ids.long()),
        every,
        slice(start, start + lengths[dist.get_rank(group)]),
    )


def _scaled(values: Tensor, counts: Tensor | None, reward_range: tuple[float, float]) -> Tensor:
    low, high = reward_range
    outside = (values < low) | (values > high)
    if counts is not None:
        outside &= counts
    if outside.any():
        row = int(outside.any(1).nonzero()[0])
        raise ValueError(
            f"rewards must lie in [{low:g}, {high:g}]; row {row} is {values[row].tolist()}. Give the range of your "
            f"rewards as reward_range=(lowest, highest)."
        )
    if (low, high) != (0.0, 1.0):
        values = (values - low) / (high - low)
    return values if counts is None else torch.where(counts, values, values.new_zeros(()))


def _measured(
    values: Tensor, counts: Tensor | None, ids: Tensor | None, num_groups: int | None, singletons: Singletons
) -> Rollouts:
    assert ids is not None
    if num_groups is None:
        labels, index = torch.unique(ids, return_inverse=True)
        groups = len(labels)
    else:
        labels, index, groups = None, ids.long(), num_groups
    if groups == 0:  # no rollouts at all
        none = values.new_zeros((0, values.shape[1]))
        return Rollouts(values, counts, index, values, none, none, none, none > 0, singletons == "raw")
    # Measured from the lowest reward of the group, equal rewards are zeros, whatever their value rounds to.
    shown = values if counts is None else torch.where(counts, values, math.inf)
    lowest = values.new_full((groups, values.shape[1]), math.inf)
    lowest.scatter_reduce_(0, index.unsqueeze(1).expand_as(values), shown, "amin")
    lowest = torch.where(lowest.isfinite(), lowest, lowest.new_zeros(()))
    above = values - lowest.index_select(0, index)
    centred, moments = core.normalize(above, by=index, num_groups=groups, scale=None, mask=counts, return_stats=True)
    mean, count = lowest + moments.mean, moments.count
    alone = count == 1
    if singletons != "zero" and bool(alone.any()):
        if singletons == "error":
            group = int(alone.any(1).nonzero()[0])
            label = int(labels[group]) if labels is not None else group
            raise ValueError(
                f"Group {label} has 1 rollout that counts; a baseline needs at least 2 samples per group. Sample more, "
                f"or say what to do with singletons='zero' (advantage 0) or 'raw' (baseline 0)."
            )
        mean = torch.where(alone, mean.new_zeros(()), mean)
        centred = torch.where(alone.index_select(0, index), values, centred)
    return Rollouts(values, counts, index, centred, mean, moments.var, count, alone, singletons == "raw")


def _ungrouped(values: Tensor, counts: Tensor | None) -> Rollouts:
    none = values.new_zeros((0, values.shape[1]))
    return Rollouts(values, counts, None, values, none, none, none, none > 0, False)


def _weights(reward_weights: Tensor | Sequence[float] | None, result: Tensor) -> Tensor | None:
    if reward_weights is None:
        return None
    weights = torch.as_tensor(reward_weights, dtype=result.dtype, device=result.device)
    if tuple(weights.shape) != (result.shape[1],) or not weights.isfinite().all():
        raise ValueError(
            f"reward_weights is {weights.tolist()}, expected {result.shape[1]} finite numbers, one for each component."
        )
    return weights
