"""`LayerNorm`, `RMSNorm`, `ScaleNorm`, `GroupNorm` and `Norm` against torch.nn and their own properties."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import evenly
from evenly.nn import GroupNorm, LayerNorm, RMSNorm, ScaleNorm

CLOSE = {"rtol": 0, "atol": 1e-12}


def same(ours, theirs, x, **close):
    close = close or CLOSE
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    a, b, seed = x.clone().requires_grad_(), x.clone().requires_grad_(), torch.randn_like(x)
    ya, yb = ours(a), theirs(b)
    torch.testing.assert_close(ya, yb, **close)
    mine = torch.autograd.grad(ya, [a, *ours.parameters()], seed)
    their = torch.autograd.grad(yb, [b, *theirs.parameters()], seed)
    for p, q in zip(mine, their, strict=True):
        size = max(1.0, float(q.abs().max()))
        torch.testing.assert_close(p / size, q / size, **close)


def randomize(layer):
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


@pytest.mark.parametrize("shape", [5, (5,), [5], (4, 5), (3, 4, 5), torch.Size([4, 5])], ids=str)
@pytest.mark.parametrize(("affine", "bias"), [(True, True), (True, False), (False, True)])
def test_layer_norm(shape, affine, bias):
    options = {"elementwise_affine": affine, "bias": bias, "eps": 1e-3}
    theirs = randomize(nn.LayerNorm(shape, **options).double())
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64) * 3 + 1
    same(LayerNorm(shape, **options).double(), theirs, x)
    assert list(LayerNorm(shape, **options).state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("shape", [5, (4, 5), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("eps", [None, 1e-6, 0.1])
def test_rms_norm(shape, affine, eps):
    theirs = randomize(nn.RMSNorm(shape, eps=eps, elementwise_affine=affine).double())
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64) * 3 + 1
    same(RMSNorm(shape, eps=eps, elementwise_affine=affine).double(), theirs, x)
    same(RMSNorm(shape, eps=eps, elementwise_affine=affine).double(), theirs, x * 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rms_norm_eps_none_is_the_epsilon_of_the_input_type(dtype):
    x = torch.randn(3, 5, dtype=dtype) * torch.finfo(dtype).eps ** 0.5
    theirs, ours = nn.RMSNorm(5, dtype=dtype), RMSNorm(5, dtype=dtype)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    want = x * (x.pow(2).mean(-1, keepdim=True) + torch.finfo(dtype).eps).rsqrt()
    torch.testing.assert_close(ours(x), want, rtol=1e-5, atol=1e-6)
    assert (want.pow(2).mean(-1).sqrt() - 1).abs().max() > 0.05  # the epsilon shows here


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_of_half_input_takes_the_epsilon_of_float32(dtype):
    """It accumulates in float32, and so does torch: the eps of bfloat16, 0.008, would damp small activations."""
    x = (torch.randn(4, 64) * 0.03).to(dtype)
    want = x.double() * (x.double().pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt()
    for layer in [nn.RMSNorm(64, dtype=dtype), RMSNorm(64, dtype=dtype)]:
        torch.testing.assert_close(layer(x).double(), want, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("wrong", [(3, 4), (5, 4), (), (4, 5, 1)])
@pytest.mark.parametrize("layer", [LayerNorm(5), RMSNorm(5), ScaleNorm(5), LayerNorm((4, 5))], ids=repr)
def test_wrong_trailing_shape(layer, wrong):
    with pytest.raises(ValueError, match=r"5") as caught:
        layer(torch.randn(wrong))
    assert str(tuple(wrong)) in str(caught.value) or str(list(wrong)) in str(caught.value), str(caught.value)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 5), (2, 6, 3, 4), (2, 6, 2, 3, 2)], ids=str)
def test_group_norm(shape, affine, groups):
    theirs = randomize(nn.GroupNorm(groups, 6, eps=1e-4, affine=affine).double())
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    same(GroupNorm(groups, 6, eps=1e-4, affine=affine).double(), theirs, x)
    if len(shape) == 4:
        same(
            GroupNorm(groups, 6, eps=1e-4, affine=affine).double(),
            theirs,
            x.contiguous(memory_format=torch.channels_last),
        )


def test_group_norm_bad_settings():
    with pytest.raises(ValueError, match=r"7.*3|3.*7"):
        GroupNorm(3, 7)
    with pytest.raises(ValueError, match="num_groups"):
        GroupNorm(0, 6)
    with pytest.raises(ValueError, match="eps"):
        GroupNorm(3, 6, eps=-1.0)
    for wrong in [(2, 5, 3), (6,), (2, 3, 6)]:
        with pytest.raises(ValueError, match="6"):
            GroupNorm(3, 6)(torch.randn(wrong))


def test_layer_norm_bad_settings():
    for kind in (LayerNorm, RMSNorm, ScaleNorm):
        with pytest.raises(ValueError, match="eps"):
            kind(5, eps=-1.0)
    for kind in (LayerNorm, RMSNorm):
        with pytest.raises((ValueError, TypeError)):
            kind(())
        with pytest.raises((ValueError, TypeError)):
            kind(0)


# ---- ScaleNorm: the properties of Nguyen & Salazar (2019), equation 4 ------------------------------------


@pytest.fixture
def scale_norm():
    return ScaleNorm(8, dtype=torch.float64)


def test_scale_norm_formula_and_initial_length(scale_norm):
    (g,) = scale_norm.parameters()
    assert g.numel() == 1
    torch.testing.assert_close(g.detach().reshape(()), torch.tensor(8.0).double().sqrt())
    x = torch.randn(3, 5, 8, dtype=torch.float64) * 4
    want = g.reshape(()) * x / x.norm(dim=-1, keepdim=True).clamp_min(1e-5)
    torch.testing.assert_close(scale_norm(x), want, **CLOSE)
    torch.testing.assert_close(scale_norm(x).norm(dim=-1), g.detach().abs().expand(3, 5).reshape(3, 5), **CLOSE)


def test_scale_norm_symmetries(scale_norm):
    x = torch.randn(4, 8, dtype=torch.float64)
    y = scale_norm(x)
    torch.testing.assert_close(scale_norm(x * 7.5), y, **CLOSE)
    torch.testing.assert_close(scale_norm(-x), -y, **CLOSE)
    q, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    torch.testing.assert_close(scale_norm(x @ q.T), y @ q.T, **CLOSE)


def test_scale_norm_is_rms_norm_and_layer_norm_of_centred_input(scale_norm):
    x = torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(scale_norm(x), F.rms_norm(x, (8,), eps=0.0), **CLOSE)
    with torch.no_grad():
        next(scale_norm.parameters()).fill_(3.0)
    gains = torch.full((8,), 3 / 8**0.5, dtype=torch.float64)
    torch.testing.assert_close(scale_norm(x), F.rms_norm(x, (8,), gains, eps=0.0), **CLOSE)
    z = x - x.mean(-1, keepdim=True)
    fresh = ScaleNorm(8, dtype=torch.float64)
    torch.testing.assert_close(fresh(z), F.layer_norm(z, (8,), eps=0.0), **CLOSE)


def test_scale_norm_gradients(scale_norm):
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    seed = torch.randn_like(x)
    (g,) = scale_norm.parameters()
    gx, gg = torch.autograd.grad(scale_norm(x), (x, g), seed)
    assert gx.abs().max() > 1e-2
    torch.testing.assert_close((gx * x).sum(-1), torch.zeros(4).double(), rtol=0, atol=1e-12)
    want = (seed * x / x.norm(dim=-1, keepdim=True)).sum()
    torch.testing.assert_close(gg.sum(), want.detach(), **CLOSE)


def test_scale_norm_clamp(scale_norm):
    x = (torch.randn(4, 8, dtype=torch.float64) * 1e-8).requires_grad_()
    y = scale_norm(x)
    torch.testing.assert_close(y, 8**0.5 * x / 1e-5, rtol=1e-12, atol=0)
    (g,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(g, torch.full_like(x, 8**0.5 / 1e-5), rtol=1e-12, atol=0)


# ---- create ----------------------------------------------------------------------------------------------

IMAGE = {
    "batch": lambda x: F.batch_norm(x, None, None, training=True),
    "sync": lambda x: F.batch_norm(x, None, None, training=True),
    "layer": lambda x: F.layer_norm(x, x.shape[1:]),
    "rms": lambda x: F.rms_norm(x, x.shape[1:], eps=1e-5),
    "instance": lambda x: F.instance_norm(x),
    "none": lambda x: x,
}


def test_available():
    names = evenly.nn.available()
    assert {"batch", "sync", "frozen", "layer", "group", "instance", "rms", "scale", "none"} <= set(names)
    for name in names:
        layer = evenly.nn.create(name, 8, dtype=torch.float64)
        y = layer(torch.randn(4, 8, 3, 3, dtype=torch.float64))
        assert y.shape == (4, 8, 3, 3)
        assert y.dtype == torch.float64


@pytest.mark.parametrize("name", IMAGE)
def test_create_for_images(name):
    x = torch.randn(4, 8, 3, 5, dtype=torch.float64) * 2 + 1
    layer = evenly.nn.create(name, 8, eps=1e-5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), IMAGE[name](x), rtol=1e-10, atol=1e-10)
    if name in ("layer", "rms", "batch"):
        assert layer.weight.shape == (8,)  # per channel
        with torch.no_grad():
            layer.weight.copy_(torch.arange(8.0))
        want = IMAGE[name](x) * torch.arange(8.0).double().reshape(8, 1, 1)
        torch.testing.assert_close(layer(x), want, rtol=1e-10, atol=1e-10)


def test_create_group():
    x = torch.randn(4, 8, 3, 5, dtype=torch.float64)
    layer = evenly.nn.create("group", 8, num_groups=2, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.group_norm(x, 2), rtol=1e-10, atol=1e-10)
    for channels in [1, 2, 3, 7, 32, 48, 64, 100]:
        evenly.nn.create("group", channels)(torch.randn(2, channels, 3, 3))
    with pytest.raises(ValueError, match=r"3.*8|8.*3"):
        evenly.nn.create("group", 8, num_groups=3)


def test_create_for_tokens():
    x = torch.randn(4, 7, 8, dtype=torch.float64) * 2 + 1
    kw = {"channel_dim": -1, "dtype": torch.float64}
    torch.testing.assert_close(evenly.nn.create("layer", 8, **kw)(x), F.layer_norm(x, (8,)), **CLOSE)
    torch.testing.assert_close(evenly.nn.create("rms", 8, eps=1e-5, **kw)(x), F.rms_norm(x, (8,), eps=1e-5), **CLOSE)
    torch.testing.assert_close(
        evenly.nn.create("scale", 8, **kw)(x), 8**0.5 * F.normalize(x, dim=-1), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(
        evenly.nn.create("batch", 8, **kw)(x),
        F.batch_norm(x.movedim(-1, 1), None, None, training=True).movedim(1, -1),
        **CLOSE,
    )


def test_create_vectors():
    x = torch.randn(6, 8, dtype=torch.float64)
    for name, want in [("layer", F.layer_norm(x, (8,))), ("batch", F.batch_norm(x, None, None, training=True))]:
        torch.testing.assert_close(evenly.nn.create(name, 8, dtype=torch.float64)(x), want, **CLOSE)


def test_create_unknown_name():
    with pytest.raises(ValueError, match="batch") as caught:
        evenly.nn.create("bach", 8)
    assert "bach" in str(caught.value)
