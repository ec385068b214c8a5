"""What every optimizer must do. The rows are in optimizer_cases.py; each check runs for each row."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from conformance.cases import devices
from conformance.optimizer_cases import OPTIMIZERS
from evenly.optim import _common

every_optimizer = pytest.mark.parametrize("case", OPTIMIZERS, ids=str)


def parameters(case, *, dtype=torch.float32, device="cpu", shapes=None):
    gen = torch.Generator().manual_seed(1)
    made = [torch.randn(shape, generator=gen, dtype=torch.float64) for shape in shapes or case.shapes]
    return [nn.Parameter(value.to(device, dtype)) for value in made]


def give_gradients(params, step=0, scale=1.0):
    gen = torch.Generator().manual_seed(100 + step)
    for p in params:
        gradient = scale * torch.randn(p.shape, generator=gen, dtype=torch.float64)
        p.grad = gradient.to(p.device, p.dtype)


def run(optimizer, params, steps, first=0, scale=1.0):
    for step in range(first, first + steps):
        give_gradients(params, step, scale)
        optimizer.step()
    return [p.detach().clone() for p in params]


def assert_same(got, want, **tolerance):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **tolerance or {"rtol": 0, "atol": 0})


@every_optimizer
@pytest.mark.parametrize("device", devices())
def test_learns(case, device):
    params = parameters(case, device=device)
    targets = parameters(case, device=device)[::-1]
    targets = [t.detach() if t.shape == p.shape else p.detach() + 1 for p, t in zip(params, targets, strict=True)]
    optimizer = case(params)
    scheduler = CosineAnnealingLR(optimizer, 150, eta_min=1e-5)
    decays = case.settings.get("weight_decay", 0.0)

    def loss():
        return sum(((p - t) ** 2).mean() for p, t in zip(params, targets, strict=True))

    start = loss().item()
    for _ in range(150):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        scheduler.step()
    assert loss().item() < (0.3 if decays or "Nesterov" in case.name or "code" in case.name else 0.05) * start


@every_optimizer
def test_closure(case):
    params = parameters(case)
    optimizer = case(params)

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    with torch.no_grad():  # the closure gets gradients all the same
        first = optimizer.step(closure)
    assert torch.equal(first, sum(p.square().sum() for p in parameters(case)))
    assert optimizer.step(closure) < first
    assert optimizer.step() is None


@every_optimizer
def test_leaves_what_has_no_gradient(case):
    params = parameters(case)
    optimizer = case(params)
    before = [p.detach().clone() for p in params]
    optimizer.step()  # nothing has one
    assert_same(params, before)
    assert not optimizer.state
    give_gradients(params[:1])
    optimizer.step()
    assert not torch.equal(params[0], before[0])
    assert_same(params[1:], before[1:])
    assert set(optimizer.state) <= {params[0]}


@every_optimizer
def test_keeps_the_gradient(case):
    params = parameters(case)
    optimizer = case(params)
    for step in range(2):
        give_gradients(params, step)
        before = [p.grad.clone() for p in params]
        optimizer.step()
        assert_same([p.grad for p in params], before)


@every_optimizer
def test_groups(case):
    if case.name == "SinkGD (and Adam)":
        pytest.skip("this row makes its own groups")
    params, alone = parameters(case), parameters(case)
    optimizer = case([{"params": params[:1]}, {"params": params[2:3], "lr": 0.0}])
    optimizer.add_param_group({"params": params[3:4], "lr": 2 * case.lr})
    want = case(alone[:1])
    fast = case(alone[3:4], lr=2 * case.lr)
    got = run(optimizer, params, 3)
    for step in range(3):
        give_gradients(alone, step)
        want.step()
        fast.step()
    assert_same(got[:1], alone[:1])
    assert_same(got[1:3], parameters(case)[1:3])
    assert_same(got[3:4], alone[3:4])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": params[:1]})


@every_optimizer
def test_named_parameters(case):
    params = parameters(case)
    optimizer = case([(f"w{k}", p) for k, p in enumerate(params)])
    assert [name for group in optimizer.param_groups for name in group["param_names"]].count("w0") == 1
    assert_same(run(optimizer, params, 2), run(case(others := parameters(case)), others, 2))


@every_optimizer
def test_refuses_settings(case):
    params = parameters(case)
    for settings, message in case.refuses:
        with pytest.raises((ValueError, TypeError)) as caught:
            case(params, **settings)
        assert message in str(caught.value)
        optimizer = case(params[:1])
        if not set(settings) <= set(optimizer.defaults):
            continue  # a setting of the optimizer, not of its groups
        with pytest.raises((ValueError, TypeError)):
            optimizer.add_param_group({"params": params[1:2], **settings})
        assert len(optimizer.param_groups) == 1, "a refused group must not stay"
        run(optimizer, params[:1], 1)


@every_optimizer
def test_refuses_complex(case):
    with pytest.raises(TypeError, match=r"optimizes real parameters; parameter .* is torch.complex64"):
        case([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])


@every_optimizer
def test_refuses_sparse_gradients(case):
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = case([("table", embedding.weight)])
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"does not take sparse gradients; parameter 'table' of shape \(5, 3\)"):
        optimizer.step()
    assert_same([embedding.weight], [before])


@every_optimizer
def test_state(case):
    params = parameters(case)
    optimizer = case(params)
    run(optimizer, params, 2)
    if case.name == "SinkGD (and Adam)":
        assert set(optimizer.state) == set(params[1::2])
        return
    assert set(optimizer.state) == (set(params) if case.state else set())
    for p, state in optimizer.state.items():
        assert tuple(state) == case.state
        assert all(value.shape == p.shape for key, value in state.items() if key != "step")


@every_optimizer
def test_resumes_exactly(case):
    params, others = parameters(case), parameters(case)
    optimizer, again = case(params), case(others)
    run(optimizer, params, 3)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": params}, file)
    file.seek(0)
    held = torch.load(file, weights_only=True)
    with torch.no_grad():
        for other, p in zip(others, held["params"], strict=True):
            other.copy_(p)
    again.load_state_dict(held["optimizer"])
    assert_same(run(again, others, 3, first=3), run(optimizer, params, 3, first=3))


@every_optimizer
def test_state_loads_into_another_type(case):
    params = parameters(case)
    optimizer = case(params)
    run(optimizer, params, 2)
    others = [nn.Parameter(p.detach().double()) for p in params]
    again = case(others)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for state in again.state.values():
        assert all(value.dtype == torch.float64 for key, value in state.items() if key != "step")
    got = run(again, others, 2, first=2)
    assert_same([g.float() for g in got], run(optimizer, params, 2, first=2), rtol=1e-4, atol=1e-5)


@every_optimizer
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(case, how):
    params = parameters(case)
    optimizer = case(params)
    run(optimizer, params, 2)
    if how == "deepcopy":
        again, others = copy.deepcopy((optimizer, params))
    else:
        again, others = pickle.loads(pickle.dumps((optimizer, params)))
    assert_same(run(again, others, 2, first=2), run(optimizer, params, 2, first=2))


@every_optimizer
@pytest.mark.parametrize("size", [1, 30])
def test_foreach(case, size, monkeypatch):
    monkeypatch.setattr(_common, "PIECE", size)
    params, others = parameters(case), parameters(case)
    got = run(case(params, foreach=True), params, 5)
    want = run(case(others, foreach=False), others, 5)
    assert_same(got, want, rtol=1e-5, atol=1e-6)


@every_optimizer
def test_maximize(case):
    params, others = parameters(case), parameters(case)
    maximizing, minimizing = case(params, maximize=True), case(others)
    for step in range(3):
        give_gradients(params, step)
        give_gradients(others, step)
        for p in others:
            p.grad.neg_()
        maximizing.step()
        minimizing.step()
    assert_same(params, others, rtol=1e-6, atol=1e-7)


@every_optimizer
def test_tensor_lr(case):
    params, others = parameters(case), parameters(case)
    assert_same(
        run(case(params, lr=torch.tensor(case.lr, dtype=torch.float64)), params, 3),
        run(case(others), others, 3),
    )


@every_optimizer
@pytest.mark.parametrize("kind", ["lambda", "cycle"])
def test_schedulers(case, kind):
    params = parameters(case)
    optimizer = case(params)
    if kind == "lambda":
        scheduler = LambdaLR(optimizer, lambda step: float(step == 0))
    elif any(key in group for group in optimizer.param_groups for key in ("momentum", "betas")):
        scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=4, cycle_momentum=False)
    else:
        pytest.skip("no momentum")
    before = run(optimizer, params, 1)
    scheduler.step()
    after = run(optimizer, params, 1, first=1)
    moved = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert moved == (kind == "cycle"), "lr=0 must not move, a schedule must be followed"


@every_optimizer
def test_zero_gradients(case):
    params = parameters(case)
    optimizer = case(params, weight_decay=0.0)
    for _ in range(2):
        give_gradients(params, scale=0.0)
        optimizer.step()
    assert_same(params, parameters(case))
    assert all(p.isfinite().all() for p in run(optimizer, params, 1))


@every_optimizer
def test_a_nan_stays_where_it_is(case):
    params, others = parameters(case), parameters(case)
    optimizer, clean = case(params), case(others)
    give_gradients(params)
    give_gradients(others)
    params[0].grad.fill_(float("nan"))
    optimizer.step()
    clean.step()
    assert params[0].isnan().all()
    assert_same(params[1:], others[1:], rtol=1e-6, atol=1e-6)


@every_optimizer
@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_scale_of_the_gradient(case, scale):
    params, others = parameters(case), parameters(case)
    got = run(case(params), params, 2, scale=scale)
    assert all(p.isfinite().all() for p in got)
    if case.scale_free:
        assert_same(got, run(case(others), others, 2), rtol=1e-4, atol=1e-5)


@every_optimizer
@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(case, dtype, device):
    params, others = parameters(case, dtype=dtype, device=device), parameters(case, dtype=torch.float64)
    with torch.no_grad():
        for p, other in zip(params, others, strict=True):
            other.copy_(p)
    optimizer, exact = case(params), case(others)
    for step in range(3):
        give_gradients(params, step)
        for p, other in zip(params, others, strict=True):
            other.grad = p.grad.double().cpu()
        optimizer.step()
        exact.step()
    assert all(p.dtype == dtype for p in params)
    tol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert_same([p.detach().double().cpu() for p in params], [p.detach() for p in others], rtol=tol, atol=tol)


@every_optimizer
def test_memory_formats(case):
    params, others = parameters(case), parameters(case)
    for p in params:
        if p.dim() == 4:
            p.data = p.data.to(memory_format=torch.channels_last)
        elif p.dim() == 2:
            p.data = p.data.t().contiguous().t()
    assert_same(run(case(params), params, 3), run(case(others), others, 3), rtol=1e-5, atol=1e-6)


@every_optimizer
def test_empty_parameters(case):
    params = parameters(case, shapes=((0, 4), (4, 0), (3, 2)))
    assert [tuple(p.shape) for p in run(case(params), params, 2)] == [(0, 4), (4, 0), (3, 2)]
    assert not torch.equal(params[2], parameters(case, shapes=((0, 4), (4, 0), (3, 2)))[2])


@every_optimizer
def test_hooks_and_repr(case):
    params = parameters(case)
    optimizer = case(params)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    run(optimizer, params, 2)
    assert calls == [1, 1]
    assert all(f"{key}: {value}" in repr(optimizer) for key, value in {"lr": case.lr, **case.settings}.items())


@every_optimizer
def test_gradient_scaler(case):
    params, others = parameters(case), parameters(case)
    optimizer = case(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(sum((p * p).sum() for p in params)).backward()
    scaler.step(optimizer)
    scaler.update()
    want = case(others)
    sum((p * p).sum() for p in others).backward()
    want.step()
    assert_same(params, others, rtol=1e-5, atol=1e-6)
    params[0].grad.fill_(float("inf"))
    scaler.scale(torch.zeros((), requires_grad=True))
    scaler.step(optimizer)  # skipped
    assert_same(params, others, rtol=1e-5, atol=1e-6)


@every_optimizer
def test_compile(case):
    torch._dynamo.reset()
    params, others = parameters(case), parameters(case)
    optimizer, want = case(params), case(others)

    @torch.compile(backend="eager")
    def step():
        optimizer.step()

    for k in range(2):
        give_gradients(params, k)
        step()
    assert_same(params, run(want, others, 2), rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
