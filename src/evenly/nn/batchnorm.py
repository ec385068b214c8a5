"""Batch normalization: one statistic a channel, over the batch.

.. math::
    y = \\gamma \\frac{x - \\mu_c}{\\sqrt{\\sigma_c^2 + \\varepsilon}} + \\beta, \\qquad
    \\mu_c, \\sigma_c^2 \\text{ over all samples and positions of channel } c.

The default for convolutional networks with 16 samples a device or more. In evaluation it is a constant affine
map of each channel, which :func:`evenly.convert` can fold into the layer before it. With few samples a device
use ``sync=True``, or :class:`~evenly.nn.GroupNorm`.

As a function it is a pattern: with the statistics of the batch, and with running ones,

>>> import torch, evenly
>>> x, w, b = torch.randn(8, 3, 4, 4), torch.ones(3), torch.zeros(3)
>>> y = evenly.normalize(x, "n c ... -> c", weight=w, bias=b)
>>> mean, var = torch.zeros(3), torch.ones(3)
>>> y = evenly.normalize(x, "n c ... -> c", weight=w, bias=b, stats=(mean, var))

Reference:
    Sergey Ioffe & Christian Szegedy, *Batch Normalization: Accelerating Deep Network Training by Reducing
    Internal Covariate Shift*, ICML 2015, arXiv 1502.03167, algorithms 1 and 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from evenly.core import normalize
from evenly.core.normalize import Activation, check_activation
from evenly.core.patterns import product
from evenly.nn.norm import Norm, check_axis, check_positive

__all__ = ["BatchNorm", "FrozenBatchNorm"]

_PATTERN = "n c ... -> c"


class BatchNorm(Norm):
    """Batch normalization of inputs (N, C, ...) of any rank from 2 on.

    Takes the arguments, state dicts and semantics of ``torch.nn.BatchNorm1d/2d/3d`` and ``SyncBatchNorm``:
    biased variance to normalize, unbiased variance in the running average.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of the new value in the running averages (0.1), or ``None`` for the plain average of
            all batches. TensorFlow's ``momentum`` is one minus this.
        affine: learn weight and bias.
        track_running_stats: keep ``running_mean`` and ``running_var`` and use them in evaluation; otherwise
            batch statistics are used there too.
        sync: in training, use the statistics of the joined batch of all processes of ``process_group``.
        process_group: default all processes.
        activation: fused after it.
        channel_dim: 1 for (N, C, ...), -1 for (..., C).
        device, dtype: of parameters and buffers.

    Raises:
        ValueError: in training, where a channel has one value only; a wrong number of channels or axes.

    Running statistics are updated once a forward pass in training, and not again when a pass is recomputed by
    activation checkpointing. With ``mask`` (broadcastable to the input) masked values do not count.

    >>> bn = BatchNorm(3)
    >>> y = bn(torch.randn(16, 3, 8, 8) * 5 + 2)
    >>> y.mean().abs().item() < 1e-5, bn.num_batches_tracked.item()
    (True, 1)
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        sync: bool = False,
        process_group: Any = None,
        activation: Activation | None = None,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(type(self).__name__, num_features=num_features)
        if channel_dim not in (1, -1):
            raise ValueError(f"channel_dim={channel_dim}, expected 1 for (N, C, ...) or -1 for (..., C).")
        pattern = _PATTERN if channel_dim == 1 else "... c -> c"
        super().__init__(
            pattern,
            num_features,
            affine="c",
            weight=affine,
            bias=affine,
            eps=eps,
            activation=activation,
            running=pattern,
            momentum=momentum,
            sync=sync,
            process_group=process_group,
            device=device,
            dtype=dtype,
        )
        self.num_features = num_features
        self.channel_dim = channel_dim
        self.affine = affine
        self.track_running_stats = track_running_stats
        if not track_running_stats:
            self.running_mean = self.running_var = self.num_batches_tracked = None

    def _check_input(self, x: Tensor) -> None:
        check_axis(x, self.channel_dim, self.num_features, type(self).__name__)

    def _check_batch(self, x: Tensor) -> None:
        values = product([size for axis, size in enumerate(x.shape) if axis != self.channel_dim % x.ndim])
        if values == 1 and not self.sync:
            raise ValueError(
                f"{type(self).__name__} needs more than 1 value per channel in training, got an input of shape "
                f"{tuple(x.shape)}. Use a larger batch, sync=True over several processes, GroupNorm, or eval()."
            )

    def extra_repr(self) -> str:
        parts = [f"{self.num_features}, eps={self.eps:g}, momentum={self.momentum}, affine={self.affine}"]
        parts.append(f"track_running_stats={self.track_running_stats}")
        if self.channel_dim != 1:
            parts.append(f"channel_dim={self.channel_dim}")
        if self.sync:
            parts.append("sync=True")
        if self.activation is not None:
            parts.append(f"activation={self.activation!r}")
        return ", ".join(parts)


class FrozenBatchNorm(nn.Module):
    """Batch normalization whose statistics and affine parameters are constants (buffers).

    For fine-tuning with batches too small to estimate statistics, as detectors do. It loads the state dict of
    a batch normalization and ignores ``num_batches_tracked``.

    Args:
        num_features: C.
        eps: added to the variance.
        activation: fused after it.
        device, dtype: of the buffers.

    >>> frozen = FrozenBatchNorm(3)
    >>> _ = frozen.load_state_dict(torch.nn.BatchNorm2d(3).state_dict())
    >>> list(frozen.parameters())
    []
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        activation: Activation | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(type(self).__name__, num_features=num_features)
        if not eps >= 0:
            raise ValueError(f"eps={eps}, expected a number of at least 0.")
        check_activation(activation)
        self.num_features = num_features
        self.eps = eps
        self.activation: Activation | None = activation
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_buffer("weight", torch.ones(num_features, **options))
        self.register_buffer("bias", torch.zeros(num_features, **options))
        self.register_buffer("running_mean", torch.zeros(num_features, **options))
        self.register_buffer("running_var", torch.ones(num_features, **options))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Scale and shift ``x`` of shape (N, C, ...)."""
        check_axis(x, 1, self.num_features, type(self).__name__)
        return normalize(
            x,
            _PATTERN,
            eps=self.eps,
            weight=self.weight,
            bias=self.bias,
            residual=residual,
            activation=self.activation,
            mask=mask,
            stats=(self.running_mean, self.running_var),
        )

    def extra_repr(self) -> str:
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        return f"{self.num_features}, eps={self.eps:g}{activation}"
