"""Bias scoring: the scores and the rule against the equations, linear programs and brute force."""

from __future__ import annotations

import itertools
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from evenly.fair import (
    BiasScoreClassifier,
    BiasScoreRule,
    Event,
    bias_scores,
    demographic_parity_difference,
    equalized_odds_difference,
    joint_codes,
)
from fair import oracle

NAMED = {"dp": "dp", "eop": "eop", "eo": "eo", "fpr": "false_positive_rate_parity", "dp+eo": ["dp", "eo"]}


def priors(y, a, groups=2):
    return np.array([[np.mean((y == label) & (a == group)) for group in range(groups)] for label in (0, 1)])


def observed(criterion, y, a, groups):
    return [[oracle.indicator(y, a, event) for event in family] for family in oracle.events(criterion, groups)]


def expected(criterion, joint):
    groups = joint.shape[2]
    return [[oracle.probability(joint, event) for event in family] for family in oracle.events(criterion, groups)]


def fitted(criterion, eta, joint, y, a, tol, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return BiasScoreRule(NAMED[criterion], tol, **more).fit(eta, joint, y, sensitive_features=a)


# ---- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["dp", "eop", "eo"])
def test_scores_are_those_of_the_paper(criterion):
    eta, joint, y, a = oracle.law(40)
    p = priors(y, a)
    scores = bias_scores(eta, joint, p, criterion)
    for i in range(40):
        row = []
        for (label, _), _ in oracle.events(criterion, 2):
            first, second = joint[i].sum(0) if label is None else joint[i, label]
            if label is None:
                f = first / p[:, 0].sum() - second / p[:, 1].sum()
            else:
                f = first / p[label, 0] - second / p[label, 1]
            row.append((1 if eta[i] > 0.5 else -1) * f / abs(2 * eta[i] - 1))
        np.testing.assert_allclose(scores[i], row, rtol=1e-12)
    rule = fitted(criterion, eta, joint, y, a, 0.1)
    np.testing.assert_allclose(rule.bias_scores(eta, joint), scores, rtol=1e-12)
    assert len(rule.score_names_) == scores.shape[1]


def test_a_coin_toss_has_an_infinite_score_unless_it_has_no_bias():
    p = np.full((2, 2), 0.25)
    scores = bias_scores([0.5, 0.5, 0.5], [[0.5, 0.5], [1, 0], [0, 1]], p)
    np.testing.assert_array_equal(scores[:, 0], [0, -np.inf, np.inf])


@pytest.mark.parametrize("criterion", ["dp", "eop", "eo"])
def test_the_drop_of_the_difference_is_the_expected_score_of_the_flips(criterion):
    eta, joint, y, a = oracle.law(300)
    rule = fitted(criterion, eta, joint, y, a, 0.05, estimate="model", randomize=True)
    kappa, s = rule.flip_probability(eta, joint), rule.bias_scores(eta, joint)
    before, after = (eta > 0.5).astype(float), rule.predict_proba(eta, joint)[:, 1]
    assert kappa.sum() > 1
    for k, members in enumerate(expected(criterion, joint)):
        drop = np.subtract(*oracle.rates(before, members)) - np.subtract(*oracle.rates(after, members))
        assert np.mean(kappa * np.abs(2 * eta - 1) * s[:, k]) == pytest.approx(drop, abs=1e-12)


# ---- one score -----------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(5, 24),
    criterion=st.sampled_from(["dp", "eop", "fpr"]),
    grid=st.sampled_from([2, 4, None]),
    tol=st.sampled_from([0.0, 0.05, 0.2, 0.5]),
)
@settings(max_examples=150)
def test_one_score_is_solved_as_by_hand(seed, rows, criterion, grid, tol):
    eta, joint, y, a = oracle.law(rows, seed=seed, grid=grid)
    (members,) = observed(criterion, y, a, 2)
    (family,) = oracle.events(criterion, 2)
    first, second = (oracle.probability(joint, event) / m.mean() for event, m in zip(family, members, strict=True))
    accuracy, difference = oracle.walk(eta, first - second, y, members, tol)
    rule = fitted(criterion, eta, joint, y, a, tol)
    decisions = rule.predict(eta, joint)
    assert rule.accuracy_ == pytest.approx(accuracy, abs=1e-12)
    assert np.mean(decisions == y) == pytest.approx(accuracy, abs=1e-12)
    (reported,) = rule.disparity_.values()
    assert reported == pytest.approx(oracle.disparity(decisions, [members]), abs=1e-12)
    if abs(difference) <= tol:
        assert reported <= tol + 1e-12
    else:
        assert reported == pytest.approx(abs(difference), abs=1e-12)


@pytest.mark.parametrize("tol", [0.02, 0.1])
@pytest.mark.parametrize("criterion", ["dp", "eop"])
def test_one_score_is_the_linear_program_but_for_one_row(criterion, tol):
    eta, joint, y, a = oracle.law(200)
    loss, _ = oracle.program(eta, expected(criterion, joint), tol)
    rule = fitted(criterion, eta, joint, y, a, tol, estimate="model")
    ours = rule.accuracy_before_ - rule.accuracy_
    assert loss - 1e-9 <= ours <= loss + np.abs(2 * eta - 1).max() / 200
    assert rule.flip_rate_ > 0.02
    t, s = rule.threshold_, rule.bias_scores(eta, joint)[:, 0]
    np.testing.assert_array_equal(s / t > 1, rule.flip_probability(eta, joint) == 1)


@pytest.mark.parametrize("criterion", ["dp", "eo"])
def test_brute_force_over_all_flips(criterion):
    eta, joint, y, a = oracle.law(12, seed=3)
    families = expected(criterion, joint)
    tol, base, c = 0.15, (eta > 0.5).astype(int), np.abs(2 * eta - 1)
    best = min(
        c[list(flips)].sum() / 12
        for count in range(13)
        for flips in itertools.combinations(range(12), count)
        if oracle.disparity(np.where(np.isin(np.arange(12), flips), 1 - base, base), families) <= tol
    )
    loss, _ = oracle.program(eta, families, tol)
    mixed = fitted(criterion, eta, joint, y, a, tol, estimate="model", randomize=True)
    single = fitted(criterion, eta, joint, y, a, tol, estimate="model")
    assert loss > 1e-4
    assert mixed.accuracy_before_ - mixed.accuracy_ == pytest.approx(loss, abs=1e-8)
    assert loss - 1e-9 <= best <= single.accuracy_before_ - single.accuracy_ + 1e-9


def test_a_known_attribute_gives_a_threshold_a_group():
    eta, _, y, a = oracle.law(2000, seed=1)
    known = np.eye(2)[a]
    rule = BiasScoreRule("dp", 0.03).fit(eta, known, y, sensitive_features=a)
    z, share = 1 / rule.threshold_, [np.mean(a == 0), np.mean(a == 1)]
    assert rule.flip_rate_ > 0.01
    by_hand = np.where(a == 0, eta > 0.5 + z / (2 * share[0]), eta > 0.5 - z / (2 * share[1]))
    np.testing.assert_array_equal(rule.predict(eta, known), by_hand)
    np.testing.assert_array_equal(rule.decision_function(eta, known) > 0, by_hand)


# ---- several scores ------------------------------------------------------------------------------


@pytest.mark.parametrize(("criterion", "groups"), [("dp", 3), ("eop", 2), ("eo", 2), ("eo", 3), ("dp+eo", 2)])
@pytest.mark.parametrize("tol", [0.0, 0.04])
def test_a_mixture_is_the_linear_programs_optimum(criterion, groups, tol):
    eta, joint, y, a = oracle.law(200, groups)
    families = expected(criterion, joint)
    loss, _ = oracle.program(eta, families, tol)
    rule = fitted(criterion, eta, joint, y, a, tol, estimate="model", randomize=True)
    assert loss > 1e-3
    assert rule.accuracy_before_ - rule.accuracy_ == pytest.approx(loss, abs=1e-7)
    assert oracle.disparity(rule.predict_proba(eta, joint)[:, 1], families) <= tol + 1e-8
    assert rule.weights_.sum() == pytest.approx(1)


def test_two_attributes_side_by_side_are_the_linear_programs_optimum():
    eta, joint, y, a = oracle.law(200)
    _, other, _, b = oracle.law(200, 3, seed=9)
    other = eta[:, None, None] * 0 + np.stack([1 - eta, eta], 1)[:, :, None] * (other / other.sum(2, keepdims=True))
    families = [expected("eop", joint)[0], expected("eop", other)[0]]
    loss, _ = oracle.program(eta, families, 0.02)
    rule = BiasScoreRule("eop", 0.02, estimate="model", randomize=True, intersect=False)
    rule.fit(eta, [joint, other], y, sensitive_features={"a": a, "b": b})
    assert list(rule.disparity_) == ["true positive rate by a", "true positive rate by b"]
    assert rule.rules_.shape[1] == 1 + 2
    assert rule.accuracy_before_ - rule.accuracy_ == pytest.approx(loss, abs=1e-7)
    assert loss > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_equalized_odds_is_at_least_as_accurate_as_the_authors_search(seed):
    eta, joint, y, a = oracle.law(90, seed=seed)
    families = observed("eo", y, a, 2)
    f = np.stack([np.subtract(*(oracle.probability(joint, e) / m.mean() for e, m in zip(*pair, strict=True)))
                  for pair in zip(oracle.events("eo", 2), families, strict=True)], 1)  # fmt: skip
    rule = fitted("eo", eta, joint, y, a, 0.1, directions=180)  # two a row: exact
    decisions = rule.predict(eta, joint)
    assert oracle.disparity(decisions, families) <= 0.1 + 1e-12
    assert max(rule.disparity_before_.values()) > 0.1
    assert rule.accuracy_ == pytest.approx(np.mean(decisions == y))
    assert rule.accuracy_ >= oracle.lines(eta, f, y, families, 0.1) - 1e-12


def test_a_pair_of_events_is_the_named_criterion():
    eta, joint, y, a = oracle.law(300)
    named = fitted("eo", eta, joint, y, a, 0.02, random_state=0)
    pairs = [(Event(0, 1), Event(1, 1)), (Event(0, 0), Event(1, 0))]
    own = BiasScoreRule(pairs, 0.02, random_state=0).fit(eta, joint, y, sensitive_features=a)
    np.testing.assert_array_equal(own.rules_, named.rules_)
    one = BiasScoreRule(pairs[0], 0.02).fit(eta, joint, y, sensitive_features=a)
    np.testing.assert_array_equal(one.rules_, fitted("eop", eta, joint, y, a, 0.02).rules_)


def test_a_tolerance_for_each_constraint():
    eta, joint, y, a = oracle.law(2000, seed=2)
    rule = BiasScoreRule(["dp", "eop"], [0.02, 0.3], randomize=True).fit(eta, joint, y, sensitive_features=a)
    both = BiasScoreRule(["dp", "eop"], 0.02, randomize=True).fit(eta, joint, y, sensitive_features=a)
    assert rule.disparity_["selection rate by sensitive_feature"] <= 0.02 + 1e-9
    assert 0.02 < rule.disparity_["true positive rate by sensitive_feature"] <= 0.3
    assert both.disparity_["true positive rate by sensitive_feature"] <= 0.02 + 1e-9
    assert both.accuracy_ < rule.accuracy_


# ---- properties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["dp", "eop", "eo"])
@pytest.mark.parametrize("randomize", [False, True])
def test_nothing_flips_within_the_tolerance(criterion, randomize):
    eta, joint, y, a = oracle.law(100)
    wide = max(fitted(criterion, eta, joint, y, a, 1.0).disparity_before_.values())
    rule = fitted(criterion, eta, joint, y, a, wide, randomize=randomize)
    assert rule.flip_rate_ == 0
    np.testing.assert_array_equal(rule.predict(eta, joint), eta > 0.5)
    assert fitted(criterion, eta, joint, y, a, wide - 0.02, randomize=randomize).flip_rate_ > 0


def test_a_smaller_tolerance_flips_more_and_costs_more():
    eta, joint, y, a = oracle.law(400)
    rules = [
        fitted("dp", eta, joint, y, a, tol, estimate="model", randomize=True) for tol in (0.2, 0.1, 0.05, 0.02, 0.0)
    ]
    assert (np.diff([rule.flip_rate_ for rule in rules]) > 0).all()
    assert (np.diff([rule.accuracy_ for rule in rules]) < 0).all()


@pytest.mark.parametrize("criterion", ["dp", "eop"])
def test_the_names_of_the_groups_do_not_matter(criterion):
    eta, joint, y, a = oracle.law(400)
    rule = fitted(criterion, eta, joint, y, a, 0.02)
    swapped = fitted(criterion, eta, joint[:, :, ::-1], y, 1 - a, 0.02)
    assert rule.threshold_ == pytest.approx(-swapped.threshold_)
    np.testing.assert_array_equal(rule.predict(eta, joint), swapped.predict(eta, joint[:, :, ::-1]))


def test_coarse_scores_need_a_mixture():
    # All of group 1 has one score: flipping it leads from 0.7 to -0.3. A mixture meets the tolerance exactly.
    a = np.repeat([0, 1], 50)
    eta = np.where(a == 1, 0.4, np.where(np.arange(100) < 35, 0.7, 0.2))
    y = np.tile([0, 1], 50)
    known = np.eye(2)[a]
    with pytest.warns(UserWarning, match=r"No rule is within the tolerance .* exceeds it by 0.25 .* randomize=True"):
        single = BiasScoreRule("dp", 0.05).fit(eta, known, y, sensitive_features=a)
    assert single.disparity_["selection rate by sensitive_feature"] == pytest.approx(0.3)
    mixed = BiasScoreRule("dp", 0.05, randomize=True, random_state=0).fit(eta, known, y, sensitive_features=a)
    assert mixed.disparity_["selection rate by sensitive_feature"] == pytest.approx(0.05)
    p = mixed.predict_proba(eta, known)[:, 1]
    assert not hasattr(mixed, "decision_function")
    draws = np.mean([mixed.predict(eta, known, random_state=seed) for seed in range(300)], axis=0)
    np.testing.assert_allclose([draws[:50].mean(), draws[50:].mean()], [p[:50].mean(), p[50]], atol=0.02)
    np.testing.assert_array_equal(mixed.predict(eta, known), mixed.predict(eta, known))


def test_a_joint_model_alone():
    eta, joint, y, a = oracle.law(200)
    given = BiasScoreRule("eo", 0.05, random_state=0).fit(eta, joint, y, sensitive_features=a)
    summed = BiasScoreRule("eo", 0.05, random_state=0).fit(None, joint, y, sensitive_features=a)
    np.testing.assert_array_equal(given.predict(eta, joint), summed.predict(None, joint))


def test_priors_of_a_training_set_scale_the_scores():
    eta, joint, y, a = oracle.law(200)
    p = np.array([[0.4, 0.1], [0.2, 0.3]])
    rule = BiasScoreRule("eop", 0.05).fit(eta, joint, y, sensitive_features=a, priors=p)
    np.testing.assert_allclose(rule.bias_scores(eta, joint), bias_scores(eta, joint, p, "eop"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"constraints": "parity"}, "the constraint 'parity' is unknown, expected one of 'demographic_parity'"),
        ({"constraints": []}, "constraints is empty"),
        ({"constraints": (Event(0), Event(0))}, "compares an event with itself"),
        ({"constraints": (Event(0), Event(7))}, "unknown group, expected one of \\[0, 1\\]"),
        ({"constraints": (Event(0, 2), Event(1, 2))}, "has the label 2, expected 1, 0 or None"),
        ({"constraints": (Event(0, attribute="b"), Event(1))}, "unknown attribute"),
        ({"tol": -0.1}, "tol=-0.1, expected a difference of rates in \\[0, 1\\]"),
        ({"tol": float("nan")}, "tol=nan"),
        ({"tol": [0.1, 0.1]}, "tol has 2 numbers for 1 constraints"),
        ({"estimate": "true"}, "estimate='true', expected 'empirical' or 'model'"),
        ({"directions": -1}, "directions=-1"),
        ({"eta": np.full(50, 1.5)}, "proba_y has 1.5, expected probabilities in"),
        ({"eta": np.full(50, np.nan)}, "proba_y has nan"),
        ({"eta": np.full((50, 2), 0.5)}, r"proba_y has shape \(50, 2\), expected \(n,\)"),
        ({"eta": np.full(49, 0.5)}, r"have \[49, 50\] rows; expected as many"),
        ({"joint": np.full((50, 2, 2), 0.3)}, "the probabilities of each row in proba_a sum to 1.2, expected 1"),
        ({"joint": np.full((50, 4), 0.25)}, r"proba_a has shape \(50, 4\) for the 2 groups .* expected \(n, 2\)"),
        ({"joint": np.full((50, 2), 0.5), "constraints": "eo"}, r"conditions on the label, which needs p\(Y, A \| x\)"),
        ({"joint": np.full((50, 2), 0.5), "eta": None}, "proba_y is None, which needs joint probabilities"),
        ({"y": np.zeros(50)}, r"y has 1 class \(0.0\), expected 2"),
        ({"a": np.zeros(50), "joint": np.ones((50, 1))}, "has one group, 0.0; expected two or more"),
        ({"y": np.repeat([0, 1], 25), "a": np.repeat([0, 1], 25), "constraints": "eop"},
         "no row has sensitive_feature=0 and a positive label"),
        ({"priors": np.full((2, 2), 0.5)}, "the probabilities of all events in priors sum to 2"),
        ({"priors": np.full((4,), 0.25)}, r"priors has shape \(4,\), expected \(2, 2\)"),
    ],
)  # fmt: skip
def test_bad_input(change, message):
    eta, joint, y, a = oracle.law(50)
    given = {"eta": eta, "joint": joint, "y": y, "a": a, "priors": None, **change}
    rest = {key: given.pop(key) for key in ("constraints", "tol", "estimate", "directions") if key in given}
    with pytest.raises(ValueError, match=message):
        BiasScoreRule(**rest).fit(
            given["eta"], given["joint"], given["y"], sensitive_features=given["a"], priors=given["priors"]
        )


# ---- the classifier ------------------------------------------------------------------------------


def people(rows=1500, seed=0, groups=("f", "m")):
    """A table where the label depends on the group through x0."""
    state = np.random.default_rng(seed)
    group = state.integers(len(groups), size=rows)
    x = state.normal(size=(rows, 4))
    x[:, 0] += 1.2 * group
    y = (state.uniform(size=rows) < 1 / (1 + np.exp(-(1.5 * x[:, 0] + x[:, 1] - 1)))).astype(int)
    return x, y, np.array(groups)[group]


@pytest.mark.parametrize("constraints", ["demographic_parity", "equal_opportunity", "equalized_odds"])
@pytest.mark.parametrize("aware", [False, True])
def test_the_classifier_is_fairer_on_new_rows(constraints, aware):
    x, y, group = people(4000)
    new, label, other = people(4000, seed=1)
    fair = BiasScoreClassifier(
        LogisticRegression(), constraints=constraints, tol=0.02, attribute_aware=aware, directions=32, random_state=0
    )
    fair.fit(x, y, sensitive_features=group)
    known = {"sensitive_features": other} if aware else {}
    metric = equalized_odds_difference if constraints == "equalized_odds" else demographic_parity_difference
    if constraints != "equal_opportunity":
        before = metric(label, fair.estimator_.predict(new), sensitive_features=other)
        after = metric(label, fair.predict(new, **known), sensitive_features=other)
        assert before > 0.15
        assert after < 0.08
    changed = fair.predict(new, **known) != fair.estimator_.predict(new)
    np.testing.assert_array_equal(fair.flip_probability(new, **known), changed)
    assert changed.any()
    assert fair.bias_scores(new, **known).shape == (4000, 2 if constraints == "equalized_odds" else 1)
    assert max(fair.rule_.disparity_.values()) <= 0.02 + 1e-9
    assert fair.score(new, label) > 0.6 if not aware else True


def test_the_rule_sees_what_its_models_say():
    x, y, group = people()
    models = LogisticRegression().fit(x[:700], y[:700])
    joint = LogisticRegression().fit(x[:700], joint_codes(y[:700], group[:700]))
    fair = BiasScoreClassifier(models, constraints="eo", attribute_estimator=joint, prefit=True, random_state=0)
    fair.fit(x[700:], y[700:], sensitive_features=group[700:])
    assert fair.estimator_ is models
    eta = models.predict_proba(x[700:])[:, 1]
    table = joint.predict_proba(x[700:]).reshape(-1, 2, 2)
    table = np.stack([1 - eta, eta], 1)[:, :, None] * table / table.sum(2, keepdims=True)
    rule = BiasScoreRule("eo", random_state=0).fit(eta, table, y[700:], sensitive_features=group[700:])
    np.testing.assert_allclose(fair.rule_.rules_, rule.rules_)
    np.testing.assert_array_equal(fair.predict(x[700:]), rule.predict(eta, table))


@pytest.mark.parametrize("cv", [3, 0.4, None])
def test_the_rows_that_the_rule_is_fitted_on(cv):
    x, y, group = people(600)
    fair = BiasScoreClassifier(LogisticRegression(), cv=cv, tol=0.05, random_state=0)
    fair.fit(x, y, sensitive_features=group)
    every = LogisticRegression().fit(x, y)
    assert np.allclose(fair.estimator_.coef_, every.coef_) == (cv != 0.4)
    again = clone(fair).fit(x, y, sensitive_features=group)
    np.testing.assert_array_equal(again.rule_.rules_, fair.rule_.rules_)
    same = fair.rule_.accuracy_before_ == np.mean(every.predict(x) == y)
    assert same == (cv is None)


def test_tables_and_labels_of_every_kind():
    x, y, group = people(400)
    words = np.where(y == 1, "yes", "no")
    frame = pd.DataFrame(x, columns=list("abcd"), index=np.arange(400)[::-1])
    model = make_pipeline(StandardScaler(), LogisticRegression())
    first = BiasScoreClassifier(model, random_state=0).fit(frame, words, sensitive_features=group)
    assert first.classes_.tolist() == ["no", "yes"]
    assert first.feature_names_in_.tolist() == list("abcd")
    expected = first.predict(frame)
    assert set(expected) == {"no", "yes"}
    series = pd.Series(words, index=frame.index)
    second = BiasScoreClassifier(model, random_state=0)
    second.fit(frame, series, sensitive_features=pd.Series(group, index=frame.index))
    np.testing.assert_array_equal(second.predict(frame), expected)
    lists = BiasScoreClassifier(model, random_state=0).fit(x.tolist(), y.tolist(), sensitive_features=group.tolist())
    np.testing.assert_array_equal(lists.predict(x), expected == "yes")
    copy = pickle.loads(pickle.dumps(first))
    np.testing.assert_array_equal(copy.predict(frame), expected)


def test_polars():
    polars = pytest.importorskip("polars")
    x, y, group = people(400)
    frame = polars.DataFrame({name: x[:, k] for k, name in enumerate("abcd")})
    for cv in (3, 0.3):
        fair = BiasScoreClassifier(LogisticRegression(), constraints="eo", cv=cv, directions=16, random_state=0)
        fair.fit(frame, polars.Series(y), sensitive_features=polars.DataFrame({"sex": group}))
        plain = clone(fair).fit(x, y, sensitive_features=group)
        np.testing.assert_array_equal(fair.predict(frame), plain.predict(x))


def test_several_groups_and_columns():
    x, y, group = people(3000, groups=("a", "b", "c"))
    old = np.random.default_rng(5).integers(0, 2, 3000)
    both = pd.DataFrame({"group": group, "old": old})
    crossed = BiasScoreClassifier(LogisticRegression(), tol=0.05, randomize=True, random_state=0)
    crossed.fit(x, y, sensitive_features=both)
    assert crossed.rule_.attributes_[0].groups == tuple((g, o) for g in "abc" for o in (0, 1))
    assert crossed.rule_.rules_.shape[1] == 5
    assert max(crossed.rule_.disparity_.values()) <= 0.05 + 1e-6
    each = BiasScoreClassifier(LogisticRegression(), tol=0.05, intersect=False, directions=64, random_state=0)
    each.fit(x, y, sensitive_features=both)
    assert list(each.rule_.disparity_) == ["selection rate by group", "selection rate by old"]
    assert each.rule_.rules_.shape[1] == 3
    decisions = each.predict(x)
    assert demographic_parity_difference(y, decisions, sensitive_features=group) < 0.12
    assert max(each.rule_.disparity_.values()) <= 0.05 + 1e-9
    aware = BiasScoreClassifier(LogisticRegression(), tol=0.05, intersect=False, attribute_aware=True, directions=64)
    aware.fit(x, y, sensitive_features=both)
    np.testing.assert_array_equal(
        aware.predict(x[:50], sensitive_features=both[:50]), aware.predict(x, sensitive_features=both)[:50]
    )


def test_a_frozen_model_is_not_fitted_again():
    frozen = pytest.importorskip("sklearn.frozen")
    x, y, group = people(600)
    labels, groups = LogisticRegression().fit(x[:200], y[:200]), LogisticRegression().fit(x[:200], group[:200])
    fair = BiasScoreClassifier(frozen.FrozenEstimator(labels), attribute_estimator=frozen.FrozenEstimator(groups))
    fair.fit(x[200:], y[200:], sensitive_features=group[200:])
    both = BiasScoreClassifier(labels, attribute_estimator=groups, prefit=True)
    both.fit(x[200:], y[200:], sensitive_features=group[200:])
    np.testing.assert_array_equal(fair.predict(x), both.predict(x))
    mixed = BiasScoreClassifier(frozen.FrozenEstimator(labels), random_state=0).fit(x, y, sensitive_features=group)
    assert mixed.attribute_estimators_[0].coef_.shape == (1, 4)


@pytest.mark.parametrize(
    ("settings", "fit", "error", "message"),
    [
        ({"estimator": None}, {}, ValueError, "estimator is None"),
        ({"estimator": RidgeClassifier()}, {}, TypeError, "RidgeClassifier has no predict_proba. Wrap it in"),
        ({"attribute_aware": True, "attribute_estimator": LogisticRegression()}, {}, ValueError, "takes the groups"),
        ({"cv": 1.5}, {}, ValueError, "cv=1.5, expected a share"),
        ({"tol": 2}, {}, ValueError, "tol=2"),
        ({"intersect": False, "attribute_estimator": [LogisticRegression()] * 2}, {}, ValueError, "has 2 models"),
        ({}, {"sensitive_features": None}, TypeError, "sensitive_features is None"),
        ({}, {"sensitive_features": ["a"]}, ValueError, "has 1 rows, expected 60"),
        ({}, {"y": np.arange(60)}, ValueError, "y has 60 classes .* Only binary classification is supported"),
        ({}, {"y": np.zeros(59)}, ValueError, "inconsistent numbers of samples"),
    ],
)  # fmt: skip
def test_bad_settings_of_the_classifier(settings, fit, error, message):
    x, y, group = people(60)
    with pytest.raises(error, match=message):
        BiasScoreClassifier(**{"estimator": LogisticRegression(), **settings}).fit(
            x, fit.get("y", y), sensitive_features=fit.get("sensitive_features", group)
        )


def test_groups_at_prediction():
    x, y, group = people(300)
    blind = BiasScoreClassifier(LogisticRegression()).fit(x, y, sensitive_features=group)
    with pytest.raises(ValueError, match="attribute_aware=False estimates the groups"):
        blind.predict(x, sensitive_features=group)
    aware = BiasScoreClassifier(LogisticRegression(), attribute_aware=True).fit(x, y, sensitive_features=group)
    with pytest.raises(TypeError, match="sensitive_features is None"):
        aware.predict(x)
    with pytest.raises(ValueError, match=r"has the group 'x' .* which was not there at fit; known are 'f', 'm'"):
        aware.predict(x, sensitive_features=np.where(group == "f", "x", "m"))
    only = aware.predict(x[group == "f"], sensitive_features=group[group == "f"])
    np.testing.assert_array_equal(only, aware.predict(x, sensitive_features=group)[group == "f"])
    words = LogisticRegression().fit(x, group)
    with pytest.raises(ValueError, match=r"knows the classes .*'f', 'm'.* Train it on evenly.fair.joint_codes"):
        BiasScoreClassifier(
            LogisticRegression().fit(x, y), constraints="eo", attribute_estimator=words, prefit=True
        ).fit(x, y, sensitive_features=group)


# ---- beside fairlearn ----------------------------------------------------------------------------


@pytest.mark.parametrize("constraints", ["demographic_parity", "true_positive_rate_parity"])
def test_not_less_accurate_than_threshold_optimizer_where_the_group_is_known(constraints):
    postprocessing = pytest.importorskip("fairlearn.postprocessing")
    metrics = pytest.importorskip("fairlearn.metrics")
    x, y, group = people(8000)
    model = LogisticRegression().fit(np.c_[x, group == "m"][:2000], y[:2000])
    valid, test = slice(2000, 5000), slice(5000, 8000)
    wide = np.c_[x, group == "m"]
    theirs = postprocessing.ThresholdOptimizer(
        estimator=model, constraints=constraints, prefit=True, tol=0.02, predict_method="predict_proba"
    ).fit(wide[valid], y[valid], sensitive_features=group[valid])
    ours = BiasScoreClassifier(model, constraints=constraints, prefit=True, tol=0.02, attribute_aware=True)
    ours.fit(wide[valid], y[valid], sensitive_features=group[valid])
    chosen = ours.predict(wide[test], sensitive_features=group[test])
    other = theirs.predict(wide[test], sensitive_features=group[test], random_state=0)
    gap = (
        metrics.demographic_parity_difference
        if constraints == "demographic_parity"
        else metrics.equal_opportunity_difference
    )
    assert gap(y[test], chosen, sensitive_features=group[test]) < 0.06
    difference = (chosen == y[test]).astype(float) - (other == y[test])
    assert difference.mean() >= -2 * difference.std() / np.sqrt(len(difference))


def test_adult(shared_data):
    from evenly.data import load_adult

    train, test = load_adult(shared_data, split="train"), load_adult(shared_data, split="test")
    numbers = ["age", "education-num", "capital-gain", "capital-loss", "hours-per-week"]
    fair = BiasScoreClassifier(
        make_pipeline(StandardScaler(), LogisticRegression()), constraints="dp", tol=0.02, cv=3, random_state=0
    )
    fair.fit(train[numbers], train["target"], sensitive_features=train["sex"])
    decisions = fair.predict(test[numbers])
    base = fair.estimator_.predict(test[numbers])
    before = demographic_parity_difference(test["target"], base, sensitive_features=test["sex"])
    after = demographic_parity_difference(test["target"], decisions, sensitive_features=test["sex"])
    assert before > 0.07
    assert after < 0.04
    assert np.mean(decisions == test["target"]) > np.mean(base == test["target"]) - 0.05
