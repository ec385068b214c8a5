"""What every parametrization of a weight must do. The rows are in cases.py; each check runs for each row."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrize

from conformance.cases import PARAMETRIZATIONS, ParametrizationCase, devices

every_parametrization = pytest.mark.parametrize("case", PARAMETRIZATIONS, ids=str)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


def registered(case: ParametrizationCase, make, **kw) -> nn.Module:
    torch.manual_seed(2)
    layer = make(**kw)
    parametrize.register_parametrization(layer, "weight", case.make())
    if case.lengths:
        with torch.no_grad():
            steps = layer.parametrizations.weight
            steps.original0.copy_(*lengths(case, layer.weight))
    return layer


def lengths(case: ParametrizationCase, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the parametrization takes before the weight: random lengths (the right ones would hide mistakes)."""
    if not case.lengths:
        return ()
    gen = torch.Generator().manual_seed(7)
    shape = (w.shape[0], *[1] * (w.ndim - 1)) if w.ndim else ()
    return ((torch.rand(shape, generator=gen, dtype=torch.float64) + 0.5).to(w.dtype),)


def apply(case: ParametrizationCase, w: torch.Tensor) -> torch.Tensor:
    return case.make()(*lengths(case, w), w)


def original(layer: nn.Module) -> nn.Parameter:
    """The parameter that has the shape of the weight."""
    steps = layer.parametrizations.weight
    return steps.original1 if hasattr(steps, "original1") else steps.original


def inputs(layer: nn.Module, dtype=torch.float32) -> torch.Tensor:
    spatial = layer.weight.dim() - 2
    gen = torch.Generator().manual_seed(5)
    return torch.randn((2, layer.in_channels, *[6] * spatial), generator=gen, dtype=torch.float64).to(dtype)


@every_parametrization
@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(case, dtype, device):
    for make in case.layers:
        w = make().weight.detach().to(device, dtype)
        out = apply(case, w)
        assert out.dtype == dtype
        assert out.shape == w.shape
        want = case.make()(*(g.double() for g in lengths(case, w)), w.double())
        tol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
        torch.testing.assert_close(out.double(), want, rtol=tol, atol=min(tol, 1e-4))
        assert not torch.allclose(out.double(), w.double(), atol=1e-2)


@every_parametrization
def test_gradcheck(case):
    for make in case.layers:
        w = make(dtype=torch.float64).weight.detach().requires_grad_()
        leaves = tuple(t.requires_grad_() for t in (*lengths(case, w), w))
        assert gradcheck(case.make(), leaves, fast_mode=True)
        assert gradgradcheck(case.make(), leaves, fast_mode=True)


@every_parametrization
def test_register_and_remove(case):
    for make in case.layers:
        torch.manual_seed(2)
        plain = make().weight.detach().clone()
        layer = registered(case, make)
        torch.testing.assert_close(original(layer).detach(), plain)
        x = inputs(layer)
        y = layer(x)
        if case.lengths:  # there is no one weight to go back to; as registered, it is the same function
            fresh = make()
            want = fresh(x)
            parametrize.register_parametrization(fresh, "weight", case.make())
            torch.testing.assert_close(fresh(x), want)
        else:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            torch.testing.assert_close(layer.weight.detach(), plain)
        baked = registered(case, make)
        parametrize.remove_parametrizations(baked, "weight", leave_parametrized=True)
        torch.testing.assert_close(baked(x), y)


@every_parametrization
def test_state_dict_and_copies(case):
    for make in case.layers:
        layer = registered(case, make)
        other = make()
        parametrize.register_parametrization(other, "weight", case.make())
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True), strict=True)
        x = inputs(layer)
        assert torch.equal(other(x), layer(x))
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@every_parametrization
def test_compile(case):
    for make in case.layers:
        layer = registered(case, make, dtype=torch.float64)
        x = inputs(layer, torch.float64)
        run = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(run(x), layer(x), rtol=1e-11, atol=1e-11)
        run(x).pow(3).sum().backward()
        got = original(layer).grad.clone()
        layer.zero_grad()
        layer(x).pow(3).sum().backward()
        torch.testing.assert_close(got, original(layer).grad, rtol=1e-9, atol=1e-9)


@every_parametrization
def test_export(case):
    for make in case.layers:
        layer = registered(case, make).eval()
        x = inputs(layer)
        torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x), rtol=1e-6, atol=1e-6)


@every_parametrization
def test_autocast(case):
    for make in case.layers:
        layer = registered(case, make)
        x = inputs(layer)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
            y.float().pow(2).sum().backward()
        torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.2)
        assert original(layer).grad.dtype == torch.float32


@every_parametrization
def test_training_mode_does_not_matter(case):
    for make in case.layers:
        layer = registered(case, make)
        x = inputs(layer)
        assert torch.equal(layer.train()(x), layer.eval()(x))


@every_parametrization
def test_determinism_and_inputs(case):
    for make in case.layers:
        w = make().weight.detach()
        before = w.clone()
        assert torch.equal(apply(case, w), apply(case, w))
        assert torch.equal(w, before)


@every_parametrization
def test_scale(case):
    """Invariant to the scale of the weight; 1e20 and a mean of 1e4 cost no more than the rounding of the weight."""
    for make in case.layers:
        w = make(dtype=torch.float64).weight.detach() * 10
        out = apply(case, w)
        if case.scale_invariant:
            torch.testing.assert_close(apply(case, w * 100), out, rtol=1e-4, atol=1e-4)
        for other in [w * 1e-20, w * 1e15, w + 1e4]:
            got = apply(case, other.float())
            want = case.make()(*(g.float().double() for g in lengths(case, other)), other.float().double())
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@every_parametrization
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_filter(case, bad):
    w = case.layers[0]().weight.detach()
    clean = apply(case, w)
    w = w.clone()
    w[1, 0, 0] = bad
    out = apply(case, w)
    assert not out[1].isfinite().all()
    torch.testing.assert_close(out[2:], clean[2:])
    torch.testing.assert_close(out[0], clean[0])


@every_parametrization
def test_bad_input(case):
    for dtype in [torch.int64, torch.complex64]:
        with pytest.raises(TypeError):
            apply(case, torch.ones(4, 3, 3).to(dtype))
    for shape in [(), (5,)]:
        with pytest.raises(ValueError, match=r"ax|dim|shape"):
            apply(case, torch.ones(shape))


@every_parametrization
def test_meta_device(case):
    for make in case.layers:
        layer = make(device="meta")
        parametrize.register_parametrization(layer, "weight", case.make())
        assert layer.weight.is_meta


@every_parametrization
def test_repr_and_documentation(case):
    text = repr(case.make())
    assert text.startswith(case.object.split(":")[1] + "(")
    for part in case.shows:
        assert part in text
    assert ">>>" in type(case.make()).__doc__
