"""Group ids from columns of attributes: one integer a sample, one name a group.

.. math::
    g = \\big( (a_1 K_2 + a_2) K_3 + a_3 \\big) \\dots

where :math:`a_j \\in \\{0, \\dots, K_j - 1\\}` is the category of the sample in column j: with the columns (label,
attribute) this is the label x attribute numbering of Sagawa et al., arXiv 1911.08731. Use :func:`group_ids` once on the
training data and with ``like=`` on validation and test data, so that one id means one group everywhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["GroupIds", "group_ids"]

_MOST = 100_000


class GroupIds(NamedTuple):
    """Group ids of samples.

    Attributes:
        ids: int64 (N,), in [0, m).
        names: one a group, such as ``"sex=Female, race=Black"``.
        counts: samples in each group, int64 (m,).
        categories: the categories of each column, by its name, in the order that numbers them.
        codes: the group's category in each column, int64 (m, columns).
    """

    ids: Tensor
    names: tuple[str, ...]
    counts: Tensor
    categories: dict[str, tuple[Any, ...]]
    codes: Tensor


def group_ids(
    columns: Mapping[str, Any] | Any,
    names: Sequence[str] | None = None,
    *,
    observed: bool = False,
    like: GroupIds | None = None,
) -> GroupIds:
    """Number the groups that columns of attributes make.

    Args:
        columns: a mapping of names to columns, or a data frame (pandas, polars). A column is a sequence, array, tensor
            or series of N strings, integers or booleans; categories are sorted (a pandas categorical keeps its own
            order). The first column changes slowest.
        names: which columns of a frame, in order; default: all.
        observed: number only the combinations that occur; else all, of which some may have no sample.
        like: an earlier result whose groups are used. A category or combination that it does not have is an error.

    Raises:
        ValueError: no column; columns of different lengths; missing values; more than 100,000 combinations without
            ``observed``; with ``like``, other columns or unknown categories.
        TypeError: a column that is not one-dimensional, or of fractional numbers (make bins first: ``pandas.cut``).

    Cost: O(N log N) for the sorting of categories.

    >>> made = group_ids({"y": [0, 0, 1, 1], "colour": ["red", "green", "red", "red"]})
    >>> made.ids, made.counts
    (tensor([1, 0, 3, 3]), tensor([1, 1, 0, 2]))
    >>> made.names
    ('y=0, colour=green', 'y=0, colour=red', 'y=1, colour=green', 'y=1, colour=red')
    >>> group_ids({"y": [1], "colour": ["green"]}, like=made).ids
    tensor([2])
    """
    chosen = list(names) if names is not None else [str(name) for name in _names(columns)]
    if not chosen:
        raise ValueError("group_ids needs at least one column.")
    unknown = [name for name in chosen if name not in set(_names(columns))]
    if unknown:
        raise ValueError(f"no column {unknown[0]!r}; there are {', '.join(map(str, _names(columns)))}.")
    if like is not None and list(like.categories) != chosen:
        raise ValueError(f"columns {chosen} differ from those of like=, {list(like.categories)}.")
    lengths = {name: len(columns[name]) for name in chosen}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns have different lengths: {lengths}.")
    coded = {name: _coded(name, columns[name], like and like.categories[name]) for name in chosen}
    categories = {name: kinds for name, (_, kinds) in coded.items()}
    sizes = [len(kinds) for kinds in categories.values()]
    if like is None and not observed and math.prod(sizes) > _MOST:
        raise ValueError(
            f"the columns make {math.prod(sizes)} groups ({' x '.join(map(str, sizes))}); number those that occur with "
            "observed=True, or make fewer categories."
        )
    flat = np.zeros(len(columns[chosen[0]]), dtype=np.int64)
    for (code, _), size in zip(coded.values(), sizes, strict=True):
        flat = flat * size + code
    if like is not None:
        numbers = _flat(like.codes.numpy(), sizes)
        place = np.searchsorted(numbers, flat)
        known = numbers[np.minimum(place, len(numbers) - 1)] == flat
        if not known.all():
            row = int(np.flatnonzero(~known)[0])
            described = ", ".join(f"{name}={categories[name][code[row]]}" for name, (code, _) in coded.items())
            raise ValueError(f"sample {row} is of the group {described!r}, which like= does not have.")
        flat, codes = place, like.codes.numpy()
    elif observed:
        numbers, flat = np.unique(flat, return_inverse=True)
        codes = np.stack(np.unravel_index(numbers, sizes), axis=1)
    else:
        codes = np.array(list(itertools.product(*map(range, sizes))), dtype=np.int64).reshape(-1, len(sizes))
    ids = torch.from_numpy(np.ascontiguousarray(flat.astype(np.int64)))
    labels = tuple(", ".join(f"{n}={categories[n][k]}" for n, k in zip(chosen, row, strict=True)) for row in codes)
    counts = torch.bincount(ids, minlength=len(labels))
    return GroupIds(ids, labels, counts, categories, torch.from_numpy(codes.astype(np.int64)))


def _names(columns: Any) -> Iterable[Any]:
    if isinstance(columns, Mapping):
        return list(columns)
    if not hasattr(columns, "columns"):
        raise TypeError(
            f"columns is a {type(columns).__name__}, expected a mapping of names to columns or a data frame."
        )
    return list(columns.columns)


def _coded(name: str, column: Any, known: tuple[Any, ...] | None) -> tuple[np.ndarray[Any, Any], tuple[Any, ...]]:
    import pandas as pd

    values = column.detach().cpu().numpy() if isinstance(column, Tensor) else column
    if not isinstance(getattr(values, "dtype", None), pd.CategoricalDtype):
        values = np.asarray(values)
        if values.ndim != 1:
            raise TypeError(f"column {name!r} has shape {values.shape}, expected one value a sample.")
        if values.dtype.kind == "f" and not np.all(np.isnan(values) | (values == np.round(values))):
            raise TypeError(f"column {name!r} holds fractional numbers; make bins first, as with pandas.cut.")
        if values.dtype.kind == "f" and not np.isnan(values).any():
            values = values.astype(np.int64)
    missing = int(pd.isna(values).sum())
    if missing:
        raise ValueError(f"column {name!r} has {missing} missing values; fill them or leave those samples out.")
    if known is None:
        made = pd.Categorical(values)
        kinds = tuple(kind.item() if isinstance(kind, np.generic) else kind for kind in made.categories)
        return np.asarray(made.codes, dtype=np.int64), kinds
    codes = pd.Index(list(known)).get_indexer(np.asarray(values)).astype(np.int64)
    if (codes < 0).any():
        given = np.asarray(values)[codes < 0][0]
        raise ValueError(f"column {name!r} has the category {given!r}, which like= does not have: {list(known)}.")
    return codes, known


def _flat(codes: np.ndarray[Any, Any], sizes: Sequence[int]) -> np.ndarray[Any, Any]:
    flat = np.zeros(len(codes), dtype=np.int64)
    for column, size in enumerate(sizes):
        flat = flat * size + codes[:, column]
    return flat
