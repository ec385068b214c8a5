"""Linear maps of a network: scale their outputs, centre them, solve their weights again from data.

Solving: with the layer's inputs :math:`u` (patches, for a convolution), its carried weights :math:`W_0` and the
residual :math:`r = t - W_0 u` against the original network's output :math:`t`,

.. math::  W = W_0 + \\arg\\min_D \\sum \\lVert r - D u \\rVert^2 + \\lambda \\lVert D \\rVert^2 ,

so that where nothing has changed (:math:`r = 0`) nothing is changed. :math:`\\lambda` is chosen by two-fold cross
validation on the sufficient statistics, "no change" among the choices. Memory: two Gram matrices of
(features + 1)² float64, whatever the number of batches. Time: O(rows · features²) + O(features³).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

__all__ = ["LINEAR", "ChannelFit", "WeightFit", "blocked", "centre_outputs", "patch_features", "scale_outputs"]

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LINEAR = (nn.Linear, *_CONV, *_TRANSPOSED)
_RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def blocked(module: Any, owners: dict[int, int], read_elsewhere: set[int]) -> str:
    """Why the weights of a layer must not be changed; empty where they may be."""
    if not isinstance(module, LINEAR):
        return f"{type(module).__name__} is not a convolution or linear layer"
    if parametrize.is_parametrized(module) or not isinstance(module._parameters.get("weight"), Tensor):
        return (
            "its weight is computed by a parametrization (remove it first: "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight'))"
        )
    base: Any = next(cls for cls in LINEAR if isinstance(module, cls))
    cls: Any = type(module)
    same = cls.forward is base.forward
    if same and hasattr(base, "_conv_forward"):
        same = cls._conv_forward is base._conv_forward
    if not same:
        return f"{type(module).__name__} has a forward of its own"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks, which see or change its output"
    for p in module._parameters.values():
        if p is not None and owners.get(id(p), 1) > 1:
            return "its weight is shared with another layer"
        if p is not None and id(p) in read_elsewhere:
            return "its weight is also read outside the layer"
    return ""


def _add_bias(module: Any, value: Tensor) -> None:
    """Set the bias, making one where there is none."""
    value = value.to(module.weight.dtype)
    if module.bias is None:
        module.bias = nn.Parameter(value, requires_grad=module.weight.requires_grad)
    else:
        module.bias.data.copy_(value)


def _bias(module: Any) -> Tensor:
    if module.bias is not None:
        return module.bias.detach().double()
    return torch.zeros(out_features(module), dtype=torch.float64, device=module.weight.device)


def out_features(module: nn.Module) -> int:
    m: Any = module
    return int(m.out_features if isinstance(module, nn.Linear) else m.out_channels)


@torch.no_grad()
def scale_outputs(module: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Make the layer compute ``scale * old + shift`` a channel of its output."""
    m: Any = module
    scale, shift = scale.double(), shift.double()
    weight = m.weight.detach().double()
    if isinstance(module, _TRANSPOSED):  # (in, out / groups, ...)
        split = weight.unflatten(0, (m.groups, -1))
        factor = scale.view(m.groups, 1, -1, *([1] * (weight.ndim - 2)))
        weight = (split * factor).flatten(0, 1)
    else:
        weight = weight * scale.view(-1, *([1] * (weight.ndim - 1)))
    bias = _bias(module) * scale + shift
    m.weight.data.copy_(weight)
    _add_bias(m, bias)


@torch.no_grad()
def centre_outputs(module: nn.Module) -> None:
    """Take the mean over the output features out of a linear or embedding layer."""
    m: Any = module
    weight = m.weight.detach().double()
    if isinstance(module, nn.Embedding):
        m.weight.data.copy_(weight - weight.mean(1, keepdim=True))
        return
    m.weight.data.copy_(weight - weight.mean(0, keepdim=True))
    if m.bias is not None:
        bias = m.bias.detach().double()
        m.bias.data.copy_(bias - bias.mean())


def patch_features(module: nn.Module) -> int | None:
    """Inputs of one output value, or ``None`` where the weights cannot be solved for."""
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, _CONV):
        return module.weight[0].numel()
    return None


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    """Inputs of shape (samples, groups, positions, features)."""
    m: Any = module
    if isinstance(module, nn.Linear):
        return x.reshape(x.shape[0] if x.ndim > 1 else 1, 1, -1, x.shape[-1])
    spatial = len(m.kernel_size)
    if x.ndim == spatial + 1:
        x = x[None]
    if m.padding_mode != "zeros":
        x = F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode)
    elif any(m._reversed_padding_repeated_twice):
        x = F.pad(x, m._reversed_padding_repeated_twice)
    for axis in range(spatial):
        k, d, s = m.kernel_size[axis], m.dilation[axis], m.stride[axis]
        x = x.unfold(axis + 2, (k - 1) * d + 1, s)[..., ::d]
    n, c = x.shape[:2]
    place, kernel = x.shape[2 : 2 + spatial], x.shape[2 + spatial :]
    x = x.reshape(n, m.groups, c // m.groups, place.numel(), kernel.numel())
    return x.transpose(2, 3).reshape(n, m.groups, place.numel(), -1)


def _targets(module: nn.Module, t: Tensor) -> Tensor:
    """Outputs of shape (samples, groups, positions, outputs a group)."""
    m: Any = module
    if isinstance(module, nn.Linear):
        return t.reshape(t.shape[0] if t.ndim > 1 else 1, 1, -1, t.shape[-1])
    if t.ndim == len(m.kernel_size) + 1:
        t = t[None]
    return t.reshape(t.shape[0], m.groups, m.out_channels // m.groups, -1).transpose(2, 3)


class WeightFit:
    """Streaming ridge regression of a layer's weights, towards those that it has."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        features = patch_features(module)
        assert features is not None
        groups = getattr(module, "groups", 1)
        outputs = out_features(module) // groups
        m: Any = module
        device = m.weight.device
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.gram = torch.zeros(2, groups, features + 1, features + 1, **options)
        self.cross = torch.zeros(2, groups, features + 1, outputs, **options)
        self.energy = torch.zeros(2, groups, **options)
        self.seen = 0

    @torch.no_grad()
    def update(self, x: Tensor, target: Tensor, output: Tensor) -> None:
        """Take in inputs, the outputs that are wanted and those that the layer gives now."""
        rows = _rows(self.module, x.float() if x.dtype in (torch.half, torch.bfloat16) else x)
        residual = _targets(self.module, target.to(rows.dtype) - output.to(rows.dtype))
        for fold in range(2):
            start = (fold + self.seen) % 2
            u = rows[start::2].transpose(0, 1).flatten(1, 2)
            r = residual[start::2].transpose(0, 1).flatten(1, 2)
            u = torch.cat([u, u.new_ones(*u.shape[:2], 1)], 2)
            self.gram[fold] += (u.transpose(1, 2) @ u).double()
            self.cross[fold] += (u.transpose(1, 2) @ r).double()
            self.energy[fold] += r.double().square().sum((1, 2))
        self.seen += len(rows)

    @torch.no_grad()
    def solve(self) -> float:
        """Write the solution into the layer; the ridge that was chosen, infinite for no change."""
        gram, cross = self.gram.sum(0), self.cross.sum(0)
        if not bool(torch.isfinite(gram).all() and torch.isfinite(cross).all()):
            return float("inf")
        best, ridge = float(self.energy.sum()), float("inf")
        if best == 0:
            return ridge
        for candidate in _RIDGES:
            error = 0.0
            for fold in range(2):
                d = _ridge(self.gram[fold], self.cross[fold], candidate)
                if d is None:
                    error = float("inf")
                    break
                other = 1 - fold
                fitted = (d * (self.gram[other] @ d - 2 * self.cross[other])).sum()
                error += float(self.energy[other].sum() + fitted)
            if error < best:
                best, ridge = error, candidate
        if ridge == float("inf"):
            return ridge
        change = _ridge(gram, cross, ridge)
        assert change is not None
        m: Any = self.module
        step = change.transpose(1, 2)  # groups, outputs, features + 1
        m.weight.data.copy_(m.weight.double() + step[..., :-1].reshape(m.weight.shape))
        _add_bias(m, _bias(m) + step[..., -1].reshape(-1))
        return ridge


def _ridge(gram: Tensor, cross: Tensor, ridge: float) -> Tensor | None:
    features = gram.shape[-1] - 1
    level = gram.diagonal(dim1=-2, dim2=-1)[:, :-1].mean(1)
    if features == 0 or not bool((level > 0).all()):
        level = level.clamp(min=torch.finfo(gram.dtype).tiny)
    penalty = (ridge * level)[:, None].expand(-1, features + 1).clone()
    penalty[:, -1] = 0  # the bias is free
    factor, info = torch.linalg.cholesky_ex(gram + torch.diag_embed(penalty))
    return None if bool(info.any()) else torch.cholesky_solve(cross, factor)


class ChannelFit:
    """Streaming least squares of one scale and shift a channel: ``target ≈ scale * z + shift``.

    Means and centred second moments are merged batch by batch (Chan, Golub & LeVeque, 1979) in float64.
    """

    def __init__(self, channel_dim: int) -> None:
        self.dim = channel_dim
        self.count = 0
        self.mean: Tensor | None = None  # (2, C): of z and of the target
        self.moments: Tensor | None = None  # (3, C): zz, zt, tt

    @torch.no_grad()
    def update(self, z: Tensor, target: Tensor) -> None:
        pair = torch.stack([_channels(z, self.dim), _channels(target, self.dim)])
        count = pair.shape[1]
        if count == 0:
            return
        mean = pair.mean(1)
        dz, dt = pair - mean[:, None]
        moments = torch.stack([(dz * dz).sum(0), (dz * dt).sum(0), (dt * dt).sum(0)])
        if self.mean is None or self.moments is None:
            self.count, self.mean, self.moments = count, mean, moments
            return
        total = self.count + count
        gap = mean - self.mean
        cross = torch.stack([gap[0] * gap[0], gap[0] * gap[1], gap[1] * gap[1]])
        self.moments = self.moments + moments + cross * (self.count * count / total)
        self.mean = self.mean + gap * (count / total)
        self.count = total

    def means(self) -> tuple[Tensor, Tensor]:
        assert self.mean is not None
        return self.mean[0], self.mean[1]

    def variance(self, correction: int = 0) -> Tensor:
        """The variance of z a channel."""
        assert self.moments is not None
        return self.moments[0] / max(1, self.count - correction)

    def solve(self, carried: Tensor, *, shrink: float = 1e-6, scalar: bool = False, shift: bool = True) -> Any:
        """Scale and shift, shrunk towards the carried scale where a channel says nothing.

        The shrinkage is relative to the mean variance over channels, so that a channel which never moves on
        these data keeps the scale that it came with.
        """
        assert self.moments is not None and self.mean is not None
        zz, zt, _ = self.moments
        if not shift:  # raw moments, through the origin
            zz = zz + self.count * self.mean[0].square()
            zt = zt + self.count * self.mean[0] * self.mean[1]
        carried = carried.double()
        if scalar:
            zz, zt = zz.sum(), zt.sum()
        level = shrink * zz.mean()
        scale = torch.where(zz + level > 0, (zt + level * carried) / (zz + level), carried)
        return scale, self.mean[1] - scale * self.mean[0]

    def r_squared(self, scale: Tensor, shift: Tensor) -> float:
        """The share of the target's variance, all channels together, that ``scale * z + shift`` explains."""
        assert self.moments is not None and self.mean is not None
        zz, zt, tt = self.moments
        gap = self.mean[1] - scale * self.mean[0] - shift
        error = tt - 2 * scale * zt + scale * scale * zz + self.count * gap * gap
        total = float(tt.sum())
        error_sum = max(0.0, float(error.sum()))
        if total <= 0:
            return 1.0 if error_sum <= 1e-12 * self.count else float("-inf")
        return 1 - error_sum / total


def _channels(x: Tensor, dim: int) -> Tensor:
    """(values, channels) in float64."""
    return x.detach().movedim(dim, -1).reshape(-1, x.shape[dim]).double()
