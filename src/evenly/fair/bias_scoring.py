r"""Bias scoring: flip the decisions that carry most bias for the least accuracy.

Takes a trained probabilistic classifier and makes its decisions satisfy demographic parity, equal opportunity or
equalized odds up to a tolerance. Nothing is retrained, and at test time the sensitive attribute is *not* needed, only
an estimate of :math:`p(A | x)`, which a second model provides. Prefer it to thresholds a group (which need A at test
time) and to in-processing (which retrains for every tolerance). Where A may be used, it is used
(``attribute_aware=True``), and the rule becomes a threshold a group. The price of not knowing A is accuracy where
:math:`p(A | x)` says little: on COMPAS demographic parity within 0.05 leaves 57 % of the decisions right without, and
66 % with the race (of 67 %); on Adult both leave 84 % (of 85 %), by ``benchmarks/fair.py``.

With :math:`η(x) = p(Y=1 | x)`, the decision :math:`\hat Y = 1[η > 1/2]` and the cost of flipping it
:math:`c(x) = |2η(x) - 1|`, a criterion asks of pairs of events :math:`(a_k, b_k)` that
:math:`|P(\hat Y{=}1 | a_k) - P(\hat Y{=}1 | b_k)| \le δ`. The bias scores are

.. math::
    f_k(x) = \frac{p(a_k | x)}{P(a_k)} - \frac{p(b_k | x)}{P(b_k)}, \qquad
    s_k(x) = (2 \hat Y(x) - 1) \frac{f_k(x)}{c(x)},

and the most accurate rule within the tolerance flips where :math:`\sum_k z_k s_k(x) > 1`, that is, it decides
:math:`1[2η(x) - 1 > \sum_k z_k f_k(x)]`. For one score this is a threshold: flip where :math:`s > t`, or
:math:`s < t` for negative :math:`t = 1/z`.

========================  ==========================================  =====
criterion                 events                                      pairs
========================  ==========================================  =====
``demographic_parity``    A=0, A=1                                    1
``equal_opportunity``     (Y=1, A=0), (Y=1, A=1)                      1
``equalized_odds``        those, and (Y=0, A=0), (Y=0, A=1)           2
========================  ==========================================  =====

An attribute of G groups has G - 1 scores a row of the table, each group against the last, and the tolerance bounds
the largest minus the smallest of the G rates. Several criteria or attributes put their scores side by side.

Cost: with one score a sort, O(n log n), exact over all thresholds. With several, the linear program over mixtures of
rules by column generation (a sort and a small program for HiGHS a round, 10 to 50 rounds), then ``directions`` more
sorts for the best single rule. The authors' search for equalized odds takes O(M² n) with M = min(n, 5000).

Reference:
    Wenlong Chen, Yegor Klochkov and Yang Liu, *Post-hoc Bias Scoring Is Optimal For Fair Classification*, ICLR 2024,
    arXiv 2310.05725.

Where the released code differs:
    Its decision for equalized odds is (argmax of the four joint classes) mod 2, which makes c negative for some
    points; here it is η > 1/2, as in the paper. Its thresholds for one score are a grid of 5,000 up to 50; here they
    are all that differ on the data, and the first one past the change of sign is a candidate too. It fails where no
    candidate is within the tolerance; here the closest is taken, with a warning, or ``randomize=True`` mixes two.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, clone
from sklearn.model_selection import StratifiedKFold, check_cv, cross_val_predict, train_test_split
from sklearn.utils import _safe_indexing, check_random_state
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _num_samples, check_consistent_length, check_is_fitted

from evenly.fair import _flips
from evenly.fair.groups import Attribute, binary_labels, read_attributes

__all__ = ["BiasScoreClassifier", "BiasScoreRule", "Event", "bias_scores"]

Array = NDArray[np.float64]


class Event(NamedTuple):
    """An event of a criterion of your own: a group, and the label where the criterion conditions on it.

    Attributes:
        group: the group label.
        label: 1, 0 or None: among positives, among negatives, among all.
        attribute: the name of the column, needed where there are several.

    >>> Event("Female", label=1)
    Event(group='Female', label=1, attribute=None)
    """

    group: Any
    label: Literal[0, 1] | None = None
    attribute: str | None = None


#: A criterion: a name, or a pair of events whose rates of positive decisions shall be close.
Constraint = str | tuple[Event, Event]


class BiasScoreRule(BaseEstimator):
    """The rule on probabilities: for models that are not scikit-learn's, such as a network with two heads.

    ``fit`` takes the probabilities of held-out rows with their labels and groups, ``predict`` takes probabilities
    alone. :class:`BiasScoreClassifier` does both ends for scikit-learn's classifiers.

    Args:
        constraints: ``"demographic_parity"`` (default), ``"equal_opportunity"``, ``"equalized_odds"``,
            ``"false_positive_rate_parity"``, the short forms ``"dp"``, ``"eop"``, ``"eo"``, fairlearn's
            ``"selection_rate_parity"`` and ``"{true,false}_{positive,negative}_rate_parity"``, a pair of
            :class:`Event`, or a sequence of these.
        tol: δ, the largest difference of rates allowed, in [0, 1]; one number, or one for each of ``constraints``.
        estimate: ``"empirical"`` (default, the paper's) counts accuracy and rates with labels and groups of the rows;
            ``"model"`` takes their expectation under the given probabilities.
        randomize: allow a mixture of rules, which meets the tolerance exactly and is the linear program's optimum
            (over all randomized rules for ``estimate="model"``). ``predict`` then draws.
        directions: how many lines of rules are tried where there is more than one score and ``randomize=False``. With
            two scores and at least 2n of them the best rule is found for certain.
        intersect: several columns of groups are one attribute (True), or one criterion each (False).
        random_state: seed of the directions, and of the draws where ``predict`` gets none.

    Attributes:
        attributes_: the :class:`~evenly.fair.groups.Attribute` of each criterion, with names and sorted groups.
        score_names_: (K,) what each score compares.
        rules_: (J, K) the z of each rule; J = 1 unless a mixture was needed. All zero: nothing flips.
        weights_: (J,) the weights of the mixture, which sum to 1.
        threshold_: t = 1 / z with its sign for one rule on one score (inf: nothing flips), else None.
        disparity_before_, disparity_: {name: largest minus smallest rate} on the rows of the fit, before and after,
            by ``estimate``.
        accuracy_before_, accuracy_, flip_rate_: on the same rows.
        priors_: for each attribute (2, G), P(Y=y, A=g).

    Raises (at fit):
        ValueError: probabilities outside [0, 1] or not summing to 1; a criterion on labels without joint probabilities;
            an event that does not occur; tol outside [0, 1]; an unknown constraint.

    Warns:
        UserWarning: no rule is within the tolerance on the rows of the fit; the closest is taken.

    >>> eta = np.array([0.9, 0.8, 0.6, 0.55, 0.3, 0.44, 0.7, 0.2])
    >>> group = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    >>> known = np.eye(2)[group]                                # the attribute is known: p(A | x) is 0 or 1
    >>> rule = BiasScoreRule("dp", tol=0.25)
    >>> rule = rule.fit(eta, known, [1, 1, 1, 0, 0, 1, 1, 0], sensitive_features=group)
    >>> rule.predict(eta, known), rule.flip_probability(eta, known)
    (array([1, 1, 1, 0, 0, 1, 1, 0]), array([0., 0., 0., 1., 0., 1., 0., 0.]))
    """

    def __init__(
        self,
        constraints: Constraint | Sequence[Constraint] = "demographic_parity",
        tol: float | Sequence[float] = 0.05,
        *,
        estimate: Literal["empirical", "model"] = "empirical",
        randomize: bool = False,
        directions: int = 64,
        intersect: bool = True,
        random_state: Any = None,
    ) -> None:
        self.constraints = constraints
        self.tol = tol
        self.estimate = estimate
        self.randomize = randomize
        self.directions = directions
        self.intersect = intersect
        self.random_state = random_state

    def fit(self, proba_y: Any, proba_a: Any, y: Any, *, sensitive_features: Any, priors: Any = None) -> BiasScoreRule:
        """Find the rule.

        Args:
            proba_y: (n,) p(Y=1 | x); None: the sum of the joint probabilities.
            proba_a: (n, G) p(A | x), or (n, 2, G) p(Y, A | x), groups in the order of their sorted labels; a list of
                these, one a column, with ``intersect=False``. Criteria on labels need the joint form. Indicators
                where A is known.
            y: (n,) labels of two classes; the larger is the positive one.
            sensitive_features: (n,) or (n, columns) group labels.
            priors: (2, G) P(Y=y, A=g) of the training set, or a list of these. Default: the shares in the rows given
                (``estimate="model"``: the means of the probabilities).

        Raises:
            ValueError: see the class.
        """
        self._check_settings()
        _, labels = binary_labels(y)
        attributes = read_attributes(sensitive_features, len(labels), intersect=self.intersect)
        families = _families(self.constraints, self.tol, attributes)
        eta, tables = _checked(proba_y, proba_a, attributes, families, len(labels))
        checked = None if priors is None else _checked_priors(priors, attributes)
        return self._fit(eta, tables, labels, attributes, families, checked)

    def bias_scores(self, proba_y: Any, proba_a: Any) -> Array:
        """(n, K) bias scores s; infinite where η is exactly 1/2."""
        f, eta = self._scores(proba_y, proba_a)
        return _bias_scores(f, eta)

    def flip_probability(self, proba_y: Any, proba_a: Any) -> Array:
        """(n,) probability that the rule changes the decision η > 1/2: 0 or 1, but for a mixture of rules."""
        f, eta = self._scores(proba_y, proba_a)
        return self._flip(f, eta)

    def predict_proba(self, proba_y: Any, proba_a: Any) -> Array:
        """(n, 2) probability of each decision: 0 or 1, but for a mixture of rules. It is not p(Y | x)."""
        f, eta = self._scores(proba_y, proba_a)
        flip, base = self._flip(f, eta), eta > 0.5
        positive = np.where(base, 1 - flip, flip)
        return np.stack([1 - positive, positive], 1)

    def predict(self, proba_y: Any, proba_a: Any, *, random_state: Any = None) -> NDArray[np.int64]:
        """(n,) decisions, 0 or 1. A mixture of rules draws for each row on its own, from ``random_state``."""
        positive = self.predict_proba(proba_y, proba_a)[:, 1]
        if len(self.weights_) == 1:
            return (positive > 0.5).astype(np.int64)
        state = check_random_state(self.random_state if random_state is None else random_state)
        return (state.uniform(size=len(positive)) < positive).astype(np.int64)

    @available_if(lambda self: len(getattr(self, "weights_", [0])) == 1)
    def decision_function(self, proba_y: Any, proba_a: Any) -> Array:
        """(n,) the margin 2η - 1 - z . f, positive where the decision is 1. Absent where the rule is a mixture."""
        f, eta = self._scores(proba_y, proba_a)
        return 2 * eta - 1 - f @ self.rules_[0]

    def _check_settings(self) -> None:
        if self.estimate not in ("empirical", "model"):
            raise ValueError(f"estimate={self.estimate!r}, expected 'empirical' or 'model'.")
        if self.directions < 0:
            raise ValueError(f"directions={self.directions}, expected at least 0.")

    def _fit(
        self,
        eta: Array,
        tables: list[Array],
        labels: NDArray[np.int64],
        attributes: list[Attribute],
        families: list[_Family],
        priors: list[Array] | None,
    ) -> BiasScoreRule:
        if self.estimate == "model":
            shares = [_expected_priors(eta, table) for table in tables]
        else:
            shares = [_observed_priors(labels, attribute) for attribute in attributes]
        self.priors_ = shares if priors is None else priors
        for family in families:
            for event in family.events:
                if not event.share(shares) > 0 or not event.share(self.priors_) > 0:
                    raise ValueError(
                        f"no row has {event.describe(attributes)}, so that its rate of positive decisions is not "
                        f"defined. Merge small groups, or choose another constraint."
                    )
        # A refit must not meet what an earlier fit left.
        self.attributes_, self._families = attributes, families
        self.score_names_ = [
            f"{family.rate}: {first.describe(attributes)} against {family.events[-1].describe(attributes)}"
            for family in families
            for first in family.events[:-1]
        ]
        self._solve(eta, tables, labels)
        return self

    def _solve(self, eta: Array, tables: list[Array], labels: NDArray[np.int64]) -> None:
        families, rows = self._families, len(eta)
        f = _f(families, tables, self.priors_)
        sign, c = _sign(eta), np.abs(2 * eta - 1)
        base = eta > 0.5
        events = [event for family in families for event in family.events]
        member = np.empty((len(events), rows))
        if self.estimate == "model":
            accuracy, gain = float(np.mean(np.maximum(eta, 1 - eta))), -c / rows
            for place, event in enumerate(events):
                member[place] = event.probability(tables)
        else:
            right = base == labels
            accuracy, gain = float(np.mean(right)), np.where(right, -1.0, 1.0) / rows
            for place, event in enumerate(events):
                member[place] = event.holds(labels, self.attributes_)
        member /= member.sum(1, keepdims=True)
        stops = np.cumsum([len(family.events) for family in families])
        slices = [
            slice(int(stop) - len(family.events), int(stop)) for stop, family in zip(stops, families, strict=True)
        ]
        problem = _flips.Problem(
            g=sign[:, None] * f,
            c=c,
            gain=gain,
            effect=-sign * member,
            accuracy=accuracy,
            rates=member[:, base].sum(1),
            families=slices,
            tol=[family.tol for family in families],
        )
        if self.randomize:
            found = _flips.mixture(problem)
        else:
            found = _flips.single(problem, self.directions, check_random_state(self.random_state))
        self.rules_, self.weights_ = found.rules, found.weights
        outcomes = [problem.of(z) for z in self.rules_]
        rates = sum(weight * outcome[1] for weight, outcome in zip(self.weights_, outcomes, strict=True))
        assert isinstance(rates, np.ndarray)
        self.accuracy_before_ = accuracy
        self.accuracy_ = float(sum(w * outcome[0] for w, outcome in zip(self.weights_, outcomes, strict=True)))
        self.flip_rate_ = float(self._flip(f, eta).mean())
        names = [family.describe(self.attributes_) for family in families]
        self.disparity_before_ = {
            name: float(np.ptp(problem.rates[part])) for name, part in zip(names, slices, strict=True)
        }
        self.disparity_ = {name: float(np.ptp(rates[part])) for name, part in zip(names, slices, strict=True)}
        self.threshold_ = None
        if self.rules_.shape == (1, 1):
            self.threshold_ = float(1 / self.rules_[0, 0]) if self.rules_[0, 0] else float("inf")
        if found.excess > 0:
            fix = "" if self.randomize else " randomize=True mixes rules and can come closer;"
            warnings.warn(
                f"No rule is within the tolerance on the {rows} rows of the fit: the closest exceeds it by "
                f"{found.excess:.3g} and is used.{fix} more rows or a larger tol help.",
                UserWarning,
                stacklevel=3,
            )

    def _scores(self, proba_y: Any, proba_a: Any) -> tuple[Array, Array]:
        check_is_fitted(self, "rules_")
        eta, tables = _checked(proba_y, proba_a, self.attributes_, self._families, None)
        return _f(self._families, tables, self.priors_), eta

    def _flip(self, f: Array, eta: Array) -> Array:
        g, c = _sign(eta)[:, None] * f, np.abs(2 * eta - 1)
        flip = np.zeros(len(eta))
        for z, weight in zip(self.rules_, self.weights_, strict=True):
            flip += weight * _flips.flips(g, c, z)
        return np.minimum(flip, 1.0) if len(self.weights_) > 1 else flip


class BiasScoreClassifier(ClassifierMixin, MetaEstimatorMixin, BaseEstimator):
    """A scikit-learn classifier made fair by flipping the decisions with the largest bias scores.

    Args:
        estimator: a classifier with ``predict_proba``. Probabilities should be calibrated; where they are not, wrap it
            in ``sklearn.calibration.CalibratedClassifierCV``.
        constraints, tol, estimate, randomize, directions, intersect: as in :class:`BiasScoreRule`.
        attribute_aware: use the group of each row at prediction, given as ``sensitive_features=``. Default: it is not
            needed, and estimated from ``X``.
        attribute_estimator: a classifier with ``predict_proba`` for the groups (demographic parity), or for labels and
            groups together (criteria on labels), trained on :func:`~evenly.fair.joint_codes`. Default: a clone of
            ``estimator``. With ``intersect=False`` one for all columns, or a list of one a column. Not with
            ``attribute_aware=True``.
        prefit: ``estimator``, and ``attribute_estimator`` where it is given, are fitted and used as they are. The rows
            given to ``fit`` should then be rows that they have not seen. A fitted ``attribute_estimator`` has the
            groups as its classes, or the numbers of :func:`~evenly.fair.joint_codes`.
        cv: on which probabilities the rule is fitted where a model is fitted here. An integer or a splitter (default
            5): out of fold, the models are then fitted again on all rows; a number in (0, 1): that share of the rows
            is held out and not used to fit the models, as in the paper; None: on the rows that the models were fitted
            on, which is optimistic (as fairlearn's ``ThresholdOptimizer`` does).
        random_state: seed of folds, directions and draws.

    Attributes:
        classes_: (2,) the classes; the second is the positive decision.
        estimator_: the classifier of the labels.
        attribute_estimators_: one model an attribute; empty with ``attribute_aware=True``.
        rule_: the fitted :class:`BiasScoreRule`, with thresholds, disparities and accuracy on the rows it was fitted
            on. It describes those rows: on other rows a difference of rates varies by O(1/sqrt(rows of the group)).

    The probabilities of (Y, A) that criteria on labels need are η(x), from ``estimator``, times p(A | x, Y), from the
    joint model: so that decisions and costs are those of ``estimator``. (The paper takes η from the joint model, too;
    :class:`BiasScoreRule` with ``proba_y=None`` does.) Where the joint model gives a label no probability at all, the
    shares of the groups among that label stand in.

    Raises (at fit):
        ValueError: see :class:`BiasScoreRule`; also no estimator, labels of other than two classes, lengths that
            differ, an unknown setting.
        TypeError: a model without ``predict_proba``; no ``sensitive_features``.

    >>> from sklearn.datasets import make_classification
    >>> from sklearn.linear_model import LogisticRegression
    >>> X, y = make_classification(600, n_informative=4, random_state=0)
    >>> group = np.where(X[:, 0] + X[:, 1] > 0, "a", "b")
    >>> fair = BiasScoreClassifier(LogisticRegression(), constraints="dp", tol=0.02, random_state=0)
    >>> fair = fair.fit(X, y, sensitive_features=group)
    >>> from evenly.fair import demographic_parity_difference
    >>> before = demographic_parity_difference(y, fair.estimator_.predict(X), sensitive_features=group)
    >>> after = demographic_parity_difference(y, fair.predict(X), sensitive_features=group)
    >>> bool(after < before)
    True
    """

    def __init__(
        self,
        estimator: Any = None,
        *,
        constraints: Constraint | Sequence[Constraint] = "demographic_parity",
        tol: float | Sequence[float] = 0.05,
        attribute_aware: bool = False,
        attribute_estimator: Any = None,
        prefit: bool = False,
        cv: Any = 5,
        estimate: Literal["empirical", "model"] = "empirical",
        randomize: bool = False,
        directions: int = 64,
        intersect: bool = True,
        random_state: Any = None,
    ) -> None:
        self.estimator = estimator
        self.constraints = constraints
        self.tol = tol
        self.attribute_aware = attribute_aware
        self.attribute_estimator = attribute_estimator
        self.prefit = prefit
        self.cv = cv
        self.estimate = estimate
        self.randomize = randomize
        self.directions = directions
        self.intersect = intersect
        self.random_state = random_state

    def fit(self, X: Any, y: Any, *, sensitive_features: Any) -> BiasScoreClassifier:
        """Fit the models that are not fitted yet, and the rule.

        Args:
            X: (n, features) an array or a pandas or polars table, handed to the models as it is.
            y: (n,) labels of two classes.
            sensitive_features: (n,) or (n, columns) group labels: a list, an array, a pandas or polars column or
                table, or a mapping of columns.

        Raises:
            ValueError, TypeError: see the class.
        """
        self._check_settings()
        rule = BiasScoreRule(
            self.constraints,
            self.tol,
            estimate=self.estimate,
            randomize=self.randomize,
            directions=self.directions,
            intersect=self.intersect,
            random_state=self.random_state,
        )
        rule._check_settings()
        check_consistent_length(X, y)
        check_classification_targets(y)
        classes, labels = binary_labels(y)
        attributes = read_attributes(sensitive_features, _num_samples(X), intersect=self.intersect)
        families = _families(self.constraints, self.tol, attributes)
        joint = [
            any(event.label is not None for family in families for event in family.events if event.attribute == place)
            for place in range(len(attributes))
        ]
        targets = [
            labels * len(attribute.groups) + attribute.codes if both else attribute.codes
            for attribute, both in zip(attributes, joint, strict=True)
        ]
        self.classes_, self._attributes, self._joint = classes, attributes, joint
        self._shares = [_observed_priors(labels, attribute) for attribute in attributes]
        templates = self._attribute_templates()

        models = [(self.estimator, classes[labels], self.prefit or _frozen(self.estimator))]
        given = self.prefit and self.attribute_estimator is not None
        for template, target in zip(templates, targets, strict=False):  # no template where the groups are known
            models.append((template, target, given or _frozen(template)))
        self._by_code = [not fitted for _, _, fitted in models[1:]]
        strata = labels
        for attribute in attributes:
            strata = strata * len(attribute.groups) + attribute.codes
        kept, raw, final = self._probabilities_of_models(X, strata, models)
        self.estimator_, self.attribute_estimators_ = final[0], final[1:]
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(self.estimator_, name):
                setattr(self, name, getattr(self.estimator_, name))

        eta = self._positive(*raw[0])
        kept_attributes = [Attribute(a.name, a.groups, a.codes[kept]) for a in attributes]
        tables = self._tables(eta, raw[1:], kept_attributes)
        priors = self._shares if self.estimate == "empirical" else None
        self.rule_ = rule._fit(eta, tables, labels[kept], kept_attributes, families, priors)
        return self

    def predict(self, X: Any, *, sensitive_features: Any = None, random_state: Any = None) -> NDArray[Any]:
        """(n,) decisions, as labels of ``classes_``.

        Args:
            X: (n, features).
            sensitive_features: the group of each row, with ``attribute_aware=True`` only.
            random_state: of the draws where ``randomize=True``. Default: that of the constructor.

        Raises:
            ValueError: an unknown group, or groups given where they are not used.
            TypeError: no groups where they are used.
        """
        inputs = self._inputs(X, sensitive_features)
        return self.classes_[self.rule_.predict(*inputs, random_state=random_state)]

    def predict_proba(self, X: Any, *, sensitive_features: Any = None) -> Array:
        """(n, 2) probability of each decision: 0 or 1, but with ``randomize=True``. It is not p(Y | x)."""
        inputs = self._inputs(X, sensitive_features)
        return self.rule_.predict_proba(*inputs)

    def flip_probability(self, X: Any, *, sensitive_features: Any = None) -> Array:
        """(n,) probability that the decision of ``estimator_`` is changed: 0 or 1, but with ``randomize=True``."""
        inputs = self._inputs(X, sensitive_features)
        return self.rule_.flip_probability(*inputs)

    def bias_scores(self, X: Any, *, sensitive_features: Any = None) -> Array:
        """(n, K) bias scores; ``rule_.score_names_`` says what each compares."""
        inputs = self._inputs(X, sensitive_features)
        return self.rule_.bias_scores(*inputs)

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import get_tags  # of scikit-learn 1.6 and later, as is this method

        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        models = [self.estimator, *_listed(self.attribute_estimator)]
        tags.input_tags.sparse = all(get_tags(model).input_tags.sparse for model in models if model is not None)
        return tags

    def _check_settings(self) -> None:
        if self.estimator is None:
            raise ValueError("estimator is None, expected a classifier, such as LogisticRegression().")
        given = self.attribute_estimator
        if self.attribute_aware and given is not None:
            raise ValueError("attribute_estimator is given with attribute_aware=True, which takes the groups as given.")
        for model in (self.estimator, *_listed(given)):
            if model is not None and not hasattr(model, "predict_proba"):
                raise TypeError(
                    f"{type(model).__name__} has no predict_proba. Wrap it in "
                    f"sklearn.calibration.CalibratedClassifierCV, which gives it one."
                )
        if isinstance(self.cv, float) and not 0 < self.cv < 1:
            raise ValueError(f"cv={self.cv}, expected a share in (0, 1), a number of folds, a splitter or None.")

    def _attribute_templates(self) -> list[Any]:
        count = len(self._attributes)
        if self.attribute_aware:
            return []
        given = self.attribute_estimator
        if isinstance(given, list | tuple):
            if len(given) != count:
                raise ValueError(f"attribute_estimator has {len(given)} models, expected {count}, one a column.")
            return list(given)
        if given is None:
            given = self.estimator
            if _frozen(given):
                given = given.estimator
            try:
                given = clone(given)
            except TypeError as error:
                raise TypeError(
                    f"{type(given).__name__} cannot be cloned to model the groups. Give attribute_estimator=."
                ) from error
        elif self.prefit and count > 1:
            raise ValueError(f"attribute_estimator is one fitted model for {count} columns; give a list, one a column.")
        return [given] * count

    def _probabilities_of_models(
        self, X: Any, strata: NDArray[np.int64], models: list[tuple[Any, NDArray[Any], bool]]
    ) -> tuple[NDArray[np.int64], list[tuple[Array, NDArray[Any]]], list[Any]]:
        # Rows that the rule is fitted on, each model's probabilities of them with its classes, and the final models.
        every = np.arange(len(strata))
        if self.cv is None or all(fitted for _, _, fitted in models):
            final = [model if fitted else clone(model).fit(X, target) for model, target, fitted in models]
            return every, [(_proba(model, X), model.classes_) for model in final], final
        if isinstance(self.cv, float):
            train, kept = _held_out(every, strata, self.cv, self.random_state)
            part, rest = _safe_indexing(X, train), _safe_indexing(X, kept)
            final = [model if fitted else clone(model).fit(part, target[train]) for model, target, fitted in models]
            return kept, [(_proba(model, rest), model.classes_) for model in final], final
        folds = _folds(self.cv, strata, self.random_state)
        raw, final = [], []
        for model, target, fitted in models:
            if fitted:
                final.append(model)
                raw.append((_proba(model, X), model.classes_))
                continue
            raw.append((cross_val_predict(model, X, target, cv=folds, method="predict_proba"), np.unique(target)))
            final.append(clone(model).fit(X, target))
        return every, raw, final

    def _inputs(self, X: Any, sensitive_features: Any) -> tuple[Array, list[Array]]:
        check_is_fitted(self, "rule_")
        if not self.attribute_aware and sensitive_features is not None:
            raise ValueError(
                "sensitive_features is given, but attribute_aware=False estimates the groups from X. Leave it out, or "
                "fit with attribute_aware=True."
            )
        eta = self._positive(_proba(self.estimator_, X), self.estimator_.classes_)
        known: list[Attribute] = []
        raw: list[tuple[Array, NDArray[Any]]] = []
        if self.attribute_aware:
            given = read_attributes(sensitive_features, len(eta), intersect=self.intersect)
            if len(given) != len(self._attributes):
                raise ValueError(f"sensitive_features has {len(given)} columns, expected {len(self._attributes)}.")
            known = [Attribute(a.name, a.groups, a.encode(b)) for a, b in zip(self._attributes, given, strict=True)]
        else:
            raw = [(_proba(model, X), model.classes_) for model in self.attribute_estimators_]
        return eta, self._tables(eta, raw, known)

    def _positive(self, proba: Array, classes: NDArray[Any]) -> Array:
        if len(classes) != 2 or set(np.asarray(classes).tolist()) != set(self.classes_.tolist()):
            raise ValueError(
                f"estimator knows the classes {np.asarray(classes).tolist()}, but y has {self.classes_.tolist()}; "
                f"expected the same two."
            )
        return proba[:, list(np.asarray(classes).tolist()).index(self.classes_[1].item())]

    def _tables(self, eta: Array, raw: list[tuple[Array, NDArray[Any]]], known: list[Attribute]) -> list[Array]:
        # For each attribute p(A | x) of shape (n, G), or p(Y, A | x) of shape (n, 2, G).
        of_label = np.stack([1 - eta, eta], 1)
        tables = []
        for place, (attribute, joint) in enumerate(zip(self._attributes, self._joint, strict=True)):
            size = len(attribute.groups)
            if self.attribute_aware:
                indicator = np.zeros((len(eta), size))
                indicator[np.arange(len(eta)), known[place].codes] = 1
                tables.append(of_label[:, :, None] * indicator[:, None] if joint else indicator)
                continue
            proba, kind = _spread(*raw[place], attribute, joint, self._by_code[place])
            if kind == "joint":
                shares = self._shares[place] / np.maximum(self._shares[place].sum(1, keepdims=True), 1e-300)
                total = proba.sum(2, keepdims=True)
                given_label = np.where(total > 0, proba / np.where(total > 0, total, 1), shares)
                proba = of_label[:, :, None] * given_label
            tables.append(proba)
        return tables


def bias_scores(
    proba_y: Any, proba_a: Any, priors: Any, constraints: Constraint | Sequence[Constraint] = "demographic_parity"
) -> Array:
    """Bias scores of rows, from probabilities alone.

    Args:
        proba_y: (n,) p(Y=1 | x); None: the sum of the joint probabilities.
        proba_a: (n, G) p(A | x), or (n, 2, G) p(Y, A | x).
        priors: (2, G) P(Y=y, A=g).
        constraints: as in :class:`BiasScoreRule`; groups of an :class:`Event` are the numbers 0 .. G-1.

    Returns:
        (n, K): positive where the decision favours the first event of its pair. 0 where f is 0, infinite where η is
        exactly 1/2 and f is not 0.

    Raises:
        ValueError: probabilities outside [0, 1] or not summing to 1, a wrong shape, an event of no probability.

    >>> bias_scores([0.75, 0.25], [[0.5, 0.5], [1.0, 0.0]], priors=[[0.25, 0.25], [0.25, 0.25]])
    array([[ 0.],
           [-4.]])
    """
    table = np.asarray(priors, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] != 2:
        raise ValueError(f"priors has shape {table.shape}, expected (2, G): P(Y=y, A=g).")
    attributes = [Attribute("sensitive_feature", tuple(range(table.shape[1])), np.zeros(0, dtype=np.int64))]
    shares = _checked_priors(table, attributes)
    families = _families(constraints, 0.0, attributes)
    for family in families:
        for event in family.events:
            if not event.share(shares) > 0:
                raise ValueError(f"priors gives {event.describe(attributes)} no probability.")
    eta, tables = _checked(proba_y, proba_a, attributes, families, None)
    return _bias_scores(_f(families, tables, shares), eta)


class _Event(NamedTuple):
    attribute: int
    label: int | None
    group: int

    def probability(self, tables: Sequence[Array]) -> Array:
        table = tables[self.attribute]
        if self.label is not None:
            return table[:, self.label, self.group]
        return table[:, self.group] if table.ndim == 2 else table[:, :, self.group].sum(1)

    def share(self, priors: Sequence[Array]) -> float:
        column = priors[self.attribute][:, self.group]
        return float(column.sum() if self.label is None else column[self.label])

    def holds(self, labels: NDArray[np.int64], attributes: Sequence[Attribute]) -> NDArray[np.bool_]:
        own = attributes[self.attribute].codes == self.group
        return own if self.label is None else own & (labels == self.label)

    def describe(self, attributes: Sequence[Attribute]) -> str:
        attribute = attributes[self.attribute]
        group = f"{attribute.name}={attribute.groups[self.group]!r}"
        return group if self.label is None else f"{group} and a {('negative', 'positive')[self.label]} label"


class _Family(NamedTuple):
    rate: str
    tol: float
    events: tuple[_Event, ...]
    own: bool  # a pair of events of the user's

    def describe(self, attributes: Sequence[Attribute]) -> str:
        if self.own:
            return f"{self.rate}: {' against '.join(event.describe(attributes) for event in self.events)}"
        return f"{self.rate} by {attributes[self.events[0].attribute].name}"


_RATES = {None: "selection rate", 1: "true positive rate", 0: "false positive rate"}
_CONSTRAINTS: dict[str, tuple[Literal[0, 1] | None, ...]] = {
    "demographic_parity": (None,),
    "equal_opportunity": (1,),
    "equalized_odds": (1, 0),
    "selection_rate_parity": (None,),
    "true_positive_rate_parity": (1,),
    "false_negative_rate_parity": (1,),
    "false_positive_rate_parity": (0,),
    "true_negative_rate_parity": (0,),
    "dp": (None,),
    "eop": (1,),
    "eo": (1, 0),
}


def _families(
    constraints: Constraint | Sequence[Constraint], tol: float | Sequence[float], attributes: Sequence[Attribute]
) -> list[_Family]:
    listed: list[Any] = [constraints] if isinstance(constraints, str) or _is_pair(constraints) else list(constraints)
    if not listed:
        raise ValueError("constraints is empty, expected at least one, such as 'demographic_parity'.")
    tols: list[Any] = list(tol) if isinstance(tol, Sequence | np.ndarray) else [tol] * len(listed)
    if len(tols) != len(listed):
        raise ValueError(f"tol has {len(tols)} numbers for {len(listed)} constraints; expected one for each, or one.")
    found: dict[tuple[_Event, ...], _Family] = {}
    for constraint, allowed in zip(listed, tols, strict=True):
        if not 0 <= allowed <= 1:
            raise ValueError(f"tol={allowed}, expected a difference of rates in [0, 1].")
        for family in _read(constraint, float(allowed), attributes):
            known = found.get(family.events)
            if known is None or family.tol < known.tol:
                found[family.events] = family
    for family in found.values():
        if len(family.events) < 2:
            (group,) = attributes[family.events[0].attribute].groups
            raise ValueError(
                f"{attributes[family.events[0].attribute].name} has one group, {group!r}; expected two or more."
            )
    return list(found.values())


def _read(constraint: Any, tol: float, attributes: Sequence[Attribute]) -> Iterable[_Family]:
    if _is_pair(constraint):
        pair = tuple(_event(event, attributes) for event in constraint)
        if pair[0] == pair[1]:
            raise ValueError(f"the constraint {constraint!r} compares an event with itself.")
        yield _Family("rate of positive decisions", tol, pair, own=True)
        return
    if not isinstance(constraint, str) or constraint not in _CONSTRAINTS:
        raise ValueError(
            f"the constraint {constraint!r} is unknown, expected one of {', '.join(map(repr, _CONSTRAINTS))}, or a "
            f"pair of Event."
        )
    for label in _CONSTRAINTS[constraint]:
        for place, attribute in enumerate(attributes):
            events = tuple(_Event(place, label, group) for group in range(len(attribute.groups)))
            yield _Family(_RATES[label], tol, events, own=False)


def _is_pair(constraint: Any) -> bool:
    return (
        isinstance(constraint, list | tuple)
        and len(constraint) == 2
        and all(isinstance(event, Event) for event in constraint)
    )


def _event(event: Event, attributes: Sequence[Attribute]) -> _Event:
    names = [attribute.name for attribute in attributes]
    if event.attribute is None and len(names) > 1:
        raise ValueError(f"{event!r} does not say which attribute; expected attribute= one of {names}.")
    if event.attribute is not None and event.attribute not in names:
        raise ValueError(f"{event!r} names an unknown attribute, expected one of {names}.")
    place = 0 if event.attribute is None else names.index(event.attribute)
    groups = attributes[place].groups
    if event.group not in groups:
        raise ValueError(f"{event!r} names an unknown group, expected one of {list(groups)}.")
    if event.label not in (None, 0, 1):
        raise ValueError(f"{event!r} has the label {event.label!r}, expected 1, 0 or None.")
    return _Event(place, event.label, groups.index(event.group))


def _checked(
    proba_y: Any, proba_a: Any, attributes: Sequence[Attribute], families: Sequence[_Family], rows: int | None
) -> tuple[Array, list[Array]]:
    listed = list(proba_a) if isinstance(proba_a, list | tuple) and np.ndim(proba_a[0]) > 1 else [proba_a]
    if len(listed) != len(attributes):
        raise ValueError(f"proba_a has {len(listed)} arrays for {len(attributes)} attributes; expected one for each.")
    tables = []
    for attribute, given in zip(attributes, listed, strict=True):
        table = np.asarray(given, dtype=np.float64)
        size = len(attribute.groups)
        if table.ndim not in (2, 3) or table.shape[1:] not in ((size,), (2, size)):
            raise ValueError(
                f"proba_a has shape {table.shape} for the {size} groups of {attribute.name}; expected (n, {size}), "
                f"p(A | x), or (n, 2, {size}), p(Y, A | x)."
            )
        _check_distribution(table.reshape(len(table), -1), "proba_a", "of each row")
        tables.append(table)
    for family in families:
        for event in family.events:
            if event.label is not None and tables[event.attribute].ndim == 2:
                raise ValueError(
                    f"the {family.rate} conditions on the label, which needs p(Y, A | x): proba_a of shape "
                    f"(n, 2, {tables[event.attribute].shape[1]}), got {tables[event.attribute].shape}."
                )
    if proba_y is None:
        if tables[0].ndim == 2:
            raise ValueError("proba_y is None, which needs joint probabilities of shape (n, 2, G) in proba_a.")
        eta = tables[0][:, 1].sum(1)
    else:
        eta = np.asarray(proba_y, dtype=np.float64)
    if eta.ndim != 1:
        raise ValueError(f"proba_y has shape {eta.shape}, expected (n,): p(Y=1 | x), as in predict_proba(X)[:, 1].")
    wrong = ~((eta >= 0) & (eta <= 1 + 1e-9))
    if wrong.any():
        raise ValueError(f"proba_y has {eta[wrong][0]}, expected probabilities in [0, 1].")
    lengths = {len(eta), *(len(table) for table in tables), *([] if rows is None else [rows])}
    if len(lengths) > 1:
        raise ValueError(f"proba_y, proba_a and y have {sorted(lengths)} rows; expected as many.")
    return eta, tables


def _check_distribution(table: Array, what: str, where: str) -> None:
    wrong = ~((table >= 0) & (table <= 1 + 1e-9))
    if wrong.any():
        raise ValueError(f"{what} has {table[wrong][0]}, expected probabilities in [0, 1].")
    totals = table.sum(1)
    off = np.abs(totals - 1) > 1e-4
    if off.any():
        raise ValueError(f"the probabilities {where} in {what} sum to {totals[off][0]:.6g}, expected 1.")


def _checked_priors(priors: Any, attributes: Sequence[Attribute]) -> list[Array]:
    listed = list(priors) if isinstance(priors, list | tuple) and np.ndim(priors[0]) == 2 else [priors]
    if len(listed) != len(attributes):
        raise ValueError(f"priors has {len(listed)} tables for {len(attributes)} attributes; expected one for each.")
    tables = []
    for attribute, given in zip(attributes, listed, strict=True):
        table = np.asarray(given, dtype=np.float64)
        if table.shape != (2, len(attribute.groups)):
            raise ValueError(f"priors has shape {table.shape}, expected (2, {len(attribute.groups)}): P(Y=y, A=g).")
        _check_distribution(table.reshape(1, -1), "priors", "of all events")
        tables.append(table)
    return tables


def _observed_priors(labels: NDArray[np.int64], attribute: Attribute) -> Array:
    size = len(attribute.groups)
    return np.bincount(labels * size + attribute.codes, minlength=2 * size).reshape(2, size) / len(labels)


def _expected_priors(eta: Array, table: Array) -> Array:
    if table.ndim == 3:
        return table.mean(0)
    # Without a joint model only the sums over labels are used.
    return np.stack([((1 - eta)[:, None] * table).mean(0), (eta[:, None] * table).mean(0)])


def _f(families: Sequence[_Family], tables: Sequence[Array], priors: Sequence[Array]) -> Array:
    columns = []
    for family in families:
        ratios = [event.probability(tables) / event.share(priors) for event in family.events]
        for ratio in ratios[:-1]:
            f = ratio - ratios[-1]
            # What rounding leaves of 0 would be an infinite score at a coin toss.
            columns.append(np.where(np.abs(f) <= 1e-12 * np.maximum(ratio, ratios[-1]), 0.0, f))
    return np.stack(columns, 1)


def _sign(eta: Array) -> Array:
    return np.where(eta > 0.5, 1.0, -1.0)


def _bias_scores(f: Array, eta: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = _sign(eta)[:, None] * f / np.abs(2 * eta - 1)[:, None]
    return np.where(f == 0, 0.0, scores)


def _listed(models: Any) -> list[Any]:
    return list(models) if isinstance(models, list | tuple) else [models]


def _frozen(model: Any) -> bool:
    return type(model).__name__ == "FrozenEstimator"  # of scikit-learn 1.6 and later


def _proba(model: Any, X: Any) -> Array:
    return np.asarray(model.predict_proba(X), dtype=np.float64)


def _spread(proba: Array, classes: NDArray[Any], attribute: Attribute, joint: bool, by_code: bool) -> tuple[Array, str]:
    # The columns of an attribute model in the places of the groups, or of labels and groups. A model that was fitted
    # here has the numbers of groups, or of labels and groups, as its classes.
    size, known = len(attribute.groups), np.asarray(classes).tolist()
    numbers = all(isinstance(label, int) and 0 <= label < 2 * size for label in known)
    if by_code:
        places, kind = known, "joint" if joint else "groups"
    elif not joint and set(known) <= set(attribute.groups):
        places, kind = [attribute.groups.index(label) for label in known], "groups"
    elif numbers and not joint and max(known) < size:
        places, kind = known, "groups"
    elif numbers and max(known) >= size:
        places, kind = known, "joint"
    else:
        wanted = f"the groups {list(attribute.groups)}"
        if joint:
            wanted = (
                f"numbers label * {size} + group below {2 * size}: a criterion on labels needs p(Y, A | x). Train it "
                f"on evenly.fair.joint_codes(y, sensitive_features)"
            )
        raise ValueError(f"attribute_estimator knows the classes {known}, expected {wanted}.")
    table = np.zeros((len(proba), size if kind == "groups" else 2 * size))
    table[:, places] = proba
    return (table, kind) if kind == "groups" else (table.reshape(-1, 2, size), kind)


def _folds(cv: Any, strata: NDArray[np.int64], random_state: Any) -> list[tuple[Any, Any]]:
    splitter = cv
    if isinstance(cv, int | np.integer):
        splitter = StratifiedKFold(int(cv), shuffle=True, random_state=check_random_state(random_state))
    with warnings.catch_warnings():
        # Labels and groups together may have combinations that are rarer than folds.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        return list(check_cv(splitter, strata, classifier=True).split(np.zeros(len(strata)), strata))


def _held_out(
    every: NDArray[np.int64], strata: NDArray[np.int64], share: float, random_state: Any
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    _, strata, counts = np.unique(strata, return_inverse=True, return_counts=True)
    rare = counts[strata] < 2
    strata = np.where(rare, -1, strata)  # combinations of one row are put together
    if rare.sum() == 1:
        strata = np.where(rare, strata[~rare][0], strata)
    train, kept = train_test_split(every, test_size=share, stratify=strata, random_state=random_state)
    return np.sort(train), np.sort(kept)
