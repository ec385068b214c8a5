"""The report of an audit: one HTML file that holds everything, opens offline and loads nothing.

It has the style of the report of ``evenly compare`` (:mod:`evenly.workbench.report`): charts are SVG, tables can be
sorted by click and by keyboard, and there is a light and a dark scheme.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from evenly.workbench import charts
from evenly.workbench.auditing.measures import Measure
from evenly.workbench.auditing.show import interval
from evenly.workbench.machine import machine
from evenly.workbench.report import template

if TYPE_CHECKING:
    from evenly.workbench.auditing.audit import Audit

__all__ = ["render"]

ALL = "all rows"


def render(audit: Audit, command: str | None = None) -> str:
    """The report as a string.

    Args:
        audit: what to show.
        command: the command that is shown as the one that made it.
    """
    measures = [audit.measure, *(each for each in audit.measures if each.name != audit.rank_by)]
    titles = [(each.name, each.title, each.about) for each in measures]
    single, crossed = audit.by_group, audit.by_intersection
    return template("audit.html.j2").render(
        audit=audit,
        settings=audit.settings,
        finding=audit.finding.replace(" %", "\N{NO-BREAK SPACE}%"),
        date=datetime.now().strftime("%d %B %Y, %H:%M"),
        percent=f"{100 * audit.settings['confidence']:g} %",
        level=f"{1 - audit.settings['confidence']:.2g}",
        measures=titles,
        charts=[
            (heading, frame_id, [(each.name, _chart(audit, frame, each)) for each in measures])
            for heading, frame_id, frame in (("Groups", "groups", single), ("Intersections", "crossed", crossed))
            if len(frame)
        ],
        tables={
            "groups": _rows(audit, single, measures, whole=True),
            "crossed": _rows(audit, crossed, measures),
        },
        differing=[_difference(row, measures) for row in audit.differing().to_dict("records")],
        best=_best(audit, measures),
        curves=_curves(audit),
        command=command or "evenly.workbench.audit(...)",
        environment=machine() | _versions(),
    )


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("numpy", "scipy", "pandas", "scikit-learn")}


def _chart(audit: Audit, frame: Any, measure: Measure) -> Markup:
    # Worst first by the measure that is shown; small groups stay below the others.
    name = measure.name
    ordered = sorted(
        frame.to_dict("index").items(), key=lambda item: (item[1]["small"], -measure.badness(item[1][name]))
    )
    whole = audit.overall
    rows = [_interval_row(ALL, whole, measure, "all")]
    for label, row in ordered:
        kind = "small" if row["small"] else "differs" if name in row["differs"] else "plain"
        rows.append(_interval_row(str(label), row, measure, kind))
    longest = max(len(row.name) for row in rows)
    title = f"{measure.title} by group, worst first, with intervals"
    return Markup(
        charts.intervals(title, rows, float(whole[name]), _axis(measure), min(440, max(120, 7.7 * longest + 26)))
    )


def _interval_row(label: str, row: Any, measure: Measure, kind: str) -> charts.Interval:
    value, low, high = (float(row[f"{measure.name}{end}"]) for end in ("", "_low", "_high"))
    text = interval(measure, value, low, high)
    tip = f"{label}: {measure.title.lower()} {text}, {row['rows']:,} rows"
    if kind == "differs":
        tip += ", differs from the rest"
    return charts.Interval(label, value, low, high, text, kind, tip)


def _axis(measure: Measure) -> Any:
    return (lambda v: f"{100 * v:g} %") if measure.percent else (lambda v: f"{v:g}")


def _rows(audit: Audit, frame: Any, measures: list[Measure], whole: bool = False) -> list[dict[str, Any]]:
    found = []
    lines = list(frame.to_dict("index").items())
    if whole:
        lines = [(ALL, audit.overall.to_dict()), *lines]
    for place, (label, row) in enumerate(lines):
        cells = []
        for measure in measures:
            value, low, high = (row[f"{measure.name}{end}"] for end in ("", "_low", "_high"))
            cells.append(
                {
                    "value": _sortable(value),
                    "text": measure.show(value),
                    "ends": "" if low != low else f"{measure.show(low)} to {measure.show(high)}",
                    "differs": measure.name in row["differs"],
                }
            )
        found.append({"place": place, "group": label, "rows": row["rows"], "small": row["small"], "cells": cells})
    return found


def _sortable(value: float) -> str:
    return "-1e9" if not math.isfinite(value) else f"{value:.8g}"


def _difference(row: dict[str, Any], measures: list[Measure]) -> dict[str, Any]:
    measure = next(each for each in measures if each.name == row["measure"])

    def signed(end: str) -> str:
        return measure.show(row[f"difference{end}"], signed=True)

    ratio = "–"
    if row["ratio"] == row["ratio"]:
        ratio = f"{row['ratio']:.2f}"
        if row["ratio_low"] == row["ratio_low"]:
            high = "∞" if math.isinf(row["ratio_high"]) else f"{row['ratio_high']:.2f}"
            ratio += f" [{row['ratio_low']:.2f}, {high}]"
    known = row["difference_low"] == row["difference_low"]
    return {
        "group": row["group"],
        "rows": row["rows"],
        "small": row["small"],
        "measure": measure.title,
        "value": measure.show(row["value"]),
        "rest": measure.show(row["rest"]),
        "difference": signed("") + (f" [{signed('_low')}, {signed('_high')}]" if known else ""),
        "ratio": ratio,
        "p": "< 0.0001" if row["p_holm"] < 1e-4 else f"{row['p_holm']:.4f}",
        "sort": [_sortable(row[name]) for name in ("value", "rest", "difference", "ratio", "p_holm")],
    }


def _best(audit: Audit, measures: list[Measure]) -> list[dict[str, Any]]:
    # For each column and measure: the best and the worst of its groups that are not small, and how far apart.
    table = audit.table[(audit.table["level"] == 1) & ~audit.table["small"]]
    found = []
    for grouping, part in table.groupby("grouping", sort=False):
        for measure in measures:
            rows = part[(part["measure"] == measure.name) & part["value"].notna()]
            if len(rows) < 2:
                continue
            worst = rows.loc[rows["difference_to_best"].abs().idxmax()]
            ratio = worst["ratio_to_best"]
            found.append(
                {
                    "grouping": grouping,
                    "measure": measure.title,
                    "best": f"{worst['best']}: {measure.show(worst['value'] - worst['difference_to_best'])}",
                    "worst": f"{worst['group']}: {measure.show(worst['value'])}",
                    "difference": measure.show(worst["difference_to_best"], signed=True),
                    "ratio": "–" if ratio != ratio else f"{ratio:.2f}",
                    "sort": [_sortable(worst["difference_to_best"]), _sortable(ratio)],
                }
            )
    return found


def _curves(audit: Audit) -> list[tuple[str, str, Markup]]:
    # One panel a group of one column that is not small, in the order of the table.
    frame = audit.calibration
    if not len(frame):
        return []
    if audit.task == "regression":
        ends = frame[["predicted", "true"]].to_numpy()
        low, high = float(ends.min()), float(ends.max())
        show: Callable[[float], str] = "{:.3g}".format
    else:
        low, high, show = 0.0, 1.0, _share
    overall = [(row["predicted"], row["true"]) for row in frame[frame["level"] == 0].to_dict("records")]
    panels = []
    for label, row in audit.by_group.iterrows():
        if row["small"]:
            continue
        points = [
            (each["predicted"], each["true"], each["low"], each["high"], each["count"])
            for each in frame[(frame["level"] == 1) & (frame["group"] == label)].to_dict("records")
        ]
        picture = charts.reliability(str(label), points, overall, low, high, show)
        panels.append((str(label), f"{row['rows']:,} rows", Markup(picture)))
    return panels


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"
