"""The groups of an audit: columns of labels, binned numbers, missing values, intersections.

A value that is missing is a group of its own, ``missing``. A number with many values is cut into bins: at edges that
are given, or at quantiles. An intersection is a combination of values of two or more columns that occurs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Bins", "Grouping", "groupings", "parse_groups", "text_of"]

Array = np.ndarray[Any, Any]

#: Edges, a number of quantile bins such as ``"q4"``, or None: as the column is.
Bins = Sequence[float] | str | None

MISSING = "missing"
MAX_VALUES = 200
MAX_GROUPS = 3000
FEW_NUMBERS = 10
DEFAULT_BINS = "q4"


@dataclass(frozen=True)
class Grouping:
    """One way to split the rows: by one column, or by the intersection of several.

    Attributes:
        columns: names of the columns.
        codes: (N,) the group of each row.
        values: for each group, one value a column.
    """

    columns: tuple[str, ...]
    codes: Array
    values: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def name(self) -> str:
        """The columns, such as ``sex × race``."""
        return " × ".join(self.columns)

    @property
    def labels(self) -> tuple[str, ...]:
        """The groups, such as ``sex=Female, race=Black``."""
        return tuple(
            ", ".join(
                f"{column}{'' if value.startswith('<') else '='}{value}"
                for column, value in zip(self.columns, each, strict=True)
            )
            for each in self.values
        )


def parse_groups(text: str) -> dict[str, Bins]:
    """The columns of ``--groups`` and how each is binned.

    Args:
        text: names with commas between. ``age:25,45,65`` cuts a column of numbers at these edges, ``age:q4`` into 4
            bins of equal size.

    Raises:
        ValueError: no column, one named twice, or bins that are neither.

    >>> parse_groups("sex,age:25,45,65,race")
    {'sex': None, 'age': (25.0, 45.0, 65.0), 'race': None}
    >>> parse_groups("income:q5")
    {'income': 'q5'}
    """
    found: dict[str, Bins] = {}
    last = None
    for part in text.split(","):
        part = part.strip()
        edge = _number(part)
        if edge is not None and last is not None:
            found[last] = (*(found[last] or ()), edge)
            continue
        name, colon, bins = (piece.strip() for piece in part.rpartition(":")) if ":" in part else (part, "", "")
        if not name:
            raise ValueError(
                f"groups {text!r} have an empty name; expected column names, such as sex,race,age:25,45,65"
            )
        if name in found:
            raise ValueError(f"groups {text!r} name {name!r} twice")
        last = None
        found[name] = None
        if colon:
            first = _number(bins)
            if first is not None:
                found[name], last = (first,), name
            else:
                _quantiles(name, bins)
                found[name] = bins
    return found


def groupings(columns: Mapping[str, Any], bins: Mapping[str, Bins], depth: int) -> list[Grouping]:
    """Every column, then every combination of up to ``depth`` columns.

    Args:
        columns: name to (N,) values.
        bins: name to bins, for the columns of numbers that have some.
        depth: 1 for no intersections.

    Raises:
        ValueError: a column that is no grouping, unknown names in ``bins``, too many groups.
    """
    unknown = [name for name in bins if name not in columns]
    if unknown:
        raise ValueError(f"bins are given for {unknown}, which are not among the group columns {list(columns)}")
    single = [_column(name, values, bins.get(name)) for name, values in columns.items()]
    found = list(single)
    for size in range(2, depth + 1):
        found += [_cross(members) for members in itertools.combinations(single, size)]
    total = sum(len(grouping.values) for grouping in found)
    if total > MAX_GROUPS:
        raise ValueError(
            f"{total} groups and intersections are more than {MAX_GROUPS}; use fewer columns, coarser bins or a "
            f"smaller depth of intersections (it is {depth})"
        )
    return found


def text_of(value: Any) -> str:
    """A label as text: a whole float as the whole number that it is.

    >>> text_of(2.0), text_of(0.5), text_of("a")
    ('2', '0.5', 'a')
    """
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _quantiles(name: str, text: str) -> int:
    count = int(text[1:]) if text[:1] == "q" and text[1:].isdigit() else 0
    if count < 2:
        raise ValueError(f"bins {text!r} of {name!r} are neither edges such as 25,45,65 nor quantiles such as q4")
    return count


def _column(name: str, values: Any, bins: Bins) -> Grouping:
    import pandas as pd

    series = pd.Series(values).reset_index(drop=True)
    gone = series.isna().to_numpy()
    numeric = pd.api.types.is_numeric_dtype(series) and not pd.api.types.is_bool_dtype(series)
    notes: tuple[str, ...] = ()
    if numeric:
        numbers = series.astype(float).to_numpy(na_value=np.nan)
        if bins is None and len(np.unique(numbers[~gone])) > FEW_NUMBERS:
            bins = DEFAULT_BINS
            notes = (f"{name} has many values and was cut into quarters; give edges, such as {name}:LOW,HIGH",)
    elif bins is not None:
        raise ValueError(f"the group column {name!r} has bins {bins!r} but holds no numbers ({series.dtype})")
    if bins is not None:
        codes, names = _binned(name, numbers, gone, bins)
    else:
        codes, names = _labelled(name, series, gone)
    if gone.any():
        codes[gone] = len(names)
        names.append(MISSING if MISSING not in names else f"{MISSING} (no value)")
    return Grouping((name,), codes, tuple((each,) for each in names), notes)


def _labelled(name: str, series: Any, gone: Array) -> tuple[Array, list[str]]:
    import pandas as pd

    if isinstance(series.dtype, pd.CategoricalDtype):  # its order, and values that do not occur
        codes, distinct = series.cat.codes.to_numpy().astype(np.int64), list(series.cat.categories)
    else:
        try:
            codes, uniques = pd.factorize(series, sort=True)
        except TypeError:  # values of several types have no order
            codes, uniques = pd.factorize(series)
        codes, distinct = codes.astype(np.int64), list(uniques)
    names = [text_of(value) for value in distinct]
    if len(names) > MAX_VALUES:
        raise ValueError(
            f"the group column {name!r} has {len(names)} different values, more than {MAX_VALUES}; "
            "join them into fewer groups first"
        )
    alike = sorted({each for each in names if names.count(each) > 1})
    if alike:
        raise ValueError(f"the group column {name!r} has different values that print alike: {alike[:5]}")
    return codes, names


def _binned(name: str, numbers: Array, gone: Array, bins: Bins) -> tuple[Array, list[str]]:
    there = numbers[~gone]
    if not np.isfinite(there).all():
        raise ValueError(f"the group column {name!r} has infinite numbers, which are in no bin")
    if isinstance(bins, str):
        count = _quantiles(name, bins)
        cuts = np.quantile(there, np.arange(1, count) / count, method="higher") if len(there) else np.array([])
        edges = np.unique(cuts)
        edges = edges[edges > there.min()] if len(there) else edges  # no empty first bin
    else:
        edges = np.asarray(bins, float)
        if edges.ndim != 1 or not len(edges) or not np.isfinite(edges).all() or (np.diff(edges) <= 0).any():
            raise ValueError(f"the edges {list(bins or ())} of {name!r} are not increasing numbers")
    codes = np.zeros(len(numbers), np.int64)
    codes[~gone] = np.searchsorted(edges, there, side="right")
    if not len(edges):
        return codes, ["all"]
    whole = bool((there == np.round(there)).all() and (edges == np.round(edges)).all())
    names = [f"<{edges[0]:g}"]
    for low, high in itertools.pairwise(edges):
        last = high - 1
        names.append((f"{low:g}" if low == last else f"{low:g}-{last:g}") if whole else f"{low:g} to <{high:g}")
    names.append(f"{edges[-1]:g}+")
    return codes, names


def _cross(members: Sequence[Grouping]) -> Grouping:
    shape = [len(member.values) for member in members]
    flat = np.ravel_multi_index([member.codes for member in members], shape)
    used, codes = np.unique(flat, return_inverse=True)
    places = np.stack(np.unravel_index(used, shape), 1)
    values = tuple(tuple(member.values[place][0] for member, place in zip(members, row, strict=True)) for row in places)
    columns = tuple(member.columns[0] for member in members)
    empty = int(np.prod(shape)) - len(used)
    notes = (f"{empty} combinations of {' × '.join(columns)} have no rows",) if empty else ()
    return Grouping(columns, codes.reshape(-1).astype(np.int64), values, notes)
