"""The attention block: every placement and normalization against plain equations in float64, masks, caches, groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import evenly.nn
from evenly.models import Attention, AttentionBlock, FeedForward, Residual, Rotary, TransformerBlock


def turn(x, first=0):
    """Rotary positions by complex numbers."""
    d = x.shape[-1]
    rates = torch.tensor([10000.0 ** (-2 * i / d) for i in range(d // 2)], dtype=x.dtype)
    angles = torch.arange(first, first + x.shape[-2], dtype=x.dtype)[:, None] * rates
    pairs = torch.complex(x[..., 0::2], x[..., 1::2]) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(pairs).flatten(-2)


def plain_attention(layer, x, mask=None):
    """The equations, for one layer, with explicit heads and logits."""
    b, t, _ = x.shape
    h, g, d = layer.num_heads, layer.kv_groups, layer.head_dim
    q, k, v = (layer.qkv.weight @ x.mT).mT.split([h * d, g * d, g * d], -1)
    q = q.reshape(b, t, h, d).transpose(1, 2)
    k = k.reshape(b, t, g, d).transpose(1, 2).repeat_interleave(h // g, 1)
    v = v.reshape(b, t, g, d).transpose(1, 2).repeat_interleave(h // g, 1)
    factor = 1 / math.sqrt(d)
    if layer.qk_norm == "l2":
        q, k, factor = (z / z.pow(2).sum(-1, keepdim=True).sqrt() for z in (q, k)), None, layer.scale
        q, k = q
    elif layer.qk_norm == "rms":
        q = q / (q.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * layer.q_norm.weight
        k = k / (k.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * layer.k_norm.weight
    elif layer.qk_norm == "layer":
        q = nn.functional.layer_norm(q, (d,), layer.q_norm.weight, layer.q_norm.bias)
        k = nn.functional.layer_norm(k, (d,), layer.k_norm.weight, layer.k_norm.bias)
    if layer.rotary is not None:
        q, k = turn(q), turn(k)
    logits = factor * q @ k.mT
    if layer.causal:
        logits = logits + torch.full((t, t), -math.inf, dtype=x.dtype).triu(1)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None, :], -math.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).reshape(b, t, h * d) @ layer.out.weight.T


def randomize(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.double()


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


PADDING = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])


@pytest.mark.parametrize("qk_norm", [None, "l2", "rms", "layer"])
@pytest.mark.parametrize("kv_groups", [None, 2, 1])
@pytest.mark.parametrize(("causal", "padded", "rope"), [(True, False, 1e4), (True, True, 1e4), (False, True, None)])
def test_attention_against_the_equations(qk_norm, kv_groups, causal, padded, rope):
    layer = Attention(
        16,
        4,
        kv_groups=kv_groups,
        qk_norm=qk_norm,
        qk_scale=5.0 if qk_norm == "l2" else None,
        causal=causal,
        rope_base=rope,
    )
    randomize(layer)
    x = draw(2, 6, 16).requires_grad_()
    mask = PADDING if padded else None
    want = plain_attention(layer, x, mask)
    got = layer(x, mask)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    t = torch.randn_like(want)
    leaves = [x, *layer.parameters()]
    pairs = zip(
        torch.autograd.grad((got * t).sum(), leaves), torch.autograd.grad((want * t).sum(), leaves), strict=True
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("norm", ["layer", "rms", "scale", "none", "group"])
def test_placements(norm):
    for placement in ("pre", "post", "sandwich"):
        block = randomize(Residual(nn.Linear(8, 8), 8, norm, placement))
        f, inner = block.branch, block.norm.norm
        x = draw(2, 5, 8)
        if placement == "pre":
            want = x + f(inner(x))
        elif placement == "post":
            want = inner(x + f(x))
        else:
            want = x + block.norm_out.norm(f(inner(x)))
        torch.testing.assert_close(block(x), want)
    assert not torch.allclose(want, x)


def test_norm_may_be_a_callable_or_any_module():
    block = AttentionBlock(8, 2, norm=nn.LayerNorm, qk_norm=nn.RMSNorm, placement="sandwich").double()
    x = draw(2, 5, 8)
    inner = block.norm.norm(x)
    torch.testing.assert_close(block(x), x + block.norm_out.norm(block.branch(inner)))
    assert isinstance(block.branch.q_norm, nn.RMSNorm)
    assert block(x, torch.ones(2, 5, dtype=torch.bool)).shape == x.shape


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_what_stands_at_padding_changes_nothing(placement):
    block = randomize(TransformerBlock(16, 4, norm="layer", placement=placement, causal=False, qk_norm="rms"))
    x = draw(2, 6, 16)
    other = torch.where(PADDING[..., None], x, draw(2, 6, 16))
    a, b = block(x, PADDING), block(other, PADDING)
    torch.testing.assert_close(a[PADDING], b[PADDING])
    # Nor does the length of the padding.
    torch.testing.assert_close(block(x[:, :4], PADDING[:, :4])[1], a[1, :4])


def test_statistics_over_positions_leave_padding_out():
    block = Residual(nn.Identity(), 4, "batch", "pre").double()
    x = draw(2, 6, 4)
    y = block(x, PADDING)
    real = x[PADDING]
    want = real + (real - real.mean(0)) / (real.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(y[PADDING], want)
    torch.testing.assert_close(y[~PADDING], x[~PADDING])


@pytest.mark.parametrize("qk_norm", [None, "l2", "rms"])
def test_a_cache_gives_what_the_whole_sequence_gives(qk_norm):
    block = randomize(TransformerBlock(16, 4, kv_groups=2, qk_norm=qk_norm, qk_scale=4.0 if qk_norm == "l2" else None))
    x = draw(2, 6, 16)
    want = block(x)
    cache, parts = None, []
    for part in x.split([3, 1, 2], 1):
        y, cache = block.step(part, None, cache)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), want)
    assert cache.k.shape == (2, 2, 6, 4)


def test_a_cache_with_padding():
    block = randomize(TransformerBlock(16, 4))
    x = draw(2, 6, 16)
    real = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])  # padded on the left
    want = block(x, real)
    first, cache = block.step(x[:, :4], real[:, :4])
    second, _ = block.step(x[:, 4:], real, cache)
    torch.testing.assert_close(torch.cat((first, second), 1)[real], want[real])


def test_rotary_is_a_rotation_and_scores_depend_on_distances():
    rotary = Rotary(8)
    x, y = draw(1, 1, 1, 8).expand(1, 1, 20, 8), draw(1, 1, 1, 8).expand(1, 1, 20, 8)
    torch.testing.assert_close(rotary(x), turn(x))
    torch.testing.assert_close(rotary(x, 7), turn(x, 7))
    torch.testing.assert_close(rotary(x).norm(dim=-1), x.norm(dim=-1))
    scores = (rotary(x) @ rotary(y).mT)[0, 0]
    for distance in (-5, 0, 3):
        line = scores.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line))
    assert (scores[0] - scores[0, 0]).abs().max() > 1e-2


def test_the_released_table_is_no_rotation():
    x = draw(3, 5, 8)
    y = Rotary(8, kind="released")(x)
    rates = [10000.0 ** (-2 * i / 8) for i in range(4)]
    for p in range(5):
        table = [f(p * rate) for rate in rates for f in (math.sin, math.cos)]
        for i in range(4):
            torch.testing.assert_close(y[:, p, 2 * i], -x[:, p, 2 * i + 1] * table[4 + i])
            torch.testing.assert_close(y[:, p, 2 * i + 1], x[:, p, 2 * i] * table[i])
    assert (y.norm(dim=-1) / x.norm(dim=-1)).mean() < 0.95


def test_half_precision_positions_are_turned_in_float32():
    x = torch.randn(1, 1, 300, 8)
    far = Rotary(8)(x.bfloat16(), 1000)
    assert far.dtype == torch.bfloat16
    torch.testing.assert_close(far.float(), Rotary(8)(x.bfloat16().float(), 1000), rtol=0.01, atol=0.02)


def test_feed_forward():
    x = draw(2, 3, 8)
    for activation, f in (("gelu", nn.functional.gelu), ("relu", torch.relu)):
        layer = FeedForward(8, 12, activation=activation).double()
        torch.testing.assert_close(layer(x), f(x @ layer.up.weight.T) @ layer.out.weight.T)
    layer = FeedForward(8, 12, activation="swiglu").double()
    u, v = (x @ layer.up.weight.T).chunk(2, -1)
    torch.testing.assert_close(layer(x), (u * v * torch.sigmoid(v)) @ layer.out.weight.T)


def test_dropout_only_in_training():
    block = TransformerBlock(8, 2, dropout=0.5)
    x = torch.randn(2, 5, 8)
    assert not torch.equal(block(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Attention(10, 4), "dim=10 is not a multiple of num_heads=4"),
        (lambda: Attention(8, 4, kv_groups=3), "num_heads=4 is not a multiple of kv_groups=3"),
        (lambda: Attention(8, 0), "must all be positive"),
        (lambda: Attention(8, 2, qk_norm="l1"), "qk_norm is 'l1', expected None, 'l2', 'rms', 'layer'"),
        (lambda: Attention(8, 2, qk_norm="l2"), "give qk_scale"),
        (lambda: Attention(8, 2, qk_norm="l2", qk_scale=-1.0), "qk_scale=-1.0 must be positive"),
        (lambda: Attention(6, 2), "even number of features"),
        (lambda: Attention(8, 2, dropout=1.0), "dropout=1.0 is outside"),
        (lambda: Attention(8, 2)(torch.randn(2, 8)), r"\(batch, length, 8\)"),
        (lambda: Attention(8, 2)(torch.randn(2, 5, 8), torch.ones(2, 4, dtype=torch.bool)), r"of shape \(2, 5\)"),
        (lambda: Attention(8, 2)(torch.randn(2, 5, 8), torch.ones(2, 5)), "torch.float32 of shape"),
        (lambda: Residual(nn.Identity(), 8, placement="after"), "placement is 'after', expected one of pre, post"),
        (lambda: Residual(nn.Identity(), 8, "layr"), "unknown normalization 'layr'"),
        (lambda: Residual(nn.Identity(), 8, dropout=2.0), "dropout=2.0"),
        (lambda: FeedForward(8, 8, activation="tanh"), "activation is 'tanh'"),
        (lambda: TransformerBlock(8, 2, mlp_ratio=0.01), "leaves no hidden feature"),
        (lambda: Rotary(8, kind="no"), "rope is 'no'"),
        (lambda: Rotary(8, base=0.0), "expected a positive number"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_only_attention_has_a_cache():
    with pytest.raises(TypeError, match="only attention has a cache"):
        Residual(nn.Identity(), 8).step(torch.randn(1, 2, 8))


def test_every_layer_by_name_that_takes_channels_last():
    x = torch.randn(2, 5, 8)
    for name in evenly.nn.available():
        if name in ("frozen", "sync"):
            continue
        try:
            block = AttentionBlock(8, 2, norm=name)
        except ValueError as error:
            assert "axis 1" in str(error)  # noqa: PT017 - some layers are for images only
            continue
        assert block(x).isfinite().all(), name
