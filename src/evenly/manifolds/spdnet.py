r"""The layers of SPDNet: networks that take covariance matrices and keep them positive definite.

:class:`BiMap` :math:`X \mapsto W^\top X W` lowers the size with orthonormal columns W, :class:`ReEig` raises small
eigenvalues to a threshold (the nonlinearity), :class:`LogEig` takes the matrix logarithm, after which any layer of
torch may follow. Normalize between them with :class:`evenly.manifolds.LieBNSPD`.

Reference:
    Zhiwu Huang & Luc Van Gool, *A Riemannian Network for SPD Matrix Learning*, AAAI 2017, arXiv 1608.04233; the
    network of the experiments of LieBN, arXiv 2403.11261, section 6.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from evenly.manifolds import _extra
from evenly.manifolds.matrix_functions import log, rectify

__all__ = ["BiMap", "LogEig", "ReEig"]


class BiMap(nn.Module):
    """``W.T @ x @ W`` with orthonormal columns: an SPD matrix of a smaller size.

    Args:
        in_size: n of the input.
        out_size: n of the output, at most ``in_size``.
        parametrization: ``"manifold"``: ``weight`` is a ``geoopt.ManifoldParameter`` on the Stiefel manifold, to be
            trained with one of geoopt's optimizers (needs ``evenly[manifolds]``). ``"free"``:
            ``torch.nn.utils.parametrizations.orthogonal``, and any optimizer of torch trains it.
        device, dtype: of the weight.

    Shape:
        (..., in_size, in_size) to (..., out_size, out_size). ``weight`` (in_size, out_size) starts as a random
        orthonormal matrix.

    Raises:
        ValueError: ``out_size`` above ``in_size`` or below 1; another size of the input.
        TypeError: an input of another type than the weight.
        ImportError: ``parametrization="manifold"`` without geoopt.

    >>> layer = BiMap(5, 3, parametrization="free")
    >>> layer(torch.eye(5).expand(2, 5, 5)).shape
    torch.Size([2, 3, 3])
    """

    weight: Tensor

    def __init__(
        self,
        in_size: int,
        out_size: int,
        parametrization: Literal["manifold", "free"] = "manifold",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= out_size <= in_size:
            raise ValueError(f"out_size={out_size}, expected 1 to in_size={in_size}: columns have to be orthonormal.")
        self.in_size, self.out_size = in_size, out_size
        self.parametrization = _extra.check_parametrization(parametrization)
        weight = nn.init.orthogonal_(torch.empty(in_size, out_size, device=device, dtype=dtype))
        if parametrization == "manifold":
            geoopt = _extra.geoopt()
            self.weight = geoopt.ManifoldParameter(weight, manifold=geoopt.Stiefel())
        else:
            self.weight = nn.Parameter(weight)
            # The trivialization keeps the state in two plain tensors that any optimizer may move.
            parametrizations.orthogonal(self, "weight", orthogonal_map="matrix_exp")

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., in_size, in_size)."""
        if x.ndim < 2 or x.shape[-2:] != (self.in_size, self.in_size):
            raise ValueError(f"BiMap expects (..., {self.in_size}, {self.in_size}), got {tuple(x.shape)}.")
        with _exact(x):
            weight = self.weight
            if x.dtype != weight.dtype:
                raise TypeError(
                    f"BiMap holds {weight.dtype} and got {x.dtype}; convert one of them, such as by layer.double()."
                )
            y = weight.mT @ x @ weight
            return 0.5 * (y + y.mT)

    def extra_repr(self) -> str:
        return f"{self.in_size}, {self.out_size}, parametrization={self.parametrization!r}"


class ReEig(nn.Module):
    """Raise every eigenvalue to at least ``threshold``; raised ones get no gradient.

    Args:
        threshold: smallest eigenvalue of the result, above 0.

    Shape:
        (..., n, n), symmetric, to the same shape.

    Raises:
        ValueError: a threshold that is not positive; an input that is not square, not symmetric or not finite.
        TypeError: an input in another type than float32 or float64.

    >>> ReEig(1e-4)(torch.diag(torch.tensor([-1.0, 2.0]))).diagonal()
    tensor([1.0000e-04, 2.0000e+00])
    """

    def __init__(self, threshold: float = 1e-4) -> None:
        super().__init__()
        if not 0 < threshold < math.inf:
            raise ValueError(f"threshold={threshold}, expected a positive number.")
        self.threshold = float(threshold)

    def forward(self, x: Tensor) -> Tensor:
        """Rectify ``x``."""
        with _exact(x):
            return rectify(x, self.threshold)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold:g}"


class LogEig(nn.Module):
    """The matrix logarithm, as a matrix or as a vector.

    Args:
        flatten: return the n(n+1)/2 entries on and below the diagonal, those below times √2, so that the length of
            the vector is the Frobenius norm of the matrix.

    Shape:
        (..., n, n), symmetric positive definite, to (..., n, n), or (..., n(n+1)/2) with ``flatten``.

    Raises:
        ValueError, TypeError: see :func:`evenly.manifolds.spd.log`.

    >>> LogEig(flatten=True)(torch.eye(4).expand(2, 4, 4)).shape
    torch.Size([2, 10])
    """

    def __init__(self, flatten: bool = False) -> None:
        super().__init__()
        self.flatten = flatten

    def forward(self, x: Tensor) -> Tensor:
        """Take the logarithm of ``x``."""
        with _exact(x):
            y = log(x)
            if not self.flatten:
                return y
            n = y.shape[-1]
            rows, columns = torch.tril_indices(n, n, device=y.device)
            return y[..., rows, columns] * torch.where(rows == columns, 1.0, math.sqrt(2)).to(y)

    def extra_repr(self) -> str:
        return f"flatten={self.flatten}"


def _exact(x: Tensor) -> Any:
    """No autocast: half precision has too few digits for eigenvalues."""
    return torch.autocast(x.device.type, enabled=False)
