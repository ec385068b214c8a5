"""`normalize` against the oracle: the patterns of the documentation, the grid of options, random patterns."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

import evenly
from core import oracle
from core.strategies import DTYPES, LAYOUTS, Case, cases, lay_out

SCALES = ["std", "rms", "l2", "l1", "max", None]
ACTIVATIONS = [None, "relu", "silu", "gelu"]

# One rounding of the result to its type, plus what arithmetic in float32 (float64) may lose before that.
TOLERANCE = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (2e-6, 2e-6),
    torch.bfloat16: (2**-8, 1e-5),
    torch.float16: (2**-10, 1e-5),
}


def _np(t):
    return t.detach().double().numpy() if isinstance(t, torch.Tensor) and t.is_floating_point() else t


def check(x, pattern, **options):
    """normalize(x) equals the oracle on the same (already rounded) values."""
    y = evenly.normalize(x, pattern, **options)
    tensors = {k: _np(v) for k, v in options.items()}
    want = oracle.normalize(_np(x), pattern, **{k: v for k, v in tensors.items() if k != "return_stats"})
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    rtol, atol = TOLERANCE[x.dtype]
    size = float(np.abs(want).max()) if want.size else 0.0
    np.testing.assert_allclose(_np(y), want, rtol=rtol, atol=atol * max(1.0, size), err_msg=f"{pattern} {options}")
    return y


# ---- the patterns of the documentation -------------------------------------------------------------------

DOCUMENTED = {
    "batch": ((4, 6, 5, 3), "n c h w -> c", {}),
    "group": ((3, 8, 4, 2), "n (g c) h w -> n g", {"g": 4}),
    "instance": ((3, 4, 5, 2), "n c h w -> n c", {}),
    "layer": ((3, 4, 16), "... d -> ...", {}),
    "weight standardization": ((5, 3, 3, 2), "o i kh kw -> o", {}),
    "advantages": ((6, 8), "prompt sample -> prompt", {}),
    "rms": ((3, 4, 16), "... d -> ...", {"center": False, "scale": "rms"}),
    "anonymous one": ((4, 1, 6), "n 1 d -> d", {}),
    "right side like keepdim": ((4, 3, 6), "n c h -> 1 c 1", {}),
    "another order on the right": ((4, 3, 6), "n c h -> h n", {}),
    "composed on the right": ((4, 3, 6), "n c h -> (h n)", {}),
    "everything": ((4, 3), "a b -> ", {}),
    "nothing reduced": ((4, 3), "a b -> a b", {"scale": "rms"}),
    "anonymous two": ((4, 6), "n (c 2) -> c", {}),
    "ellipsis in the middle": ((2, 3, 4, 5), "n ... d -> n d", {}),
    "ellipsis for nothing": ((4, 5), "n ... d -> d", {}),
    "three composed axes": ((2, 24), "n (a b c) -> n b", {"a": 2, "c": 3}),
    "extra spaces": ((2, 6), "  n   ( a b )  ->   n a ", {"a": 2}),
}


@pytest.mark.parametrize("name", DOCUMENTED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_documented_patterns(name, dtype):
    shape, pattern, options = DOCUMENTED[name]
    check((torch.randn(shape, dtype=torch.float64) * 2 + 3).to(dtype), pattern, **options)


def test_equals_the_functions_of_torch():
    x = torch.randn(4, 6, 5, 3, dtype=torch.float64) * 3 + 2
    w, b = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(
        evenly.normalize(x, "n c h w -> c", weight=w, bias=b),
        F.batch_norm(x, None, None, w, b, training=True),
        **close,
    )
    torch.testing.assert_close(
        evenly.normalize(x, "n (g c) h w -> n g", g=3, weight=w, bias=b, affine="(g c)"),
        F.group_norm(x, 3, w, b),
        **close,
    )
    torch.testing.assert_close(
        evenly.normalize(x, "n c h w -> n c", weight=w, bias=b, affine="c"),
        F.instance_norm(x, weight=w, bias=b),
        **close,
    )
    v = torch.randn(3, dtype=torch.float64)
    torch.testing.assert_close(
        evenly.normalize(x, "... d -> ...", weight=v, bias=v), F.layer_norm(x, (3,), v, v), **close
    )
    v = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(
        evenly.normalize(x, "... h w -> ...", weight=v, bias=v), F.layer_norm(x, (5, 3), v, v), **close
    )
    v = torch.randn(3, dtype=torch.float64)
    torch.testing.assert_close(
        evenly.normalize(x, "... d -> ...", center=False, scale="rms", weight=v, eps=1e-3),
        F.rms_norm(x, (3,), v, 1e-3),
        **close,
    )
    torch.testing.assert_close(
        evenly.normalize(x, "n c h w -> n h w", center=False, scale="l2"), F.normalize(x, dim=1), **close
    )


def test_statistics_of_the_result():
    """The definition itself: mean 0 and mean square 1 in every group, nothing else moved."""
    x = torch.randn(5, 8, 6, dtype=torch.float64) * 7 + 100
    y = evenly.normalize(x, "n (g c) h -> n g", g=2, eps=0.0).reshape(5, 2, -1)
    torch.testing.assert_close(y.mean(-1), torch.zeros(5, 2, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(y.pow(2).mean(-1), torch.ones(5, 2, dtype=torch.float64), rtol=0, atol=1e-12)
    # Invariant to a scale and a shift of every group, and not the identity.
    z = evenly.normalize(3 * x + 5, "n (g c) h -> n g", g=2, eps=0.0).reshape(5, 2, -1)
    torch.testing.assert_close(z, y, rtol=0, atol=1e-11)
    assert (y - x.reshape(y.shape)).abs().min() > 1


# ---- the grid of options ---------------------------------------------------------------------------------

AFFINES = [  # pattern, affine=, shape of the weight
    ("n c h -> c", None, (6,)),
    ("n c h -> n", None, (4,)),
    ("n c h -> n c", "c", (6,)),
    ("n (g c) h -> n g", "(g c)", (6,)),
    ("n (g c) h -> n g", "g", (3,)),
    ("n (g c) h -> g", None, (3,)),
    ("n c h -> n", "c h", (6, 5)),
    ("n c h -> ", "h", (5,)),
    ("n c h -> ", "n c h", (4, 6, 5)),
    ("... d -> ...", None, (5,)),
    ("... c d -> ...", None, (6, 5)),
    ("n ... -> n", None, (4,)),
    ("n c h -> n c", "", ()),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("pattern", "affine", "shape"), AFFINES)
def test_affine(pattern, affine, shape, dtype):
    x = torch.randn(4, 6, 5).to(dtype)
    sizes = {"g": 3} if "(g c)" in pattern else {}
    for with_weight, with_bias in [(True, False), (False, True), (True, True)]:
        options = {**sizes}
        if affine:
            options["affine"] = affine
        if with_weight:
            options["weight"] = torch.randn(shape).to(dtype)
        if with_bias:
            options["bias"] = torch.randn(shape).to(dtype)
        check(x, pattern, **options)


def test_half_input_with_float32_parameters():
    x = torch.randn(4, 6, 5).bfloat16()
    w = torch.randn(6, requires_grad=True)
    b = torch.randn(6, requires_grad=True)
    y = check(x, "n c h -> c", weight=w, bias=b)
    y.float().pow(2).sum().backward()
    assert w.grad.dtype == torch.float32


@pytest.mark.parametrize("ragged", [False, True], ids=["", "by"])
@pytest.mark.parametrize("center", [True, False], ids=["centred", "raw"])
@pytest.mark.parametrize("scale", SCALES)
def test_grid(scale, center, ragged):
    """Every combination of centre, scale, activation, residual, affine and mask, with and without labels."""
    x = torch.randn(6, 4, 5, dtype=torch.float64) * 2 + 1
    w, b = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    residual = torch.randn_like(x)
    mask = torch.rand(6, 4, 5) < 0.7
    by = {"by": torch.tensor([7, -3, 7, 7, 0, -3])} if ragged else {}
    for activation, aff, res, masked in itertools.product(ACTIVATIONS, *[[False, True]] * 3):
        options = {"center": center, "scale": scale, "activation": activation, **by}
        if aff:
            options |= {"weight": w, "bias": b, "affine": "c"}
        if res:
            options["residual"] = residual
        if masked:
            options["mask"] = mask
        check(x, "n c h -> c", **options)


@pytest.mark.parametrize("scale", SCALES)
def test_eps(scale):
    x = torch.randn(4, 6, dtype=torch.float64)
    for eps in [0.0, 1e-12, 0.1, 10.0]:
        check(x, "n c -> n", scale=scale, eps=eps)
    # The default of each scale.
    tiny = x * 1e-7
    check(tiny, "n c -> n", scale=scale)
    check(tiny * 1e-7, "n c -> n", scale=scale)


@pytest.mark.parametrize("correction", [0, 1, 2])
def test_correction(correction):
    x = torch.randn(5, 6, dtype=torch.float64)
    y = check(x, "n c -> n", correction=correction, eps=0.0)
    torch.testing.assert_close(
        y, (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, correction=correction), rtol=1e-12, atol=1e-12
    )
    mask = torch.rand(5, 6) < 0.8
    mask[:, :3] = True
    check(x, "n c -> n", correction=correction, mask=mask)
    check(x, "n c -> c", correction=correction, by=torch.tensor([0, 0, 0, 0, 0]))


def test_residual_broadcasts_and_masks_to_zero():
    x = torch.randn(4, 3, dtype=torch.float64)
    mask = torch.tensor([[True], [False], [True], [True]])
    y = check(x, "n c -> c", mask=mask, residual=torch.randn(4, 3, dtype=torch.float64), bias=torch.ones(3).double())
    assert torch.equal(y[1], torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("mask_shape", [(4, 3, 5), (4, 1, 1), (1, 3, 1), (5,), (3, 5), (1, 1, 5), (1,)])
def test_masks_broadcast(mask_shape):
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    for pattern in ["n c h -> c", "n c h -> n", "n c h -> h c", "n c h -> ", "... h -> ..."]:
        check(x, pattern, mask=torch.rand(mask_shape) < 0.6)
        check(x, pattern, mask=torch.ones(mask_shape, dtype=torch.bool))
        y = check(x, pattern, mask=torch.zeros(mask_shape, dtype=torch.bool), bias=torch.ones(()).double())
        assert torch.equal(y, torch.zeros_like(x))


def test_stats_given():
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    mean, var = torch.randn(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64) + 0.5
    w = torch.randn(6, dtype=torch.float64)
    y = check(x, "n c h -> c", stats=(mean, var), weight=w, activation="relu")
    torch.testing.assert_close(y, F.relu(F.batch_norm(x, mean, var, w)), rtol=0, atol=1e-12)
    check(x, "n c h -> c", stats=(mean, var), center=False)
    check(x, "n c h -> c", stats=(mean, var), scale=None)
    # What moments measures and return_stats returns is what stats= takes, in the order of the right-hand side.
    for pattern, sizes in [("n c h -> h n", {}), ("n (g c) h -> n g", {"g": 2}), ("n c h -> 1 c 1", {})]:
        plain = evenly.normalize(x, pattern, **sizes)
        m = evenly.moments(x, pattern, **sizes)
        torch.testing.assert_close(
            evenly.normalize(x, pattern, stats=(m.mean, m.var), **sizes), plain, rtol=1e-12, atol=1e-12
        )
        again, measured = evenly.normalize(x, pattern, return_stats=True, **sizes)
        torch.testing.assert_close(again, plain, rtol=0, atol=0)
        torch.testing.assert_close(measured.mean, m.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(measured.var, m.var, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scale", ["std", "rms", None])
def test_returned_stats_reproduce_the_result(scale, center):
    """The statistics that were used, given back as stats=, give the same result, whatever they are of."""
    x = torch.randn(5, 6, dtype=torch.float64) + 2
    mask = torch.rand(5, 6) < 0.7
    for options in [{}, {"mask": mask}, {"by": torch.tensor([1, 0, 1, 1, 0])}, {"correction": 1}]:
        call = {"scale": scale, "center": center, **options}
        y, m = evenly.normalize(x, "n c -> c", return_stats=True, **call)
        call.pop("correction", None)
        torch.testing.assert_close(
            evenly.normalize(x, "n c -> c", stats=(m.mean, m.var), **call), y, rtol=1e-12, atol=1e-12
        )


def test_stats_carry_gradient():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    mean = torch.randn(6, dtype=torch.float64, requires_grad=True)
    var = (torch.rand(6, dtype=torch.float64) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: evenly.normalize(a[0], "n c -> c", stats=a[1:]), (x, mean, var))


# ---- random patterns -------------------------------------------------------------------------------------


@st.composite
def options_for(draw, case: Case, seed: int) -> dict:
    gen = torch.Generator().manual_seed(seed)
    options: dict = {"center": draw(st.booleans()), "scale": draw(st.sampled_from(SCALES))}
    options["activation"] = draw(st.sampled_from(ACTIVATIONS))
    lay = oracle.layout(case.pattern, case.shape, **case.sizes)
    names = [n for n in lay.names if n.isidentifier()]
    if names and draw(st.booleans()):
        chosen = [n for n in names if draw(st.booleans())] or names[:1]
        options["affine"] = " ".join(chosen)
        shape = [lay.sizes[n] for n in chosen]
        options["weight"] = torch.randn(shape, generator=gen, dtype=torch.float64)
        if draw(st.booleans()):
            options["bias"] = torch.randn(shape, generator=gen, dtype=torch.float64)
    if draw(st.booleans()):
        options["mask"] = torch.rand(case.shape, generator=gen) < 0.7
    if draw(st.booleans()):
        options["residual"] = torch.randn(case.shape, generator=gen, dtype=torch.float64)
    return options


def _cast(options, dtype):
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}


@given(
    data=st.data(),
    zero=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    how=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 9999),
)
@settings(max_examples=300)
def test_random_patterns(data, zero, dtype, how, seed):
    case = data.draw(cases(zero=zero))
    options = _cast(data.draw(options_for(case, seed)), dtype)
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1
    # eps large enough that a group of equal values is not a division of rounding errors by rounding errors.
    check(lay_out(x.to(dtype), how), case.pattern, eps=0.5, **options, **case.sizes)


@given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    how=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 9999),
)
@settings(max_examples=200)
def test_random_ragged_patterns(data, dtype, how, seed):
    case = data.draw(cases(leading_reduced=True))
    options = _cast(data.draw(options_for(case, seed)), dtype)
    gen = torch.Generator().manual_seed(seed)
    by = torch.randint(-2, 3, case.shape[:1], generator=gen) * data.draw(st.sampled_from([1, 1000]))
    x = torch.randn(case.shape, generator=gen, dtype=torch.float64) * 2 + 1
    check(lay_out(x.to(dtype), how), case.pattern, by=by, eps=0.5, **options, **case.sizes)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_integer_type(dtype):
    x = torch.randn(5, 3, dtype=torch.float64)
    check(x, "n d -> d", by=torch.tensor([3, 1, 3, 1, 200 if dtype is torch.uint8 else 9]).to(dtype))


def test_by_without_pattern_keeps_every_other_axis():
    by = torch.tensor([1, 0, 1, 1, 0])
    for shape, pattern in [((5,), "n -> "), ((5, 3), "n d -> d"), ((5, 3, 2), "n a b -> a b")]:
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(evenly.normalize(x, by=by), evenly.normalize(x, pattern, by=by), rtol=0, atol=0)


def test_by_is_the_same_as_one_call_a_group():
    x, by = torch.randn(9, 4, dtype=torch.float64), torch.tensor([2, 0, 1, 1, 0, 2, 2, 2, 0])
    y = evenly.normalize(x, "n d -> d", by=by)
    for g in range(3):
        torch.testing.assert_close(y[by == g], evenly.normalize(x[by == g], "n d -> d"), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(evenly.normalize(x, "n d -> d", by=by, num_groups=7), y, rtol=1e-12, atol=1e-12)


# ---- memory layouts and types ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", LAYOUTS)
def test_layouts_forward_and_backward(how, dtype):
    """The same values in another layout give the same result and the same gradients."""
    for pattern, sizes, shape in [
        ("n c h w -> c", {}, (3, 8, 4, 5)),
        ("n (g c) h w -> n g", {"g": 2}, (3, 8, 4, 5)),
        ("n c h w -> n c", {}, (3, 8, 4, 5)),
        ("... d -> ...", {}, (3, 4, 17)),
        ("n c -> c", {}, (7, 13)),
    ]:
        x = torch.randn(shape, dtype=torch.float64).to(dtype)
        base = lay_out(x, how).contiguous().requires_grad_()
        view = lay_out(x, how).detach().requires_grad_()
        seed = torch.randn(shape).to(dtype)
        a = evenly.normalize(base, pattern, **sizes)
        b = check(view, pattern, **sizes)
        rtol, atol = TOLERANCE[dtype]
        torch.testing.assert_close(b, a, rtol=2 * rtol, atol=2 * atol)
        (ga,) = torch.autograd.grad(a, base, seed)
        (gb,) = torch.autograd.grad(b, view, seed)
        torch.testing.assert_close(gb, ga, rtol=4 * rtol, atol=4 * atol)
        # A gradient that comes in another layout (as from .expand() or a transpose) is read right too.
        seed_view = lay_out(seed, "transposed")
        (gc,) = torch.autograd.grad(evenly.normalize(view, pattern, **sizes), view, seed_view)
        torch.testing.assert_close(gc, gb, rtol=4 * rtol, atol=4 * atol)
        y = evenly.normalize(view, pattern, **sizes)
        (gd,) = torch.autograd.grad(y.sum(), view)
        # The sum of a normalized group does not depend on x; the gradient of .sum() arrives with stride 0.
        assert gd.abs().max() < {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-3)


def test_channels_last_stays_channels_last():
    x = torch.randn(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)
    for pattern in ["n c h w -> c", "n c h w -> n c", "n c h w -> n"]:
        y = evenly.normalize(x, pattern)
        assert y.is_contiguous(memory_format=torch.channels_last), pattern


def test_inputs_are_not_modified():
    x = torch.randn(4, 6, 5)
    tensors = {
        "x": x,
        "weight": torch.randn(6),
        "bias": torch.randn(6),
        "residual": torch.randn(4, 6, 5),
        "mask": torch.rand(4, 6, 5) < 0.5,
        "by": torch.tensor([1, 0, 0, 1]),
    }
    before = {k: v.clone() for k, v in tensors.items()}
    for scale, center, activation in itertools.product(SCALES, [True, False], ACTIVATIONS):
        evenly.normalize(pattern="n c h -> c", scale=scale, center=center, activation=activation, **tensors)
    with torch.no_grad():
        evenly.normalize(pattern="n c h -> c", **tensors)
    for k, v in tensors.items():
        assert torch.equal(v, before[k]), k


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_zero_size(dtype):
    for shape, pattern in [
        ((0, 3, 4), "n c h -> c"),
        ((0, 3, 4), "n c h -> n"),
        ((2, 0, 4), "n c h -> c"),
        ((2, 3, 0), "n c h -> c"),
        ((2, 3, 0), "... d -> ..."),
        ((0,), "n -> "),
        ((0, 0), "a b -> a b"),
    ]:
        for scale in SCALES:
            x = torch.empty(shape, dtype=dtype, requires_grad=True)
            y = evenly.normalize(x, pattern, scale=scale)
            assert y.shape == x.shape
            assert y.dtype == dtype
            y.sum().backward()
            assert x.grad.shape == x.shape
    x = torch.empty((0, 3), dtype=dtype)
    w = torch.ones(3, dtype=dtype, requires_grad=True)
    evenly.normalize(x, "n c -> c", weight=w).sum().backward()
    assert torch.equal(w.grad, torch.zeros(3, dtype=dtype))
    assert evenly.normalize(x, "n c -> c", by=torch.empty(0, dtype=torch.int64)).shape == (0, 3)


def test_size_one_axes():
    for shape in [(1, 6, 4), (5, 1, 4), (5, 6, 1), (1, 1, 4), (1, 1, 1), (1, 6, 1)]:
        x = torch.randn(shape, dtype=torch.float64)
        for pattern in ["n c h -> c", "n c h -> n", "n c h -> n c", "n c h -> ", "... h -> ...", "n c h -> n c h"]:
            check(x, pattern, eps=0.1)
            check(x, pattern, center=False, scale="l2")
    assert torch.equal(evenly.normalize(torch.randn(3, 1), "n c -> n"), torch.zeros(3, 1))


def test_scalar_tensor():
    x = torch.tensor(3.0, dtype=torch.float64)
    check(x, " -> ")
    check(x, "... -> ...", center=False, scale="rms")


# ---- NaN, Inf and masks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scale", SCALES)
def test_nan_and_inf_stay_in_their_group(scale, bad):
    for pattern, shape, sizes in [
        ("n c h w -> c", (3, 4, 2, 5), {}),
        ("n (g c) h w -> n g", (3, 4, 2, 5), {"g": 2}),
        ("... d -> ...", (3, 4, 9), {}),
    ]:
        for center in [True, False]:
            x = torch.randn(shape)
            clean = evenly.normalize(x, pattern, center=center, scale=scale, **sizes)
            broken = x.clone()
            broken[(1, 2, *[0] * (len(shape) - 2))] = bad
            y = evenly.normalize(broken, pattern, center=center, scale=scale, **sizes)
            group = oracle.groups(pattern, shape, **sizes).number
            hit = torch.from_numpy(group == group[(1, 2, *[0] * (len(shape) - 2))])
            torch.testing.assert_close(y[~hit], clean[~hit], rtol=1e-6, atol=1e-6)
            want = torch.from_numpy(oracle.normalize(broken.numpy(), pattern, center=center, scale=scale, **sizes))
            torch.testing.assert_close(y[hit].double(), want[hit], rtol=1e-5, atol=1e-5, equal_nan=True)


def test_nan_and_inf_as_in_torch():
    for bad in [float("nan"), float("inf"), float("-inf")]:
        x = torch.randn(4, 6, 5, 5)
        x[1, 2, 3, 3] = bad
        for ours, theirs in [
            (evenly.normalize(x, "n c h w -> c"), F.batch_norm(x, None, None, training=True)),
            (evenly.normalize(x, "n c h w -> n c"), F.instance_norm(x)),
            (evenly.normalize(x, "n (g c) h w -> n g", g=3), F.group_norm(x, 3)),
            (evenly.normalize(x, "... d -> ..."), F.layer_norm(x, (5,))),
            (evenly.normalize(x, "... d -> ...", center=False, scale="rms"), F.rms_norm(x, (5,), eps=1e-5)),
        ]:
            assert torch.equal(ours.isfinite(), theirs.isfinite())


@pytest.mark.parametrize("ragged", [False, True], ids=["", "by"])
@pytest.mark.parametrize("scale", SCALES)
def test_masked_values_never_leak(scale, ragged):
    """NaN or Inf under a False mask changes no value and no gradient, whatever else is asked for."""
    mask = torch.rand(6, 4, 5) < 0.6
    mask[2] = False
    by = {"by": torch.tensor([0, 0, 1, 1, 2, 0])} if ragged else {}
    seed = torch.randn(6, 4, 5, dtype=torch.float64)
    for bad, center, activation, res in itertools.product(
        [float("nan"), float("inf"), 1e300], [True, False], ACTIVATIONS, [False, True]
    ):
        got = []
        for poison in [False, True]:
            torch.manual_seed(1)
            x = torch.randn(6, 4, 5, dtype=torch.float64)
            r = torch.randn(6, 4, 5, dtype=torch.float64)
            w = torch.randn(4, dtype=torch.float64, requires_grad=True)
            g = seed.clone()
            if poison:
                x, r, g = (t.masked_fill(~mask, bad) for t in (x, r, g))
            x.requires_grad_()
            r.requires_grad_()
            y = evenly.normalize(
                x,
                "n c h -> c",
                center=center,
                scale=scale,
                mask=mask,
                activation=activation,
                weight=w,
                bias=w,
                affine="c",
                residual=r if res else None,
                **by,
            )
            inputs = [x, w, r] if res else [x, w]
            got.append([y, *torch.autograd.grad(y, inputs, g)])
        for a, b in zip(*got, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=0)
        clean = got[1]
        assert (clean[0][~mask] == 0).all()
        assert (clean[1][~mask] == 0).all()
        if res:
            assert (clean[3][~mask] == 0).all()


def test_a_group_without_a_true_position():
    """A fully masked group is 0, its gradient is 0, its count is 0; the others do not notice."""
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[1] = False
    for scale in SCALES:
        y = evenly.normalize(x, "n c -> n", mask=mask, scale=scale)
        assert torch.equal(y[1], torch.zeros(3, dtype=torch.float64))
        (g,) = torch.autograd.grad(y.pow(3).sum(), x)
        assert torch.equal(g[1], torch.zeros(3, dtype=torch.float64))
        assert g.isfinite().all()
        assert evenly.moments(x, "n c -> n", mask=mask).count.tolist() == [3, 0, 3, 3]
        keep = mask.any(1)
        torch.testing.assert_close(y[keep], evenly.normalize(x[keep], "n c -> n", scale=scale), rtol=1e-12, atol=1e-12)


def test_masking_equals_leaving_out():
    x = torch.randn(7, 5, dtype=torch.float64)
    keep = torch.tensor([True, False, True, True, False, True, True])
    y = evenly.normalize(x, "n c -> c", mask=keep[:, None])
    torch.testing.assert_close(y[keep], evenly.normalize(x[keep], "n c -> c"), rtol=1e-12, atol=1e-12)
