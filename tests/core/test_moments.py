"""`moments` against the oracle and against einops.reduce."""

from __future__ import annotations

import einops
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import evenly
from core import oracle
from core.strategies import DTYPES, LAYOUTS, cases, lay_out


def check(x, pattern, rtol=1e-12, **options):
    got = evenly.moments(x, pattern, **options)
    arrays = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    mean, var, count = oracle.moments(x.double().numpy(), pattern, **arrays)
    assert tuple(got.mean.shape) == mean.shape
    assert tuple(got.var.shape) == mean.shape
    assert got.mean.dtype == got.var.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    np.testing.assert_array_equal(np.broadcast_to(np.asarray(got.count, dtype=float), count.shape), count)
    some = count > options.get("correction", 0)
    scale = max(1.0, float(np.abs(x.double().numpy()).max())) if x.numel() else 1.0
    np.testing.assert_allclose(got.mean.double().numpy()[some], mean[some], rtol=rtol, atol=rtol * scale)
    np.testing.assert_allclose(got.var.double().numpy()[some], var[some], rtol=rtol, atol=rtol * scale**2)
    return got


def test_is_a_named_tuple():
    m = evenly.moments(torch.randn(3, 4), "n c -> c")
    assert m._fields == ("mean", "var", "count")
    mean, var, count = m
    assert mean is m.mean
    assert var is m.var
    assert isinstance(m, evenly.Moments)
    assert np.all(np.asarray(count, dtype=float) == 3)


@given(
    data=st.data(),
    zero=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    how=st.sampled_from(LAYOUTS),
    masked=st.booleans(),
    seed=st.integers(0, 9999),
)
@settings(max_examples=150)
def test_random_patterns(data, zero, dtype, how, masked, seed):
    case = data.draw(cases(zero=zero))
    gen = torch.Generator().manual_seed(seed)
    x = lay_out((torch.randn(case.shape, generator=gen, dtype=torch.float64) * 2 + 1).to(dtype), how)
    options = {"mask": torch.rand(case.shape, generator=gen) < 0.7} if masked else {}
    got = check(x, case.pattern, 1e-12 if dtype == torch.float64 else 1e-6, **options, **case.sizes)
    if not masked and x.numel():
        want = einops.reduce(x.double(), case.pattern, "mean", **case.sizes)
        torch.testing.assert_close(got.mean.double(), want, rtol=1e-5, atol=1e-5)


@given(data=st.data(), how=st.sampled_from(LAYOUTS), masked=st.booleans(), seed=st.integers(0, 9999))
@settings(max_examples=100)
def test_random_ragged_patterns(data, how, masked, seed):
    case = data.draw(cases(leading_reduced=True))
    gen = torch.Generator().manual_seed(seed)
    x = lay_out(torch.randn(case.shape, generator=gen, dtype=torch.float64), how)
    by = torch.randint(0, 5, case.shape[:1], generator=gen)
    options = {"mask": torch.rand(case.shape, generator=gen) < 0.7} if masked else {}
    check(x, case.pattern, by=by - 2, **options, **case.sizes)
    check(x, case.pattern, by=by, num_groups=6, **options, **case.sizes)


def test_groups_come_in_the_order_of_the_labels():
    x = torch.tensor([1.0, 2.0, 3.0, 10.0])
    m = evenly.moments(x, by=torch.tensor([30, -5, 30, 7]))
    torch.testing.assert_close(m.mean, torch.tensor([2.0, 10.0, 2.0]))
    assert np.asarray(m.count, dtype=float).tolist() == [1, 1, 2]
    m = evenly.moments(x, by=torch.tensor([3, 0, 3, 1]), num_groups=5)
    assert np.asarray(m.count, dtype=float).tolist() == [1, 1, 0, 2, 0]
    torch.testing.assert_close(m.mean[[0, 1, 3]], torch.tensor([2.0, 10.0, 2.0]))


@pytest.mark.parametrize("correction", [0, 1])
def test_correction_as_torch(correction):
    x = torch.randn(5, 7, 3, dtype=torch.float64)
    m = check(x, "a b c -> c a", correction=correction)
    torch.testing.assert_close(m.var, x.var(1, correction=correction).T, rtol=1e-12, atol=1e-12)


def test_gradients():
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 5) < 0.7
    for options in [{}, {"mask": mask}, {"by": torch.tensor([0, 1, 1, 0])}, {"correction": 1}]:
        assert torch.autograd.gradcheck(lambda t, o=options: evenly.moments(t, "n c -> c", **o)[:2], x)
        assert torch.autograd.gradgradcheck(lambda t, o=options: evenly.moments(t, "n c -> c", **o)[:2], x)


def test_masked_nan_never_leaks():
    x = torch.randn(4, 5, dtype=torch.float64)
    mask = torch.rand(4, 5) < 0.7
    want = evenly.moments(x, "n c -> c", mask=mask)
    y = x.masked_fill(~mask, float("nan")).requires_grad_()
    got = evenly.moments(y, "n c -> c", mask=mask)
    torch.testing.assert_close(got.mean, want.mean, rtol=0, atol=0)
    torch.testing.assert_close(got.var, want.var, rtol=0, atol=0)
    (got.mean.sum() + got.var.sum()).backward()
    assert y.grad.isfinite().all()
    assert (y.grad[~mask] == 0).all()


def test_the_variance_is_never_negative_and_exact_for_constants():
    x = torch.full((1000, 3), 12345.678)
    m = evenly.moments(x, "n c -> c")
    assert (m.var >= 0).all()
    torch.testing.assert_close(m.mean, x[0], rtol=2e-7, atol=0)
    assert (m.var <= (12345.678 * 2**-23) ** 2).all()
    y = torch.randn(1 << 14, dtype=torch.float32) + 1e4
    torch.testing.assert_close(evenly.moments(y, "n -> ").var.double(), y.double().var(correction=0), rtol=1e-5, atol=0)
