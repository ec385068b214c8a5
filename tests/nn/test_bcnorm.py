"""Batch-channel normalization against formulas written out, torch's layers, and the properties of its sheet."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from evenly.nn import BCNorm, EstBatchNorm, channel_activity, create, set_moving_speed_
from evenly.weights import WSConv2d, weight_standardization


def randomized(layer):
    with torch.no_grad():
        for p in layer.parameters():
            p.uniform_(0.5, 1.5)
    return layer


def estimated(x, mean, var, speed, weight, bias):
    """EstBN, written out: the moved estimates and the output; gradients see constants."""
    batch = x.detach().transpose(0, 1).flatten(1)
    second = ((batch - mean[:, None]) ** 2).mean(1)
    mean, var = (1 - speed) * mean + speed * batch.mean(1), (1 - speed) * var + speed * second
    shape = (1, -1, 1, 1)
    y = (x - mean.view(shape)) / (var + 1e-5).sqrt().view(shape) * weight.view(shape) + bias.view(shape)
    return y, mean, var


def by_group(y, groups, weight, bias):
    z = y.reshape(y.shape[0], groups, -1)
    z = (z - z.mean(2, keepdim=True)) / (z.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    if len(weight) == groups:
        return (z * weight[:, None] + bias[:, None]).reshape(y.shape)
    return z.reshape(y.shape) * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


@pytest.mark.parametrize("affine", ["group", "channel"])
def test_estimated_form_equals_the_formulas(affine):
    layer = randomized(BCNorm(6, 3, estimate=True, moving_speed=0.2, channel_affine=affine, dtype=torch.float64))
    mean, var = torch.zeros(6).double(), torch.ones(6).double()
    for _ in range(5):
        x = (torch.randn(2, 6, 4, 3, dtype=torch.float64) * 3 + 2).requires_grad_()
        twin = x.detach().clone().requires_grad_()
        parameters = {k: p.detach().clone().requires_grad_() for k, p in layer.named_parameters()}
        y, mean, var = estimated(twin, mean, var, 0.2, parameters["bn.weight"], parameters["bn.bias"])
        want = by_group(y, 3, parameters["weight"], parameters["bias"])
        got = layer(x)
        torch.testing.assert_close(got, want)
        grad = torch.randn_like(x)
        ours = torch.autograd.grad(got, [x, *layer.parameters()], grad)
        theirs = torch.autograd.grad(want, [twin, *parameters.values()], grad)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q)
        torch.testing.assert_close(layer.bn.running_mean, mean)
        torch.testing.assert_close(layer.bn.running_var, var)
    want = by_group(
        (x - mean.view(1, -1, 1, 1)) / (var + 1e-5).sqrt().view(1, -1, 1, 1) * layer.bn.weight.view(1, -1, 1, 1)
        + layer.bn.bias.view(1, -1, 1, 1),
        3,
        layer.weight,
        layer.bias,
    )
    torch.testing.assert_close(layer.eval()(x), want)


@pytest.mark.parametrize("affine", ["group", "channel"])
def test_large_batch_form_is_torch_batch_norm_then_group_norm(affine):
    layer = randomized(BCNorm(6, 2, channel_affine=affine, dtype=torch.float64))
    first, second = nn.BatchNorm2d(6, dtype=torch.float64), nn.GroupNorm(2, 6, dtype=torch.float64)
    spread = (lambda t: t.repeat_interleave(3)) if affine == "group" else (lambda t: t)
    with torch.no_grad():
        first.weight.copy_(layer.bn.weight)
        first.bias.copy_(layer.bn.bias)
        second.weight.copy_(spread(layer.weight))
        second.bias.copy_(spread(layer.bias))
    for training in (True, True, False):
        layer.train(training)
        first.train(training)
        x = (torch.randn(4, 6, 3, 5, dtype=torch.float64) * 2 + 1).requires_grad_()
        twin = x.detach().clone().requires_grad_()
        a, b = layer(x), second(first(twin))
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(
            torch.autograd.grad(a.pow(3).sum(), x)[0], torch.autograd.grad(b.pow(3).sum(), twin)[0]
        )
    torch.testing.assert_close(layer.bn.running_var, first.running_var)


def test_no_speed_is_group_norm():
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    layer = BCNorm(8, 4, estimate=True, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.group_norm(x, 4), rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.bn.running_mean, torch.zeros(8, dtype=torch.float64))


def test_one_group_a_channel_is_batch_norm_then_instance_norm():
    x = torch.randn(4, 6, 5, 5)
    want = nn.functional.instance_norm(nn.functional.batch_norm(x, None, None, training=True))
    torch.testing.assert_close(BCNorm(6, 6)(x), want)


def test_each_sample_and_group_is_normalized_before_the_last_affine():
    y = BCNorm(8, 2, estimate=True, moving_speed=0.1)(torch.randn(3, 8, 5, 5) * 9 + 4).view(3, 2, -1)
    torch.testing.assert_close(y.mean(2), torch.zeros(3, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.var(2, correction=0), torch.ones(3, 2), rtol=1e-3, atol=1e-3)


def test_estimates():
    x = torch.randn(2, 3, 4, 4) * 2 + 5
    layer = EstBatchNorm(3, moving_speed=0.3)
    assert torch.equal(layer(x), layer.eval()(x)), "training normalizes by the moved estimates"
    full = EstBatchNorm(3, moving_speed=1.0)
    full(x)
    torch.testing.assert_close(full.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(full.running_var, (x**2).mean((0, 2, 3)))  # about the old mean, 0


def test_two_forward_passes_before_one_backward():
    layer = EstBatchNorm(3, moving_speed=0.5)
    x = torch.randn(2, 3, 4, requires_grad=True)
    (layer(x).pow(2).sum() + layer(x).pow(2).sum()).backward()
    assert layer.num_batches_tracked == 2


def test_masked_values_do_not_count():
    x, mask = torch.randn(3, 2, 4), torch.rand(3, 1, 4) < 0.6
    layer = EstBatchNorm(2, moving_speed=1.0)
    layer(x, mask=mask)
    kept = x.movedim(1, -1)[mask[:, 0]]
    torch.testing.assert_close(layer.running_mean, kept.mean(0))


def test_checkpointing_moves_the_estimates_once():
    layers = [BCNorm(4, 2, estimate=True, moving_speed=0.1) for _ in range(2)]
    x, grads = torch.randn(2, 4, 3, 3), []
    for layer, again in zip(layers, (False, True), strict=True):
        leaf = x.clone().requires_grad_()
        (checkpoint(layer, leaf, use_reentrant=False) if again else layer(leaf)).pow(3).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
    for p, q in zip(*(layer.state_dict().values() for layer in layers), strict=True):
        assert torch.equal(p, q)


def test_moving_speed_of_a_model():
    model = nn.Sequential(BCNorm(4, 2, estimate=True), nn.Sequential(EstBatchNorm(4), BCNorm(4, 2)))
    assert set_moving_speed_(model, 0.05) == 2
    assert model[0].bn.moving_speed == pytest.approx(0.05)
    with pytest.raises(ValueError, match="estimate=True"):
        set_moving_speed_(nn.Sequential(BCNorm(4, 2)), 0.1)
    with pytest.raises(ValueError, match="batch statistics"):
        BCNorm(4, 2).set_moving_speed(0.1)


def test_channel_activity():
    x = torch.randn(50, 3, 8, 8)
    x[:, 1] -= 100
    seen = channel_activity(x)
    assert seen.fraction[1] == 0
    assert seen.share[1] == 0
    assert seen.fraction[[0, 2]].sub(0.5).abs().max() < 0.05
    with pytest.raises(ValueError, match="shape"):
        channel_activity(torch.ones(3))


def test_standardized_convolution():
    conv = WSConv2d(3, 8, 3, padding=1)
    plain = nn.Conv2d(3, 8, 3, padding=1)
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(conv(x), weight_standardization(plain)(x))
    with pytest.raises(ValueError, match="single value"):
        WSConv2d(4, 4, 1, groups=4)


def test_wrong_arguments():
    for make, message in [
        (lambda: BCNorm(6, 4), r"divisors are \[1, 2, 3, 6\]"),
        (lambda: BCNorm(6, 3, moving_speed=0.1), "estimate=True"),
        (lambda: BCNorm(6, 3, estimate=True, moving_speed=1.5), "outside"),
        (lambda: BCNorm(6, 3, channel_affine="layer"), "'group' or 'channel'"),
        (lambda: EstBatchNorm(6, eps=-1), "eps"),
        (lambda: EstBatchNorm(0), "positive"),
        (lambda: EstBatchNorm(6).set_moving_speed(-0.1), "outside"),
        (lambda: BCNorm(6, 3)(torch.ones(2, 5, 3, 3)), "made for 6 channels"),
        (lambda: create("bcn", 8, channel_dim=-1), "axis 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


def test_by_name():
    assert isinstance(create("bcn-est", 8).bn, EstBatchNorm)
    assert create("bcn", 8, activation="relu")(torch.randn(2, 8, 3, 3)).min() == 0
