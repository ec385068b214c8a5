"""Rotary position embedding: queries and keys turned by their position, so that scores depend on distances.

Features are taken in pairs (0, 1), (2, 3), ..., and the pair i at position p is turned by the angle
p / base^(2i/d):

    even' = even cos - odd sin
    odd'  = even sin + odd cos

A rotation keeps lengths, so it commutes with the normalization of queries and keys.

Reference: Su et al., *RoFormer*, 2021, arXiv:2104.09864, section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Rotary"]

KINDS = ("true", "released")


class Rotary(nn.Module):
    """Turn vectors by their positions.

    Args:
        dim: features of a vector; even.
        base: the longest wavelength is about 2 pi times it.
        kind: ``"true"``, or ``"released"`` for what the released code of nGPT does with its table, which is no
            rotation (it shrinks vectors, and scores depend on absolute positions). Only for its checkpoints.

    Shape: (..., length, dim) to the same.

    Raises:
        ValueError: an odd ``dim``, a ``base`` that is not positive, an unknown kind.

    >>> x = torch.randn(2, 4, 10, 8)
    >>> torch.allclose(Rotary(8)(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-4)
    True
    """

    def __init__(self, dim: int, base: float = 10000.0, kind: str = "true") -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"rotary positions need an even number of features a head, got {dim}")
        if not base > 0:
            raise ValueError(f"the base of rotary positions is {base}, expected a positive number")
        if kind not in KINDS:
            raise ValueError(f"rope is {kind!r}, expected one of {', '.join(KINDS)}")
        self.dim = dim
        self.base = base
        self.kind = kind

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """Turn ``x``, whose first vector stands at position ``offset``."""
        # The table is made anew: at the sizes of attention it costs little, and there is no state to keep right.
        dtype = torch.promote_types(x.dtype, torch.float32)
        rates = self.base ** (-torch.arange(0, self.dim, 2, device=x.device, dtype=dtype) / self.dim)
        angle = torch.arange(offset, offset + x.shape[-2], device=x.device, dtype=dtype)[:, None] * rates
        sin, cos = angle.sin(), angle.cos()
        even, odd = x[..., 0::2].to(dtype), x[..., 1::2].to(dtype)
        if self.kind == "released":
            # The table has sine and cosine in turn, and is read as if all sines came first.
            first, second = torch.stack((sin, cos), -1).flatten(-2).chunk(2, -1)
            turned = torch.stack((-odd * second, even * first), -1)
        else:
            turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
        return turned.flatten(-2).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base:g}" + ("" if self.kind == "true" else f", kind={self.kind!r}")
