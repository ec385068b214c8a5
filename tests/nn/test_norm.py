"""`Norm` and `NoNorm`: a layer is `normalize` with parameters and, where asked for, running statistics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import evenly
from evenly.nn import NoNorm, Norm

CLOSE = {"rtol": 0, "atol": 1e-12}


def random(layer):
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    return layer


@pytest.mark.parametrize(
    ("pattern", "features", "options", "shape"),
    [
        ("n c h w -> c", 6, {}, (3, 6, 4, 5)),
        ("n (g c) h w -> n g", 6, {"affine": "(g c)", "g": 2}, (3, 6, 4, 5)),
        ("n c h w -> n c", 6, {"affine": "c"}, (3, 6, 4, 5)),
        ("... d -> ...", 5, {}, (3, 4, 5)),
        ("... c d -> ...", (4, 5), {}, (3, 4, 5)),
        ("n c t -> n t", 6, {"affine": "c", "scale": "l2", "center": False}, (3, 6, 4)),
        ("n c -> n", None, {"scale": "max"}, (3, 6)),
        ("... d -> ...", 5, {"bias": False, "scale": "rms", "center": False, "activation": "gelu"}, (3, 4, 5)),
        ("... d -> ...", 5, {"weight": False, "eps": 0.3}, (3, 4, 5)),
    ],
)
def test_is_normalize(pattern, features, options, shape):
    layer = random(Norm(pattern, features, dtype=torch.float64, **options))
    wanted = {k for k in ("weight", "bias") if features is not None and options.get(k, True)}
    assert {k for k, _ in layer.named_parameters()} == wanted
    x, r = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    call = {k: v for k, v in options.items() if k not in ("weight", "bias")}
    if features is None:
        call.pop("affine", None)
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    want = evenly.normalize(x, pattern, weight=weight, bias=bias, residual=r, **call)
    torch.testing.assert_close(layer(x, residual=r), want, rtol=0, atol=0)


def test_running_statistics_are_those_of_batch_norm():
    ours = Norm("n c h w -> c", 4, running="n c h w -> c", momentum=0.3, dtype=torch.float64)
    theirs = nn.BatchNorm2d(4, momentum=0.3, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for _ in range(3):
        x = torch.randn(5, 4, 3, 2, dtype=torch.float64) * 2 + 1
        torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
    ours.eval()
    theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
    torch.testing.assert_close(ours.running_var, theirs.running_var, **CLOSE)


def test_starts_as_one_and_zero():
    layer = Norm("n c -> c", 3)
    assert torch.equal(layer.weight, torch.ones(3))
    assert torch.equal(layer.bias, torch.zeros(3))


def test_bad_settings_are_known_at_construction():
    for bad in [
        {"pattern": "n c -> d"},
        {"scale": "no"},
        {"activation": "no"},
        {"eps": -1.0},
        {"running": "n c -> c", "momentum": 2.0},
        {"running": "n c -> z"},
        {"affine": "z"},
    ]:
        with pytest.raises(ValueError):  # noqa: PT011 (the messages are those of normalize)
            Norm(**{"pattern": "n c -> c", "features": 3, **bad})


def test_features_that_do_not_fit():
    with pytest.raises(ValueError, match=r"4.*5|5.*4"):
        Norm("n c -> c", 4)(torch.randn(3, 5))


@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu"])
def test_no_norm(activation):
    act = {None: nn.Identity(), "relu": F.relu, "silu": F.silu, "gelu": F.gelu}[activation]
    x, r = torch.randn(3, 4), torch.randn(3, 4)
    layer = NoNorm(activation=activation)
    assert not layer.state_dict()
    torch.testing.assert_close(layer(x), act(x))
    torch.testing.assert_close(layer(x, residual=r), act(x + r))
    mask = torch.rand(3, 4) < 0.5
    y = layer(x.masked_fill(~mask, float("nan")), mask=mask)
    torch.testing.assert_close(y, act(x).masked_fill(~mask, 0))
    with pytest.raises(ValueError, match="residual"):
        layer(x, residual=torch.randn(2, 2))
    with pytest.raises(ValueError, match="tanh"):
        NoNorm(activation="tanh")
