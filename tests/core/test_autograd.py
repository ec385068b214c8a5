"""First and second derivatives of `normalize`, in float64 against finite differences and below it against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import evenly

SCALES = ["std", "rms", "l2", "l1", "max", None]
ACTIVATIONS = [None, "relu", "silu", "gelu"]
MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1], [1, 1, 1], [1, 0, 1]], dtype=torch.bool)
LABELS = torch.tensor([4, 2, 4, 2, 4])


def inputs():
    x = torch.randn(5, 3, dtype=torch.float64) * 2 + 1
    w, b, r = torch.randn(3), torch.randn(3), torch.randn(5, 3)
    return [t.double().requires_grad_() for t in (x, w, b, r)]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_every_option(scale, activation):
    """x, weight, bias and residual at once, for centre x mask x labels."""
    for center, masked, ragged in itertools.product(*[[True, False]] * 3):

        def run(x, w, b, r, center=center, masked=masked, ragged=ragged):
            return evenly.normalize(
                x,
                "n c -> c",
                center=center,
                scale=scale,
                activation=activation,
                weight=w,
                bias=b,
                residual=r,
                mask=MASK if masked else None,
                by=LABELS if ragged else None,
            )

        assert gradcheck(run, inputs()), (center, masked, ragged)
        assert gradgradcheck(run, inputs(), fast_mode=True), (center, masked, ragged)


@pytest.mark.parametrize(
    ("pattern", "shape", "sizes", "affine", "w_shape"),
    [
        ("n (g c) h -> n g", (2, 4, 3), {"g": 2}, "(g c)", (4,)),
        ("... d -> ...", (2, 2, 4), {}, None, (4,)),
        ("n c h -> n c", (2, 3, 4), {}, "c", (3,)),
        ("n c h -> h", (2, 3, 4), {}, None, (4,)),
        ("a b c d e -> b d", (2, 2, 2, 2, 2), {}, "b d", (2, 2)),
        ("a b -> ", (3, 4), {}, "b", (4,)),
    ],
)
@pytest.mark.parametrize("scale", ["std", "rms", "l2"])
def test_every_layout(pattern, shape, sizes, affine, w_shape, scale):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    w = torch.randn(w_shape, dtype=torch.float64, requires_grad=True)

    def run(x, w):
        return evenly.normalize(x, pattern, scale=scale, weight=w, bias=w, affine=affine, **sizes)

    assert gradcheck(run, (x, w))
    assert gradgradcheck(run, (x, w), fast_mode=True)
    y = x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
    assert gradcheck(run, (y, w))


@pytest.mark.parametrize("scale", ["l2", "l1", "max"])
def test_below_the_clamp_the_map_is_linear(scale):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = evenly.normalize(x, "n c -> n", center=False, scale=scale, eps=100.0)
    torch.testing.assert_close(y, x / 100, rtol=1e-12, atol=0)
    seed = torch.randn_like(x)
    (g,) = torch.autograd.grad(y, x, seed)
    torch.testing.assert_close(g, seed / 100, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", ["l2", "l1", "max", "std", "rms"])
def test_the_gradient_at_zero_is_finite(scale):
    for center in [True, False]:
        x = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
        y = evenly.normalize(x, "n c -> n", center=center, scale=scale)
        assert torch.equal(y, torch.zeros_like(x))
        y.sum().backward()
        assert x.grad.isfinite().all()


def test_return_stats_are_differentiable():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def run(x):
        y, m = evenly.normalize(x, "n c -> c", return_stats=True)
        return y, m.mean, m.var

    assert gradcheck(run, x)
    assert gradgradcheck(run, x)


def test_only_what_is_asked_for_gets_a_gradient():
    x, w, b, r = inputs()
    for need in itertools.product([False, True], repeat=4):
        tensors = [t.detach().requires_grad_(n) for t, n in zip((x, w, b, r), need, strict=True)]
        y = evenly.normalize(tensors[0], "n c -> c", weight=tensors[1], bias=tensors[2], residual=tensors[3])
        assert y.requires_grad == any(need)
        if any(need):
            y.pow(2).sum().backward()
        for t, n in zip(tensors, need, strict=True):
            assert (t.grad is not None) == n
    with torch.no_grad():
        assert not evenly.normalize(x, "n c -> c", weight=w).requires_grad
    with torch.inference_mode():
        evenly.normalize(x, "n c -> c", weight=w)


# The analytic gradient is orthogonal to what the statistic takes out.
def test_the_gradient_ignores_shift_and_scale():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    y = evenly.normalize(x, "n c -> n", eps=0.0)
    (g,) = torch.autograd.grad(y, x, torch.randn_like(x))
    assert g.abs().max() > 1e-2
    torch.testing.assert_close(g.sum(1), torch.zeros(4).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close((g * x).sum(1), torch.zeros(4).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_low_precision_gradients(scale, activation, dtype):
    """Gradients in float32 or less against the float64 gradients at the same (rounded) point."""
    for center, masked, ragged in itertools.product(*[[True, False]] * 3):
        base = [t.detach().to(dtype) for t in inputs()]
        if scale == "max":  # ties of rounded numbers have no gradient to agree on
            base[0] = (torch.randperm(15).reshape(5, 3) - 4).to(dtype) * 0.25
        seed = torch.randn(5, 3).to(dtype)
        grads = []
        for kind in [torch.float64, dtype]:
            tensors = [t.to(kind).requires_grad_() for t in base]
            y = evenly.normalize(
                tensors[0],
                "n c -> c",
                center=center,
                scale=scale,
                eps=0.01,
                activation=activation,
                weight=tensors[1],
                bias=tensors[2],
                residual=tensors[3],
                mask=MASK if masked else None,
                by=LABELS if ragged else None,
            )
            grads.append(torch.autograd.grad(y, tensors, seed.to(kind)))
        unit = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        for want, got in zip(*grads, strict=True):
            assert got.dtype == dtype
            # Relative to the terms of the sum, which are of size 1 where they cancel.
            err = (got.double() - want).abs().max() / want.abs().max().clamp_min(0.1)
            assert err < 4 * unit, (center, masked, ragged, float(err))
