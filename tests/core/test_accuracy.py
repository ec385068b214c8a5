"""On badly scaled input the result is never less accurate than PyTorch's, measured against extended precision.

``pytest tests/core/test_accuracy.py -s`` prints the table of errors.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evenly
from core import oracle

SHAPE = (8, 16, 12, 12)


def _outlier(x):
    x = x.clone()
    x.view(-1)[777] = 1e8
    return x


INPUTS = {
    "normal": lambda z: z,
    "mean 1e4": lambda z: z + 1e4,
    "mean -1e6": lambda z: z - 1e6,
    "times 1e-20": lambda z: z * 1e-20,
    "times 1e-5": lambda z: z * 1e-5,
    "times 1e15": lambda z: z * 1e15,
    "times 1e20": lambda z: z * 1e20,
    "outlier 1e8": _outlier,
    "constant": lambda z: torch.full_like(z, 0.1),
    "large constant": lambda z: torch.full_like(z, 12345.678),
    "one channel large": lambda z: torch.cat([z[:, :1] * 1e6, z[:, 1:]], 1),
    "mean far from spread": lambda z: z * 1e-3 + 100,
}


def _rms(x):
    return F.rms_norm(x, SHAPE[-1:], eps=1e-5)


OPERATORS = {
    "batch": (
        lambda x: evenly.normalize(x, "n c h w -> c"),
        lambda x: F.batch_norm(x, None, None, training=True),
        ("n c h w -> c", {}),
    ),
    "instance": (
        lambda x: evenly.normalize(x, "n c h w -> n c"),
        lambda x: F.instance_norm(x),
        ("n c h w -> n c", {}),
    ),
    "group": (
        lambda x: evenly.normalize(x, "n (g c) h w -> n g", g=4),
        lambda x: F.group_norm(x, 4),
        ("n (g c) h w -> n g", {"g": 4}),
    ),
    "layer": (
        lambda x: evenly.normalize(x, "... c h w -> ..."),
        lambda x: F.layer_norm(x, SHAPE[1:]),
        ("... c h w -> ...", {}),
    ),
    "rms": (
        lambda x: evenly.normalize(x, "... d -> ...", center=False, scale="rms"),
        _rms,
        ("... d -> ...", {"center": False, "scale": "rms"}),
    ),
    "l2": (
        lambda x: evenly.normalize(x, "... d -> ...", center=False, scale="l2"),
        lambda x: F.normalize(x, dim=-1),
        ("... d -> ...", {"center": False, "scale": "l2"}),
    ),
}


def _error(y, want):
    """Root of the mean squared error, relative to the size of the result; NaN where the result is not finite."""
    err = np.asarray(y.double()) - want
    return float(np.sqrt((err**2).mean())) / max(float(np.sqrt((want**2).mean())), 1e-30)


@pytest.fixture(scope="module")
def table():
    rows = []
    yield rows
    if rows:
        print(f"\n{'operator':10} {'input':22} {'type':9} {'layout':14} {'evenly':>9} {'torch':>9}")
        for name, kind, dtype, how, ours, theirs in rows:
            print(f"{name:10} {kind:22} {str(dtype)[6:]:9} {how:14} {ours:9.1e} {theirs:9.1e}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", OPERATORS)
def test_never_less_accurate_than_torch(name, kind, dtype, table):
    ours, theirs, (pattern, options) = OPERATORS[name]
    x = INPUTS[kind](torch.randn(SHAPE, dtype=torch.float64)).to(dtype)
    want = oracle.normalize(x.double().numpy(), pattern, **options)
    # Below this (five roundings) the order of the operations decides, not the algorithm.
    floor = {torch.float32: 3e-7, torch.float64: 6e-16, torch.bfloat16: 2.5e-3}[dtype]
    for how, view in [("contiguous", x), ("channels_last", x.contiguous(memory_format=torch.channels_last))]:
        a, b = _error(ours(view), want), _error(theirs(view), want)
        table.append((name, kind, dtype, how, a, b))
        if kind.endswith("constant") and name != "rms" and name != "l2":
            # x - mean is rounding noise over sqrt(eps): it must be no larger than torch's, and small.
            a, b = (float(f(view).double().abs().max()) for f in (ours, theirs))
            assert a <= max(1.05 * b, 1e-3), (how, a, b)
            continue
        if not np.isfinite(a):
            assert not np.isfinite(b), f"{how}: ours is not finite, torch's error is {b:.1e}"
            continue
        assert a <= max(1.1 * b, floor) or not np.isfinite(b), f"{how}: ours {a:.2e}, torch {b:.2e}"


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", ["batch", "instance", "group", "layer", "rms"])
def test_gradients_never_less_accurate_than_torch(name, kind):
    """The same for the gradient, against float64 (whose own error is far below that of float32)."""
    if kind.endswith("constant"):
        pytest.skip("the gradient at a constant is the gradient at rounding noise")
    ours, theirs, _ = OPERATORS[name]
    x = INPUTS[kind](torch.randn(SHAPE, dtype=torch.float64)).float()
    seed = torch.randn(SHAPE)

    def run(f, t, s):
        t = t.clone().requires_grad_()
        return torch.autograd.grad(f(t), t, s)[0]

    want = run(theirs, x.double(), seed.double()).numpy()
    a, b = _error(run(ours, x, seed), want), _error(run(theirs, x, seed), want)
    if not np.isfinite(a):
        assert not np.isfinite(b), f"ours is not finite, torch's error is {b:.1e}"
        return
    assert a <= max(1.2 * b, 5e-7) or not np.isfinite(b), f"ours {a:.2e}, torch {b:.2e}"


@pytest.mark.parametrize("magnitude", [1e-20, 1e-10, 1e10, 1e18])
@pytest.mark.parametrize("scale", ["l1", "max", "l2"])
def test_norms_do_not_overflow_or_vanish(scale, magnitude):
    """With eps=0 a norm is homogeneous: any finite scale of float32 input gives the same direction."""
    x = torch.randn(6, 9)
    want = oracle.normalize(x.numpy(), "n c -> n", center=False, scale=scale, eps=0.0)
    y = evenly.normalize(x * magnitude, "n c -> n", center=False, scale=scale, eps=0.0)
    if scale == "l2" and magnitude == 1e-20:
        # Squares of 1e-20 are below the smallest float32: torch's norm is no better; ours must not be worse.
        theirs = F.normalize(x * magnitude, dim=1, eps=0.0)
        if not np.allclose(theirs.numpy(), want, rtol=1e-3):
            pytest.skip("as in torch.nn.functional.normalize: the squares underflow")
    np.testing.assert_allclose(y.numpy(), want, rtol=1e-5, atol=1e-6)


def test_long_sums():
    """A million values a group: the error of a mean must not grow with their number."""
    x = torch.rand(1, 1 << 20) + 1000
    m = evenly.moments(x, "n d -> n")
    want = x.double()
    torch.testing.assert_close(m.mean.double(), want.mean(1), rtol=2e-7, atol=0)
    torch.testing.assert_close(m.var.double(), want.var(1, correction=0), rtol=2e-5, atol=0)
    half = (torch.rand(1 << 18, 2) + 8).half()
    m = evenly.moments(half, "n d -> d")
    torch.testing.assert_close(m.mean.double(), half.double().mean(0), rtol=2e-7, atol=0)
    torch.testing.assert_close(m.var.double(), half.double().var(0, correction=0), rtol=2e-5, atol=0)


def test_float16_does_not_overflow():
    """Squares and sums of float16 values exceed its range; statistics in float32 do not."""
    x = (torch.randn(4, 4096) * 1e4).half()
    y = evenly.normalize(x, "n d -> n")
    want = oracle.normalize(x.double().numpy(), "n d -> n")
    np.testing.assert_allclose(y.double().numpy(), want, rtol=2**-10, atol=1e-4)
    y = evenly.normalize(x, "n d -> n", center=False, scale="l2")
    want = oracle.normalize(x.double().numpy(), "n d -> n", center=False, scale="l2")
    np.testing.assert_allclose(y.double().numpy(), want, rtol=2**-9, atol=1e-6)
