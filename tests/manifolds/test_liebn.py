"""LieBN against an oracle written from the equations with scipy, the properties of its theory, and geoopt."""

from __future__ import annotations

import builtins
import importlib

import numpy as np
import pytest
import scipy.linalg as sl
import torch
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation

import evenly.manifolds as mf
from evenly.manifolds import SPD, Correlation, DomainLieBN, LieBNCorrelation, LieBNRotation, LieBNSPD

DOUBLE = {"dtype": torch.float64}


def spd(*shape, spread=1.0, seed=0):
    gen = torch.Generator().manual_seed(seed)
    a = spread * torch.randn(*shape, generator=gen, **DOUBLE)
    return torch.linalg.matrix_exp(0.5 * (a + a.mT))


def rotations(*shape, spread=0.5, seed=0):
    gen = torch.Generator().manual_seed(seed)
    v = spread * torch.randn(*shape, 3, 3, generator=gen, **DOUBLE)
    return torch.linalg.matrix_exp(v - v.mT)


def correlations(*shape, seed=0):
    x = spd(*shape, seed=seed)
    d = x.diagonal(dim1=-2, dim2=-1).sqrt()
    return x / (d.unsqueeze(-1) * d.unsqueeze(-2))


# ---- the oracle: algorithm 1 of the paper, matrix by matrix, with scipy ------------------------------------


def function(p, f):
    """Of a symmetric matrix, by scipy's eigendecomposition."""
    values, vectors = sl.eigh(p)
    return vectors @ np.diag(f(values)) @ vectors.T


def sqrtm(p):
    return function(p, np.sqrt)


def logm(p):
    return function(p, np.log)


def expm(v):
    return function(v, np.exp)


def powm(p, t):
    return function(p, lambda values: values**t)


def cholesky(p):
    return np.linalg.cholesky(p)


class Oracle:
    """One metric: what the table of the paper says of it."""

    def __init__(self, metric, theta=1.0, alpha=1.0, beta=0.0):
        self.metric, self.theta, self.alpha, self.beta = metric, theta, alpha, beta

    def inner(self, v):
        return self.alpha * np.trace(v @ v.T) + self.beta * np.trace(v) ** 2

    def lower(self, p):
        k = cholesky(powm(p, self.theta))
        return np.tril(k, -1), np.diag(np.diag(k))

    def product(self, p, q):
        if self.metric == "LEM":
            return expm(logm(p) + logm(q))
        a, b = cholesky(powm(p, self.theta)), cholesky(powm(q, self.theta))
        sums = np.tril(a, -1) + np.tril(b, -1) + np.diag(np.diag(a) * np.diag(b))
        k = sums if self.metric == "LCM" else a @ b
        return powm(k @ k.T, 1 / self.theta)

    def inverse(self, p):
        if self.metric == "LEM":
            return expm(-logm(p))
        k = cholesky(powm(p, self.theta))
        minus = -np.tril(k, -1) + np.diag(1 / np.diag(k))
        k = minus if self.metric == "LCM" else np.linalg.inv(k)
        return powm(k @ k.T, 1 / self.theta)

    def square_to_identity(self, p):
        if self.metric == "LEM":
            return self.inner(logm(p))
        if self.metric == "LCM":
            low, diagonal = self.lower(p)
            return ((low**2).sum() + (np.log(np.diag(diagonal)) ** 2).sum()) / self.theta**2
        if self.metric == "CRIM":
            p = self.inverse(p)
        return self.inner(logm(powm(p, self.theta))) / self.theta**2

    def scale(self, p, t):
        """Exp_I(t Log_I p)."""
        if self.metric == "LCM":
            low, diagonal = self.lower(p)
            k = t * low + np.diag(np.diag(diagonal) ** t)
            return powm(k @ k.T, 1 / self.theta)
        if self.metric == "CRIM":
            return self.inverse(powm(self.inverse(p), t))
        return powm(p, t)

    def mean(self, batch):
        if self.metric == "LEM":
            return expm(np.mean([logm(p) for p in batch], 0))
        if self.metric == "LCM":
            parts = [self.lower(p) for p in batch]
            k = np.mean([low for low, _ in parts], 0) + expm(np.mean([logm(d) for _, d in parts], 0))
            return powm(k @ k.T, 1 / self.theta)
        if self.metric == "CRIM":
            return self.inverse(Oracle("AIM", self.theta).mean([self.inverse(p) for p in batch]))
        powers = [powm(p, self.theta) for p in batch]
        g = np.mean(powers, 0)
        for _ in range(400):  # short steps, sure to converge
            half = sqrtm(g)
            back = np.linalg.inv(half)
            step = np.mean([logm(back @ p @ back) for p in powers], 0)
            g = half @ expm(0.5 * step) @ half
            if np.abs(step).max() < 1e-13:
                break
        return powm(g, 1 / self.theta)

    def between(self, p, q, t):
        """The geodesic: move p to the identity, scale, move back."""
        if self.metric == "CRIM":
            return self.product(self.scale(self.product(q, self.inverse(p)), t), p)
        return self.product(p, self.scale(self.product(self.inverse(p), q), t))

    def layer(self, batch, bias, s, eps=1e-5, stats=None):
        mean = self.mean(batch) if stats is None else stats[0]
        right = self.metric == "CRIM"
        centred = [self.product(*((p, self.inverse(mean)) if right else (self.inverse(mean), p))) for p in batch]
        var = np.mean([self.square_to_identity(p) for p in centred]) if stats is None else stats[1]
        scaled = [self.scale(p, s / np.sqrt(var + eps)) for p in centred]
        return np.array([self.product(*((p, bias) if right else (bias, p))) for p in scaled]), mean, var


METRICS = [
    ("LEM", 1.0, 1.0, 0.0),
    ("LEM", 1.0, 0.5, 0.3),
    ("LCM", 1.0, 1.0, 0.0),
    ("LCM", 0.5, 1.0, 0.0),
    ("LCM", -0.5, 1.0, 0.0),
    ("AIM", 1.0, 1.0, 0.0),
    ("AIM", 1.5, 1.0, 0.1),
    ("AIM", -0.5, 2.0, -0.3),
    ("CRIM", 1.0, 1.0, 0.0),
    ("CRIM", -0.5, 1.0, 0.2),
]
every_metric = pytest.mark.parametrize("parameters", METRICS, ids=str)


@every_metric
def test_layer_is_the_oracle(parameters):
    """Three training steps and evaluation: outputs, running mean, running variance."""
    oracle = Oracle(*parameters)
    layer = LieBNSPD(4, *parameters, karcher_tol=1e-12, momentum=0.3, **DOUBLE)
    bias = spd(4, 4, seed=9)
    with torch.no_grad():
        layer.bias.copy_(bias)
        layer.weight.fill_(0.7)
    running_mean, running_var = np.eye(4), 1.0
    for step in range(3):
        x = spd(6, 4, 4, seed=step)
        want, mean, var = oracle.layer(x.numpy(), bias.numpy(), 0.7)
        np.testing.assert_allclose(layer(x).detach().numpy(), want, rtol=1e-7, atol=1e-9)
        running_mean = oracle.between(running_mean, mean, 0.3)
        running_var = 0.7 * running_var + 0.3 * var
    np.testing.assert_allclose(layer.geometry.undeform(layer.running_mean).numpy(), running_mean, rtol=1e-7)
    np.testing.assert_allclose(layer.running_var.numpy(), running_var, rtol=1e-9)
    want, _, _ = oracle.layer(x.numpy(), bias.numpy(), 0.7, stats=(running_mean, running_var))
    np.testing.assert_allclose(layer.eval()(x).detach().numpy(), want, rtol=1e-6, atol=1e-9)


@every_metric
def test_geometry_is_the_oracle(parameters):
    oracle, geometry = Oracle(*parameters), SPD(*parameters)
    p, q = spd(2, 4, 4, seed=1)
    right = parameters[0] == "CRIM"
    step = (p.numpy(), oracle.inverse(q.numpy())) if right else (oracle.inverse(q.numpy()), p.numpy())
    close = lambda a, b: np.testing.assert_allclose(a.numpy(), b, rtol=1e-8, atol=1e-10)  # noqa: E731
    close(geometry.distance(p, q), np.sqrt(oracle.square_to_identity(oracle.product(*step))))
    close(geometry.product(p, q), oracle.product(p.numpy(), q.numpy()))
    close(geometry.inverse(p), oracle.inverse(p.numpy()))
    close(geometry.geodesic(p, q, 0.3), oracle.between(p.numpy(), q.numpy(), 0.3))
    batch = spd(5, 4, 4, seed=2)
    mean = geometry.frechet_mean(batch, tol=1e-12)
    close(mean, oracle.mean(batch.numpy()))
    variance = geometry.distance(batch, mean).square().mean()
    torch.testing.assert_close(geometry.frechet_variance(batch, tol=1e-12), variance)


def test_matrix_functions_are_scipys():
    p = spd(3, 5, 5)
    for ours, theirs in (
        (mf.spd.log(p), sl.logm),
        (mf.spd.exp(p), sl.expm),
        (mf.spd.power(p, -0.7), lambda a: sl.fractional_matrix_power(a, -0.7)),
        (mf.spd.power(p, 0.5), sl.sqrtm),
    ):
        np.testing.assert_allclose(ours.numpy(), np.array([theirs(a) for a in p.numpy()]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gap", [0.0, 1e-14, 1e-10, 1e-7, 1e-4, 1e-1])
def test_gradient_of_the_logarithm_at_any_gap(gap):
    """Against scipy's Frechet derivative of exp, whose inverse it is; autograd through eigh gives nan at gap 0."""
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    a = q @ np.diag([1.0, 1.0 + gap, 2.5]) @ q.T
    h = np.random.default_rng(1).normal(size=(3, 3))
    h = h + h.T
    x = torch.tensor(0.5 * (a + a.T), requires_grad=True)
    (grad,) = torch.autograd.grad((mf.spd.log(x) * torch.tensor(h)).sum(), x)
    # D log(A)[h] = k where D exp(log A)[k] = h
    back = sl.expm_frechet(logm(a), grad.numpy(), compute_expm=False)
    np.testing.assert_allclose(back, h, rtol=1e-9, atol=1e-10)


def test_float32_gradient_at_close_eigenvalues_keeps_its_digits():
    q = torch.linalg.qr(torch.randn(6, 6, **DOUBLE))[0]
    values = torch.tensor([1.0, 1.0 + 1e-6, 1.0 + 3e-6, 1.0 + 1e-4, 2.0, 2.0 + 1e-5], **DOUBLE)
    h = torch.randn(6, 6, **DOUBLE)
    grads = []
    for dtype in (torch.float32, torch.float64):
        x = ((q * values) @ q.T).to(dtype)
        x = (0.5 * (x + x.T)).requires_grad_()
        grads.append(torch.autograd.grad((mf.spd.log(x) * (h + h.T).to(dtype)).sum(), x)[0].double())
    assert (grads[0] - grads[1]).abs().max() < 1e-5 * grads[1].abs().max()


# ---- properties of the sheet -------------------------------------------------------------------------------


def test_diagonal_matrices_are_batch_normalized_by_their_logarithms():
    """With commuting matrices LEM and AIM are Euclidean batch norm of log-eigenvalues with one shared variance."""
    logs = torch.randn(20, 4, **DOUBLE)
    x = torch.diag_embed(logs.exp())
    centred = logs - logs.mean(0)
    want = centred / (centred.square().sum(-1).mean() + 1e-5).sqrt()
    for metric in ("LEM", "AIM"):
        y = LieBNSPD(4, metric, karcher_tol=1e-12, bias=False, **DOUBLE)(x)
        torch.testing.assert_close(y.diagonal(dim1=-2, dim2=-1).log(), want)


@pytest.mark.parametrize(
    ("parameters", "factor"),
    [
        (("LEM", 1.0, 2.0, 0.5), 2.5),
        (("AIM", 1.5, 2.0, 0.5), 2.5),
        (("LCM", 1.0), 0.25),
        (("LCM", -0.5), 0.25),
        (("CRIM", 0.5), 1.0),
    ],
    ids=str,
)
def test_numbers_are_batch_normalized_by_their_logarithms(parameters, factor):
    x = torch.randn(30, **DOUBLE).exp()
    layer = LieBNSPD(1, *parameters, momentum=1.0, **DOUBLE)
    y = layer(x[:, None, None]).flatten()
    log = x.log()
    variance = factor * log.var(correction=0)
    torch.testing.assert_close(layer.running_var, variance)
    torch.testing.assert_close(y.log(), (log - log.mean()) / (variance + 1e-5).sqrt())


def test_aim_approaches_lem_as_theta_goes_to_0():
    p, q = spd(2, 4, 4)
    want = SPD("LEM", alpha=2.0, beta=0.1).distance(p, q)
    errors = [(SPD("AIM", t, 2.0, 0.1).distance(p, q) - want).abs().item() for t in (0.1, 0.01, 0.001)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4


def test_lcm_approaches_a_log_euclidean_metric_as_theta_goes_to_0():
    p, q = spd(2, 4, 4)
    v = SPD("LEM").deform(p) - SPD("LEM").deform(q)
    want = (0.5 * v.square().sum() - 0.25 * v.diagonal().square().sum()).sqrt()
    torch.testing.assert_close(SPD("LCM", 1e-4).distance(p, q), want, rtol=1e-3, atol=0)


def test_both_signs_of_theta_have_the_same_distances_to_the_identity():
    p, eye = spd(4, 4), torch.eye(4, **DOUBLE)
    torch.testing.assert_close(SPD("AIM", 0.7).distance(p, eye), SPD("AIM", -0.7).distance(p, eye))


def test_aim_is_affine_invariant():
    p, q = spd(2, 4, 4)
    a = torch.randn(4, 4, **DOUBLE)
    aim = SPD("AIM", beta=0.2)
    torch.testing.assert_close(aim.distance(a @ p @ a.T, a @ q @ a.T), aim.distance(p, q))


def test_one_step_of_the_flow_is_not_the_mean():
    """What the paper's code does by default: the output's mean is close to B, and is not B."""
    x = spd(10, 4, 4)
    aim = SPD("AIM")
    distances = []
    for steps in (1, 3, None):
        y = LieBNSPD(4, "AIM", karcher_steps=steps, bias=False, **DOUBLE)(x)
        distances.append(aim.distance(aim.frechet_mean(y, tol=1e-12), torch.eye(4, **DOUBLE)).item())
    assert distances[0] > 1e-2
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1e-5


def test_the_flow_converges_where_unit_steps_are_too_long():
    x = spd(6, 4, 4, spread=4.0)
    aim = SPD("AIM")
    mean = aim.frechet_mean(x, tol=1e-8)
    tangent = aim.log(x, mf.geometry.Center(mean.unsqueeze(0))).value.mean(0)
    assert tangent.norm() < 1e-6


def test_statistics_are_detached_unless_asked():
    x = spd(6, 4, 4)
    weight = torch.randn(4, 4, **DOUBLE)
    for metric in ("LEM", "AIM", "LCM"):
        grads = []
        for detach in (True, False):
            layer = LieBNSPD(4, metric, bias=False, detach_stats=detach, karcher_tol=1e-12, **DOUBLE)
            given = x.clone().requires_grad_()
            (layer(given) * weight).sum().backward()
            grads.append(given.grad)
        # Detached: the gradient of evaluation with the batch's statistics.
        layer = LieBNSPD(4, metric, bias=False, momentum=1.0, karcher_tol=1e-12, **DOUBLE)
        layer(x)
        given = x.clone().requires_grad_()
        (layer.eval()(given) * weight).sum().backward()
        torch.testing.assert_close(grads[0], given.grad)
        assert not torch.allclose(grads[0], grads[1], rtol=0.1)


def test_channels_have_their_own_statistics_and_may_share_them():
    x = spd(8, 3, 4, 4)
    layer = LieBNSPD((3, 4, 4), "LCM", **DOUBLE)
    y = layer(x)
    for c in range(3):
        single = LieBNSPD(4, "LCM", **DOUBLE)
        torch.testing.assert_close(single(x[:, c]), y[:, c])
        torch.testing.assert_close(single.running_mean, layer.running_mean[c])
    shared = LieBNSPD(4, "LCM", batch_dims=(0, 1), **DOUBLE)(x)
    torch.testing.assert_close(shared.flatten(0, 1), LieBNSPD(4, "LCM", **DOUBLE)(x.flatten(0, 1)))
    middle = LieBNSPD((8, 4, 4), "AIM", batch_dims=(1,), **DOUBLE)(x)
    first = LieBNSPD((8, 4, 4), "AIM", **DOUBLE)(x.transpose(0, 1))
    torch.testing.assert_close(middle, first.transpose(0, 1))


def test_momentum_none_is_the_average_over_batches():
    layer = LieBNSPD(4, "LEM", momentum=None, **DOUBLE)
    batches = [spd(5, 4, 4, seed=s) for s in range(3)]
    for x in batches:
        layer(x)
    want = torch.stack([mf.spd.log(x).mean(0) for x in batches]).mean(0)
    torch.testing.assert_close(layer.running_mean, want)


# ---- geoopt ------------------------------------------------------------------------------------------------


def test_distances_are_geoopts():
    geoopt = importlib.import_module("geoopt")
    p, q = spd(2, 5, 4, 4)
    theirs = geoopt.SymmetricPositiveDefinite()
    torch.testing.assert_close(SPD("AIM").distance(p, q), theirs.dist(p, q))
    torch.testing.assert_close(SPD("AIM").geodesic(p, q, 0.4), theirs.expmap(p, 0.4 * theirs.logmap(p, q)))
    with pytest.warns(UserWarning, match="not fully implemented"):
        lem = geoopt.SymmetricPositiveDefinite("LEM")
    torch.testing.assert_close(SPD("LEM").distance(p, q), lem.dist(p, q))


def test_without_geoopt_one_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "geoopt":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(importlib, "import_module", lambda name: without(name))
    for make in (lambda: LieBNSPD(3), LieBNRotation, lambda: mf.BiMap(4, 2), lambda: DomainLieBN(3, [0], bias=True)):
        with pytest.raises(ImportError, match=r'needs geoopt: pip install "evenly\[manifolds\]"'):
            make()
    LieBNSPD(3, parametrization="free")
    LieBNSPD(3, bias=False)
    LieBNCorrelation(3)
    DomainLieBN(3, [0])
    mf.BiMap(4, 2, parametrization="free")


# ---- rotations ---------------------------------------------------------------------------------------------


def test_so3_log_and_exp_are_scipys_at_every_angle():
    axis = torch.nn.functional.normalize(torch.randn(7, 3, **DOUBLE), dim=-1)
    for angle in (0.0, 1e-12, 1e-8, 1e-3, 1e-2, 0.3, 2.0, 3.0, np.pi - 1e-6, np.pi - 1e-9):
        a, b, c = (angle * axis).unbind(-1)
        zero = torch.zeros_like(a)
        v = torch.stack([zero, -c, b, c, zero, -a, -b, a, zero], -1).unflatten(-1, (3, 3))
        r = mf.so3_exp(v)
        np.testing.assert_allclose(r.numpy(), np.array([sl.expm(one) for one in v.numpy()]), atol=1e-14)
        torch.testing.assert_close(mf.so3_log(r), v, rtol=1e-7, atol=1e-14)


def test_so3_gradients_at_the_identity_and_near_half_a_turn():
    for angle in (0.0, 1e-9, 0.0099, 0.0101, 1.0, 3.1):
        z = torch.tensor([0.6 * angle, 0.0, 0.8 * angle], requires_grad=True, **DOUBLE)

        def turn(z):
            zero = torch.zeros_like(z[0])
            v = torch.stack([zero, -z[2], z[1], z[2], zero, -z[0], -z[1], z[0], zero]).view(3, 3)
            return mf.so3_log(mf.so3_exp(v))

        assert torch.autograd.gradcheck(turn, z, atol=1e-6)
        jacobian = torch.autograd.functional.jacobian(turn, z)
        assert jacobian.isfinite().all()


def so3_log(r):
    return (
        np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
        * Rotation.from_matrix(r).as_rotvec()[np.array([[0, 2, 1], [2, 0, 0], [1, 0, 0]])]
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_rotation_layer_is_the_oracle(side):
    x, bias = rotations(9, seed=3), rotations(seed=4)
    layer = LieBNRotation(side=side, karcher_tol=1e-13, momentum=0.3, **DOUBLE)
    with torch.no_grad():
        layer.bias.copy_(bias)
        layer.weight.fill_(0.6)
    y = layer(x).detach().numpy()
    batch, b = x.numpy(), bias.numpy()
    mean, step = batch[0], np.ones(1)
    while np.abs(step).max() > 1e-12:
        step = np.mean([so3_log(mean.T @ r) for r in batch], 0)
        mean = mean @ sl.expm(step)
    tangents = [so3_log(mean.T @ r if side == "left" else r @ mean.T) for r in batch]
    var = np.mean([(v**2).sum() for v in tangents])
    scaled = [sl.expm(0.6 / np.sqrt(var + 1e-5) * v) for v in tangents]
    np.testing.assert_allclose(y, [b @ r if side == "left" else r @ b for r in scaled], atol=1e-10)
    np.testing.assert_allclose(layer.running_mean.numpy(), sl.expm(0.3 * so3_log(mean)), atol=1e-10)
    np.testing.assert_allclose(layer.running_var.numpy(), 0.7 + 0.3 * var)
    torch.testing.assert_close(layer.geometry.frechet_mean(layer(x)), bias)


def test_running_rotation_stays_orthogonal():
    layer = LieBNRotation(parametrization="free", dtype=torch.float32)
    x = rotations(4).float()
    for _ in range(200):
        layer(x)
    assert (layer.running_mean.mT @ layer.running_mean - torch.eye(3)).abs().max() < 1e-6


# ---- correlation matrices ----------------------------------------------------------------------------------


def objective(u, c):
    """Its minimum, e^u, scales the rows of a correlation matrix to sums of 1."""
    d = np.exp(u)
    return 0.5 * d @ c @ d - u.sum(), d * (c @ d) - 1


@pytest.mark.parametrize("metric", ["ECM", "LECM", "OLM", "LSM"])
def test_charts_of_correlation_matrices(metric):
    c = correlations(6, 5, 5)
    geometry = Correlation(metric)
    w = geometry.deform(c)
    for one, chart in zip(c.numpy(), w.numpy(), strict=True):
        k = cholesky(one)
        unit = np.diag(1 / np.diag(k)) @ k
        if metric == "ECM":
            want = np.tril(unit, -1)
        elif metric == "LECM":
            want = np.real(sl.logm(unit))
        elif metric == "OLM":
            want = logm(one) - np.diag(np.diag(logm(one)))
        else:
            d = np.exp(minimize(objective, np.zeros(5), one, jac=True, options={"gtol": 1e-10}).x)
            np.testing.assert_allclose((np.diag(d) @ one @ np.diag(d)).sum(1), 1, rtol=1e-7)
            want = logm(np.diag(d) @ one @ np.diag(d))
            np.testing.assert_allclose(chart.sum(1), 0, atol=1e-12)
        np.testing.assert_allclose(chart, want, atol=1e-7 if metric == "LSM" else 1e-10)
    torch.testing.assert_close(geometry.undeform(w), c)
    torch.testing.assert_close(geometry.project(w), w)
    # A vector of the chart comes from the correlation matrix that it goes to.
    v = geometry.project(torch.randn(4, 5, 5, **DOUBLE))
    torch.testing.assert_close(geometry.deform(geometry.undeform(v)), v)


@pytest.mark.parametrize("metric", ["OLM", "LSM"])
def test_order_of_variables_does_not_matter(metric):
    p, q = correlations(2, 5, 5)
    order = torch.tensor([3, 1, 4, 0, 2])
    distance = Correlation(metric).distance
    torch.testing.assert_close(distance(p[order][:, order], q[order][:, order]), distance(p, q))


# ---- domains -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["LEM", "LCM", "AIM"])
def test_domains_are_the_oracle(metric):
    """Statistics of each domain, moved before they are used; the variance about the mean that has moved."""
    oracle = Oracle(metric)
    layer = DomainLieBN(3, [5, 7], metric, momentum=0.6, momentum_test=0.2, karcher_tol=1e-12, **DOUBLE)
    with torch.no_grad():
        layer.norm.weight.fill_(0.8)
    state = {(d, m): (np.eye(3), 1.0) for d in (5, 7) for m in (0.6, 0.2)}

    def inner(p, mean):
        return oracle.square_to_identity(oracle.product(oracle.inverse(mean), p))

    for step in range(3):
        x, labels = spd(8, 3, 3, seed=step), torch.tensor([5, 7, 7, 5, 5, 7, 5, 5])
        y = layer(x, labels).detach().numpy()
        for (d, m), (mean, var) in state.items():
            batch = x[labels == d].numpy()
            mean = oracle.between(mean, oracle.mean(batch), m)
            var = (1 - m) * var + m * np.mean([inner(p, mean) for p in batch])
            state[d, m] = mean, var
            if m == 0.6:
                want, _, _ = oracle.layer(batch, np.eye(3), 0.8, stats=(mean, var))
                np.testing.assert_allclose(y[labels == d], want, rtol=1e-7, atol=1e-9)
    layer.eval()
    for d in (5, 7):
        want, _, _ = oracle.layer(x.numpy(), np.eye(3), 0.8, stats=state[d, 0.2])
        got = layer(x, torch.full((8,), d)).detach().numpy()
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)
    # A new domain, from its unlabelled data.
    layer.refit(x, 7)
    want, _, _ = oracle.layer(x.numpy(), np.eye(3), 0.8)
    np.testing.assert_allclose(layer(x, torch.full((8,), 7)).detach().numpy(), want, rtol=1e-7, atol=1e-9)


def test_momentum_schedule():
    epochs = 10
    pairs = [mf.momentum_schedule(e, epochs, 32, 64, 0.9) for e in range(1, epochs + 1)]
    rho = 0.5 ** (1 / epochs)
    for e, (momentum, _) in enumerate(pairs, 1):
        assert momentum == pytest.approx(1 - (rho ** (epochs * (epochs - e) / (epochs - 1)) - rho**epochs))
    assert pairs[0] == pytest.approx((1.0, 0.1))
    assert pairs[-1] == pytest.approx((0.5, 1 - 0.9**0.5))


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LieBNSPD((3, 4)), "square"),
        (lambda: LieBNSPD(3, "EUC"), "expected one of 'AIM', 'LEM', 'LCM', 'CRIM'"),
        (lambda: LieBNSPD(3, "AIM", theta=0), "theta=0"),
        (lambda: LieBNSPD(3, "LEM", theta=0.5), "leave theta at 1"),
        (lambda: LieBNSPD(3, "LCM", alpha=2), "leave them at 1 and 0"),
        (lambda: LieBNSPD(3, alpha=0), "alpha above 0"),
        (lambda: LieBNSPD(3, beta=-0.4), r"alpha \+ n \* beta is -0.2 for 3 x 3"),
        (lambda: LieBNSPD(3, momentum=1.5), "momentum=1.5"),
        (lambda: LieBNSPD(3, eps=-1), "eps=-1"),
        (lambda: LieBNSPD(3, batch_dims=()), "one or more different axes"),
        (lambda: LieBNSPD(3, batch_dims=(1,)), "before the last two"),
        (lambda: LieBNSPD(3, karcher_steps=0), "at least 1, or None"),
        (lambda: LieBNSPD(3, karcher_tol=0), "above 0"),
        (lambda: LieBNSPD(3, parametrization="exp"), "expected one of 'manifold', 'free'"),
        (lambda: LieBNSPD(3, dtype=torch.float16), "expected float32 or float64"),
        (lambda: LieBNRotation(4), "3 x 3"),
        (lambda: LieBNRotation(side="up"), "expected 'left' or 'right'"),
        (lambda: LieBNCorrelation(4, "AIM"), "expected one of 'ECM', 'LECM', 'OLM', 'LSM'"),
        (lambda: DomainLieBN(3, []), "one or more domains"),
        (lambda: DomainLieBN(3, [1, 1]), "each once"),
        (lambda: DomainLieBN(3, [1], momentum_test=-1), "momentum_test=-1"),
        (lambda: mf.BiMap(3, 4), "orthonormal"),
        (lambda: mf.ReEig(0), "positive number"),
        (lambda: mf.momentum_schedule(0, 5), "epoch=0"),
        (lambda: mf.momentum_schedule(1, 5, 65), "batch_size=65"),
        (lambda: mf.momentum_schedule(1, 5, decay=1.0), "decay=1.0"),
        (lambda: SPD().frechet_mean(torch.eye(3).expand(2, 3, 3), dims=(1,)), "axes from 0 to 0"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_domains_refuse_labels():
    layer, x = DomainLieBN(3, [0, 1], **DOUBLE), spd(2, 3, 3)
    with pytest.raises(ValueError, match=r"holds \[4\], which are not among \[0, 1\]"):
        layer(x, torch.tensor([0, 4]))
    with pytest.raises(TypeError, match="integers"):
        layer(x, torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="one label a matrix"):
        layer(x, torch.tensor([0]))
    with pytest.raises(ValueError, match="at least one matrix"):
        layer.refit(x[:0], 0)


def test_a_third_derivative_is_refused():
    x = spd(3, 3).requires_grad_()
    y = mf.spd.log(x).square().sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second.sum().backward()


# ---- the layers of SPDNet ----------------------------------------------------------------------------------


def test_spdnet_layers():
    x = spd(3, 5, 5)
    bimap = mf.BiMap(5, 3, **DOUBLE)
    w = bimap.weight.detach().numpy()
    np.testing.assert_allclose(w.T @ w, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(bimap(x).detach().numpy(), [w.T @ a @ w for a in x.numpy()], atol=1e-12)
    values, vectors = np.linalg.eigh(x.numpy())
    want = np.einsum("bij,bj,bkj->bik", vectors, np.maximum(values, 0.8), vectors)
    np.testing.assert_allclose(mf.ReEig(0.8)(x).numpy(), want, atol=1e-12)
    logs = mf.LogEig()(x)
    flat = mf.LogEig(flatten=True)(x)
    np.testing.assert_allclose(logs.numpy(), [logm(a) for a in x.numpy()], atol=1e-10)
    torch.testing.assert_close(flat.norm(dim=-1), torch.linalg.matrix_norm(logs))


def test_a_network_trains_with_torchs_optimizer():
    """With parametrization="free" nothing of geoopt is needed."""
    x = spd(24, 5, 5)
    labels = (torch.linalg.slogdet(x)[1] > 0).long()
    network = torch.nn.Sequential(
        mf.BiMap(5, 3, parametrization="free", **DOUBLE),
        LieBNSPD(3, "LCM", parametrization="free", **DOUBLE),
        mf.ReEig(),
        mf.LogEig(flatten=True),
        torch.nn.Linear(6, 2, **DOUBLE),
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    weight = network[0].weight
    torch.testing.assert_close(weight.mT @ weight, torch.eye(3, **DOUBLE))
