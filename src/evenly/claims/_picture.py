"""The picture of a claim: what the claim draws, under one title that says what came out."""

from __future__ import annotations

import io
import textwrap
from typing import TYPE_CHECKING

from evenly.claims._harness import Claim, Judgement, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["BASELINE", "METHOD", "dots", "svg", "tidy"]

#: Colours of the two sides, the same in every picture; they differ in lightness too.
BASELINE = "#9a7b4f"
METHOD = "#1f5fa8"


def svg(claim: Claim, results: Results, judgement: Judgement) -> str:
    """Draw the picture and return it as SVG text; the same results give the same text."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": claim.id, "svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        (claim.draw or _dots_of_every_metric)(figure, results, judgement)
        verdict = "the criterion is met" if judgement.passed else "the criterion is not met"
        title = "\n".join(textwrap.wrap(f"{claim.statement} Here {verdict}.", 110))
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def dots(axes: Axes, groups: list[tuple[str, list[float], str]], label: str) -> None:
    """Draw one column of dots a group, a dot a seed, with a bar at the median."""
    import statistics

    for place, (_, values, colour) in enumerate(groups):
        shift = [place + 0.16 * ((number * 7) % 5 - 2) / 2 for number in range(len(values))]
        axes.plot(shift, values, "o", color=colour, alpha=0.6, markersize=4, markeredgewidth=0)
        if values:
            axes.plot([place - 0.28, place + 0.28], [statistics.median(values)] * 2, color=colour, linewidth=2)
    axes.set_xticks(range(len(groups)), [name for name, _, _ in groups])
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylabel(label)
    tidy(axes)


def tidy(axes: Axes) -> None:
    """Take away the frame's top and right, and draw a light grid for reading values."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _dots_of_every_metric(figure: Figure, results: Results, judgement: Judgement) -> None:
    columns = figure.subplots(1, len(judgement.metrics), squeeze=False)[0]
    for axes, metric in zip(columns, judgement.metrics, strict=True):
        sides = [
            (metric.baseline, metric.baseline_values, BASELINE),
            (metric.method, metric.method_values, METHOD),
        ]
        dots(
            axes,
            [(name, [value for value in values if value is not None], colour) for name, values, colour in sides],
            metric.name,
        )
