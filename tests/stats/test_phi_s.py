"""PHI-S and what it is compared with: numpy from the equations, scikit-learn, and the properties that define it."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.preprocessing import StandardScaler
from torch import nn

from evenly.stats import MultiTeacherLoss, PHIStandardizer, Standardize, hadamard
from stats.sync_worker import METHODS as SYNCED
from stats.sync_worker import rows, worker

ALL = ["phi-s", "global", "standard", "pca", "zca", "cholesky", "hadamard", "none"]
WHITENING = ["pca", "zca", "cholesky", "hadamard"]
CLOSE = {"rtol": 0, "atol": 1e-10}


def data(n=200, c=8, seed=0, decay=1.0):
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(c, c)))
    return (rng.normal(size=(n, c)) * np.arange(1, c + 1.0) ** -decay) @ basis + rng.normal(size=c)


def distances(x):
    return np.linalg.norm(x[:, None] - x[None], axis=-1)


def test_against_numpy():
    """T from the equations, entry by entry: eigenvectors by numpy, in our order and with our signs."""
    x = data(c=12)
    mean, cov = x.mean(0), np.cov(x.T)
    values, vectors = np.linalg.eigh(cov)
    values, vectors = values[::-1], vectors[:, ::-1]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), range(12)])
    h = hadamard(12).numpy()
    root = np.diag(values**-0.5)
    want = {
        "phi-s": h @ vectors.T / np.sqrt(values.mean()),
        "global": np.eye(12) / np.sqrt(np.trace(cov) / 12),
        "standard": np.diag(cov.diagonal() ** -0.5),
        "pca": root @ vectors.T,
        "zca": vectors @ root @ vectors.T,
        "cholesky": np.linalg.inv(np.linalg.cholesky(cov)),
        "hadamard": h @ root @ vectors.T,
        "none": np.eye(12),
    }
    for method in ALL:
        fitted = PHIStandardizer(method).fit(x)
        np.testing.assert_allclose(fitted.components_, want[method], **CLOSE)
        np.testing.assert_allclose(fitted.inverse_components_, np.linalg.inv(want[method]), **CLOSE)
        np.testing.assert_allclose(fitted.transform(x), (x - mean) @ want[method].T, **CLOSE)
        np.testing.assert_allclose(fitted.mean_, mean, **CLOSE)
        np.testing.assert_allclose(fitted.var_, cov.diagonal(), **CLOSE)
        assert fitted.scale_ == pytest.approx(np.sqrt(np.trace(cov) / 12))
        if method not in ("global", "standard", "none"):
            np.testing.assert_allclose(fitted.covariance_, cov, **CLOSE)
            np.testing.assert_allclose(fitted.eigenvalues_, values, **CLOSE)


def test_against_scikit_learn():
    x = data()
    got = PHIStandardizer("standard", correction=0).fit_transform(x)
    np.testing.assert_allclose(got, StandardScaler().fit_transform(x), **CLOSE)
    got, want = PHIStandardizer("pca").fit_transform(x), PCA(whiten=True).fit_transform(x)
    np.testing.assert_allclose(np.abs(got), np.abs(want), **CLOSE)


@pytest.mark.parametrize("c", [1, 2, 3, 6, 7, 8, 12, 50, 52, 92])
def test_every_variance_is_one_in_every_width(c):
    x = data(400, c, decay=2.0)
    fitted = PHIStandardizer().fit(x)
    cov = np.atleast_2d(np.cov(fitted.transform(x).T))
    np.testing.assert_allclose(cov.diagonal(), np.ones(c), **CLOSE)
    np.testing.assert_allclose(fitted.components_ @ fitted.components_.T * fitted.scale_**2, np.eye(c), **CLOSE)
    values = np.linalg.eigvalsh(cov)[::-1]
    np.testing.assert_allclose(values, fitted.eigenvalues_ / fitted.eigenvalues_.mean(), **CLOSE)
    assert ("equalized" in fitted.rotation_) == (c in (3, 6, 7, 50, 92))
    if c > 2:
        assert np.abs(cov - np.diag(cov.diagonal())).max() > 0.01, "not whitening"


@pytest.mark.parametrize("method", WHITENING)
@pytest.mark.parametrize("c", [6, 8])
def test_whitening_gives_the_identity(method, c):
    y = PHIStandardizer(method).fit_transform(data(c=c))
    np.testing.assert_allclose(np.cov(y.T), np.eye(c), **CLOSE)


def test_isotropy_and_invariance():
    """Distances are those of the input over φ, also after a rotation of the input; per-channel scaling has neither."""
    x = data(40)
    turn, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(8, 8)))
    for method in ("phi-s", "global"):
        fitted = PHIStandardizer(method).fit(x)
        np.testing.assert_allclose(distances(fitted.transform(x)), distances(x) / fitted.scale_, **CLOSE)
        turned = PHIStandardizer(method).fit_transform(x @ turn)
        np.testing.assert_allclose(distances(turned), distances(x) / fitted.scale_, **CLOSE)
    y, z = (PHIStandardizer("standard").fit_transform(v) for v in (x, x @ turn))
    assert np.abs(distances(y) - distances(z)).max() > 0.1
    spectra = [np.linalg.eigvalsh(np.cov(PHIStandardizer().fit_transform(v).T)) for v in (x, x @ turn)]
    np.testing.assert_allclose(*spectra, **CLOSE)
    np.testing.assert_allclose(PHIStandardizer().fit_transform(1e3 * x), PHIStandardizer().fit_transform(x), **CLOSE)


def test_squared_errors_keep_their_ratio():
    x = data()
    fitted = PHIStandardizer().fit(x)
    other = x + np.random.default_rng(1).normal(size=x.shape)
    error = ((fitted.transform(other) - fitted.transform(x)) ** 2).mean()
    assert error == pytest.approx(((other - x) ** 2).mean() / fitted.scale_**2)


def test_low_rank():
    """PHI-S needs no full rank: rank 1, and fewer rows than columns."""
    rng = np.random.default_rng(0)
    for x in (np.outer(rng.normal(size=50), rng.normal(size=8)), rng.normal(size=(3, 8)), rng.normal(size=(2, 6))):
        fitted = PHIStandardizer().fit(x)
        y = fitted.transform(x)
        np.testing.assert_allclose(y.var(0, ddof=1), np.ones(x.shape[1]), **CLOSE)
        np.testing.assert_allclose(fitted.inverse_transform(y), x, **CLOSE)
        for method in WHITENING:
            with pytest.raises(ValueError, match="is singular"):
                PHIStandardizer(method).fit(x)
            fitted = PHIStandardizer(method, eps=1e-3).fit(x)
            np.testing.assert_allclose(fitted.inverse_transform(fitted.transform(x)), x, **CLOSE)


def test_equal_eigenvalues():
    x = hadamard(16, normalized=False).numpy()[:, 1:9]  # orthogonal columns of one length
    np.testing.assert_allclose(np.cov(PHIStandardizer().fit_transform(x).T), np.eye(8), **CLOSE)


def test_rotations():
    x = data(c=6)
    with pytest.raises(ValueError, match="no Hadamard matrix of order 6"):
        PHIStandardizer(rotation="hadamard").fit(x)
    with pytest.warns(UserWarning, match=r"order 6: with rotation='bernoulli' variances are 1 only about"):
        about = PHIStandardizer(rotation="bernoulli").fit(x)
    var = about.transform(x).var(0, ddof=1)
    assert 0.001 < np.abs(var - 1).max() < 1
    np.testing.assert_allclose(about.components_ @ about.components_.T * about.scale_**2, np.eye(6), **CLOSE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, again, other = (PHIStandardizer(random_state=s).fit(x).components_ for s in (0, 0, 1))
        PHIStandardizer("hadamard", rotation="bernoulli").fit(x)  # whitening is exact with any rotation
        PHIStandardizer(rotation="bernoulli").fit(data(c=8))  # there is a Hadamard matrix
    assert np.array_equal(first, again)
    assert np.abs(first - other).max() > 0.01


def test_attributes_that_there_are_not():
    unfitted = PHIStandardizer()
    for name in ("mean_", "var_", "covariance_", "components_", "inverse_components_", "n_samples_seen_", "scale_"):
        assert not hasattr(unfitted, name)
        with pytest.raises(NotFittedError, match=f"no {'var_' if name == 'scale_' else name} yet"):
            getattr(unfitted, name)
    fitted = PHIStandardizer("standard").fit(data())
    for name in ("covariance_", "eigenvalues_", "rotation_"):
        assert not hasattr(fitted, name)
    assert not hasattr(PHIStandardizer("zca").fit(data()), "rotation_")


def test_bad_input():
    x = data()
    with pytest.raises(ValueError, match="every one of the 8 features is constant"):
        PHIStandardizer().fit(np.full((5, 8), 0.1))
    with pytest.raises(ValueError, match=r"Found 1 sample\(s\)"):
        PHIStandardizer().fit(torch.from_numpy(x[:1]))
    with pytest.raises(ValueError, match="Complex data not supported"):
        PHIStandardizer().fit(torch.zeros(3, 4, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"statistics of another method, which keep no covariance"):
        PHIStandardizer("standard").partial_fit(x).set_params(method="phi-s").partial_fit(x)
    whole = PHIStandardizer().fit(torch.arange(40).reshape(10, 4) % 7)
    assert whole.transform(torch.arange(8).reshape(2, 4)).dtype == torch.float64


def test_drift():
    x = data()
    fitted = PHIStandardizer().fit(x)
    on_its_own = fitted.drift(x)
    assert on_its_own.mean < 1e-10
    assert on_its_own.low == pytest.approx(1)
    assert on_its_own.high == pytest.approx(1)
    held = fitted.drift(x * 3 + fitted.scale_)
    y = fitted.transform(x * 3 + fitted.scale_)
    assert held.mean == pytest.approx(np.abs(y.mean(0)).max())
    assert (held.low, held.high) == (pytest.approx(y.var(0, ddof=1).min()), pytest.approx(y.var(0, ddof=1).max()))


def test_pieces_are_the_whole(monkeypatch):
    x = data(500)
    want = PHIStandardizer().fit(x).components_
    monkeypatch.setattr("evenly.stats.phi_s._PIECE", 8 * 33)
    np.testing.assert_allclose(PHIStandardizer().fit(x).components_, want, **CLOSE)


def test_two_processes_are_one(tmp_path):
    torch.multiprocessing.spawn(worker, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for method in SYNCED:
            y, seen = found[method]
            assert seen == 30
            np.testing.assert_allclose(y.numpy(), PHIStandardizer(method).fit_transform(rows()), **CLOSE)


# ---- the layer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ALL)
def test_layer_is_the_estimator(method):
    x = torch.from_numpy(data(60)).reshape(5, 3, 4, 8)
    fitted = PHIStandardizer(method).fit(x)
    want = fitted.transform(x)
    last, images = fitted.to_layer(dtype=torch.float64), fitted.to_layer(1, dtype=torch.float64)
    torch.testing.assert_close(last(x), want)
    torch.testing.assert_close(last.inverse(want), x)
    for memory in (torch.contiguous_format, torch.channels_last):
        image = x.movedim(-1, 1).contiguous(memory_format=memory)
        y = images(image)
        torch.testing.assert_close(y, want.movedim(-1, 1))
        assert y.is_contiguous(memory_format=memory)
        torch.testing.assert_close(images.inverse(y), image)
    torch.testing.assert_close(last.to_linear()(x), want)
    torch.testing.assert_close(last.to_linear(inverse=True)(want), x)
    torch.testing.assert_close(images.to_conv1x1()(image), want.movedim(-1, 1))
    assert fitted.to_layer()(x.float()).dtype == torch.float32
    loaded = Standardize(8, diagonal=method in ("global", "standard", "none"), dtype=torch.float64)
    loaded.load_state_dict(last.state_dict())
    assert torch.equal(loaded(x), last(x))


@pytest.mark.parametrize("method", ["phi-s", "standard"])
@pytest.mark.parametrize("bias", [True, False])
def test_folding(method, bias):
    layer = PHIStandardizer(method).fit(data(c=4)).to_layer(dtype=torch.float64)
    heads = [
        (nn.Linear(3, 4, bias=bias), torch.randn(5, 3)),
        (nn.Conv2d(3, 4, 3, bias=bias), torch.randn(2, 3, 5, 5)),
        (nn.Conv1d(3, 4, 1, bias=bias), torch.randn(2, 3, 5)),
    ]
    for head, x in heads:
        head, x = head.double(), x.double()
        layer.channel_dim = 1
        h = head(x)
        torch.testing.assert_close(layer.fold_inverse_(head)(x), layer.inverse(h))
        torch.testing.assert_close(layer.fold_(head)(x), h)
        assert head.bias.requires_grad
    grouped = nn.Conv1d(4, 4, 1, groups=2).double()
    if method == "standard":
        x = torch.randn(2, 4, 3, dtype=torch.float64)
        want = layer(grouped(x))
        torch.testing.assert_close(layer.fold_(grouped)(x), want)
    else:
        with pytest.raises(ValueError, match="groups=2"):
            layer.fold_(grouped)
    with pytest.raises(ValueError, match="the layer has 5 outputs, expected 4"):
        layer.fold_(nn.Linear(3, 5))
    with pytest.raises(TypeError, match="got ReLU"):
        layer.fold_(nn.ReLU())
    with pytest.raises(ValueError, match="remove_parametrizations"):
        layer.fold_(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)))


# ---- the objective ---------------------------------------------------------------------------------------


def test_losses_against_the_definitions():
    z = {"a": torch.from_numpy(data(30)), "b": torch.from_numpy(data(30, 4, seed=2) * 100).reshape(30, 4, 1, 1)}
    fitted = {"a": PHIStandardizer().fit(z["a"]), "b": PHIStandardizer().fit(z["b"].flatten(1))}
    layers = {"a": fitted["a"].to_layer(dtype=torch.float64), "b": fitted["b"].to_layer(1, dtype=torch.float64)}
    y = {name: torch.randn_like(value, requires_grad=True) for name, value in z.items()}
    t = {"a": fitted["a"].transform(z["a"]), "b": fitted["b"].transform(z["b"].flatten(1))}
    flat = {"a": y["a"], "b": y["b"].flatten(1)}

    def want(kind, name):
        u, v = flat[name].detach().numpy(), t[name].numpy()
        gap = np.abs(u - v)
        smooth = np.where(gap < 0.5, gap**2, gap - 0.25).mean()  # beta 0.5: gap²/(2 beta), gap - beta/2
        cosine = (1 - (u * v).sum(1) / np.linalg.norm(u, axis=1) / np.linalg.norm(v, axis=1)).mean()
        return {
            "mse": (gap**2).mean(),
            "smooth_l1": smooth,
            "cosine": cosine,
            "hybrid": 0.7 * cosine + 0.3 * smooth,
        }[kind]

    for kind in ("mse", "smooth_l1", "cosine", "hybrid"):
        loss = MultiTeacherLoss(layers, {"a": 2.0, "b": 0.5}, kind, beta=0.5, cosine_weight=0.7)
        got = loss(y, z)
        assert got.item() == pytest.approx(2 * want(kind, "a") + 0.5 * want(kind, "b"))
        got.backward()
        assert y["a"].grad.abs().sum() > 0
    mixed = MultiTeacherLoss(layers, kind={"a": "cosine", "b": "mse"})
    assert mixed(y, z).item() == pytest.approx(want("cosine", "a") + want("mse", "b"))
    assert {name: tuple(value.shape) for name, value in mixed.each(y, z).items()} == {"a": (30,), "b": (30, 1, 1)}


def test_targets_get_no_gradient_and_standardizers_are_fixed():
    z = torch.from_numpy(data(30)).requires_grad_()
    loss = MultiTeacherLoss({"a": PHIStandardizer().fit(z)})
    y = torch.zeros_like(z, requires_grad=True)
    loss({"a": y}, {"a": z}).backward()
    assert z.grad is None
    assert not list(loss.parameters())
    assert set(loss.state_dict()) == {f"standardizers.a.{name}" for name in ("mean", "matrix", "inverse_matrix")}


def test_bad_losses():
    fitted = {"a": PHIStandardizer().fit(data())}
    x = torch.zeros(3, 8)
    for arguments, message in [
        (({},), "standardizers is empty"),
        (({"a.b": fitted["a"]},), "without a full stop"),
        ((fitted, {"b": 1.0}), "weights is for teachers"),
        ((fitted, {"a": -1.0}), r"weights\['a'\]=-1.0"),
        ((fitted, None, "l1"), "kind='l1' is unknown"),
    ]:
        with pytest.raises(ValueError, match=message):
            MultiTeacherLoss(*arguments)
    with pytest.raises(ValueError, match="beta=0"):
        MultiTeacherLoss(fitted, beta=0)
    with pytest.raises(ValueError, match="cosine_weight=2"):
        MultiTeacherLoss(fitted, cosine_weight=2)
    loss = MultiTeacherLoss(fitted)
    with pytest.raises(ValueError, match="outputs has teachers"):
        loss({}, {"a": x})
    with pytest.raises(ValueError, match=r"outputs have shape \(2, 8\) and targets \(3, 8\)"):
        loss({"a": x[:2]}, {"a": x})
