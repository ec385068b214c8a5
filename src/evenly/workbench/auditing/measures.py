"""What an audit measures, and how it follows from means over the rows of a group.

A **share** (accuracy, selection rate, true and false positive rate, precision, recall, prevalence) is the mean of
zeros and ones over the rows that it is of: all, or those with a target or a prediction of one class. **Balanced
accuracy** is the mean of the classes' recalls, undefined where a class has no rows. The others are functions of sums
over rows, and of the probability s that the model gives:

- log loss: mean of -log(probability of the target); Brier score: mean of (s - y)², summed over the classes if there
  are more than two;
- calibration-in-the-large: mean of s - y, the predicted minus the true rate;
- expected calibration error: rows are put into 10 bins of equal width by s, and it is the mean over rows of
  |mean s - mean y| of their bin (Guo et al. 2017, arXiv:1706.04599). It is never negative and grows as groups get
  smaller, even for a perfect model, so that groups of different size do not compare;
- with more than two classes, s is the probability of the predicted class and y says whether it was right;
- regression, with e = prediction - target: mean of e, of |e| (MAE), sqrt of the mean of e² (RMSE), and
  R² = 1 - Σ e² / Σ (y - mean y)² with the group's own mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["BINS", "MEASURES", "Measure", "Problem", "calibration_bins", "classification", "regression"]

Array = np.ndarray[Any, Any]

BINS = 10
MAX_CLASSES = 20


@dataclass(frozen=True)
class Measure:
    """One measure.

    Attributes:
        name: of its column.
        title: for people.
        short: for narrow columns.
        better: ``"higher"``, ``"lower"``, ``"zero"`` (near 0), or ``"none"`` (says nothing about quality).
        kind: ``"share"``: a share of rows, with Wilson's interval; ``"balanced"``: a mean of such;
            ``"sums"``: a function of sums, bootstrapped.
        percent: shown in percent.
        ratio: whether a ratio of two values makes sense.
        test: ``"exact"`` (Fisher), ``"welch"``, or None: not tested.
        about: what it is, in one sentence.
    """

    name: str
    title: str
    short: str
    better: str
    kind: str
    percent: bool
    ratio: bool
    test: str | None
    about: str

    def badness(self, value: float) -> float:
        """Larger is worse: the worst group comes first. NaN is the least bad."""
        if value != value:
            return -np.inf
        return {"higher": -value, "none": -value, "lower": value, "zero": abs(value)}[self.better]

    def show(self, value: float, signed: bool = False) -> str:
        """A value as text; differences are signed.

        >>> MEASURES["accuracy"].show(0.8512), MEASURES["log_loss"].show(0.30512), MEASURES["mae"].show(1234.56)
        ('85.1', '0.305', '1235')
        """
        if value != value:
            return "–"
        if np.isinf(value):
            return "∞" if value > 0 else "-∞"
        sign = "+" if signed or self.better == "zero" else ""
        if self.percent:
            value, digits = 100 * value, 1
        else:
            digits = 3 if abs(value) < 10 else 1 if abs(value) < 100 else 0
        return f"{value:{sign}.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"


def _measure(name: str, *args: Any) -> tuple[str, Measure]:
    return name, Measure(name, *args)


MEASURES: dict[str, Measure] = dict(
    [
        _measure(
            "prevalence", "Prevalence", "preval.", "none", "share", True, True, None, "Share of rows that are positive."
        ),
        _measure(
            "accuracy", "Accuracy", "accuracy", "higher", "share", True, True, "exact",
            "Share of rows that are predicted right.",
        ),
        _measure(
            "balanced_accuracy", "Balanced accuracy", "balanced", "higher", "balanced", True, True, None,
            "Mean over the classes of the share of their rows that are predicted right.",
        ),
        _measure(
            "selection_rate", "Selection rate", "selected", "none", "share", True, True, "exact",
            "Share of rows that are predicted positive.",
        ),
        _measure(
            "tpr", "True positive rate", "TPR", "higher", "share", True, True, "exact",
            "Share of the positive rows that are predicted positive (recall).",
        ),
        _measure(
            "fpr", "False positive rate", "FPR", "lower", "share", True, True, "exact",
            "Share of the negative rows that are predicted positive.",
        ),
        _measure(
            "precision", "Precision", "precision", "higher", "share", True, True, "exact",
            "Share of the rows predicted positive that are positive.",
        ),
        _measure(
            "log_loss", "Log loss", "log loss", "lower", "sums", False, True, "welch",
            "Mean of minus the logarithm of the probability given to the target.",
        ),
        _measure(
            "brier", "Brier score", "Brier", "lower", "sums", False, True, "welch",
            "Mean squared difference of probability and outcome.",
        ),
        _measure(
            "calibration", "Calibration-in-the-large", "calib.", "zero", "sums", True, False, "welch",
            "Mean predicted probability minus the true rate: above 0 the model promises too much.",
        ),
        _measure(
            "ece", "Expected calibration error", "ECE", "lower", "sums", True, False, None,
            "Mean over 10 bins of probability of the distance to the true rate; larger in small groups by nature.",
        ),
        _measure(
            "mean_target", "Mean target", "mean y", "none", "sums", False, False, None, "Mean of the targets."
        ),
        _measure(
            "mean_error", "Mean error", "mean err.", "zero", "sums", False, False, "welch",
            "Mean of prediction minus target: above 0 the model predicts too much.",
        ),
        _measure(
            "mae", "Mean absolute error", "MAE", "lower", "sums", False, True, "welch",
            "Mean of the absolute error.",
        ),
        _measure(
            "rmse", "Root mean squared error", "RMSE", "lower", "sums", False, True, "welch",
            "Square root of the mean squared error (tested by the squared errors).",
        ),
        _measure(
            "r2", "R²", "R²", "higher", "sums", False, False, None,
            "Share of the variance of the group's targets that is explained.",
        ),
    ]
)  # fmt: skip
"""Every measure by name. With more than two classes there are also ``selection_rate:CLASS`` and ``recall:CLASS``."""


@dataclass(frozen=True)
class Problem:
    """The rows of an audit, turned into terms of which groups take the means.

    Attributes:
        task: ``"binary"``, ``"multiclass"`` or ``"regression"``.
        measures: what is measured.
        shares: name to ((N,) zeros and ones, (N,) which rows count or None).
        recalls: names among ``shares`` whose mean is the balanced accuracy.
        terms: (N, r) terms that are summed.
        from_sums: sums (..., r) and the number of rows to measures, each (...).
        tested: name of a measure to the column of ``terms`` that its test compares.
        curve: ((N,) predicted, (N,) true) of the calibration curve, or None.
        notes: what was left out, and why.
    """

    task: str
    measures: tuple[Measure, ...]
    shares: dict[str, tuple[Array, Array | None]]
    recalls: tuple[str, ...]
    terms: Array
    from_sums: Callable[[Array, Array], dict[str, Array]]
    tested: dict[str, int]
    curve: tuple[Array, Array] | None
    notes: tuple[str, ...] = field(default=())


def classification(
    y: Array, predicted: Array, scores: Array | None, names: Sequence[str], positive: int | None
) -> Problem:
    """The terms of a classification.

    Args:
        y, predicted: (N,) indices of classes.
        scores: (N, K) probabilities, or None.
        names: of the K classes.
        positive: index of the positive class; with two classes it must be given.
    """
    k, notes = len(names), []
    binary = k == 2
    right = y == predicted
    shares: dict[str, tuple[Array, Array | None]] = {"accuracy": (right, None)}
    chosen = ["accuracy", "balanced_accuracy"]
    extra: list[Measure] = []
    for index, name in enumerate(names):
        shares[f"recall:{name}"] = (right, y == index)
    recalls = tuple(shares)[1:]
    if positive is not None:
        is_positive, selected = y == positive, predicted == positive
        shares |= {
            "prevalence": (is_positive, None),
            "selection_rate": (selected, None),
            "tpr": (selected, is_positive),
            "fpr": (selected, ~is_positive),
            "precision": (is_positive, selected),
        }
        chosen = ["prevalence", *chosen, "selection_rate", "tpr", "fpr", "precision"]
    if not binary and k <= MAX_CLASSES:
        for index, name in enumerate(names):
            shares[f"selection_rate:{name}"] = (predicted == index, None)
        extra += [
            Measure(
                f"selection_rate:{name}", f"Selection rate of {name}", f"sel. {name}", "none", "share", True, True,
                "exact", f"Share of rows that are predicted {name}.",
            )
            for name in names
        ]  # fmt: skip
        extra += [
            Measure(
                f"recall:{name}", f"Recall of {name}", f"rec. {name}", "higher", "share", True, True, "exact",
                f"Share of the rows of {name} that are predicted {name}.",
            )
            for name in names
        ]  # fmt: skip
    elif not binary:
        notes.append(f"{k} classes are more than {MAX_CLASSES}: selection rate and recall of each class are left out")
    terms: Array = np.zeros((len(y), 0))
    tested: dict[str, int] = {}
    curve = None
    if scores is not None:
        of_target = scores[np.arange(len(y)), y]
        with np.errstate(divide="ignore"):
            log_loss = -np.log(of_target)
        if binary:
            assert positive is not None
            s, outcome = scores[:, positive], (y == positive).astype(float)
            brier = (s - outcome) ** 2
        else:
            s, outcome = scores[np.arange(len(y)), predicted], right.astype(float)
            brier = ((scores - np.eye(k)[y]) ** 2).sum(1)
        gap = s - outcome
        terms = np.column_stack(
            [log_loss, brier, gap, np.where(_bin(s)[:, None] == np.arange(BINS), gap[:, None], 0.0)]
        )
        chosen += ["log_loss", "brier", "calibration", "ece"]
        tested = {"log_loss": 0, "brier": 1, "calibration": 2}
        curve = (s, outcome)
        if np.isinf(log_loss).any():
            notes.append(
                f"{int(np.isinf(log_loss).sum())} rows have a target to which the model gave probability 0: "
                "the log loss of their groups is infinite"
            )
    measures = (*(MEASURES[name] for name in chosen), *extra)
    return Problem(
        "binary" if binary else "multiclass", measures, shares, recalls, terms, _probability_sums, tested, curve,
        tuple(notes),
    )  # fmt: skip


def regression(y: Array, predicted: Array) -> Problem:
    """The terms of a regression, from (N,) targets and predictions."""
    e = predicted - y
    centre = float(y.mean())  # sums of squares about it keep their digits
    centred = y - centre
    terms = np.column_stack([e, np.abs(e), e * e, centred, centred * centred])

    def from_sums(sums: Array, n: Array) -> dict[str, Array]:
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = sums[..., 4] - sums[..., 3] ** 2 / n
            spread = np.where(spread > 1e-12 * sums[..., 4], spread, np.nan)  # targets that are all the same
            return {
                "mean_target": sums[..., 3] / n + centre,
                "mean_error": sums[..., 0] / n,
                "mae": sums[..., 1] / n,
                "rmse": np.sqrt(sums[..., 2] / n),
                "r2": 1 - sums[..., 2] / spread,
            }

    chosen = ("mean_target", "mean_error", "mae", "rmse", "r2")
    measures = tuple(MEASURES[name] for name in chosen)
    tested = {"mean_error": 0, "mae": 1, "rmse": 2}
    return Problem("regression", measures, {}, (), terms, from_sums, tested, (predicted, y))


def calibration_bins(problem: Problem) -> tuple[Array, Array]:
    """The bin of each row of the calibration curve, and the edges: equal widths of [0, 1], or tenths of predictions."""
    assert problem.curve is not None
    predicted = problem.curve[0]
    if problem.task != "regression":
        return _bin(predicted), np.linspace(0, 1, BINS + 1)
    edges = np.unique(np.quantile(predicted, np.linspace(0, 1, BINS + 1)))
    return np.clip(np.searchsorted(edges, predicted, side="right") - 1, 0, max(0, len(edges) - 2)), edges


def _bin(s: Array) -> Array:
    return np.minimum((s * BINS).astype(np.int64), BINS - 1)


def _probability_sums(sums: Array, n: Array) -> dict[str, Array]:
    if not sums.shape[-1]:
        return {}
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "log_loss": sums[..., 0] / n,
            "brier": sums[..., 1] / n,
            "calibration": sums[..., 2] / n,
            "ece": np.abs(sums[..., 3:]).sum(-1) / n,
        }
