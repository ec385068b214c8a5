"""The short way of a repeated call: it gives what the first one gave, and leaves to Python what is not alike."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import evenly
from evenly.core import recompute
from evenly.core.kernels import cpu, launch, operator
from evenly.core.normalize import quick_key

pytestmark = [
    pytest.mark.skipif(not cpu.available(), reason="the kernels are not compiled"),
    pytest.mark.skipif(
        cpu.available() and not cpu.extension().looks(), reason="PyTorch before 2.10 has no way to look"
    ),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def made(kind: str, activation: str | None = None, **options: object) -> nn.Module:
    layers = {
        "layer": lambda: evenly.nn.LayerNorm(6, activation=activation, **options),
        "rms": lambda: evenly.nn.RMSNorm(6, activation=activation, **options),
        "group": lambda: evenly.nn.GroupNorm(2, 8, activation=activation, **options),
        "instance": lambda: evenly.nn.InstanceNorm(8, affine=True, activation=activation, **options),
        "batch": lambda: evenly.nn.BatchNorm(8, activation=activation, **options),
        "batch-eval": lambda: evenly.nn.BatchNorm(8, activation=activation, **options).eval(),
        "mean-only": lambda: evenly.nn.MeanOnlyBatchNorm(8, activation=activation, **options),
    }
    torch.manual_seed(0)
    layer = layers[kind]()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.rand_like(p) + 0.5)
        for b in layer.buffers():
            if b.is_floating_point():
                b.copy_(torch.rand_like(b) + 0.5)
    return layer


def drawn(dtype: torch.dtype = torch.float32, *, last: bool = False) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(4, 8, 5, 6).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def ready_of(layer: nn.Module) -> object:
    return layer._ready[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["layer", "rms", "group", "instance", "batch", "batch-eval", "mean-only"])
@pytest.mark.parametrize("how", ["plain", "relu", "residual+relu", "last"])
def test_again_is_as_the_first_time(kind: str, how: str, dtype: torch.dtype) -> None:
    layer = made(kind, "relu" if "relu" in how else None, dtype=dtype)
    x = drawn(dtype, last=how == "last").requires_grad_()
    residual = torch.ones_like(x).mul_(0.3).requires_grad_() if "residual" in how else None
    inputs = [x, *layer.parameters(), *([] if residual is None else [residual])]
    dy = torch.randn(x.shape).to(dtype)
    begin = copy.deepcopy(layer.state_dict())
    seen = []
    for number in range(4):
        layer.load_state_dict(begin)
        with torch.set_grad_enabled(number != 3):
            y = layer(x, residual)
        grads = [] if number == 3 else torch.autograd.grad(y, inputs, dy)
        seen.append((y.detach(), grads, copy.deepcopy(layer.state_dict())))
    if how != "last" or kind not in ("layer", "rms"):  # those run over the axis that is not last in memory
        assert ready_of(layer) is not None
    for y, grads, state in seen[1:]:
        assert torch.equal(y, seen[0][0])
        assert y.stride() == x.stride()
        for one, same, first in zip(grads, seen[1][1], seen[0][1], strict=bool(grads)):
            assert torch.equal(one, same)
            torch.testing.assert_close(one, first)
        for name, value in state.items():
            assert torch.equal(value, seen[1][2][name])
            torch.testing.assert_close(value, seen[0][2][name])  # the long way moves running statistics itself


def short(layer: nn.Module, x: Tensor) -> Tensor | None:
    """What the short way says: a tensor, or None."""
    for _ in range(2):
        layer(drawn())
    running = layer.running is not None
    return ready_of(layer)(
        x,
        layer.weight,
        layer.bias,
        None,
        layer.running_mean if running else None,
        layer.running_var if running else None,
        layer.momentum if running and layer.training else None,
        layer.num_batches_tracked if running else None,
    )


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("kind", ["group", "batch-eval", "layer"])
def test_a_residual_may_come_and_go(kind: str, activation: str | None, first: bool) -> None:
    layer, fresh = made(kind, activation), made(kind, activation)
    x, r = drawn().requires_grad_(), drawn().mul(-0.5).requires_grad_()
    for number in range(6):
        residual = r if (number % 2 == 0) == first else None
        inputs = [x, *([] if residual is None else [r])]
        found = torch.autograd.grad(layer(x, residual).square().sum(), [*inputs, *layer.parameters()])
        with torch.no_grad():
            assert torch.equal(layer(x, residual), fresh(x, residual))
        y = made(kind)(x) + (0 if residual is None else residual)
        y = y if activation is None else getattr(torch.nn.functional, activation)(y)
        torch.testing.assert_close(found[: len(inputs)], torch.autograd.grad(y.square().sum(), inputs))


class Sub(Tensor):
    pass


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["group", "batch", "batch-eval"])
def test_what_is_not_alike_is_left_to_python(kind: str) -> None:
    layer = made(kind)
    x = drawn()
    assert short(layer, x) is not None
    assert short(layer, nn.Parameter(x)) is not None
    others = {
        "shape": x[:2],
        "rank": x.flatten(2),
        "dtype": x.double(),
        "layout": x.contiguous(memory_format=torch.channels_last),
        "gaps": torch.randn(4, 8, 5, 12)[..., ::2],
        "subclass": x.as_subclass(Sub),
        "sign": torch._neg_view(x),
        "integers": x.long(),
        "meta": x.to("meta"),
        "nothing": None,
        "a list": x.tolist(),
    }
    for name, other in others.items():
        assert short(layer, other) is None, name


def test_other_parameters_are_left_to_python() -> None:
    layer = made("group")
    x = drawn()
    layer(x)
    layer(x)
    ready, w, b = ready_of(layer), layer.weight, layer.bias
    assert ready(x, w, b, None, None, None, None, None) is not None
    assert ready(x, None, b, None, None, None, None, None) is not None
    for other in (w[:4], w.double(), torch.randn(16)[::2], torch._neg_view(w.detach()), w.detach().as_subclass(Sub)):
        assert ready(x, other, b, None, None, None, None, None) is None
        assert ready(x, w, other, None, None, None, None, None) is None
    for residual in (x[:2], x.double(), x.contiguous(memory_format=torch.channels_last), torch._neg_view(x)):
        assert ready(x, w, b, residual, None, None, None, None) is None


def test_other_statistics_are_left_to_python() -> None:
    for kind, momentum in (("batch", 0.1), ("batch-eval", None)):
        layer = made(kind)
        x = drawn()
        layer(x)
        layer(x)
        ready, w, b = ready_of(layer), layer.weight, layer.bias
        mean, var = layer.running_mean, layer.running_var
        assert ready(x, w, b, None, mean, var, momentum, None) is not None
        bad = [mean[:4], mean.long(), mean.clone().requires_grad_(), torch.randn(16)[::2], torch._neg_view(mean), None]
        for other in [*bad, mean.double()]:  # both must have one dtype
            assert ready(x, w, b, None, other, var, momentum, None) is None
            assert ready(x, w, b, None, mean, other, momentum, None) is None
        if momentum:
            for counter in (torch.tensor(0.0), torch.tensor([0]), torch.tensor(0, dtype=torch.int32)):
                assert ready(x, w, b, None, mean, var, momentum, counter) is None


def test_who_is_watching_gets_the_long_way() -> None:
    layer = made("layer")
    x = drawn()
    layer(x)
    layer(x)
    with Watch():
        assert short(layer, x) is None
    with forward_ad.dual_level():
        assert short(layer, x) is None
    answers = []

    def ask(v: Tensor) -> Tensor:
        answers.append(ready_of(layer)(x, layer.weight, layer.bias, None, None, None, None, None))
        return v

    torch.func.vmap(ask)(torch.zeros(2))
    torch.jit.trace(ask, torch.zeros(2), check_trace=False)
    assert answers == [None, None]

    class Allocates(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            return function(*args, **(kwargs or {}))

    with Allocates():
        assert short(layer, x) is not None


def test_options_may_change() -> None:
    x = drawn()
    layer = made("batch")
    layer(x)
    layer(x)
    for name, value in {"eps": 1.0, "activation": "relu", "momentum": 0.5, "center": False, "training": False}.items():
        before = layer(x)
        setattr(layer, name, value)
        fresh = made("batch")
        fresh.load_state_dict(layer.state_dict())
        for option in ("eps", "activation", "momentum", "center", "training"):
            setattr(fresh, option, getattr(layer, option))
        expected = fresh(x)
        assert torch.equal(layer(x), expected), name
        assert name == "momentum" or not torch.equal(before, expected), name
        for one, other in zip(layer.buffers(), fresh.buffers(), strict=True):
            torch.testing.assert_close(one, other)

    group = made("group")
    group(x)
    group(x)
    group.sizes["g"] = 4
    assert not torch.equal(group(x), made("group")(x))


def test_parameters_may_become_others() -> None:
    x = drawn()
    layer = made("group")
    plain = layer(x)
    layer(x)
    with torch.no_grad():
        layer.weight = nn.Parameter(2 * layer.weight)
        layer.bias = nn.Parameter(2 * layer.bias)
    torch.testing.assert_close(layer(x), 2 * plain)
    out = torch.func.functional_call(layer, {"weight": torch.zeros(8), "bias": torch.ones(8)}, (x,))
    assert torch.equal(out, torch.ones_like(x))
    prune.l1_unstructured(layer, "weight", 0.5)
    assert (layer(x) == layer.bias.view(-1, 1, 1)).all((0, 2, 3)).sum() == 4
    layer = made("layer")
    layer(x)
    layer(x)
    parametrizations.weight_norm(layer, "weight", dim=None)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(0)
    assert torch.equal(layer(x), layer.bias.expand_as(x))


def test_a_used_layer_can_be_copied_and_pickled() -> None:
    x = drawn()
    layer = made("batch")
    layer(x)
    layer(x)
    copies = (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)))
    for other in copies:
        assert torch.equal(other.eval()(x), layer.eval()(x))
    for other in copies:
        for _ in range(3):  # the output in training does not depend on the statistics that have moved
            assert torch.equal(other.train()(x), layer.train()(x))
    assert ready_of(copy.deepcopy(layer)) is None
    assert ready_of(pickle.loads(pickle.dumps(layer))) is None


def test_running_statistics_are_marked_as_changed() -> None:
    layer = made("batch")
    x = drawn().requires_grad_()
    layer(x)
    versions = [b._version for b in layer.buffers()]
    counted = int(layer.num_batches_tracked)
    kept = layer(x)
    assert all(b._version > v for b, v in zip(layer.buffers(), versions, strict=True))
    assert int(layer.num_batches_tracked) == counted + 1
    kept.sum().backward()  # nothing that was saved has changed
    probe = (layer.running_mean * torch.ones(8, requires_grad=True)).sum()
    layer(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        probe.backward()


def test_derivatives_of_the_second_order_and_errors() -> None:
    layer = made("group")
    x = drawn().double().requires_grad_()
    layer.double()
    layer(x)
    y = layer(x)
    (gx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (gg,) = torch.autograd.grad(gx.square().sum(), x)
    reference = nn.GroupNorm(2, 8).double()
    reference.load_state_dict(layer.state_dict())
    (rx,) = torch.autograd.grad(reference(x).square().sum(), x, create_graph=True)
    (rr,) = torch.autograd.grad(rx.square().sum(), x)
    torch.testing.assert_close(gg, rr)
    y = layer(x)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    assert torch.autograd.gradcheck(layer, (drawn()[:1, :, :2, :2].double().requires_grad_(),))


def test_saved_tensors_go_through_hooks() -> None:
    layer = made("layer")
    x = drawn().requires_grad_()
    layer(x)
    plain = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    packed: list[Tensor] = []

    def pack(t: Tensor) -> int:
        packed.append(t)
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: packed[i]):
        y = layer(x)
    assert len(packed) >= 3
    torch.testing.assert_close(torch.autograd.grad(y.sum(), [x, *layer.parameters()]), plain, rtol=0, atol=0)
    with recompute.low_memory():
        y = layer(x)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), [x, *layer.parameters()]), plain, rtol=0, atol=0)


def test_only_what_is_needed_is_computed() -> None:
    layer = made("layer")
    x = drawn()
    layer(x)
    full = torch.autograd.grad(layer(x.requires_grad_()).sum(), [x, layer.weight, layer.bias])
    layer.weight.requires_grad_(False)
    gx, gb = torch.autograd.grad(layer(x).sum(), [x, layer.bias])
    assert torch.equal(gx, full[0])
    assert torch.equal(gb, full[2])
    x.requires_grad_(False)
    y = layer(x)
    assert torch.equal(torch.autograd.grad(y.sum(), layer.bias)[0], full[2])
    layer.bias.requires_grad_(False)
    assert not layer(x).requires_grad


def test_the_collector_of_cycles_sees_what_is_held() -> None:
    layer = made("layer")
    layer(drawn())
    layer(drawn())
    ready = ready_of(layer)
    assert gc.is_tracked(ready)
    assert any(isinstance(held, tuple) and isinstance(held[0], launch.Entry) for held in gc.get_referents(ready))


def test_without_the_interface_python_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older:
        """The kernels on a PyTorch that has no C interface of DLPack."""

        def __getattr__(self, name: str) -> object:
            return (lambda: False) if name == "looks" else getattr(module, name)

    module = cpu.extension()
    x = drawn().requires_grad_()
    layer = made("batch", eps=0.123)
    expected = [layer(x).detach() for _ in range(2)]
    key = quick_key(x, layer.pattern, True, "std", 0.123, 0, layer.axes, None, None, True, layer.sizes)
    entry = operator.recall(key, x)
    assert entry is not None
    assert entry.ready is not None
    monkeypatch.setattr(entry, "ready", None)
    monkeypatch.setattr(cpu, "extension", lambda: Older())
    other = made("batch", eps=0.123)
    for y in expected:
        out = other(x)
        assert torch.equal(out, y)
        out.sum().backward()
    assert ready_of(other) is None
    assert int(other.num_batches_tracked) == 2


def test_memory_without_the_interface() -> None:
    class Pointer:
        def __init__(self, t: Tensor) -> None:
            self.data_ptr = t.data_ptr

    module = cpu.extension()
    assert module is not None
    x, total = torch.randn(3, 4), torch.empty(3, dtype=torch.float64)
    module.sums(0, 3, 1, 1, 4, Pointer(x), None, None, Pointer(total), None)
    torch.testing.assert_close(total, x.double().square().sum(1))
    with pytest.raises(TypeError):
        module.sums(0, 3, 1, 1, 4, "x", None, None, total, None)
