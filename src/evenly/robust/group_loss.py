"""Losses on groups of samples: the mean loss of each group, and a weighted sum of these means.

.. math::
    L_g = \\frac{\\sum_{i:\\, g_i = g} w_i\\, \\ell_i}{\\sum_{i:\\, g_i = g} w_i}, \\qquad
    \\text{loss} = \\sum_g v_g\\, L_g

A group that is absent from the batch has :math:`L_g = 0`. Methods differ in the group weights :math:`v` alone:
:class:`ERMLoss` takes the groups' shares of the batch (the plain mean), or makes groups count alike whatever their
size; :class:`evenly.robust.GroupDROLoss` learns them online. Use :class:`ERMLoss` as the baseline of the others: it
is called like them and keeps the same account of the groups' losses.

References:
    Shiori Sagawa, Pang Wei Koh, Tatsunori B. Hashimoto & Percy Liang, *Distributionally Robust Neural Networks for
    Group Shifts*, ICLR 2020, arXiv 1911.08731, sections 2 and 4 (the baselines).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from evenly.core import Moments, moments
from evenly.nn.sync import sync_moments

__all__ = ["ERMLoss", "GroupLoss"]

#: One loss a sample, shape (B,), from predictions and targets.
SampleLoss = Callable[[Tensor, Tensor], Tensor]


class GroupLoss(nn.Module):
    """What losses on groups share; subclass it with a method ``group_weights`` of your own.

    Args:
        n_groups: number of groups m; group ids are 0 to m - 1.
        group_counts: training samples in each group, (m,) integers.
        loss: the loss of one sample. ``"cross_entropy"``: logits (B, C), targets (B,) class indices or (B, C)
            probabilities. ``"binary_cross_entropy"``: logits and targets (B,) or (B, 1). Or a function of
            (predictions, targets) that returns (B,) values, such as
            ``functools.partial(F.cross_entropy, reduction="none", label_smoothing=0.1)``.
        gamma: rate of the moving average ``ema`` of the groups' losses, in (0, 1]. A group enters it with its first
            loss as it is.
        sync: under data-parallel training, take the groups' means over the batch of all processes, so that the state
            is the same on each. Gradients are then those of the joined batch when they are averaged over processes, as
            ``DistributedDataParallel`` does. In training mode only; every process must take the same number of steps.
        process_group: the processes of ``sync``; default: all.
        device, dtype: of the state; float32 by default. It is never kept in less: casting the module to half precision
            leaves it as it is.

    Attributes:
        ema: moving average of each group's loss (m,); 0 before its first sample.
        seen: whether a group has had a sample (m,).

    Shape:
        predictions as ``loss`` takes them, ``groups`` (B,) integers, ``weights`` (B,) or None; returns a scalar,
        float32 or float64 (the losses of half-precision predictions are computed in float32).

    State changes in training mode only; ``eval()`` before validation. In a batch without samples the loss is 0 and the
    state stays. Losses that are not finite show in the result and leave the state of their group as it was.

    Raises:
        ValueError: settings out of range; predictions that are not floating-point; shapes that do not fit; a group id
            outside [0, m) or a negative weight (checked on the CPU only, where that costs no synchronization).
        TypeError: group ids that are not integers.

    >>> class WorstGroupLoss(GroupLoss):
    ...     def group_weights(self, mean, mass):
    ...         return torch.nn.functional.one_hot(mean.argmax(), self.n_groups).to(mean.dtype)
    >>> loss = WorstGroupLoss(2)
    >>> loss.reduce(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 1, 1]))
    tensor(4.)
    >>> loss.ema
    tensor([1., 4.])
    """

    ema: Tensor
    seen: Tensor
    group_counts: Tensor | None

    def __init__(
        self,
        n_groups: int,
        group_counts: Sequence[int] | Tensor | None = None,
        *,
        loss: str | SampleLoss = "cross_entropy",
        gamma: float = 0.1,
        sync: bool = False,
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(n_groups, int) or isinstance(n_groups, bool) or n_groups < 1:
            raise ValueError(f"n_groups={n_groups!r}, expected a positive integer.")
        if not (callable(loss) or loss in _LOSSES):
            raise ValueError(f"loss={loss!r}, expected {', '.join(map(repr, _LOSSES))} or a function.")
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype={dtype}, expected torch.float32 or torch.float64: the state is not kept in less.")
        check_number("gamma", gamma, 0, 1, least_excluded=True)
        self.n_groups = n_groups
        self.loss = loss
        self.gamma = gamma
        self.sync = sync
        self.process_group = process_group
        options: dict[str, Any] = {"device": device, "dtype": dtype or torch.float32}
        self.register_buffer("ema", torch.zeros(n_groups, **options))
        self.register_buffer("seen", torch.zeros(n_groups, dtype=torch.bool, device=device))
        counts = None if group_counts is None else _counts(group_counts, n_groups).to(device)
        self.register_buffer("group_counts", counts, persistent=False)

    def forward(self, predictions: Tensor, targets: Tensor, groups: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            predictions: what the model returned.
            targets: what it should have returned.
            groups: group id of each sample.
            weights: non-negative weight of each sample within its group; default 1. A sample of weight 0 is left out:
                whatever its loss is, NaN included, has no effect.
        """
        if weights is not None and weights.shape == predictions.shape[:1]:
            # What is left out enters as 0, so that no gradient of it is a product with NaN.
            kept = (weights > 0).view(-1, *[1] * (predictions.ndim - 1))
            predictions = torch.where(kept, predictions, torch.zeros_like(predictions))
        return self.reduce(self.sample_losses(predictions, targets), groups, weights)

    def sample_losses(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """The loss of each sample (B,), in float32 at least."""
        if not predictions.is_floating_point():
            raise ValueError(f"predictions are {predictions.dtype}, expected floating-point logits.")
        predictions = _at_least_float32(predictions)
        losses = (
            _LOSSES[self.loss](predictions, targets) if isinstance(self.loss, str) else self.loss(predictions, targets)
        )
        if not isinstance(losses, Tensor) or tuple(losses.shape) != tuple(predictions.shape[:1]):
            got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
            raise ValueError(
                f"loss must return one value a sample, shape {tuple(predictions.shape[:1])}, got {got}. Losses of "
                "torch.nn.functional do with reduction='none'."
            )
        return losses

    def reduce(self, losses: Tensor, groups: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss of a batch from the losses of its samples (B,), for tasks that compute them on their own."""
        self._check(losses, groups, weights)
        losses, groups = _at_least_float32(losses), groups.long()
        # Where the sample weights are constants the loss is one sum over samples with constant coefficients; else the
        # means themselves are differentiated.
        constant = weights is None
        mean, mass = self._measure(losses.detach() if constant else losses, groups, weights)
        with torch.no_grad():
            if self.training:
                self._track(mean, mass)
            group_weights = self.group_weights(mean.detach(), mass.detach())
        if not constant:
            return (group_weights * mean).sum()
        own = ((group_weights / mass.clamp(min=1)).to(losses.dtype)[groups] * losses).sum()
        if not self._synced():
            return own
        # The value is that of the joined batch. The gradient is of this process's part, times the number of processes,
        # over which it will be averaged.
        return (group_weights * mean).sum() + self._processes() * (own - own.detach())

    def group_weights(self, mean: Tensor, mass: Tensor) -> Tensor:
        """The weight of each group's mean loss (m,), computed without gradient.

        Args:
            mean: mean losses (m,), 0 for a group that is absent.
            mass: number of samples of each group in the batch, or the sum of their weights (m,).
        """
        total = mass.sum()
        return torch.where(total > 0, mass / total, torch.zeros_like(mass))

    def reset(self) -> None:
        """Forget all state."""
        self.ema.zero_()
        self.seen.zero_()

    def extra_repr(self) -> str:
        name = self.loss if isinstance(self.loss, str) else getattr(self.loss, "__name__", type(self.loss).__name__)
        return f"{self.n_groups}, loss={name}, gamma={self.gamma}" + (", sync=True" if self.sync else "")

    def _check(self, losses: Tensor, groups: Tensor, weights: Tensor | None) -> None:
        if losses.ndim != 1 or not losses.is_floating_point():
            raise ValueError(f"losses are {losses.dtype} of shape {tuple(losses.shape)}, expected floats (B,).")
        if (
            not isinstance(groups, Tensor)
            or groups.is_floating_point()
            or groups.is_complex()
            or groups.dtype == torch.bool
        ):
            got = groups.dtype if isinstance(groups, Tensor) else type(groups).__name__
            raise TypeError(f"groups are {got}, expected a tensor of integers such as torch.int64.")
        if groups.shape != losses.shape:
            raise ValueError(f"groups have shape {tuple(groups.shape)}, expected {tuple(losses.shape)}: one a sample.")
        if weights is not None and (weights.shape != losses.shape or not weights.is_floating_point()):
            raise ValueError(
                f"weights are {weights.dtype} of shape {tuple(weights.shape)}, expected floats {tuple(losses.shape)}."
            )
        if weights is None or torch.compiler.is_compiling() or weights.device.type != "cpu":
            return
        if not bool((weights >= 0).all()):
            raise ValueError("weights must be at least 0; got a negative one or NaN.")

    def _measure(self, losses: Tensor, groups: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        if weights is None:
            measured = self._moments(losses, groups, None)
            return measured.mean, measured.count
        # A ratio of two means of the same samples: that of weight times loss, and that of the weights.
        counts = weights > 0
        weights = weights.to(losses.dtype)
        columns = torch.stack([weights * torch.where(counts, losses, torch.zeros_like(losses)), weights], dim=1)
        measured = self._moments(columns, groups, counts.unsqueeze(1))
        weighted, weight = measured.mean.unbind(1)
        present = measured.count[:, 1] > 0
        mean = torch.where(present, weighted / torch.where(present, weight, torch.ones_like(weight)), 0.0)
        return mean, measured.count[:, 1] * weight

    def _moments(self, values: Tensor, groups: Tensor, mask: Tensor | None) -> Moments:
        try:
            measured = moments(values, by=groups, num_groups=self.n_groups, mask=mask)
        except ValueError:
            outside = groups[(groups < 0) | (groups >= self.n_groups)]
            if not outside.numel():
                raise
            raise ValueError(f"group id {int(outside[0])} outside [0, {self.n_groups}).") from None
        return sync_moments(measured, self.process_group) if self._synced() else measured

    def _synced(self) -> bool:
        return self.sync and self.training and dist.is_available() and dist.is_initialized()

    def _processes(self) -> int:
        return dist.get_world_size(self.process_group)

    def _track(self, mean: Tensor, mass: Tensor) -> None:
        mean = mean.to(self.ema.dtype)
        present = (mass > 0) & mean.isfinite()
        moved = torch.where(self.seen, torch.lerp(self.ema, mean, self.gamma), mean)
        self.ema.copy_(torch.where(present, moved, self.ema))
        self.seen.logical_or_(present)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Moves to a device go through; a cast below float32 would round away most steps of the state.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.is_floating_point() and new.dtype.itemsize < 4:
                self._buffers[name] = old.to(new.device)
        return self


class ERMLoss(GroupLoss):
    """The mean loss, or the mean after weighting so that every group counts alike.

    ``reweight=False`` is empirical risk minimization, :math:`v_g` = the group's share of the batch. With
    ``reweight=True`` each sample has the weight :math:`n / (m\\, n_g)`, so that over an epoch of ordinary shuffled
    batches each group's total weight is the same: upweighting. The same in expectation is ERM under
    :class:`evenly.robust.GroupBalancedSampler`; do not use both at once.

    Args:
        n_groups: number of groups m.
        group_counts: training samples in each group; needed by ``reweight``.
        reweight: make the groups count alike.
        loss, gamma, sync, process_group, device, dtype: see :class:`evenly.robust.GroupLoss`.

    Raises:
        ValueError: ``reweight`` without ``group_counts`` or with an empty group; else as :class:`GroupLoss`.

    >>> logits, y = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 1, 0])
    >>> groups = torch.tensor([0, 0, 1])
    >>> ERMLoss(2)(logits, y, groups)
    tensor(1.1629)
    >>> ERMLoss(2, [2, 1], reweight=True)(logits, y, groups)  # each group has half of the weight
    tensor(1.6343)
    """

    importance: Tensor | None

    def __init__(
        self,
        n_groups: int,
        group_counts: Sequence[int] | Tensor | None = None,
        reweight: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(n_groups, group_counts, **options)
        self.reweight = reweight
        importance = None
        if reweight:
            if self.group_counts is None:
                raise ValueError("reweight=True needs group_counts, the training samples in each group.")
            if bool((self.group_counts == 0).any()):
                k = int((self.group_counts == 0).nonzero()[0])
                raise ValueError(f"group_counts[{k}] is 0: a group without samples cannot be weighted up.")
            counts = self.group_counts.to(self.ema.dtype)
            importance = counts.sum() / (self.n_groups * counts)
        self.register_buffer("importance", importance, persistent=False)

    def group_weights(self, mean: Tensor, mass: Tensor) -> Tensor:
        """The groups' shares of the batch, times their importance."""
        share = super().group_weights(mean, mass)
        return share if self.importance is None else share * self.importance

    def extra_repr(self) -> str:
        return super().extra_repr() + (", reweight=True" if self.reweight else "")


def check_number(
    name: str, value: float, least: float, most: float = math.inf, *, least_excluded: bool = False
) -> None:
    """Refuse a setting that is not a finite number in [least, most], or in (least, most]."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not least <= value <= most or (least_excluded and value == least):
        low = f"above {least}" if least_excluded else f"of at least {least}"
        raise ValueError(
            f"{name}={value!r}, expected a number {low}" + (f" and at most {most}." if most < math.inf else ".")
        )


def _counts(group_counts: Sequence[int] | Tensor, n_groups: int) -> Tensor:
    counts = torch.as_tensor(group_counts).detach()
    if tuple(counts.shape) != (n_groups,):
        raise ValueError(f"group_counts has shape {tuple(counts.shape)}, expected ({n_groups},): one a group.")
    if (
        counts.is_complex()
        or counts.dtype == torch.bool
        or not bool(((counts >= 0) & (counts == counts.round())).all())
    ):
        raise ValueError(f"group_counts must be whole numbers of at least 0, got {counts.tolist()}.")
    if not int(counts.sum()):
        raise ValueError("group_counts are all 0; give the number of training samples in each group.")
    return counts.to(torch.int64)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    shapes = f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)}"
    if logits.ndim != 2:
        raise ValueError(f"cross_entropy takes logits (B, C); got {shapes}. For other shapes give a function as loss=.")
    if targets.is_floating_point():
        if targets.shape != logits.shape:
            raise ValueError(
                f"floating-point targets are probabilities (B, C); got {shapes}. Class indices are integers."
            )
        return functional.cross_entropy(logits, targets.to(logits.dtype), reduction="none")
    if targets.shape != logits.shape[:1]:
        raise ValueError(f"class indices have shape (B,); got {shapes}.")
    # No index is ignored: a sample to leave out has weight 0.
    return functional.cross_entropy(logits, targets.long(), reduction="none", ignore_index=torch.iinfo(torch.int64).min)


def _binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    flat, wanted = logits.squeeze(1) if logits.ndim == 2 else logits, targets
    if wanted.ndim == 2:
        wanted = wanted.squeeze(1)
    if flat.ndim != 1 or wanted.shape != flat.shape:
        raise ValueError(
            f"binary_cross_entropy takes logits and targets (B,) or (B, 1); got {tuple(logits.shape)} and "
            f"{tuple(targets.shape)}."
        )
    return functional.binary_cross_entropy_with_logits(flat, wanted.to(flat.dtype), reduction="none")


_LOSSES: dict[str, SampleLoss] = {"cross_entropy": _cross_entropy, "binary_cross_entropy": _binary_cross_entropy}
