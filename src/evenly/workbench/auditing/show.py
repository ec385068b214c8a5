"""An audit in the terminal: groups, the worst intersections, the finding."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from evenly import terminal
from evenly.workbench.auditing.measures import Measure

if TYPE_CHECKING:
    from evenly.workbench.auditing.audit import Audit

__all__ = ["interval", "print_audit", "table_rows"]

_SHOWN = {
    "binary": ("accuracy", "selection_rate", "tpr", "fpr", "calibration", "precision", "ece"),
    "multiclass": ("accuracy", "balanced_accuracy", "selection_rate", "tpr", "fpr", "log_loss", "calibration", "ece"),
    "regression": ("mae", "rmse", "mean_error", "r2"),
}

_NAME = 24


def interval(measure: Measure, value: float, low: float, high: float) -> str:
    """A value with its interval.

    >>> from evenly.workbench.auditing import MEASURES
    >>> interval(MEASURES["accuracy"], 0.8, 0.75, 0.84)
    '80.0 [75.0, 84.0]'
    """
    text = measure.show(value)
    return text if low != low else f"{text} [{measure.show(low)}, {measure.show(high)}]"


def shown(audit: Audit) -> list[Measure]:
    """The measures of the terminal table, the one that ranks first."""
    measured = {each.name: each for each in audit.measures}
    return [
        audit.measure,
        *(measured[name] for name in _SHOWN[audit.task] if name in measured and name != audit.rank_by),
    ]


def table_rows(audit: Audit, frame: Any) -> list[list[str]]:
    """The cells of a table, one list a row of ``by_group`` or ``by_intersection``."""
    rows = []
    for label, row in frame.iterrows():
        cells = [str(label), f"{row['rows']:,}"]
        for measure in shown(audit):
            value = row[measure.name]
            if measure.name == audit.rank_by:
                text = interval(measure, value, row[f"{measure.name}_low"], row[f"{measure.name}_high"])
            else:
                text = measure.show(value)
            cells.append(f"{text}{'*' if measure.name in row['differs'] else ' '}")
        cells.append("empty" if not row["rows"] else "small" if row["small"] else "")
        rows.append(cells)
    return rows


def print_audit(audit: Audit, limit: int = 10) -> None:
    """Print an audit; see :meth:`Audit.print`. In a pipe every intersection is printed.

    Where the terminal is too narrow for all measures, the last ones are left out, and a line says which.
    """
    plain = not terminal.interactive()
    measures = shown(audit)
    columns = ["group", "rows", *(each.short for each in measures), ""]
    crossed = audit.by_intersection if plain else audit.by_intersection.head(limit)
    groups = table_rows(audit, audit.overall.to_frame().T) + table_rows(audit, audit.by_group)
    crossing = table_rows(audit, crossed)
    name = f" of {audit.settings['name']}" if audit.settings["name"] else ""
    percent = "in %, " if any(each.percent for each in measures) else ""
    level = f"{100 * audit.settings['confidence']:g} %"
    title = f"Audit{name}, {percent}worst {audit.measure.title.lower()} first, with its {level} interval"
    entries = [("finding", audit.finding)]
    if plain:
        terminal.table(columns, groups + crossing, header=True)
    else:
        keep = _fitting(columns, groups + crossing, shutil.get_terminal_size().columns)
        left_out = [column for place, column in enumerate(columns) if place not in keep]
        columns, groups, crossing = (
            [columns[place] for place in keep],
            *([[row[place] for place in keep] for row in rows] for rows in (groups, crossing)),
        )
        numbers = columns[1:-1]
        styles = ["bold", *("dim" if row[-1] else "" for row in groups[1:])]
        terminal.table(columns, groups, title=title, nowrap=numbers, right=numbers, styles=styles)
        if crossing:
            total = len(audit.by_intersection)
            which = "Intersections" if len(crossing) == total else f"The worst {len(crossing)} of {total} intersections"
            styles = ["dim" if row[-1] else "" for row in crossing]
            terminal.table(columns, crossing, title=which, nowrap=numbers, right=numbers, styles=styles)
        if left_out:
            entries.append(("note", f"left out for want of width: {', '.join(left_out)}; --out and --json have them"))
    level = f"{1 - audit.settings['confidence']:.2g}"
    entries.append(("*", f"differs from the rest (all other rows): Holm-adjusted p ≤ {level}"))
    if audit.table["small"].any():
        entries.append(("small", f"fewer than {audit.settings['min_group']} rows: shown after the others"))
    entries += [("note", note) for note in audit.notes]
    terminal.pairs("What it says", entries)


def _fitting(columns: list[str], rows: list[list[str]], width: int) -> list[int]:
    # The columns that fit: group (which may be wrapped), rows, the ranked measure, what else there is room for, notes.
    need = [max(len(cell) for cell in cells) + 3 for cells in zip(columns, *rows, strict=True)]
    need[0] = min(need[0], max(_NAME, width // 3))
    keep, last = [0, 1, 2], len(columns) - 1
    used = sum(need[place] for place in (*keep, last))
    for place in range(3, last):
        if used + need[place] > width:
            break
        keep.append(place)
        used += need[place]
    return [*keep, last]
