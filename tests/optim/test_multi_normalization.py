"""SinkGD, SWAN and the general scheme against float64 references written from the paper, and their properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from evenly import optim
from evenly.optim import (
    SWAN,
    MultiNormGD,
    SinkGD,
    multi_normalize,
    project_col_rms,
    project_row_rms,
    project_sign,
    project_spectral,
    sr_sinkhorn,
)


def sinkhorn(x, iters):
    """Algorithm 3 of the paper, in numpy."""
    x = x.astype(np.float64)
    m, n = x.shape
    for _ in range(iters):
        x = math.sqrt(n) * np.divide(x, r := np.linalg.norm(x, axis=1, keepdims=True), where=r > 0, out=0 * x)
        x = math.sqrt(m) * np.divide(x, c := np.linalg.norm(x, axis=0, keepdims=True), where=c > 0, out=0 * x)
    return x


@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    iters=st.integers(1, 6),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-30, 1e-12, 1.0, 1e12, 1e30]),
    zeros=st.sampled_from([0.0, 0.5]),
)
def test_sr_sinkhorn_is_the_papers(m, n, iters, seed, scale, zeros):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(m, n)) * (rng.random((m, n)) >= zeros)
    got = sr_sinkhorn(torch.tensor(x * scale), iters, eps=0.0)
    np.testing.assert_allclose(got, sinkhorn(x, iters), rtol=1e-9, atol=1e-12)
    single = sr_sinkhorn(torch.tensor(x * scale, dtype=torch.float32), iters, eps=0.0)
    np.testing.assert_allclose(single, sinkhorn(x, iters), rtol=2e-4, atol=1e-5)


def test_rows_and_columns_become_even():
    x = torch.randn(6, 10)
    for iters in (1, 5):
        torch.testing.assert_close(sr_sinkhorn(x, iters).norm(dim=0), torch.full((10,), 6.0).sqrt(), rtol=1e-6, atol=0)
    far, near = (abs(sr_sinkhorn(x, k).norm(dim=1) - math.sqrt(10)).max() for k in (1, 20))
    assert near < 1e-5 < far
    assert sr_sinkhorn(x).norm().item() == pytest.approx(math.sqrt(60), rel=1e-6)
    assert torch.equal(sr_sinkhorn(x).sign(), x.sign())


def test_squares_are_sinkhorns():
    x = torch.randn(5, 7, dtype=torch.float64)
    y = x.square()
    for _ in range(4):
        y = 7 * y / y.sum(1, keepdim=True)
        y = 5 * y / y.sum(0, keepdim=True)
    torch.testing.assert_close(sr_sinkhorn(x, 4).square(), y, rtol=1e-12, atol=1e-12)


def test_invariances():
    x = torch.randn(5, 7, dtype=torch.float64)
    torch.testing.assert_close(sr_sinkhorn(3 * x), sr_sinkhorn(x), rtol=1e-12, atol=1e-12)
    rows, columns = torch.rand(5, 1).double() + 0.1, torch.rand(1, 7).double() + 0.1
    torch.testing.assert_close(sr_sinkhorn(rows * x * columns, 300), sr_sinkhorn(x, 300), rtol=1e-7, atol=1e-9)
    assert not torch.allclose(sr_sinkhorn(rows * x * columns, 1), sr_sinkhorn(x, 1))
    a, b = torch.randn(4, 1), torch.randn(1, 6)
    torch.testing.assert_close(sr_sinkhorn(a @ b, 1), a.sign() @ b.sign(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sr_sinkhorn(b), b.sign(), rtol=1e-6, atol=1e-6)  # one row
    q = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    torch.testing.assert_close(sr_sinkhorn(q), q * math.sqrt(8), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(sr_sinkhorn(x, 1), sr_sinkhorn(x.T, 1).T), "the order matters"


def test_the_product_with_the_projection_grows():
    x = project_col_rms(torch.randn(6, 9, dtype=torch.float64))
    products = []
    for _ in range(8):
        y = project_row_rms(x)
        products.append((x * y).sum())
        z = project_col_rms(y)
        products.append((y * z).sum())
        x = z
    assert (torch.stack(products).diff() >= -1e-9).all()


def test_zero_rows_and_columns_stay_zero():
    x = torch.randn(4, 5)
    x[1], x[:, 2] = 0, 0
    for y in (sr_sinkhorn(x), multi_normalize(x, [project_row_rms, project_col_rms])):
        assert y.isfinite().all()
        assert (y[1] == 0).all()
        assert (y[:, 2] == 0).all()
        assert (y[0, :2] != 0).all()
    for function in (sr_sinkhorn, project_spectral, project_row_rms, project_col_rms):
        assert (function(torch.zeros(3, 4)) == 0).all()


def test_batches_half_types_and_gradients():
    x = torch.randn(2, 3, 4, 5)
    batch = sr_sinkhorn(x)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(batch[i, j], sr_sinkhorn(x[i, j]), rtol=1e-5, atol=1e-6)
    half = sr_sinkhorn((x * 1e-8).bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, sr_sinkhorn((x * 1e-8).bfloat16().float()).bfloat16())
    torch.autograd.gradcheck(lambda t: sr_sinkhorn(t, 3), torch.randn(3, 4, dtype=torch.float64, requires_grad=True))


def test_multi_normalize_of_rows_and_columns_is_sr_sinkhorn():
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(
        multi_normalize(x, [project_row_rms, project_col_rms], 5), sr_sinkhorn(x, 5), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("project", [project_row_rms, project_col_rms, project_sign, project_spectral])
def test_projections_land_on_one_sphere_and_are_dual(project):
    # Each is the arg max of <X, Z> over its ball: no other point of the sphere it lands on that obeys its norm is
    # better; here: it beats the other projections' points scaled into its own ball.
    x = torch.randn(6, 9, dtype=torch.float64)
    norms = {
        project_row_rms: lambda z: z.norm(dim=1).max() / 3,
        project_col_rms: lambda z: z.norm(dim=0).max() / math.sqrt(6),
        project_sign: lambda z: z.abs().max(),
        project_spectral: lambda z: torch.linalg.matrix_norm(z, 2) / 3,
    }
    out = project(x)
    assert out.norm().item() == pytest.approx(math.sqrt(54), rel=1e-2)
    assert norms[project](out).item() == pytest.approx(1, rel=1e-2)
    for other in norms:
        z = other(x)
        assert (x * z).sum() / norms[project](z) <= (x * out).sum() * 1.01


@pytest.mark.parametrize("shape", [(6, 6), (4, 7), (4, 20), (20, 4), (3, 4, 20), (1, 5)])
def test_spectral(shape):
    x = torch.randn(shape, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    want = u @ vh * math.sqrt(max(shape[-2:]))
    torch.testing.assert_close(project_spectral(x, "svd"), want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(project_spectral(x, iters=12), want, rtol=1e-6, atol=1e-6)
    if shape[-2] <= shape[-1] and shape != (6, 6):
        y = project_spectral(x.float())
        gram = y @ y.mT / shape[-1]
        torch.testing.assert_close(gram, torch.eye(shape[-2]).expand_as(gram), rtol=0, atol=0.03)
    torch.testing.assert_close(project_spectral(x * 1e25), project_spectral(x), rtol=1e-9, atol=1e-9)


def test_spectral_accuracy_is_as_documented():
    q, _ = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))
    p, _ = torch.linalg.qr(torch.randn(160, 40, dtype=torch.float64))
    for iters, least in ((5, 1 / 390), (7, 1 / 7000)):
        s = torch.logspace(0, math.log10(least), 40, dtype=torch.float64)
        s[:1] = s[1:].pow(4).sum().pow(0.25)  # about the documented bound
        bound = s.pow(4).sum().pow(0.25)
        s = s.clamp_min(bound * least)
        for x in ((q * s) @ q.T, (q * s) @ p.T):
            got = torch.linalg.svdvals(project_spectral(x, iters=iters)) / math.sqrt(x.shape[1])
            assert abs(got - 1).max() < 0.0101
    low_rank = torch.randn(12, 2) @ torch.randn(2, 50)
    out = project_spectral(low_rank)
    assert out.isfinite().all()
    assert torch.linalg.svdvals(out)[:2].sub(math.sqrt(50)).abs().max() < 0.2


def run(make, matrices, steps=20, **more):
    params = [nn.Parameter(w.clone()) for w in matrices]
    optimizer = make(params, **more)
    gen = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=gen).to(p.dtype)
        optimizer.step()
    return params, optimizer


def test_sinkgd_over_20_steps():
    shapes = ((6, 4), (8, 8), (6, 4), (3, 11))
    start = [torch.randn(shape) for shape in shapes]
    params, optimizer = run(SinkGD, start, lr=0.01, weight_decay=0.1)
    gen = torch.Generator().manual_seed(0)
    want = [w.double().numpy() for w in start]
    for _ in range(20):
        for k, shape in enumerate(shapes):
            g = torch.randn(shape, generator=gen).double().numpy()
            want[k] = want[k] * (1 - 0.01 * 0.1) - 0.01 * sinkhorn(g, 5)
    for p, w in zip(params, want, strict=True):
        np.testing.assert_allclose(p.detach(), w, rtol=1e-5, atol=1e-5)
    assert not optimizer.state


def test_step_has_a_fixed_length():
    (w,), _ = run(SinkGD, [torch.zeros(16, 8)], steps=1, lr=0.01)
    assert w.square().mean().sqrt().item() == pytest.approx(0.01, rel=1e-5)


def test_swan_is_rows_then_spectrum():
    (w,), optimizer = run(SWAN, [torch.zeros(4, 16)], steps=1, lr=0.5, method="svd")
    x = project_row_rms(w.grad)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(w.detach(), -0.5 * 4 * u @ vh, rtol=1e-4, atol=1e-4)
    assert not optimizer.state
    (fast,), _ = run(SWAN, [torch.zeros(4, 16)], steps=1, lr=0.5)
    assert (fast - w).abs().max() < 0.02 * w.abs().max()


def test_momentum_is_before_the_normalization():
    w = nn.Parameter(torch.zeros(2, 2))
    optimizer = SinkGD([w], lr=1.0, momentum=0.5)
    first, second = torch.tensor([[4.0, 1.0], [1.0, 4.0]]), torch.tensor([[-1.0, 2.0], [0.5, 1.0]])
    for g in (first, second):
        w.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(w.detach(), -sr_sinkhorn(first) - sr_sinkhorn(0.5 * first + second))
    assert torch.equal(optimizer.state[w]["momentum_buffer"], 0.5 * first + second)


def test_blocks_and_transposed_storage():
    g = torch.randn(12, 5)
    fused, transposed, both = (nn.Parameter(torch.zeros(s)) for s in ((12, 5), (5, 12), (5, 12)))
    optimizer = SinkGD(
        [
            {"params": [fused], "blocks": 3},
            {"params": [transposed], "transpose": True},
            {"params": [both], "blocks": 3, "transpose": True},
        ],
        lr=1.0,
    )
    fused.grad, transposed.grad, both.grad = g, g.t().contiguous(), g.t().contiguous()
    optimizer.step()
    apart = -torch.cat([sr_sinkhorn(part) for part in g.split(4)])
    torch.testing.assert_close(fused.detach(), apart)
    torch.testing.assert_close(transposed.detach(), -sr_sinkhorn(g).t())
    torch.testing.assert_close(both.detach(), apart.t())
    for group, message in (
        ({"blocks": 5}, "blocks=5 does not divide the 12 rows"),
        ({"blocks": 0}, "blocks=0, expected a whole number"),
        ({"rule": "sgd"}, "rule='sgd', expected one of 'matrix', 'adam'"),
    ):
        with pytest.raises(ValueError, match=message):
            SinkGD([{"params": [fused], **group}])


def test_not_a_matrix():
    with pytest.raises(ValueError, match=r"SinkGD needs matrices; put parameter 'bias' of shape \(3,\) into a group"):
        SinkGD(nn.Linear(2, 3).named_parameters())
    with pytest.raises(ValueError, match=r"SWAN needs matrices; put parameter 0 of its group of shape \(2, 1, 3\)"):
        SWAN([nn.Parameter(torch.zeros(2, 1, 3))])
    for call in (lambda: sr_sinkhorn(torch.ones(3)), lambda: project_spectral(torch.ones(3))):
        with pytest.raises(ValueError, match=r"x has shape \(3,\), expected \(\.\.\., m, n\)"):
            call()
    with pytest.raises(TypeError, match=r"torch.int64, expected a floating-point"):
        sr_sinkhorn(torch.ones(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="projections is empty"):
        multi_normalize(torch.ones(2, 2), [])
    with pytest.raises(ValueError, match="expected one function or more"):
        MultiNormGD([nn.Parameter(torch.ones(2, 2))], [])


def test_adam_groups_are_adamw():
    params, others = ([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 3, 2))] for _ in range(2))
    ours = SinkGD([{"params": params, "rule": "adam"}], lr=0.01, weight_decay=0.1)
    adamw = torch.optim.AdamW(others, lr=0.01, weight_decay=0.1)
    for step in range(5):
        for p, other in zip(params, others, strict=True):
            p.grad = torch.full_like(p, step - 1.5)
            other.grad = p.grad.clone()
        ours.step()
        adamw.step()
    torch.testing.assert_close(params, others, rtol=1e-6, atol=1e-7)


def test_skip_nonfinite():
    broken, sound = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = SinkGD([broken, sound], lr=0.1, weight_decay=0.1, skip_nonfinite=True)
    broken.grad, sound.grad = torch.tensor([[1.0, math.inf], [1.0, 1.0]]), torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(broken.data, torch.ones(2, 2))
    torch.testing.assert_close(sound.data, torch.full((2, 2), 0.99 - 0.1))


def test_it_learns_with_for_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 11))
    optimizer = SinkGD(optim.for_model(model, exclude=["0", "3"]))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
    tokens, targets = torch.arange(11), torch.arange(11).roll(3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens), targets)
        loss.backward()
        optimizer.step()
        scheduler.step()
    assert loss < 0.05
