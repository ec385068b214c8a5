"""What the commands print: tables and progress for people, plain lines for pipes.

On a terminal :func:`table` draws a rich table; in a pipe it writes the same rows as tab-separated lines, so that
``evenly list | cut -f1`` works. :func:`progress` shows a bar with the time left on a terminal and nothing in a
pipe. The commands use this module; what only computes does not.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TextIO

__all__ = ["interactive", "pairs", "progress", "table"]

#: ``report(what, done, total)``: what is being done, how many steps are finished, and of how many.
Report = Callable[[str, int, int], None]


def interactive(stream: TextIO | None = None) -> bool:
    """Whether ``stream`` (default: standard output) is a terminal that a person reads."""
    return (stream or sys.stdout).isatty()


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str | None = None,
    nowrap: Sequence[str] = (),
    right: Sequence[str] = (),
    styles: Sequence[str] | None = None,
    header: bool = False,
) -> None:
    """Print rows of text to standard output: a rich table on a terminal, tab-separated lines in a pipe.

    Args:
        columns: the names of the columns; in a pipe they are left out, as every line is a row, unless ``header``.
        rows: one sequence of cells a row, as long as ``columns``.
        title: printed above the table on a terminal.
        nowrap: the columns that must stay on one line.
        right: the columns that are aligned to the right.
        styles: a rich style a row, such as ``"green"`` or ``""``.
        header: in a pipe, write the names of the columns as the first line.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row has {len(row)} cells; expected {len(columns)} for {list(columns)}: {list(row)}")
    if not interactive():
        for row in [columns, *rows] if header else rows:
            print("\t".join(" ".join(cell.split()) for cell in row))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in right else "left"
        drawn.add_column(column, no_wrap=column in nowrap, overflow="fold", justify=justify)
    for number, row in enumerate(rows):
        drawn.add_row(*(Text(cell) for cell in row), style=styles[number] if styles else None)
    Console().print(drawn)


def pairs(heading: str, entries: Sequence[tuple[str, str]]) -> None:
    """Print a heading and (label, text) pairs: aligned and wrapped on a terminal, tab-separated in a pipe."""
    if not interactive():
        for label, text in entries:
            for line in text.splitlines() or [""]:
                print(f"{label}\t{line}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in entries:
        grid.add_row(label, Text(text))
    console = Console()
    console.print(Text(heading, style="bold"))
    console.print(grid)


@contextlib.contextmanager
def progress() -> Iterator[Report | None]:
    """Give a function that moves a progress bar on standard error, or None where no one would see it.

    >>> from evenly.terminal import progress
    >>> with progress() as report:
    ...     for step in range(3):
    ...         if report is not None:
    ...             report("counting", step + 1, 3)
    """
    if not interactive(sys.stderr):
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("starting", total=None)

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield report
