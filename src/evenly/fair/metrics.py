"""Group metrics: what a classifier does to each group, and how far apart the groups are.

A rate is the mean of a 0-1 column over the rows of a group, so that all of them are
``evenly.moments(..., by=group, mask=...)``: the selection rate is the mean of the decisions, the true (false)
positive rate the mean of the decisions where the label is positive (negative), accuracy the mean of agreement. The
differences have the names and keywords of fairlearn's metrics and agree with them.

Decisions may be probabilities of a positive decision; the rates are then expectations, which is what a randomized
rule is judged by.

Reference: M. Hardt, E. Price and N. Srebro, "Equality of Opportunity in Supervised Learning", NeurIPS 2016, arXiv
1610.02413 (equal opportunity, equalized odds); names as in fairlearn (Weerts et al., JMLR 2023).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from evenly.core import moments
from evenly.fair.groups import read_attributes

__all__ = [
    "GroupRates",
    "demographic_parity_difference",
    "equal_opportunity_difference",
    "equalized_odds_difference",
    "group_rates",
]


class GroupRates(NamedTuple):
    """Rates of each group. NaN where a group has no row to take the mean of.

    Attributes:
        groups: the G group labels, sorted; tuples where several columns were given.
        count: (G,) rows of each group.
        accuracy: (G,) share of rows whose decision is the label.
        selection_rate: (G,) share of positive decisions.
        true_positive_rate: (G,) share of positive decisions among positive labels.
        false_positive_rate: (G,) share of positive decisions among negative labels.
    """

    groups: tuple[Any, ...]
    count: NDArray[np.int64]  # type: ignore[assignment]
    accuracy: NDArray[np.float64]
    selection_rate: NDArray[np.float64]
    true_positive_rate: NDArray[np.float64]
    false_positive_rate: NDArray[np.float64]

    def difference(self, rate: str) -> float:
        """Largest minus smallest group value of a rate.

        Raises:
            ValueError: an unknown rate; a group for which it is not defined.
        """
        if rate not in self._fields[2:]:
            raise ValueError(f"rate={rate!r} is unknown, expected one of {', '.join(map(repr, self._fields[2:]))}.")
        values = getattr(self, rate)
        if np.isnan(values).any():
            empty = [group for group, value in zip(self.groups, values, strict=True) if np.isnan(value)]
            kind = "positive" if rate == "true_positive_rate" else "negative"
            raise ValueError(
                f"the {rate.replace('_', ' ')} of group {empty[0]!r} is not defined: it has no row with a {kind} "
                f"label. Merge small groups, or leave them out."
            )
        return float(values.max() - values.min())

    def to_frame(self) -> pd.DataFrame:
        """The same as a table, a row a group."""
        index: Any = (
            pd.MultiIndex.from_tuples(self.groups) if isinstance(self.groups[0], tuple) else pd.Index(self.groups)
        )
        return pd.DataFrame({name: getattr(self, name) for name in self._fields[1:]}, index=index)


def group_rates(y_true: Any, y_pred: Any, *, sensitive_features: Any) -> GroupRates:
    """Count, accuracy, selection rate, true and false positive rate of each group.

    Args:
        y_true: (n,) labels, 0 or 1.
        y_pred: (n,) decisions, 0 or 1, or probabilities of deciding 1; the rates are then expected rates.
        sensitive_features: (n,) group labels, or (n, columns); several columns are intersected.

    Returns:
        :class:`GroupRates`.

    Raises:
        ValueError: labels other than 0 and 1, decisions outside [0, 1], lengths that differ, no rows.
        TypeError: no group labels.

    >>> rates = group_rates([1, 0, 1, 0], [1, 0, 1, 1], sensitive_features=["a", "a", "b", "b"])
    >>> rates.selection_rate
    array([0.5, 1. ])
    >>> rates.difference("false_positive_rate")
    1.0
    """
    truth = _numbers(y_true, "y_true")
    chosen = _numbers(y_pred, "y_pred")
    if len(truth) != len(chosen):
        raise ValueError(f"y_true has {len(truth)} rows and y_pred {len(chosen)}; expected as many.")
    if not len(truth):
        raise ValueError("y_true has no rows, expected at least one.")
    if not np.isin(truth, (0, 1)).all():
        raise ValueError(f"y_true has labels other than 0 and 1, such as {truth[~np.isin(truth, (0, 1))][0]:g}.")
    inside = (chosen >= 0) & (chosen <= 1 + 1e-9)  # a sum of weights may round up
    if not inside.all():
        wrong = chosen[~inside][0]
        raise ValueError(f"y_pred has {wrong:g}, expected decisions 0 or 1, or probabilities in [0, 1].")
    (attribute,) = read_attributes(sensitive_features, len(truth))
    agreement = np.where(truth == 1, chosen, 1 - chosen)
    positive = torch.from_numpy(truth == 1)
    measured = moments(
        torch.from_numpy(np.stack([agreement, chosen, chosen, chosen], 1)),
        "n rate -> rate",
        by=torch.from_numpy(attribute.codes),
        num_groups=len(attribute.groups),
        mask=torch.stack([torch.ones_like(positive), torch.ones_like(positive), positive, ~positive], 1),
    )
    count = measured.count.numpy()
    rates = np.where(count > 0, measured.mean.numpy(), np.nan)
    return GroupRates(attribute.groups, count[:, 0].astype(np.int64), *rates.T)


def demographic_parity_difference(y_true: Any, y_pred: Any, *, sensitive_features: Any) -> float:
    """Largest minus smallest selection rate over groups.

    Arguments and errors are those of :func:`group_rates`; ``y_true`` does not enter the value.

    >>> demographic_parity_difference([1, 0, 1, 0], [1, 0, 1, 1], sensitive_features=["a", "a", "b", "b"])
    0.5
    """
    return group_rates(y_true, y_pred, sensitive_features=sensitive_features).difference("selection_rate")


def equal_opportunity_difference(y_true: Any, y_pred: Any, *, sensitive_features: Any) -> float:
    """Largest minus smallest true positive rate over groups.

    Arguments are those of :func:`group_rates`; a group without a positive label is an error.

    >>> equal_opportunity_difference([1, 1, 1, 0], [1, 0, 1, 1], sensitive_features=["a", "a", "b", "b"])
    0.5
    """
    return group_rates(y_true, y_pred, sensitive_features=sensitive_features).difference("true_positive_rate")


def equalized_odds_difference(y_true: Any, y_pred: Any, *, sensitive_features: Any) -> float:
    """The larger of the differences in true positive rate and in false positive rate.

    Arguments are those of :func:`group_rates`; a group that lacks one of the labels is an error.

    >>> equalized_odds_difference([1, 0, 1, 0], [1, 0, 1, 1], sensitive_features=["a", "a", "b", "b"])
    1.0
    """
    rates = group_rates(y_true, y_pred, sensitive_features=sensitive_features)
    return max(rates.difference("true_positive_rate"), rates.difference("false_positive_rate"))


def _numbers(values: Any, what: str) -> NDArray[np.float64]:
    array = np.asarray(values)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"{what} has shape {array.shape}, expected (n,).")
    try:
        return array.astype(np.float64)
    except ValueError as error:
        raise ValueError(f"{what} has values of type {array.dtype}, expected numbers: 0 or 1.") from error
