"""How well does a model serve each group? Accuracy, calibration and selection rates by group and intersection.

:func:`audit` takes predictions or scores, targets and group columns, and measures every group and every intersection
of groups, worst first, each with its confidence interval, its difference to all other rows, and a test of it.
``evenly audit`` is the same on the command line.

What is stated, and how:

- **Intervals**: Wilson's for shares, "square and add" for what is made of shares, the percentile bootstrap, stratified
  by group, for the rest (:mod:`evenly.workbench.auditing.intervals`).
- **The rest** of a group is all rows that are not in it. A group *differs* where the test of no difference gives a
  Holm-adjusted p of at most 1 - confidence: Fisher's exact test for shares, Welch's t-test for means of errors, scores
  and losses, the latter only where both sides have ``min_group`` rows. The family is every such test of the audit: all
  measures, groups and intersections. Prevalence is of the data, not of the model, and not tested; nor are balanced
  accuracy, expected calibration error and R², which are no means.
- **Small** groups, of fewer than ``min_group`` rows, are shown and flagged, after the others: the estimate of a few
  rows is worst or best by chance.
- **The best** of a grouping is its group with the best value that is not small; the highest, where a measure has no
  good side (selection rate). It was chosen by its value, so its distance has no interval.

Means of groups are :func:`evenly.moments` with ``by=`` the groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evenly.workbench.auditing.groups import Bins, Grouping, groupings, text_of
from evenly.workbench.auditing.intervals import (
    bootstrap_sums,
    combine,
    difference,
    exact_test,
    holm,
    percentile,
    pivotal,
    ratio,
    welch,
    wilson,
)
from evenly.workbench.auditing.measures import Measure, Problem, calibration_bins, classification, regression

__all__ = ["Audit", "audit", "infer_task"]

Array = np.ndarray[Any, Any]
Estimate = tuple[float, float, float]

TASKS = ("binary", "multiclass", "regression")
MANY_NUMBERS = 20
ALL = "all rows"


@dataclass(frozen=True)
class Audit:
    """The result of :func:`audit`.

    Attributes:
        table: a :class:`pandas.DataFrame`, one row a group and measure, worst group first. Columns: ``grouping``
            (``sex × race``), ``level`` (0: all rows, 1: one column, 2: pairs, ...), ``group``, ``rows``, ``small``,
            ``measure``, ``value``, ``low``, ``high``, ``count`` (the rows that the measure is of), ``rest`` (the value
            of all other rows), ``difference`` and ``ratio`` to the rest, each with ``_low`` and ``_high``, ``best``
            (the best group of the grouping), ``difference_to_best``, ``ratio_to_best``, ``p``, ``p_holm``,
            ``differs``. What is undefined is NaN.
        by_group: one row a group of one column, worst first: ``grouping``, ``rows``, ``small``, ``differs`` (names of
            measures), and for each measure ``NAME``, ``NAME_low``, ``NAME_high``.
        by_intersection: the same for intersections.
        overall: the same for all rows, a :class:`pandas.Series`.
        calibration: one row a group and bin of its calibration curve: ``grouping``, ``level``, ``group``, ``bin``,
            ``count``, ``predicted``, ``true`` and, for classes, ``low`` and ``high``. Empty without probabilities.
        task: ``"binary"``, ``"multiclass"`` or ``"regression"``.
        measures: what was measured.
        rank_by: the measure that says which group is worst.
        finding: what was found, in a few sentences.
        notes: what was assumed or left out.
        settings: what the audit was asked for.
    """

    table: Any
    by_group: Any
    by_intersection: Any
    overall: Any
    calibration: Any
    task: str
    measures: tuple[Measure, ...]
    rank_by: str
    finding: str
    notes: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def measure(self) -> Measure:
        """The measure that groups are ranked by."""
        return next(each for each in self.measures if each.name == self.rank_by)

    def differing(self) -> Any:
        """The rows of ``table`` that differ from the rest, the least likely by chance first."""
        return self.table[self.table["differs"]].sort_values("p_holm", kind="stable")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values; what is undefined or infinite is None."""
        frames = {name: _records(getattr(self, name)) for name in ("table", "calibration")}
        return {
            "task": self.task,
            "rank_by": self.rank_by,
            "finding": self.finding,
            "notes": list(self.notes),
            "settings": self.settings,
            **frames,
        }

    def to_json(self, path: str | Path) -> Path:
        """Write :meth:`to_dict` as JSON; the file is there whole or not at all."""
        import json

        from evenly.conversion import write_atomically

        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(path, f"{text}\n".encode())
        return Path(path)

    def to_html(self, path: str | Path, *, command: str | None = None) -> Path:
        """Write the report: one HTML file that opens offline.

        Args:
            path: the file.
            command: the command that is shown as the one that made it.
        """
        from evenly.conversion import write_atomically
        from evenly.workbench.auditing.page import render

        write_atomically(path, render(self, command).encode())
        return Path(path)

    def print(self, limit: int = 10) -> None:
        """Print the groups and the worst ``limit`` intersections: tables on a terminal, tab-separated in a pipe."""
        from evenly.workbench.auditing.show import print_audit

        print_audit(self, limit)


def audit(
    y_true: Any,
    y_pred: Any = None,
    *,
    groups: Any,
    y_score: Any = None,
    task: str | None = None,
    positive: Any = None,
    classes: Sequence[Any] | None = None,
    threshold: float | None = None,
    bins: Mapping[str, Bins] | None = None,
    intersections: int = 2,
    min_group: int = 30,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    rank_by: str | None = None,
    name: str = "",
    progress: Callable[[str, int, int], None] | None = None,
) -> Audit:
    """Measure a model by group and intersection, worst group first.

    Args:
        y_true: (N,) targets: labels, or numbers for a regression.
        y_pred: (N,) predictions. ``None``: from ``y_score``, by ``threshold`` or as the class of the highest score.
        groups: the group columns: a DataFrame, a mapping from names to (N,) values, or one Series or array.
        y_score: (N,) scores of the positive class, or (N, K) probabilities of the classes. Scores that are not all
            in [0, 1] serve for ``threshold`` alone, and calibration is left out with a note.
        task: ``"binary"``, ``"multiclass"`` or ``"regression"``; ``None``: binary for two labels; for numbers with
            more than 20 values or with fractions regression; else multiclass.
        positive: the positive label; needed for two labels that are not 0 and 1, -1 and 1, or False and True. With
            more classes its selection rate and error rates are measured against all others.
        classes: the labels in the order of the columns of ``y_score``; ``None``: sorted.
        threshold: of a one-column score, default 0.5 for probabilities.
        bins: for columns of numbers: edges, or ``"q4"`` for four bins of equal size. A column of numbers with more
            than 10 values is cut into quarters if it has none.
        intersections: up to how many columns are crossed; 1: none.
        min_group: a group of fewer rows is flagged as small.
        confidence: of the intervals; 1 - confidence is the level of the tests.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        rank_by: a measure of :data:`evenly.workbench.auditing.MEASURES`; default accuracy, or MAE.
        name: of the model or data, for the report.
        progress: called with what is being measured, how many groupings are done, and of how many.

    Raises:
        ValueError: lengths that differ, missing or infinite targets, predictions or scores, labels that do not fit, a
            column that is no grouping, a setting out of its range.

    Returns:
        An :class:`Audit`. Time grows as N · resamples · (number of groupings).

    >>> result = audit([1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 0, 1], groups={"sex": list("ffffmm")}, min_group=1)
    >>> result.by_group[["rows", "accuracy"]]
           rows  accuracy
    group
    sex=m     2       0.0
    sex=f     4       1.0
    """
    import pandas as pd

    _check_settings(intersections, min_group, confidence, resamples)
    truth = _vector("y_true", y_true)
    if not len(truth):
        raise ValueError("y_true has no rows; an audit needs at least one")
    predicted = None if y_pred is None else _vector("y_pred", y_pred, len(truth))
    scores = None if y_score is None else _scores(y_score, len(truth))
    columns = _columns(groups, len(truth))
    notes: list[str] = []
    if task is None:
        task = infer_task(truth, classes, scores)
    elif task not in TASKS:
        raise ValueError(f"task={task!r} is unknown, expected one of {', '.join(TASKS)}")
    if task == "regression":
        problem = _regression(truth, predicted, scores)
        labels: list[str] = []
        chosen = None
    else:
        problem, labels, chosen = _classification(task, truth, predicted, scores, positive, classes, threshold, notes)
    measures = {each.name: each for each in problem.measures}
    if rank_by is None:
        rank_by = "mae" if task == "regression" else "accuracy"
    if rank_by not in measures:
        raise ValueError(f"rank_by={rank_by!r} is not measured here; measured are {', '.join(measures)}")
    every = [Grouping((), np.zeros(len(truth), np.int64), ((),)), *groupings(columns, bins or {}, intersections)]
    notes = [*notes, *problem.notes, *(note for grouping in every for note in grouping.notes)]
    rows: list[dict[str, Any]] = []
    for done, grouping in enumerate(every):
        if progress is not None:
            progress(grouping.name or ALL, done, len(every))
        rows += _evaluate(problem, grouping, min_group, confidence, resamples, seed)
    adjusted = holm([row["p"] for row in rows])
    level = 1 - confidence
    for row, p in zip(rows, adjusted, strict=True):
        row["p_holm"], row["differs"] = float(p), bool(p <= level + 1e-12)
    rows = _worst_first(rows, measures[rank_by])
    table = pd.DataFrame(rows)
    overall = _wide(table[table["level"] == 0], measures).iloc[0]
    settings = {
        "name": name,
        "rows": len(truth),
        "groups": list(columns),
        "classes": labels,
        "positive": chosen,
        "threshold": threshold,
        "intersections": intersections,
        "min_group": min_group,
        "confidence": confidence,
        "resamples": resamples,
        "seed": seed,
        "tests": int((~np.isnan(adjusted)).sum()),
    }
    return Audit(
        table,
        _wide(table[table["level"] == 1], measures),
        _wide(table[table["level"] > 1], measures),
        overall,
        _curves(problem, every, confidence),
        task,
        problem.measures,
        rank_by,
        _finding(table, measures[rank_by], measures, settings),
        tuple(notes),
        settings,
    )


def infer_task(y_true: Any, classes: Sequence[Any] | None = None, y_score: Any = None) -> str:
    """What kind of target this is; see ``task`` of :func:`audit`.

    >>> infer_task([0, 1, 1]), infer_task(["a", "b", "c"]), infer_task([0.5, 1.0, 2.0])
    ('binary', 'multiclass', 'regression')
    """
    import pandas as pd

    series = pd.Series(y_true)
    distinct = series.unique()
    if classes is not None:
        return "binary" if len(classes) <= 2 else "multiclass"
    if getattr(y_score, "ndim", 1) == 2 and y_score.shape[1] > 2:
        return "multiclass"
    if len(distinct) <= 2:
        return "binary"
    if pd.api.types.is_numeric_dtype(series) and not pd.api.types.is_bool_dtype(series):
        numbers = np.asarray(distinct, float)
        if len(numbers) > MANY_NUMBERS or (numbers != np.round(numbers)).any():
            return "regression"
    return "multiclass"


# ------------------------------------------------------------------------------------------------ what is given


def _check_settings(intersections: int, min_group: int, confidence: float, resamples: int) -> None:
    if intersections < 1:
        raise ValueError(f"intersections={intersections} must be at least 1 (1: single columns alone)")
    if min_group < 1:
        raise ValueError(f"min_group={min_group} must be at least 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be between 0 and 1, such as 0.95")
    if resamples < 100:
        raise ValueError(f"resamples={resamples} must be at least 100 for the ends of an interval")


def _array(values: Any) -> Any:
    return values.detach().cpu().numpy() if hasattr(values, "detach") else values


def _vector(name: str, values: Any, length: int | None = None) -> Any:
    import pandas as pd

    values = _array(values)
    if getattr(values, "ndim", 1) == 2 and values.shape[1] == 1:
        values = values.iloc[:, 0] if hasattr(values, "iloc") else values[:, 0]
    if getattr(values, "ndim", 1) != 1:
        raise ValueError(f"{name} has shape {tuple(values.shape)}, expected one value a row: (N,)")
    series = pd.Series(values).reset_index(drop=True)
    if length is not None and len(series) != length:
        raise ValueError(f"{name} has {len(series)} rows and y_true has {length}; they must match")
    _refuse_missing(name, series.isna().to_numpy())
    if pd.api.types.is_float_dtype(series):
        _refuse_missing(name, np.isinf(series.to_numpy()), "infinite")
    return series


def _scores(values: Any, length: int) -> Array:
    try:
        scores = np.asarray(_array(values), float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"y_score holds something that is no number: {error}") from error
    if scores.ndim == 2 and scores.shape[1] == 1:
        scores = scores[:, 0]
    if scores.ndim not in (1, 2) or len(scores) != length:
        raise ValueError(f"y_score has shape {scores.shape}, expected ({length},) or ({length}, classes)")
    bad = ~np.isfinite(scores)
    _refuse_missing("y_score", bad if bad.ndim == 1 else bad.any(1), "missing or infinite")
    return scores


def _refuse_missing(name: str, bad: Array, what: str = "missing") -> None:
    if bad.any():
        first = ", ".join(map(str, np.flatnonzero(bad)[:5]))
        raise ValueError(
            f"{name} has {int(bad.sum())} {what} values (first at rows {first}); leave these rows out or fill them "
            "before the audit: only group columns may have missing values"
        )


def _columns(groups: Any, length: int) -> dict[str, Any]:
    import pandas as pd

    groups = _array(groups)
    if isinstance(groups, pd.DataFrame):
        names = [str(column) for column in groups.columns]
        found: dict[str, Any] = {name: groups.iloc[:, place] for place, name in enumerate(names)}
        if len(found) != len(names):
            raise ValueError(f"the group columns {names} have a name twice")
    elif isinstance(groups, Mapping):
        found = {str(name): _array(values) for name, values in groups.items()}
    elif isinstance(groups, pd.Series):
        found = {str(groups.name if groups.name is not None else "group"): groups}
    else:
        found = {"group": groups}
    if not found:
        raise ValueError("groups has no columns; an audit needs at least one")
    for name, values in found.items():
        if getattr(values, "ndim", 1) != 1 or len(values) != length:
            shape = getattr(values, "shape", (len(values),))
            raise ValueError(f"the group column {name!r} has shape {tuple(shape)}, expected ({length},)")
    return found


def _regression(truth: Any, predicted: Any, scores: Array | None) -> Problem:
    import pandas as pd

    if predicted is None or scores is not None:
        raise ValueError("a regression is audited by its predictions: give y_pred and no y_score")
    for name, series in (("y_true", truth), ("y_pred", predicted)):
        if not pd.api.types.is_numeric_dtype(series):
            raise ValueError(f"{name} holds {series.dtype}, a regression needs numbers")
    return regression(truth.to_numpy(float), predicted.to_numpy(float))


def _classification(
    task: str,
    truth: Any,
    predicted: Any,
    scores: Array | None,
    positive: Any,
    classes: Sequence[Any] | None,
    threshold: float | None,
    notes: list[str],
) -> tuple[Problem, list[str], str | None]:
    if predicted is None and scores is None:
        raise ValueError("give y_pred (predictions) or y_score (scores), or both")
    labels = _labels(task, truth, predicted, positive, classes)
    names = [text_of(label) for label in labels]
    if task == "binary":
        place: int | None = _positive(labels, positive)
    else:
        place = None if positive is None else _find("positive", labels, positive)
    y = _codes("y_true", truth, labels)
    if scores is not None and scores.ndim == 2 and scores.shape[1] != len(labels):
        raise ValueError(f"y_score has {scores.shape[1]} columns for the {len(labels)} classes {names}; give classes=")
    probabilities = None if scores is None else _probabilities(scores, place, len(labels), notes)
    if threshold is not None and (scores is None or len(labels) != 2):
        raise ValueError(f"threshold={threshold} goes with y_score and two classes")
    if predicted is not None and threshold is None:
        chosen = _codes("y_pred", predicted, labels)
    elif predicted is not None:
        raise ValueError("give y_pred or threshold, not both: a threshold makes predictions from y_score")
    elif len(labels) == 2:
        assert scores is not None and place is not None
        one = scores if scores.ndim == 1 else scores[:, place]
        if threshold is None and probabilities is None:
            raise ValueError(
                f"y_score goes from {one.min():g} to {one.max():g}, which are no probabilities: say from which "
                "threshold on a row is predicted positive"
            )
        chosen = np.where(one >= (0.5 if threshold is None else threshold), place, 1 - place)
    else:
        assert scores is not None
        chosen = scores.argmax(1)
    problem = classification(y, chosen, probabilities, names, place)
    return problem, names, None if place is None else names[place]


def _labels(task: str, truth: Any, predicted: Any, positive: Any, classes: Sequence[Any] | None) -> list[Any]:
    import pandas as pd

    if classes is not None:
        labels = list(classes)
        if len(set(labels)) != len(labels) or len(labels) < 2:
            raise ValueError(f"classes={labels} must be at least two different labels")
    else:
        seen = list(pd.unique(truth)) + ([] if predicted is None else list(pd.unique(predicted)))
        labels = list(dict.fromkeys(seen))
        try:
            labels = sorted(labels)
        except TypeError as error:
            raise ValueError(
                f"targets and predictions have labels of different types: {labels[:6]}; use the same for both"
            ) from error
        if len(labels) == 1:
            labels = _second_label(labels[0], positive)
    if task == "binary" and len(labels) > 2:
        raise ValueError(
            f"targets and predictions have {len(labels)} labels together, {[text_of(v) for v in labels[:6]]}: a binary "
            "audit has two; are the predictions coded differently from the targets?"
        )
    return labels


def _second_label(only: Any, positive: Any) -> list[Any]:
    # One class alone: the other is known for 0 and 1, or if the positive one is named.
    if isinstance(only, bool | np.bool_):
        return [False, True]
    if positive is not None:
        return [f"not {positive}", only] if str(positive) in (str(only), text_of(only)) else [only, positive]
    if text_of(only) in ("0", "1") and not isinstance(only, str):
        return [0, 1]
    raise ValueError(f"the only label is {only!r}; name the positive class (positive=), or both (classes=)")


def _find(what: str, labels: Sequence[Any], wanted: Any) -> int:
    for place, label in enumerate(labels):
        if label == wanted or str(label) == str(wanted) or text_of(label) == str(wanted):
            return place
    raise ValueError(f"{what}={wanted!r} is not among the labels {[text_of(v) for v in labels]}")


def _positive(labels: Sequence[Any], positive: Any) -> int:
    if positive is not None:
        return _find("positive", labels, positive)
    if not any(isinstance(label, str) for label in labels) and float(labels[0]) in (0, -1) and float(labels[1]) == 1:
        return 1
    raise ValueError(f"which of the labels {[text_of(v) for v in labels]} is the positive one? Give positive=")


def _codes(name: str, series: Any, labels: Sequence[Any]) -> Array:
    place = {label: index for index, label in enumerate(labels)}
    codes = np.array([place.get(value, -1) for value in series], np.int64)
    if (codes < 0).any():
        unknown = sorted({str(value) for value in series[codes < 0]})
        raise ValueError(f"{name} has labels {unknown[:6]} that are not among the classes {list(labels)}")
    return codes


def _probabilities(scores: Array, positive: int | None, k: int, notes: list[str]) -> Array | None:
    if scores.ndim == 1:
        if k != 2 or positive is None:
            raise ValueError(f"y_score has one column for {k} classes; expected (N, {k})")
        if scores.min() < 0 or scores.max() > 1:
            notes.append(
                f"scores from {scores.min():g} to {scores.max():g} are no probabilities: log loss, Brier score and "
                "calibration are left out"
            )
            return None
        pair = np.stack([1 - scores, scores], 1)
        return pair if positive == 1 else pair[:, ::-1]
    worst = float(np.abs(scores.sum(1) - 1).max())
    if scores.min() < 0 or scores.max() > 1 + 1e-6 or worst > 1e-3:
        raise ValueError(
            f"the rows of y_score are no probabilities: values from {scores.min():g} to {scores.max():g}, sums up to "
            f"{worst:g} away from 1; apply a softmax first"
        )
    return scores


# ---------------------------------------------------------------------------------------------------- the groups


@dataclass(frozen=True)
class _Part:
    # A group, or the rest of one: successes and rows of every share, sums and moments of terms, resampled sums.
    n: int
    share: dict[str, tuple[int, int]]
    sums: Array
    mean: Array
    var: Array
    boot: Array

    def join(self, parts: Sequence[_Part]) -> _Part:
        """These parts together, with self for the shapes."""
        n = sum(part.n for part in parts)
        share = {
            name: (sum(part.share[name][0] for part in parts), sum(part.share[name][1] for part in parts))
            for name in self.share
        }
        if not parts:
            zero = np.zeros_like(self.sums)
            return _Part(0, share, zero, zero, zero, np.zeros_like(self.boot))
        counts = np.array([part.n for part in parts], float)[:, None]
        sums: Array = np.sum([part.sums for part in parts], 0)
        with np.errstate(invalid="ignore"):
            mean: Array = sums / max(n, 1)
            spread = np.stack([part.var for part in parts]) + (np.stack([part.mean for part in parts]) - mean) ** 2
            var: Array = np.where(counts > 0, counts * spread, 0.0).sum(0) / max(n, 1)
        boot: Array = np.sum([part.boot for part in parts], 0)
        return _Part(n, share, sums, mean, var, boot)


def _parts(problem: Problem, grouping: Grouping, resamples: int, seed: int) -> list[_Part]:
    import torch

    from evenly import moments

    names = list(problem.shares)
    n = len(grouping.codes)
    always = np.ones(n, bool)
    values = np.column_stack([*(problem.shares[name][0].astype(float) for name in names), problem.terms])
    count = len(names)
    masks: list[Array] = []
    for name in names:
        counted = problem.shares[name][1]
        masks.append(always if counted is None else counted)
    mask = np.column_stack([*masks, *[always] * problem.terms.shape[1]])
    g = len(grouping.values)
    found = moments(
        torch.from_numpy(values), by=torch.from_numpy(grouping.codes), mask=torch.from_numpy(mask), num_groups=g
    )
    mean, var, rows = (each.numpy() for each in (found.mean, found.var, found.count))
    rows = np.broadcast_to(rows if rows.ndim == 2 else rows[:, None], mean.shape)
    sizes = np.bincount(grouping.codes, minlength=g)
    order = np.argsort(grouping.codes, kind="stable")
    ends = np.cumsum(sizes)
    parts = []
    for index, label in enumerate(grouping.labels):
        k = np.rint(mean[index, :count] * rows[index, :count]).astype(int)
        m = np.rint(rows[index, :count]).astype(int)
        size = int(sizes[index])
        members = order[ends[index] - size : ends[index]]
        parts.append(
            _Part(
                size,
                {name: (int(k[i]), int(m[i])) for i, name in enumerate(names)},
                mean[index, count:] * size,
                mean[index, count:],
                var[index, count:],
                bootstrap_sums(problem.terms[members], resamples, seed, label),
            )
        )
    return parts


def _evaluate(
    problem: Problem, grouping: Grouping, min_group: int, confidence: float, resamples: int, seed: int
) -> list[dict[str, Any]]:
    parts = _parts(problem, grouping, resamples, seed)
    level = len(grouping.columns)
    rows = []
    for index, part in enumerate(parts):
        rest = part.join([other for place, other in enumerate(parts) if place != index])
        drawn, drawn_rest = (problem.from_sums(each.boot, np.asarray(each.n, float)) for each in (part, rest))
        for measure in problem.measures:
            own = _estimate(problem, measure, part, drawn, confidence)
            other = _estimate(problem, measure, rest, drawn_rest, confidence)
            gap, quotient = _compare(measure, own, other, drawn, drawn_rest, confidence)
            rows.append(
                {
                    "grouping": grouping.name,
                    "level": level,
                    "group": grouping.labels[index] if level else ALL,
                    "rows": part.n,
                    "small": part.n < min_group,
                    "measure": measure.name,
                    "value": own[0],
                    "low": own[1],
                    "high": own[2],
                    "count": part.share[measure.name][1] if measure.kind == "share" else part.n,
                    "rest": other[0],
                    **dict(zip(("difference", "difference_low", "difference_high"), gap, strict=True)),
                    **dict(zip(("ratio", "ratio_low", "ratio_high"), quotient, strict=True)),
                    "best": None,
                    "difference_to_best": math.nan,
                    "ratio_to_best": math.nan,
                    "p": _test(problem, measure, part, rest, min_group) if level else math.nan,
                }
            )
    if level:
        for measure in problem.measures:
            _to_best([row for row in rows if row["measure"] == measure.name], measure)
    return rows


def _estimate(problem: Problem, measure: Measure, part: _Part, drawn: dict[str, Array], confidence: float) -> Estimate:
    if measure.kind == "share":
        k, n = part.share[measure.name]
        if not n:
            return (math.nan,) * 3
        low, high = wilson(k, n, confidence)
        return k / n, float(low), float(high)
    if measure.kind == "balanced":
        pairs = np.array([part.share[name] for name in problem.recalls], float)
        if (pairs[:, 1] == 0).any():
            return (math.nan,) * 3
        recall = pairs[:, 0] / pairs[:, 1]
        ends = combine(recall, *wilson(pairs[:, 0], pairs[:, 1], confidence), np.full(len(pairs), 1 / len(pairs)))
        return float(recall.mean()), float(ends[0]), float(ends[1])
    value = float(problem.from_sums(part.sums, np.asarray(part.n, float))[measure.name])
    if part.n < 2 or not np.isfinite(value):
        return value, math.nan, math.nan
    if measure.name == "ece":
        return value, *pivotal(value, drawn["ece"], confidence, 0.0)
    return value, *percentile(drawn[measure.name], confidence)


def _compare(
    measure: Measure,
    own: Estimate,
    rest: Estimate,
    drawn: dict[str, Array],
    drawn_rest: dict[str, Array],
    confidence: float,
) -> tuple[Estimate, Estimate]:
    nothing = (math.nan,) * 3
    if own[0] != own[0] or rest[0] != rest[0]:
        return nothing, nothing
    if measure.kind != "sums":
        return difference(own, rest), ratio(own, rest)
    with np.errstate(invalid="ignore", divide="ignore"):
        gap, quotient = np.float64(own[0]) - rest[0], np.float64(own[0]) / rest[0]
        gaps, quotients = (op(drawn[measure.name], drawn_rest[measure.name]) for op in (np.subtract, np.divide))
    if own[1] != own[1] or rest[1] != rest[1]:  # one row, or an infinite term
        gaps = quotients = np.array([])
    ends = pivotal(float(gap), gaps, confidence) if measure.name == "ece" else percentile(gaps, confidence)
    first: Estimate = (float(gap), *ends)
    if not measure.ratio or not rest[0] > 0:
        return first, nothing
    return first, (float(quotient), *percentile(quotients, confidence))


def _test(problem: Problem, measure: Measure, part: _Part, rest: _Part, min_group: int) -> float:
    if measure.test == "exact":
        return exact_test(*part.share[measure.name], *rest.share[measure.name])
    if measure.test == "welch" and min(part.n, rest.n) >= min_group:
        column = problem.tested[measure.name]
        return welch(part.mean[column], part.var[column], part.n, rest.mean[column], rest.var[column], rest.n)
    return math.nan


def _to_best(rows: list[dict[str, Any]], measure: Measure) -> None:
    # The best value among groups that are not small, or among all if all are; rows are of one measure.
    defined = [row for row in rows if row["value"] == row["value"]]
    candidates = [row for row in defined if not row["small"]] or defined
    if not candidates:
        return
    goodness = (lambda row: row["value"]) if measure.better == "none" else lambda row: -measure.badness(row["value"])
    best = max(candidates, key=goodness)
    for row in defined:
        row["best"] = best["group"]
        row["difference_to_best"] = row["value"] - best["value"]
        if measure.ratio and best["value"] > 0:
            row["ratio_to_best"] = row["value"] / best["value"]


# --------------------------------------------------------------------------------------------------- the result


def _worst_first(rows: list[dict[str, Any]], measure: Measure) -> list[dict[str, Any]]:
    place = {
        (row["grouping"], row["group"]): (
            row["level"] > 1,
            row["level"] > 0,
            row["small"],
            -measure.badness(row["value"]),
        )
        for row in rows
        if row["measure"] == measure.name
    }
    return sorted(rows, key=lambda row: place[row["grouping"], row["group"]])


def _wide(table: Any, measures: Mapping[str, Measure]) -> Any:
    import pandas as pd

    rows: dict[str, dict[str, Any]] = {}
    for row in table.to_dict("records"):
        entry = rows.setdefault(
            row["group"],
            {
                "group": row["group"],
                "grouping": row["grouping"],
                "rows": row["rows"],
                "small": row["small"],
                "differs": (),
            },
        )
        if row["differs"]:
            entry["differs"] = (*entry["differs"], row["measure"])
        for end in ("value", "low", "high"):
            entry[row["measure"] + ("" if end == "value" else f"_{end}")] = row[end]
    columns = ["group", "grouping", "rows", "small", "differs"]
    columns += [f"{name}{end}" for name in measures for end in ("", "_low", "_high")]
    return pd.DataFrame(list(rows.values()), columns=columns).set_index("group")


def _curves(problem: Problem, every: Sequence[Grouping], confidence: float) -> Any:
    import pandas as pd

    columns = ["grouping", "level", "group", "bin", "count", "predicted", "true", "low", "high"]
    if problem.curve is None:
        return pd.DataFrame(columns=columns)
    predicted, true = problem.curve
    bins, _ = calibration_bins(problem)
    frames = []
    for grouping in every:
        frame = pd.DataFrame({"code": grouping.codes, "bin": bins, "predicted": predicted, "true": true})
        by = frame.groupby(["code", "bin"], sort=True)
        found = by.mean().assign(count=by.size(), sum=by["true"].sum()).reset_index()
        found["group"] = [grouping.labels[code] if grouping.columns else ALL for code in found["code"]]
        found["grouping"], found["level"] = grouping.name, len(grouping.columns)
        if problem.task == "regression":
            found["low"] = found["high"] = np.nan
        else:
            found["low"], found["high"] = wilson(found["sum"].to_numpy(), found["count"].to_numpy(), confidence)
        frames.append(found[columns])
    return pd.concat(frames, ignore_index=True)


def _finding(table: Any, measure: Measure, measures: Mapping[str, Measure], settings: dict[str, Any]) -> str:
    groups = table[(table["level"] > 0) & (table["measure"] == measure.name)]
    large = groups[~groups["small"] & groups["value"].notna()]
    said = []
    percent = f"{100 * settings['confidence']:g} %"
    if not len(large):
        said.append(f"No group has {settings['min_group']} rows and a defined {measure.title.lower()}.")
    else:
        worst = large.loc[large["value"].map(measure.badness).idxmax()]
        unit = " %" if measure.percent else ""
        extreme = {"higher": "lowest", "none": "lowest", "lower": "highest", "zero": "farthest from 0"}[measure.better]
        text = f"{measure.title} is {extreme} for {worst['group']}: {measure.show(worst['value'])}{unit}"
        if worst["low"] == worst["low"]:
            text += f" ({percent} interval {measure.show(worst['low'])} to {measure.show(worst['high'])})"
        text += f" of {worst['rows']:,} rows" if measure.kind == "share" else f" over {worst['rows']:,} rows"
        if worst["rest"] == worst["rest"]:
            text += f", against {measure.show(worst['rest'])}{unit} for the rest"
        said.append(text + ".")
    rates = table[(table["level"] > 0) & (table["measure"] == "selection_rate") & ~table["small"]].dropna(
        subset="value"
    )
    if len(rates) > 1:
        low, high = rates.loc[rates["value"].idxmin()], rates.loc[rates["value"].idxmax()]
        show = measures["selection_rate"].show
        said.append(
            f"Selection rates go from {show(low['value'])} % ({low['group']}) to {show(high['value'])} % "
            f"({high['group']})."
        )
    differ = table[table["differs"]]["group"].nunique()
    level = f"{100 * (1 - settings['confidence']):g} %"
    single = table["level"].max() == 1
    small = int(groups["small"].sum())
    kinds = "groups" if single else "groups and intersections"
    said.append(
        f"Of {len(groups)} {kinds}, {differ} {'differs' if differ == 1 else 'differ'} from the rest in at least one "
        f"measure (Holm over {settings['tests']} tests, {level})"
        + (f"; {small} {'has' if small == 1 else 'have'} fewer than {settings['min_group']} rows." if small else ".")
    )
    return " ".join(said)


def _records(frame: Any) -> list[dict[str, Any]]:
    def plain(value: Any) -> Any:
        if isinstance(value, float | np.floating):
            return float(value) if np.isfinite(value) else None
        return value.item() if isinstance(value, np.generic) else value

    return [{name: plain(value) for name, value in row.items()} for row in frame.to_dict("records")]
