"""Accuracy by group against loops, scikit-learn and the definition of Wilson's interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score

from evenly.robust import WorstGroupAccuracy, worst_group_accuracy


def data(size=200, seed=0):
    rng = np.random.default_rng(seed)
    y, groups = rng.integers(3, size=size), rng.choice([0, 1, 3], size=size, p=[0.7, 0.25, 0.05])
    return torch.tensor(y), torch.tensor(np.where(rng.random(size) < 0.7, y, 0)), torch.tensor(groups)


def test_against_loops():
    y, p, g = data()
    train = [10, 20, 0, 70]
    result = worst_group_accuracy(y, p, g, train)
    want = {k: accuracy_score(y[g == k], p[g == k]) for k in (0, 1, 3)}
    for k, value in want.items():
        assert float(result.per_group[k]) == pytest.approx(value, abs=1e-15)
    assert math.isnan(result.per_group[2])
    assert result.worst == min(want.values())
    assert want[result.worst_group] == result.worst
    assert result.average == pytest.approx(accuracy_score(y, p), abs=1e-7)
    assert result.adjusted_average == pytest.approx(0.1 * want[0] + 0.2 * want[1] + 0.7 * want[3])
    assert result.counts.tolist() == torch.bincount(g, minlength=4).tolist()
    assert math.isnan(worst_group_accuracy(y, p, g, [1, 1, 1, 1]).adjusted_average)  # group 2 was not evaluated
    assert worst_group_accuracy(y, p, g).adjusted_average is None


def test_intervals_solve_wilsons_equation():
    y, p, g = data()
    result = worst_group_accuracy(y, p, g, confidence=0.9)
    z = 1.6448536269514722
    for k in (0, 1, 3):
        a, n = float(result.per_group[k]), int(result.counts[k])
        for bound in result.interval[k].tolist():
            assert abs(a - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n), rel=1e-9)
    assert result.interval[2].isnan().all()
    right = worst_group_accuracy(torch.ones(4), torch.ones(4).long(), torch.zeros(4).long())
    assert right.interval[0, 1] == 1
    assert 0.5 < right.interval[0, 0] < 0.52


def test_streaming_merging_and_scores():
    y, p, g = data()
    whole = WorstGroupAccuracy(4)
    whole.update(p, y, g)
    parts = [WorstGroupAccuracy(4), WorstGroupAccuracy(4)]
    for k, rows in enumerate(torch.arange(200).split(7)):
        parts[k % 2].update(torch.nn.functional.one_hot(p[rows], 3).float(), y[rows].int(), g[rows].int())
    parts[0].merge(parts[1])
    assert torch.equal(parts[0].correct, whole.correct)
    assert torch.equal(parts[0].counts, whole.counts)
    assert parts[0].compute().average == whole.compute().average
    whole.update(p[:0], y[:0], g[:0])
    assert int(whole.counts.sum()) == 200
    whole.reset()
    with pytest.raises(ValueError, match="no sample was collected"):
        whole.compute()
    with pytest.raises(ValueError, match="the groups differ"):
        whole.merge(WorstGroupAccuracy(4, names="abcd"))


def test_boolean_classes_and_table():
    metric = WorstGroupAccuracy(3, [5, 5, 0], names=["a", "b, with a long name", "never"])
    metric.update(torch.tensor([True, False]), torch.tensor([1, 1]), torch.tensor([0, 1]))
    lines = str(metric.compute()).splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == [
        "group", "b, with a long name", "a", "never", "average", "adjusted average",
    ]  # fmt: skip
    assert len(lines[3].split()) == 3  # no accuracy, a count of 0
    assert "95% interval" in lines[0]


def test_refuses():
    y, p, g = data()
    metric = WorstGroupAccuracy(4)
    for arguments, error, message in (
        ((p.float(), y, g), ValueError, "predictions \\(B,\\) are floating-point; give classes"),
        ((p.float().unsqueeze(1), y, g), ValueError, "have no largest class"),
        ((p, y[:-1], g), ValueError, "must have one value a sample"),
        ((p, y, g.float()), TypeError, "groups are torch.float32"),
        ((p, y, g + 1), ValueError, "group id 4 outside \\[0, 4\\)"),
    ):
        with pytest.raises(error, match=message):
            metric.update(*arguments)
    assert int(metric.counts.sum()) == 0
    for settings, message in (
        ({"n_groups": 0}, "n_groups=0"),
        ({"confidence": 1.0}, "expected a number below 1"),
        ({"confidence": 0.0}, "confidence=0.0, expected a number above 0"),
        ({"names": ["a"]}, "1 names for 4 groups"),
        ({"train_group_counts": [1, 2]}, "expected 4 numbers of at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            WorstGroupAccuracy(**{"n_groups": 4, **settings})
    with pytest.raises(ValueError, match="no sample"):
        worst_group_accuracy(y[:0], p[:0], g[:0])
