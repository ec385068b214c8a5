"""The parts of nGPT: unit vectors, scales with their own step, and the optimizer that projects."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from evenly.nn import NormalizedEmbedding, NormalizedLinear, ProjectedOptimizer, ScaledParameter, project_


@pytest.mark.parametrize("dim", [0, 1])
def test_unit_vectors_from_the_start_and_after_projection(dim):
    layer = NormalizedLinear(5, 7, norm_dim=dim)
    one = torch.ones(7 if dim == 1 else 5)
    torch.testing.assert_close(layer.weight.norm(dim=dim), one)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.mul_(torch.rand(7, 1) + 0.5 if dim == 1 else torch.rand(5) + 0.5)
    assert layer.project_() is layer
    torch.testing.assert_close(layer.weight.detach(), before)  # a positive factor a vector changes nothing
    again = layer.weight.detach().clone()
    torch.testing.assert_close(layer.project_().weight.detach(), again, rtol=0, atol=1e-6)
    other = layer.weight.norm(dim=1 - dim)
    assert (other - 1).abs().max() > 0.1


def test_projection_against_float64():
    layer = NormalizedLinear(300, 20)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(20, 300) * 1e3)
    w = layer.weight.detach().double()
    torch.testing.assert_close(
        layer.project_().weight.detach().double(), w / w.pow(2).sum(1, keepdim=True).sqrt(), rtol=1e-6, atol=0
    )


def test_zero_vectors_stay_zero():
    layer = NormalizedLinear(4, 3)
    nn.init.zeros_(layer.weight)
    assert (layer.project_().weight == 0).all()


def test_half_precision_is_projected_in_float32():
    layer = NormalizedLinear(1024, 8, dtype=torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    torch.testing.assert_close(layer.weight.float().norm(dim=1), torch.ones(8), rtol=2e-3, atol=0)


def test_loaded_weights_are_projected_and_saved_ones_come_back_bit_for_bit():
    layer, other = NormalizedLinear(50, 9, norm_dim=0), NormalizedLinear(50, 9, norm_dim=0)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)
    tripled = {"weight": 3 * layer.weight.detach()}
    for assign in (False, True):
        other = NormalizedLinear(50, 9, norm_dim=0)
        other.load_state_dict(tripled, assign=assign)
        torch.testing.assert_close(other.weight, layer.weight)
    assert torch.equal(tripled["weight"], 3 * layer.weight)  # the dict itself is not touched
    embedding = NormalizedEmbedding(6, 4)
    embedding.load_state_dict({"weight": torch.full((6, 4), 2.0)})
    assert torch.equal(embedding.weight, torch.full((6, 4), 0.5))


@pytest.mark.parametrize("init", [0.05, 1.0])
def test_scales_start_at_init_and_move_by_lr_times_init_over_scale(init):
    scale, lr = 0.125, 1e-3
    parameter = ScaledParameter((2, 3), init=init, scale=scale, dtype=torch.float64)
    assert torch.equal(parameter.weight, torch.full((2, 3), scale, dtype=torch.float64))
    torch.testing.assert_close(parameter(), torch.full((2, 3), init, dtype=torch.float64))
    optimizer = torch.optim.Adam(parameter.parameters(), lr=lr)
    (parameter() * 7).sum().backward()
    optimizer.step()
    want = torch.full((2, 3), init - lr * init / scale, dtype=torch.float64)
    torch.testing.assert_close(parameter(), want, rtol=1e-6, atol=0)  # Adam's eps


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        NormalizedEmbedding(11, 6), NormalizedLinear(6, 8), nn.Tanh(), NormalizedLinear(8, 6, norm_dim=0)
    )


def lengths(model):
    return torch.cat([model[0].weight.norm(dim=1), model[1].weight.norm(dim=1), model[3].weight.norm(dim=0)])


def train(model, optimizer, steps=5):
    gen = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randint(11, (20,), generator=gen)).square().sum().backward()
        optimizer.step()


def test_projected_optimizer_is_the_step_then_the_projection():
    model, by_hand = small(), small()
    optimizer = ProjectedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0), model)
    plain = torch.optim.AdamW(by_hand.parameters(), lr=0.1, weight_decay=0.0)
    gen = torch.Generator().manual_seed(1)
    for _ in range(5):
        idx = torch.randint(11, (20,), generator=gen)
        for net, opt in ((model, optimizer), (by_hand, plain)):
            opt.zero_grad()
            net(idx).square().sum().backward()
            opt.step()
        with torch.no_grad():
            for weight, dim in ((by_hand[0].weight, 1), (by_hand[1].weight, 1), (by_hand[3].weight, 0)):
                weight.div_(weight.norm(dim=dim, keepdim=True))
        torch.testing.assert_close(lengths(model), torch.ones(11 + 8 + 8))
    for a, b in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    # Moments are those of the wrapped optimizer, not projected.
    for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], plain.state[q]["exp_avg"])


def test_projected_optimizer_is_an_optimizer():
    model = small()
    inner = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    optimizer = ProjectedOptimizer(inner, model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    train(model, optimizer, 1)
    scheduler.step()
    assert inner.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] < 0.5
    extra = nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [extra], "lr": 0.25})
    assert [group["lr"] for group in inner.param_groups][1] == 0.25
    assert len(optimizer.param_groups) == 2
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(lengths(model)))

    def closure():
        optimizer.zero_grad()
        loss = model(torch.arange(11)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    torch.testing.assert_close(calls[0], torch.ones(27))
    assert "SGD" in repr(optimizer)


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_training_goes_on_from_a_copy(how):
    model = small()
    optimizer = ProjectedOptimizer(torch.optim.Adam(model.parameters(), lr=0.1), model)
    train(model, optimizer)
    if how == "state_dict":
        other = small()
        other.load_state_dict(model.state_dict())
        fresh = ProjectedOptimizer(torch.optim.Adam(other.parameters(), lr=0.3), other)
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        fresh = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        other = fresh.model
    train(model, optimizer)
    train(other, fresh)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_project_reaches_every_layer():
    model = nn.Sequential(nn.Linear(3, 3), small())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    plain = model[0].weight.detach().clone()
    assert project_(model) is model
    torch.testing.assert_close(lengths(model[1]), torch.ones(27))
    assert torch.equal(model[0].weight, plain)


def test_refused():
    for call, message in (
        (lambda: NormalizedLinear(3, 3, norm_dim=2), "norm_dim=2"),
        (lambda: NormalizedLinear(0, 3), "in_features=0"),
        (lambda: NormalizedEmbedding(3, 0), "embedding_dim=0"),
        (lambda: ScaledParameter(3, scale=0.0), "scale=0.0"),
        (lambda: ScaledParameter(3, init=float("inf")), "init=inf"),
        (lambda: project_(nn.Linear(3, 3)), "nothing to project"),
        (lambda: ProjectedOptimizer(torch.optim.SGD(nn.Linear(3, 3).parameters()), nn.Linear(3, 3)), "nothing to"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer"):
        ProjectedOptimizer(small(), small())
