"""Fixup: the rules of Zhang et al. (2019), on networks of many kinds, and the paper's own networks."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evenly.models import (
    FixupBasicBlock,
    FixupBottleneck,
    fixup_resnet_cifar,
    fixup_resnet_imagenet,
    fixup_transformer,
    gpt,
    resnet,
)
from evenly.weights import fixup_, fixup_init_, fixup_param_groups, fixup_scale, weight_normalize_, weight_standardize_

# ---- networks in the style of others ---------------------------------------------------------------------------------


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's: a normalization with its activation inside."""

    def __init__(self, channels: int, act: bool = True) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True) if act else nn.Identity()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x):
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class TimmBottleneck(nn.Module):
    """conv-bn-act three times, a gate, a projection in the shortcut, the addition in place."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        out = 2 * width
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), BatchNormAct2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = BatchNormAct2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), BatchNormAct2d(out, act=False)
        self.se = SqueezeExcite(out)
        self.act3 = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        shortcut = x
        x = self.bn1(self.conv1(x))
        x = self.bn2(self.conv2(x))
        x = self.se(self.bn3(self.conv3(x)))
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return self.act3(x)


class TorchvisionBlock(nn.Module):
    """One relu module for every place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Parallel(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x)), as in GPT-J."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(dim)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        h = self.ln(x)
        attention = self.o(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)))
        return attention + self.fc2(F.gelu(self.fc1(h))) + x


class Classifier(nn.Module):
    def __init__(self, stem: nn.Module, blocks: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.Sequential(*blocks), head

    def forward(self, x):
        x = self.blocks(F.relu(self.stem(x)))
        return self.head(x.mean((2, 3)) if x.ndim == 4 else x.mean(1))


def timm_style():
    blocks = [TimmBottleneck(6, 4), TimmBottleneck(8, 4), TimmBottleneck(8, 6, 2)]
    return Classifier(nn.Conv2d(3, 6, 3, padding=1), blocks, nn.Linear(12, 5)), torch.zeros(2, 3, 8, 8)


def torchvision_style():
    return (
        Classifier(nn.Conv2d(3, 6, 3, padding=1), [TorchvisionBlock(6) for _ in range(4)], nn.Linear(6, 5)),
        torch.zeros(2, 3, 8, 8),
    )


def parallel():
    return Classifier(nn.Linear(8, 8), [Parallel(8) for _ in range(2)], nn.Linear(8, 5)), torch.zeros(2, 3, 8)


def bodies(report):
    return [(b.m, tuple(name.rpartition("blocks.")[2] for name in b.last)) for b in report.branches]


# ---- scales, by hand -------------------------------------------------------------------------------------------------


def test_scale():
    for (count, m), want in {(54, 2): 0.13608, (16, 3): 0.5, (30, 4): 0.56730, (1, 2): 1.0}.items():
        assert fixup_scale(count, m) == pytest.approx(want, abs=1e-5)
    with pytest.raises(ValueError, match="at least two weight layers"):
        fixup_scale(4, 1)
    with pytest.raises(ValueError, match="L=0"):
        fixup_scale(0, 2)


def test_init_by_hand():
    branches = [
        [nn.Conv2d(32, 64, 3), nn.Conv2d(64, 64, 3)],
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)),
    ]
    fixup_init_(branches, L=16)
    want = math.sqrt(2 / (64 * 9)) / 4  # fan-out
    assert float(branches[0][0].weight.detach().std()) == pytest.approx(want, rel=0.02)
    assert not branches[0][1].weight.any()
    assert not branches[1][2].weight.any()
    fixup_init_(branches, mode="fan_in", last=0)
    assert not branches[0][0].weight.any()
    assert float(branches[0][1].weight.std()) == pytest.approx(math.sqrt(2 / (64 * 9)) / math.sqrt(2), rel=0.02)
    with pytest.raises(ValueError, match="at least two"):
        fixup_init_([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="holds ReLU"):
        fixup_init_([[nn.Linear(2, 2), nn.ReLU()]])
    with pytest.raises(ValueError, match="fan_both"):
        fixup_init_(branches, mode="fan_both")


# ---- finding branches ------------------------------------------------------------------------------------------------


def test_torchvision_style():
    model, x = torchvision_style()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = fixup_(model, x)
    assert bodies(report) == [(2, (f"{i}.conv2.weight",)) for i in range(4)]
    assert report.num_branches == 4
    assert report.classifier == ("head.weight",)
    assert len(report.removed) == 8
    assert not report.not_recognized
    # Rule 2, and what it does not touch.
    now = dict(model.named_parameters())
    torch.testing.assert_close(now["blocks.1.conv1.weight"], before["blocks.1.conv1.weight"] * 0.5)
    assert torch.equal(now["stem.weight"], before["stem.weight"])
    # Rule 3: four biases and one multiplier a block; before the head, after the stem.
    scalars = [name for name, p in model.named_parameters() if p.numel() == 1]
    assert sum("blocks.1." in name for name in scalars) == 5
    assert len(scalars) == 4 * 5 + 2 == report.multipliers + report.biases
    assert "stem.fixup_bias_out" in scalars
    assert "head.fixup_bias" in scalars
    x = torch.randn(3, 3, 8, 8)
    assert not model(x).any()
    h = model.stem(x).relu()
    assert torch.equal(model.blocks(h), h)


def test_the_scalars_are_where_the_paper_has_them():
    """A block of torchvision's style with Fixup computes what the paper's block does."""
    torch.manual_seed(0)
    model = nn.Sequential(TorchvisionBlock(4))
    fixup_(model, torch.zeros(2, 4, 6, 6))
    ours, theirs = model[0], FixupBasicBlock(4, 4)
    values = torch.randn(5)
    with torch.no_grad():
        for conv in ("conv1", "conv2"):
            getattr(ours, conv).weight.normal_()
            getattr(theirs, conv).weight.copy_(getattr(ours, conv).weight)
        places = (
            (ours.conv1.fixup_bias, theirs.bias1a),
            (ours.conv1.fixup_bias_out, theirs.bias1b),
            (ours.conv2.fixup_bias, theirs.bias2a),
            (ours.conv2.fixup_scale, theirs.scale),
            (ours.conv2.fixup_bias_out, theirs.bias2b),
        )
        for value, pair in zip(values, places, strict=True):
            for one in pair:
                one.fill_(value)
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(ours(x.clone()), theirs(x))


def test_timm_style_with_gates_and_projections():
    model, x = timm_style()
    report = fixup_(model, x, init="fan_out")
    assert bodies(report) == [(3, (f"{i}.conv3.weight",)) for i in range(3)]
    assert [b.shortcut for b in report.branches] == [
        "blocks.0.downsample.0.weight",
        "identity",
        "blocks.2.downsample.0.weight",
    ]
    assert all("2 layers of a gate" in b.note for b in report.branches)
    assert isinstance(model.blocks[0].bn1[1], nn.ReLU)  # the activation stays
    x = torch.randn(2, 3, 8, 8)
    assert not model(x).any()
    h = model.stem(x).relu()
    torch.testing.assert_close(model.blocks[1](model.blocks[0](h)), model.blocks[0](h))
    assert model.blocks[0](h).any()


def test_parallel_branches():
    report = fixup_(*parallel())
    assert [(b.m, b.last[0].rpartition("blocks.")[2], b.note) for b in report.branches] == [
        (4, "0.o.weight", "parallel"),
        (2, "0.fc2.weight", "parallel"),
        (4, "1.o.weight", "parallel"),
        (2, "1.fc2.weight", "parallel"),
    ]
    assert [b.scale for b in report.branches[:2]] == [4 ** (-1 / 6), 0.5]


def test_our_networks():
    x = torch.zeros(2, 1, 8, 8)
    for options in ({"norm": "batch"}, {"norm": "group", "preactivation": True}, {"norm": "none"}):
        model = resnet(1, 10, widths=(8, 16), blocks=2, **options)
        report = fixup_(model, x)
        assert bodies(report) == [(2, (f"{i}.conv2.weight",)) for i in range(4)], options
        assert not report.not_recognized
        assert not model(torch.randn(2, 1, 8, 8)).any()
    model = gpt(16, dim=8, depth=2, num_heads=2, block_size=6, norm="rms", activation="swiglu")
    report = fixup_(model, torch.zeros(1, 6, dtype=torch.long))
    assert [b.m for b in report.branches] == [4, 2, 4, 2]  # queries, keys and values are one matrix
    assert not report.not_recognized
    logits, _ = model(torch.randint(16, (2, 6)))
    assert not logits.any()
    model = gpt(16, dim=8, depth=1, num_heads=2, block_size=6, tie=True)
    report = fixup_(model, torch.zeros(1, 6, dtype=torch.long))
    assert report.classifier == ()
    assert "tied" in report.not_recognized[0]
    assert model.embedding.weight.any()


def test_torch_transformer_and_transformers():
    model = nn.Transformer(8, 2, 2, 1, 16, batch_first=True)
    report = fixup_(model, (torch.zeros(2, 5, 8), torch.zeros(2, 4, 8)))
    assert report.num_branches == 2 * 2 + 3 * 1
    assert [b.m for b in report.branches] == [4, 2, 4, 2, 4, 4, 2]
    assert "scalar biases have no place" in report.not_recognized[0]
    source, target = torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    for mode in (model.train(), model.eval()):
        with torch.no_grad():  # torch's fast path must not bring the normalization back
            assert torch.equal(mode(source, target), target)


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "BertForSequenceClassification", "LlamaForCausalLM", "ViT"])
def test_hugging_face(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ids = {"input_ids": torch.randint(3, 50, (2, 5))}
    if kind == "GPT2LMHeadModel":
        config = transformers.GPT2Config(
            vocab_size=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1, tie_word_embeddings=False
        )
        model, last = transformers.GPT2LMHeadModel(config), ["c_proj"] * 4
    elif kind == "BertForSequenceClassification":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=64, **sizes))
        last = ["dense"] * 4
    elif kind == "LlamaForCausalLM":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))
        last = ["o_proj", "down_proj"] * 2
    else:
        model = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **sizes))
        ids, last = {"pixel_values": torch.randn(2, 3, 8, 8)}, None
    report = fixup_(model, ids)
    assert [b.m for b in report.branches] == [4, 3 if kind == "LlamaForCausalLM" else 2] * 2
    if last is not None:
        assert [b.last[0].split(".")[-2] for b in report.branches] == last
    assert not report.not_recognized
    assert not model.eval()(**ids).logits.any()
    # Every branch is 0: changing one's inside changes nothing.
    hidden = model(**ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(hidden[1], hidden[0])


# ---- what is said ----------------------------------------------------------------------------------------------------


def test_the_table():
    model, x = timm_style()
    text = str(fixup_(model, x))
    assert "3 residual branches, L = 3" in text
    assert "blocks.1" in text and "conv3" in text and "0.7598" in text
    assert "classifier at 0: head.weight" in text
    assert "normalizations removed: 11" in text
    assert "not recognized: nothing" in text


class Odd(nn.Module):
    """A long skip around a block, a sum of two layers, and an activation without a layer before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Linear(4, 4), TwoLayers(), nn.Linear(4, 4)
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.stem(x)
        h = h + self.outer(h + self.inner(h))
        h = self.a(h) + self.b(h)
        return self.head(F.relu(h * 2))


class TwoLayers(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def test_what_is_not_recognized_is_said():
    report = fixup_(Odd(), torch.randn(3, 4))
    assert [b.name for b in report.branches] == ["inner"]
    text = "\n".join(report.not_recognized)
    assert "a residual connection around 1 others" in text
    assert "two terms with 1 and 1 weight layers" in text
    assert "no place: before relu" in text


def test_one_layer_branches_and_larger_models():
    class Thin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), TwoLayers()

        def forward(self, x):
            x = x + self.one(x)
            return x + self.two(x)

    model = Thin()
    weight = model.two[0].weight.detach().clone()
    report = fixup_(model, torch.randn(3, 4), num_branches=100)
    assert [(b.m, b.scale, b.note) for b in report.branches] == [(1, 1.0, "one layer, at 0"), (2, 0.1, "")]
    torch.testing.assert_close(model.two[0].weight, weight * 0.1)
    assert report.classifier == ()
    x = torch.randn(3, 4)
    assert torch.equal(model(x), x)


def test_normalized_weights():
    model = nn.Sequential(TorchvisionBlock(4), TorchvisionBlock(4))
    weight_normalize_(model)
    lengths = model[0].conv1.parametrizations.weight.original0.detach().clone()
    report = fixup_(model, torch.zeros(2, 4, 6, 6))
    assert [b.m for b in report.branches] == [2, 2]
    torch.testing.assert_close(model[0].conv1.parametrizations.weight.original0, lengths * 2**-0.5)
    assert model[0].conv2.parametrizations.weight.original1.any()  # the direction stays
    x = torch.randn(2, 4, 6, 6).relu()
    assert torch.equal(model(x.clone()), x)
    standardized = nn.Sequential(TorchvisionBlock(4), TorchvisionBlock(4))
    weight_standardize_(standardized)
    assert any("WeightStandardization" in text for text in fixup_(standardized, x).not_recognized)


def test_refused():
    model, x = torchvision_style()
    with pytest.raises(ValueError, match="8 normalizations"):
        fixup_(model, x, normalization="refuse")
    kept = fixup_(copy.deepcopy(model), x, normalization="keep")
    assert kept.removed == ()
    fixup_(model, x)
    with pytest.raises(ValueError, match="applied to this model already"):
        fixup_(model, x)
    plain = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="No residual branch was found in Sequential"):
        fixup_(plain, torch.zeros(2, 4))
    assert isinstance(plain[1], nn.LayerNorm)  # nothing was changed
    for options, said in (
        ({"normalization": "drop"}, "normalization='drop'"),
        ({"init": "xavier"}, "init='xavier'"),
        ({"num_branches": 0}, "num_branches=0"),
    ):
        with pytest.raises(ValueError, match=said):
            fixup_(torchvision_style()[0], x, **options)
    with pytest.raises(ValueError, match="inputs is a float"):
        fixup_(torchvision_style()[0], 1.0)


# ---- the model afterwards --------------------------------------------------------------------------------------------


def test_copies_state_dicts_and_compilers():
    model, x = torchvision_style()
    fixup_(model, x)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(2, 3, 8, 8)
    want = model(x)
    assert torch.equal(copy.deepcopy(model)(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), want)
    other, _ = torchvision_style()
    fixup_(other, x)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(x), want)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want)
    torch._dynamo.reset()


def test_training_flags_and_modes_are_kept():
    model, x = torchvision_style()
    model.blocks[0].conv1.weight.requires_grad_(False)
    model.blocks[1].eval()
    fixup_(model, x)
    assert not model.blocks[0].conv1.weight.requires_grad
    assert model.training and not model.blocks[1].training


def test_parameter_groups():
    model, x = torchvision_style()
    fixup_(model, x)
    groups = fixup_param_groups(model, 0.1, weight_decay=1e-4)
    assert [group["lr"] for group in groups] == [0.1, pytest.approx(0.01)]
    assert [group["weight_decay"] for group in groups] == [1e-4, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert len(groups[1]["params"]) == 22
    assert fixup_param_groups(model, 0.1, weight_decay=1e-4, decay_scalars=True)[1]["weight_decay"] == 1e-4
    assert len(fixup_param_groups(nn.Linear(2, 2), 0.1)) == 1
    with pytest.raises(ValueError, match="must not be negative"):
        fixup_param_groups(model, -0.1)
    with pytest.raises(ValueError, match="no parameter"):
        fixup_param_groups(nn.ReLU(), 0.1)
    optimizer = torch.optim.SGD(groups, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.arange(4)).backward()
        optimizer.step()
    assert model.blocks[0].conv2.weight.any()  # moves from the second step on


class ResidualMLP(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 32)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)) for _ in range(depth)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def test_the_change_of_the_function_does_not_depend_on_depth():
    """With rule 2 the logits after four steps are as large at any depth; without it they grow with it."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels[:128] / 16).float()
    x, y = (x - x.mean()) / x.std(), torch.from_numpy(labels[:128])
    sizes = {}
    for rescale in (True, False):
        for depth in (4, 64):
            torch.manual_seed(0)
            model = ResidualMLP(depth)
            fixup_(model, x[:2], init="fan_out", rescale=rescale)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            for step in range(4):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                if step == 0:
                    assert loss.item() == pytest.approx(math.log(10), rel=1e-6)
                loss.backward()
                optimizer.step()
            sizes[rescale, depth] = model(x).square().mean().sqrt().item()
    assert sizes[True, 64] == pytest.approx(sizes[True, 4], rel=0.1)
    assert sizes[False, 64] - sizes[False, 4] > 5 * abs(sizes[True, 64] - sizes[True, 4])


# ---- the paper's networks --------------------------------------------------------------------------------------------


def test_networks_for_small_images():
    model = fixup_resnet_cifar(20)
    scalars = [name for name, p in model.named_parameters() if p.numel() == 1]
    assert len(scalars) == 9 * 5 + 2
    x = torch.randn(2, 3, 16, 16)
    assert not model(x).any()
    block = model.layer3[1]
    h = torch.randn(2, 64, 4, 4)
    assert torch.equal(block(h), h.relu())
    std = math.sqrt(2 / (64 * 9)) / math.sqrt(9)
    assert float(torch.cat([b.conv1.weight.flatten() for b in model.layer3[1:]]).std()) == pytest.approx(std, rel=0.02)
    first = model.layer2[0]
    with torch.no_grad():
        first.bias1a.fill_(0.5)
    shortcut = first(torch.ones(1, 16, 4, 4))  # every second position of x + bias, then zeros
    assert torch.equal(shortcut[:, :16], torch.full((1, 16, 2, 2), 1.5))
    assert not shortcut[:, 16:].any()
    outs = [fixup_resnet_cifar(depth, width=4).layer1(torch.ones(1, 4, 4, 4)).norm() for depth in (20, 110)]
    assert outs[0] == outs[1]
    for depth in (10, 2, 21):
        with pytest.raises(ValueError, match=f"depth={depth}"):
            fixup_resnet_cifar(depth)


def test_networks_for_large_images():
    model = fixup_resnet_imagenet(50, 10, width=8)
    assert sum(p.numel() == 1 for p in model.parameters()) == 16 * 7 + 2
    block = model.layer1[1]
    h = torch.randn(1, 32, 4, 4)
    assert torch.equal(block(h), h.relu())
    std = math.sqrt(2 / (64 * 9)) * 0.5
    assert float(model.layer4[1].conv2.weight.std()) == pytest.approx(std, rel=0.02)
    projection = model.layer4[0].downsample.weight
    assert float(projection.std()) == pytest.approx(math.sqrt(2 / 256), rel=0.02)
    assert fixup_resnet_imagenet(18, 10, width=4)(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    with pytest.raises(ValueError, match="depth=20"):
        fixup_resnet_imagenet(20)
    assert FixupBottleneck(8, 2, stride=2, downsample=nn.Conv2d(8, 8, 1, 2))(torch.randn(1, 8, 4, 4)).shape[-1] == 2


def test_transformer():
    model = fixup_transformer(8, 2, 2, 2, 16, dropout=0.0, batch_first=True)
    assert not any(isinstance(m, nn.LayerNorm) for m in model.modules())
    biases = [name for name, p in model.named_parameters() if name.endswith("bias") and p.numel() > 1]
    assert not biases
    scalars = [name for name, p in model.named_parameters() if p.numel() == 1]
    assert sum("fixup_scale" in name for name in scalars) == 2 * 2 + 3 * 2
    assert {"encoder.norm.scale", "encoder.norm.bias", "decoder.norm.bias"} <= set(scalars)
    out = model(torch.randn(2, 5, 8), torch.randn(2, 4, 8))
    out.square().sum().backward()
    assert model.decoder.layers[0].linear2.weight.grad.any()
