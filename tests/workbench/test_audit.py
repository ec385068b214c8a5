"""The numbers of an audit, against fairlearn, scikit-learn, scipy and plain loops."""

from __future__ import annotations

import itertools
import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn import metrics

from evenly.workbench import Audit, audit
from evenly.workbench.auditing.intervals import bootstrap_sums, combine, difference, holm, ratio, wilson

N = 900


def people(seed: int = 0, n: int = N) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sex = rng.choice(["f", "m"], n, p=[0.35, 0.65])
    race = rng.choice(["a", "b", "c"], n, p=[0.6, 0.3, 0.1])
    logit = rng.normal(0, 1.5, n) + 0.7 * (sex == "m")
    y = (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(int)
    score = 1 / (1 + np.exp(-(0.8 * logit + rng.normal(0, 0.6, n) + 0.4 * (race == "b"))))
    return {"sex": sex, "race": race, "y": y, "score": score, "pred": (score >= 0.5).astype(int)}


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    return people()


@pytest.fixture(scope="module")
def result(data: dict[str, np.ndarray]) -> Audit:
    return audit(data["y"], y_score=data["score"], groups={"sex": data["sex"], "race": data["race"]}, resamples=300)


def cell(result: Audit, group: str, measure: str) -> pd.Series:
    table = result.table
    rows = table[(table["group"] == group) & (table["measure"] == measure)]
    assert len(rows) == 1
    return rows.iloc[0]


def ece(y: np.ndarray, s: np.ndarray) -> float:
    total = 0.0
    for b in range(10):
        inside = [i for i in range(len(y)) if min(int(s[i] * 10), 9) == b]
        if inside:
            total += len(inside) / len(y) * abs(np.mean(s[inside]) - np.mean(y[inside]))
    return total


# --------------------------------------------------------------------------------------------- values of measures


def test_binary_values_are_those_of_fairlearn(result: Audit, data: dict[str, np.ndarray]) -> None:
    fairlearn = pytest.importorskip("fairlearn.metrics")
    functions = {
        "accuracy": metrics.accuracy_score,
        "balanced_accuracy": metrics.balanced_accuracy_score,
        "selection_rate": fairlearn.selection_rate,
        "tpr": fairlearn.true_positive_rate,
        "fpr": fairlearn.false_positive_rate,
        "precision": metrics.precision_score,
    }
    y, pred, score = data["y"], data["pred"], data["score"]
    soft = {"log_loss": metrics.log_loss, "brier": metrics.brier_score_loss, "ece": ece}
    seen = 0
    for columns in (["sex"], ["race"], ["sex", "race"]):
        groups = pd.DataFrame({name: data[name] for name in columns})
        hard_frame = fairlearn.MetricFrame(metrics=functions, y_true=y, y_pred=pred, sensitive_features=groups)
        soft_frame = fairlearn.MetricFrame(metrics=soft, y_true=y, y_pred=score, sensitive_features=groups)
        for values, row in pd.concat([hard_frame.by_group, soft_frame.by_group], axis=1).iterrows():
            values = values if isinstance(values, tuple) else (values,)
            label = ", ".join(f"{name}={value}" for name, value in zip(columns, values, strict=True))
            for measure, expected in row.items():
                assert cell(result, label, measure)["value"] == pytest.approx(expected, rel=1e-12), (label, measure)
                seen += 1
        best = hard_frame.by_group["selection_rate"].max()
        worst = hard_frame.by_group["selection_rate"].min()
        found = result.table[(result.table["grouping"] == " × ".join(columns))]
        found = found[found["measure"] == "selection_rate"]
        if not found["small"].any():  # fairlearn's demographic parity ratio
            assert found["ratio_to_best"].min() == pytest.approx(worst / best)
            assert found["ratio_to_best"].min() == pytest.approx(
                fairlearn.demographic_parity_ratio(y, pred, sensitive_features=groups)
            )
    assert seen == 9 * (2 + 3 + 6)


def test_all_rows_and_prevalence(result: Audit, data: dict[str, np.ndarray]) -> None:
    y, score = data["y"], data["score"]
    assert cell(result, "all rows", "prevalence")["value"] == y.mean()
    assert cell(result, "all rows", "calibration")["value"] == pytest.approx(score.mean() - y.mean(), abs=1e-14)
    assert cell(result, "all rows", "ece")["value"] == pytest.approx(ece(y, score), rel=1e-12)
    f = data["sex"] == "f"
    assert cell(result, "sex=f", "calibration")["value"] == pytest.approx(score[f].mean() - y[f].mean(), abs=1e-14)
    assert result.overall["accuracy"] == np.mean(y == data["pred"])
    assert cell(result, "all rows", "accuracy")[["rest", "difference", "p"]].isna().all()


def test_multiclass_values_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    names = np.array(["cat", "dog", "eel"])
    y = rng.integers(0, 3, 400)
    logits = rng.normal(size=(400, 3)) + 1.5 * np.eye(3)[y]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    group = rng.choice(["u", "v"], 400)
    found = audit(names[y], y_score=p, groups={"g": group}, resamples=100, positive="dog")
    assert found.task == "multiclass"
    for value in "uv":
        at = group == value
        pred = p[at].argmax(1)
        label = f"g={value}"
        expected = {
            "accuracy": metrics.accuracy_score(y[at], pred),
            "balanced_accuracy": metrics.balanced_accuracy_score(y[at], pred),
            "log_loss": metrics.log_loss(y[at], p[at]),
            "brier": np.mean(((p[at] - np.eye(3)[y[at]]) ** 2).sum(1)),
            "ece": ece((y[at] == pred).astype(float), p[at].max(1)),
            "calibration": p[at].max(1).mean() - np.mean(y[at] == pred),
            "selection_rate:eel": np.mean(pred == 2),
            "recall:cat": metrics.recall_score(y[at], pred, labels=[0], average=None)[0],
            "tpr": metrics.recall_score(y[at], pred, labels=[1], average=None)[0],
            "precision": metrics.precision_score(y[at], pred, labels=[1], average=None)[0],
            "selection_rate": np.mean(pred == 1),
        }
        for measure, wanted in expected.items():
            assert cell(found, label, measure)["value"] == pytest.approx(wanted, rel=1e-12), measure


def test_regression_values_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(2)
    y = rng.normal(1e6, 3.0, 300)  # a large mean, so that a naive sum of squares would lose its digits
    pred = y + rng.normal(0.3, 1.0, 300)
    group = rng.choice(["u", "v"], 300)
    found = audit(y, pred, groups=pd.Series(group, name="g"), resamples=200)
    assert found.task == "regression"
    for value in "uv":
        a, b = y[group == value], pred[group == value]
        expected = {
            "mean_target": a.mean(),
            "mean_error": (b - a).mean(),
            "mae": metrics.mean_absolute_error(a, b),
            "rmse": metrics.root_mean_squared_error(a, b),
            "r2": metrics.r2_score(a, b),
        }
        for measure, wanted in expected.items():
            row = cell(found, f"g={value}", measure)
            assert row["value"] == pytest.approx(wanted, rel=1e-9), measure
            assert row["low"] < row["value"] < row["high"]
    row = cell(found, "g=u", "mae")
    errors = np.abs(pred - y)
    p = stats.ttest_ind(errors[group == "u"], errors[group == "v"], equal_var=False).pvalue
    assert row["p"] == pytest.approx(p, rel=1e-8)
    assert row["rest"] == pytest.approx(errors[group == "v"].mean(), rel=1e-12)


# --------------------------------------------------------------------------------------------- intervals and tests


def test_wilson_is_scipys() -> None:
    for n in (1, 2, 7, 100):
        for k in range(0, n + 1, max(1, n // 7)):
            for confidence in (0.8, 0.95):
                expected = stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
                assert wilson(k, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-14)
    assert np.isnan(wilson(0, 0)).all()
    assert wilson(0, 9)[0] == 0.0
    assert wilson(9, 9)[1] == 1.0


def estimate(k: int, n: int) -> tuple[float, float, float]:
    return (k / n, *map(float, wilson(k, n)))


def test_difference_is_newcombes() -> None:
    # Newcombe 1998, table II, method 10: 56/70 - 48/80, and 9/10 - 3/10.
    assert difference(estimate(56, 70), estimate(48, 80)) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert difference(estimate(9, 10), estimate(3, 10)) == pytest.approx((0.6, 0.1705, 0.8090), abs=5e-5)


def test_ratio_is_turned_over_when_its_sides_are() -> None:
    for a, b in itertools.product([(3, 10), (9, 10), (50, 120)], repeat=2):
        forth, back = ratio(estimate(*a), estimate(*b)), ratio(estimate(*b), estimate(*a))
        assert forth == pytest.approx((1 / back[0], 1 / back[2], 1 / back[1]), rel=1e-9)
        assert forth[1] <= forth[0] <= forth[2]
    assert ratio(estimate(0, 10), estimate(5, 10))[:2] == (0.0, 0.0)
    assert math.isinf(ratio(estimate(5, 10), (0.1, 0.0, 0.4))[2])
    assert np.isnan(ratio(estimate(5, 10), estimate(0, 10))).all()


def test_intervals_of_differences_and_ratios_cover() -> None:
    rng = np.random.default_rng(3)
    p, q, n, m = 0.3, 0.5, 40, 90
    inside = np.zeros(3)
    tries = 1500
    for k, j in zip(rng.binomial(n, p, tries), rng.binomial(m, q, tries), strict=True):
        _, low, high = difference(estimate(k, n), estimate(j, m))
        inside[0] += low <= p - q <= high
        _, low, high = ratio(estimate(k, n), estimate(j, m))
        inside[1] += low <= p / q <= high
        ends = combine(
            np.array([k / n, j / m]), *np.array([wilson(k, n), wilson(j, m)]).T.swapaxes(0, 1), np.array([0.5, 0.5])
        )
        inside[2] += ends[0] <= (p + q) / 2 <= ends[1]
    assert (np.abs(inside / tries - 0.95) < 0.025).all(), inside / tries


def test_holm_is_the_step_down_rule() -> None:
    rng = np.random.default_rng(4)
    for size in (1, 2, 9):
        p = np.round(rng.random(size) ** 3, 2)
        adjusted = holm(p)
        for level in (0.01, 0.05, 0.2, 0.6):
            rejected = np.zeros(size, bool)
            for step, index in enumerate(np.argsort(p, kind="stable")):  # stop at the first that is not rejected
                if p[index] > level / (size - step):
                    break
                rejected[index] = True
            assert ((adjusted <= level) == rejected).all()
    assert holm([]).shape == (0,)


def test_bootstrap_draws_rows_with_replacement() -> None:
    rng = np.random.default_rng(5)
    terms = rng.normal(size=(50, 2))
    sums = bootstrap_sums(terms, 4000, 0, "g")
    # Mean and covariance of a sum over 50 rows drawn with replacement.
    assert sums.mean(0) == pytest.approx(terms.sum(0), abs=0.4)
    assert np.cov(sums.T) == pytest.approx(50 * np.cov(terms.T, bias=True), rel=0.12, abs=2.0)
    # the same draws; a product of matrices of another size may round otherwise
    assert bootstrap_sums(terms, 5, 0, "g") == pytest.approx(sums[:5], rel=1e-10, abs=1e-10)
    assert (bootstrap_sums(terms, 5, 0, "h") != sums[:5]).any()
    counts = bootstrap_sums(np.eye(7), 20, 1, "g")
    assert (counts.sum(1) == 7).all()
    assert (counts == counts.round()).all()


def test_bootstrap_intervals_are_those_of_a_plain_loop(result: Audit, data: dict[str, np.ndarray]) -> None:
    rng = np.random.default_rng(6)
    at = data["sex"] == "f"
    y, s, y_rest, s_rest = data["y"][at], data["score"][at], data["y"][~at], data["score"][~at]
    brier, gap = [], []
    for _ in range(1500):
        i, j = rng.integers(0, len(y), len(y)), rng.integers(0, len(y_rest), len(y_rest))
        brier.append(np.mean((s[i] - y[i]) ** 2))
        gap.append(brier[-1] - np.mean((s_rest[j] - y_rest[j]) ** 2))
    row = cell(result, "sex=f", "brier")
    width = row["high"] - row["low"]
    assert (row["low"], row["high"]) == pytest.approx(tuple(np.quantile(brier, [0.025, 0.975])), abs=0.12 * width)
    width = row["difference_high"] - row["difference_low"]
    assert (row["difference_low"], row["difference_high"]) == pytest.approx(
        tuple(np.quantile(gap, [0.025, 0.975])), abs=0.12 * width
    )


def test_the_rest_is_every_other_row(result: Audit, data: dict[str, np.ndarray]) -> None:
    at = (data["sex"] == "m") & (data["race"] == "b")
    y, pred, score = data["y"], data["pred"], data["score"]
    row = cell(result, "sex=m, race=b", "tpr")
    k, n = int((pred[at] * y[at]).sum()), int(y[at].sum())
    k_rest, n_rest = int((pred[~at] * y[~at]).sum()), int(y[~at].sum())
    assert (row["count"], row["rest"]) == (n, k_rest / n_rest)
    assert row["p"] == pytest.approx(stats.fisher_exact([[k, n - k], [k_rest, n_rest - k_rest]]).pvalue)
    assert tuple(row[["difference", "difference_low", "difference_high"]]) == pytest.approx(
        difference(estimate(k, n), estimate(k_rest, n_rest))
    )
    row = cell(result, "sex=m, race=b", "log_loss")
    assert row["rest"] == pytest.approx(metrics.log_loss(y[~at], score[~at]), rel=1e-12)
    losses = -np.log(np.where(y == 1, score, 1 - score))
    expected = stats.ttest_ind(losses[at], losses[~at], equal_var=False).pvalue
    assert row["p"] == pytest.approx(expected, rel=1e-8)
    row = cell(result, "sex=m, race=b", "balanced_accuracy")
    assert row["rest"] == pytest.approx(metrics.balanced_accuracy_score(y[~at], pred[~at]))
    assert row["difference_low"] < row["value"] - row["rest"] < row["difference_high"]


def test_flags_are_holm_over_the_whole_audit(result: Audit) -> None:
    table = result.table
    assert result.settings["tests"] == table["p"].notna().sum()
    np.testing.assert_allclose(table["p_holm"], holm(table["p"]), rtol=1e-12)
    assert (table["differs"] == (table["p_holm"] <= 0.05)).all()
    untested = table["measure"].isin(["prevalence", "balanced_accuracy", "ece"])
    assert table["p"][untested].isna().all()
    assert table["p"][~untested & (table["level"] > 0) & ~table["small"]].notna().all()


def test_false_flags_are_rare_and_true_ones_are_found() -> None:
    rng = np.random.default_rng(7)
    flagged = 0
    for trial in range(40):
        y, pred = rng.integers(0, 2, (2, 200))
        groups = {"a": rng.integers(0, 3, 200), "b": rng.integers(0, 2, 200)}
        flagged += bool(audit(y, pred, groups=groups, resamples=100, seed=trial).table["differs"].any())
    assert flagged <= 6  # 2 are expected at most; more than 6 of 40 at 5 % has probability 0.004
    y = rng.integers(0, 2, 600)
    group = rng.integers(0, 4, 600)
    pred = np.where((group == 2) & (rng.random(600) < 0.4), 1 - y, y)
    found = audit(y, pred, groups={"g": group}, resamples=100)
    assert cell(found, "g=2", "accuracy")["differs"]
    assert found.by_group.index[0] == "g=2"
    assert "g=2" in found.finding


# --------------------------------------------------------------------------------------------- order and shape


def test_worst_first_and_small_groups_last() -> None:
    group = ["big"] * 60 + ["mid"] * 40 + ["tiny"] * 3 + ["one"]
    y = np.ones(104, int)
    y[::3] = 0
    pred = y.copy()
    pred[:20] = 1 - pred[:20]  # big: two thirds right
    pred[100:] = 1 - pred[100:]  # tiny and one: all wrong
    found = audit(y, pred, groups={"g": group}, min_group=10, resamples=100)
    assert list(found.by_group.index) == ["g=big", "g=mid", "g=tiny", "g=one"] or list(found.by_group.index) == [
        "g=big", "g=mid", "g=one", "g=tiny",
    ]  # fmt: skip
    assert list(found.by_group["small"]) == [False, False, True, True]
    assert found.by_group["rows"].sum() == 104
    assert cell(found, "g=tiny", "accuracy")["best"] == "g=mid"
    assert cell(found, "g=tiny", "accuracy")["difference_to_best"] == -1.0
    ranked = audit(y, pred, groups={"g": group}, min_group=10, resamples=100, rank_by="fpr")
    assert ranked.by_group["fpr"].iloc[0] == ranked.by_group[~ranked.by_group["small"]]["fpr"].max()


def test_a_seed_gives_the_same_numbers_and_groups_do_not_move_each_other(data: dict[str, np.ndarray]) -> None:
    given = {"y_true": data["y"], "y_score": data["score"], "resamples": 150}
    one = audit(**given, groups={"sex": data["sex"]})
    two = audit(**given, groups={"race": data["race"], "sex": data["sex"]})
    assert cell(one, "sex=f", "brier")["low"] == cell(two, "sex=f", "brier")["low"]
    other = audit(**given, groups={"sex": data["sex"]}, seed=1)
    assert cell(one, "sex=f", "brier")["low"] != cell(other, "sex=f", "brier")["low"]


def test_deeper_intersections(data: dict[str, np.ndarray]) -> None:
    third = np.arange(N) % 2
    groups = {"sex": data["sex"], "race": data["race"], "odd": third}
    shallow = audit(data["y"], data["pred"], groups=groups, intersections=1, resamples=100)
    assert len(shallow.by_intersection) == 0
    deep = audit(data["y"], data["pred"], groups=groups, intersections=3, resamples=100)
    assert set(deep.table["level"]) == {0, 1, 2, 3}
    triple = deep.table[(deep.table["level"] == 3) & (deep.table["measure"] == "accuracy")]
    assert len(triple) == 12
    at = (data["sex"] == "f") & (data["race"] == "a") & (third == 1)
    assert cell(deep, "sex=f, race=a, odd=1", "accuracy")["value"] == np.mean((data["y"] == data["pred"])[at])


def test_the_curve_holds_every_row(result: Audit, data: dict[str, np.ndarray]) -> None:
    frame = result.calibration
    assert (frame.groupby("grouping")["count"].sum() == N).all()
    one = frame[(frame["group"] == "sex=f") & (frame["bin"] == 3)].iloc[0]
    at = (data["sex"] == "f") & (data["score"] >= 0.3) & (data["score"] < 0.4)
    assert one["count"] == at.sum()
    assert one["predicted"] == pytest.approx(data["score"][at].mean())
    assert one["true"] == pytest.approx(data["y"][at].mean())
    assert one["low"] <= one["true"] <= one["high"]


def test_scores_that_are_no_probabilities_serve_for_a_threshold() -> None:
    y = np.array([0, 1] * 40)
    score = np.tile(np.arange(1, 11), 8)
    with pytest.raises(ValueError, match="which are no probabilities: say from which threshold"):
        audit(y, y_score=score, groups={"g": ["a"] * 80})
    found = audit(y, y_score=score, threshold=5, groups={"g": ["a"] * 80}, resamples=100)
    assert found.overall["selection_rate"] == np.mean(score >= 5)
    assert "brier" not in found.by_group
    assert "calibration are left out" in found.notes[0]


def test_a_sure_error_has_infinite_log_loss_and_says_so() -> None:
    y = np.array([0, 1] * 40)
    score = np.full(80, 0.5)
    score[3] = 0.0
    groups = {"g": ["a"] * 40 + ["b"] * 40}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = audit(y, y_score=score, groups=groups, resamples=100)
    assert math.isinf(cell(found, "g=a", "log_loss")["value"])
    assert math.isnan(cell(found, "g=a", "log_loss")["low"])
    assert cell(found, "g=b", "log_loss")["value"] == pytest.approx(math.log(2))
    assert "1 rows have a target to which the model gave probability 0" in " ".join(found.notes)
    json.dumps(found.to_dict(), allow_nan=False)
