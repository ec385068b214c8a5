"""Which modules are normalization layers, what they carry, and how to build the layer that takes their place.

Recognised: every normalization of ``torch.nn``, every one of ``evenly.nn``, and by their attributes the frozen
batch norms of torchvision and detectron2 and the RMS norms of transformers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evenly import nn as enn

__all__ = ["KINDS", "Source", "Target", "bare", "describe", "norm_layers", "source_of"]

Target = str | Callable[[int, nn.Module], nn.Module]

#: The kinds that ``convert`` treats apart from what :func:`evenly.nn.create` builds.
KINDS = ("batch", "sync", "frozen", "layer", "group", "instance", "rms", "scale", "none", "folded")

_TORCH_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_TORCH_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


@dataclass
class Source:
    """A normalization layer of the model that is converted.

    Attributes:
        name: its (first) name in the model.
        module: the layer.
        kind: ``"batch"``, ``"sync"``, ``"frozen"``, ``"layer"``, ``"group"``, ``"instance"``, ``"rms"``,
            ``"scale"`` or ``"norm"`` (another pattern).
        num_features: channels.
        channel_dim: 1 for (N, C, ...), -1 for (..., C).
        weight, bias: one value a channel, or ``None``.
        stats: (mean, variance) where the layer is a constant affine map in evaluation, else ``None``.
        eps: what is added to the variance.
        activation: fused after it, or ``None``.
        groups: the number of groups of a group norm.
    """

    name: str
    module: nn.Module
    kind: str
    num_features: int
    channel_dim: int
    weight: Tensor | None
    bias: Tensor | None
    stats: tuple[Tensor, Tensor] | None = None
    eps: float = 1e-5
    activation: str | None = None
    groups: int | None = None
    frozen: bool = False

    def constant_affine(self) -> tuple[Tensor, Tensor]:
        """The scale and shift, in float64, that a layer with running statistics applies in evaluation."""
        assert self.stats is not None
        mean, var = (s.detach().double() for s in self.stats)
        scale = (var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight.detach().double()
        shift = -mean * scale
        if self.bias is not None:
            shift = shift + self.bias.detach().double()
        return scale, shift

    def tensors(self) -> list[Tensor]:
        return [*self.module.parameters(recurse=False), *self.module.buffers(recurse=False)]


def source_of(name: str, module: nn.Module) -> Source | None:
    """The normalization layer that ``module`` is, or ``None`` where it is none."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        raise ValueError(f"{name!r} is a lazy layer without parameters yet: run the model on one batch first.")
    m: Any = module
    if isinstance(module, _TORCH_BATCH):
        kind = "sync" if isinstance(module, nn.SyncBatchNorm) else "batch"
        return Source(name, module, kind, m.num_features, 1, m.weight, m.bias, _running(m), m.eps)
    if isinstance(module, _TORCH_INSTANCE):
        return Source(name, module, "instance", m.num_features, 1, m.weight, m.bias, _running(m), m.eps)
    if isinstance(module, nn.GroupNorm):
        kind = "layer" if m.num_groups == 1 else "instance" if m.num_groups == m.num_channels else "group"
        return Source(name, module, kind, m.num_channels, 1, m.weight, m.bias, None, m.eps, groups=m.num_groups)
    if isinstance(module, nn.LayerNorm):
        return _trailing(name, module, "layer")
    if isinstance(module, nn.RMSNorm):
        return _trailing(name, module, "rms")
    if isinstance(module, (enn.Norm, enn.FrozenBatchNorm)):
        return _ours(name, module)
    cls = type(module).__name__
    tensors: list[Any] = [getattr(m, key, None) for key in ("weight", "bias", "running_mean", "running_var")]
    if "Frozen" in cls and "Norm" in cls and all(isinstance(t, Tensor) and t.ndim == 1 for t in tensors):
        weight, bias, mean, var = tensors
        return Source(
            name,
            module,
            "frozen",
            len(weight),
            1,
            weight,
            bias,
            (mean, var),
            float(getattr(m, "eps", 1e-5)),
            frozen=True,
        )
    if cls.endswith("RMSNorm") and isinstance(tensors[0], Tensor) and tensors[0].ndim == 1:
        eps = next((getattr(m, key) for key in ("variance_epsilon", "eps", "epsilon") if hasattr(m, key)), 1e-6)
        bias = tensors[1] if isinstance(tensors[1], Tensor) else None
        weight = tensors[0]
        if "Gemma" in cls:  # multiplies by 1 + weight
            weight = weight.detach() + 1
        return Source(name, module, "rms", len(weight), -1, weight, bias, None, float(eps))
    return None


def norm_layers(model: nn.Module) -> list[Source]:
    """Every normalization layer of a model, each once, under its first name."""
    return [s for name, module in model.named_modules() if (s := source_of(name, module)) is not None]


def _running(m: Any) -> tuple[Tensor, Tensor] | None:
    return None if m.running_mean is None else (m.running_mean, m.running_var)


def _trailing(name: str, module: nn.Module, kind: str) -> Source:
    m: Any = module
    shape = tuple(m.normalized_shape)
    weight, bias = getattr(m, "weight", None), getattr(m, "bias", None)
    eps = torch.finfo(torch.float32).eps if m.eps is None else m.eps
    activation = getattr(m, "activation", None)
    if len(shape) == 1:
        return Source(name, module, kind, shape[0], -1, weight, bias, None, eps, activation)
    # One weight an element, (C, H, W): a layer with one weight a channel can carry its mean.
    weight, bias = (None if t is None else t.detach().flatten(1).mean(1) for t in (weight, bias))
    return Source(name, module, kind, shape[0], 1, weight, bias, None, eps, activation)


def _ours(name: str, module: nn.Module) -> Source:
    m: Any = module
    if isinstance(module, enn.FrozenBatchNorm):
        stats = (m.running_mean, m.running_var)
        return Source(
            name, module, "frozen", m.num_features, 1, m.weight, m.bias, stats, m.eps, m.activation, None, True
        )
    if isinstance(module, enn.BatchNorm):
        kind = "sync" if m.sync else "batch"
        dim = m.channel_dim
        return Source(name, module, kind, m.num_features, dim, m.weight, m.bias, _running(m), m.eps, m.activation)
    if isinstance(module, enn.GroupNorm):
        kind = "layer" if m.num_groups == 1 else "instance" if m.num_groups == m.num_channels else "group"
        return Source(name, module, kind, m.num_channels, 1, m.weight, m.bias, None, m.eps, m.activation, m.num_groups)
    if isinstance(module, enn.InstanceNorm):
        return Source(name, module, "instance", m.num_features, 1, m.weight, m.bias, _running(m), m.eps, m.activation)
    if isinstance(module, enn.LayerNorm):
        return _trailing(name, module, "layer")
    if isinstance(module, enn.RMSNorm):
        return _trailing(name, module, "rms")
    if isinstance(module, enn.ScaleNorm):
        weight = None if m.weight is None else m.weight.detach().expand(m.dim) / m.dim**0.5
        return Source(name, module, "scale", m.dim, -1, weight, None, None, m.eps, m.activation)
    features: tuple[int, ...] = m.features or ()
    count = features[0] if len(features) == 1 else 0
    last = m.pattern.split("->")[0].split()[-1] != "..."
    kind = "norm" if m.center or m.scale != "rms" else "rms"
    eps = 1e-5 if m.eps is None else m.eps
    return Source(name, module, kind, count, -1 if last else 1, m.weight, m.bias, None, eps, m.activation)


def describe(module: nn.Module) -> str:
    """A short name of a layer for the report: its class and, for groups, their number."""
    groups = getattr(module, "num_groups", None)
    return f"{type(module).__name__}({groups})" if isinstance(groups, int) else type(module).__name__


@contextlib.contextmanager
def bare(module: nn.Module) -> Iterator[None]:
    """Within it, a layer does not apply its fused activation."""
    activation = getattr(module, "activation", None)
    if activation is None:
        yield
        return
    module.activation = None  # type: ignore[assignment]
    try:
        yield
    finally:
        module.activation = activation
