"""Accuracy by group: the worst group, the average, and the average under the training data's group shares.

.. math::
    \\text{worst} = \\min_{g:\\, N_g > 0} a_g, \\qquad \\text{average} = \\sum_g \\frac{N_g}{N} a_g, \\qquad
    \\text{adjusted} = \\sum_g \\frac{n_g}{n} a_g

with :math:`a_g` the accuracy on the :math:`N_g` evaluated samples of group g and :math:`n_g` its training samples. Test
sets of group-shift benchmarks are often balanced over groups; the adjusted average is what a test set distributed like
the training set would give. Intervals are Wilson's for a proportion: they hold at 0 and 1 and in small groups.

References:
    Shiori Sagawa, Pang Wei Koh, Tatsunori B. Hashimoto & Percy Liang, *Distributionally Robust Neural Networks for
    Group Shifts*, ICLR 2020, arXiv 1911.08731, appendix C.1 (the adjusted average).
    Edwin B. Wilson, *Probable inference, the law of succession, and statistical inference*, JASA, 1927.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from evenly.core import moments
from evenly.robust.group_loss import check_number

__all__ = ["GroupAccuracy", "WorstGroupAccuracy", "worst_group_accuracy"]


@dataclass(frozen=True)
class GroupAccuracy:
    """Accuracy by group.

    Attributes:
        worst: the least accuracy of a group that has samples.
        worst_group: its id (the first, if several have it).
        average: accuracy over all samples.
        adjusted_average: average of the groups' accuracies by training shares; None where no counts were given, NaN
            where a group with training samples was not evaluated.
        per_group: (m,) float64, NaN for a group without samples.
        counts: evaluated samples (m,) int64.
        interval: lower and upper bound of each group's accuracy (m, 2), NaN for a group without samples.
        confidence: of the intervals.
        names: of the groups.
    """

    worst: float
    worst_group: int
    average: float
    adjusted_average: float | None
    per_group: Tensor
    counts: Tensor
    interval: Tensor
    confidence: float
    names: tuple[str, ...]

    def __str__(self) -> str:
        width = max(map(len, (*self.names, "adjusted average")))
        order = sorted(range(len(self.names)), key=lambda g: (math.isnan(self.per_group[g]), float(self.per_group[g])))
        lines = [f"{'group':{width}}  accuracy  {self.confidence:.0%} interval  samples"]
        for g in order:
            low, high = self.interval[g].tolist()
            number = int(self.counts[g])
            value = f"{self.per_group[g]:8.4f}  {low:.4f} - {high:.4f}" if number else f"{'-':>8}  {'':15}"
            lines.append(f"{self.names[g]:{width}}  {value}  {number:7d}")
        lines.append(f"{'average':{width}}  {self.average:8.4f}  {'':15}  {int(self.counts.sum()):7d}")
        if self.adjusted_average is not None:
            lines.append(f"{'adjusted average':{width}}  {self.adjusted_average:8.4f}")
        return "\n".join(lines)


class WorstGroupAccuracy:
    """Accuracy by group, collected batch by batch.

    Args:
        n_groups: number of groups m.
        train_group_counts: training samples in each group (m,), for the adjusted average.
        names: one a group, such as ``group_ids(...).names``; default ``"group 0"``, ...
        confidence: of the intervals, between 0 and 1.

    Counts are exact integers on the CPU, whatever the batches are. ``merge`` adds those of another collector and
    ``sync`` those of all processes.

    Raises:
        ValueError: settings or shapes that do not fit; a group id outside [0, m).
        TypeError: group ids that are not integers.

    >>> metric = WorstGroupAccuracy(2, train_group_counts=[90, 10])
    >>> metric.update(torch.tensor([1, 1, 0, 0]), torch.tensor([1, 1, 0, 1]), torch.tensor([0, 0, 1, 1]))
    >>> result = metric.compute()
    >>> result.worst, result.average, round(result.adjusted_average, 4)
    (0.5, 0.75, 0.95)
    >>> print(result)
    group             accuracy  95% interval  samples
    group 1             0.5000  0.0945 - 0.9055        2
    group 0             1.0000  0.3424 - 1.0000        2
    average             0.7500                         4
    adjusted average    0.9500
    """

    def __init__(
        self,
        n_groups: int,
        train_group_counts: Sequence[int] | Tensor | None = None,
        names: Sequence[str] | None = None,
        confidence: float = 0.95,
    ) -> None:
        if not isinstance(n_groups, int) or isinstance(n_groups, bool) or n_groups < 1:
            raise ValueError(f"n_groups={n_groups!r}, expected a positive integer.")
        check_number("confidence", confidence, 0, 1, least_excluded=True)
        if confidence == 1:
            raise ValueError("confidence=1, expected a number below 1.")
        self.n_groups = n_groups
        self.confidence = confidence
        self.names = tuple(names) if names is not None else tuple(f"group {g}" for g in range(n_groups))
        self._train: Tensor | None = None
        if train_group_counts is not None:
            self._train = torch.as_tensor(train_group_counts).detach().cpu().to(torch.float64)
            if tuple(self._train.shape) != (n_groups,) or not bool((self._train >= 0).all()) or not self._train.sum():
                raise ValueError(
                    f"train_group_counts={self._train.tolist()}, expected {n_groups} numbers of at least 0, not all 0."
                )
        if len(self.names) != n_groups:
            raise ValueError(f"{len(self.names)} names for {n_groups} groups.")
        self.reset()

    def reset(self) -> None:
        """Forget what was collected."""
        self.correct = torch.zeros(self.n_groups, dtype=torch.int64)
        self.counts = torch.zeros(self.n_groups, dtype=torch.int64)

    @torch.no_grad()
    def update(self, predictions: Tensor, targets: Tensor, groups: Tensor) -> None:
        """Count a batch.

        Args:
            predictions: classes (B,) of any integer or boolean type, or scores (B, C) whose largest counts.
            targets: classes (B,).
            groups: group ids (B,).
        """
        predictions, targets, groups = (torch.as_tensor(v).detach() for v in (predictions, targets, groups))
        if predictions.ndim == 2:
            if predictions.shape[1] < 2:
                raise ValueError(
                    "scores (B, 1) have no largest class; give classes (B,), such as scores.squeeze(1) > 0."
                )
            predictions = predictions.argmax(1)
        elif predictions.is_floating_point():
            raise ValueError(
                "predictions (B,) are floating-point; give classes (B,), such as logits > 0, or scores (B, C)."
            )
        if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
            raise TypeError(f"groups are {groups.dtype}, expected a tensor of integers such as torch.int64.")
        if not predictions.shape == targets.shape == groups.shape or groups.ndim != 1:
            raise ValueError(
                f"predictions {tuple(predictions.shape)}, targets {tuple(targets.shape)} and groups "
                f"{tuple(groups.shape)} must have one value a sample."
            )
        if not groups.numel():
            return
        low, high = (int(value) for value in torch.aminmax(groups))
        if low < 0 or high >= self.n_groups:
            raise ValueError(f"group id {low if low < 0 else high} outside [0, {self.n_groups}).")
        right = (predictions.to(targets.device) == targets).cpu()
        found = moments(right.to(torch.float64), by=groups.cpu().long(), num_groups=self.n_groups)
        self.correct += (found.mean * found.count).round().long()
        self.counts += found.count.long()

    def merge(self, other: WorstGroupAccuracy) -> None:
        """Add what another collector of the same groups has."""
        if other.names != self.names:
            raise ValueError(f"the groups differ: {list(self.names)} here, {list(other.names)} there.")
        self.correct += other.correct
        self.counts += other.counts

    def sync(self, process_group: Any = None) -> None:
        """Add up the counts of all processes; each then holds the sum. Call it once, before ``compute``."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        both = torch.stack([self.correct, self.counts])
        if dist.get_backend(process_group) == "nccl":
            both = both.cuda()
        dist.all_reduce(both, group=process_group)
        self.correct, self.counts = both.cpu().unbind(0)

    def compute(self) -> GroupAccuracy:
        """The accuracies of what was collected.

        Raises:
            ValueError: nothing was collected.
        """
        if not int(self.counts.sum()):
            raise ValueError("no sample was collected; call update first.")
        number = self.counts.double()
        per_group = self.correct.double() / torch.where(number > 0, number, torch.nan)
        adjusted = None
        if self._train is not None:
            share = self._train / self._train.sum()
            adjusted = float(torch.where(share > 0, share * per_group, 0.0).sum())
        ranked = torch.where(number > 0, per_group, torch.inf)
        return GroupAccuracy(
            worst=float(ranked.min()),
            worst_group=int(ranked.argmin()),
            average=float(self.correct.sum() / self.counts.sum()),
            adjusted_average=adjusted,
            per_group=per_group,
            counts=self.counts.clone(),
            interval=_wilson(per_group, number, self.confidence),
            confidence=self.confidence,
            names=self.names,
        )


def worst_group_accuracy(
    y_true: Tensor,
    y_pred: Tensor,
    groups: Tensor,
    train_group_counts: Sequence[int] | Tensor | None = None,
    *,
    names: Sequence[str] | None = None,
    confidence: float = 0.95,
) -> GroupAccuracy:
    """Accuracy by group, in one call.

    Args:
        y_true: classes (N,).
        y_pred: predicted classes (N,), or scores (N, C).
        groups: group ids (N,); the number of groups is that of ``train_group_counts`` or ``names``, else the largest id
            plus 1.
        train_group_counts, names, confidence: see :class:`WorstGroupAccuracy`.

    Raises:
        ValueError, TypeError: as :class:`WorstGroupAccuracy`; ValueError for no sample.

    >>> y, g = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 1])
    >>> result = worst_group_accuracy(y, torch.tensor([0, 1, 0, 0]), g)
    >>> result.worst, result.worst_group, result.average
    (0.5, 1, 0.75)
    """
    ids = torch.as_tensor(groups)
    given = train_group_counts if train_group_counts is not None else names
    n_groups = len(given) if given is not None else (int(ids.max()) + 1 if ids.numel() else 1)
    metric = WorstGroupAccuracy(max(n_groups, 1), train_group_counts, names, confidence)
    metric.update(y_pred, y_true, ids)
    return metric.compute()


def _wilson(p: Tensor, n: Tensor, confidence: float) -> Tensor:
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)).sqrt()
    return torch.stack([(centre - half).clamp(min=0), (centre + half).clamp(max=1)], dim=1)  # rounding at 0 and 1
