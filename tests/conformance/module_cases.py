"""The table of modules that are more than a layer: attention, blocks, whole models. The suite is in test_modules.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import evenly.models as em
import evenly.nn as en
from evenly.stats import MultiTeacherLoss, PHIStandardizer


@dataclass(frozen=True)
class ModuleCase:
    """A module: ``make()`` builds it, ``shape`` is its input (samples first)."""

    name: str
    objects: tuple[str, ...]  # all that it holds, as in the catalog: "module:Name"
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    catalog: str | None = None
    tokens: int = 0  # the input is token ids below this
    features: str = ""  # what the message of an input with other features says; "" where there are none
    shows: tuple[str, ...] = ()  # what its repr must print
    half: float = 0.1  # largest error in bfloat16

    def __str__(self) -> str:
        return self.name

    def input(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
        if self.tokens:
            return torch.randint(self.tokens, self.shape, device=device)
        return torch.randn(self.shape).to(device, dtype)


class _Scaled(nn.Module):
    """A scaled parameter at work, so that it has an input."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = en.ScaledParameter(8, init=0.05, scale=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain()


class _Projected(nn.Module):
    """Layers of unit vectors that an optimizer has moved and projected."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(en.NormalizedEmbedding(11, 8), en.NormalizedLinear(8, 5))
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        projected = en.ProjectedOptimizer(optimizer, self)
        self(torch.arange(11)).square().sum().backward()
        projected.step()
        projected.zero_grad()

    def forward(self, idx: Tensor) -> Tensor:
        return self.layers(idx)


class _Distilled(nn.Module):
    """A student's two heads and the objective; the loss of each sample."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(8, 4) for name in ("a", "b")})
        features = torch.randn(2, 30, 4)
        fitted = {name: PHIStandardizer().fit(z * 3) for name, z in zip("ab", features, strict=True)}
        self.loss = MultiTeacherLoss(fitted, kind=kind)
        self.register_buffer("features", torch.randn(2, 6, 4))

    def forward(self, x: Tensor) -> Tensor:
        targets = {name: z.expand(len(x), 6, 4) for name, z in zip("ab", self.features, strict=True)}
        losses = self.loss.each({name: head(x) for name, head in self.heads.items()}, targets)
        return losses["a"] + losses["b"]


def _stirred(model: nn.Module) -> nn.Module:
    """With other values than the 0 that a network may start at."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


MODULES = (
    *(
        ModuleCase(
            f"MultiTeacherLoss ({kind})",
            ("evenly.stats:MultiTeacherLoss",),
            lambda kind=kind: _Distilled(kind),
            (4, 6, 8),
            catalog="phi-s",
            shows=("Standardize(4", f"kind={{'a': '{kind}'"),
        )
        for kind in ("mse", "smooth_l1", "cosine", "hybrid")
    ),
    ModuleCase(
        "QKNormAttention",
        ("evenly.nn:QKNormAttention",),
        lambda: en.QKNormAttention(8, 2, seq_len_p975=6),
        (4, 6, 8),
        catalog="qknorm",
        features=r"\(batch, length, 8\)",
        shows=("8", "num_heads=2", "init_scale=", "eps="),
    ),
    ModuleCase(
        "QKNormAttention (a scale a head)",
        ("evenly.nn:QKNormAttention",),
        lambda: en.QKNormAttention(8, 2, init_scale=3.0, per_head_scale=True, bias=False),
        (4, 6, 8),
        catalog="qknorm",
        features=r"\(batch, length, 8\)",
        shows=("per_head_scale=True",),
    ),
    ModuleCase(
        "NormalizedLinear",
        ("evenly.nn:NormalizedLinear",),
        lambda: en.NormalizedLinear(8, 5, bias=True, norm_dim=0),
        (4, 6, 8),
        catalog="ngpt",
        shows=("in_features=8", "norm_dim=0"),
    ),
    ModuleCase(
        "ScaledParameter",
        ("evenly.nn:ScaledParameter",),
        _Scaled,
        (4, 6, 8),
        catalog="ngpt",
        shows=("init=0.05", "scale=0.5"),
    ),
    ModuleCase(
        "ProjectedOptimizer",
        ("evenly.nn:ProjectedOptimizer", "evenly.nn:NormalizedEmbedding"),
        _Projected,
        (4, 6),
        catalog="ngpt",
        tokens=11,
    ),
    ModuleCase(
        "NGPT",
        ("evenly.models:NGPT", "evenly.models:NGPTConfig"),
        lambda: em.NGPT(em.NGPTConfig(11, n_layer=2, n_head=2, n_embd=8, block_size=6)),
        (4, 6),
        catalog="ngpt",
        tokens=11,
        shows=("norm_dim=0", "ScaledParameter"),
    ),
    ModuleCase(
        "Attention",
        ("evenly.models:Attention",),
        lambda: em.Attention(8, 4, kv_groups=2, qk_norm="rms"),
        (4, 6, 8),
        features=r"\(batch, length, 8\)",
        shows=("8", "num_heads=4", "kv_groups=2", "qk_norm='rms'"),
    ),
    ModuleCase(
        "TransformerBlock",
        ("evenly.models:TransformerBlock",),
        lambda: em.TransformerBlock(8, 2, norm="rms", placement="sandwich", qk_norm="l2", qk_scale=4.0),
        (4, 6, 8),
        features="8",
        shows=("placement='sandwich'",),
    ),
    ModuleCase(
        "FixupResNet (basic)",
        ("evenly.models:FixupResNet", "evenly.models:FixupBasicBlock"),
        lambda: _stirred(em.FixupResNet(em.FixupBasicBlock, (1, 1), 5, 4)),
        (4, 3, 8, 8),
        catalog="fixup",
    ),
    ModuleCase(
        "FixupResNet (bottleneck)",
        ("evenly.models:FixupResNet", "evenly.models:FixupBottleneck"),
        lambda: _stirred(em.FixupResNet(em.FixupBottleneck, (1, 1), 5, 4, large=True)),
        (4, 3, 16, 16),
        catalog="fixup",
    ),
    ModuleCase(
        "GPT",
        ("evenly.models:GPT",),
        lambda: em.gpt(11, dim=8, depth=2, num_heads=2, block_size=6),
        (4, 6),
        tokens=11,
    ),
)
