r"""Mean-only batch normalization: the mean of the batch is taken out, the scale stays.

.. math::
    y = t - μ_c + b_c, \qquad \frac{∂L}{∂t} = \frac{∂L}{∂y} - \frac1m \sum \frac{∂L}{∂y}
    \qquad \text{(mean and sum over all samples and positions of channel } c).

It centres both passes at less noise than the full batch normalization has, and leaves the scale to weight
normalization: put it after every layer of a network whose weights are normalized
(:func:`evenly.weights.weight_normalize_`), in place of the layer's bias. In evaluation it adds a constant a channel.

Reference:
    Tim Salimans & Diederik P. Kingma, *Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep
    Neural Networks*, NIPS 2016, arXiv 1602.07868, section 4, equations 8 and 9.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evenly.core.normalize import Activation
from evenly.nn.norm import Norm, check_axis, check_positive

__all__ = ["MeanOnlyBatchNorm"]


class MeanOnlyBatchNorm(Norm):
    """Subtract the mean of each channel and add a learned bias, for inputs (N, C, ...) of any rank from 2 on.

    Args:
        num_features: C.
        momentum: weight of the new value in the running mean (0.1), or ``None`` for the plain average of all batches.
        bias: learn a bias, initially 0.
        sync: in training, use the mean of the joined batch of all processes of ``process_group`` (default all).
        process_group: the processes to share with.
        activation: fused after it.
        channel_dim: 1 for (N, C, ...), -1 for (..., C).
        device, dtype: of parameters and buffers.

    Raises:
        ValueError: in training, where a channel has one value only, whose output would be the bias whatever it is; a
            wrong number of channels or axes; momentum outside [0, 1].

    Buffers: ``running_mean`` (C,), used in evaluation, and ``num_batches_tracked``.

    >>> layer = MeanOnlyBatchNorm(2)
    >>> layer(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
    tensor([[ -1., -10.],
            [  1.,  10.]], grad_fn=...)
    >>> layer.running_mean
    tensor([0.2000, 2.0000])
    """

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 0.1,
        bias: bool = True,
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
        pattern = "n c ... -> c" if channel_dim == 1 else "... c -> c"
        super().__init__(
            pattern,
            num_features,
            affine="c",
            weight=False,
            bias=bias,
            scale=None,
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

    def _check_input(self, x: Tensor) -> None:
        check_axis(x, self.channel_dim, self.num_features, type(self).__name__)

    def _check_batch(self, x: Tensor) -> None:
        if x.numel() == self.num_features and not self.sync:
            raise ValueError(
                f"{type(self).__name__} needs more than 1 value per channel in training, got an input of shape "
                f"{tuple(x.shape)}. Use a larger batch, sync=True over several processes, or eval()."
            )

    def extra_repr(self) -> str:
        parts = [f"{self.num_features}, momentum={self.momentum}, bias={self.bias is not None}"]
        if self.channel_dim != 1:
            parts.append(f"channel_dim={self.channel_dim}")
        if self.sync:
            parts.append("sync=True")
        if self.activation is not None:
            parts.append(f"activation={self.activation!r}")
        return ", ".join(parts)
