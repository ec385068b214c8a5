"""Layer, RMS and scale normalization: one statistic a position, over its features.

.. math::
    \\text{LayerNorm: } y = \\frac{x - \\mu}{\\sqrt{\\sigma^2 + \\varepsilon}} \\odot w + b, \\qquad
    \\text{RMSNorm: } y = \\frac{x}{\\sqrt{\\overline{x^2} + \\varepsilon}} \\odot w, \\qquad
    \\text{ScaleNorm: } y = g \\frac{x}{\\max(\\lVert x \\rVert_2, \\varepsilon)}.

The same computation in training and evaluation, for any batch and any length: the default of transformers and
recurrent networks. RMSNorm saves the mean; ScaleNorm has one learned length a layer.

As functions they are patterns:

>>> import torch, evenly
>>> x, w, b = torch.randn(2, 10, 64), torch.ones(64), torch.zeros(64)
>>> y = evenly.normalize(x, "... d -> ...", weight=w, bias=b)
>>> y = evenly.normalize(x, "... d -> ...", weight=w, center=False, scale="rms")

References:
    Jimmy Lei Ba, Jamie Ryan Kiros & Geoffrey E. Hinton, *Layer Normalization*, 2016, arXiv 1607.06450.
    Biao Zhang & Rico Sennrich, *Root Mean Square Layer Normalization*, NeurIPS 2019, arXiv 1910.07467.
    Toan Q. Nguyen & Julian Salazar, *Transformers without Tears*, IWSLT 2019, arXiv 1910.05895, section 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from evenly.core import PatternError
from evenly.core.kernels.reference import accumulate_dtype
from evenly.core.normalize import Activation, Scale
from evenly.nn.norm import Norm, check_positive

__all__ = ["LayerNorm", "RMSNorm", "ScaleNorm"]


class _TrailingNorm(Norm):
    """A norm over the trailing axes of its input."""

    normalized_shape: tuple[int, ...]

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        *,
        elementwise_affine: bool,
        bias: bool,
        center: bool,
        scale: Scale,
        eps: float | None,
        activation: Activation | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if not shape:
            raise ValueError("normalized_shape is empty, expected the sizes of the trailing axes, such as (64,).")
        names = [f"d{i}" for i in range(len(shape))]
        super().__init__(
            f"... {' '.join(names)} -> ...",
            shape if elementwise_affine else None,
            bias=bias,
            center=center,
            scale=scale,
            eps=eps,
            activation=activation,
            device=device,
            dtype=dtype,
        )
        self.normalized_shape = shape
        self.elementwise_affine = elementwise_affine

    def _check_input(self, x: Tensor) -> None:
        if tuple(x.shape[-len(self.normalized_shape) :]) != self.normalized_shape:
            raise PatternError(
                f"{type(self).__name__} expects the trailing shape {self.normalized_shape}, got an input of shape "
                f"{tuple(x.shape)}."
            )

    def extra_repr(self) -> str:
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        eps = "None" if self.eps is None else f"{self.eps:g}"
        return f"{self.normalized_shape}, eps={eps}, elementwise_affine={self.elementwise_affine}{activation}"


class LayerNorm(_TrailingNorm):
    """Layer normalization, as ``torch.nn.LayerNorm``.

    Args:
        normalized_shape: sizes of the trailing axes to normalize over.
        eps: added to the variance.
        elementwise_affine: learn weight and bias of shape ``normalized_shape``.
        bias: learn a bias (with ``elementwise_affine``).
        activation: fused after it.
        device, dtype: of the parameters.

    Raises:
        ValueError: the trailing shape of the input is another.

    >>> y = LayerNorm(64)(torch.randn(2, 10, 64) * 3 + 1)
    >>> y.mean(-1).abs().max().item() < 1e-5
    True
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        activation: Activation | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            normalized_shape,
            elementwise_affine=elementwise_affine,
            bias=bias,
            center=True,
            scale="std",
            eps=eps,
            activation=activation,
            device=device,
            dtype=dtype,
        )


class RMSNorm(_TrailingNorm):
    """Root-mean-square normalization, as ``torch.nn.RMSNorm``.

    Args:
        normalized_shape: sizes of the trailing axes to normalize over.
        eps: added to the mean square; ``None``: the machine epsilon of float32 (of float64 for float64 input), as
            in ``torch.nn``.
        elementwise_affine: learn a weight of shape ``normalized_shape``.
        activation: fused after it.
        device, dtype: of the parameter.

    Raises:
        ValueError: the trailing shape of the input is another.

    >>> y = RMSNorm(64)(torch.randn(2, 10, 64) * 3)
    >>> torch.allclose(y.square().mean(-1), torch.ones(2, 10), atol=1e-4)
    True
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        activation: Activation | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            normalized_shape,
            elementwise_affine=elementwise_affine,
            bias=False,
            center=False,
            scale="rms",
            eps=eps,
            activation=activation,
            device=device,
            dtype=dtype,
        )

    def _eps(self, x: Tensor) -> float | None:
        # of the dtype of the statistics, as in torch.nn: float32 for half-precision input
        return torch.finfo(accumulate_dtype(x.dtype)).eps if self.eps is None else self.eps


class ScaleNorm(Norm):
    """One learned length: ``g * x / max(‖x‖, eps)`` along the last axis.

    It is RMSNorm with one gain for all features, up to the factor ``sqrt(dim)``.

    Args:
        dim: size of the last axis.
        eps: the least norm to divide by (a clamp, not a term under a root).
        init_scale: initial ``g``; default ``sqrt(dim)``.
        learnable: learn ``g``; otherwise it is a constant (the paper's fixed-g variant).
        activation: fused after it.
        device, dtype: of the parameter.

    Raises:
        ValueError: the last axis has another size; ``eps`` is not positive; ``init_scale`` is not finite.

    >>> y = ScaleNorm(16)(torch.randn(3, 16))
    >>> torch.allclose(y.norm(dim=-1), torch.full((3,), 4.0))
    True
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        *,
        init_scale: float | None = None,
        learnable: bool = True,
        activation: Activation | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(type(self).__name__, dim=dim)
        if eps <= 0:
            raise ValueError(f"eps={eps} must be positive.")
        self.init_scale = math.sqrt(dim) if init_scale is None else init_scale
        if not math.isfinite(self.init_scale):
            raise ValueError(f"init_scale={init_scale} is not finite.")
        super().__init__(
            "... d -> ...",
            (),
            bias=False,
            center=False,
            scale="l2",
            eps=eps,
            activation=activation,
            device=device,
            dtype=dtype,
        )
        self.dim = dim
        if self.weight is not None and not learnable:
            self.weight.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Set ``g`` to its initial value."""
        if self.weight is not None:
            nn.init.constant_(self.weight, self.init_scale)

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Normalize the last axis of ``x``; see :meth:`Norm.forward`."""
        if x.ndim == 0 or x.shape[-1] != self.dim:
            raise PatternError(f"ScaleNorm expects {self.dim} features last, got an input of shape {tuple(x.shape)}.")
        return super().forward(x, residual, mask)

    def extra_repr(self) -> str:
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        return f"{self.dim}, eps={self.eps:g}{activation}"
