"""The charts of the report as SVG text. Colours and fonts are classes of the page, so they follow its light or dark
scheme; nothing is drawn in pixels and nothing is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Interval", "Series", "bars", "curves", "dumbbell", "intervals", "lines", "reliability", "slopes"]


@dataclass(frozen=True)
class Series:
    """One line or bar: a name, its colour class (``s0``..``s5``), points (x, y), and the x of a point to ring."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    faint: Sequence[Sequence[tuple[float, float]]] = ()
    chosen: float | None = None


@dataclass(frozen=True)
class Interval:
    """One row of :func:`intervals`: a value between two ends; NaN where there is none.

    ``kind``: ``"plain"``, ``"differs"``, ``"small"`` (hollow, and its ends do not stretch the axis) or ``"all"``.
    """

    name: str
    value: float
    low: float
    high: float
    text: str
    kind: str = "plain"
    tip: str = ""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover ``low``..``high``.

    >>> ticks(43, 97)
    [40, 60, 80, 100]
    """
    if not high > low:
        high = low + 1
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    values = [index * step for index in range(first, last + 1)]
    return [int(v) if float(v).is_integer() else round(v, 10) for v in values]


def dumbbell(rows: Sequence[tuple[str, tuple[float, float], tuple[float, float]]], labels: tuple[str, str]) -> str:
    """Two values a row with their spreads, joined by a line: clean accuracy and mPC of each normalization.

    Args:
        rows: name, (mean, spread) of the first value, (mean, spread) of the second, in percent; NaN is left out.
        labels: names of the two values.
    """
    left, right, top, pitch, width = 104, 56, 30, 30, 860
    height = top + pitch * len(rows) + 34
    numbers = [v for _, a, b in rows for m, s in (a, b) if m == m for v in (m - _zero(s), m + _zero(s))]
    marks = ticks(min(numbers, default=0), max(numbers, default=100))
    x = _scale(marks[0], marks[-1], left, width - right)
    out = [_open(width, height, f"{labels[0]} and {labels[1]} of each normalization, in percent")]
    for value in marks:
        out.append(_line(x(value), top - 8, x(value), top + pitch * len(rows), "grid"))
        out.append(_text(x(value), height - 14, f"{value:g}", "tick", "middle"))
    for index, (name, (a, da), (b, db)) in enumerate(rows):
        y = top + pitch * index + pitch / 2
        out.append(_text(left - 14, y + 4, name, "label", "end"))
        if a == a and b == b:
            out.append(_line(x(a), y, x(b), y, "link"))
        for value, spread, kind in ((b, db, "robust"), (a, da, "clean")):
            if value != value:
                continue
            if spread == spread:
                out.append(_line(x(value - spread), y, x(value + spread), y, f"spread {kind}"))
            tip = f"{name}: {labels[kind == 'robust']} {value:.1f} %"
            if spread == spread:
                tip += f" ± {spread:.1f}"
            out.append(_mark(x(value), y, kind, tip))
        first = min((v - _zero(s) for v, s in ((a, da), (b, db)) if v == v), default=math.nan)
        if first == first and b == b:
            out.append(_text(x(first) - 12, y + 4, f"{b:.1f}", "value robust", "end"))
        last = max((v + _zero(s) for v, s in ((a, da), (b, db)) if v == v), default=math.nan)
        if last == last:
            out.append(_text(x(last) + 12, y + 4, f"{a:.1f}" if a == a else "", "value"))
    out.append("</svg>")
    return "".join(out)


def slopes(
    name: str,
    sizes: Sequence[int],
    first: Sequence[Sequence[float]],
    second: Sequence[Sequence[float]],
    low: float,
    labels: tuple[str, str],
) -> str:
    """Accuracy against batch size for one normalization: a dot a seed, a line through the means.

    Args:
        name: of the normalization.
        sizes: batch sizes.
        first, second: for each batch size, the values of the seeds in percent.
        low: lower end of the axis, the same for all panels.
        labels: names of the two.
    """
    left, right, top, bottom, width, height = 34, 12, 12, 24, 200, 170
    y = _scale(low, 100, height - bottom, top)
    x = _scale(-0.35, len(sizes) - 0.65, left, width - right)
    out = [_open(width, height, f"{name}: accuracy by batch size")]
    for value in ticks(low, 100, 4):
        if low <= value <= 100:
            out.append(_line(left, y(value), width - right, y(value), "grid"))
            out.append(_text(left - 6, y(value) + 3.5, f"{value:g}", "tick", "end"))
    for index, size in enumerate(sizes):
        out.append(_text(x(index), height - 7, str(size), "tick", "middle"))
    for kind, label, groups in (("robust", labels[1], second), ("clean", labels[0], first)):
        means = [(x(i), y(sum(g) / len(g))) for i, g in enumerate(groups) if g]
        if len(means) > 1:
            out.append(_path(means, f"line {kind}"))
        for i, group in enumerate(groups):
            for value in group:
                out.append(_mark(x(i), y(value), kind, f"{name}, batch {sizes[i]}: {label} {value:.1f} %", 3.2))
    out.append("</svg>")
    return "".join(out)


def curves(name: str, series: Sequence[Series], low: float, high: float) -> str:
    """Training loss (logarithmic) against the share of the training, for one normalization.

    Args:
        name: of the normalization.
        series: one for each batch size: mean curve, and one faint curve a seed.
        low, high: ends of the loss axis, the same for all panels.
    """
    left, right, top, bottom, width, height = 40, 10, 12, 24, 200, 160
    y = _scale(math.log10(low), math.log10(high), height - bottom, top)
    x = _scale(0, 1, left, width - right)
    out = [_open(width, height, f"{name}: training loss")]
    decades = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    for decade in decades:
        at = y(decade)
        out.append(_line(left, at, width - right, at, "grid"))
        out.append(_text(left - 6, at + 3.5, f"{10.0**decade:g}", "tick", "end"))
    for share in (0, 0.5, 1):
        anchor = "start" if share == 0 else "end" if share == 1 else "middle"
        out.append(_text(x(share), height - 7, f"{100 * share:.0f} %", "tick", anchor))

    def place(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(x(share), y(math.log10(min(max(loss, low), high)))) for share, loss in points if loss == loss]

    for each in series:
        for faint in each.faint:
            out.append(_path(place(faint), f"faint {each.colour}"))
    for each in series:
        out.append(_path(place(each.points), f"line {each.colour}", each.name))
    out.append("</svg>")
    return "".join(out)


def lines(
    title: str,
    series: Sequence[Series],
    x_name: str,
    y_name: str,
    *,
    log_x: bool = False,
    high: float | None = None,
) -> str:
    """Lines of all normalizations in one picture, each named at its right end, on a logarithmic vertical axis.

    Args:
        title: what is drawn, for readers that do not see it.
        series: the lines, of positive values; thin lines for ``faint``; a point a value where there are at most 8.
        x_name, y_name: names of the axes.
        log_x: logarithmic horizontal axis, marked at the points themselves; otherwise it starts at 0.
        high: the vertical axis ends there at most, and lines are cut off.
    """
    left, right, top, bottom, width, height = 52, 96, 26, 44, 1000, 360
    points = [p for each in series for line in (each.points, *each.faint) for p in line]
    if not points:
        return ""
    values = [v if high is None else min(v, high) for _, v in points]
    marks = _log_ticks(min(values), max(values))
    across = sorted({p for p, _ in points})
    place = math.log10 if log_x else float
    x = _scale(place(across[0]) if log_x else 0, place(across[-1]), left + 8, width - right)
    scale = _scale(math.log10(marks[0]), math.log10(marks[-1]), height - bottom, top)

    def y(value: float) -> float:
        return scale(math.log10(min(max(value, marks[0]), marks[-1])))

    out = [_open(width, height, title), _text(left - 7, top - 12, y_name, "tick", "start")]
    for value in marks:
        out.append(_line(left, y(value), width - right, y(value), "grid"))
        out.append(_text(left - 7, y(value) + 4, f"{value:g}", "tick", "end"))
    for value in across if log_x else [v for v in ticks(0, across[-1], 6) if v <= across[-1]]:
        out.append(_text(x(place(value)), height - bottom + 18, f"{value:g}", "tick", "middle"))
    out.append(_text((left + width - right) / 2, height - 6, x_name, "tick", "middle"))

    def path(line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(x(place(p)), y(v)) for p, v in line]

    for each in series:
        out.extend(_path(path(faint), f"faint {each.colour}") for faint in each.faint)
    ends = sorted(((path(each.points)[-1][1], each) for each in series if each.points), key=lambda end: end[0])
    names = _apart([at for at, _ in ends], 14, height - bottom)
    for at, (_, each) in zip(names, ends, strict=True):
        out.append(_path(path(each.points), f"line {each.colour}", each.name))
        if len(each.points) <= 8:
            for (px, py), (p, v) in zip(path(each.points), each.points, strict=True):
                tip = f"<title>{escape(f'{each.name}, {x_name} {p:g}: {v:.3f}')}</title>"
                out.append(f'<circle class="dot {each.colour}" cx="{px:.1f}" cy="{py:.1f}" r="3.2">{tip}</circle>')
                if p == each.chosen:
                    out.append(f'<circle class="ring {each.colour}" cx="{px:.1f}" cy="{py:.1f}" r="7"></circle>')
        out.append(_text(width - right + 12, at + 4, each.name, f"label {each.colour}"))
    out.append("</svg>")
    return "".join(out)


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers around ``low``..``high`` for a logarithmic axis.

    >>> _log_ticks(2.7, 5.5)
    [2.5, 3, 4, 5, 6]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    every = [float(f"{step * 10.0**power:g}") for power in range(first, last + 1) for step in steps]
    down = max(v for v in every if v <= low)
    up = min(v for v in every if v >= high and v > down)
    return [int(v) if v.is_integer() else v for v in every if down <= v <= up]


def _apart(places: Sequence[float], gap: float, end: float) -> list[float]:
    """Heights from top to bottom, moved until they are ``gap`` apart and, where there is room, end at ``end``.

    >>> _apart([10, 12, 98], 10, 100), _apart([97, 98], 10, 100)
    ([10, 20, 98], [90, 100])
    """
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    limit = end
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - gap
    return moved


def bars(rows: Sequence[tuple[str, Sequence[float]]], names: Sequence[str], unit: str, digits: int) -> str:
    """Horizontal bars, one for each normalization and batch size.

    Args:
        rows: name and one value for each of ``names``; NaN is left out.
        names: of the batch sizes.
        unit: of the values.
        digits: decimals of the labels.
    """
    left, right, top, thick, gap, width = 88, 66, 4, 11, 12, 410
    block = thick * len(names) + gap
    height = top + block * len(rows)
    most = max((v for _, values in rows for v in values if v == v), default=1) or 1
    x = _scale(0, most, left, width - right)
    out = [_open(width, height, f"{unit} of each normalization")]
    for index, (name, values) in enumerate(rows):
        y0 = top + block * index
        out.append(_text(left - 10, y0 + thick * len(names) / 2 + 4, name, "label", "end"))
        for which, value in enumerate(values):
            if value != value:
                continue
            y = y0 + thick * which
            length = max(1.5, x(value) - left)
            tip = f"{name}, {names[which]}: {value:.{digits}f} {unit}"
            out.append(
                f'<rect class="bar s{which % 6}" x="{left}" y="{y + 1:.1f}" width="{length:.1f}" '
                f'height="{thick - 2}" rx="2"><title>{escape(tip)}</title></rect>'
            )
            out.append(_text(left + length + 6, y + thick - 2.5, f"{value:.{digits}f}", "tick"))
    out.append("</svg>")
    return "".join(out)


def intervals(
    title: str,
    rows: Sequence[Interval],
    reference: float = math.nan,
    show: Callable[[float], str] = "{:g}".format,
    names: float = 290,
) -> str:
    """A dot and its interval a row, with a line at a reference value.

    Args:
        title: what is drawn, for readers that do not see it.
        rows: from top to bottom.
        reference: the value of the line.
        show: a number of the axis as text.
        names: width of the column of names.
    """
    right, top, pitch, width = 150, 26, 25, 1060
    left = names
    height = top + pitch * len(rows) + 8
    ends = [v for row in rows for v in ((row.low, row.high) if row.kind != "small" else ())]
    numbers = [v for v in (*ends, *(row.value for row in rows), reference) if math.isfinite(v)]
    marks = ticks(min(numbers, default=0), max(numbers, default=1), 7)
    x = _scale(marks[0], marks[-1], left, width - right)
    out = [_open(width, height, title)]
    for value in marks:
        out.append(_line(x(value), top - 4, x(value), height - 8, "grid"))
        out.append(_text(x(value), top - 11, show(value), "tick", "middle"))
    if math.isfinite(reference):
        out.append(_line(x(reference), top - 4, x(reference), height - 8, "reference"))
    for index, row in enumerate(rows):
        y = top + pitch * index + pitch / 2
        out.append(_text(left - 16, y + 4, row.name, f"label {row.kind}", "end"))
        if row.low == row.low:
            low, high = (min(max(v, marks[0]), marks[-1]) for v in (row.low, row.high))
            out.append(_line(x(low), y, x(high), y, f"ci {row.kind}"))
        if math.isfinite(row.value):
            tip = f"<title>{escape(row.tip or f'{row.name}: {row.text}')}</title>"
            out.append(f'<circle class="point {row.kind}" cx="{x(row.value):.1f}" cy="{y:.1f}" r="5">{tip}</circle>')
        out.append(_text(width - right + 16, y + 4, row.text, f"value {row.kind}"))
    out.append("</svg>")
    return "".join(out)


def reliability(
    name: str,
    points: Sequence[tuple[float, float, float, float, int]],
    overall: Sequence[tuple[float, float]],
    low: float,
    high: float,
    show: Callable[[float], str] = "{:g}".format,
) -> str:
    """True against predicted values of one group: a dot a bin, the diagonal, and the curve of all rows.

    Args:
        name: of the group.
        points: predicted, true, the ends of its interval (NaN: none), and number of rows, for each bin.
        overall: predicted and true of all rows.
        low, high: ends of both axes.
        show: a number of an axis as text.
    """
    left, right, top, bottom, width, height = 40, 10, 8, 26, 220, 204
    x, y = _scale(low, high, left, width - right), _scale(low, high, height - bottom, top)
    out = [_open(width, height, f"{name}: calibration")]
    for value in ticks(low, high, 4):
        if low <= value <= high:
            out.append(_line(left, y(value), width - right, y(value), "grid"))
            out.append(_text(left - 6, y(value) + 3.5, show(value), "tick", "end"))
            out.append(_text(x(value), height - 8, show(value), "tick", "middle"))
    out.append(_line(x(low), y(low), x(high), y(high), "diagonal"))
    out.append(_path([(x(a), y(b)) for a, b in overall], "line overall", f"all rows, beside {name}"))
    for a, _, down, up, _ in points:
        if down == down:
            out.append(_line(x(a), y(down), x(a), y(up), "ci plain"))
    out.append(_path([(x(a), y(b)) for a, b, *_ in points], "line s0"))
    most = max((count for *_, count in points), default=1)
    for a, b, down, up, count in points:
        tip = f"{name}: predicted {show(a)}, true {show(b)}, {count} rows"
        if down == down:
            tip += f", interval {show(down)} to {show(up)}"
        size = 2.2 + 3.4 * math.sqrt(count / most)
        out.append(
            f'<circle class="point plain" cx="{x(a):.1f}" cy="{y(b):.1f}" r="{size:.1f}">'
            f"<title>{escape(tip)}</title></circle>"
        )
    out.append("</svg>")
    return "".join(out)


def _zero(value: float) -> float:
    return value if value == value else 0.0


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _open(width: float, height: float, label: str) -> str:
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label, quote=True)}">'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _path(points: Sequence[tuple[float, float]], kind: str, tip: str = "") -> str:
    if not points:
        return ""
    shape = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    title = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<path class="{kind}" d="{shape}">{title}</path>'


def _mark(x: float, y: float, kind: str, tip: str, size: float = 5.5) -> str:
    # Clean is a disc and robust a diamond: told apart without colour.
    title = f"<title>{escape(tip)}</title>"
    if kind == "clean":
        return f'<circle class="mark clean" cx="{x:.1f}" cy="{y:.1f}" r="{size:g}">{title}</circle>'
    s = size * 1.15
    shape = f"M{x:.1f} {y - s:.1f}l{s:.1f} {s:.1f}l{-s:.1f} {s:.1f}l{-s:.1f} {-s:.1f}z"
    return f'<path class="mark robust" d="{shape}">{title}</path>'
