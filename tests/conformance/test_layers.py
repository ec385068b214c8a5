"""What every layer must do. The rows are in cases.py; each check below runs for each row."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from conformance.cases import LAYERS, LayerCase, build, devices
from evenly.nn import InstanceNorm, RMSNorm

every_layer = pytest.mark.parametrize("case", LAYERS, ids=str)
on_every_device = pytest.mark.parametrize("device", devices())

# (relative, absolute) to float64: one rounding of the result plus arithmetic in float32.
CLOSE = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-6),
    torch.bfloat16: (2**-8, 1e-4),
    torch.float16: (2**-10, 1e-4),
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


def data(shape, dtype=torch.float32, device="cpu", seed=11):
    """Values in this type, the same in every type but for rounding."""
    gen = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=gen, dtype=torch.float64) * 2 + 1).to(device, dtype)


def close(a, b, dtype, roundings=1):
    rtol, atol = CLOSE[dtype]
    if roundings > 1:  # they are relative to the terms of a sum, not to the sum
        atol = max(atol, roundings * rtol * float(b.detach().abs().max()))
    torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol)


def in_float64(layer, dtype):
    """A copy in float64. Without an eps of its own it keeps that of the type in which ``layer`` accumulates."""
    exact = copy.deepcopy(layer).double()
    if getattr(layer, "eps", 0.0) is None and isinstance(layer, RMSNorm):
        exact.eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return exact


def applies(condition, why):
    if not condition:
        pytest.skip(why)


# ---- types, devices, shapes ------------------------------------------------------------------------------


@every_layer
@on_every_device
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_dtypes(case: LayerCase, dtype, device):
    """Input and layer in one type: the same type out, and the float64 result but for rounding."""
    for shape in case.shapes:
        x = data(shape, dtype, device)
        layer = build(case, dtype=dtype, device=device)
        exact = in_float64(layer, dtype)
        y = layer(x)
        assert y.dtype == dtype
        assert y.device.type == device
        assert y.shape == x.shape
        close(y, exact(x.double()), dtype, case.roundings)


@every_layer
def test_half_input_to_a_float32_layer(case):
    """The usual mixed precision: float32 parameters, half activations."""
    layer = build(case)
    x = data(case.shapes[0], torch.bfloat16).requires_grad_()
    y = layer(x)
    assert y.dtype in (torch.bfloat16, torch.float32)
    y.float().pow(2).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


@every_layer
def test_half(case):
    """``.half()`` and ``.bfloat16()`` move parameters and float buffers, and the layer still runs both ways."""
    for cast in (nn.Module.half, nn.Module.bfloat16):
        layer = cast(build(case))
        tensors = [*layer.parameters(), *(b for b in layer.buffers() if b.is_floating_point())]
        assert len({t.dtype for t in tensors}) <= 1
        dtype = torch.float16 if cast is nn.Module.half else torch.bfloat16
        x = data(case.shapes[0], dtype).requires_grad_()
        y = layer(x)
        y.sum().backward()
        assert y.dtype == dtype
        assert x.grad.isfinite().all()
        assert y.isfinite().all()


@every_layer
def test_factory_arguments(case):
    """``device=`` and ``dtype=`` reach every parameter and every float buffer."""
    layer = case.make(device="cpu", dtype=torch.float64)
    for t in [*layer.parameters(), *layer.buffers()]:
        assert t.dtype == torch.float64 or not t.is_floating_point()
    assert bool(list(layer.parameters())) == case.parameters
    assert all(p.requires_grad for p in layer.parameters())


@every_layer
def test_meta_device(case):
    """Built without memory, then materialized: as a large model is loaded."""
    layer = case.make(device="meta")
    for t in [*layer.parameters(), *layer.buffers()]:
        assert t.is_meta
    y = layer(torch.empty(case.shapes[0], device="meta"))
    assert y.shape == case.shapes[0]
    real = layer.to_empty(device="cpu")
    real.load_state_dict(build(case).state_dict())
    x = data(case.shapes[0])
    assert torch.equal(real(x), build(case)(x))


@every_layer
def test_shapes(case):
    for shape in case.shapes:
        assert build(case)(data(shape)).shape == shape
    if case.one_sample:
        assert build(case)(data(case.one_sample)).shape == case.one_sample
        assert build(case).eval()(data(case.one_sample)).shape == case.one_sample


@every_layer
def test_zero_size(case):
    """Nothing in, nothing out, in both modes, forward and backward; the state does not become NaN."""
    for shape in case.zero_size:
        for training in [True, False]:
            layer = build(case).train(training)
            before = copy.deepcopy(layer.state_dict())
            x = torch.empty(shape, requires_grad=True)
            y = layer(x)
            assert y.shape == shape
            y.sum().backward()
            assert x.grad.shape == shape
            assert all(p.grad is None or torch.equal(p.grad, torch.zeros_like(p)) for p in layer.parameters())
            for k, v in layer.state_dict().items():
                if not k.endswith("num_batches_tracked"):
                    assert torch.equal(v, before[k]), k


@every_layer
def test_memory_formats(case):
    """Channels-last, transposed, sliced and expanded inputs give what contiguous ones give; channels-last stays."""
    shape = case.shapes[0]
    x = data(shape, torch.float64)
    want = build(case, dtype=torch.float64)(x)
    views = [x.transpose(0, -1).contiguous().transpose(0, -1)]
    room = torch.full([n + 2 for n in shape], 9e9, dtype=torch.float64)
    inner = tuple(slice(1, n + 1) for n in shape)
    room[inner] = x
    views.append(room[inner])
    if len(shape) == 4:
        views.append(x.contiguous(memory_format=torch.channels_last))
    for v in views:
        leaf = v.detach().requires_grad_()
        y = build(case, dtype=torch.float64)(leaf)
        torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
        y.pow(3).sum().backward()
        base = x.clone().requires_grad_()
        build(case, dtype=torch.float64)(base).pow(3).sum().backward()
        torch.testing.assert_close(leaf.grad, base.grad, rtol=1e-10, atol=1e-10)
    if len(shape) == 4 and case.keeps_format:
        assert build(case)(views[-1].float()).is_contiguous(memory_format=torch.channels_last)


# ---- derivatives -----------------------------------------------------------------------------------------


@every_layer
def test_gradcheck(case):
    """Every input and parameter, in training and in evaluation, in float64 against finite differences.

    A layer whose backward pass is a control process, or takes estimates for constants, has oracles of its own in
    training; in evaluation it is an ordinary layer.
    """
    for training in [True, False] if case.exact_gradient else [False]:
        for shape in case.shapes[:3]:
            layer = build(case, dtype=torch.float64).train(training)
            names = [n for n, _ in layer.named_parameters()]

            def run(x, r, *params, layer=layer, names=names):
                fresh = copy.deepcopy(layer)  # running statistics do not move between evaluations
                state = dict(zip(names, params, strict=True))
                return torch.func.functional_call(fresh, state, (x,), {"residual": r} if case.residual else {})

            params = [p.detach().clone().requires_grad_() for p in layer.parameters()]
            x = data(shape, torch.float64).requires_grad_()
            r = data(shape, torch.float64, seed=12).requires_grad_()
            assert (
                gradcheck(run, (x, r, *params), fast_mode=True)
                if case.residual
                else gradcheck(lambda x, *p, run=run: run(x, None, *p), (x, *params), fast_mode=True)
            )


@every_layer
def test_no_grad_and_frozen_parameters(case):
    layer = build(case)
    x = data(case.shapes[0])
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        build(case).eval()(x)
    layer.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    layer(leaf).pow(2).sum().backward()
    assert leaf.grad is not None
    assert all(p.grad is None for p in layer.parameters())


# ---- the layer of torch that it replaces -----------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_torch(case, dtype):
    """Its state dict loads strictly, both ways; outputs, gradients and buffers agree, in training and evaluation."""
    applies(case.torch, "torch.nn has no such layer")
    tol = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-6}
    theirs = case.torch(dtype=dtype)
    assert list(theirs.state_dict()) == list(case.make(dtype=dtype).state_dict())
    ours = build(case, dtype=dtype)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    back = case.make(dtype=dtype)
    back.load_state_dict(theirs.state_dict(), strict=True)
    shape = next(s for s in case.shapes if len(s) == 4)
    for training in [True, False, True]:
        ours.train(training)
        theirs.train(training)
        a, b = (data(shape, dtype).requires_grad_() for _ in range(2))
        seed = data(shape, dtype, seed=12)
        ya, yb = ours(a), theirs(b)
        torch.testing.assert_close(ya, yb, **tol)
        ga = torch.autograd.grad(ya, [a, *ours.parameters()], seed)
        gb = torch.autograd.grad(yb, [b, *theirs.parameters()], seed)
        for p, q in zip(ga, gb, strict=True):
            size = max(1.0, float(q.abs().max()))
            torch.testing.assert_close(p / size, q / size, **tol)
        for (name, p), q in zip(ours.named_buffers(), theirs.buffers(), strict=True):
            # torch's instance norm has num_batches_tracked but never counts.
            if not (name == "num_batches_tracked" and isinstance(ours, InstanceNorm)):
                torch.testing.assert_close(p, q, **tol)


# ---- state, copies ---------------------------------------------------------------------------------------


def _run(layer, case):
    """The outputs of two training steps and one of evaluation."""
    outs = [layer(data(case.shapes[0], seed=s)).detach() for s in (1, 2)]
    return [*outs, layer.eval()(data(case.shapes[0], seed=3)).detach()]


def _equal(a, b):
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@every_layer
def test_state_dict(case):
    layer, other = build(case), case.make()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    _equal(_run(layer, case), _run(other, case))
    if layer.state_dict():
        with pytest.raises(RuntimeError, match="nothing_of_ours"):
            case.make().load_state_dict({**layer.state_dict(), "nothing_of_ours": torch.ones(1)})


@every_layer
def test_deepcopy_and_pickle(case):
    layer = build(case)
    layer(data(case.shapes[0]))
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    want = _run(layer, case)
    for twin in twins:
        _equal(_run(twin, case), want)
        assert repr(twin) == repr(layer)


@every_layer
def test_determinism(case):
    runs = []
    for _ in range(3):
        layer = build(case)
        x = data(case.shapes[0]).requires_grad_()
        y = layer(x)
        y.pow(3).sum().backward()
        runs.append([y.detach(), x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    _equal(runs[0], runs[1])
    _equal(runs[0], runs[2])


@every_layer
def test_train_and_eval(case):
    """Only a layer with running statistics changes with the mode; evaluation treats each sample alone."""
    x = data(case.shapes[0])
    trained, evaluated = build(case)(x), build(case).eval()(x)
    assert torch.equal(trained, evaluated) != case.running_state
    layer = build(case).eval()
    before = copy.deepcopy(layer.state_dict())
    y = layer(x)
    for k, v in layer.state_dict().items():
        assert torch.equal(v, before[k]), f"evaluation moved {k}"
    if case.running_state or not case.batch_statistics:
        torch.testing.assert_close(layer(x[:2]), y[:2], rtol=1e-6, atol=1e-6)
    moved = build(case)
    moved(x)
    changed = [k for k, v in moved.state_dict().items() if not torch.equal(v, before[k])]
    assert bool(changed) == case.running_state, changed
    if not case.batch_statistics:
        torch.testing.assert_close(build(case)(x[:2]), trained[:2], rtol=1e-6, atol=1e-6)
    else:
        assert not torch.allclose(build(case)(x[:2]), trained[:2])


@every_layer
def test_inputs_are_not_modified(case):
    x, r = data(case.shapes[0]), data(case.shapes[0], seed=12)
    a, b = x.clone(), r.clone()
    build(case)(x)
    if case.residual:
        build(case)(x, residual=r)
    assert torch.equal(x, a)
    assert torch.equal(r, b)


# ---- residual and mask -----------------------------------------------------------------------------------


@every_layer
def test_residual(case):
    applies(case.residual, "takes no residual")
    for shape in case.shapes:
        x, r = data(shape, torch.float64), data(shape, torch.float64, seed=12)
        for training in [True, False]:
            want = build(case, dtype=torch.float64).train(training)(x) + r
            got = build(case, dtype=torch.float64).train(training)(x, residual=r)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@every_layer
def test_mask(case):
    """False positions come out as 0; what stands there reaches no value, no gradient, no running statistic."""
    applies(case.mask, "takes no mask")
    for shape in [s for s in case.shapes if len(s) > 1]:
        gen = torch.Generator().manual_seed(4)
        mask = torch.rand(shape, generator=gen) < 0.7
        for training in [True, False]:
            got = []
            for poison in [0.0, float("nan"), 1e30]:
                layer = build(case).train(training)
                x = data(shape).masked_fill(~mask, poison).requires_grad_()
                y = layer(x, mask=mask)
                assert (y[~mask] == 0).all()
                y.pow(3).sum().backward()
                assert (x.grad[~mask] == 0).all()
                got.append([y.detach(), x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
            _equal(got[0], got[1])
            _equal(got[0], got[2])
        whole = torch.ones(shape, dtype=torch.bool)
        torch.testing.assert_close(build(case)(data(shape), mask=whole), build(case)(data(shape)))


# ---- compilers -------------------------------------------------------------------------------------------


@every_layer
def test_compile(case):
    """One graph, in training and in evaluation; the same outputs, gradients and running statistics."""
    for training in [True, False]:
        plain, graph = (build(case, dtype=torch.float64).train(training) for _ in range(2))
        run = torch.compile(graph, fullgraph=True, backend="aot_eager")
        for seed in [1, 2]:
            a, b = (data(case.shapes[0], torch.float64, seed=seed).requires_grad_() for _ in range(2))
            ya, yb = plain(a), run(b)
            torch.testing.assert_close(yb, ya, rtol=1e-11, atol=1e-11)
            ya.pow(3).sum().backward()
            yb.pow(3).sum().backward()
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-10, atol=1e-10)
        for p, q in zip(graph.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10)
        for p, q in zip(graph.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-11)


@every_layer
def test_export(case):
    """torch.export of the trained layer, with a batch of any size where its input has one."""
    layer = build(case).eval()
    shape = next(s for s in case.shapes if len(s) > 1)
    dynamic = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(layer, (data(shape),), dynamic_shapes=dynamic)
    for n in [shape[0], 9]:
        x = data((n, *shape[1:]))
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-6, atol=1e-6)


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(case, dtype):
    """Half in or float32 in, under autocast: statistics keep float32, gradients reach float32 leaves."""
    layer = build(case)
    x = data(case.shapes[0])
    want = in_float64(build(case), dtype)(x.to(dtype).double())
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x.to(dtype))
        assert y.dtype in (dtype, torch.float32)
        torch.testing.assert_close(y.double(), want, rtol=2**-7, atol=1e-3 + (case.roundings - 1) * 2**-8)
        leaf = x.clone().requires_grad_()
        z = build(case)(leaf)
        assert z.dtype == torch.float32
        close(z, in_float64(build(case), torch.float32)(x.double()), torch.float32)
    z.pow(2).sum().backward()
    assert leaf.grad.dtype == torch.float32
    for buffer in layer.buffers():
        assert buffer.dtype in (torch.float32, torch.int64)


# ---- bad input, NaN, extreme scale -----------------------------------------------------------------------


@every_layer
def test_bad_input(case):
    """A wrong shape is a ValueError that prints the shape; a wrong type is a TypeError that names it."""
    for shape in case.wrong:
        for training in [True, False]:
            with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is checked below)
                build(case).train(training)(data(shape))
            assert str(tuple(shape)) in str(caught.value) or str(list(shape)) in str(caught.value), caught.value
    for dtype in [torch.int64, torch.complex64]:
        with pytest.raises(TypeError) as caught:
            build(case)(torch.ones(case.shapes[0]).to(dtype))
        assert str(dtype).removeprefix("torch.") in str(caught.value)
    if case.residual:
        with pytest.raises(ValueError, match="residual"):
            build(case)(data(case.shapes[0]), residual=data((3, 3, 3)))
    if case.mask:
        with pytest.raises(TypeError, match="mask"):
            build(case)(data(case.shapes[0]), mask=torch.ones(case.shapes[0]))


@every_layer
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf(case, bad):
    """A bad value spoils its own group, as in torch.nn; without a shared statistic, no other sample (in a stream, no
    earlier one)."""
    shape = case.shapes[0]
    x = data(shape)
    x[(1, *[0] * (len(shape) - 1))] = bad
    for training in [True, False]:
        y = build(case).train(training)(x)
        clean = build(case).train(training)(data(shape))
        if case.torch:
            theirs = case.torch().train(training)
            theirs.load_state_dict(build(case).state_dict())
            if len(shape) == 4 or "Norm2d" not in type(theirs).__name__:
                assert torch.equal(y.isfinite(), theirs(x).isfinite())
        if case.batch_statistics and (training or not case.running_state):
            y_others, clean_others = (t.movedim(case.channel_dim, 1)[:, case.shared_channels :] for t in (y, clean))
            torch.testing.assert_close(y_others, clean_others)
        else:
            others = [i for i in range(shape[0]) if i < 1 or (i > 1 and not (case.stream and training))]
            torch.testing.assert_close(y[others], clean[others])
        assert not y.isfinite().all() or "Scale" in case.name or "clamping" in case.name


@every_layer
@pytest.mark.parametrize("kind", ["1e-20", "1e20", "mean 1e4"])
def test_extreme_scale(case, kind):
    """Not less accurate than the layer of torch, against float64; finite and right where torch has none."""
    applies(kind not in case.exempt, case.exempt.get(kind))
    shape = case.shapes[0]
    change = {"1e-20": lambda z: z * 1e-20, "1e20": lambda z: z * 1e20, "mean 1e4": lambda z: z + 1e4}[kind]
    x = change(data(shape, torch.float64)).float()
    for training in [True, False]:
        # float64 squares 1e20 without overflow, and its rounding is far below that of float32.
        want = in_float64(build(case), torch.float32).train(training)(x.double())
        size = want.detach().abs().max().clamp_min(1e-30)
        ours = float((build(case).train(training)(x).double() - want).detach().abs().max() / size)
        theirs = torch.tensor(float("nan"))
        if case.torch:
            peer = case.torch().train(training)
            peer.load_state_dict(build(case).state_dict())
            theirs = (peer(x).double() - want).abs().max() / size
        assert ours <= max(1.2 * float(theirs.detach().nan_to_num(1e9 if case.torch else 0.0)), case.accuracy), (
            f"evenly {ours:.1e}, torch {float(theirs):.1e}"
        )


@every_layer
def test_it_normalizes(case):
    """Not the identity: the scale of the input does not pass through (or, frozen, the statistics act)."""
    x = data(case.shapes[0], torch.float64) * 50
    layer = build(case, dtype=torch.float64)
    y = layer(x)
    assert not torch.allclose(y, x)
    if case.measures:
        torch.testing.assert_close(build(case, dtype=torch.float64)(x * 1000), y, rtol=1e-4, atol=1e-4)
    else:
        assert not torch.allclose(build(case, dtype=torch.float64)(x * 1000), y)


# ---- how it looks ----------------------------------------------------------------------------------------


@every_layer
def test_repr(case):
    text = repr(case.make())
    assert text.startswith(case.object.split(":")[1] + "(")
    for part in case.shows:
        assert part in text, text


@every_layer
def test_documented(case):
    kind = type(case.make())
    assert kind.__doc__
    assert ">>>" in kind.__doc__
    assert kind.__module__.startswith("evenly")
