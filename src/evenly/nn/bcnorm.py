r"""Batch-channel normalization: batch normalization, then group normalization, at any batch size.

A network with rectified units has *elimination singularities*: channels that are never active, whose weights no
longer matter. Batch normalization keeps channels away from them, since every channel is active about half of the
time; layer and group normalization do not. Batch-channel normalization puts a group normalization after a batch
normalization, whose statistics may be running *estimates*, so that it also works with 1 or 2 images a device:

.. math::
    \hat μ ← (1 - r) \hat μ + r\, m_B, \quad
    \hat σ^2 ← (1 - r) \hat σ^2 + r\, \overline{(x - \hat μ_{old})^2}, \quad
    y = γ^b \frac{x - \hat μ}{\sqrt{\hat σ^2 + ε}} + β^b, \quad
    z = γ^c_g \frac{y - μ_{n,g}}{\sqrt{σ_{n,g}^2 + ε}} + β^c_g .

The estimates are constants for the gradient. With large batches use batch statistics instead (``estimate=False``).
In both forms standardize the weights of the convolutions before it
(:func:`evenly.weights.weight_standardize_`), and start the weight of the last normalization of each residual branch
at 0 (``nn.init.zeros_(norm.weight)``).

Reference:
    Siyuan Qiao, Huiyu Wang, Chenxi Liu, Wei Shen & Alan Yuille, *Micro-Batch Training with Batch-Channel
    Normalization and Weight Standardization*, 2019, arXiv 1903.10520, equations 11 to 13 and algorithm 1.

Where the paper and its released code differ:
    The paper writes the channel normalization's weight and bias per channel; the code has one of each per group,
    which is the default here (``channel_affine="group"``).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from evenly.core import moments, normalize
from evenly.core.normalize import Activation
from evenly.nn.batchnorm import BatchNorm
from evenly.nn.norm import Norm, check_axis, recomputing
from evenly.nn.sync import sync_moments

__all__ = ["BCNorm", "ChannelActivity", "EstBatchNorm", "channel_activity", "set_moving_speed_"]

_PATTERN = "n c ... -> c"


class EstBatchNorm(nn.Module):
    """Batch normalization by estimated statistics, in training as in evaluation, for micro-batches (N, C, ...).

    Args:
        num_features: C.
        eps: added to the variance.
        moving_speed: r in [0, 1], the weight of the new batch in the estimates. It is no momentum with a good
            default: start at 0.1, or 0.01 with 1 or 2 images, and let it follow the learning rate
            (:func:`set_moving_speed_`). With 0, as built, the estimates stay at mean 0 and variance 1.
        affine: learn weight and bias, one a channel.
        sync: estimate from the joined batch of all processes of ``process_group`` (default all); without it the
            estimates of processes drift apart.
        process_group: the processes to share with.
        activation: fused after it.
        device, dtype: of parameters and buffers.

    Raises:
        ValueError: a speed outside [0, 1], negative eps, a wrong number of channels or axes.

    Buffers: ``running_mean`` (0), ``running_var`` (1), ``num_batches_tracked``, ``moving_speed``. The output is
    normalized by the estimates *after* they have moved. The second one is a moment about the old mean, and
    overestimates the variance while the mean moves.

    >>> layer = EstBatchNorm(2, moving_speed=1.0)
    >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    >>> torch.equal(layer(x), layer.eval()(x)), layer.running_mean
    (True, tensor([ 2., 20.]))
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    moving_speed: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        moving_speed: float = 0.0,
        affine: bool = True,
        *,
        sync: bool = False,
        process_group: Any = None,
        activation: Activation | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features={num_features} must be positive.")
        if not eps >= 0:
            raise ValueError(f"eps={eps}, expected a number of at least 0.")
        self.num_features = num_features
        self.eps = eps
        self.affine = affine
        self.sync = sync
        self.process_group = process_group
        self.activation: Activation | None = activation
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(num_features, **options)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features, **options)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features, **options))
        self.register_buffer("running_var", torch.ones(num_features, **options))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=device))
        self.register_buffer("moving_speed", torch.full((), _checked_speed(moving_speed), **options))

    def set_moving_speed(self, speed: float) -> None:
        """Set r, the weight of the new batch, in [0, 1]."""
        self.moving_speed.fill_(_checked_speed(speed))

    def reset_running_stats(self) -> None:
        """Forget the estimates: mean 0, variance 1. The speed stays."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, estimates forgotten."""
        self.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Move the estimates in training, and normalize ``x`` by them; see :meth:`Norm.forward`."""
        check_axis(x, 1, self.num_features, type(self).__name__)
        stats = self._move(x, mask) if self.training and not recomputing() else (self.running_mean, self.running_var)
        return normalize(
            x,
            _PATTERN,
            eps=self.eps,
            weight=self.weight,
            bias=self.bias,
            affine="c",
            residual=residual,
            activation=self.activation,
            mask=mask,
            stats=stats,
        )

    @torch.no_grad()
    def _move(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        batch = moments(x, _PATTERN, mask=mask)
        if self.sync:
            batch = sync_moments(batch, self.process_group)
        old_mean, old_var = self.running_mean.to(batch.mean.dtype), self.running_var.to(batch.mean.dtype)
        speed = self.moving_speed.to(batch.mean.dtype)
        about_old = batch.var + (batch.mean - old_mean).square()
        some = batch.count > 0
        mean = torch.where(some, torch.lerp(old_mean, batch.mean, speed), old_mean)
        var = torch.where(some, torch.lerp(old_var, about_old, speed), old_var)
        self.running_mean.copy_(mean)
        self.running_var.copy_(var)
        self.num_batches_tracked.add_(1)
        return mean, var

    def extra_repr(self) -> str:
        parts = [f"{self.num_features}, eps={self.eps:g}, affine={self.affine}"]
        if not self.moving_speed.is_meta:
            parts.append(f"moving_speed={float(self.moving_speed):g}")
        if self.sync:
            parts.append("sync=True")
        if self.activation is not None:
            parts.append(f"activation={self.activation!r}")
        return ", ".join(parts)


class BCNorm(Norm):
    """Batch-channel normalization of inputs (N, C, ...): ``bn``, then group normalization.

    Args:
        num_channels: C.
        num_groups: G, divides C.
        eps: added to both variances.
        estimate: ``bn`` is :class:`EstBatchNorm` (micro-batches) instead of :class:`~evenly.nn.BatchNorm`.
        moving_speed: of the estimates; see :class:`EstBatchNorm`. Only with ``estimate=True``.
        channel_affine: weight and bias of the channel normalization are one a ``"group"`` (the released code) or
            one a ``"channel"`` (the paper's formula). ``bn`` has one a channel in both.
        momentum: of the running statistics of ``bn`` without ``estimate``.
        sync: ``bn`` shares statistics with all processes of ``process_group`` (default all).
        process_group: the processes to share with.
        activation: fused after it.
        device, dtype: of parameters and buffers.

    Raises:
        ValueError: groups that do not divide the channels; an unknown ``channel_affine``; a moving speed without
            ``estimate`` or outside [0, 1]; a wrong number of channels or axes; in training without ``estimate``, one
            value a channel.

    Cost: that of a batch normalization and a group normalization.

    >>> y = BCNorm(8, 2)(torch.randn(4, 8, 5, 5) * 3 + 1)
    >>> y.view(4, 2, -1).mean(2).abs().max().item() < 1e-5
    True
    """

    def __init__(
        self,
        num_channels: int,
        num_groups: int = 32,
        eps: float = 1e-5,
        estimate: bool = False,
        moving_speed: float = 0.0,
        channel_affine: Literal["group", "channel"] = "group",
        *,
        momentum: float | None = 0.1,
        sync: bool = False,
        process_group: Any = None,
        activation: Activation | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_groups < 1 or num_channels % num_groups:
            divisors = [g for g in range(1, num_channels + 1) if num_channels % g == 0]
            raise ValueError(
                f"num_groups={num_groups} does not divide num_channels={num_channels}; its divisors are {divisors}."
            )
        if channel_affine not in ("group", "channel"):
            raise ValueError(f"channel_affine={channel_affine!r} is unknown, expected 'group' or 'channel'.")
        if moving_speed and not estimate:
            raise ValueError(f"moving_speed={moving_speed} is of estimated statistics: give estimate=True.")
        by_group = channel_affine == "group"
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            "n (g c) ... -> n g",
            num_groups if by_group else num_channels,
            affine="g" if by_group else "(g c)",
            eps=eps,
            activation=activation,
            g=num_groups,
            **options,
        )
        self.num_channels = num_channels
        self.num_groups = num_groups
        self.estimate = estimate
        self.channel_affine = channel_affine
        shared: dict[str, Any] = {"sync": sync, "process_group": process_group, **options}
        self.bn: EstBatchNorm | BatchNorm
        if estimate:
            self.bn = EstBatchNorm(num_channels, eps, moving_speed, **shared)
        else:
            self.bn = BatchNorm(num_channels, eps, momentum, **shared)

    def set_moving_speed(self, speed: float) -> None:
        """Set the weight of the new batch in the estimates, in [0, 1]."""
        if not isinstance(self.bn, EstBatchNorm):
            raise ValueError("This layer uses batch statistics, which have no moving speed: build with estimate=True.")
        self.bn.set_moving_speed(speed)

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Normalize ``x`` of shape (N, C, ...); see :meth:`Norm.forward`."""
        check_axis(x, 1, self.num_channels, type(self).__name__)
        return super().forward(self.bn(x, mask=mask), residual, mask)

    def extra_repr(self) -> str:
        parts = [f"{self.num_channels}, {self.num_groups}, eps={self.eps:g}, estimate={self.estimate}"]
        if self.channel_affine != "group":
            parts.append(f"channel_affine={self.channel_affine!r}")
        if self.activation is not None:
            parts.append(f"activation={self.activation!r}")
        return ", ".join(parts)


def set_moving_speed_(model: nn.Module, speed: float) -> int:
    """Set the moving speed of every estimated batch normalization of a model, in place.

    Args:
        model: any module.
        speed: r in [0, 1]. To let it follow the learning rate, call this each step with ``base * lr / lr_0``.

    Returns:
        How many layers there were.

    Raises:
        ValueError: a speed outside [0, 1]; a model without such a layer.

    >>> set_moving_speed_(nn.Sequential(BCNorm(4, 2, estimate=True), nn.ReLU()), 0.01)
    1
    """
    layers = [module for module in model.modules() if isinstance(module, EstBatchNorm)]
    if not layers:
        raise ValueError("The model has no estimated batch normalization: use BCNorm(..., estimate=True).")
    for layer in layers:
        layer.set_moving_speed(speed)
    return len(layers)


class ChannelActivity(NamedTuple):
    """How alive channels are before a rectifier.

    Attributes:
        fraction: of each channel, the fraction of positive values; near 0 the channel is eliminated.
        share: of each channel, its mean after the rectifier over that of all channels; about 1 each where channels
            are alike (NaN where no channel is active).
    """

    fraction: Tensor
    share: Tensor


def channel_activity(x: Tensor) -> ChannelActivity:
    """How near the channels of pre-activations (N, C, ...) are to being eliminated by a rectifier.

    Raises:
        ValueError: fewer than 2 axes, or no values.

    >>> channel_activity(torch.tensor([[1.0, -1.0], [3.0, -2.0]]))
    ChannelActivity(fraction=tensor([1., 0.]), share=tensor([2., 0.]))
    """
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"channel_activity expects values (N, C, ...), got shape {tuple(x.shape)}.")
    dims = [axis for axis in range(x.ndim) if axis != 1]
    with torch.no_grad():
        positive = x.detach().relu().mean(dims, dtype=torch.float32)
        return ChannelActivity((x > 0).mean(dims, dtype=torch.float32), positive / positive.mean())


def _checked_speed(speed: float) -> float:
    if not 0 <= speed <= 1:
        raise ValueError(f"moving_speed={speed} is outside [0, 1]; it is the weight of the new batch.")
    return float(speed)
