"""No normalization, with the interface of one: what a network without normalization has in its place.

.. math::  y = \\phi(x + r)

It lets one model definition serve every choice, "none" included, and is the baseline that a normalization has
to beat. Networks without normalization need an initialization of their own: see Zhang, Dauphin & Ma, *Fixup
Initialization*, ICLR 2019, arXiv 1901.09321.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evenly.core import PatternError
from evenly.core.normalize import Activation, check_activation

__all__ = ["NoNorm"]

_ACTIVATIONS = {"relu": torch.relu, "silu": nn.functional.silu, "gelu": nn.functional.gelu}


class NoNorm(nn.Module):
    """Add the residual, apply the activation, change nothing else.

    Args:
        activation: ``"relu"``, ``"silu"``, ``"gelu"`` or ``None``.

    Raises:
        ValueError: an unknown activation; a residual of another shape.

    >>> NoNorm(activation="relu")(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """

    def __init__(self, *, activation: Activation | None = None) -> None:
        super().__init__()
        check_activation(activation)
        self.activation: Activation | None = activation

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """``activation(x + residual)``, and 0 where ``mask`` is false."""
        if residual is not None:
            if residual.shape != x.shape:
                raise PatternError(
                    f"residual has shape {tuple(residual.shape)}, expected the shape of x, {tuple(x.shape)}."
                )
            x = x + residual
        if self.activation is not None:
            x = _ACTIVATIONS[self.activation](x)
        return x if mask is None else torch.where(mask, x, x.new_zeros(()))

    def extra_repr(self) -> str:
        return "" if self.activation is None else f"activation={self.activation!r}"
