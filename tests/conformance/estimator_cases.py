"""The table of estimators: one row an estimator with its settings, held to the suite in test_estimators.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import _num_samples

from evenly.fair import BiasScoreClassifier
from evenly.stats import PHIStandardizer

#: A "transformer" gives `transform`, a "classifier" `predict` (and its `output` may be `predict_proba`).
Kind = Literal["transformer", "classifier", "regressor"]


@dataclass(frozen=True)
class Sample:
    """What an estimator is fitted on: ``fit(x, *labels, **keywords)``, ``predict(x, **keywords)``."""

    x: Any
    labels: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def rows(self, index: Any) -> Sample:
        """Some of the rows, of everything."""
        return Sample(
            self.x[index],
            tuple(label[index] for label in self.labels),
            {key: value[index] for key, value in self.keywords.items()},
        )

    def replace(self, x: Any) -> Sample:
        """The same rows with other features."""
        return Sample(x, self.labels, self.keywords)


@dataclass(frozen=True)
class EstimatorCase:
    """An estimator: ``make(**more)`` builds it, with ``settings`` in the place of its defaults."""

    name: str
    object: str  # "module:Name", as in the catalog
    make: Callable[..., Any]
    catalog: str
    kind: Kind = "transformer"
    settings: Mapping[str, Any] = field(default_factory=dict)
    groups: bool = False  # needs keyword sensitive_features= in fit and predict
    groups_at_predict: bool = True
    output: str = ""  # the method whose result is compared; default: transform, or predict
    tensors: bool = False  # takes torch tensors (..., d) and gives them back
    features: int = 4  # columns of the data
    equivariant: bool = True  # the output does not depend on the scale of the features
    constant: str | None = None  # message for data with a constant column; None: it is taken
    few: str | None = None  # message for fewer rows than columns; None: they are taken
    refuses: tuple[tuple[dict[str, Any], str], ...] = ()  # settings and a part of the message
    checked: Callable[[], Any] | None = None  # what scikit-learn's checks get where groups are needed; None: case()
    expected_failures: Mapping[str, str] = field(default_factory=dict)  # scikit-learn's check: why it cannot hold
    accuracy: float = 1e-5  # in float32, relative to the largest output

    def __call__(self, **more: Any) -> Any:
        return self.make(**{**self.settings, **more})

    def __str__(self) -> str:
        return self.name

    def data(self, n: int = 60, seed: int = 0, dtype: Any = np.float64) -> Sample:
        """Correlated columns with means; labels that they predict; two groups."""
        rng = np.random.default_rng(seed)
        mix = np.random.default_rng(99).normal(size=(self.features, self.features)) + np.eye(self.features)
        z = rng.normal(size=(n, self.features))
        x = (z @ mix + 3 * np.arange(self.features)).astype(dtype)
        labels: tuple[Any, ...] = ()
        score = z[:, 0] + 0.5 * rng.normal(size=n)
        if self.kind == "classifier":
            labels = ((score > 0).astype(int),)
        elif self.kind == "regressor":
            labels = (score,)
        return Sample(x, labels, {"sensitive_features": rng.integers(0, 2, n)} if self.groups else {})

    def fit(self, estimator: Any, sample: Sample) -> Any:
        return estimator.fit(sample.x, *sample.labels, **sample.keywords)

    def apply(self, estimator: Any, sample: Sample) -> Any:
        method = self.output or ("transform" if self.kind == "transformer" else "predict")
        keywords = sample.keywords if self.groups_at_predict else {}
        return getattr(estimator, method)(sample.x, **keywords)


_SETTINGS = (
    ({"method": "pcaa"}, "method='pcaa' is unknown, expected one of 'phi-s', "),
    ({"rotation": "random"}, "rotation='random' is unknown, expected one of 'auto', "),
    ({"correction": 2}, "correction=2, expected 0 or 1"),
)
_NO_EPS = (*_SETTINGS, ({"eps": 1e-5}, "is for whitening and 'standard'"))
_EPS = (
    *_SETTINGS,
    ({"eps": -1.0}, "eps=-1.0, expected a finite number of at least 0"),
    ({"eps": float("inf")}, "eps=inf, expected a finite"),
)
_SINGULAR = "is singular"


def _standardizer(method: str, name: str = "", *, settings: Mapping[str, Any] | None = None, **more: Any):
    return EstimatorCase(
        name or f"PHIStandardizer ({method})",
        "evenly.stats:PHIStandardizer",
        PHIStandardizer,
        "phi-s",
        settings={"method": method, **(settings or {})},
        tensors=True,
        **more,
    )


_FAIR = (
    ({"estimator": None}, "estimator is None"),
    ({"constraints": "parity"}, "the constraint 'parity' is unknown"),
    ({"tol": -0.1}, "tol=-0.1, expected a difference of rates in [0, 1]"),
    ({"estimate": "true"}, "estimate='true', expected 'empirical' or 'model'"),
    ({"directions": -1}, "directions=-1"),
    ({"cv": 1.5}, "cv=1.5, expected a share"),
)


def _bias_score(name: str, **settings: Any) -> EstimatorCase:
    # On the rows that the models saw (cv=None), so that the order of the rows does not matter.
    return EstimatorCase(
        name,
        "evenly.fair:BiasScoreClassifier",
        _grouped,
        "bias-scoring",
        kind="classifier",
        settings={"cv": None, "tol": 0.3, "random_state": 0, "directions": 32, **settings},
        groups=True,
        groups_at_predict=settings.get("attribute_aware", False),
        checked=lambda: _GroupsByRow(LogisticRegression(), **{**_LENIENT, **settings}),
        few="y has 1 class",  # the labels of three rows
        refuses=_FAIR,
    )


_LENIENT = {"cv": None, "tol": 1.0}  # the checks want the decisions of a good classifier


class _GroupsByRow(BiasScoreClassifier):
    """For scikit-learn's checks, which give no groups: the group of a row changes every second row."""

    def fit(self, X: Any, y: Any, *, sensitive_features: Any = None) -> BiasScoreClassifier:
        if sensitive_features is None:
            sensitive_features = np.arange(_num_samples(X)) // 2 % 2
        return super().fit(X, y, sensitive_features=sensitive_features)


def _grouped(**settings: Any) -> BiasScoreClassifier:
    return BiasScoreClassifier(**{"estimator": make_pipeline(StandardScaler(), LogisticRegression()), **settings})


ESTIMATORS = (
    _standardizer("phi-s", "PHIStandardizer", refuses=_NO_EPS),
    _standardizer("phi-s", "PHIStandardizer (width 6)", features=6),
    _standardizer("global", refuses=_NO_EPS),
    _standardizer("standard", constant="1 of 4 features are constant (the first is number 2)", refuses=_EPS),
    _standardizer("pca", constant=_SINGULAR, few=_SINGULAR, refuses=_EPS),
    _standardizer("zca", constant=_SINGULAR, few=_SINGULAR),
    _standardizer("zca", "PHIStandardizer (zca, eps)", settings={"eps": 1e-2}, equivariant=False),
    _standardizer("cholesky", constant=_SINGULAR, few=_SINGULAR),
    _standardizer("hadamard", constant=_SINGULAR, few=_SINGULAR),
    _standardizer("none", equivariant=False, refuses=_NO_EPS),
    _bias_score("BiasScoreClassifier"),
    _bias_score("BiasScoreClassifier (aware)", attribute_aware=True),
    _bias_score("BiasScoreClassifier (odds)", constraints="equalized_odds"),
)
