"""Reading ``sensitive_features=``: which group each row belongs to.

Group labels come as a list, an array, a pandas or polars column, a mapping of columns or a table. Every method of
this folder reads them here, so that all accept the same things and complain in the same words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.utils import column_or_1d

__all__ = ["Attribute", "binary_labels", "joint_codes", "read_attributes"]


class Attribute(NamedTuple):
    """One sensitive attribute of some rows.

    Attributes:
        name: the name of the column, ``"sensitive_feature"`` where it has none; of an intersection
            ``"sex & race"``.
        groups: the group labels, sorted; tuples for an intersection.
        codes: (n,) the place of each row's label in ``groups``.
    """

    name: str
    groups: tuple[Any, ...]
    codes: NDArray[np.int64]

    def encode(self, other: Attribute) -> NDArray[np.int64]:
        """Codes of the rows of ``other`` in the order of this attribute's groups.

        Raises:
            ValueError: ``other`` has a group that this one does not know.
        """
        place = {group: code for code, group in enumerate(self.groups)}
        unknown = [group for group in other.groups if group not in place]
        if unknown:
            raise ValueError(
                f"sensitive_features has the group {unknown[0]!r} in {self.name!r}, which was not there at fit; known "
                f"are {', '.join(map(repr, self.groups))}."
            )
        return np.array([place[group] for group in other.groups], dtype=np.int64)[other.codes]


def read_attributes(sensitive_features: Any, rows: int, *, intersect: bool = True) -> list[Attribute]:
    """Read group labels.

    Args:
        sensitive_features: (n,) or (n, columns): a list, an array, a pandas or polars series or table, or a mapping of
            names to columns. Labels are whatever can be compared: strings, integers, booleans.
        rows: n.
        intersect: several columns make one attribute whose groups are the combinations that occur; otherwise one
            attribute a column.

    Raises:
        TypeError: no group labels.
        ValueError: another number of rows than ``rows``, a missing label, labels that cannot be sorted, two columns
            of one name.

    >>> read_attributes({"sex": ["f", "m", "f"], "old": [True, True, False]}, 3)[0].groups
    (('f', False), ('f', True), ('m', True))
    >>> [a.name for a in read_attributes({"sex": ["f", "m", "f"], "old": [True, True, False]}, 3, intersect=False)]
    ['sex', 'old']
    """
    attributes = [_attribute(name, column, rows) for name, column in _columns(sensitive_features)]
    if len(attributes) > 1 and intersect:
        return [_intersection(attributes)]
    return attributes


def joint_codes(y: Any, sensitive_features: Any) -> NDArray[np.int64]:
    """Class numbers of (label, group), the target of a model of p(Y, A | x).

    Args:
        y: (n,) labels of two classes.
        sensitive_features: (n,) or (n, columns), as everywhere; several columns are intersected.

    Returns:
        (n,) ``label * groups + group``, where label is 0 or 1 in the order of the sorted labels and group is the
        place in the sorted groups.

    >>> joint_codes([0, 1, 1, 0], ["a", "a", "b", "b"])
    array([0, 2, 3, 1])
    """
    _, labels = binary_labels(y)
    (attribute,) = read_attributes(sensitive_features, len(labels))
    return labels * len(attribute.groups) + attribute.codes


def binary_labels(y: Any) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The two classes, sorted, and the label of each row as 0 or 1.

    Raises:
        ValueError: not one column, a missing label, or not exactly two classes.
    """
    if not isinstance(y, Sequence):
        y = np.asarray(y)
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)  # as scikit-learn's estimators do
    column = _flat(y, "y")
    classes, labels = np.unique(column, return_inverse=True)
    if len(classes) != 2:
        shown = ", ".join(map(repr, classes[:5].tolist()))
        raise ValueError(
            f"y has {len(classes)} class{'es' if len(classes) != 1 else ''} ({shown}{', ...' * (len(classes) > 5)}), "
            f"expected 2. Only binary classification is supported."
        )
    return classes, labels.astype(np.int64)


def _columns(values: Any) -> list[tuple[str, Any]]:
    if values is None:
        raise TypeError("sensitive_features is None, expected the group of each row, such as X['sex'].")
    if isinstance(values, Mapping):
        found = [(str(name), column) for name, column in values.items()]
    elif hasattr(values, "columns"):  # pandas, polars and their like
        names = list(values.columns)
        if len(set(names)) != len(names):
            raise ValueError(f"sensitive_features has two columns of one name: {names}.")
        found = [(str(name), values[name]) for name in names]
    else:
        name = getattr(values, "name", None)
        array = np.asarray(values, dtype=object) if isinstance(values, Sequence) else np.asarray(values)
        if array.ndim == 2 and array.shape[1] > 1:
            found = [(f"sensitive_feature_{place}", array[:, place]) for place in range(array.shape[1])]
        else:
            found = [("sensitive_feature" if name is None else str(name), values)]
    if not found:
        raise ValueError("sensitive_features has no column, expected at least one.")
    return found


def _flat(values: Any, what: str) -> NDArray[Any]:
    array = np.asarray(values, dtype=object) if isinstance(values, Sequence) else np.asarray(values)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"{what} has shape {array.shape}, expected (n,): one label a row.")
    if pd.isna(array).any():
        raise ValueError(
            f"{what} has {int(pd.isna(array).sum())} missing labels. Drop those rows, or give them a label of "
            f"their own (in pandas: .fillna('missing'))."
        )
    return np.array(array.tolist()) if array.dtype == object and what == "y" else array


def _attribute(name: str, values: Any, rows: int) -> Attribute:
    what = "sensitive_features" if name == "sensitive_feature" else f"sensitive_features[{name!r}]"
    column = _flat(values, what)
    if len(column) != rows:
        raise ValueError(f"{what} has {len(column)} rows, expected {rows}, one for each row of the data.")
    codes, found = pd.factorize(column)
    try:
        order = sorted(range(len(found)), key=lambda place: found[place])
    except TypeError as error:
        raise ValueError(f"{what} has labels that cannot be compared: {found[:5].tolist()}. Use one type.") from error
    place = np.empty(len(found), dtype=np.int64)
    place[order] = np.arange(len(found))
    labels = found.tolist()
    return Attribute(name, tuple(labels[k] for k in order), place[codes])


def _intersection(attributes: list[Attribute]) -> Attribute:
    codes = np.zeros(len(attributes[0].codes), dtype=np.int64)
    for attribute in attributes:
        codes = codes * len(attribute.groups) + attribute.codes
    present, codes = np.unique(codes, return_inverse=True)
    groups = []
    for code in present.tolist():
        label = []
        for attribute in reversed(attributes):
            code, place = divmod(code, len(attribute.groups))
            label.append(attribute.groups[place])
        groups.append(tuple(reversed(label)))
    return Attribute(" & ".join(a.name for a in attributes), tuple(groups), codes.astype(np.int64))
