"""recalibrate_ against the population statistics computed by hand, and its promises on state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from evenly.nn import BatchNorm, InstanceNorm, Norm, recalibrate_

KINDS = {
    "ours": lambda c, **options: BatchNorm(c, **options),
    "pattern": lambda c, **options: Norm("n c ... -> c", c, affine="c", running="n c ... -> c", **options),
    "torch": lambda c, **options: nn.BatchNorm2d(c, **options),
}


@pytest.fixture(params=sorted(KINDS))
def bn(request):
    return KINDS[request.param]


def batches(count=4, size=6, channels=3):
    return [torch.randn(size, channels, 5, 4) * (1 + i) + i for i in range(count)]


def population(data):
    """Mean and unbiased variance of each batch by loops in float64, plainly averaged over batches."""
    means, variances = [], []
    for batch in data:
        per_channel = batch.double().transpose(0, 1).flatten(1)
        m = per_channel.shape[1]
        mean = per_channel.sum(1) / m
        means.append(mean)
        variances.append(((per_channel - mean[:, None]) ** 2).sum(1) / (m - 1))
    return torch.stack(means).mean(0), torch.stack(variances).mean(0)


def test_statistics_are_the_plain_average(bn):
    layer = bn(3)
    for batch in batches(20):
        layer(batch * 7)  # statistics that must be forgotten
    data = batches()
    assert recalibrate_(layer, data) is layer
    mean, var = population(data)
    torch.testing.assert_close(layer.running_mean, mean.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var, var.float(), rtol=1e-5, atol=1e-5)


def test_unequal_batches_weigh_the_same(bn):
    data = [torch.randn(2, 3, 2, 2), torch.randn(50, 3, 2, 2) + 10]
    layer = recalibrate_(bn(3), data)
    torch.testing.assert_close(layer.running_mean, population(data)[0].float())


def test_one_batch_reproduces_training_output_up_to_bessel(bn):
    layer = bn(3, eps=1e-3)
    x = batches(1)[0].double()
    layer.double()
    trained = layer.train()(x)
    recalibrate_(layer, [x])
    evaluated = layer.eval()(x)
    var = x.transpose(0, 1).flatten(1).var(1, correction=0)[None, :, None, None]
    m = x[:, 0].numel()
    factor = ((var + 1e-3) / (m / (m - 1) * var + 1e-3)).sqrt()
    torch.testing.assert_close(evaluated, trained * factor, rtol=1e-10, atol=1e-10)


def test_layers_inside_see_batches_normalized_as_in_training():
    model = nn.Sequential(BatchNorm(3, affine=False), nn.ReLU(), nn.BatchNorm2d(3))
    model[0].running_mean += 100  # would ruin the second layer if the first ran in eval mode
    data = batches()
    recalibrate_(model, data)
    inner = [nn.functional.relu(nn.functional.batch_norm(x, None, None, training=True)) for x in data]
    torch.testing.assert_close(model[2].running_mean, population(inner)[0].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("training", [True, False])
def test_momentum_mode_weights_and_other_modules_are_as_before(bn, momentum, training):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), bn(3, momentum=momentum), nn.Dropout(0.9), InstanceNorm(3)).train(
        training
    )
    model[2].train(not training)
    weights = {name: value.clone() for name, value in model.named_parameters()}
    recalibrate_(model, batches())
    assert model[1].momentum == momentum
    assert [module.training for module in model] == [training, training, not training, training]
    for name, value in model.named_parameters():
        assert torch.equal(value, weights[name])
        assert value.grad is None


def test_dropout_is_off_while_measuring():
    model = nn.Sequential(nn.Dropout(0.9), BatchNorm(3)).train()
    data = batches()
    recalibrate_(model, data)
    torch.testing.assert_close(model[1].running_var, population(data)[1].float(), rtol=1e-5, atol=1e-5)


def test_instance_norm_is_left_alone():
    model = nn.Sequential(InstanceNorm(3, track_running_stats=True), BatchNorm(3))
    recalibrate_(model, batches())
    assert (model[0].running_mean == 0).all()
    assert (model[1].running_mean != 0).all()


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = BatchNorm(3)

    def forward(self, a, scale=1.0):
        return self.bn(a * scale)


def test_kinds_of_batches():
    data = batches()
    want = recalibrate_(Two(), data).bn.running_mean
    labelled = [(x, torch.zeros(len(x))) for x in data]
    torch.testing.assert_close(recalibrate_(Two(), labelled).bn.running_mean, want)
    torch.testing.assert_close(recalibrate_(Two(), [list(pair) for pair in labelled]).bn.running_mean, want)
    named = [{"a": x, "scale": 2.0} for x in data]
    torch.testing.assert_close(recalibrate_(Two(), named).bn.running_mean, 2 * want)
    with pytest.raises(ValueError, match="expected a batch to be a tensor"):
        recalibrate_(Two(), ["words"])


def test_num_batches(bn):
    data = batches(6)
    layer = recalibrate_(bn(3), iter(data), num_batches=2)
    torch.testing.assert_close(layer.running_mean, population(data[:2])[0].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "batches held 0; expected at least 1"),
        ([torch.ones(4, 3, 2, 2)], {"num_batches": 3}, "batches held 1; expected 3"),
        ([torch.ones(4, 3, 2, 2), "words"], {}, "expected a batch to be a tensor"),
    ],
)
def test_a_failure_leaves_everything_as_it_was(bn, data, options, message):
    layer = bn(3)
    layer(torch.randn(8, 3, 2, 2))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.eval()
    with pytest.raises(ValueError, match=message):
        recalibrate_(layer, data, **options)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])
    assert layer.momentum == 0.1
    assert not layer.training


@pytest.mark.parametrize("kind", ["ours", "torch"])
def test_an_error_of_the_model_leaves_everything_as_it_was(kind):
    layer = KINDS[kind](3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        recalibrate_(layer, [torch.ones(4, 3, 2, 2), torch.ones(1, 3, 1, 1)])
    assert (layer.running_mean == 0).all()
    assert layer.momentum == 0.1


def test_nothing_to_recalibrate():
    for model in (
        nn.Linear(3, 3),
        nn.BatchNorm2d(3, track_running_stats=False),
        BatchNorm(3, track_running_stats=False),
    ):
        with pytest.raises(ValueError, match="no batch norm that tracks"):
            recalibrate_(model, batches())
    with pytest.raises(ValueError, match="num_batches is 0"):
        recalibrate_(BatchNorm(3), batches(), num_batches=0)
