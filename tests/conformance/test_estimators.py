"""What every estimator must do. The rows are in estimator_cases.py; each check runs for each row."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator

from conformance.cases import devices
from conformance.estimator_cases import ESTIMATORS

every_estimator = pytest.mark.parametrize("case", ESTIMATORS, ids=str)


def fitted(case, sample=None, **more):
    return case.fit(case(**more), sample or case.data())


def assert_close(got, want, tolerance=1e-9):
    got, want = np.asarray(got, dtype=float), np.asarray(want, dtype=float)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1e-300, np.abs(want).max()))


@every_estimator
def test_scikit_learn(case):
    """All of scikit-learn's checks; a check that cannot hold has its reason in the table."""
    if case.groups and case.groups_at_predict:
        pytest.skip("scikit-learn's checks give no groups to predict")
    estimator = case.checked() if case.checked else case()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(
            estimator, expected_failed_checks=dict(case.expected_failures), on_fail=None, on_skip=None
        )
    assert len(results) > 30
    failed = {result["check_name"]: repr(result["exception"]) for result in results if result["status"] == "failed"}
    assert not failed
    xfailed = {result["check_name"] for result in results if result["status"] == "xfail"}
    assert xfailed == set(case.expected_failures), "a reason for a check that holds"


@every_estimator
def test_settings(case):
    estimator = case()
    names = list(inspect.signature(type(estimator).__init__).parameters)[1:]
    assert set(estimator.get_params(deep=False)) == set(names)
    assert all(estimator.get_params()[key] is value for key, value in case.settings.items())
    again = clone(fitted(case))
    assert not hasattr(again, "n_features_in_")
    for key, value in case.settings.items():
        assert f"{key}={value!r}" in repr(estimator) or getattr(type(estimator)(), key) == value


@every_estimator
def test_settings_are_refused_at_fit(case):
    if not case.refuses:
        pytest.skip("another row of the same object has them")
    for settings, message in case.refuses:
        with pytest.raises((ValueError, TypeError)) as caught:
            fitted(case, **settings)
        assert message in str(caught.value)


@every_estimator
def test_not_fitted(case):
    sample = case.data()
    with pytest.raises(NotFittedError):
        case.apply(case(), sample)


@every_estimator
def test_changes_something(case):
    sample = case.data()
    got = np.asarray(case.apply(fitted(case), sample), dtype=float)
    assert len(got) == len(sample.x)
    assert np.isfinite(got).all()
    if case.kind == "transformer":
        assert np.abs(got - sample.x).max() > 0.1
    else:
        assert len(np.unique(got)) > 1


@every_estimator
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64], ids=["float64", "float32", "int64"])
def test_types(case, dtype):
    sample = case.data()
    x = (10 * sample.x).astype(dtype)
    estimator = fitted(case, sample.replace(x))
    got = case.apply(estimator, sample.replace(x))
    want = case.apply(fitted(case, sample.replace(x.astype(float))), sample.replace(x.astype(float)))
    if case.kind == "transformer":
        assert got.dtype == (np.float32 if dtype == np.float32 else np.float64)
    assert_close(got, want, case.accuracy if dtype == np.float32 else 1e-12)


@every_estimator
def test_pandas(case):
    sample = case.data()
    names = [f"f{k}" for k in range(case.features)]
    frame = sample.replace(pd.DataFrame(sample.x, columns=names, index=range(100, 100 + len(sample.x))))
    estimator = fitted(case, frame)
    assert list(estimator.feature_names_in_) == names
    got, want = case.apply(estimator, frame), case.apply(fitted(case), sample)
    assert isinstance(got, np.ndarray)
    assert_close(got, want, 1e-12)
    with pytest.raises(ValueError, match="feature names should match"):
        case.apply(estimator, frame.replace(frame.x[names[::-1]]))
    if case.kind == "transformer":
        table = estimator.set_output(transform="pandas").transform(frame.x)
        assert isinstance(table, pd.DataFrame)
        assert list(table.index) == list(frame.x.index)
        assert list(table.columns) == list(estimator.get_feature_names_out())
        assert_close(table, want, 1e-12)


@every_estimator
def test_polars(case):
    polars = pytest.importorskip("polars")
    sample = case.data()
    frame = sample.replace(polars.DataFrame(sample.x, schema=[f"f{k}" for k in range(case.features)]))
    estimator = fitted(case, frame)
    assert_close(case.apply(estimator, frame), case.apply(fitted(case), sample), 1e-12)
    if case.kind == "transformer":
        assert isinstance(estimator.set_output(transform="polars").transform(frame.x), polars.DataFrame)


@every_estimator
@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_tensors(case, device, dtype):
    if not case.tensors:
        pytest.skip("takes tables")
    sample = case.data()
    x = torch.from_numpy(sample.x).to(device, dtype)
    exact = sample.replace(x.double().cpu().numpy())
    estimator, want = fitted(case, sample.replace(x)), case.apply(fitted(case, exact), exact)
    got = case.apply(estimator, sample.replace(x))
    assert isinstance(got, torch.Tensor) and got.dtype == dtype and got.device.type == device
    limit = {torch.float64: 1e-12, torch.float32: case.accuracy, torch.bfloat16: 1e-2}[dtype]
    assert_close(got.double().cpu(), want, limit)
    cube = case.apply(estimator, sample.replace(x.reshape(4, 5, 3, -1)))
    assert torch.equal(cube, got.reshape(4, 5, 3, -1))
    leaf = x.clone().requires_grad_()
    case.apply(estimator, sample.replace(leaf)).float().sum().backward()
    assert leaf.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"Reshape your data"):
        case.apply(estimator, sample.replace(x[0]))
    with pytest.raises(ValueError, match=r"X has 3 features, but .* is expecting"):
        case.apply(estimator, sample.replace(x[:, :3]))


@every_estimator
def test_arrays_of_more_axes(case):
    if not case.tensors:
        pytest.skip("takes tables")
    sample = case.data()
    cube = sample.x.reshape(4, 5, 3, -1)
    got = case.apply(fitted(case, sample.replace(cube)), sample.replace(cube))
    assert_close(got, case.apply(fitted(case), sample).reshape(cube.shape), 1e-12)


@every_estimator
def test_partial_fit(case):
    if not hasattr(case(), "partial_fit"):
        pytest.skip("does not stream")
    sample = case.data(90)
    want = case.apply(fitted(case, sample), sample)
    for cuts in ([1, 2, 40], [30, 60], list(range(1, 90))):
        estimator = case()
        for rows in np.split(np.arange(90), cuts):
            part = sample.rows(rows)
            assert estimator.partial_fit(part.x, *part.labels, **part.keywords) is estimator
        assert_close(case.apply(estimator, sample), want)
    estimator.fit(sample.x[:50], *sample.rows(slice(50)).labels, **sample.rows(slice(50)).keywords)
    first = sample.rows(slice(50))
    assert_close(case.apply(estimator, first), case.apply(fitted(case, first), first), 1e-12)


@every_estimator
def test_partial_fit_of_one_row_is_not_enough(case):
    if not hasattr(case(), "partial_fit"):
        pytest.skip("does not stream")
    sample = case.data()
    one = sample.rows(slice(1))
    estimator = case().partial_fit(one.x, *one.labels, **one.keywords)
    with pytest.raises(ValueError, match="has seen 1 sample, expected at least 2"):
        case.apply(estimator, sample)


@every_estimator
def test_order_of_rows(case):
    sample = case.data()
    shuffled = sample.rows(np.random.default_rng(1).permutation(len(sample.x)))
    assert_close(case.apply(fitted(case, shuffled), sample), case.apply(fitted(case), sample))


@every_estimator
def test_rows_do_not_see_each_other(case):
    sample, estimator = case.data(), fitted(case)
    whole = case.apply(estimator, sample)
    for rows in (slice(7, 8), slice(0, 30), slice(None, None, -1)):
        assert_close(case.apply(estimator, sample.rows(rows)), whole[rows], 1e-12)


@every_estimator
@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
def test_inverse(case, dtype):
    if not hasattr(case(), "inverse_transform"):
        pytest.skip("has no inverse")
    sample = case.data(dtype=dtype)
    estimator = fitted(case, sample)
    y = case.apply(estimator, sample)
    back = estimator.inverse_transform(y)
    assert back.dtype == dtype
    assert_close(back, sample.x, 1e-12 if dtype == np.float64 else 1e-5)
    assert_close(case.apply(estimator, sample.replace(back)), y, 1e-11 if dtype == np.float64 else 1e-4)
    with pytest.raises(ValueError, match=r"Y has 2 features, but .* is expecting"):
        estimator.inverse_transform(y[:, :2])
    with pytest.raises(ValueError, match="contains NaN"):
        estimator.inverse_transform(np.full_like(y, np.nan))


@every_estimator
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(case, how):
    sample, estimator = case.data(), fitted(case)
    again = copy.deepcopy(estimator) if how == "deepcopy" else pickle.loads(pickle.dumps(estimator))
    assert np.array_equal(case.apply(again, sample), case.apply(estimator, sample))


@every_estimator
def test_repeats(case):
    sample = case.data()
    once = case.apply(fitted(case), sample)
    np.random.default_rng().normal()
    assert np.array_equal(case.apply(fitted(case), sample), once)
    estimator = fitted(case, case.data(seed=5))
    assert np.array_equal(case.apply(case.fit(estimator, sample), sample), once), "fit forgets what was before"


@every_estimator
def test_input_is_kept(case):
    sample = case.data()
    before = sample.x.copy()
    sample.x.flags.writeable = False
    case.apply(fitted(case, sample), sample)
    assert np.array_equal(sample.x, before)


@every_estimator
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["nan", "inf"])
def test_refuses_what_is_not_finite(case, value):
    sample, estimator = case.data(), fitted(case)
    x = sample.x.copy()
    x[3, 1] = value
    word = "NaN" if np.isnan(value) else "infinity"
    for bad in (x, torch.from_numpy(x)) if case.tensors else (x,):
        with pytest.raises(ValueError, match=f"contains {word}"):
            case.fit(case(), sample.replace(bad))
        with pytest.raises(ValueError, match=f"contains {word}"):
            case.apply(estimator, sample.replace(bad))


@every_estimator
@pytest.mark.parametrize("value", [5.0, 0.1], ids=str)
def test_constant_column(case, value):
    sample = case.data()
    x = sample.x.copy()
    x[:, 2] = value
    if case.constant:
        with pytest.raises(ValueError, match=re.escape(case.constant)):
            case.fit(case(), sample.replace(x))
    else:
        got = case.apply(fitted(case, sample.replace(x)), sample.replace(x))
        assert np.isfinite(got).all()


@every_estimator
def test_fewer_rows_than_columns(case):
    sample = case.data(3)
    if case.few:
        with pytest.raises(ValueError, match=re.escape(case.few)):
            case.fit(case(), sample)
    else:
        assert np.isfinite(np.asarray(case.apply(fitted(case, sample), sample), dtype=float)).all()


@every_estimator
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e20])
@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
def test_extreme_scale(case, scale, dtype):
    sample = case.data()
    scaled = sample.replace((scale * sample.x).astype(dtype))
    estimator = fitted(case, scaled)
    got = case.apply(estimator, scaled)
    assert np.isfinite(np.asarray(got, dtype=float)).all()
    if case.equivariant:
        assert_close(got, case.apply(fitted(case), sample), 1e-9 if dtype == np.float64 else case.accuracy)
    if hasattr(estimator, "inverse_transform"):
        assert_close(estimator.inverse_transform(got), scaled.x, 1e-9 if dtype == np.float64 else 1e-5)


@every_estimator
def test_a_large_mean(case):
    """Mean 1e4 beside a spread of about 1, in float32: what the values still say is not lost."""
    sample = case.data()
    x = (sample.x + 1e4).astype(np.float32)
    got = case.apply(fitted(case, sample.replace(x)), sample.replace(x))
    exact = sample.replace(x.astype(float))
    assert_close(got, case.apply(fitted(case, exact), exact), case.accuracy)


@every_estimator
def test_wrong_width(case):
    sample, estimator = case.data(), fitted(case)
    with pytest.raises(ValueError, match=f"X has 3 features, but .* is expecting {case.features} features"):
        case.apply(estimator, sample.replace(sample.x[:, :3]))


@every_estimator
def test_in_a_pipeline(case):
    sample = case.data()
    if sample.keywords:
        pytest.skip("its groups need metadata routing")
    pipeline = make_pipeline(FunctionTransformer(), case()).fit(sample.x, *sample.labels)
    method = case.output or ("transform" if case.kind == "transformer" else "predict")
    assert_close(getattr(pipeline, method)(sample.x), case.apply(fitted(case), sample), 1e-12)
