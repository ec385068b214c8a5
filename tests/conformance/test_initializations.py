"""What every initialization must do. The rows are in initialization_cases.py; each check runs for each row."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from conformance.cases import devices
from conformance.initialization_cases import INITIALIZATIONS, InitializationCase

every_case = pytest.mark.parametrize("case", INITIALIZATIONS, ids=str)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


def build(case: InitializationCase, run: bool = True, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = case.make()
    if run:
        case.run(model, case.batch())
    return model


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    return y[0] if isinstance(y, tuple) else y


def stir(model: nn.Module) -> nn.Module:
    """Away from 0, where much looks the same."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@every_case
def test_promise(case):
    """What the method promises of the network holds, and did not before."""
    case.holds(build(case), case.batch())
    with pytest.raises(AssertionError):
        case.holds(build(case, run=False), case.batch())


@every_case
@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtypes(case, device, dtype):
    torch.manual_seed(0)
    model = case.make().to(device, dtype)
    x = case.batch().to(device)
    x = x.to(dtype) if x.is_floating_point() else x
    case.run(model, x)
    assert all(p.dtype == dtype and p.device.type == device for p in model.parameters())
    assert all(p.isfinite().all() for p in model.parameters())
    assert output(model, x).dtype == dtype


@every_case
def test_determinism(case):
    """The same seed gives the same network; another seed another one."""
    first, second, other = build(case), build(case), build(case, seed=1)
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert any(not torch.equal(p, q) for p, q in zip(first.parameters(), other.parameters(), strict=True))


@every_case
def test_values_of_the_batch(case):
    """They matter to initializations from data, and to no others."""
    first, second = build(case), build(case, run=False)
    torch.manual_seed(0)
    case.make()  # the generator is where it was
    x = case.batch()
    case.run(second, case.batch(2) if x.is_floating_point() else x)
    same = all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert same != case.uses_values


@every_case
def test_parameters(case):
    """Names, shapes and flags stay; scalars are added by methods that say so; nothing is graph or half done."""
    model = build(case, run=False)
    before = {name: (p.shape, p.requires_grad) for name, p in model.named_parameters()}
    case.run(model, case.batch())
    after = dict(model.named_parameters())
    kept = {name: (p.shape, p.requires_grad) for name, p in after.items() if name in before}
    removed = before.keys() - after.keys()
    assert kept == {name: value for name, value in before.items() if name not in removed}
    assert not removed or case.adds  # normalizations that were taken out
    added = after.keys() - before.keys()
    assert bool(added) == case.adds
    assert all(after[name].numel() == 1 for name in added)
    assert all(p.is_leaf and p.grad is None for p in after.values())


@every_case
def test_modes_buffers_and_hooks(case):
    """Training flags and running statistics stay; no hook of the method's own work is left."""
    model = build(case, run=False)
    modes = {name: module.training for name, module in model.named_modules()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    case.run(model, case.batch())
    for name, module in model.named_modules():
        assert module.training == modes.get(name, module.training)
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        assert hooks == 0 or any(p.startswith("fixup_") for p, _ in module.named_parameters(recurse=False))
    for name, b in model.named_buffers():
        assert torch.equal(b, buffers[name]), name


@every_case
def test_the_callers_random_state(case):
    """A method draws what it needs from the global generator, so a seed before it is enough."""
    model = build(case, run=False)
    x = case.batch()
    torch.manual_seed(3)
    twin = copy.deepcopy(model)
    case.run(model, x)
    torch.manual_seed(3)
    case.run(twin, x)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@every_case
def test_state_dict_and_copies(case):
    model, x = stir(build(case)), case.batch()
    want = output(model.eval(), x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = build(case, seed=4)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(output(other.eval(), x), want)
    assert torch.equal(output(copy.deepcopy(model), x), want)


@every_case
def test_gradients_reach_every_parameter(case):
    """Once the zeros have moved, as they do in training."""
    model = stir(build(case))
    y = output(model, case.batch())
    (y * torch.randn_like(y)).sum().backward()
    zero = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not zero


@every_case
def test_training_starts(case):
    """Three steps of Adam from the initialization lower the loss, and what was 0 moves."""
    model, x = build(case), case.batch()
    torch.manual_seed(6)
    y = output(model, x)
    target = torch.randint(y.shape[-1], y.shape[:-1])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(output(model, x).flatten(0, -2), target.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.any() for p in model.parameters() if p.ndim > 1)


@every_case
def test_compile(case):
    model, x = stir(build(case)).eval(), case.batch()
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(output(run, x), output(model, x), rtol=1e-4, atol=1e-5)


@every_case
def test_twice(case):
    model = build(case)
    if case.twice is None:
        case.run(model, case.batch())
        case.holds(model, case.batch())
    else:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=case.twice):
            case.run(model, case.batch())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@every_case
def test_documented(case):
    import importlib

    module, name = case.object.split(":")
    found = getattr(importlib.import_module(module), name)
    assert ">>>" in found.__doc__
    assert "Raises:" in found.__doc__
