"""Group metrics: against fairlearn, and against plain counting."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from evenly import fair


def data(seed=0, rows=200, groups=4):
    state = np.random.default_rng(seed)
    return (
        state.integers(0, 2, rows),
        state.integers(0, 2, rows),
        np.array(list("abcd"))[state.integers(0, groups, rows)],
    )


@pytest.mark.parametrize("name", ["demographic_parity", "equal_opportunity", "equalized_odds"])
@pytest.mark.parametrize("seed", range(3))
def test_differences_are_fairlearns(name, seed):
    metrics = pytest.importorskip("fairlearn.metrics")
    y, chosen, group = data(seed)
    ours = getattr(fair, f"{name}_difference")(y, chosen, sensitive_features=group)
    theirs = getattr(metrics, f"{name}_difference")(y, chosen, sensitive_features=group)
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert ours > 0.01


def test_rates_are_fairlearns():
    metrics = pytest.importorskip("fairlearn.metrics")
    y, chosen, group = data()
    frame = metrics.MetricFrame(
        metrics={
            "count": metrics.count,
            "accuracy": lambda a, b: np.mean(a == b),
            "selection_rate": metrics.selection_rate,
            "true_positive_rate": metrics.true_positive_rate,
            "false_positive_rate": metrics.false_positive_rate,
        },
        y_true=y,
        y_pred=chosen,
        sensitive_features=group,
    )
    rates = fair.group_rates(y, chosen, sensitive_features=group).to_frame()
    assert list(rates.index) == ["a", "b", "c", "d"]
    np.testing.assert_allclose(rates.to_numpy(float), frame.by_group[list(rates)].to_numpy(float), rtol=1e-12)


def test_intersections_are_counted_one_by_one():
    y, chosen, group = data()
    old = y[::-1] == 1
    rates = fair.group_rates(y, chosen, sensitive_features=pd.DataFrame({"group": group, "old": old}))
    assert rates.groups[0] == ("a", False)
    for place, (name, is_old) in enumerate(rates.groups):
        own = [k for k in range(len(y)) if group[k] == name and old[k] == is_old]
        positive = [k for k in own if y[k] == 1]
        assert rates.count[place] == len(own)
        assert rates.selection_rate[place] == pytest.approx(sum(chosen[k] for k in own) / len(own))
        assert rates.true_positive_rate[place] == pytest.approx(sum(chosen[k] for k in positive) / len(positive))
    assert rates.to_frame().loc[("a", True)]["count"] == rates.count[1]


def test_probabilities_give_expected_rates():
    state = np.random.default_rng(1)
    y, _, group = data()
    p = state.uniform(size=len(y))
    draws = [fair.group_rates(y, state.uniform(size=len(y)) < p, sensitive_features=group) for _ in range(400)]
    expected = fair.group_rates(y, p, sensitive_features=group)
    for name in ("accuracy", "selection_rate", "true_positive_rate", "false_positive_rate"):
        mean = np.mean([getattr(draw, name) for draw in draws], axis=0)
        np.testing.assert_allclose(mean, getattr(expected, name), atol=0.02)


def test_a_rate_that_is_not_defined_is_nan_and_its_difference_an_error():
    rates = fair.group_rates([1, 0, 0], [1, 0, 1], sensitive_features=["a", "a", "b"])
    assert math.isnan(rates.true_positive_rate[1])
    assert rates.difference("selection_rate") == 0.5
    with pytest.raises(
        ValueError, match="true positive rate of group 'b' is not defined: it has no row with a positive"
    ):
        rates.difference("true_positive_rate")
    with pytest.raises(ValueError, match="rate='tpr' is unknown, expected one of 'accuracy'"):
        rates.difference("tpr")


@pytest.mark.parametrize(
    ("y", "chosen", "group", "error", "message"),
    [
        ([0, 2], [0, 1], ["a", "b"], ValueError, "labels other than 0 and 1, such as 2"),
        ([0, 1], [0, 1.5], ["a", "b"], ValueError, "y_pred has 1.5"),
        ([0, 1], [0, np.nan], ["a", "b"], ValueError, "y_pred has nan"),
        ([0, 1], [0], ["a", "b"], ValueError, "2 rows and y_pred 1"),
        ([], [], [], ValueError, "no rows"),
        ([0, 1], [0, 1], ["a"], ValueError, "sensitive_features has 1 rows, expected 2"),
        ([0, 1], [0, 1], ["a", None], ValueError, "1 missing labels"),
        ([0, 1], [0, 1], ["a", 1], ValueError, "cannot be compared"),
        ([0, 1], [0, 1], None, TypeError, "sensitive_features is None"),
        ([[0, 1]], [0, 1], ["a", "b"], ValueError, r"y_true has shape \(1, 2\)"),
        (["x", "y"], [0, 1], ["a", "b"], ValueError, "expected numbers"),
    ],
)
def test_bad_input(y, chosen, group, error, message):
    with pytest.raises(error, match=message):
        fair.group_rates(y, chosen, sensitive_features=group)


def test_group_labels_of_every_kind_read_the_same():
    labels = ["b", "a", "b", "a"]
    y, chosen = [1, 1, 0, 0], [1, 0, 1, 0]
    kinds = [
        labels,
        np.array(labels),
        np.array(labels, dtype=object)[:, None],
        pd.Series(labels, name="sex", index=[9, 8, 7, 6]),
        pd.Series(labels, dtype="category"),
        pd.DataFrame({"sex": labels}),
        {"sex": labels},
    ]
    try:
        import polars
    except ImportError:
        pass
    else:
        kinds += [polars.Series("sex", labels), polars.DataFrame({"sex": labels})]
    for kind in kinds:
        rates = fair.group_rates(y, chosen, sensitive_features=kind)
        assert rates.groups == ("a", "b")
        assert rates.selection_rate.tolist() == [0.0, 1.0]


def test_joint_codes():
    codes = fair.joint_codes(["no", "yes", "yes"], pd.DataFrame({"sex": ["f", "m", "f"], "old": [0, 0, 1]}))
    assert codes.tolist() == [0, 5, 4]  # groups (f, 0), (f, 1), (m, 0)
    with pytest.raises(ValueError, match=r"y has 3 classes \(0, 1, 2\), expected 2"):
        fair.joint_codes([0, 1, 2], ["a", "b", "a"])
