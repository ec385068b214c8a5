"""What is seen of a comparison while it runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import fmean
from types import TracebackType

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from evenly.workbench.metrics import LOWER, METRICS, Arm, mpc
from evenly.workbench.trial import TrialFailure, TrialResult, TrialSettings

__all__ = ["Watch", "notes", "plus_minus", "print_ranking"]

PLAIN_EVERY = 5.0
"""Seconds between two plain lines, at least."""


class Watch:
    """Shows the progress of a comparison. Use it in a ``with`` block.

    Args:
        console: where to; ``console.is_terminal`` decides between the live table and plain lines.
        norms: rows of the table.
        batch_sizes: columns of the table.
        work: estimated cost of a trial, in any unit; the time left is reckoned with it.
        workers: trials at a time.
        text: whether trials are scored in bits per byte.
    """

    def __init__(
        self,
        console: Console,
        norms: Sequence[str],
        batch_sizes: Sequence[int],
        work: Callable[[TrialSettings], float],
        workers: int,
        text: bool = False,
    ) -> None:
        self.console = console
        self.norms = list(norms)
        self.batch_sizes = list(batch_sizes)
        self.work = work
        self.workers = workers
        self.total = 0.0
        self.loaded = 0.0
        self.done = 0.0
        self.count = 0
        self.planned = 0
        self.failed = 0
        self.text = text
        self.cells: dict[tuple[str, int], list[tuple[float, float]]] = {}
        self.marks: dict[tuple[str, int], str] = {}
        self.started = time.monotonic()
        self._next_line = 0.0
        self._live: Live | None = None
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}")
        )
        self._task = self._bar.add_task("trials", total=None, left="")

    def __enter__(self) -> Watch:
        if self.console.is_terminal:
            self._live = Live(self._view(), console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def plan(self, count: int, work: float) -> None:
        """How many trials there are, and their cost together."""
        self.planned, self.total = count, work
        self._refresh()

    def finished(self, settings: TrialSettings, outcome: TrialResult | TrialFailure, stored: bool = False) -> None:
        """A trial is done; ``stored``: it came out of the store."""
        cost = self.work(settings)
        self.count += 1
        if stored:
            self.loaded += cost
        else:
            self.done += cost
        place = (settings.norm, settings.batch_size)
        if isinstance(outcome, TrialFailure):
            self.failed += 1
            self.marks[place] = "failed"
            if not stored:
                self.say(f"failed: {_name(settings)}: {outcome.error}")
        elif settings.purpose == "score" and outcome.clean is not None:
            robust = mpc(outcome.corruptions) if outcome.corruptions else float("nan")
            self.cells.setdefault(place, []).append((outcome.clean, robust))
        elif outcome.bits is not None:
            self.cells.setdefault(place, []).append((outcome.bits, float("nan")))
        if not stored:
            self._refresh(settings, outcome)

    def left(self) -> str:
        """The time left, in words."""
        rest = self.total - self.loaded - self.done
        if self.done <= 0:
            return "time left: not known yet"
        seconds = rest * (time.monotonic() - self.started) / self.done
        return f"about {_duration(seconds)} left"

    def _refresh(
        self, settings: TrialSettings | None = None, outcome: TrialResult | TrialFailure | None = None
    ) -> None:
        if self._live is not None:
            self._bar.update(self._task, total=self.planned, completed=self.count, left=self.left())
            self._live.update(self._view())
        elif settings is not None and isinstance(outcome, TrialResult):
            now = time.monotonic()
            if now >= self._next_line or self.count == self.planned:
                self._next_line = now + PLAIN_EVERY
                self.say(f"{self.count}/{self.planned}  {_name(settings)}: {_scores(outcome)}  ({self.left()})")

    def _view(self) -> Group:
        title = ("bits per byte" if self.text else "clean accuracy / mPC, %") + " so far (seeds)"
        table = Table(title=title, title_justify="left")
        table.add_column("normalization")
        for batch in self.batch_sizes:
            table.add_column(f"batch {batch}", justify="right")
        for norm in self.norms:
            table.add_row(escape(norm), *(self._entry(norm, batch) for batch in self.batch_sizes))
        return Group(table, self._bar)

    def _entry(self, norm: str, batch: int) -> str:
        rows = self.cells.get((norm, batch))
        if not rows:
            return f"[red]{self.marks[norm, batch]}[/]" if (norm, batch) in self.marks else "[dim]·[/]"
        clean, robust = fmean(row[0] for row in rows), fmean(row[1] for row in rows)
        shown = f"{clean:.3f}" if self.text else f"{100 * clean:.1f} / {100 * robust:.1f}"
        return f"{shown} [dim]({len(rows)})[/]"


def print_ranking(console: Console, arms: Sequence[Arm], metric: str) -> None:
    """The ranking: a table as wide as the terminal, or aligned plain lines where there is none.

    Args:
        console: where to.
        arms: from :func:`evenly.workbench.metrics.summarize`.
        metric: what they are ranked by.
    """
    plain = not console.is_terminal
    if plain:  # nobody wraps lines there
        console = Console(file=console.file, width=1000, no_color=True)
    table = Table(box=None if plain else box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0) if plain else (0, 1))
    shown = [metric, *(m for m in METRICS if m != metric and any(m in arm.scores for arm in arms))]
    batches = [cell.batch_size for cell in arms[0].cells] if arms else []
    first = "bits" if metric in LOWER else "clean"
    wide = console.width >= 110 + 12 * len(batches)
    for title in ("rank", "normalization"):
        table.add_column(title, no_wrap=True, justify="right" if title == "rank" else "left")
    for name in shown:
        table.add_column(_TITLES[name], no_wrap=True, justify="left" if name == "worst" else "right")
    if metric in LOWER:
        table.add_column("learning rate", no_wrap=True, justify="right")
    if wide:
        for batch in batches if len(batches) > 1 else ():
            table.add_column(f"{first}, batch {batch}", no_wrap=True, justify="right")
        table.add_column("ms a step", no_wrap=True, justify="right")
    for arm in arms:
        cells: list[str] = []
        for name in shown:
            text = plus_minus(arm.mean(name), arm.spread(name), name)
            cells.append(f"{text} {arm.worst.replace('_', ' ')}" if name == "worst" and arm.worst else text)
        if metric in LOWER:
            cells.append(" / ".join("–" if cell.lr is None else f"{cell.lr:g}" for cell in arm.cells))
        if wide:
            if len(batches) > 1:
                cells += [plus_minus(cell.mean(first), float("nan"), first) for cell in arm.cells]
            cells.append(" / ".join(f"{1000 * cell.seconds_per_step:.1f}" for cell in arm.cells))
        style = "bold" if arm.rank == 1 and not plain else ""
        table.add_row("–" if arm.rank is None else str(arm.rank), escape(arm.norm), *cells, style=style)
    unit = "less is better, " if metric in LOWER else "%, "
    console.print(f"Ranked by {METRICS[metric]}; {unit}± standard deviation over seeds", highlight=False, style="bold")
    console.print(table)
    for arm in arms:
        if notes(arm):
            console.print(f"{arm.norm}: {notes(arm)}", highlight=False, markup=False, style="dim")


_TITLES = {
    "mpc": "mPC",
    "clean": "clean",
    "rpc": "rPC",
    "worst": "worst corruption",
    "domain": "domains",
    "ood": "ood",
    "bits": "bits per byte",
}


def plus_minus(mean: float, spread: float, metric: str = "clean") -> str:
    """A fraction as percent with its spread; bits as they are.

    >>> plus_minus(0.5, 0.01), plus_minus(0.5, float("nan")), plus_minus(float("nan"), 0)
    ('50.0 ± 1.0', '50.0', '–')
    >>> plus_minus(2.5, 0.01, "bits")
    '2.500 ± 0.010'
    """
    if mean != mean:
        return "–"
    if metric in LOWER:
        return f"{mean:.3f}" if spread != spread else f"{mean:.3f} ± {spread:.3f}"
    return f"{100 * mean:.1f}" if spread != spread else f"{100 * mean:.1f} ± {100 * spread:.1f}"


def notes(arm: Arm, rates: bool = True) -> str:
    """What else is to be said of a normalization: failures, divergences, a learning rate at the end of its grid.

    Args:
        arm: the normalization.
        rates: whether to say the last.
    """
    said = []
    if arm.failed:
        said.append(f"{arm.failed} failed")
    if arm.diverged:
        said.append(f"{arm.diverged} diverged")
    edges = [str(cell.batch_size) for cell in arm.cells if cell.at_edge]
    if edges and rates:
        said.append(f"lr at the end of its grid (batch {', '.join(edges)})")
    return "; ".join(said)


def _name(settings: TrialSettings) -> str:
    what = f"{settings.norm}, batch {settings.batch_size}"
    if settings.purpose == "tune":
        return f"{what}, search, lr {settings.lr:g}"
    return f"{what}, seed {settings.seed}, lr {settings.lr:g}"


def _scores(result: TrialResult) -> str:
    if result.bits is not None:
        text = f"{result.bits:.3f} bits per byte"
    elif "bits" in result.validation:
        text = f"held out {result.validation['bits']:.3f} bits per byte"
    elif result.clean is None:
        text = f"held out {100 * result.validation['accuracy']:.1f} %"
    else:
        text = f"clean {100 * result.clean:.1f} %"
        if result.corruptions:
            text += f", mPC {100 * mpc(result.corruptions):.1f} %"
    return f"{text}, diverged" if result.diverged else text


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
