"""``Norm``: any pattern as a layer. Every other layer is a few lines on it.

.. math::
    y = \\phi\\Big( \\frac{x - m}{s} \\odot w + b + r \\Big)

The pattern says which values share the mean :math:`m` and the scale :math:`s`
(:func:`evenly.normalize`); weight and bias are learned. With ``running=`` the layer keeps averages of the
statistics that it saw in training and uses them in evaluation, as batch normalization does.

Reference:
    Ioffe & Szegedy, *Batch Normalization*, ICML 2015, arXiv 1502.03167, for the running statistics;
    the patterns are those of :mod:`evenly.core`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import reduce
from torch import Tensor, nn

from evenly.core import Moments, PatternError, moments, normalize
from evenly.core.kernels import operator
from evenly.core.normalize import Activation, Scale, check_activation, check_scale, quick_key
from evenly.core.patterns import validate
from evenly.nn.sync import sync_moments

__all__ = ["Norm"]


class Norm(nn.Module):
    """Normalize over a pattern, then scale and shift.

    Args:
        pattern: which axes keep a statistic of their own, such as ``"n c h w -> c"``.
        features: the shape of weight and bias; ``None`` for a layer without parameters.
        affine: the axes that weight and bias carry, such as ``"c"`` or ``"(g c)"``. Default: as in
            :func:`evenly.normalize`.
        weight: learn a weight, initially 1.
        bias: learn a bias, initially 0.
        center: subtract the mean.
        scale: ``"std"``, ``"rms"``, ``"l2"``, ``"l1"``, ``"max"`` or ``None``.
        eps: default 1e-5 for ``"std"`` and ``"rms"``, 1e-12 for the norms.
        activation: fused after it: ``"relu"``, ``"silu"``, ``"gelu"`` or ``None``.
        running: keep running statistics, of this pattern (``"n c ... -> c"``); the axes on its right are the
            shape of ``running_mean`` and ``running_var``, given by ``running_shape``; without a ``scale`` there is
            no ``running_var``. In training the layer uses the statistics of its input, in evaluation the running
            ones.
        running_shape: the shape of the running statistics; default ``features``.
        momentum: weight of the new value in the running average; ``None`` for the plain average of all batches.
        sync: in training, share statistics with all processes of ``process_group`` (the default group if
            ``None``). Only for layers whose pattern is the running pattern.
        device, dtype: of parameters and buffers.
        **sizes: sizes of axes by name, such as ``g=32``.

    Shape:
        Input, residual and output have one shape, which the pattern describes.

    Raises:
        ValueError: a pattern that cannot be read, an unknown scale or activation, negative eps, momentum outside
            [0, 1]; in forward, sizes that do not fit.

    >>> layer = Norm("n (g c) h w -> n g", 6, affine="(g c)", g=3)
    >>> layer(torch.randn(2, 6, 5, 5)).shape
    torch.Size([2, 6, 5, 5])
    >>> layer
    Norm('n (g c) h w -> n g', 6, affine='(g c)', g=3)
    """

    _version = 2
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    # the options of the last call and the shortest way of another one like it
    _ready: tuple[Any, Any] = (None, None)

    def __init__(
        self,
        pattern: str,
        features: int | Sequence[int] | None = None,
        *,
        affine: str | None = None,
        weight: bool = True,
        bias: bool = True,
        center: bool = True,
        scale: Scale | None = "std",
        eps: float | None = None,
        activation: Activation | None = None,
        running: str | None = None,
        running_shape: int | Sequence[int] | None = None,
        momentum: float | None = 0.1,
        sync: bool = False,
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **sizes: int,
    ) -> None:
        super().__init__()
        if eps is not None and not eps >= 0:
            raise ValueError(f"eps={eps}, expected a number of at least 0.")
        check_scale(scale)
        check_activation(activation)
        validate(pattern, sizes, affine)
        if running is not None:
            validate(running, sizes, affine)
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum} is outside [0, 1]; it is the weight of the new value.")
        if sync and running != pattern:
            raise ValueError(
                f"sync=True shares the statistics of {pattern!r} between processes, which only means something where "
                f"the batch is reduced over and running statistics are kept: give running={pattern!r}."
            )
        self.pattern = pattern
        self.axes = affine
        self.sizes: dict[str, Any] = dict(sizes)
        self.center = center
        self.scale: Scale | None = scale
        self.eps = eps
        self.activation: Activation | None = activation
        self.running = running
        self.momentum = momentum
        self.sync = sync
        self.process_group = process_group
        shape = _shape(features, "features")
        self.features = shape
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        for name, learned in (("weight", weight), ("bias", bias)):
            made = nn.Parameter(torch.empty(shape, **options)) if learned and shape is not None else None
            self.register_parameter(name, made)
        stat_shape = None
        if running is not None:
            stat_shape = _shape(running_shape, "running_shape") if running_shape is not None else shape
            if stat_shape is None:
                raise ValueError("running= keeps statistics, whose shape is needed: give features or running_shape.")
        self.register_buffer("running_mean", None if stat_shape is None else torch.empty(stat_shape, **options))
        var_shape = stat_shape if scale is not None else None
        self.register_buffer("running_var", None if var_shape is None else torch.empty(var_shape, **options))
        tracked = None if stat_shape is None else torch.zeros((), dtype=torch.long, device=device)
        self.register_buffer("num_batches_tracked", tracked)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Forget the running statistics: mean 0, variance 1."""
        if self.running_mean is not None:
            self.running_mean.zero_()
        if self.running_var is not None:
            self.running_var.fill_(1)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, running statistics forgotten."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Normalize ``x``.

        Args:
            x: the input.
            residual: added after scale and shift, before the activation; the shape of ``x``.
            mask: boolean, broadcastable to ``x``; where false, a value does not count and the output is 0.
        """
        if mask is None:
            done = self._quick(x, residual)
            if done is not None:
                return done
        self._check_input(x)
        if self.running is None:
            return self._normalize(x, self.pattern, residual, mask)
        if not self.training:
            if self.running_mean is None:
                return self._normalize(x, self.pattern, residual, mask)
            stats = (self.running_mean, self.running_var)
            return self._normalize(x, self.running, residual, mask, stats)
        self._check_batch(x)
        if self.sync:
            shared = sync_moments(moments(x, self.pattern, mask=mask, **self.sizes), self.process_group)
            self._update(shared)
            return self._normalize(x, self.pattern, residual, mask, (shared.mean, shared.var))
        if self.running_mean is None:
            return self._normalize(x, self.pattern, residual, mask)
        y, measured = normalize(x, self.pattern, return_stats=True, **self._arguments(x, residual, mask))
        self._update(measured)
        return y

    def _quick(self, x: Tensor, residual: Tensor | None) -> Tensor | None:
        """The output by a short way: for a call like an earlier one, with parameters that show that sizes fit."""
        if torch.compiler.is_compiling() or not isinstance(x, Tensor):
            return None
        parameters = self._parameters
        if "weight" not in parameters or "bias" not in parameters:
            return None  # made of others, or plain tensors
        weight, bias = parameters["weight"], parameters["bias"]
        if weight is None and bias is None:
            return None
        pattern = self.pattern
        mean = var = momentum = tracked = None
        if self.running is not None:
            buffers = self._buffers
            mean, var = buffers.get("running_mean"), buffers.get("running_var")
            if mean is not None and var is None and self.scale is None:
                var = torch.empty_like(mean)  # the kernel's second statistic, which is not used
            if mean is None or var is None:
                mean = var = None
            elif not self.training:
                pattern = self.running
            elif self.sync or self.momentum is None or self.running != pattern:
                return None
            elif torch._C._current_graph_task_id() != -1:
                return None  # recomputed inside a backward pass: it was counted already
            else:
                momentum, tracked = self.momentum, buffers.get("num_batches_tracked")
        measured = mean is None or momentum is not None
        options = (pattern, self.center, self.scale, self._eps(x), self.axes, self.activation, measured, self.sizes)
        remembered, ready = self._ready
        if ready is not None and remembered == options:  # a copy has no way of its own yet
            y = ready(x, weight, bias, residual, mean, var, momentum, tracked)
            if y is not None:
                return y
        key = quick_key(x, *options[:4], 0, *options[4:6], residual, measured, self.sizes)
        entry = operator.recall(key, x)
        if entry is None:
            return None
        if entry.ready is not None:
            self.__dict__["_ready"] = ((*options[:7], dict(self.sizes)), entry.ready)
        return operator.again(entry, x, weight, bias, residual, mean, var, momentum, tracked)

    def _normalize(
        self,
        x: Tensor,
        pattern: str,
        residual: Tensor | None,
        mask: Tensor | None,
        stats: tuple[Tensor | None, Tensor | None] | None = None,
    ) -> Tensor:
        return normalize(x, pattern, stats=stats, **self._arguments(x, residual, mask))

    def _arguments(self, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> dict[str, Any]:
        return {
            "center": self.center,
            "scale": self.scale,
            "eps": self._eps(x),
            "weight": self.weight,
            "bias": self.bias,
            "affine": self.axes,
            "residual": residual,
            "activation": self.activation,
            "mask": mask,
            **self.sizes,
        }

    def _eps(self, x: Tensor) -> float | None:
        """The eps for an input; a hook for layers whose eps depends on its dtype."""
        return self.eps

    def _check_input(self, x: Tensor) -> None:
        """Hook for layers that say in their own words which inputs they take; not asked again for a like one."""

    def _check_batch(self, x: Tensor) -> None:
        """Hook for layers that refuse a batch in training."""

    @torch.no_grad()
    def _update(self, measured: Moments) -> None:
        """Move the running statistics towards those of this batch; the variance unbiased."""
        if self.running_mean is None or self.num_batches_tracked is None:
            return
        if recomputing():
            return  # it was counted already
        mean, var, count = measured.mean.detach(), measured.var.detach(), measured.count
        if count.numel() == 0:
            return
        enough = count > (1 if self.running_var is not None else 0)
        var = var * (count / (count - 1).clamp(min=1))
        if self.running != self.pattern:
            assert self.running is not None
            to = f"{self.pattern.split('->')[1]} -> {self.running.split('->')[1]}"
            mean, var = reduce(mean, to, "mean"), reduce(var, to, "mean")
            enough = reduce(enough, to, "all")
        self.num_batches_tracked.add_(1)
        factor = 1.0 / self.num_batches_tracked.to(var.dtype) if self.momentum is None else self.momentum
        # A statistic of too few values (two for a variance, all others masked) teaches nothing.
        step = torch.where(enough, factor, torch.zeros_like(var))
        for running, value in ((self.running_mean, mean), (self.running_var, var)):
            if running is not None:
                wide = torch.promote_types(running.dtype, value.dtype)  # rounded once, as the kernels do
                before = running.to(wide)
                running.copy_(before.lerp(torch.where(enough, value.to(wide), before), step.to(wide)))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        # Like torch.nn: state dicts from before the counter existed load strictly.
        key = prefix + "num_batches_tracked"
        version = local_metadata.get("version")
        if (version is None or version < 2) and self.num_batches_tracked is not None and key not in state_dict:
            state_dict[key] = torch.zeros((), dtype=torch.long)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        parts = [repr(self.pattern)]
        if self.features is not None:
            parts.append(str(self.features[0]) if len(self.features) == 1 else str(tuple(self.features)))
        if self.axes is not None:
            parts.append(f"affine={self.axes!r}")
        parts.extend(f"{name}={size}" for name, size in self.sizes.items())
        return ", ".join([*parts, *self._settings()])

    def _settings(self) -> list[str]:
        """Settings that differ from the defaults, for the representation."""
        parts = []
        if self.features is not None and self.weight is None:
            parts.append("weight=False")
        if self.features is not None and self.bias is None:
            parts.append("bias=False")
        if not self.center:
            parts.append("center=False")
        if self.scale != "std":
            parts.append(f"scale={self.scale!r}")
        if self.eps is not None:
            parts.append(f"eps={self.eps:g}")
        if self.running is not None:
            parts.append(f"running={self.running!r}, momentum={self.momentum}")
        if self.sync:
            parts.append("sync=True")
        if self.activation is not None:
            parts.append(f"activation={self.activation!r}")
        return parts


def _shape(value: int | Sequence[int] | None, name: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    shape = (value,) if isinstance(value, int) else tuple(value)
    if not all(isinstance(size, int) and not isinstance(size, bool) for size in shape):
        raise TypeError(f"{name}={value!r} is not an integer or a sequence of integers.")
    if any(size < 1 for size in shape):
        raise ValueError(f"{name}={value!r} must be positive.")
    return shape


def check_positive(layer: str, **sizes: int) -> None:
    """One clear error for sizes that must be positive."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{layer} got {name}={size}, expected a positive number.")


def recomputing() -> bool:
    """Whether this forward pass runs inside a backward pass, as activation checkpointing does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def slices(x: Tensor) -> int:
    """How many rows of the first axis to work on at a time.

    On a CPU, temporary values of a slice stay in its cache; elsewhere there is one slice.
    """
    if x.device.type != "cpu" or x.numel() <= 1 << 18 or torch.compiler.is_compiling():
        return max(1, x.shape[0])
    return max(1, (x.shape[0] << 18) // x.numel())


def sum_of_products(a: Tensor, b: Tensor, dims: Sequence[int]) -> Tensor:
    """``(a * b).sum(dims)`` for axes counted from the front, in :func:`slices`."""
    if not dims:
        return a * b
    rows = slices(a)
    if rows >= a.shape[0] or (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
        return (a * b).sum(list(dims))
    parts = [(u * v).sum(list(dims)) for u, v in zip(a.split(rows), b.split(rows), strict=True)]
    return torch.stack(parts).sum(0) if 0 in dims else torch.cat(parts)


def refuse_second_derivative(layer: str) -> None:
    """To be called first in a backward pass that is not the derivative of a function, and so has none itself."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{layer} in training has no second derivative: its backward pass is no derivative, and moves its state. "
            f"Call backward() or grad() without create_graph=True, or put the layer in eval()."
        )


def check_axis(x: Tensor, axis: int, size: int, layer: str, minimum: int = 2) -> None:
    """One clear error where an input does not have the channels that a layer was made for."""
    if x.ndim < minimum:
        raise PatternError(
            f"{layer} expects an input of at least {minimum} axes, got {x.ndim}: shape {tuple(x.shape)}."
        )
    if x.shape[axis] != size:
        raise PatternError(
            f"{layer} was made for {size} channels, and axis {axis} of the input of shape {tuple(x.shape)} has "
            f"{x.shape[axis]}."
        )
