"""A normalization followed by what comes after it: add a residual, apply an activation.

Layers of :mod:`evenly.nn` can do all three in one pass over memory; any other module is followed by plain
PyTorch operations. Networks write ``NormedActivation`` once and get the fused form where it exists.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["NormedActivation"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
}


class NormedActivation(nn.Module):
    """``activation(norm(x) + residual)``, fused where the layer can.

    Args:
        norm: any module that keeps the shape of its input.
        activation: ``"relu"``, ``"silu"``, ``"gelu"`` or ``None``.

    Shape: (N, C, ...) to the same shape. ``residual`` has that shape too.

    >>> import torch
    >>> NormedActivation(nn.Identity(), "relu")(torch.tensor([-1.0, 1.0]))
    tensor([0., 1.])
    """

    def __init__(self, norm: nn.Module, activation: str | None = None) -> None:
        super().__init__()
        if activation is not None and activation not in _ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}, expected None or one of {', '.join(_ACTIVATIONS)}")
        self.norm = norm
        self.activation = activation
        self.takes_residual = "residual" in inspect.signature(type(norm).forward).parameters
        # A layer with an `activation` of its own applies it after the residual, in the same kernel.
        self.fused = self.takes_residual and activation is not None and _set_activation(norm, activation)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            x = self.norm(x)
        elif self.takes_residual:
            x = self.norm(x, residual=residual)
        else:
            x = self.norm(x) + residual
        if self.activation is None or self.fused:
            return x
        return _ACTIVATIONS[self.activation](x)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, fused={self.fused}"


def _set_activation(norm: nn.Module, activation: str) -> bool:
    if not type(norm).__module__.startswith("evenly.nn") or getattr(norm, "activation", "absent") is not None:
        return False
    norm.activation = activation  # type: ignore[assignment]
    return True
