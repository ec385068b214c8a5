"""The report: one HTML file that holds everything, opens offline and loads nothing.

Charts are SVG in the page (:mod:`evenly.workbench.charts`), the heat map and the ranking are tables. The page has a
light and a dark scheme, and its tables can be sorted by click and by keyboard.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from evenly.workbench import charts
from evenly.workbench.metrics import LOWER, METRICS, Arm, Cell
from evenly.workbench.progress import notes, plus_minus
from evenly.workbench.trial import TrialFailure, TrialResult

if TYPE_CHECKING:
    from evenly.workbench.compare import Comparison, Plan

__all__ = ["render", "template", "write_report"]

_TITLES = {
    "mpc": ("mPC", "mean accuracy under corruption"),
    "clean": ("Clean", "accuracy on the test set"),
    "rpc": ("rPC", "mPC divided by clean accuracy"),
    "worst": ("Worst corruption", "accuracy under the worst corruption"),
    "domain": ("Domains", "mean accuracy on shifted domains"),
    "ood": ("Second data", "accuracy on the second data set"),
    "bits": ("Bits per byte", "mean cross-entropy on the test text, to base 2; less is better"),
}


def write_report(comparison: Comparison, plan: Plan, runs: Sequence[dict[str, Any]]) -> Path:
    """Write the report of a comparison to ``comparison.report``.

    Args:
        comparison: what to show.
        plan: what was planned.
        runs: the starts of the command on this folder, as :meth:`evenly.workbench.Store.runs` gives them.
    """
    path = comparison.report
    draft = path.with_suffix(".part")
    draft.write_text(render(comparison, plan, runs), encoding="utf-8")
    os.replace(draft, path)
    return path


def render(comparison: Comparison, plan: Plan, runs: Sequence[dict[str, Any]]) -> str:
    """The report as a string; arguments as in :func:`write_report`."""
    from evenly.models import recipe

    arms = comparison.arms
    metrics = [m for m in METRICS if any(m in arm.scores for arm in arms)]
    metrics.sort(key=lambda m: m != comparison.metric)
    newest = runs[-1]
    text = plan.data_kind == "text"
    return template("report.html.j2").render(
        comparison=comparison,
        plan=plan,
        settings=plan.template,
        epochs=_epochs(plan),
        steps=plan.template.max_steps,
        date=datetime.fromtimestamp(newest["started"]).strftime("%d %B %Y, %H:%M"),
        columns=[(m, *_TITLES[m]) for m in metrics],
        rows=[_row(arm, metrics, recipe(arm.norm).description) for arm in arms],
        dumbbell=_dumbbell(arms),
        heat=_heat(arms, plan),
        slopes=[] if text else _slopes(arms, plan.batch_sizes),
        curves=[] if text else _curves(arms),
        text=text,
        lower=LOWER,
        rates=_rates(comparison) if text else [],
        progress=_progress(arms, plan.batch_sizes) if text else [],
        legend=[(f"batch {size}", f"s{i % 6}") for i, size in enumerate(plan.batch_sizes)],
        times=_bars(arms, plan.batch_sizes, "ms", 1, lambda cell: 1000 * cell.seconds_per_step),
        memory=_bars(arms, plan.batch_sizes, *_memory_unit(arms)),
        memory_unit=_memory_unit(arms)[0],
        memory_kind=next((c.memory_kind for a in arms for c in a.cells if c.memory_bytes), "saved"),
        search=_search(comparison, plan),
        edges="; ".join(
            f"{arm.norm} (batch {', '.join(str(cell.batch_size) for cell in arm.cells if cell.at_edge)})"
            for arm in arms
            if any(cell.at_edge for cell in arm.cells)
        ),
        failures=[
            (s.norm, s.batch_size, "search" if s.purpose == "tune" else f"seed {s.seed}", failure.error)
            for s, failure in comparison.failed
        ],
        runs=[(datetime.fromtimestamp(run["started"]).strftime("%Y-%m-%d %H:%M:%S"), run["command"]) for run in runs],
        environment=newest["environment"],
        percent=lambda value: "–" if value != value else f"{100 * value:.1f}",
    )


def template(name: str) -> Template:
    """A page of ``templates/``, which share their style and the script that sorts tables."""
    environment = Environment(
        loader=PackageLoader("evenly.workbench", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _epochs(plan: Plan) -> str:
    if len(set(plan.epochs.values())) == 1:
        return str(plan.epochs[plan.batch_sizes[0]])
    return ", ".join(f"{epochs} at batch {size}" for size, epochs in plan.epochs.items())


def _row(arm: Arm, metrics: Sequence[str], description: str) -> dict[str, Any]:
    cells = [
        {"value": _number(arm.mean(m)), "text": plus_minus(arm.mean(m), arm.spread(m), m), "metric": m} for m in metrics
    ]
    first = "bits" if any(m in LOWER for m in metrics) else "clean"
    return {
        "rank": arm.rank,
        "norm": arm.norm,
        "description": description,
        "cells": cells,
        "worst": (arm.worst or "").replace("_", " "),
        "by_batch": [
            {"value": _number(cell.mean(first)), "text": plus_minus(cell.mean(first), math.nan, first)}
            for cell in arm.cells
        ],
        "notes": notes(arm, rates=False),
        "rates": " / ".join("–" if cell.lr is None else f"{cell.lr:g}" for cell in arm.cells),
    }


def _number(value: float) -> str:
    return "-1" if value != value else f"{value:.6f}"


def _dumbbell(arms: Sequence[Arm]) -> Markup | None:
    rows = [
        (
            arm.norm,
            (100 * arm.mean("clean"), 100 * arm.spread("clean")),
            (100 * arm.mean("mpc"), 100 * arm.spread("mpc")),
        )
        for arm in arms
        if "clean" in arm.scores
    ]
    return Markup(charts.dumbbell(rows, ("clean", "mPC"))) if rows else None


@dataclass(frozen=True)
class _Heat:
    norms: list[str]
    severities: tuple[int, ...]
    families: list[tuple[str, list[tuple[str, list[dict[str, Any]]]]]]


def _heat(arms: Sequence[Arm], plan: Plan) -> _Heat:
    shown = [arm for arm in arms if arm.corruptions]
    families: list[tuple[str, list[tuple[str, list[dict[str, Any]]]]]] = []
    if shown:
        for family, names in _families(list(shown[0].corruptions)):
            lines = []
            for name in names:
                cells = []
                for arm in shown:
                    row = arm.corruptions[name]
                    cells.append({"mean": fmean(row), "each": [round(v, 4) for v in row]})
                lines.append((name.replace("_", " "), cells))
            families.append((family, lines))
        domains = shown[0].cells[0].domains
        if domains:
            lines = []
            for name in domains:
                cells = []
                for arm in shown:
                    values = [cell.domains[name] for cell in arm.cells if name in cell.domains]
                    cells.append({"mean": fmean(values) if values else math.nan, "each": []})
                lines.append((name.replace("_", " "), cells))
            families.append(("shifted domains", lines))
    return _Heat([arm.norm for arm in shown], plan.template.severities, families)


def _families(names: list[str]) -> list[tuple[str, list[str]]]:
    from evenly.data.corruptions import FAMILIES

    found = [(family, [name for name in members if name in names]) for family, members in FAMILIES.items()]
    found = [(family, members) for family, members in found if members]
    rest = [name for name in names if not any(name in members for _, members in found)]
    return [*found, *([("corruptions" if not found else "other", rest)] if rest else [])]


def _slopes(arms: Sequence[Arm], sizes: Sequence[int]) -> list[tuple[str, Markup]]:
    def values(cell: Cell, metric: str) -> list[float]:
        return [100 * v for v in cell.scores.get(metric, {}).values()]

    every = [v for arm in arms for cell in arm.cells for m in ("clean", "mpc") for v in values(cell, m)]
    low = max(0.0, math.floor(min(every, default=0) / 10) * 10)
    panels = []
    for arm in arms:
        if any("clean" in cell.scores for cell in arm.cells):
            first, second = ([values(cell, m) for cell in arm.cells] for m in ("clean", "mpc"))
            panels.append((arm.norm, Markup(charts.slopes(arm.norm, sizes, first, second, low, ("clean", "mPC")))))
    return panels


def _curves(arms: Sequence[Arm]) -> list[tuple[str, Markup]]:
    losses = [
        loss
        for arm in arms
        for cell in arm.cells
        for curve in cell.curves.values()
        for _, loss in curve
        if loss > 0 and math.isfinite(loss)
    ]
    low = max(min(losses, default=0.01), 1e-4)
    high = max(losses, default=10.0)
    low, high = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high) - 0.3) * 2
    panels = []
    for arm in arms:
        series = []
        for index, cell in enumerate(arm.cells):
            faint = [_share(curve) for curve in cell.curves.values() if curve]
            if faint:
                length = min(map(len, faint))
                mean = [
                    (faint[0][i][0], math.exp(fmean(math.log(max(line[i][1], low)) for line in faint)))
                    for i in range(length)
                ]
                name = f"{arm.norm}, batch {cell.batch_size}"
                series.append(charts.Series(name, f"s{index % 6}", mean, faint if len(faint) > 1 else ()))
        if series:
            panels.append((arm.norm, Markup(charts.curves(arm.norm, series, low, high))))
    return panels


def _rates(comparison: Comparison) -> list[tuple[str, Markup]]:
    # Bits per byte at every learning rate of the search, one picture a batch size.
    found: dict[int, dict[str, dict[float, float]]] = {}
    for settings, outcome in comparison.trials:
        if settings.purpose == "tune" and isinstance(outcome, TrialResult):
            row = found.setdefault(settings.batch_size, {}).setdefault(settings.norm, {})
            row[settings.lr] = outcome.validation["bits"]
    order = [arm.norm for arm in comparison.arms]
    chosen = {(cell.norm, cell.batch_size): cell.lr for arm in comparison.arms for cell in arm.cells}
    panels = []
    for size, by_norm in found.items():
        series = [
            charts.Series(norm, f"s{place % 6}", sorted(by_norm[norm].items()), chosen=chosen.get((norm, size)))
            for place, norm in enumerate(order)
            if norm in by_norm
        ]
        title = "held-out bits per byte over learning rates"
        panels.append(
            (f"batch {size}", Markup(charts.lines(title, series, "learning rate", "bits per byte", log_x=True)))
        )
    return panels


def _progress(arms: Sequence[Arm], sizes: Sequence[int]) -> list[tuple[str, Markup]]:
    # Training bits per byte against steps, one picture a batch size.
    panels = []
    for size in sizes:
        series = []
        for place, arm in enumerate(arms):
            for cell in arm.cells:
                curves = [[(step, loss / math.log(2)) for step, loss in c] for c in cell.curves.values() if c]
                if cell.batch_size == size and curves:
                    length = min(map(len, curves))
                    mean = [(curves[0][i][0], fmean(curve[i][1] for curve in curves)) for i in range(length)]
                    series.append(charts.Series(arm.norm, f"s{place % 6}", mean, curves if len(curves) > 1 else ()))
        if series:
            chart = charts.lines("training bits per byte over steps", series, "steps", "bits per byte", high=8.0)
            panels.append((f"batch {size}", Markup(chart)))
    return panels


def _share(curve: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    last = curve[-1][0]
    return [(step / last, loss) for step, loss in curve]


def _bars(arms: Sequence[Arm], sizes: Sequence[int], unit: str, digits: int, value: Any) -> Markup | None:
    rows = [(arm.norm, [value(cell) for cell in arm.cells]) for arm in arms]
    rows = [(norm, values) for norm, values in rows if any(v == v for v in values)]
    return Markup(charts.bars(rows, [f"batch {size}" for size in sizes], unit, digits)) if rows else None


def _memory_unit(arms: Sequence[Arm]) -> tuple[str, int, Any]:
    most = max((cell.memory_bytes for arm in arms for cell in arm.cells), default=0)
    unit, size = ("GiB", 2**30) if most >= 2**31 else ("MiB", 2**20) if most >= 2**19 else ("KiB", 2**10)
    return unit, 2, lambda cell: cell.memory_bytes / size if cell.memory_bytes else math.nan


def _search(comparison: Comparison, plan: Plan) -> list[dict[str, Any]]:
    # One row a normalization and batch size: the accuracy on the held-out fifth at each learning rate.
    chosen = {(cell.norm, cell.batch_size): cell.lr for arm in comparison.arms for cell in arm.cells}
    table: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for settings, outcome in comparison.trials:
        if settings.purpose != "tune":
            continue
        place = (settings.norm, settings.batch_size)
        entry = {"lr": f"{settings.lr:g}", "chosen": chosen.get(place) == settings.lr}
        if isinstance(outcome, TrialFailure):
            entry["text"] = "failed"
        elif isinstance(outcome, TrialResult):
            held = outcome.validation
            score = f"{held['bits']:.3f}" if "bits" in held else f"{100 * held['accuracy']:.1f}"
            entry["text"] = "diverged" if outcome.diverged else score
        table.setdefault(place, []).append(entry)
    order = {arm.norm: index for index, arm in enumerate(comparison.arms)}
    rows = sorted(table.items(), key=lambda item: (order[item[0][0]], plan.batch_sizes.index(item[0][1])))
    return [{"norm": norm, "batch_size": batch, "entries": entries} for (norm, batch), entries in rows]
