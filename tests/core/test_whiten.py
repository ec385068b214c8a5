"""`whiten` against numpy, and the properties that define it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf, oas

import evenly
from core import oracle

METHODS = ["zca", "cholesky", "pca", "newton"]
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def data(*shape, dtype=torch.float64):
    """Correlated features along axis 1, with a mean."""
    x = torch.randn(shape, dtype=torch.float64)
    mix = torch.randn(shape[1], shape[1], dtype=torch.float64) / shape[1] ** 0.5
    mix += torch.eye(shape[1], dtype=torch.float64)
    return (torch.einsum("ij,nj...->ni...", mix, x) + 3).to(dtype)


def covariance(y):
    """Of the features (axis 1), over everything else."""
    y = y.movedim(1, -1).reshape(-1, y.shape[1])
    y = y - y.mean(0)
    return y.T @ y / len(y)


@pytest.mark.parametrize("method", ["zca", "cholesky", "newton"])
def test_against_the_oracle(method):
    more = {"iterations": 40} if method == "newton" else {}
    for x, pattern, sizes in [
        (data(40, 5), "n c -> c", {}),
        (data(9, 4, 3, 5), "n c h w -> c", {}),
        (data(9, 8, 3, 5), "n (g c) h w -> g c", {"g": 2}),
        (data(3, 4, 30), "n c t -> n c", {}),
        (data(9, 8, 3, 5), "n (c g) h w -> g c", {"g": 2}),
    ]:
        y = evenly.whiten(x, pattern, method=method, **sizes, **more)
        want = oracle.whiten(x.numpy(), pattern, method=method, **sizes)
        assert y.shape == x.shape
        np.testing.assert_allclose(y.numpy(), want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_the_covariance_becomes_the_identity(method):
    x = data(50, 6, 4)
    more = {"iterations": 40} if method == "newton" else {}
    y = evenly.whiten(x, "n c t -> c", method=method, eps=0.0, **more)
    torch.testing.assert_close(covariance(y), torch.eye(6, dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(y.mean((0, 2)), torch.zeros(6, dtype=torch.float64), **CLOSE)
    z = evenly.whiten(x, "n (g c) t -> g c", g=2, method=method, eps=0.0, **more)
    c = covariance(z)
    for g in [slice(0, 3), slice(3, 6)]:
        torch.testing.assert_close(c[g, g], torch.eye(3, dtype=torch.float64), **CLOSE)
    assert c[:3, 3:].abs().max() > 1e-3  # only within the group


@pytest.mark.parametrize("method", METHODS)
def test_one_feature_is_normalize(method):
    x = torch.randn(20, 4, dtype=torch.float64) * 3 + 1
    more = {"iterations": 40} if method == "newton" else {}
    y = evenly.whiten(x, "n (c one) -> c one", one=1, method=method, **more)
    want = evenly.normalize(x, "n c -> c")
    if method == "pca":  # an eigenvector has no sign
        y, want = y.abs(), want.abs()
    torch.testing.assert_close(y, want, **CLOSE)


def test_zca_follows_a_rotation_and_is_the_nearest():
    x = data(60, 5)
    q, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    y = evenly.whiten(x, "n c -> c", method="zca")
    torch.testing.assert_close(evenly.whiten(x @ q, "n c -> c", method="zca"), y @ q, **CLOSE)
    # y = (x - mean) W with W symmetric and positive definite.
    w = torch.linalg.lstsq(x - x.mean(0), y).solution
    torch.testing.assert_close(w, w.T, rtol=1e-8, atol=1e-8)
    assert torch.linalg.eigvalsh(w).min() > 0
    # No other whitening stays closer to the centred input (Kessy et al. 2018).
    for other in ["cholesky", "pca"]:
        z = evenly.whiten(x, "n c -> c", method=other)
        assert (z - (x - x.mean(0))).norm() >= (y - (x - x.mean(0))).norm() - 1e-9


def test_cholesky_is_triangular_and_pca_follows_the_eigenvectors():
    x = data(60, 5)
    u = x - x.mean(0)
    w = torch.linalg.lstsq(u, evenly.whiten(x, "n c -> c", method="cholesky", eps=0.0)).solution
    torch.testing.assert_close(w.tril(-1), torch.zeros_like(w), rtol=0, atol=1e-9)
    assert (w.diagonal() > 0).all()
    w = torch.linalg.lstsq(u, evenly.whiten(x, "n c -> c", method="pca", eps=0.0)).solution
    c = covariance(x)
    scaled = w / w.norm(dim=0)
    d = scaled.T @ c @ scaled
    torch.testing.assert_close(d - d.diagonal().diag(), torch.zeros_like(d), rtol=0, atol=1e-9)


def test_newton_converges_to_zca():
    x = data(200, 4)
    want = evenly.whiten(x, "n c -> c", method="zca")
    errors = [
        (evenly.whiten(x, "n c -> c", method="newton", iterations=k) - want).norm().item() for k in [1, 3, 5, 10, 30]
    ]
    assert all(b < a for a, b in itertools.pairwise(errors) if a > 1e-8), errors
    assert errors[-1] < 1e-8
    default = evenly.whiten(x, "n c -> c", method="newton")
    torch.testing.assert_close(default, evenly.whiten(x, "n c -> c", method="newton", iterations=5))


@pytest.mark.parametrize("method", ["zca", "cholesky"])
def test_shrinkage(method):
    x = data(60, 5)
    # At 1 the covariance is a multiple of the identity: nothing is decorrelated any more.
    y = evenly.whiten(x, "n c -> c", method=method, shrinkage=1.0)
    ratio = y / (x - x.mean(0))
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-8, atol=1e-8)
    for a in [0.1, 0.5]:
        y = evenly.whiten(x, "n c -> c", method=method, shrinkage=a)
        np.testing.assert_allclose(
            y.numpy(), oracle.whiten(x.numpy(), "n c -> c", method=method, shrinkage=a), rtol=1e-8, atol=1e-8
        )


@pytest.mark.parametrize("method", METHODS)
def test_by(method):
    x, by = data(40, 4), torch.arange(40) % 3
    y = evenly.whiten(x, "n c -> c", by=by, method=method)
    for g in range(3):
        want = evenly.whiten(x[by == g], "n c -> c", method=method)
        got = y[by == g]
        if method == "pca":
            got, want = got.abs(), want.abs()
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("method", ["zca", "cholesky", "newton"])
def test_mask(method):
    x = data(30, 4)
    keep = torch.rand(30) < 0.7
    y = evenly.whiten(x, "n c -> c", method=method, mask=keep[:, None])
    torch.testing.assert_close(y[keep], evenly.whiten(x[keep], "n c -> c", method=method), rtol=1e-8, atol=1e-8)
    assert (y[~keep] == 0).all()
    poisoned = x.masked_fill(~keep[:, None], float("nan")).requires_grad_()
    z = evenly.whiten(poisoned, "n c -> c", method=method, mask=keep[:, None])
    torch.testing.assert_close(z, y, rtol=0, atol=0)
    z.pow(3).sum().backward()
    assert poisoned.grad.isfinite().all()
    assert (poisoned.grad[~keep] == 0).all()


@pytest.mark.parametrize("method", ["zca", "cholesky", "newton"])
def test_gradients(method):
    x = data(12, 3).requires_grad_()
    for options in [{}, {"shrinkage": 0.2}, {"by": torch.arange(12) % 2}, {"eps": 0.1}]:
        assert torch.autograd.gradcheck(
            lambda t, o=options: evenly.whiten(t, "n c -> c", method=method, **o), x, fast_mode=True
        )


@pytest.mark.parametrize("method", ["zca", "cholesky"])
def test_fewer_samples_than_features_and_equal_eigenvalues(method):
    """Rank-deficient with eps > 0 is finite, forward and backward; so is the covariance I (repeated eigenvalues)."""
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    y = evenly.whiten(x, "n c -> c", method=method, eps=1e-3)
    np.testing.assert_allclose(
        y.detach().numpy(), oracle.whiten(x.detach().numpy(), "n c -> c", method=method, eps=1e-3), atol=1e-7
    )
    y.pow(3).sum().backward()
    assert x.grad.isfinite().all()
    h = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64, requires_grad=True)
    evenly.whiten(h, "n c -> c", method=method).pow(3).sum().backward()
    assert h.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["zca", "cholesky"])
def test_types(method, dtype):
    x = data(50, 6, dtype=dtype)
    y = evenly.whiten(x, "n c -> c", method=method)
    assert y.dtype == dtype
    want = oracle.whiten(x.double().numpy(), "n c -> c", method=method)
    tol = 1e-3 if dtype == torch.float32 else 2e-2
    np.testing.assert_allclose(y.double().numpy(), want, rtol=tol, atol=tol)


def test_the_identity_is_caught():
    x = data(50, 6)
    assert (covariance(x) - torch.eye(6, dtype=torch.float64)).abs().max() > 0.1


def test_bad_arguments():
    x = data(10, 4)
    with pytest.raises(ValueError, match="method"):
        evenly.whiten(x, "n c -> c", method="qr")
    with pytest.raises(ValueError, match="shrinkage"):
        evenly.whiten(x, "n c -> c", shrinkage=1.5)
    with pytest.raises(ValueError, match="shrinkage"):
        evenly.whiten(x, "n c -> c", shrinkage=-0.1)
    with pytest.raises(ValueError, match="eps"):
        evenly.whiten(x, "n c -> c", eps=-1.0)
    with pytest.raises(ValueError, match="iterations"):
        evenly.whiten(x, "n c -> c", method="newton", iterations=0)
    with pytest.raises(evenly.core.PatternError):
        evenly.whiten(x, "n c -> ")
    with pytest.raises(TypeError):
        evenly.whiten(x.to(torch.complex64), "n c -> c")
    with pytest.raises(TypeError):
        evenly.whiten(x.long(), "n c -> c")


def test_zero_size():
    for method in METHODS:
        assert evenly.whiten(torch.empty(0, 4), "n c -> c", method=method).shape == (0, 4)


@pytest.mark.parametrize(("name", "estimate"), [("ledoit-wolf", ledoit_wolf), ("oas", oas)])
def test_estimated_shrinkage_is_that_of_sklearn(name, estimate):
    x = data(25, 6)
    _, amount = estimate((x - x.mean(0)).numpy(), assume_centered=True)
    assert 0.01 < amount < 0.99
    want = evenly.whiten(x, "n c -> c", shrinkage=float(amount), method="cholesky")
    got = evenly.whiten(x, "n c -> c", shrinkage=name, method="cholesky")
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)
    # Each group estimates its own.
    z = evenly.whiten(torch.cat([x, x[:, :3] * 5 + 1, x[:, 3:]], 1), "n (g c) -> g c", g=2, shrinkage=name)
    torch.testing.assert_close(z[:, :6], evenly.whiten(x, "n c -> c", shrinkage=name), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_stats_given(method):
    """Measured once, used on other data: as in evaluation."""
    x, new = data(40, 6), data(7, 6)
    for pattern, sizes in [("n c -> c", {}), ("n (g c) -> g c", {"g": 2})]:
        stats = evenly.core.covariance(x, pattern, **sizes)
        want = evenly.whiten(x, pattern, method=method, **sizes)
        got = evenly.whiten(x, pattern, method=method, stats=stats[:2], **sizes)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        both = evenly.whiten(torch.cat([x, new]), pattern, method=method, stats=stats[:2], **sizes)
        torch.testing.assert_close(
            both[40:], evenly.whiten(new, pattern, method=method, stats=stats[:2], **sizes), rtol=1e-9, atol=1e-9
        )


def test_covariance_against_numpy():
    x = data(30, 6)
    mean, cov = evenly.core.covariance(x, "n (g c) -> g c", g=2)[:2]
    for g in range(2):
        part = x.numpy()[:, 3 * g : 3 * g + 3]
        np.testing.assert_allclose(mean[g].numpy(), part.mean(0), rtol=1e-12)
        np.testing.assert_allclose(cov[g].numpy(), np.cov(part.T, bias=True), rtol=1e-10)
