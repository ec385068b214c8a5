"""Power normalization against loops written from the equations, and the properties that the paper states."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from evenly.nn import GroupScaling, PowerNorm, PowerNormV, create, fold_into_linear

EPS = 1e-5


class Oracle:
    """Algorithm 2 and the released code's warm-up for tokens (m, C), forward and backward, written out in float64."""

    def __init__(self, weight, bias, groups, warmup, batch_scale, alpha_f=0.9, alpha_b=0.9):
        self.weight, self.bias, self.groups, self.warmup, self.batch_scale = weight, bias, groups, warmup, batch_scale
        self.alpha_f, self.alpha_b = alpha_f, alpha_b
        self.psi, self.nu, self.t = torch.ones_like(weight), torch.zeros_like(weight), 0

    def step(self, x, dy, padding):
        self.t += 1
        m, c = x.shape
        grouped = x.reshape(m, self.groups, c // self.groups)
        root = ((grouped * grouped).mean(2, keepdim=True) + EPS).sqrt()
        z = (grouped / root).reshape(m, c)
        real = z[~padding]
        psi_batch = (real * real).sum(0) / len(real)
        psi = psi_batch if self.t <= self.warmup else self.psi
        xhat = z / (psi + EPS).sqrt()
        y = xhat * self.weight + self.bias
        kept = self.psi
        if self.t < self.warmup:
            kept = self.psi * (self.t - 1) / self.t + psi_batch / self.t
        self.psi = self.alpha_f * kept + (1 - self.alpha_f) * psi_batch
        g = self.weight * dy
        tilde = g - self.nu * xhat
        dz = tilde / ((psi_batch if self.batch_scale else psi) + EPS).sqrt()
        gamma, capital_lambda = (xhat * xhat).mean(0), (g * xhat).mean(0)
        self.nu = self.nu * (1 - (1 - self.alpha_b) * gamma) + (1 - self.alpha_b) * capital_lambda
        # group scaling, by the derivative of z = x / root
        dz, zg = dz.reshape(grouped.shape), z.reshape(grouped.shape)
        dx = ((dz - zg * (dz * zg).mean(2, keepdim=True)) / root).reshape(m, c)
        return y, dx, (dy * xhat).sum(0), dy.sum(0)


def randomized(layer):
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5)
        layer.bias.normal_()
    return layer


@pytest.mark.parametrize("backward_scale", ["running", "batch"])
@pytest.mark.parametrize("warmup", [0, 4, 100])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_algorithm(backward_scale, warmup, padded):
    layer = PowerNorm(6, warmup_iters=warmup, group_num=3, backward_scale=backward_scale, dtype=torch.float64)
    randomized(layer)
    oracle = Oracle(layer.weight.detach().clone(), layer.bias.detach().clone(), 3, warmup, backward_scale == "batch")
    for _ in range(8):
        x = torch.randn(4, 5, 6, dtype=torch.float64) * torch.tensor([0.1, 1, 3, 1, 5, 1.0]).double() + 1
        dy = torch.randn_like(x)
        padding = torch.rand(4, 5) < 0.4 if padded else torch.zeros(4, 5, dtype=torch.bool)
        leaf = x.clone().requires_grad_()
        y = layer(leaf, pad_mask=padding if padded else None)
        got = torch.autograd.grad(y, [leaf, layer.weight, layer.bias], dy)
        want = oracle.step(x.view(-1, 6), dy.view(-1, 6), padding.view(-1))
        for p, q in zip([y, *got], want, strict=True):
            torch.testing.assert_close(p.detach().reshape(q.shape), q, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(layer.running_phi, oracle.psi, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.ema_gz * (1 - 0.9), oracle.nu, rtol=1e-10, atol=1e-12)
    layer.eval()
    z = GroupScaling(3)(x)
    want = z / (oracle.psi + EPS).sqrt() * oracle.weight + oracle.bias
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


def test_channels_first_equals_channels_last():
    x = torch.randn(3, 6, 4, 2, dtype=torch.float64)
    a = randomized(PowerNorm(6, warmup_iters=1, group_num=2, dtype=torch.float64))
    b = PowerNorm(6, warmup_iters=1, group_num=2, channel_dim=1, dtype=torch.float64)
    b.load_state_dict(a.state_dict())
    for _ in range(3):
        u, v = x.movedim(1, -1).clone().requires_grad_(), x.clone().requires_grad_()
        ya, yb = a(u), b(v)
        torch.testing.assert_close(yb, ya.movedim(-1, 1))
        ya.pow(3).sum().backward()
        yb.pow(3).sum().backward()
        torch.testing.assert_close(v.grad, u.grad.movedim(-1, 1))
        torch.testing.assert_close(a.ema_gz, b.ema_gz)


def test_pn_v_has_the_exact_gradient_of_the_paper():
    layer = randomized(PowerNormV(4, dtype=torch.float64))
    x = (torch.randn(30, 4, dtype=torch.float64) * 3).requires_grad_()
    dy = torch.randn(30, 4, dtype=torch.float64)
    psi2 = (x * x).mean(0).detach()
    y = layer(x)
    xhat = x.detach() / (psi2 + EPS).sqrt()
    torch.testing.assert_close(y.detach(), xhat * layer.weight.detach() + layer.bias.detach())
    (got,) = torch.autograd.grad(y, x, dy)
    g = dy * layer.weight.detach()
    torch.testing.assert_close(got, (g - xhat * (g * xhat).mean(0)) / (psi2 + EPS).sqrt())
    torch.testing.assert_close(layer.running_phi, 0.9 + 0.1 * psi2)
    torch.testing.assert_close(layer.eval()(x), x / (0.9 + 0.1 * psi2 + EPS).sqrt() * layer.weight + layer.bias)


def test_stationary_data_give_the_gradient_of_pn_v():
    """At the fixed point of both states the approximate gradient is the exact one; ν tends to Λ."""
    x, dy = torch.randn(50, 3, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64)
    layer = PowerNorm(3, warmup_iters=0, group_scaling=False, eps=0.0, dtype=torch.float64)
    for _ in range(400):
        leaf = x.clone().requires_grad_()
        layer(leaf).backward(dy)
    exact = x.clone().requires_grad_()
    PowerNormV(3, eps=0.0, dtype=torch.float64)(exact).backward(dy)
    torch.testing.assert_close(leaf.grad, exact.grad, rtol=1e-8, atol=1e-8)
    xhat = x / (x * x).mean(0).sqrt()
    torch.testing.assert_close(0.1 * layer.ema_gz, (dy * xhat).mean(0), rtol=1e-8, atol=1e-8)


def test_linear_in_its_input_after_warm_up_without_group_scaling():
    x = torch.randn(7, 4)
    y, y3 = (PowerNorm(4, warmup_iters=0, group_scaling=False)(k * x) for k in (1, 3))
    torch.testing.assert_close(y3, 3 * y)
    shifted = PowerNorm(4, warmup_iters=0, group_scaling=False)(x + 1)
    assert not torch.allclose(shifted, y), "adding a constant is no invariance"


def test_no_memory_and_no_running_term_give_a_constant_scale():
    layer = randomized(PowerNorm(4, warmup_iters=0, group_scaling=False, alpha_bkw=1 - 1e-15, dtype=torch.float64))
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    layer(x).backward(torch.ones(9, 4, dtype=torch.float64))
    torch.testing.assert_close(x.grad, (layer.weight.detach() / (1 + EPS) ** 0.5).expand(9, 4))


def test_first_step_of_warm_up_and_padding():
    x = torch.randn(2, 5, 4, dtype=torch.float64) * 7
    padding = torch.zeros(2, 5, dtype=torch.bool)
    layer = PowerNorm(4, warmup_iters=5, group_scaling=False, eps=0.0, dtype=torch.float64)
    y = layer(x, pad_mask=padding)
    torch.testing.assert_close(y.square().mean((0, 1)), torch.ones(4, dtype=torch.float64))
    longer = torch.cat([x, torch.full((2, 3, 4), 1e3, dtype=torch.float64)], 1)
    other = PowerNorm(4, warmup_iters=5, group_scaling=False, eps=0.0, dtype=torch.float64)
    padded = other(longer, pad_mask=torch.cat([padding, torch.ones(2, 3, dtype=torch.bool)], 1))
    torch.testing.assert_close(padded[:, :5], y)
    torch.testing.assert_close(other.running_phi, layer.running_phi)
    assert (padded[:, 5:] > 10).all(), "padding is scaled, not dropped"


def test_only_padding_changes_nothing():
    layer = PowerNorm(4, warmup_iters=3)
    x = torch.randn(2, 5, 4)
    layer(x).sum().backward()
    before = copy.deepcopy(layer.state_dict())
    y = layer(x, pad_mask=torch.ones(2, 5, dtype=torch.bool))
    assert y.isfinite().all()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_group_scaling():
    x = torch.randn(3, 5, 12) * torch.rand(3, 5, 1) * 100
    y = GroupScaling(3)(x)
    torch.testing.assert_close(y.view(3, 5, 3, 4).square().mean(-1), torch.ones(3, 5, 3), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(GroupScaling(3)(x * 50), y, rtol=1e-4, atol=1e-4)
    images = x.movedim(-1, 1)
    torch.testing.assert_close(GroupScaling(3, channel_dim=1)(images), y.movedim(-1, 1))


@pytest.mark.parametrize("group_scaling", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_fold_into_linear(group_scaling, bias):
    norm = randomized(PowerNorm(8, warmup_iters=0, group_num=2, group_scaling=group_scaling))
    for _ in range(3):
        norm(torch.randn(6, 8) * 3)
    norm.eval()
    linear = nn.Linear(8, 5, bias=bias)
    x = torch.randn(4, 3, 8)
    folded = fold_into_linear(norm, linear)
    torch.testing.assert_close(folded(norm.scaling(x) if norm.scaling else x), linear(norm(x)), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="expected 8"):
        fold_into_linear(norm, nn.Linear(7, 5))


def test_backward_moves_the_state():
    layer = PowerNorm(4, warmup_iters=0)
    x = torch.randn(6, 4, requires_grad=True)
    y = layer(x).pow(2).sum()
    assert (layer.ema_gz == 0).all(), "a forward pass leaves it"
    y.backward(retain_graph=True)
    once = layer.ema_gz.clone()
    y.backward()
    assert not torch.equal(layer.ema_gz, once)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)[0].sum(), x)


def test_two_forward_passes_before_one_backward():
    layer = PowerNorm(4, warmup_iters=1)
    x = torch.randn(6, 4, requires_grad=True)
    (layer(x) + layer(2 * x)).pow(2).sum().backward()
    assert x.grad.isfinite().all()
    assert layer.iters == 2


@pytest.mark.parametrize("warmup", [0, 10])
def test_checkpointing_moves_the_state_once(warmup):
    layers = [PowerNorm(4, warmup_iters=warmup, group_num=2) for _ in range(2)]
    for _ in range(3):
        x = torch.randn(6, 4)
        grads = []
        for layer, again in zip(layers, (False, True), strict=True):
            leaf = x.clone().requires_grad_()
            y = checkpoint(layer, leaf, use_reentrant=False) if again else layer(leaf)
            y.pow(3).sum().backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)
        for p, q in zip(*(layer.state_dict().values() for layer in layers), strict=True):
            assert torch.equal(p, q)


def test_wrong_arguments():
    for arguments, message in [
        ({"alpha_fwd": 1.0}, "alpha_fwd=1.0"),
        ({"alpha_bkw": 0}, "alpha_bkw=0"),
        ({"eps": -1.0}, "eps"),
        ({"warmup_iters": -1}, "warmup_iters"),
        ({"group_num": 3}, r"divisors are \[1, 2, 4\]"),
        ({"backward_scale": "paper"}, "'running' or 'batch'"),
        ({"channel_dim": 0}, "channel_dim"),
    ]:
        with pytest.raises(ValueError, match=message):
            PowerNorm(4, **arguments)
    with pytest.raises(ValueError, match=r"\(2, 5\)"):
        PowerNorm(4)(torch.ones(2, 5, 4), pad_mask=torch.ones(2, 5, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="boolean"):
        PowerNorm(4)(torch.ones(2, 5, 4), pad_mask=torch.ones(2, 5))


def test_by_name():
    assert create("power", 8, channel_dim=-1, num_groups=4).group_num == 4
    assert create("power", 8)(torch.randn(2, 8, 3, 3)).shape == (2, 8, 3, 3)
    with pytest.raises(ValueError, match="no fused activation"):
        create("power", 8, activation="relu")
