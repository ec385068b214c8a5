"""Mean-only batch normalization: the equations of Salimans & Kingma (2016) in float64."""

from __future__ import annotations

import pytest
import torch

import evenly.nn
from evenly.nn import MeanOnlyBatchNorm


@pytest.mark.parametrize("shape", [(6, 3), (5, 3, 4), (4, 3, 2, 5)])
def test_outputs_gradients_and_running_mean(shape):
    layer = MeanOnlyBatchNorm(3, momentum=0.3, dtype=torch.float64)
    dims = [axis for axis in range(len(shape)) if axis != 1]
    view = [-1 if axis == 1 else 1 for axis in range(len(shape))]
    running = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        layer.bias.copy_(torch.randn(3))
    for step in range(20):
        t = (torch.randn(shape, dtype=torch.float64) * 3 + 2).requires_grad_()
        seed = torch.randn(shape, dtype=torch.float64)
        y = layer(t)
        mean = t.detach().mean(dims)
        running = 0.7 * running + 0.3 * mean
        want = t.detach() - mean.view(view) + layer.bias.detach().view(view)
        torch.testing.assert_close(y.detach(), want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(y.detach().mean(dims), layer.bias.detach(), rtol=1e-10, atol=1e-12)
        dt, db = torch.autograd.grad(y, (t, layer.bias), seed)
        torch.testing.assert_close(dt, seed - seed.mean(dims, keepdim=True), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(db, seed.sum(dims), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.running_mean, running, rtol=1e-12, atol=1e-12)
        assert layer.num_batches_tracked.item() == step + 1
    layer.eval()
    t = torch.randn(shape, dtype=torch.float64)
    want = t - running.view(view) + layer.bias.view(view)
    torch.testing.assert_close(layer(t), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(t[:1]), want[:1], rtol=1e-12, atol=1e-12)  # also of one sample


def test_what_is_kept_and_created():
    layer = MeanOnlyBatchNorm(4)
    assert sorted(layer.state_dict()) == ["bias", "num_batches_tracked", "running_mean"]
    assert sorted(MeanOnlyBatchNorm(4, bias=False).state_dict()) == ["num_batches_tracked", "running_mean"]
    assert repr(evenly.nn.create("mean-only", 4)) == "MeanOnlyBatchNorm(4, momentum=0.1, bias=True)"
    last = evenly.nn.create("mean-only", 4, channel_dim=-1, activation="relu")
    x = torch.randn(3, 5, 4)
    torch.testing.assert_close(last(x), torch.relu(x - x.mean((0, 1))))
    evenly.nn.create("mean-only", 4, eps=1e-3)  # as for any other layer; it divides by nothing


def test_plain_average_and_masks():
    layer = MeanOnlyBatchNorm(2, momentum=None)
    a, b = torch.randn(4, 2), torch.randn(6, 2) + 3
    layer(a), layer(b)
    torch.testing.assert_close(layer.running_mean, (a.mean(0) + b.mean(0)) / 2)
    mask = torch.tensor([True, True, False, True])[:, None]
    y = MeanOnlyBatchNorm(2)(torch.where(mask, a, torch.full_like(a, float("nan"))), mask=mask)
    torch.testing.assert_close(y[[0, 1, 3]], a[[0, 1, 3]] - a[[0, 1, 3]].mean(0))
    assert (y[2] == 0).all()
    first = MeanOnlyBatchNorm(2)
    first(a, mask=torch.zeros(4, 1, dtype=torch.bool))
    assert torch.equal(first.running_mean, torch.zeros(2))  # nothing was seen


def test_refused():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        MeanOnlyBatchNorm(3)(torch.randn(1, 3))
    assert MeanOnlyBatchNorm(3).eval()(torch.randn(1, 3)).shape == (1, 3)
    with pytest.raises(ValueError, match="momentum"):
        MeanOnlyBatchNorm(3, momentum=2.0)
    with pytest.raises(ValueError, match="num_features=0"):
        MeanOnlyBatchNorm(0)
    with pytest.raises(ValueError, match="channel_dim"):
        MeanOnlyBatchNorm(3, channel_dim=2)


def test_recalibration_knows_it():
    model = torch.nn.Sequential(MeanOnlyBatchNorm(2))
    batches = [torch.randn(8, 2) + 1, torch.randn(8, 2) - 3]
    evenly.nn.recalibrate_(model, batches)
    torch.testing.assert_close(model[0].running_mean, (batches[0].mean(0) + batches[1].mean(0)) / 2)
