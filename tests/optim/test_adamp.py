"""AdamP and SGDP against float64 references written from the paper, torch's optimizers, and their properties."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from evenly.optim import SGDP, AdamP, _common, project_update


def project(w, g, u, delta, eps):
    """The projection of one tensor with loops over rows, in numpy."""
    for rows in (w.shape[0], 1):
        w2, g2, u2 = (a.reshape(rows, -1) for a in (w, g, u))
        norms = [(max(np.linalg.norm(a), eps), max(np.linalg.norm(b), eps)) for a, b in zip(w2, g2, strict=True)]
        cosines = [abs(a @ b) / (p * q) for a, b, (p, q) in zip(w2, g2, norms, strict=True)]
        if max(cosines) < delta / math.sqrt(w2.shape[1]):
            out = np.empty_like(u2)
            for k in range(rows):
                unit = w2[k] / (np.linalg.norm(w2[k]) + eps)
                out[k] = u2[k] - unit * (unit @ u2[k])
            return out.reshape(u.shape), True
    return u, False


def adamp(ws, gradients, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, delta=0.1, wd_ratio=0.1, nesterov=False):
    ws = [w.copy() for w in ws]
    m, v = ([np.zeros_like(w) for w in ws] for _ in range(2))
    b1, b2 = betas
    for t, gs in enumerate(gradients, 1):
        for k, (w, g) in enumerate(zip(ws, gs, strict=True)):
            m[k] = b1 * m[k] + (1 - b1) * g
            v[k] = b2 * v[k] + (1 - b2) * g * g
            denominator = np.sqrt(v[k]) / math.sqrt(1 - b2**t) + eps
            u = (b1 * m[k] + (1 - b1) * g if nesterov else m[k]) / denominator
            ratio = 1.0
            if w.ndim > 1:
                u, projected = project(w, g, u, delta, eps)
                ratio = wd_ratio if projected else 1.0
            ws[k] = w * (1 - lr * weight_decay * ratio) - lr / (1 - b1**t) * u
    return ws


def sgdp(ws, gradients, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, delta=0.1, buffer="paper"):
    ws = [w.copy() for w in ws]
    buffers = [np.zeros_like(w) for w in ws]
    for gs in gradients:
        for k, (w, g) in enumerate(zip(ws, gs, strict=True)):
            buffers[k] = momentum * buffers[k] + (1 - dampening) * g
            d = g + momentum * buffers[k] if nesterov else buffers[k]
            ratio = 1.0
            if w.ndim > 1:
                d, projected = project(w, g, d, delta, 1e-8)
                ratio = 0.1 if projected else 1.0
                if buffer == "code" and not nesterov:
                    buffers[k] = d
            ws[k] = w * (1 - lr * weight_decay * ratio / (1 - momentum)) - lr * d
    return ws


SHAPES = ((4, 3), (5, 2, 3, 3), (7,), (1, 6), (3, 40))


def problem(steps=12):
    """Weights and gradients: of the first and second tensor every row is orthogonal; of the fourth, nearly."""
    rng = np.random.default_rng(0)
    ws = [rng.normal(size=shape) for shape in SHAPES]
    gradients = []
    for _ in range(steps):
        gs = [rng.normal(size=shape) for shape in SHAPES]
        for k in (0, 1):
            w, g = ws[k].reshape(len(ws[k]), -1), gs[k].reshape(len(ws[k]), -1)
            g -= w * (w * g).sum(1, keepdims=True) / (w * w).sum(1, keepdims=True)
        gs[4] -= ws[4] * (ws[4] * gs[4]).sum() / (ws[4] ** 2).sum()  # the tensor as a whole, not its rows
        gradients.append(gs)
    return ws, gradients


def run(make, ws, gradients, dtype=torch.float64):
    params = [nn.Parameter(torch.tensor(w, dtype=dtype)) for w in ws]
    optimizer = make(params)
    seen = []
    for gs in gradients:
        for p, g in zip(params, gs, strict=True):
            p.grad = torch.tensor(g, dtype=dtype)
        optimizer.step()
        seen.append(optimizer.projected if hasattr(optimizer, "projected") else None)
    return [p.detach() for p in params], seen


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("piece", [7, 1 << 18])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-3},
        {"weight_decay": 0.1, "nesterov": True, "delta": 1.0, "wd_ratio": 0.5},
        {"delta": 1e6},
    ],
)
def test_adamp_is_the_papers(settings, foreach, piece, monkeypatch):
    monkeypatch.setattr(_common, "PIECE", piece)
    ws, gradients = problem()
    got, seen = run(lambda params: AdamP(params, lr=0.01, foreach=foreach, **settings), ws, gradients)
    for a, b in zip(got, adamp(ws, gradients, 0.01, **settings), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
    assert seen[0]["channel"] >= 2, "two tensors have orthogonal gradients"
    if "delta" not in settings:
        assert seen[0] == {"channel": 2, "layer": 1, "none": 2}


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("piece", [7, 1 << 18])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1},
        {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1, "buffer": "code"},
        {"momentum": 0.5, "delta": 1e6},
        {"dampening": 0.5, "delta": 1e6},
    ],
)
def test_sgdp_is_the_papers(settings, foreach, piece, monkeypatch):
    monkeypatch.setattr(_common, "PIECE", piece)
    ws, gradients = problem()
    got, _ = run(lambda params: SGDP(params, lr=0.05, foreach=foreach, **settings), ws, gradients)
    for a, b in zip(got, sgdp(ws, gradients, 0.05, **settings), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_the_codes_buffer_is_another_method():
    ws, gradients = problem()
    paper, code = (
        run(lambda p, b=b: SGDP(p, lr=0.05, momentum=0.9, buffer=b), ws, gradients)[0] for b in ("paper", "code")
    )
    assert not torch.allclose(paper[0], code[0], rtol=1e-3)
    torch.testing.assert_close(paper[2], code[2])  # vectors are not projected


def test_without_the_test_it_is_adamw_and_sgd():
    ws, gradients = problem()
    got, seen = run(lambda p: AdamP(p, lr=0.01, weight_decay=0.1, delta=0.0), ws, gradients)
    want, _ = run(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1), ws, gradients)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-12)
    assert seen[-1] == {"channel": 0, "layer": 0, "none": 5}
    got, _ = run(lambda p: SGDP(p, lr=0.01, momentum=0.9, nesterov=True, delta=0.0), ws, gradients)
    want, _ = run(lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True), ws, gradients)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-12)


def test_adamw_state_loads():
    ws, gradients = problem()
    params = [nn.Parameter(torch.tensor(w)) for w in ws]
    adamw = torch.optim.AdamW(params, lr=0.01, weight_decay=0.0)
    for p, g in zip(params, gradients[0], strict=True):
        p.grad = torch.tensor(g)
    adamw.step()
    others = [nn.Parameter(p.detach().clone()) for p in params]
    ours = AdamP(others, lr=0.01, delta=0.0)
    state = copy.deepcopy(adamw.state_dict())
    ours.load_state_dict({"state": state["state"], "param_groups": ours.state_dict()["param_groups"]})
    for made, p_list in ((adamw, params), (ours, others)):
        for p, g in zip(p_list, gradients[1], strict=True):
            p.grad = torch.tensor(g)
        made.step()
    torch.testing.assert_close(others, params, rtol=1e-9, atol=1e-12)


def test_infinite_delta_makes_every_row_orthogonal():
    w, g, u = torch.randn(3, 5, 7, dtype=torch.float64).unbind()
    out, view = project_update(w, g, u, delta=math.inf)
    assert view == "channel"
    assert (out * w).sum(1).abs().max() < 1e-6
    assert not torch.allclose(out, u)
    torch.testing.assert_close(project_update(w, g, out, delta=math.inf)[0], out, rtol=1e-6, atol=1e-7)  # idempotent
    torch.testing.assert_close(out, torch.tensor(project(w.numpy(), g.numpy(), u.numpy(), np.inf, 1e-8)[0]))


def test_the_channel_view_comes_first_and_the_layer_view_may_be_the_only_one():
    w = torch.eye(2)
    assert project_update(w, torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.ones(2, 2))[1] == "channel"
    g = torch.tensor([[1.0, 0.0], [0.0, -1.0]])  # parallel to each row, orthogonal to the whole
    out, view = project_update(w, g, torch.ones(2, 2))
    assert view == "layer"
    assert (out * w).sum().abs() < 1e-6
    assert project_update(w, w, torch.ones(2, 2))[1] is None


def test_zero_weights_pass_the_test_and_lose_nothing():
    u = torch.randn(3, 4)
    out, view = project_update(torch.zeros(3, 4), torch.randn(3, 4), u)
    assert view == "channel"
    assert torch.equal(out, u)


def test_project_update_refuses():
    with pytest.raises(ValueError, match="vectors are never projected"):
        project_update(torch.ones(3), torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match=r"\(2, 3\), \(3, 2\), \(2, 3\); expected one shape"):
        project_update(torch.ones(2, 3), torch.ones(3, 2), torch.ones(2, 3))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_norms_grow_by_the_square_of_the_step_only(momentum):
    torch.manual_seed(3)
    w = nn.Parameter(torch.randn(4, 30, dtype=torch.float64))
    target = torch.randn(4, 30, dtype=torch.float64)
    optimizer = SGDP([w], lr=0.3, momentum=momentum)
    for _ in range(20):
        optimizer.zero_grad()
        (w / w.norm(dim=1, keepdim=True) * target).sum().backward()
        before = w.detach().clone()
        optimizer.step()
        assert optimizer.projected["channel"] == 1
        grown = (w.norm(dim=1) ** 2 - before.norm(dim=1) ** 2).detach()
        torch.testing.assert_close(grown, (w.detach() - before).norm(dim=1) ** 2, rtol=1e-5, atol=1e-7)


def test_momentum_multiplies_the_growth_of_norms():
    # ||w||^2 grows by 1 + 2 b / (1 - b) times as much under momentum when step norms have settled: 19x at b = 0.9.
    torch.manual_seed(0)
    start = torch.randn(1, 2000, dtype=torch.float64) * 100
    noise = torch.randn(200, 1, 2000, dtype=torch.float64)
    grown, moved = {}, {}
    for name, make in {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "sgdp": lambda p: SGDP(p, lr=0.1, momentum=0.9),
    }.items():
        w = nn.Parameter(start.clone())
        optimizer = make([w])
        drift = torch.zeros(())
        for g in noise:
            # A gradient that persists, so that steps add up, made orthogonal to the weight as a norm layer makes it.
            g = noise[0] + 0.0 * g
            unit = w.detach() / w.detach().norm()
            w.grad = g - unit * (unit * g).sum()
            before = w.detach().clone()
            optimizer.step()
            drift = drift + (w.detach() - before).norm() ** 2
        grown[name], moved[name] = (w.detach().norm() ** 2 - start.norm() ** 2).item(), drift.item()
    assert grown["sgdp"] == pytest.approx(moved["sgdp"], rel=1e-6)
    assert 5 < grown["sgd"] / moved["sgd"] <= 19.5


def test_half_precision_weights_are_tested_in_float32():
    torch.manual_seed(0)
    w = torch.randn(8, 512).bfloat16()
    g = torch.randn(8, 512)
    g = (g - w.float() * ((g * w.float()).sum(1) / w.float().square().sum(1)).unsqueeze(1)).bfloat16()
    out, view = project_update(w, g, torch.randn(8, 512).bfloat16())
    assert view == "channel"
    assert out.dtype == torch.bfloat16
    assert (out.float() * w.float()).sum(1).abs().max() < 0.2
