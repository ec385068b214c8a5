"""Metrics against numbers worked out by hand, the tie rule against scipy and against its own promises."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from evenly.workbench import TrialFailure, TrialResult, TrialSettings
from evenly.workbench.metrics import (
    difference,
    family_means,
    finding,
    mpc,
    rank,
    rpc,
    summarize,
    worst_corruption,
)

TABLE = {"fog": (0.8, 0.6), "snow": (0.5, 0.3), "zoom": (0.9, 0.7)}


def test_metrics_by_hand() -> None:
    # Means 0.7, 0.4, 0.8; their mean is 1.9 / 3.
    assert mpc(TABLE) == pytest.approx(1.9 / 3)
    assert rpc(TABLE, 0.95) == pytest.approx(1.9 / 3 / 0.95)
    assert worst_corruption(TABLE) == ("snow", pytest.approx(0.4))
    families = {"weather": ["fog", "snow"], "blur": ["zoom", "glass"], "noise": ["shot"]}
    assert family_means(TABLE, families) == {"weather": pytest.approx(0.55), "blur": pytest.approx(0.8)}


def test_a_corruption_with_more_severities_weighs_no_more() -> None:
    assert mpc({"a": (1.0, 1.0, 1.0, 1.0), "b": (0.0,)}) == pytest.approx(0.5)


def test_metrics_of_nothing_are_errors() -> None:
    for table in ({}, {"fog": ()}):
        with pytest.raises(ValueError, match="at least one"):
            mpc(table)
    with pytest.raises(ValueError, match="above 0"):
        rpc(TABLE, 0.0)


def test_difference_is_the_paired_interval_of_scipy() -> None:
    a, b = [0.91, 0.93, 0.90, 0.95], [0.88, 0.93, 0.89, 0.90]
    ours = difference(dict(enumerate(a)), dict(enumerate(b)))
    theirs = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert ours.mean - ours.half_width == pytest.approx(theirs.low)
    assert ours.mean + ours.half_width == pytest.approx(theirs.high)
    assert ours.tie == (theirs.low <= 0 <= theirs.high)


def test_difference_by_hand() -> None:
    # Differences 0.1, 0.2, 0.3: mean 0.2, sd 0.1, t(2) = 4.302653, half width 4.302653 * 0.1 / sqrt(3) = 0.248414.
    found = difference({0: 0.4, 1: 0.6, 2: 0.8}, {0: 0.3, 1: 0.4, 2: 0.5})
    assert found.mean == pytest.approx(0.2)
    assert found.half_width == pytest.approx(0.248414, abs=1e-6)
    assert found.tie


def test_pairing_uses_common_seeds_only() -> None:
    assert difference({0: 0.9, 7: 0.1}, {0: 0.5, 1: 0.4}).n == 1
    with pytest.raises(ValueError, match="no seed in common"):
        difference({0: 1.0}, {1: 1.0})


def test_one_test_sample_is_a_tie_however_steady() -> None:
    a, b = {0: 0.51, 1: 0.51, 2: 0.51}, {0: 0.50, 1: 0.50, 2: 0.50}
    assert not difference(a, b).tie
    assert difference(a, b, resolution=0.01).tie


def test_ranks_with_a_tie_that_is_not_transitive() -> None:
    # a beats c surely; b, noisy, ties with both: b's rank is 1, since nothing is surely better.
    scores = {
        "a": {0: 0.90, 1: 0.91, 2: 0.92},
        "b": {0: 0.70, 1: 0.90, 2: 1.00},
        "c": {0: 0.80, 1: 0.81, 2: 0.82},
    }
    assert rank(scores) == {"a": 1, "b": 1, "c": 2}


seeds_of_scores = st.dictionaries(
    st.sampled_from("abcdef"),
    st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3).map(lambda v: dict(enumerate(v))),
    min_size=1,
)


@given(seeds_of_scores)
def test_rank_properties(scores: dict[str, dict[int, float]]) -> None:
    ranks = rank(scores)
    assert set(ranks) == set(scores)
    assert min(ranks.values()) == 1
    assert all(1 <= value <= len(scores) for value in ranks.values())
    # The order of the input does not matter.
    assert rank(dict(reversed(scores.items()))) == ranks
    for one in scores:
        for other in scores:
            forth, back = difference(scores[one], scores[other]), difference(scores[other], scores[one])
            assert forth.tie == back.tie
            assert forth.mean == pytest.approx(-back.mean)
    # The best mean is never beaten.
    best = max(scores, key=lambda name: math.fsum(scores[name].values()))
    assert ranks[best] == 1


@given(seeds_of_scores, st.floats(0.25, 4))
def test_rank_does_not_depend_on_the_unit(scores: dict[str, dict[int, float]], factor: float) -> None:
    # In powers of two, so that scaling is exact and no tie is broken by rounding.
    factor = 2.0 ** round(math.log2(factor))
    scaled = {name: {seed: value * factor for seed, value in row.items()} for name, row in scores.items()}
    near = any(
        abs(abs(d.mean) - d.half_width) < 1e-9
        for one in scores
        for other in scores
        if one != other
        for d in [difference(scores[one], scores[other])]
    )
    if not near:
        assert rank(scaled) == rank(scores)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_equal_scores_tie(values: list[float]) -> None:
    row = dict(enumerate(values))
    assert rank({"a": row, "b": dict(row)}) == {"a": 1, "b": 1}


SETTINGS = TrialSettings("batch", "digits", batch_size=4, seed=0, epochs=1, lr=0.1)


def trials(
    values: dict[str, dict[int, list[float | None]]],
) -> list[tuple[TrialSettings, TrialResult | TrialFailure | None]]:
    """Trials whose mPC is half of the given clean accuracies; None: a failure."""
    found: list[tuple[TrialSettings, TrialResult | TrialFailure | None]] = []
    for norm, batches in values.items():
        for batch, row in batches.items():
            for seed, clean in enumerate(row):
                settings = replace(SETTINGS, norm=norm, batch_size=batch, seed=seed)
                outcome: TrialResult | TrialFailure
                if clean is None:
                    outcome = TrialFailure("ValueError: no")
                else:
                    table = {"fog": (clean * 0.6, clean * 0.8), "snow": (clean * 0.2, clean * 0.4)}
                    outcome = TrialResult(
                        False, 10, ((10, 0.5),), clean=clean, corruptions=table, domains={"d": clean / 4}
                    )
                found.append((settings, outcome))
    return found


def test_summary_by_hand() -> None:
    arms = summarize(
        trials(
            {
                "layer": {4: [0.5, 0.6], 64: [0.7, 0.6]},
                "batch": {4: [0.8, 0.8], 64: [0.9, 1.0]},
                "none": {4: [0.9, None], 64: [0.9, 0.9]},
            }
        )
    )
    assert [(arm.norm, arm.rank) for arm in arms] == [("batch", 1), ("layer", 1), ("none", None)]
    batch = arms[0]
    assert batch.scores["clean"] == {0: pytest.approx(0.85), 1: pytest.approx(0.9)}
    assert batch.mean("mpc") == pytest.approx(0.875 / 2)
    assert batch.spread("clean") == pytest.approx(0.05 / math.sqrt(2))
    assert batch.mean("rpc") == pytest.approx(0.5)
    assert batch.mean("domain") == pytest.approx(0.875 / 4)
    assert batch.worst == "snow"
    assert batch.mean("worst") == pytest.approx(0.875 * 0.3)
    assert batch.corruptions["fog"] == (pytest.approx(0.875 * 0.6), pytest.approx(0.875 * 0.8))
    none = arms[2]
    assert none.failed == 1
    assert not none.complete
    assert none.cells[0].errors == {1: "ValueError: no"}
    assert none.mean("clean") == pytest.approx(0.9)


def test_finding_names_the_winner_with_its_interval() -> None:
    rows = trials({"group": {4: [0.90, 0.91, 0.92]}, "batch": {4: [0.70, 0.71, 0.73]}})
    text = finding(summarize(rows))
    # Halves: differences 0.1, 0.1, 0.095; mean 0.09833, half width t(2) * 0.002887 / sqrt(3) = 0.0071711.
    assert text.startswith("group is best in mean accuracy under corruption (mPC): 45.5 %, 9.8 points above batch")
    assert "95 % interval 9.1 to 10.6 points, over 3 seeds" in text
    assert text.count(".") == sum(text.count(f".{d}") for d in range(10)) + 1  # one sentence


def test_finding_calls_a_tie_a_tie() -> None:
    rows = trials({"group": {4: [0.90, 0.80, 0.91]}, "batch": {4: [0.85, 0.88, 0.84]}, "none": {4: [0.1, 0.1, 0.1]}})
    text = finding(summarize(rows))
    assert "group and batch tie for the best" in text
    assert "none is worse" in text


def test_finding_with_one_seed_or_none() -> None:
    one = finding(summarize(trials({"group": {4: [0.9]}, "batch": {4: [0.2]}})))
    assert "nothing is sure" in one
    assert "Nothing can be ranked" in finding(summarize(trials({"group": {4: [None]}})))
    assert "not ranked, for want of finished trials: batch" in finding(
        summarize(trials({"group": {4: [0.9, 0.9]}, "batch": {4: [None, 0.2]}}))
    )


def test_unknown_metric() -> None:
    with pytest.raises(ValueError, match="known are mpc, clean"):
        summarize([], metric="accuracy")
