"""Post-processing for group fairness: accuracy and violation on real people, and time against the number of rows.

    python benchmarks/fair.py --data DIR           # DIR holds adult/ and compas/; default: EVENLY_DATA
    python benchmarks/fair.py --data DIR --json out.json
    python benchmarks/fair.py --quick              # times only, small sizes

On Adult (income, groups: sex) and COMPAS (two-year recidivism, groups: the two largest races), without the column of
the groups, a logistic regression is trained on a third of the rows, the rules are fitted on another, and the last is
the test; means over splits of accuracy and of the largest difference of rates. Bias scoring is blind (the group is
estimated) and aware (the group is given); fairlearn's ThresholdOptimizer is aware, and has no tolerance for equalized
odds: its row is at 0. Times are those of the fit on probabilities that are there already: both classes get a model that
only looks them up.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from fairlearn.postprocessing import ThresholdOptimizer
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from evenly.data import load_adult, load_compas
from evenly.fair import BiasScoreClassifier, group_rates, joint_codes

CRITERIA = {
    "demographic_parity": ("selection_rate",),
    "equal_opportunity": ("true_positive_rate",),
    "equalized_odds": ("true_positive_rate", "false_positive_rate"),
}
THEIRS = {"equal_opportunity": "true_positive_rate_parity"}
TOLERANCES = (0.01, 0.05, 0.1)
Table = tuple[pd.DataFrame, np.ndarray, np.ndarray]


def adult(folder: Path) -> Table:
    frame = load_adult(folder)
    return (
        frame.drop(columns=["target", "fnlwgt", "age_cat", "sex"]).fillna("?"),
        frame["target"].to_numpy(),
        frame["sex"].to_numpy(),
    )


def compas(folder: Path) -> Table:
    frame = load_compas(folder)
    frame = frame[frame["race"].isin(["African-American", "Caucasian"])].reset_index(drop=True)
    x = frame.drop(columns=["target", "race", "decile_score", "score_text", "age_cat"])
    return x, frame["target"].to_numpy(), frame["race"].to_numpy()


def model() -> Any:
    columns = make_column_transformer(
        (StandardScaler(), make_column_selector(dtype_include="number")),
        (OneHotEncoder(handle_unknown="ignore", min_frequency=20), make_column_selector(dtype_exclude="number")),
    )
    return make_pipeline(columns, LogisticRegression(max_iter=300))


def rows_of(name: str, table: Table, seed: int) -> list[dict[str, Any]]:
    """Accuracy and violation of every method on one split."""
    x, y, a = table
    order = np.random.default_rng(seed).permutation(len(y))
    train, valid, test = np.array_split(order, 3)
    labels = model().fit(x.iloc[train], y[train])
    models = {
        "demographic_parity": model().fit(x.iloc[train], a[train]),
        "joint": model().fit(x.iloc[train], joint_codes(y[train], a[train])),
    }
    found = []

    def note(criterion: str, method: str, tol: float, p: np.ndarray, seconds: float) -> None:
        rates = group_rates(y[test], p, sensitive_features=a[test])
        violation = max(rates.difference(rate) for rate in CRITERIA[criterion])
        accuracy = float(rates.accuracy @ rates.count / len(test))
        key = {"data": name, "criterion": criterion, "method": method, "tol": tol}
        found.append({**key, "accuracy": accuracy, "violation": violation, "seconds": seconds})

    for criterion in CRITERIA:
        note(criterion, "no rule", 1.0, labels.predict(x.iloc[test]).astype(float), 0.0)
        for tol in TOLERANCES:
            for method in ("blind", "aware"):
                known = method == "aware"
                rule = BiasScoreClassifier(
                    labels,
                    constraints=criterion,
                    tol=tol,
                    prefit=True,
                    attribute_aware=known,
                    attribute_estimator=None if known else models.get(criterion, models["joint"]),
                    random_state=0,
                )
                start = time.perf_counter()
                rule.fit(x.iloc[valid], y[valid], sensitive_features=a[valid])
                seconds = time.perf_counter() - start
                groups = {"sensitive_features": a[test]} if known else {}
                note(
                    criterion,
                    f"BiasScoreClassifier, {method}",
                    tol,
                    rule.predict_proba(x.iloc[test], **groups)[:, 1],
                    seconds,
                )
            if criterion == "equalized_odds" and tol > TOLERANCES[0]:
                continue
            start = time.perf_counter()
            theirs = ThresholdOptimizer(
                estimator=labels,
                constraints=THEIRS.get(criterion, criterion),
                prefit=True,
                predict_method="predict_proba",
                tol=None if criterion == "equalized_odds" else tol,
            ).fit(x.iloc[valid], y[valid], sensitive_features=a[valid])
            seconds = time.perf_counter() - start
            p = theirs._pmf_predict(x.iloc[test], sensitive_features=a[test])[:, 1]
            note(criterion, "ThresholdOptimizer", 0.0 if criterion == "equalized_odds" else tol, p, seconds)
    return found


class LookUp(ClassifierMixin, BaseEstimator):
    """A fitted model whose probabilities are columns of X."""

    def __init__(self, columns: slice = slice(0, 2), classes: int = 2) -> None:
        self.columns, self.classes = columns, classes
        self.classes_ = np.arange(classes)

    def fit(self, X: np.ndarray, y: np.ndarray) -> LookUp:
        return self

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        return X[:, self.columns]

    def __sklearn_is_fitted__(self) -> bool:
        return True


def times(rows: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of a fit on given probabilities, the methods in turn."""
    state = np.random.default_rng(0)
    z = state.normal(size=rows)
    logits = np.stack([0.8 * z - 0.3, z, -0.9 * z, 1.4 * z - 0.5], 1) + state.gumbel(size=(rows, 4))
    joint = np.exp(logits - logits.max(1, keepdims=True))
    joint /= joint.sum(1, keepdims=True)  # class label * 2 + group
    cells = (joint.cumsum(1) > state.uniform(size=(rows, 1))).argmax(1)
    y, a = cells // 2, cells % 2
    eta = joint[:, 2:].sum(1)
    x = np.c_[1 - eta, eta, joint, joint[:, ::2].sum(1), joint[:, 1::2].sum(1)]
    contests: dict[str, dict[str, Callable[[], Any]]] = {}
    for criterion in CRITERIA:
        groups = LookUp(slice(6, 8)) if criterion == "demographic_parity" else LookUp(slice(2, 6), 4)
        settings = {"constraints": criterion, "tol": 0.02, "prefit": True, "random_state": 0}
        blind = BiasScoreClassifier(LookUp(), attribute_estimator=groups, **settings)
        aware = BiasScoreClassifier(LookUp(), attribute_aware=True, **settings)
        theirs = ThresholdOptimizer(
            estimator=LookUp(),
            constraints=THEIRS.get(criterion, criterion),
            prefit=True,
            predict_method="predict_proba",
            tol=None if criterion == "equalized_odds" else 0.02,
        )
        contests[criterion] = {
            name: lambda rule=rule: rule.fit(x, y, sensitive_features=a)
            for name, rule in (("blind", blind), ("aware", aware), ("ThresholdOptimizer", theirs))
        }
    measured: dict[str, dict[str, list[float]]] = {c: {m: [] for m in runs} for c, runs in contests.items()}
    for _ in range(rounds):
        for criterion, runs in contests.items():
            for method, run in runs.items():
                start = time.perf_counter()
                run()
                measured[criterion][method].append(time.perf_counter() - start)
    return {c: {m: statistics.median(v) for m, v in runs.items()} for c, runs in measured.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("EVENLY_DATA"))
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="times only, up to 10,000 rows")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
    timed = {}
    print("seconds of a fit; ratio to ThresholdOptimizer")
    for rows in (1000, 10_000) if options.quick else (1000, 10_000, 100_000):
        timed[rows] = times(rows, 3)
        for criterion, runs in timed[rows].items():
            peer = runs["ThresholdOptimizer"]
            cells = "  ".join(f"{name} {seconds:.4f} ({seconds / peer:.2f}x)" for name, seconds in runs.items())
            print(f"{rows:7d}  {criterion:20s}  {cells}")
    judged: list[dict[str, Any]] = []
    if not options.quick:
        if options.data is None:
            parser.error("give --data DIR, or set EVENLY_DATA, or take --quick")
        for name, load in (("adult", adult), ("compas", compas)):
            table = load(options.data)
            frame = pd.DataFrame([row for seed in range(options.splits) for row in rows_of(name, table, seed)])
            means = frame.groupby(["data", "criterion", "method", "tol"], sort=False).mean().reset_index()
            print(f"\n{name}: means over {options.splits} splits, {len(table[1])} rows")
            print(means.drop(columns="data").to_string(index=False, float_format="%.4f"))
            judged += means.to_dict("records")
    if options.json:
        options.json.write_text(
            json.dumps({**facts, "times": timed, "quality": judged}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
