"""The report of a conversion: a row a layer, and how far the outputs agree before and after."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from evenly.conversion.batches import Batches, first_output

__all__ = ["Agreement", "Report", "Row"]


@dataclass
class Row:
    """One layer.

    Attributes:
        name: its name in the model.
        source, target: what it was and what it is now.
        r2: share of the variance of the original layer's output that the new one explains on the calibration
            data, after the fit; ``None`` where nothing was measured.
        statistics: ``"carried"`` (running statistics or the function itself kept exactly), ``"estimated"`` (new
            running statistics from the calibration data), ``"lost"`` (the layer now measures others), ``"folded"``
            (in the weights of the layer before it), ``"kept"`` (not converted).
        note: what else was done, or why not.
    """

    name: str
    source: str
    target: str
    r2: float | None = None
    statistics: str = "lost"
    note: str = ""


@dataclass
class Agreement:
    """Outputs of the original and the converted network on the calibration data.

    Attributes:
        samples: how many predictions were compared.
        top1: share of predictions with the same largest entry.
        cosine: mean cosine of the two outputs.
        max_relative: largest absolute difference over the largest absolute output.
    """

    samples: int
    top1: float
    cosine: float
    max_relative: float


@dataclass
class Report:
    """What :func:`evenly.convert` did. ``print(report)`` shows it as a table."""

    target: str
    rows: list[Row] = field(default_factory=list)
    agreement: Agreement | None = None
    solved: list[str] = field(default_factory=list)
    refined_steps: int = 0
    loss: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON: a number that is not finite becomes ``None``."""
        return _finite(asdict(self))

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"{len(self.rows)} normalization layers to {self.target}", title_justify="left")
        for column in ("layer", "from", "to", "R²", "statistics", "note"):
            table.add_column(column, justify="right" if column == "R²" else "left", overflow="fold")
        for row in self.rows:
            r2 = "" if row.r2 is None else f"{row.r2:.4f}"
            table.add_row(row.name or "(model)", row.source, row.target, r2, row.statistics, row.note)
        return Group(table, Text(self._footer()))

    def _footer(self) -> str:
        lines = []
        if self.solved:
            lines.append(f"Weights solved again: {len(self.solved)} layers.")
        if self.loss is not None:
            lines.append(f"Refined for {self.refined_steps} steps: loss {self.loss[0]:.4g} to {self.loss[1]:.4g}.")
        if self.agreement is not None:
            a = self.agreement
            lines.append(
                f"Outputs before and after on {a.samples} predictions: top-1 agreement {100 * a.top1:.2f} %, cosine "
                f"{a.cosine:.6f}, largest relative difference {a.max_relative:.3g}."
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=140, force_terminal=False, color_system=None, record=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@torch.no_grad()
def measure_agreement(before: nn.Module, after: nn.Module, batches: Batches) -> Agreement:
    """Compare the outputs of two networks, batch by batch."""
    samples, same, cosine, worst, largest = 0, 0, 0.0, 0.0, 0.0
    for args, kwargs in batches:
        a = first_output(before(*args, **kwargs)).double()
        b = first_output(after(*args, **kwargs)).double()
        if a.shape != b.shape:
            raise ValueError(f"The converted model returns shape {tuple(b.shape)}, the original {tuple(a.shape)}.")
        if a.ndim == 0:
            a, b = a.view(1), b.view(1)
        if a.ndim >= 4:  # (N, classes, H, W)
            a, b = a.movedim(1, -1), b.movedim(1, -1)
        a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
        samples += len(a)
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        cosine += float(torch.cosine_similarity(a, b, dim=-1).sum())
        worst = max(worst, float((a - b).abs().max()))
        largest = max(largest, float(a.abs().max()))
    relative = worst / largest if largest > 0 else (0.0 if worst == 0 else float("inf"))
    return Agreement(samples, same / samples, cosine / samples, relative)
