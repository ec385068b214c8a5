"""A fitted standardizer as a layer: a fixed invertible affine map of the features.

.. math::  y = T (x - \\mu), \\qquad x = T^{-1} y + \\mu,

with μ, T and its inverse as buffers. A teacher wrapped in it gives the targets that a student learns; when the
student is done, the inverse is folded into the last layer of its head (:math:`W' = T^{-1} W`,
:math:`b' = T^{-1} b + \\mu`), which then gives the teacher's own features at no cost.

Reference:
    M. Ranzinger et al., *PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation*, ICLR 2025,
    arXiv 2410.01680, section 3 (training in the normalized space, features at inference).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from evenly.core.kernels.reference import accumulate_dtype
from evenly.core.normalize import _check_input
from evenly.core.whiten import _full_precision
from evenly.nn.norm import check_axis, check_positive

__all__ = ["Standardize"]


class Standardize(nn.Module):
    """Apply a fixed invertible affine map to the features: (..., C), or (N, C, ...) with ``channel_dim=1``.

    Made by :meth:`PHIStandardizer.to_layer`; built directly it is the identity, into which a state dict loads.
    The products run without autocast, in float32 at least, and the result has the type of the input.

    Args:
        num_features: C.
        channel_dim: the axis of the features.
        diagonal: each feature is scaled alone: the matrices are kept as their diagonals.
        device, dtype: of the buffers.

    Shape:
        any input with C features along ``channel_dim``; the output has its shape.

    Raises:
        ValueError: ``num_features`` is not positive; an input without C features along ``channel_dim``.
        TypeError: an input that is not floating-point.

    Attributes:
        mean: (C,), μ.
        matrix: T, (C, C), or (C,) where ``diagonal``.
        inverse_matrix: T⁻¹, of the same shape.

    Reference:
        arXiv 2410.01680, section 3.

    >>> from evenly.stats import PHIStandardizer
    >>> features = torch.randn(6, 8, 5, 5) * torch.arange(1.0, 9.0).reshape(8, 1, 1)
    >>> layer = PHIStandardizer().fit(features.movedim(1, -1)).to_layer(channel_dim=1)
    >>> y = layer(features)
    >>> torch.allclose(y.var((0, 2, 3)), torch.ones(8), atol=1e-4)
    True
    >>> torch.allclose(layer.inverse(y), features, atol=1e-4)
    True
    """

    mean: Tensor
    matrix: Tensor
    inverse_matrix: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        channel_dim: int = -1,
        diagonal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(type(self).__name__, num_features=num_features)
        self.num_features = num_features
        self.channel_dim = channel_dim
        self.diagonal = diagonal
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_buffer("mean", torch.zeros(num_features, **options))
        for name in ("matrix", "inverse_matrix"):
            eye = torch.ones(num_features, **options) if diagonal else torch.eye(num_features, **options)
            self.register_buffer(name, eye)

    def forward(self, x: Tensor) -> Tensor:
        """T (x - μ)."""
        self._check(x)
        with _full_precision(x.device.type):
            wide = x.to(self._type(x))
            return self._apply_matrix(wide - self._spread(self.mean, wide), self.matrix).to(x.dtype)

    def inverse(self, y: Tensor) -> Tensor:
        """T⁻¹ y + μ."""
        self._check(y)
        with _full_precision(y.device.type):
            out = self._apply_matrix(y.to(self._type(y)), self.inverse_matrix)
            return (out + self._spread(self.mean, out)).to(y.dtype)

    def fold_(self, layer: nn.Module) -> nn.Module:
        """Make ``layer`` give what it gave, standardized: :math:`W' = TW, b' = T(b - \\mu)`. In place.

        Args:
            layer: an ``nn.Linear`` or ``nn.Conv1d/2d/3d`` with C outputs (in one group, unless ``diagonal``). It gets a
                bias where it has none.

        Returns:
            ``layer``.

        Raises:
            TypeError: another kind of layer.
            ValueError: another number of outputs, groups, or a parametrized weight.
        """
        bias = self._fold(layer, self.matrix, before=-self.mean.double())
        return self._write(layer, *bias)

    def fold_inverse_(self, layer: nn.Module) -> nn.Module:
        """Make ``layer``, which gave standardized features, give the features: :math:`W' = T^{-1}W,
        b' = T^{-1}b + \\mu`. In place. Arguments and errors as in :meth:`fold_`.

        >>> standardize, head = Standardize(4), torch.nn.Linear(3, 4)
        >>> _ = standardize.mean.fill_(2.0), standardize.inverse_matrix.mul_(3.0)
        >>> h = torch.randn(5, 3)
        >>> want = standardize.inverse(head(h))
        >>> torch.allclose(standardize.fold_inverse_(head)(h), want, atol=1e-5)
        True
        """
        bias = self._fold(layer, self.inverse_matrix, after=self.mean.double())
        return self._write(layer, *bias)

    def to_linear(self, inverse: bool = False) -> nn.Linear:
        """The map, or its inverse, as an ``nn.Linear`` for features last."""
        layer = nn.Linear(self.num_features, self.num_features, device=self.mean.device, dtype=self.mean.dtype)
        return self._as_layer(layer, torch.eye(self.num_features), inverse)  # type: ignore[return-value]

    def to_conv1x1(self, inverse: bool = False) -> nn.Conv2d:
        """The map, or its inverse, as a 1 x 1 convolution of images (N, C, H, W)."""
        layer = nn.Conv2d(self.num_features, self.num_features, 1, device=self.mean.device, dtype=self.mean.dtype)
        return self._as_layer(layer, torch.eye(self.num_features)[..., None, None], inverse)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"{self.num_features}, channel_dim={self.channel_dim}, diagonal={self.diagonal}"

    def _check(self, x: Tensor) -> None:
        name, axis = type(self).__name__, self.channel_dim
        _check_input(x, name)
        check_axis(x, axis, self.num_features, name, minimum=-axis if axis < 0 else axis + 1)

    def _type(self, x: Tensor) -> torch.dtype:
        return torch.promote_types(accumulate_dtype(x.dtype), self.mean.dtype)

    def _spread(self, value: Tensor, x: Tensor) -> Tensor:
        shape = [1] * x.ndim
        shape[self.channel_dim] = -1
        return value.to(x.dtype).reshape(shape)

    def _apply_matrix(self, x: Tensor, matrix: Tensor) -> Tensor:
        if self.diagonal:
            return x * self._spread(matrix, x)
        axis, matrix = self.channel_dim % x.ndim, matrix.to(x.dtype)
        last = x.movedim(axis, -1)
        if axis == x.ndim - 1 or last.is_contiguous():
            return (last @ matrix.mT).movedim(-1, axis)
        return (matrix @ x.flatten(axis + 1)).reshape(x.shape)

    def _fold(
        self, layer: nn.Module, matrix: Tensor, *, before: Tensor | float = 0.0, after: Tensor | float = 0.0
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            raise TypeError(f"fold_ takes nn.Linear or nn.Conv1d, 2d, 3d, got {type(layer).__name__}.")
        if parametrize.is_parametrized(layer):
            raise ValueError(
                "the layer is parametrized, so its weight is computed anew at each call. Call "
                "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') first."
            )
        if layer.weight.shape[0] != self.num_features:
            raise ValueError(f"the layer has {layer.weight.shape[0]} outputs, expected {self.num_features}.")
        if getattr(layer, "groups", 1) > 1 and not self.diagonal:
            raise ValueError(f"the layer has groups={layer.groups}, and the map mixes its outputs; expected groups=1.")
        matrix = matrix.double()
        weight = layer.weight.detach().double().flatten(1)
        bias = 0.0 if layer.bias is None else layer.bias.detach().double()
        shifted = torch.zeros_like(self.mean, dtype=torch.float64) + bias + before
        if self.diagonal:
            return matrix[:, None] * weight, matrix * shifted + after
        return matrix @ weight, matrix @ shifted + after

    @staticmethod
    def _write(layer: Any, weight: Tensor, bias: Tensor) -> nn.Module:
        with torch.no_grad():
            layer.weight.copy_(weight.reshape(layer.weight.shape))
            if layer.bias is None:
                layer.bias = nn.Parameter(layer.weight.new_zeros(layer.weight.shape[0]))
            layer.bias.copy_(bias)
        return layer

    def _as_layer(self, layer: Any, eye: Tensor, inverse: bool) -> nn.Module:
        with torch.no_grad():
            layer.weight.copy_(eye)
            layer.bias.zero_()
        return self.fold_inverse_(layer) if inverse else self.fold_(layer)
