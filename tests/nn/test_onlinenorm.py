"""Online normalization against loops written from the equations, and the identities of its control process."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from evenly.nn import OnlineNorm, OnlineNorm1d, OnlineNorm2d, create
from evenly.nn.onlinenorm import _scan

EPS = 1e-5


class Oracle:
    """The equations, a sample at a time, in float64. The guard's gradient is autograd's."""

    def __init__(self, layer):
        self.layer = layer
        c = layer.num_features
        self.mean, self.var = torch.zeros(c).double(), torch.ones(c).double()
        self.u, self.v = torch.zeros(c).double(), torch.zeros(c).double()

    def guard(self, z):
        if self.layer.guard == "none":
            return z
        if self.layer.guard == "activation_clamping":
            return torch.minimum(torch.maximum(z, -z.new_tensor(1.5)), z.new_tensor(1.5))
        size = z.shape[1] if self.layer.group_size == -1 else self.layer.group_size
        grouped = z.reshape(z.shape[0], z.shape[1] // size, -1)
        return (grouped / ((grouped**2).mean(2, keepdim=True) + EPS).sqrt()).reshape(z.shape)

    def step(self, x, grad):
        layer = self.layer
        x, grad = (t.reshape(*t.shape[:2], -1) for t in (x, grad))
        a, b = layer.alpha_fwd, layer.alpha_bkw
        ys, scales = [], []
        for sample in x:
            m = sample.mean(1)
            s = ((sample - m[:, None]) ** 2).mean(1)
            scales.append((self.var + EPS).sqrt())
            ys.append((sample - self.mean[:, None]) / scales[-1][:, None])
            self.var = a * self.var + (1 - a) * s + a * (1 - a) * (m - self.mean) ** 2
            self.mean = self.mean + (1 - a) * (m - self.mean)
        y = torch.stack(ys).requires_grad_()
        weight, bias = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
        out = self.guard(y * weight[:, None] + bias[:, None])
        dy, dw, db = torch.autograd.grad(out, [y, weight, bias], grad)
        dx = []
        for g, sample, scale in zip(dy, ys, scales, strict=True):
            tilde = g - (1 - b) * self.v[:, None] * sample
            self.v = self.v + (tilde * sample).mean(1)
            back = tilde / scale[:, None] - (1 - b) * self.u[:, None]
            self.u = self.u + back.mean(1)
            dx.append(back)
        return out.detach(), torch.stack(dx), dw, db


def randomized(layer):
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5)
        layer.bias.normal_()
    return layer


@pytest.mark.parametrize("shape", [(7, 6, 4, 3), (9, 6), (1, 6, 5), (40, 6, 2)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"guard": "none"},
        {"guard": "activation_clamping", "clamp_value": 1.5},
        {},
        {"group_size": 3},
        {"group_size": 1},
    ],
    ids=str,
)
def test_equals_the_equations(shape, options):
    layer = randomized(OnlineNorm(6, 0.9, 0.8, dtype=torch.float64, **options))
    oracle = Oracle(layer)
    for _ in range(4):
        x, grad = torch.randn(shape, dtype=torch.float64) * 2 + 1, torch.randn(shape, dtype=torch.float64)
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        got = torch.autograd.grad(y, [leaf, layer.weight, layer.bias], grad)
        want = oracle.step(x, grad)
        for p, q in zip([y, *got], want, strict=True):
            torch.testing.assert_close(p.detach().reshape(q.shape), q, rtol=1e-9, atol=1e-11)
        state = (layer.running_mean, layer.running_var, layer.ctrl_u, layer.ctrl_v)
        for p, q in zip(state, (oracle.mean, oracle.var, oracle.u, oracle.v), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@given(st.integers(1, 70), st.booleans(), st.integers(0, 1000))
def test_scan_is_the_recursion(steps, constant, seed):
    gen = torch.Generator().manual_seed(seed)
    a = 0.93 if constant else 1 - 3 * torch.rand(steps, 2, generator=gen, dtype=torch.float64)  # below -1 too
    b, state = torch.randn(steps, 2, generator=gen, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    before, last = _scan(a, b, state)
    assert before.shape == b.shape
    largest = 1.0
    for t in range(steps):
        torch.testing.assert_close(before[t], state, rtol=1e-9, atol=1e-12 * largest)
        state = (a if constant else a[t]) * state + b[t]
        largest = max(largest, float(state.abs().max()))
    torch.testing.assert_close(last, state, rtol=1e-9, atol=1e-12 * largest)


def test_float32_over_a_long_stream():
    """A product of a thousand coefficients costs no accuracy: nothing is divided by it."""
    layer, exact = OnlineNorm(4, 0.99, 0.9), OnlineNorm(4, 0.99, 0.9, dtype=torch.float64)
    for _ in range(5):
        x, grad = torch.randn(1000, 4) * 3 + 5, torch.randn(1000, 4)
        leaf, twin = x.clone().requires_grad_(), x.double().requires_grad_()
        layer(leaf).backward(grad)
        exact(twin).backward(grad.double())
        torch.testing.assert_close(leaf.grad.double(), twin.grad, rtol=1e-5, atol=1e-6)
    for p, q in zip(layer.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-5, atol=1e-5)


def test_a_batch_is_a_sequence_of_samples():
    whole = randomized(OnlineNorm2d(3, 0.95, 0.9, dtype=torch.float64))
    parts = copy.deepcopy(whole)
    x, grad = torch.randn(12, 3, 4, 4, dtype=torch.float64), torch.randn(12, 3, 4, 4, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    y = whole(leaf)
    y.backward(grad)
    for i in range(12):
        sample = x[i : i + 1].clone().requires_grad_()
        out = parts(sample)
        out.backward(grad[i : i + 1])
        torch.testing.assert_close(out[0], y[i])
        torch.testing.assert_close(sample.grad[0], leaf.grad[i])
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for k, v in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[k], v)


def test_controllers_are_sums_of_what_they_control():
    layer = OnlineNorm(3, 0.95, 0.9, guard="none", affine=False, dtype=torch.float64)
    total = torch.zeros(3, dtype=torch.float64)
    for _ in range(5):
        x = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
        layer(x).backward(torch.randn(6, 3, 4, dtype=torch.float64))
        total += x.grad.mean(2).sum(0)
    torch.testing.assert_close(layer.ctrl_u, total)


def test_limits_of_the_decays():
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(5, 3, 4, dtype=torch.float64)
    still = OnlineNorm(3, 1 - 1e-15, 1 - 1e-15, guard="none", dtype=torch.float64)
    y = still(x)
    y.backward(grad)
    torch.testing.assert_close(y, x / math.sqrt(1 + EPS))
    torch.testing.assert_close(x.grad, grad / math.sqrt(1 + EPS))
    torch.testing.assert_close(still.running_mean, torch.zeros(3, dtype=torch.float64))


def test_constant_input():
    layer = OnlineNorm(2, 0.9, dtype=torch.float64)
    layer(torch.full((30, 2), 7.0, dtype=torch.float64))
    torch.testing.assert_close(layer.running_mean, torch.full((2,), 7 * (1 - 0.9**30), dtype=torch.float64))


def test_a_long_stream_is_normalized_and_its_gradient_has_no_forbidden_part():
    layer = OnlineNorm(2, 0.999, 0.99, guard="none", affine=False, dtype=torch.float64)
    gen = torch.Generator().manual_seed(1)

    def stream(n):
        return torch.randn(n, 2, generator=gen, dtype=torch.float64) * torch.tensor([3.0, 0.2]) + torch.tensor(
            [4.0, -1]
        )

    layer(stream(20_000))
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for _ in range(20):
        x = stream(1000).requires_grad_()
        y = layer(x)
        y.backward(1 + y.detach() + torch.randn(y.shape, generator=gen, dtype=torch.float64))
        sums += torch.stack([x.grad.mean(0), (x.grad * y.detach()).mean(0)]) / 20
        assert y.mean(0).abs().max() < 0.2
        assert (y.square().mean(0) - 1).abs().max() < 0.25
    # an uncontrolled gradient would have means of about 1 / scale, which is 5 for the second channel
    assert sums.abs().max() < 0.05


def test_a_stationary_stream_has_the_gradient_of_batch_norm():
    gen = torch.Generator().manual_seed(2)
    layer = OnlineNorm(1, 0.9999, 0.999, guard="none", affine=False, dtype=torch.float64)
    draw = lambda n: torch.randn(n, 1, generator=gen, dtype=torch.float64) * 2 + 3  # noqa: E731
    grad_of = lambda y: torch.tanh(y) + 0.3  # noqa: E731
    for _ in range(6):
        y = layer(draw(20_000).requires_grad_())
        y.backward(grad_of(y.detach()))
    x = draw(20_000).requires_grad_()
    y = layer(x)
    y.backward(grad_of(y.detach()))
    twin = x.detach().clone().requires_grad_()
    z = torch.nn.functional.batch_norm(twin, None, None, training=True)
    z.backward(grad_of(z.detach()))
    assert torch.cosine_similarity(x.grad.flatten(), twin.grad.flatten(), 0) > 0.99


def test_layer_scaling():
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    layer = OnlineNorm(6, dtype=torch.float64)
    y = layer(x)
    torch.testing.assert_close(y.square().mean((1, 2)), torch.ones(4, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    grouped = OnlineNorm(6, group_size=2, dtype=torch.float64)(x).view(4, 3, -1)
    torch.testing.assert_close(grouped.square().mean(2), torch.ones(4, 3, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_evaluation_is_frozen_statistics_and_the_same_guard():
    layer = randomized(OnlineNorm2d(4, 0.9))
    for _ in range(3):
        layer(torch.randn(8, 4, 3, 3) * 2 + 1)
    layer.eval()
    x = torch.randn(2, 4, 3, 3)
    mean, var, weight, bias = (
        t.view(1, -1, 1, 1) for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    z = (x - mean) / (var + EPS).sqrt() * weight + bias
    z = z / (z.square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layer(x), z)


def test_channels_last_tokens():
    x = torch.randn(5, 7, 4, dtype=torch.float64)
    a, b = OnlineNorm(4, dtype=torch.float64), OnlineNorm(4, channel_dim=-1, dtype=torch.float64)
    for training in (True, False):
        torch.testing.assert_close(b.train(training)(x), a.train(training)(x.movedim(-1, 1)).movedim(1, -1))


def test_checkpointing_moves_the_state_once():
    layers = [OnlineNorm(4, 0.9, 0.9) for _ in range(2)]
    for _ in range(3):
        x, grads = torch.randn(6, 4, 3), []
        for layer, again in zip(layers, (False, True), strict=True):
            leaf = x.clone().requires_grad_()
            y = checkpoint(layer, leaf, use_reentrant=False) if again else layer(leaf)
            y.pow(3).sum().backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)
        for p, q in zip(*(layer.state_dict().values() for layer in layers), strict=True):
            assert torch.equal(p, q)


def test_forward_passes_move_statistics_and_backward_passes_controllers():
    layer = OnlineNorm(4)
    x = torch.randn(6, 4, requires_grad=True)
    with torch.no_grad():
        layer(x)
    assert not torch.equal(layer.running_mean, torch.zeros(4)), "training mode, also without gradient"
    y = (layer(x) + layer(2 * x)).pow(3).sum()
    assert torch.equal(layer.ctrl_v, torch.zeros(4))
    y.backward(retain_graph=True)
    once = layer.ctrl_v.clone()
    y.backward()
    assert not torch.equal(layer.ctrl_v, once)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)[0].sum(), x)


def test_wrong_arguments():
    for arguments, message in [
        ({"alpha_fwd": 1.0}, "alpha_fwd=1.0"),
        ({"alpha_bkw": 0.0}, "alpha_bkw=0.0"),
        ({"guard": "ls"}, "'layer_scaling', 'activation_clamping', 'none'"),
        ({"group_size": 3}, r"\[1, 2, 4\]"),
        ({"clamp_value": 0}, "clamp_value"),
        ({"guard_eps": -1}, "guard_eps"),
    ]:
        with pytest.raises(ValueError, match=message):
            OnlineNorm(4, **arguments)
    with pytest.raises(ValueError, match="made for 64 channels"):
        OnlineNorm2d(64)(torch.ones(2, 32, 3, 3))
    with pytest.raises(ValueError, match="4 axes, got 2"):
        OnlineNorm2d(4)(torch.ones(2, 4))
    with pytest.raises(ValueError, match="2 or 3 axes"):
        OnlineNorm1d(4)(torch.ones(2, 4, 3, 3))


def test_by_name():
    assert create("online", 8)(torch.randn(2, 8, 3, 3)).shape == (2, 8, 3, 3)
    assert create("online", 8, channel_dim=-1).channel_dim == -1


def test_slices_change_nothing():
    """Large inputs are worked on in slices of the batch; small ones are not."""
    x, grad = torch.randn(40, 8, 36, 36), torch.randn(40, 8, 36, 36)  # 414720 values
    whole = OnlineNorm2d(8, 0.9, 0.9)
    parts = copy.deepcopy(whole)
    leaf = x.clone().requires_grad_()
    whole(leaf).backward(grad)
    for a, b, c in zip(x.split(8), grad.split(8), leaf.grad.split(8), strict=True):
        small = a.clone().requires_grad_()
        parts(small).backward(b)
        torch.testing.assert_close(small.grad, c, rtol=1e-4, atol=1e-5)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-3)
