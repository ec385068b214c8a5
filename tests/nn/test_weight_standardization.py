"""Weight standardization: the properties of Qiao et al. (2019), as a parametrization and in place."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from evenly.weights import WeightStandardization, weight_standardize_

CONVS = {
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "conv3d": lambda: nn.Conv3d(2, 3, 2),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "pointwise": lambda: nn.Conv2d(4, 6, 1),
}
TRANSPOSED = {
    "transposed1d": lambda: nn.ConvTranspose1d(4, 6, 3),
    "transposed2d": lambda: nn.ConvTranspose2d(4, 6, 3),
    "transposed3d": lambda: nn.ConvTranspose3d(2, 3, 2),
    "transposed grouped": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
}


def filters(conv, weight):
    """(output channels, everything that feeds them), from the definition of each kind of convolution."""
    if not conv.transposed:
        return weight.flatten(1)
    # (in, out / groups, *k): output channel g * (out / groups) + o reads the inputs of group g only.
    g = conv.groups
    w = weight.reshape(g, conv.in_channels // g, conv.out_channels // g, -1)
    return w.transpose(1, 2).reshape(conv.out_channels, -1)


@pytest.mark.parametrize("name", [*CONVS, *TRANSPOSED])
def test_mean_zero_and_mean_square_one(name):
    conv = {**CONVS, **TRANSPOSED}[name]().double()
    with torch.no_grad():
        conv.weight.mul_(3).add_(1)
    before = conv.weight.detach().clone()
    wrapper = nn.Sequential(conv)
    weight_standardize_(wrapper, eps=0.0)
    w = filters(conv, conv.weight)
    torch.testing.assert_close(w.mean(1), torch.zeros(len(w)).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(w.pow(2).mean(1), torch.ones(len(w)).double(), rtol=0, atol=1e-12)
    v = filters(conv, before)
    want = (v - v.mean(1, keepdim=True)) / v.std(1, keepdim=True, correction=0)
    torch.testing.assert_close(w, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(conv.parametrizations.weight.original, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", CONVS)
def test_equals_batch_norm_of_the_weight(name):
    """On W viewed (1, O, n), with batch statistics."""
    w = CONVS[name]().weight.detach().double() * 2 + 1
    want = F.batch_norm(w.flatten(1)[None], None, None, training=True, eps=1e-5)[0].reshape(w.shape)
    torch.testing.assert_close(WeightStandardization(eps=1e-5)(w), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(WeightStandardization()(w), want, rtol=0, atol=1e-12)


def test_invariance_and_gradient():
    w = torch.randn(6, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    ws = WeightStandardization(eps=0.0)
    a, b = torch.rand(6, 1, 1, 1).double() + 0.5, torch.randn(6, 1, 1, 1).double()
    torch.testing.assert_close(ws(a * w + b), ws(w), rtol=0, atol=1e-11)
    (g,) = torch.autograd.grad(ws(w), w, torch.randn_like(w))
    assert g.abs().max() > 1e-2
    zero = torch.zeros(6, dtype=torch.float64)
    torch.testing.assert_close(g.flatten(1).sum(1), zero, rtol=0, atol=1e-12)
    torch.testing.assert_close((g * w).flatten(1).sum(1), zero, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(WeightStandardization(eps=1e-3), w[:2, :2].detach().requires_grad_())


def test_register_and_remove():
    conv = nn.Conv2d(3, 4, 3).double()
    plain = conv.weight.detach().clone()
    parametrize.register_parametrization(conv, "weight", WeightStandardization())
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    flat = plain.flatten(1)
    w = ((flat - flat.mean(1, keepdim=True)) / (flat.var(1, correction=0, keepdim=True) + 1e-5).sqrt()).reshape_as(
        plain
    )
    torch.testing.assert_close(conv(x), F.conv2d(x, w, conv.bias), rtol=0, atol=1e-12)
    parametrize.remove_parametrizations(conv, "weight", leave_parametrized=False)
    torch.testing.assert_close(conv.weight.detach(), plain, rtol=0, atol=0)
    assert type(conv) is nn.Conv2d
    # Baked into the weight for deployment.
    parametrize.register_parametrization(conv, "weight", WeightStandardization())
    parametrize.remove_parametrizations(conv, "weight", leave_parametrized=True)
    torch.testing.assert_close(conv(x), F.conv2d(x, w, conv.bias), rtol=0, atol=1e-12)


def _model():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Sequential(nn.ConvTranspose2d(8, 4, 2), nn.Conv2d(4, 4, 3, groups=4)),
        nn.Flatten(),
        nn.LazyLinear(5),
    )


def test_in_place_on_a_model():
    model = _model()
    model(torch.randn(2, 3, 8, 8))
    names = list(dict(model.named_parameters()))
    assert weight_standardize_(model) == ["0", "3.0", "3.1"]
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert len(convs) == 3
    assert all(parametrize.is_parametrized(m, "weight") for m in convs)
    assert not parametrize.is_parametrized(model[-1])
    assert not parametrize.is_parametrized(model[1])
    assert len(list(model.parameters())) == len(names)
    y = model(torch.randn(2, 3, 8, 8))
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_only():
    model = _model()
    weight_standardize_(model, only=lambda name, module: name == "0")
    assert parametrize.is_parametrized(model[0], "weight")
    assert not parametrize.is_parametrized(model[3][0])


def test_twice_is_once():
    """A second call must not standardize a standardized weight again, nor add a second parametrization."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    weight_standardize_(model)
    with contextlib.suppress(ValueError):
        weight_standardize_(model)
    assert len(model[0].parametrizations.weight) == 1


def test_shared_weights_stay_shared():
    conv = nn.Conv2d(3, 3, 3)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    weight_standardize_(model)
    assert model[0] is model[2]
    assert len(model[0].parametrizations.weight) == 1


def test_one_value_a_filter_is_an_error():
    """A depthwise 1x1 filter has no spread to standardize."""
    with pytest.raises(ValueError, match=r"one value|1 value|single value|more than"):
        WeightStandardization()(torch.randn(4, 1, 1, 1))
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 4, 3))
    assert weight_standardize_(model) == ["1"]


def test_bad_arguments():
    with pytest.raises(ValueError, match="nowhere"):
        weight_standardize_(_model(), only=["0", "nowhere"])
    with pytest.raises(ValueError, match="variant"):
        WeightStandardization(variant="other")
    with pytest.raises(ValueError, match="eps"):
        WeightStandardization(eps=-1.0)
    with pytest.raises(ValueError, match="conv"):
        weight_standardize_(nn.Linear(3, 4))


def test_state_dict_round_trip_and_training_changes_the_output():
    model, other = nn.Sequential(nn.Conv2d(3, 8, 3)), nn.Sequential(nn.Conv2d(3, 8, 3))
    weight_standardize_(model)
    weight_standardize_(other)
    x = torch.randn(2, 3, 6, 6)
    assert not torch.allclose(model(x), other(x))
    other.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(model(x), other(x))
    opt = torch.optim.SGD(model.parameters(), 0.1)
    before = model(x).detach()
    before.shape  # noqa: B018
    model(x).pow(3).sum().backward()
    opt.step()
    assert not torch.allclose(model(x), before)
    w = model[0].weight.flatten(1)
    torch.testing.assert_close(w.mean(1), torch.zeros(8), rtol=0, atol=1e-5)


def test_half_weights_are_measured_in_float32():
    conv = nn.Conv2d(64, 8, 3).half()
    with torch.no_grad():
        conv.weight.mul_(0.01)
    want = WeightStandardization()(conv.weight.double())
    got = WeightStandardization()(conv.weight)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.double(), want, rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("variant", ["paper", "unbiased_inside", "unbiased_outside"])
def test_variants(variant):
    """The three forms of sigma that are in circulation."""
    w = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    v = w.flatten(1)
    eps = 0.1
    sigma = {
        "paper": (v.var(1, correction=0) + eps).sqrt(),
        "unbiased_inside": (v.var(1, correction=1) + eps).sqrt(),
        "unbiased_outside": v.std(1, correction=1) + eps,
    }[variant]
    want = ((v - v.mean(1, keepdim=True)) / sigma[:, None]).reshape_as(w)
    torch.testing.assert_close(WeightStandardization(eps, variant)(w), want, rtol=0, atol=1e-12)
