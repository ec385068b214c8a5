"""Group and instance normalization: statistics within one sample.

.. math::
    y = \\gamma_c \\frac{x - \\mu_{n,g}}{\\sqrt{\\sigma_{n,g}^2 + \\varepsilon}} + \\beta_c, \\qquad
    \\mu_{n,g}, \\sigma_{n,g}^2 \\text{ over the channels of group } g \\text{ and all positions of sample } n.

Group normalization does not look at the batch: use it for batches too small for batch normalization, in
detection, segmentation, video, federated and private training. One group is layer normalization over a whole
sample; as many groups as channels is instance normalization, which removes contrast and style.

References:
    Yuxin Wu & Kaiming He, *Group Normalization*, ECCV 2018, arXiv 1803.08494.
    Dmitry Ulyanov, Andrea Vedaldi & Victor Lempitsky, *Instance Normalization*, 2016, arXiv 1607.08022.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evenly.core import PatternError
from evenly.core.normalize import Activation
from evenly.core.patterns import product
from evenly.nn.norm import Norm, check_axis, check_positive

__all__ = ["GroupNorm", "InstanceNorm"]


class GroupNorm(Norm):
    """Group normalization of inputs (N, C, ...), as ``torch.nn.GroupNorm``.

    Args:
        num_groups: how many groups the channels are split into; divides ``num_channels``.
        num_channels: C.
        eps: added to the variance.
        affine: learn weight and bias, one a channel.
        activation: fused after it.
        device, dtype: of the parameters.

    Raises:
        ValueError: ``num_groups`` does not divide ``num_channels``; a wrong number of channels.

    >>> GroupNorm(2, 6)(torch.randn(1, 6, 4, 4)).shape
    torch.Size([1, 6, 4, 4])
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        activation: Activation | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(type(self).__name__, num_groups=num_groups, num_channels=num_channels)
        if num_channels % num_groups:
            divisors = [g for g in range(1, num_channels + 1) if num_channels % g == 0]
            raise ValueError(
                f"num_groups={num_groups} does not divide num_channels={num_channels}; its divisors are {divisors}."
            )
        super().__init__(
            "n (g c) ... -> n g",
            num_channels,
            affine="(g c)",
            weight=affine,
            bias=affine,
            eps=eps,
            activation=activation,
            device=device,
            dtype=dtype,
            g=num_groups,
        )
        self.num_groups = num_groups
        self.num_channels = num_channels
        self.affine = affine

    def _check_input(self, x: Tensor) -> None:
        check_axis(x, 1, self.num_channels, type(self).__name__)

    def extra_repr(self) -> str:
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps:g}, affine={self.affine}{activation}"


class InstanceNorm(Norm):
    """Instance normalization of inputs (N, C, L...), as ``torch.nn.InstanceNorm1d/2d/3d`` on batches.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of the new value in the running averages.
        affine: learn weight and bias, one a channel (``torch.nn``'s default is not to).
        track_running_stats: keep running averages of the statistics, averaged over samples, and use them in
            evaluation, which is then a constant affine map.
        activation: fused after it.
        device, dtype: of parameters and buffers.

    Raises:
        ValueError: an input with one position a channel, whose output would be zero; wrong channels.

    >>> y = InstanceNorm(3)(torch.randn(2, 3, 8, 8) * 7)
    >>> torch.allclose(y.std(dim=(2, 3), correction=0), torch.ones(2, 3), atol=1e-4)
    True
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        *,
        activation: Activation | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(type(self).__name__, num_features=num_features)
        super().__init__(
            "n c ... -> n c",
            num_features,
            affine="c",
            weight=affine,
            bias=affine,
            eps=eps,
            activation=activation,
            running="n c ... -> c" if track_running_stats else None,
            momentum=momentum,
            device=device,
            dtype=dtype,
        )
        self.num_features = num_features
        self.affine = affine
        self.track_running_stats = track_running_stats

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Normalize ``x`` of shape (N, C, L...); see :meth:`Norm.forward`."""
        check_axis(x, 1, self.num_features, type(self).__name__)
        if (self.training or not self.track_running_stats) and product(x.shape[2:]) == 1:
            raise PatternError(
                f"InstanceNorm needs more than 1 position per channel, got an input of shape {tuple(x.shape)}, whose "
                f"output would be zero. Use GroupNorm or LayerNorm."
            )
        return super().forward(x, residual, mask)

    def extra_repr(self) -> str:
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        return (
            f"{self.num_features}, eps={self.eps:g}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}{activation}"
        )
