"""What a conversion must keep, what it must find, and where it is exact."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, TensorDataset

import evenly
from evenly import nn as enn
from evenly.conversion import Calibration, ChannelAffine, Refinement


def stir(model: nn.Module, seed: int = 0) -> nn.Module:
    """Make every affine parameter and running statistic of a network unlike its initial value."""
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        for key in ("weight", "bias"):
            p = getattr(m, key, None)
            if isinstance(p, torch.Tensor) and p.ndim == 1:
                p.data.copy_(
                    torch.rand(p.shape, generator=g) + 0.5 if key == "weight" else torch.randn(p.shape, generator=g)
                )
        if isinstance(getattr(m, "running_mean", None), torch.Tensor):
            m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=g) * 0.3)
            m.running_var.copy_(torch.rand(m.running_var.shape, generator=g) + 0.3)
    return model.eval()


def net(norm=nn.BatchNorm2d) -> nn.Module:
    torch.manual_seed(0)
    return stir(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, bias=False), norm(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
        )
    )  # fmt: skip


def settled() -> tuple[nn.Module, list[torch.Tensor]]:
    """A network whose running statistics are those of its data, and the data."""
    model, batches = net(), list(torch.randn(60, 3, 10, 10).split(20))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
            m.momentum = None
    model.train()
    with torch.no_grad():
        for x in batches * 3:
            model(x)
    return model.eval(), batches


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


# What is recognised and chosen


@pytest.mark.parametrize(
    ("layer", "kind", "dim"),
    [
        (nn.BatchNorm1d(4), "batch", 1), (nn.BatchNorm3d(4), "batch", 1), (nn.SyncBatchNorm(4), "sync", 1),
        (nn.GroupNorm(2, 4), "group", 1), (nn.GroupNorm(1, 4), "layer", 1), (nn.InstanceNorm2d(4), "instance", 1),
        (nn.LayerNorm(4), "layer", -1), (nn.LayerNorm((4, 3, 3)), "layer", 1), (nn.RMSNorm(4), "rms", -1),
        (enn.BatchNorm(4), "batch", 1), (enn.BatchNorm(4, sync=True), "sync", 1), (enn.FrozenBatchNorm(4), "frozen", 1),
        (enn.GroupNorm(2, 4), "group", 1), (enn.LayerNorm(4), "layer", -1), (enn.RMSNorm(4), "rms", -1),
        (enn.InstanceNorm(4, affine=True), "instance", 1), (enn.ScaleNorm(4), "scale", -1),
        (enn.BatchNorm(4, channel_dim=-1), "batch", -1), (enn.create("rms", 4), "rms", 1),
    ],
)  # fmt: skip
def test_sources(layer, kind, dim):
    from evenly.conversion.sources import source_of

    source = source_of("x", layer)
    assert (source.kind, source.channel_dim, source.num_features) == (kind, dim, 4)


def test_sources_by_their_attributes():
    class FrozenBatchNorm2d(nn.Module):
        def __init__(self):
            super().__init__()
            self.eps = 1e-3
            for key in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(key, torch.rand(4) + 0.5)

        def forward(self, x):
            w, b, m, v = (t[:, None, None] for t in (self.weight, self.bias, self.running_mean, self.running_var))
            return (x - m) / (v + self.eps).sqrt() * w + b

    class LlamaRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(4) + 0.5)
            self.variance_epsilon = 1e-3

        def forward(self, x):
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    frozen, x = FrozenBatchNorm2d(), torch.randn(2, 4, 3, 3)
    batch, report = evenly.convert(frozen, "batch")
    assert relative(batch.eval()(x), frozen(x)) < 1e-6
    assert report.rows[0].statistics == "carried"
    assert not any(p.requires_grad for p in batch.parameters())
    rms, x = LlamaRMSNorm(), torch.randn(5, 4)
    mine, report = evenly.convert(rms, lambda n, source: enn.RMSNorm(n, eps=source.variance_epsilon))
    assert relative(mine(x), rms(x)) < 1e-6


def test_only():
    model = net()
    for only in ("1", ["1"], lambda name, m: name == "1"):
        out, report = evenly.convert(model, "group", only=only)
        assert [r.name for r in report.rows] == ["1"]
        assert isinstance(out[1], enn.GroupNorm)
        assert isinstance(out[4], nn.BatchNorm2d)
    assert len(evenly.convert(model, "group", only=nn.BatchNorm2d)[1].rows) == 2
    nested = nn.Sequential(net(), net())
    assert {r.name for r in evenly.convert(nested, "layer", only="1")[1].rows} == {"1.1", "1.4"}
    assert {r.name for r in evenly.convert(nested, "layer", only="*.4")[1].rows} == {"0.4", "1.4"}


@pytest.mark.parametrize("only", ["2", nn.LayerNorm, lambda name, m: False, []])
def test_only_that_matches_nothing(only):
    with pytest.raises(ValueError, match=r"1 \(BatchNorm2d\), 4 \(BatchNorm2d\)"):
        evenly.convert(net(), "group", only=only)


def test_wrong_arguments():
    model = net()
    with pytest.raises(ValueError, match="Did you mean 'group'"):
        evenly.convert(model, "grop")
    with pytest.raises(TypeError, match="expected a name or a callable"):
        evenly.convert(model, 3)
    with pytest.raises(ValueError, match="does not divide num_channels=8"):
        evenly.convert(model, "group", groups=3)
    with pytest.raises(ValueError, match="is for to='group'"):
        evenly.convert(model, "layer", groups=2)
    with pytest.raises(ValueError, match="needs data"):
        evenly.convert(model, "layer", refine=3)
    with pytest.raises(ValueError, match="no normalization layer"):
        evenly.convert(nn.Linear(2, 2), "layer")
    with pytest.raises(ValueError, match="no batches"):
        evenly.convert(model, "layer", calibrate=[])
    with pytest.raises(TypeError, match="iterable of batches"):
        evenly.convert(model, "layer", calibrate=3)
    with pytest.raises(TypeError, match="expected a tensor, a tuple"):
        evenly.convert(model, "layer", calibrate=["x"])
    with pytest.raises(TypeError, match="expected a Module"):
        evenly.convert(model, lambda n, m: None)


def test_wrapped_models_get_a_clear_answer():
    model = net()
    for wrapped, word in (
        (nn.DataParallel(model), "model.module"),
        (torch.jit.trace(model, torch.randn(2, 3, 10, 10)), "ScriptModule"),
        (torch.compile(model), "_orig_mod"),
        (nn.Sequential(torch.compile(model)), "compiled or wrapped"),
    ):
        with pytest.raises(TypeError, match=word):
            evenly.convert(wrapped, "group")


# What survives


def test_the_model_is_not_touched():
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    evenly.convert(model, "group", calibrate=[torch.randn(8, 3, 10, 10)], refine=2)
    assert model.training
    assert isinstance(model[1], nn.BatchNorm2d)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_in_place():
    model = net()
    out, _ = evenly.convert(model, "group", inplace=True)
    assert out is model
    assert isinstance(model[1], enn.GroupNorm)
    with pytest.raises(ValueError, match="itself a normalization layer"):
        evenly.convert(nn.BatchNorm2d(3), "group", inplace=True)


def test_shared_modules_stay_shared():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.bn = nn.BatchNorm2d(4)
            self.again = self.bn

        def forward(self, x):
            return self.again(self.conv(self.bn(self.conv(x))))

    model = stir(Twice())
    x = torch.randn(8, 4, 6, 6)
    out, report = evenly.convert(model, "group", calibrate=[x])
    assert out.bn is out.again
    assert len(report.rows) == 1
    folded, report = evenly.convert(model, "folded")
    assert report.rows[0].statistics == "folded"
    assert relative(folded(x), model(x)) < 1e-5


def test_hooks_mode_dtype_and_gradients_survive():
    model = net().double()
    model[1].train()
    model[4].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    calls: list[str] = []
    model[1].register_forward_hook(lambda *a: calls.append("forward"))
    model[1].register_forward_pre_hook(lambda *a, **k: calls.append("pre"), with_kwargs=True)
    model[1].register_full_backward_hook(lambda *a: calls.append("backward"))
    out, _ = evenly.convert(model, "group")
    assert out[1].training
    assert not out[4].training
    assert {p.dtype for p in out.parameters()} == {torch.double}
    assert [p.requires_grad for p in out[4].parameters()] == [False, False]
    assert all(p.requires_grad for p in out[1].parameters())
    calls.clear()
    out(torch.randn(2, 3, 10, 10, dtype=torch.double)).sum().backward()
    assert calls == ["pre", "forward", "backward"]


def test_half_precision():
    model, x = net().bfloat16(), torch.randn(16, 3, 10, 10).bfloat16()
    out, report = evenly.convert(model, "group", calibrate=[x])
    assert {p.dtype for p in out.parameters()} == {torch.bfloat16}
    assert report.rows[0].r2 > 0.5


def test_parametrized_layers_are_left_alone():
    model = net()
    parametrize.register_parametrization(model[3], "weight", nn.Identity())
    out, report = evenly.convert(model, "folded")
    assert [r.statistics for r in report.rows] == ["folded", "kept"]
    assert "remove_parametrizations" in report.rows[1].note
    weight = model[3].weight.clone()
    out, report = evenly.convert(model, "group", calibrate=[torch.randn(8, 3, 10, 10)])
    assert torch.equal(out[3].weight, weight)


def test_tied_weights_are_not_changed():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    stir(model)
    out, report = evenly.convert(model, "folded", calibrate=[torch.randn(4, 6)])
    assert "shared" in report.rows[0].note
    assert out[0].weight is out[2].weight


def test_fused_activation_and_residual():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.bn = enn.BatchNorm(4, activation="relu")

        def forward(self, x):
            return self.bn(self.conv(x), residual=x)

    model, x = stir(Fused()), torch.randn(32, 4, 6, 6)
    out, report = evenly.convert(model, "group", groups=1, calibrate=[x])
    assert out.bn.activation == "relu"
    assert report.rows[0].r2 > 0.8
    for to in ("frozen", "none", "folded"):
        exact, report = evenly.convert(model, to)
        assert relative(exact(x), model(x)) < 1e-5
    assert report.rows[0].statistics == "folded"
    with pytest.raises(ValueError, match="has 'relu' fused"):
        evenly.convert(model, lambda n, m: nn.GroupNorm(1, n))


def test_transformer_fast_path_does_not_bypass_the_new_layer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    stir(layer)
    out, _ = evenly.convert(layer, "rms")
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        fast = out(x)
    slow = out.norm2((y := out.norm1(x + out._sa_block(x, None, None))) + out._ff_block(y))
    assert relative(fast, slow.detach()) < 1e-5


# Where it is exact


@pytest.mark.parametrize("to", ["frozen", "batch", "sync", "none", "folded"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, enn.BatchNorm, enn.FrozenBatchNorm])
def test_running_statistics_are_carried_exactly(to, norm):
    model, x = net(norm), torch.randn(4, 3, 10, 10)
    out, report = evenly.convert(model, to, calibrate=[x])
    assert relative(out(x), model(x)) < 1e-5
    assert {r.r2 for r in report.rows} <= {1.0, None}
    assert report.agreement.top1 == 1
    assert report.agreement.max_relative < 1e-5


@pytest.mark.parametrize("source", [nn.GroupNorm(1, 8), nn.GroupNorm(8, 8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8)])
def test_the_same_statistic_in_another_layer_is_exact(source):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), source)
    stir(model)
    groups = getattr(source, "num_groups", 8)
    to, options = ("layer", {}) if groups == 1 else ("group", {"groups": groups})
    x = torch.randn(6, 3, 8, 8)
    out, _ = evenly.convert(model, to, calibrate=[x], **options)
    assert relative(out(x), model(x)) < 1e-5
    assert torch.equal(out[0].weight, model[0].weight)


def test_pre_norm_stream_to_rms_is_exact():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return x + self.down(F.gelu(self.up(self.norm(x))))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(11, 8)
            self.places = nn.Parameter(torch.randn(1, 5, 8))
            self.body = nn.Sequential(Block(), Block())
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11)

        def forward(self, x):
            return self.head(self.norm(self.body(self.tokens(x) + self.places)))

    model, x = stir(Model()), torch.randint(0, 11, (6, 5))
    for data in (None, [x]):
        out, report = evenly.convert(model, "rms", calibrate=data)
        assert relative(out(x), model(x)) < 1e-5
        assert all(r.r2 == 1 and "exact" in r.note for r in report.rows)
    # A reader that sees the mean forbids it.
    model.head = nn.Linear(8, 11)
    model.forward = lambda x: (h := model.body(model.tokens(x) + model.places)).sum() + model.head(model.norm(h))
    _, report = evenly.convert(model, "rms", calibrate=[x])
    assert all("exact" not in r.note for r in report.rows)


# Folding


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 8), (5, 6)),
        (nn.Conv1d(6, 8, 3, groups=2, bias=False), (2, 6, 9)),
        (nn.Conv2d(6, 8, 3, dilation=2, padding="same", padding_mode="reflect"), (2, 6, 9, 9)),
        (nn.Conv2d(8, 8, 3, groups=8, stride=2), (2, 8, 9, 9)),
        (nn.Conv3d(6, 8, 2), (2, 6, 4, 4, 4)),
        (nn.ConvTranspose1d(6, 8, 3, stride=2), (2, 6, 9)),
        (nn.ConvTranspose2d(6, 8, 3, groups=2, bias=False, output_padding=1, stride=2), (2, 6, 5, 5)),
        (nn.ConvTranspose3d(6, 8, 2, groups=2), (2, 6, 3, 3, 3)),
    ],
)
@pytest.mark.parametrize("probe", [False, True])
def test_folding_is_exact(layer, shape, probe):
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[max(len(shape) - 3, 0)](8)
    model = nn.Sequential(layer, norm)
    stir(model)
    x = torch.randn(shape)
    out, report = evenly.convert(model, "folded", calibrate=[x] if probe else None)
    assert relative(out(x), model(x)) < 1e-5
    assert isinstance(out[1], nn.Identity)
    assert report.rows[0].statistics == "folded"


class Branches(nn.Module):
    """A convolution whose output is read twice, in the way that ``kind`` says."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        if self.kind == "add":
            return self.bn(y) + y
        if self.kind == "view":
            return self.bn(y).sum() + y[:, :1].sum()
        if self.kind == "returned":
            return self.bn(y), y
        if self.kind == "inplace":
            z = y.clamp_(-1, 1)
            return self.bn(z)
        if self.kind == "weight":
            return self.bn(y) * self.conv.weight.sum()
        return self.bn(F.relu(y))


@pytest.mark.parametrize("kind", ["add", "view", "returned", "inplace", "weight", "relu"])
@pytest.mark.parametrize("probe", [False, True])
def test_folding_where_the_output_goes_elsewhere_is_refused(kind, probe):
    model = stir(Branches(kind))
    x = torch.randn(2, 3, 5, 5)
    out, report = evenly.convert(model, "folded", calibrate=[x] if probe else None)
    assert report.rows[0].statistics == "kept"
    assert report.rows[0].note.startswith("not folded: ")
    assert isinstance(out.bn, nn.BatchNorm2d)
    before, after = model(x), out(x)
    before, after = (y[0] if kind == "returned" else y for y in (before, after))
    assert torch.equal(before, after)


def test_folding_without_data_in_a_model_that_fx_cannot_trace():
    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.conv(x if x.sum() > 0 else -x))

    model, x = stir(Dynamic()), torch.randn(2, 3, 6, 6)
    _, report = evenly.convert(model, "folded")
    assert "give calibrate= one batch" in report.rows[0].note
    out, report = evenly.convert(model, "folded", calibrate=[x])
    assert report.rows[0].statistics == "folded"
    assert relative(out(x), model(x)) < 1e-5


def test_folding_names_what_it_keeps():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.BatchNorm2d(4))
    _, report = evenly.convert(stir(model), "folded")
    notes = {r.name: r.note for r in report.rows}
    assert "input" in notes["0"]
    assert "no running statistics" in notes["2"]
    assert "not from a convolution" in notes["4"]


# Calibration


@pytest.mark.parametrize("to", ["layer", "group", "rms", "instance"])
def test_calibration_beats_the_plain_swap(to):
    model, batches = settled()
    x = torch.randn(40, 3, 10, 10)
    plain, _ = evenly.convert(model, to)
    calibrated, report = evenly.convert(model, to, calibrate=batches)
    refined, again = evenly.convert(model, to, calibrate=batches, refine=Refinement(steps=40, lr=5e-3))
    errors = [F.mse_loss(m(x), model(x)).item() for m in (plain, calibrated)]
    if to != "instance":  # it loses what a random network computes: the mean of each channel
        assert errors[1] < 0.5 * errors[0]
    assert all(0 < r.r2 <= 1 for r in report.rows)
    assert again.loss[1] < again.loss[0]
    assert again.refined_steps == 40
    assert all(p.grad is None for p in refined.parameters())


def test_statistics_are_estimated():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU())
    stir(model)
    x = torch.randn(64, 3, 9, 9) * 2 + 1
    out, report = evenly.convert(model, "batch", calibrate=list(x.split(16)))
    assert report.rows[0].statistics == "estimated"
    pre = model[0](x).transpose(0, 1).flatten(1)
    assert torch.allclose(out[1].running_mean, pre.mean(1), atol=1e-5)
    assert torch.allclose(out[1].running_var, pre.var(1), rtol=1e-4)
    assert report.rows[0].r2 > 0.9


def test_r_squared_and_the_solution_against_lstsq():
    model = stir(nn.Sequential(nn.Identity(), nn.BatchNorm2d(4)))
    x = torch.randn(32, 4, 5, 5) * torch.tensor([1.0, 3.0, 0.2, 2.0]).view(4, 1, 1)
    out, report = evenly.convert(model, "group", groups=2, calibrate=list(x.split(8)))
    z = F.group_norm(x.double(), 2).transpose(0, 1).flatten(1)
    t = model(x).detach().double().transpose(0, 1).flatten(1)
    error = 0.0
    for c in range(4):
        a = torch.stack([z[c], torch.ones_like(z[c])], 1)
        solution = torch.linalg.lstsq(a, t[c, :, None]).solution
        assert out[1].weight[c].item() == pytest.approx(solution[0].item(), rel=1e-4)
        assert out[1].bias[c].item() == pytest.approx(solution[1].item(), rel=1e-4, abs=1e-4)
        error += (t[c, :, None] - a @ solution).square().sum().item()
    total = (t - t.mean(1, keepdim=True)).square().sum().item()
    assert report.rows[0].r2 == pytest.approx(1 - error / total, abs=1e-5)


def test_dead_and_constant_channels():
    model, batches = settled()
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[0].bias[:3] = torch.tensor([0.0, 1e4, -1.0])
        model[1].running_mean[:3] = model[0].bias[:3]
        model[1].running_var[:3] = 0
    for to in ("group", "instance", "layer"):
        for weights in ("all", "none"):
            out, _ = evenly.convert(model, to, calibrate=Calibration(batches, weights=weights))
            y = out(batches[0])
            assert torch.isfinite(y).all()
            assert all(torch.isfinite(p).all() for p in out.parameters())
            assert all(p.abs().max() < 1e5 for p in out[1].parameters()), to


def test_data_are_streamed_and_limited():
    model = net()
    seen = []

    class Data:
        def __iter__(self):
            for i in range(100):
                seen.append(i)
                yield torch.randn(4, 3, 10, 10)

    _, report = evenly.convert(model, "group", calibrate=Calibration(Data(), samples=10))
    assert report.agreement.samples == 10
    assert max(seen) <= 3
    once = (torch.randn(4, 3, 10, 10) for _ in range(5))
    assert evenly.convert(model, "group", calibrate=once)[1].agreement.samples == 20
    with pytest.raises(ValueError, match="walked only once"):
        evenly.convert(model, "group", calibrate=Calibration(iter([torch.randn(4, 3, 10, 10)]), samples=None))


def test_batches_of_every_form_give_the_same():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, x):
            return {"logits": self.body(x), "other": x}

    model, x = Named(), torch.randn(20, 3, 10, 10)
    labels = torch.zeros(20, dtype=torch.long)
    forms = [
        list(x.split(10)),
        [(b, 0) for b in x.split(10)],
        [{"x": b} for b in x.split(10)],
        DataLoader(TensorDataset(x, labels), batch_size=10),
    ]
    found = [evenly.convert(model, "group", groups=2, calibrate=form)[0].state_dict() for form in forms]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0].values(), other.values(), strict=True))


def test_weights_settings():
    model, batches = settled()
    none, _ = evenly.convert(model, "group", calibrate=Calibration(batches, weights="none"))
    assert torch.equal(none[3].weight, model[3].weight)
    assert torch.equal(none[8].weight, model[8].weight)
    every, report = evenly.convert(model, "group", calibrate=Calibration(batches, weights="all"))
    assert {"0", "3"} <= set(report.solved)
    assert not torch.equal(every[3].weight, model[3].weight)
    wide, _ = evenly.convert(model, "group", calibrate=Calibration(batches, max_features=0))
    assert torch.isfinite(wide(batches[0])).all()
    with pytest.raises(ValueError, match="expected 'all'"):
        Calibration(batches, weights="some")


def test_refined_parameters_are_those_asked_for():
    model, batches = settled()
    base, _ = evenly.convert(model, "group", calibrate=batches)
    norm, _ = evenly.convert(model, "group", calibrate=batches, refine=Refinement(steps=2, parameters="norm"))
    named, _ = evenly.convert(model, "group", calibrate=batches, refine=Refinement(steps=2, parameters=["8.*"]))
    changed = lambda m: {k for k, v in m.state_dict().items() if not torch.equal(v, base.state_dict()[k])}  # noqa: E731
    assert changed(norm) == {"1.weight", "1.bias", "4.weight", "4.bias"}
    assert changed(named) == {"8.weight", "8.bias"}
    with pytest.raises(ValueError, match="no parameter matches"):
        evenly.convert(model, "group", calibrate=batches, refine=Refinement(parameters=["nothing"]))


def test_groups_are_larger_where_an_image_is_small():
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.AvgPool2d(4), nn.BatchNorm2d(64))
    out, _ = evenly.convert(stir(model), "group", calibrate=[torch.randn(4, 3, 8, 8)])
    assert out[1].num_groups == 32  # 2 channels of 64 positions
    assert out[3].num_groups == 4  # 16 channels of 4
    assert evenly.convert(model, "group", groups=lambda c: c // 4)[0][1].num_groups == 16


def test_report():
    model, batches = settled()
    _, report = evenly.convert(model, "group", calibrate=batches, refine=2)
    text = str(report)
    assert "BatchNorm2d" in text
    assert "GroupNorm(" in text
    assert "top-1 agreement" in text
    assert json.loads(json.dumps(report.to_dict()))["rows"][0]["name"] == "1"


def test_every_layer_of_the_library_is_a_target():
    model, x = net(), torch.randn(4, 3, 10, 10)
    for name in enn.available():
        out, _ = evenly.convert(model, name, calibrate=[x])
        assert torch.isfinite(out(x)).all(), name


def test_none_keeps_what_cannot_be_folded():
    model = stir(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))
    out, report = evenly.convert(model, "none")
    assert isinstance(out[1], ChannelAffine)
    x = torch.randn(2, 3, 4, 4)
    assert relative(out(x), model(x)) < 1e-5
    assert "not folded" in report.rows[0].note


def test_progress_is_shown_on_a_terminal_only(monkeypatch, capsys):
    from rich.console import Console

    model, batches = settled()
    evenly.convert(model, "group", calibrate=batches, refine=2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(Console, "is_terminal", True)
    with torch.no_grad():
        evenly.convert(model, "group", calibrate=batches, refine=2)
    assert "calibrate to group" in capsys.readouterr().err


@settings(max_examples=25)
@given(
    rank=st.integers(1, 3), groups=st.integers(1, 3), kernel=st.integers(1, 3), stride=st.integers(1, 2),
    dilation=st.integers(1, 2), padding=st.integers(0, 2), mode=st.sampled_from(["zeros", "circular", "replicate"]),
)  # fmt: skip
def test_solved_weights_are_those_of_the_target_network(rank, groups, kernel, stride, dilation, padding, mode):
    from evenly.conversion.linear import WeightFit

    torch.manual_seed(0)
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    options = {"stride": stride, "dilation": dilation, "padding": padding, "groups": groups, "padding_mode": mode}
    mine, other = (cls(2 * groups, 3 * groups, kernel, **options) for _ in range(2))
    fit = WeightFit(mine)
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(24 if rank < 3 else 12, 2 * groups, *[6] * rank)
            fit.update(x, other(x), mine(x))
    assert fit.solve() <= 1e-3
    assert torch.allclose(mine.weight, other.weight, atol=2e-2)
    assert torch.allclose(mine.bias, other.bias, atol=2e-2)


@settings(max_examples=30)
@given(cuts=st.lists(st.integers(1, 39), max_size=4), offset=st.sampled_from([0.0, 1e4]), dead=st.booleans())
def test_channel_fit_does_not_depend_on_the_batches(cuts, offset, dead):
    from evenly.conversion.linear import ChannelFit

    g = torch.Generator().manual_seed(1)
    z, noise = torch.randn(40, 3, 5, generator=g).double(), torch.randn(40, 3, 5, generator=g).double()
    if dead:
        z[:, 1] = 0
    z = z + offset
    t = 3 * (z - offset) + 1 + 0.1 * noise
    fit = ChannelFit(1)
    edges = sorted({0, *cuts, 40})
    for a, b in itertools.pairwise(edges):
        fit.update(z[a:b], t[a:b])
    scale, shift = fit.solve(torch.full((3,), 7.0), shrink=1e-12)
    for c in range(3):
        if dead and c == 1:
            assert scale[c].item() == pytest.approx(7)
            continue
        centred = z[:, c] - z[:, c].mean()
        assert scale[c].item() == pytest.approx(((centred * t[:, c]).sum() / centred.square().sum()).item(), rel=1e-6)
    assert torch.allclose(scale * fit.means()[0] + shift, fit.means()[1], atol=1e-6)
    assert fit.variance()[0].item() == pytest.approx(z[:, 0].var(correction=0).item(), rel=1e-6)
