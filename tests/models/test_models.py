"""The small networks: every recipe, both shapes, gradients to every parameter, the fused path equals the plain."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from evenly.models import RECIPES, Recipe, mlp, recipe, recipes_for, resnet
from evenly.models._normed import NormedActivation


@pytest.mark.parametrize("preactivation", [False, True])
@pytest.mark.parametrize("norm", recipes_for("image"))
def test_resnet_trains_every_parameter(norm: str, preactivation: bool) -> None:
    torch.manual_seed(0)
    model = resnet(3, 5, norm=norm, widths=(8, 16), preactivation=preactivation)
    out = model(torch.randn(4, 3, 9, 12))
    assert out.shape == (4, 5)
    nn.functional.cross_entropy(out, torch.arange(4)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    reached = [bool(p.grad.any()) for n, p in model.named_parameters() if p.ndim > 1]
    # Fixup starts with a classifier of 0, which is all that the first step moves.
    assert all(reached) if norm != "fixup" else sum(reached) == 1


@pytest.mark.parametrize("norm", recipes_for("tabular"))
def test_mlp_trains_every_parameter(norm: str) -> None:
    torch.manual_seed(0)
    model = mlp(7, 3, norm=norm, widths=(8, 8))
    assert mlp(3 * 4 * 4, 3, norm=norm)(torch.randn(2, 3, 4, 4)).shape == (2, 3)
    nn.functional.cross_entropy(model(torch.randn(6, 7)), torch.arange(6) % 3).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_without_normalization_there_is_a_bias_and_no_layer() -> None:
    plain, normed = resnet(1, 10, norm="none"), resnet(1, 10, norm="batch")
    assert plain.stem.bias is not None
    assert normed.stem.bias is None
    layers = [m.norm for m in plain.modules() if isinstance(m, NormedActivation)]
    assert layers
    assert not any(list(layer.parameters()) for layer in layers)


def test_group_ws_standardizes_the_convolutions() -> None:
    model = resnet(1, 10, norm="group+ws")
    weight = model.stem.weight.detach()
    assert weight.mean((1, 2, 3)).abs().max() < 1e-5
    # The stem has 9 weights a filter; the variance is 1 but for eps.
    assert (weight.var((1, 2, 3), correction=0) - 1).abs().max() < 1e-2


@pytest.mark.parametrize("norm", [n for n in recipes_for("image") if n not in ("none", "wn", "fixup")])
def test_fused_equals_unfused(norm: str) -> None:
    torch.manual_seed(1)
    row = recipe(norm)
    x, residual = torch.randn(3, 8, 5, 5), torch.randn(3, 8, 5, 5)
    fused = NormedActivation(row.build(8), "relu")
    assert fused.fused == (norm not in ("power", "online"))
    plain = row.build(8)
    assert torch.allclose(fused(x, residual=residual), torch.relu(plain(x) + residual), atol=1e-6)
    fresh = row.build(8)  # some layers keep a state
    assert torch.allclose(NormedActivation(row.build(8), None)(x), fresh(x), atol=1e-6)


def test_what_fixup_and_weight_normalization_do_to_a_network() -> None:
    model, x = resnet(1, 10, norm="fixup", widths=(8, 16)), torch.randn(6, 1, 8, 8)
    assert not model(x).any()
    assert model.blocks[0].conv2.fixup_scale.item() == 1
    assert model.stem.bias is None
    model = resnet(1, 10, norm="wn")
    assert torch.nn.utils.parametrize.is_parametrized(model.stem)
    recipe("wn").initialize(model, [x])
    y = model(x)
    assert y.mean(0).abs().max() < 1e-5
    assert (y.var(0, correction=0) - 1).abs().max() < 1e-4
    before = copy.deepcopy(model.state_dict())
    recipe("batch").initialize(model, [x])  # nothing to do
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_rows_that_are_compared_unasked() -> None:
    default, others = recipes_for("image", default=True), recipes_for("image", default=False)
    assert {"batch", "wn", "fixup"} <= set(default)
    assert {"power", "online", "bcn+ws"} <= set(others)
    assert sorted(default + others) == sorted(recipes_for("image"))


def test_a_torch_layer_is_followed_by_the_plain_operations() -> None:
    torch.manual_seed(2)
    layer = NormedActivation(nn.BatchNorm2d(4), "silu")
    assert not layer.fused
    x, residual = torch.randn(5, 4, 3, 3), torch.randn(5, 4, 3, 3)
    assert torch.allclose(layer(x, residual), nn.functional.silu(nn.BatchNorm2d(4)(x) + residual), atol=1e-6)


def test_a_new_row_is_in_every_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "mine", Recipe("mine", lambda c: nn.BatchNorm2d(c), kinds=("image",)))
    assert "mine" in recipes_for("image")
    assert "mine" not in recipes_for("tabular")
    assert isinstance(resnet(1, 10, norm="mine").stem_norm.norm, nn.BatchNorm2d)


def test_recipes_by_path_and_callable() -> None:
    assert isinstance(recipe("torch.nn:BatchNorm1d").build(3), nn.BatchNorm1d)
    assert isinstance(recipe(nn.BatchNorm1d).build(3), nn.BatchNorm1d)
    assert recipe(RECIPES["batch"]) is RECIPES["batch"]


@pytest.mark.parametrize(
    ("norm", "said"),
    [
        ("bacth", "known are none, batch"),
        ("no_such_module:thing", "cannot be imported"),
        ("torch.nn:NoSuchLayer", "cannot be imported"),
        ("math:pi", "neither a Recipe nor a callable"),
    ],
)
def test_bad_recipes_say_what_is_wrong(norm: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        recipe(norm)


def test_bad_shapes_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="at least one"):
        resnet(1, 10, widths=())
    with pytest.raises(ValueError, match="must not shrink"):
        resnet(1, 10, widths=(16, 8))
    with pytest.raises(ValueError, match="at least one hidden layer"):
        mlp(3, 2, widths=())
    with pytest.raises(ValueError, match="expected one of image, tabular"):
        recipes_for("audio")
    with pytest.raises(ValueError, match="activation is 'tanh'"):
        NormedActivation(nn.Identity(), "tanh")
