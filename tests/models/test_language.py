"""The language models: GPT by its parts, nGPT against its equations and properties in float64, generation."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from evenly.models import NGPT, NGPTConfig, gpt
from evenly.nn import ProjectedOptimizer


def small(rope="true", **options):
    torch.manual_seed(0)
    config = NGPTConfig(
        **({"vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 6} | options), rope=rope
    )
    model = NGPT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.mul_(1 + 0.5 * torch.rand_like(parameter))
                parameter[::3].neg_() if "alpha" in name else None
    return model.double().project_()


def unit(z, dim=-1):
    return z / z.pow(2).sum(dim, keepdim=True).sqrt()


def turn(x):
    d = x.shape[-1]
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * 10000.0 ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
    pairs = torch.complex(x[..., 0::2], x[..., 1::2]) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(pairs).flatten(-2)


def turn_released(x):
    d = x.shape[-1]
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * 10000.0 ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
    table = torch.zeros(x.shape[-2], d, dtype=x.dtype)
    table[:, 0::2], table[:, 1::2] = angles.sin(), angles.cos()
    out = torch.empty_like(x)
    out[..., 0::2] = -x[..., 1::2] * table[:, d // 2 :]
    out[..., 1::2] = x[..., 0::2] * table[:, : d // 2]
    return out


def ngpt_oracle(model, idx):
    """The table and equations of the paper, with the released code's factor on both u and v."""
    c, p = model.config, dict(model.named_parameters())
    d, dk, base = c.n_embd, c.n_embd // c.n_head, 1 / math.sqrt(c.n_embd)
    h = p["embedding.weight"][idx]
    states = [h]
    for i in range(c.n_layer):
        w = {name.removeprefix(f"blocks.{i}."): value for name, value in p.items() if name.startswith(f"blocks.{i}.")}
        alpha_a = w["alpha_attention.weight"] * (c.alpha_init / base)
        alpha_m = w["alpha_mlp.weight"] * (c.alpha_init / base)
        s_qk = (w["s_qk.weight"] / base).view(c.n_head, 1, dk)
        q, k, v = (
            (h @ w[f"{name}.weight"].T).unflatten(-1, (c.n_head, dk)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        f = turn if c.rope == "true" else turn_released
        q, k = s_qk * unit(f(q)), s_qk * unit(f(k))
        logits = math.sqrt(dk) * q @ k.mT
        logits = logits + torch.full(logits.shape[-2:], -math.inf, dtype=h.dtype).triu(1)
        y = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        h = unit(h + alpha_a.abs() * (unit(y @ w["attention_out.weight"].T) - h))
        states.append(h)
        uv = w["s_uv.weight"] * math.sqrt(d) * (h @ w["up.weight"].T)
        u, v = uv.chunk(2, -1)
        x = u * v * torch.sigmoid(v)
        h = unit(h + alpha_m.abs() * (unit(x @ w["down.weight"].T) - h))
        states.append(h)
    return p["s_z.weight"] / base * (h @ p["head.weight"].T), states


@pytest.mark.parametrize("rope", ["true", "released"])
def test_ngpt_against_its_equations(rope):
    model = small(rope)
    idx, targets = torch.randint(11, (3, 6)), torch.randint(11, (3, 6))
    want, _ = ngpt_oracle(model, idx)
    got, loss = model(idx, targets)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    expected = functional.nll_loss(want.log_softmax(-1).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected)
    names, leaves = zip(*model.named_parameters(), strict=True)
    pairs = zip(names, torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True)
    for name, a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
        assert a.abs().max() > 0


def test_hidden_states_stay_on_the_sphere():
    model = small()
    idx = torch.randint(11, (3, 6))
    h = model.embedding(idx)
    for block in model.blocks:
        h, _ = block(h)
        torch.testing.assert_close(h.norm(dim=-1), torch.ones(3, 6, dtype=torch.float64))
    _, states = ngpt_oracle(model, idx)
    torch.testing.assert_close(h, states[-1])


def vectors(model):
    yield model.embedding.weight, 1
    yield model.head.weight, 1
    for block in model.blocks:
        for layer in (block.query, block.key, block.value, block.up):
            yield layer.weight, 1
        for layer in (block.attention_out, block.down):
            yield layer.weight, 0


def test_projection():
    model = small()
    want = model(torch.arange(6)[None])[0]
    with torch.no_grad():
        for weight, dim in vectors(model):
            weight.mul_(torch.rand(weight.sum(dim, keepdim=True).shape, dtype=torch.float64) + 0.5)
    assert not torch.allclose(model(torch.arange(6)[None])[0], want)
    assert model.project_() is model
    for weight, dim in vectors(model):
        torch.testing.assert_close(weight.norm(dim=dim), torch.ones_like(weight.norm(dim=dim)))
    torch.testing.assert_close(model(torch.arange(6)[None])[0], want)
    assert len(list(vectors(model))) == sum(parameter.ndim == 2 for parameter in model.parameters())


def test_no_step_gives_the_embedding_and_a_whole_step_the_branch():
    model = small()
    idx = torch.randint(11, (3, 6))
    for block in model.blocks:
        for alpha in (block.alpha_attention, block.alpha_mlp):
            torch.nn.init.zeros_(alpha.weight)
    e = model.embedding.weight[idx]
    torch.testing.assert_close(model(idx)[0], model.s_z() * (e @ model.head.weight.T))
    block = model.blocks[0]
    torch.nn.init.constant_(block.alpha_attention.weight, block.alpha_attention.scale / block.alpha_attention.init)
    torch.testing.assert_close(block(e)[0], unit(block.attend(e, None, None)[0]))


def test_scales_at_the_start_and_bounded_logits():
    config = NGPTConfig(11, 2, 2, 8, 6, alpha_init=0.3)
    model = NGPT(config)
    block = model.blocks[0]
    for parameter, value, stored in (
        (block.alpha_attention, 0.3, 8**-0.5),
        (block.alpha_mlp, 0.3, 8**-0.5),
        (block.s_qk, 1.0, 8**-0.5),
        (block.s_uv, 1.0, 1.0),
        (model.s_z, 1.0, 8**-0.5),
    ):
        torch.testing.assert_close(parameter(), torch.full_like(parameter.weight, value))
        torch.testing.assert_close(parameter.weight.detach(), torch.full_like(parameter.weight, stored))
    assert block.s_uv.weight.shape == (64,)
    model = small()
    logits = model(torch.randint(11, (3, 6)))[0]
    assert (logits.abs() <= model.s_z().abs() * (1 + 1e-12)).all()


def test_a_factor_on_u_changes_nothing_and_one_on_v_does():
    model = small()
    idx = torch.randint(11, (3, 6))
    want = model(idx)[0]
    with torch.no_grad():
        model.blocks[0].s_uv.weight[:32].mul_(3)
    torch.testing.assert_close(model(idx)[0], want)
    with torch.no_grad():
        model.blocks[0].s_uv.weight[32:].mul_(3)
    assert not torch.allclose(model(idx)[0], want)


def models():
    return [small(), gpt(11, dim=8, depth=2, num_heads=2, block_size=6, qk_norm="l2", norm="rms").double()]


@pytest.mark.parametrize("index", [0, 1])
def test_causal(index):
    model = models()[index]
    idx = torch.randint(11, (2, 6))
    changed = idx.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    a, b = model(idx)[0], model(changed)[0]
    assert torch.equal(a[:, :4], b[:, :4])
    assert not torch.allclose(a[:, 4:], b[:, 4:])


@pytest.mark.parametrize("index", [0, 1])
def test_padding_and_ignored_targets(index):
    model = models()[index]
    idx, targets = torch.randint(11, (2, 6)), torch.randint(11, (2, 6))
    real = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    targets[~real] = -100
    _, loss = model(idx, targets, real)
    _, again = model(torch.where(real, idx, (idx + 3) % 11), targets, real)
    torch.testing.assert_close(loss, again)
    _, without = model(idx, targets)
    assert not torch.allclose(loss, without)


@pytest.mark.parametrize("index", [0, 1])
def test_generation_continues_as_the_whole_sequence_says(index):
    model = models()[index].train()
    start = torch.randint(11, (2, 3))
    out = model.generate(start, 7, temperature=0)  # past the block size of 6
    assert out.shape == (2, 10)
    assert torch.equal(out[:, :3], start)
    assert model.training
    for length in range(3, 10):
        logits = model(out[:, max(0, length - 6) : length])[0][:, -1]
        assert torch.equal(out[:, length], logits.argmax(-1))
    one, two = (model.generate(start, 5, top_k=3, generator=torch.Generator().manual_seed(s)) for s in (1, 1))
    assert torch.equal(one, two)
    logits = model(one[:, :3])[0][:, -1]
    assert (logits.gather(1, one[:, 3:4]) >= logits.topk(3).values[:, -1:]).all()
    assert torch.equal(model.generate(start, 0), start)


def test_training_with_the_projected_optimizer_learns():
    torch.manual_seed(0)
    model = NGPT(NGPTConfig(11, 2, 2, 16, 8))
    optimizer = ProjectedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0), model)
    idx = (torch.arange(9) * 3 % 11).expand(4, 9)
    first = None
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        first = loss.item() if first is None else first
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 * first
    for weight, dim in vectors(model):
        torch.testing.assert_close(weight.norm(dim=dim), torch.ones_like(weight.norm(dim=dim)))


def test_a_loaded_checkpoint_is_projected():
    model, other = small(), small()
    state = {name: value * (3 if value.ndim == 2 else 1) for name, value in model.state_dict().items()}
    other.load_state_dict(state)
    idx = torch.randint(11, (2, 6))
    torch.testing.assert_close(other(idx)[0], model(idx)[0])


def test_a_released_checkpoint():
    model = small("released")
    names = {
        "embedding.weight": "transformer.wte.weight",
        "head.weight": "lm_head.weight",
        "s_z.weight": "sz",
        "attention_out.weight": "att_c_proj.weight",
        "up.weight": "c_fc.weight",
        "down.weight": "mlp_c_proj.weight",
        "alpha_attention.weight": "attn_alpha",
        "alpha_mlp.weight": "mlp_alpha",
        "s_qk.weight": "sqk",
        "s_uv.weight": "suv",
    }
    state = {}
    for name, value in model.state_dict().items():
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            state[f"_orig_mod.transformer.h.{number}.{names.get(rest, rest)}"] = value
        else:
            state[f"_orig_mod.{names[name]}"] = value
    other = NGPT(model.config).double().load_released_(state)
    idx = torch.randint(11, (2, 6))
    torch.testing.assert_close(other(idx)[0], model(idx)[0])
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_released_({})


def test_gpt_is_its_parts():
    for placement in ("pre", "post", "sandwich"):
        model = gpt(11, dim=8, depth=2, num_heads=2, block_size=6, placement=placement, bias=True)
        idx = torch.randint(11, (2, 6))
        h = model.embedding(idx)
        for block in model.blocks:
            h = block(h)
        assert (model.final_norm is None) == (placement == "post")
        h = h if model.final_norm is None else model.final_norm(h)
        torch.testing.assert_close(model(idx)[0], h @ model.head.weight.T)


def test_gpt_starts_as_gpt2():
    torch.manual_seed(0)
    model = gpt(300, dim=128, depth=8, num_heads=4, block_size=32, qk_norm="l2", tie=True, bias=True)
    assert model.head.weight is model.embedding.weight
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.03)
    block = model.blocks[0]
    assert block.attention.branch.qkv.weight.std().item() == pytest.approx(0.02, rel=0.03)
    for branch in (block.attention.branch, block.mlp.branch):
        assert branch.out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)
        assert (branch.out.bias == 0).all()
    assert block.attention.branch.scale.item() == pytest.approx(math.log2(32 * 31), rel=1e-6)
    loss = model(torch.randint(300, (4, 32)), torch.randint(300, (4, 32)))[1]
    assert loss.item() == pytest.approx(math.log(300), rel=0.02)


def test_half_precision_and_autocast():
    for model in (NGPT(NGPTConfig(11, 2, 2, 16, 8)), gpt(11, dim=16, depth=2, num_heads=2, block_size=8, qk_norm="l2")):
        idx = torch.randint(11, (2, 8))
        want = model(idx)[0]
        with torch.autocast("cpu", torch.bfloat16):
            got, loss = model(idx, idx)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.05)
        half, loss = model.bfloat16()(idx, idx)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), want, rtol=0.1, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_embd": 9}, "n_embd=9 is not a multiple of n_head=2"),
        ({"n_embd": 6}, "odd"),
        ({"n_layer": 0}, "n_layer=0 must be positive"),
        ({"mlp_ratio": 0.0}, "leaves no hidden feature"),
        ({"base_scale": 0.0}, "base_scale=0.0"),
        ({"rope": "none"}, "rope is 'none', expected one of true, released"),
    ],
)
def test_ngpt_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        NGPTConfig(**({"vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 6} | options))


@pytest.mark.parametrize("index", [0, 1])
def test_language_models_refuse(index):
    model = models()[index]
    idx = torch.randint(11, (2, 6))
    for call, message in (
        (lambda: model(torch.randint(11, (2, 7))), "7 tokens, more than block_size=6"),
        (lambda: model(idx + 11), "expected 0 to 10"),
        (lambda: model(idx - 11), "expected 0 to 10"),
        (lambda: model(idx[0]), "expected token ids"),
        (lambda: model(idx.float()), "expected token ids"),
        (lambda: model(idx, idx[:, :3]), "targets have shape"),
        (lambda: model.generate(idx[:, :0], 3), "nothing to continue"),
        (lambda: model.generate(idx, -1), "max_new_tokens=-1"),
        (lambda: model.generate(idx, 1, temperature=-1.0), "temperature=-1.0"),
        (lambda: model.generate(idx, 1, top_k=0), "top_k=0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="must all be positive"):
        gpt(0)
