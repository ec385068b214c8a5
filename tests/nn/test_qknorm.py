"""Query-key normalization against its equations, in float64, and the properties of attention on cosines."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from evenly.nn import QKNormAttention, qknorm_attention, qknorm_init_scale


def oracle(x_q, x_k, x_v, layer, allowed=None):
    """The paper's attention, head by head and query by query, from the layer's parameters."""
    w, b = layer.in_proj_weight, layer.in_proj_bias
    e, d = layer.embed_dim, layer.head_dim
    b = torch.zeros(3 * e, dtype=w.dtype) if b is None else b
    q, k, v = x_q @ w[:e].T + b[:e], x_k @ w[e : 2 * e].T + b[e : 2 * e], x_v @ w[2 * e :].T + b[2 * e :]
    g = layer.scale.expand(layer.num_heads)
    samples = []
    for n in range(len(q)):
        rows = []
        for i in range(q.shape[1]):
            heads = []
            for h in range(layer.num_heads):
                part = slice(h * d, (h + 1) * d)
                a, c = q[n, i, part], k[n, :, part]
                logits = g[h] * (c @ a) / (c.pow(2).sum(1).sqrt() * a.pow(2).sum().sqrt())
                keep = torch.ones(len(c), dtype=torch.bool) if allowed is None else allowed[n, i]
                weights = torch.where(keep, (logits - logits[keep].max()).exp(), 0.0)
                heads.append((weights / weights.sum()) @ v[n, :, part])
            rows.append(torch.cat(heads))
        samples.append(torch.stack(rows))
    bias = 0 if layer.out_proj.bias is None else layer.out_proj.bias
    return torch.stack(samples) @ layer.out_proj.weight.T + bias


def make(**options):
    layer = QKNormAttention(8, 2, **({"init_scale": 3.0} | options), dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("case", ["self", "causal", "padding", "causal and padding", "cross", "three inputs"])
def test_oracle_with_gradients(per_head, case):
    layer = make(per_head_scale=per_head, bias=case != "cross")
    x = draw(2, 5, 8).requires_grad_()
    y = draw(2, 4, 8) if case in ("cross", "three inputs") else None
    z = draw(2, 4, 8) if case == "three inputs" else None
    allowed, options = None, {}
    if "causal" in case:
        allowed, options = torch.ones(2, 5, 5, dtype=torch.bool).tril(), {"is_causal": True}
    if "padding" in case:
        real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
        allowed = real[:, None, :].expand(2, 5, 5) & (True if allowed is None else allowed)
        options["attn_mask"] = real[:, None, None, :]
    key = x if y is None else y
    want = oracle(x, key, key if z is None else z, layer, allowed)
    leaves = [x, *layer.parameters()]
    t = torch.randn_like(want)
    expected = torch.autograd.grad((want * t).sum(), leaves)
    for need_weights in (False, True):
        got = layer(x, y, z, need_weights=need_weights, **options)
        got, weights = got if need_weights else (got, None)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        for a, b in zip(torch.autograd.grad((got * t).sum(), leaves), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert weights.shape == (2, 2, 5, key.shape[1])
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 5, dtype=torch.float64))


def test_equals_torch_attention_on_unit_vectors():
    q, k, v, g = draw(2, 3, 5, 4), draw(2, 3, 6, 4), draw(2, 3, 6, 7), torch.tensor(2.5, dtype=torch.float64)
    want = functional.scaled_dot_product_attention(
        g * functional.normalize(q, dim=-1), functional.normalize(k, dim=-1), v, scale=1.0
    )
    torch.testing.assert_close(qknorm_attention(q, k, v, g), want)
    torch.testing.assert_close(qknorm_attention(q, k, v, 2.5), want)


def test_invariances():
    q, k, v = draw(2, 3, 5, 4), draw(2, 3, 6, 4), draw(2, 3, 6, 4)
    want = qknorm_attention(q, k, v, 4.0)
    scaled = qknorm_attention(q * draw(2, 3, 5, 1).exp(), k * draw(2, 3, 6, 1).exp(), v, 4.0)
    torch.testing.assert_close(scaled, want)
    rotation, _ = torch.linalg.qr(draw(4, 4))
    torch.testing.assert_close(qknorm_attention(q @ rotation, k @ rotation, v, 4.0), want)
    assert not torch.allclose(qknorm_attention(q, k, v, 2.0), want)


def test_extreme_scales_of_the_softmax():
    q, k, v = draw(1, 1, 5, 4), draw(1, 1, 6, 4), draw(1, 1, 6, 3)
    torch.testing.assert_close(qknorm_attention(q, k, v, 0.0), v.mean(-2, keepdim=True).expand(1, 1, 5, 3))
    cosines = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).mT
    torch.testing.assert_close(qknorm_attention(q, k, v, 1e6)[0, 0], v[0, 0, cosines.argmax(-1)[0, 0]])


def test_weights_are_bounded_by_the_scale():
    g, t = 2.0, 7
    layer = make(init_scale=g)
    with torch.no_grad():
        layer.scale.fill_(g)
        layer.in_proj_weight.mul_(100)
    _, weights = layer(draw(3, t, 8), need_weights=True)
    low, high = 1 / (1 + (t - 1) * math.exp(2 * g)), 1 / (1 + (t - 1) * math.exp(-2 * g))
    assert low <= weights.min() and weights.max() <= high


def test_gradient_is_orthogonal_to_each_vector():
    q, k = draw(2, 3, 5, 4).requires_grad_(), draw(2, 3, 6, 4).requires_grad_()
    qknorm_attention(q, k, draw(2, 3, 6, 4), 3.0).square().sum().backward()
    for x in (q, k):
        assert x.grad.abs().max() > 1e-3
        assert (x.grad * x).sum(-1).abs().max() < 1e-12


def test_gradient_of_the_scale():
    # d loss / d g is the sum of d loss / d logit times cosine.
    q, k, v = draw(2, 3, 5, 4), draw(2, 3, 6, 4), draw(2, 3, 6, 4)
    g = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    t = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    (qknorm_attention(q, k, v, g) * t).sum().backward()
    cosines = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).mT
    logits = (3.0 * cosines).requires_grad_()
    ((logits.softmax(-1) @ v) * t).sum().backward()
    torch.testing.assert_close(g.grad, (logits.grad * cosines).sum())


def test_grouped_queries_equal_repeated_keys():
    q, k, v = draw(2, 6, 5, 4), draw(2, 2, 5, 4), draw(2, 2, 5, 4)
    want = qknorm_attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), 3.0, is_causal=True)
    torch.testing.assert_close(qknorm_attention(q, k, v, 3.0, is_causal=True), want)


def test_a_query_without_keys_gets_zero_and_no_nan_gradient():
    layer = make(bias=False)
    x = draw(1, 3, 8).requires_grad_()
    mask = torch.tensor([[[True, True, True], [False, False, False], [True, False, False]]])
    for need_weights in (False, True):
        y = layer(x, attn_mask=mask, need_weights=need_weights)
        y = y[0] if need_weights else y
        assert (y[0, 1] == 0).all() and (y[0, 0] != 0).any()
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.isfinite().all()


def test_additive_mask_with_and_without_causal():
    q, k, v = draw(2, 3, 5, 4), draw(2, 3, 5, 4), draw(2, 3, 5, 4)
    keep = torch.tensor([True, True, False, True, True])
    added = torch.zeros(5, dtype=torch.float64).masked_fill(~keep, -math.inf)
    for causal in (False, True):
        torch.testing.assert_close(
            qknorm_attention(q, k, v, 3.0, added, is_causal=causal),
            qknorm_attention(q, k, v, 3.0, keep, is_causal=causal),
        )


def test_zero_vectors():
    q = torch.zeros(1, 1, 2, 4, requires_grad=True)
    y = qknorm_attention(q, torch.randn(1, 1, 3, 4), torch.tensor([1.0, 2.0, 6.0]).view(1, 1, 3, 1), 5.0)
    torch.testing.assert_close(y, torch.full((1, 1, 2, 1), 3.0))
    y.sum().backward()
    assert q.grad.isfinite().all()


def test_initial_scale():
    assert QKNormAttention(8, 2, seq_len_p975=72).scale.item() == pytest.approx(12.3197, abs=1e-4)
    lengths = list(range(1, 1001))
    want = 1 + 0.975 * 999  # linear interpolation between order statistics
    assert qknorm_init_scale(lengths) == pytest.approx(math.log2(want * want - want), abs=1e-12)
    assert qknorm_init_scale(torch.tensor(lengths), q=0.5) == pytest.approx(math.log2(500.5 * 499.5), abs=1e-12)
    layer = QKNormAttention(512, 8, init_scale=1.0)
    assert layer.in_proj_weight.std().item() == pytest.approx(math.sqrt(2 / (5 * 512)), rel=0.02)
    assert (layer.in_proj_bias == 0).all() and (layer.out_proj.bias == 0).all()


def test_dropout_only_in_training():
    layer = make(dropout=0.5)
    x = draw(2, 6, 8)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    _, weights = layer.train()(x, need_weights=True)
    assert (weights == 0).any()


def test_loads_the_parameters_of_torchs_attention():
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    layer = QKNormAttention(8, 2, init_scale=1.0)
    missing, unexpected = layer.load_state_dict(theirs.state_dict(), strict=False)
    assert (missing, unexpected) == (["scale"], [])
    x = torch.randn(2, 5, 8)
    q, k, v = (x @ w.T + b for w, b in zip(theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3), strict=True))
    q, k, v = (t.view(2, 5, 2, 4).transpose(1, 2) for t in (q, k, v))
    want = theirs.out_proj(qknorm_attention(q, k, v, 1.0).transpose(1, 2).reshape(2, 5, 8))
    torch.testing.assert_close(layer(x), want)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((10, 4), {"init_scale": 1.0}, "embed_dim=10 is not a multiple of num_heads=4"),
        ((8, 2), {}, "exactly one of init_scale and seq_len_p975, got None and None"),
        ((8, 2), {"init_scale": 1.0, "seq_len_p975": 9}, "exactly one"),
        ((8, 2), {"init_scale": 0.0}, "init_scale=0.0 must be positive"),
        ((8, 2), {"init_scale": float("nan")}, "must be positive and finite"),
        ((8, 2), {"seq_len_p975": 1}, "expected at least 2"),
        ((8, 2), {"init_scale": 1.0, "eps": 0.0}, "eps=0.0 must be positive"),
        ((8, 2), {"init_scale": 1.0, "dropout": 1.0}, "dropout=1.0 is outside"),
        ((0, 2), {"init_scale": 1.0}, "embed_dim=0"),
    ],
)
def test_refused_at_construction(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        QKNormAttention(*arguments, **options)


def test_refused_at_the_call():
    q = torch.randn(2, 3, 5, 4)
    for k, v, mask, scale, message in (
        (torch.randn(2, 3, 5, 6), q, None, 1.0, "same head dimension"),
        (torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4), None, 1.0, "must divide"),
        (q, torch.randn(2, 3, 6, 4), None, 1.0, "must agree"),
        (q, q, torch.ones(4, 5, dtype=torch.bool), 1.0, "does not broadcast"),
        (q, q, torch.ones(7, 2, 3, 5, 5, dtype=torch.bool), 1.0, "does not broadcast"),
        (q, q, torch.ones(5, 5, dtype=torch.long), 1.0, "expected bool"),
        (q, q, None, torch.ones(2), "one a head"),
    ):
        with pytest.raises(ValueError, match=message):
            qknorm_attention(q, k, v, scale, mask)
    with pytest.raises(ValueError, match=r"query of shape \(batch, length, 8\)"):
        QKNormAttention(8, 2, init_scale=1.0)(torch.randn(2, 5, 7))
    for lengths, options, message in (([], {}, "no lengths"), ([5], {"q": 2}, "outside"), ([1, 1], {}, "at least 2")):
        with pytest.raises(ValueError, match=message):
            qknorm_init_scale(lengths, **options)
