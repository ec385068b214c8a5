"""memory="low" in the models: the same numbers to the bit with less kept; the benchmark's networks are the same."""

from __future__ import annotations

import copy
import dataclasses
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from evenly.core.kernels import cpu
from evenly.models import TransformerBlock, gpt, resnet

MODELS: dict[str, Callable[[str], nn.Module]] = {
    "post": lambda m: resnet(3, 5, widths=(8, 16), blocks=5, memory=m),
    "pre": lambda m: resnet(3, 5, widths=(8, 16), blocks=5, preactivation=True, memory=m),
    "group": lambda m: resnet(3, 5, norm="group", widths=(8, 16), blocks=2, memory=m),
    "group+ws": lambda m: resnet(3, 5, norm="group+ws", widths=(8, 16), blocks=2, memory=m),
    "gpt": lambda m: gpt(50, dim=32, depth=3, block_size=32, memory=m),
    "gpt, dropout": lambda m: gpt(50, dim=32, depth=3, block_size=32, dropout=0.2, memory=m),
    "gpt, swiglu, rms": lambda m: gpt(50, norm="rms", dim=32, depth=3, block_size=32, activation="swiglu", memory=m),
    "gpt, relu, post": lambda m: gpt(50, dim=32, placement="post", activation="relu", block_size=32, memory=m),
    "gpt, sandwich": lambda m: gpt(50, dim=32, placement="sandwich", qk_norm="rms", block_size=32, memory=m),
    "gpt, grouped": lambda m: gpt(50, dim=32, kv_groups=2, qk_norm="l2", tie=True, block_size=32, memory=m),
}


def batches(name: str) -> list[Tensor]:
    if name.startswith("gpt"):
        return [torch.randint(50, (4, 32)) for _ in range(3)]
    return [torch.randn(4, 3, 16, 16) for _ in range(3)]


def train(model: nn.Module, data: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of some steps, and the state at the end."""
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)
    found = []
    for x in data:
        y = model(x)
        y = y[0] if isinstance(y, tuple) else y
        optimizer.zero_grad()
        y.square().mean().backward()
        optimizer.step()
        assert y.isfinite().all()
        found.append(y.detach())
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [t.clone() for t in [*found, *grads, *model.state_dict().values(), torch.get_rng_state()]]


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """What is allocated in a forward pass and still is after it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        y = model(x)
    assert y is not None
    return sum(e.nbytes() for e in watched.profiler.kineto_results.events() if e.name() == "[memory]")


@pytest.mark.parametrize("name", MODELS)
def test_the_same_to_the_bit(name: str) -> None:
    torch.manual_seed(0)
    normal, low = MODELS[name]("normal"), MODELS[name]("low")
    assert list(normal.state_dict()) == list(low.state_dict())
    low.load_state_dict(normal.state_dict())
    data = batches(name)
    train(copy.deepcopy(normal), data[:1])  # the first call of a shape takes another way
    for a, b in zip(train(normal, data), train(low, data), strict=True):
        assert torch.equal(a, b)
    normal.eval(), low.eval()
    for a, b in zip(train(normal, data), train(low, data), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        a, b = normal(data[0]), low(data[0])
        assert torch.equal(a[0], b[0])


@pytest.mark.skipif(not cpu.available(), reason=f"CPU kernels {cpu.why_not()}")
@pytest.mark.parametrize(
    ("name", "most"),
    [("post", 0.72), ("pre", 0.72), ("gpt", 0.68), ("gpt, swiglu, rms", 0.68), ("gpt, sandwich", 0.65)],
)
def test_less_is_kept(name: str, most: float) -> None:
    torch.manual_seed(0)
    x = batches(name)[0]
    bytes_of = {}
    for memory in ("normal", "low"):
        model = MODELS[name](memory)
        model(x)
        bytes_of[memory] = kept_bytes(model, x)
    assert bytes_of["low"] < most * bytes_of["normal"], bytes_of["low"] / bytes_of["normal"]


def test_a_block_alone() -> None:
    torch.manual_seed(0)
    normal = TransformerBlock(32, 4, dropout=0.1)
    low = TransformerBlock(32, 4, dropout=0.1, memory="low")
    low.load_state_dict(normal.state_dict())
    data = [torch.randn(2, 8, 32) for _ in range(3)]
    for a, b in zip(train(normal, data), train(low, data), strict=True):
        assert torch.equal(a, b)
    mask = torch.ones(2, 8, dtype=torch.bool)
    normal.eval(), low.eval()
    assert torch.equal(normal(data[0], mask), low(data[0], mask))


def test_generation() -> None:
    torch.manual_seed(0)
    model = gpt(50, dim=32, depth=2, block_size=16)
    low = gpt(50, dim=32, depth=2, block_size=16, memory="low")
    low.load_state_dict(model.state_dict())
    start = torch.randint(50, (2, 3))
    assert torch.equal(model.generate(start, 5, temperature=0), low.generate(start, 5, temperature=0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: resnet(1, 10, memory="small"),
        lambda: gpt(50, dim=32, memory="small"),
        lambda: TransformerBlock(32, 4, memory="small"),
    ],
)
def test_an_unknown_setting(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match="memory is 'small', expected one of 'normal', 'low'"):
        make()


@pytest.mark.parametrize("name", ["resnet", "gpt"])
def test_compiled(name: str) -> None:
    torch.manual_seed(0)
    if name == "resnet":
        model: nn.Module = resnet(3, 5, widths=(8,), memory="low")
    else:
        model = gpt(50, dim=32, depth=1, block_size=32, memory="low")
    x = batches(name)[0]
    normal = copy.deepcopy(model)
    normal.memory = "normal"
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for net in (normal, compiled):
        y = net(x)
        (y[0] if isinstance(y, tuple) else y).square().mean().backward()
    for a, b in zip(normal.parameters(), model.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-5)
    torch.compiler.reset()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_distributed() -> None:
    torch.manual_seed(0)
    normal, low = MODELS["post"]("normal"), MODELS["post"]("low")
    low.load_state_dict(normal.state_dict())
    data = batches("post")
    train(copy.deepcopy(normal), data[:1])
    both = [train(nn.parallel.DistributedDataParallel(net), data) for net in (normal, low)]
    for a, b in zip(*both, strict=True):
        assert torch.equal(a, b)


# ---- the benchmark --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "memory.py"))


@pytest.mark.parametrize("kind", ["resnet", "gpt", "gpt, learned positions", "gpt, tied"])
def test_contestants_are_the_same_network(script: dict[str, Any], kind: str) -> None:
    size = script["Size"]("gpt", 2, width=24, depth=2, heads=2, length=16, vocabulary=40)
    if kind == "resnet":
        size = script["Size"]("resnet", 4, side=32, width=8, blocks=(1, 2))
    elif kind != "gpt":
        size = dataclasses.replace(size, rotary="positions" not in kind, tie="tied" in kind)
    rows = []
    for name in script["CONTESTANTS"]:
        contestant = script["Contestant"](size, name)
        losses = [contestant.step()]
        peak, loss = contestant.peak()
        held = contestant.held()
        rows.append({"network": name, "losses": [*losses, loss, contestant.step()], "peak": peak, "held": held})
    script["check_losses"](rows)
    assert len({row["held"] for row in rows if row["network"].startswith("evenly")}) == 1
    peaks = {row["network"]: row["peak"] for row in rows}
    assert all(row["peak"] > row["held"] > 0 for row in rows)
    assert peaks["evenly, memory='low'"] < peaks["evenly"]
    rows[3]["losses"] = [0.0, 0.0, 0.0]
    with pytest.raises(SystemExit, match="does not give the losses"):
        script["check_losses"](rows)
