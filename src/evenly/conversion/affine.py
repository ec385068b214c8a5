"""``ChannelAffine``: a scale and a shift a channel, what is left of a normalization that is taken out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evenly.nn import NoNorm

__all__ = ["ChannelAffine"]


class ChannelAffine(NoNorm):
    """``activation(weight * x + bias + residual)``, one weight and bias a channel.

    Args:
        num_features: channels.
        channel_dim: 1 for (N, C, ...), -1 for (..., C).
        activation: fused after it.
        device, dtype: of the parameters.

    >>> layer = ChannelAffine(3)
    >>> x = torch.randn(2, 3, 4, 4)
    >>> torch.equal(layer(x), x)
    True
    """

    def __init__(
        self,
        num_features: int,
        channel_dim: int = 1,
        *,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(activation=activation)  # type: ignore[arg-type]
        self.num_features = num_features
        self.channel_dim = channel_dim
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Scale and shift ``x``, then as :class:`evenly.nn.NoNorm`."""
        shape = [1] * x.ndim
        shape[self.channel_dim] = self.num_features
        return super().forward(x * self.weight.view(shape) + self.bias.view(shape), residual, mask)

    def extra_repr(self) -> str:
        rest = super().extra_repr()
        return f"{self.num_features}, channel_dim={self.channel_dim}" + (f", {rest}" if rest else "")
