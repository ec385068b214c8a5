r"""What a Lie group with an invariant metric has to offer so that batches of its points can be normalized.

A geometry maps points into a *working space* (:meth:`Geometry.deform`), where the product :math:`\odot`, the
logarithm and exponential at the identity and the mean are simple, and back (:meth:`Geometry.undeform`). With them come
the quantities on the points themselves: :meth:`Geometry.distance`, :meth:`Geometry.geodesic`,
:meth:`Geometry.frechet_mean`, :meth:`Geometry.frechet_variance`, :meth:`Geometry.product`, :meth:`Geometry.inverse`.

:class:`evenly.manifolds.SPD`, :class:`evenly.manifolds.SO3` and :class:`evenly.manifolds.Correlation` are geometries;
the layers of :mod:`evenly.manifolds.liebn` are written for any of them. Since the metric is invariant,
:math:`d(P, Q) = \|\mathrm{Log}_E(Q^{-1} \odot P)\|`.

Reference:
    Ziheng Chen, Yue Song, Yunmei Liu & Nicu Sebe, *A Lie Group Approach to Riemannian Batch Normalization*,
    ICLR 2024, arXiv 2403.11261, section 3.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from evenly.manifolds.matrix_functions import Eig

__all__ = ["Center", "FlatGeometry", "Geometry", "Tangent"]


class Tangent(NamedTuple):
    """Vectors at the identity, (..., n, n), and their eigendecomposition where it is known."""

    value: Tensor
    eig: Eig | None = None

    def scaled(self, factor: Tensor) -> Tangent:
        """The vectors times ``factor`` (..., 1, 1)."""
        eig = self.eig
        if eig is not None:
            with torch.no_grad():
                eig = Eig(eig.values * factor.squeeze(-1), eig.vectors)
        return Tangent(self.value * factor, eig)


class Center(NamedTuple):
    """A mean in the working space and, where it is known, the eigendecomposition of the batch centred by it."""

    value: Tensor
    eig: Eig | None = None


class Geometry(ABC):
    """A Lie group of n x n matrices with an invariant metric."""

    #: what a point is called in messages
    points = "points"

    # ---- the working space -------------------------------------------------------------------------------

    @abstractmethod
    def deform(self, points: Tensor) -> Tensor:
        """Check points (..., n, n) and map them into the working space."""

    @abstractmethod
    def undeform(self, w: Tensor) -> Tensor:
        """Map the working space back to points."""

    @abstractmethod
    def identity(self, n: int) -> Tensor:
        """The neutral element in the working space, (n, n) in float64."""

    @abstractmethod
    def mean(self, w: Tensor, dims: Sequence[int], steps: int | None = None, tol: float | None = None) -> Center:
        """The Fréchet mean over axes, which are kept with size 1."""

    @abstractmethod
    def log(self, w: Tensor, at: Center) -> Tangent:
        """Centre by a mean and take the logarithm at the identity."""

    @abstractmethod
    def exp(self, tangent: Tangent) -> Tensor:
        """The exponential at the identity."""

    @abstractmethod
    def square_norm(self, tangent: Tensor) -> Tensor:
        """Squared length (...) of vectors (..., n, n) at the identity."""

    @abstractmethod
    def translate(self, w: Tensor, by: Tensor) -> Tensor:
        """The group's product of ``by`` with ``w``."""

    @abstractmethod
    def between(self, start: Tensor, end: Tensor, t: float) -> Tensor:
        """The point at ``t`` on the geodesic from ``start`` to ``end``."""

    def check_size(self, n: int) -> None:  # noqa: B027 (every size is fine by default)
        """Raise unless there is such a geometry of n x n matrices."""

    # ---- points ------------------------------------------------------------------------------------------

    def distance(self, p: Tensor, q: Tensor) -> Tensor:
        """The geodesic distance between points (..., n, n), which broadcast; shape (...)."""
        square = self.square_norm(self.log(self.deform(p), Center(self.deform(q))).value)
        safe = torch.where(square > 0, square, 1.0)  # the root has no derivative at 0; 0 is a subgradient
        return torch.where(square > 0, safe.sqrt(), 0.0)

    def geodesic(self, p: Tensor, q: Tensor, t: float) -> Tensor:
        """The point at ``t`` on the geodesic from ``p`` (t = 0) to ``q`` (t = 1)."""
        return self.undeform(self.between(self.deform(p), self.deform(q), t))

    def product(self, p: Tensor, q: Tensor) -> Tensor:
        """The group's product ``p ⊙ q``."""
        return self.undeform(self.translate(self.deform(q), self.deform(p)))

    def inverse(self, p: Tensor) -> Tensor:
        """The group's inverse of points (..., n, n): ``product(inverse(p), p)`` is the identity."""
        w = self.deform(p)
        e = self.identity(w.shape[-1]).to(w).expand_as(w)
        return self.undeform(self.exp(self.log(e, Center(w))))

    def frechet_mean(
        self, points: Tensor, dims: Sequence[int] = (0,), steps: int | None = None, tol: float | None = None
    ) -> Tensor:
        """The Fréchet mean over the axes ``dims``: the point with the least sum of squared distances.

        Args:
            points: (..., n, n).
            dims: axes to average over, not the last two.
            steps: this many steps of the Karcher flow where the mean has no closed form; None: to tolerance.
            tol: stop when the mean tangent is shorter than this (default 1e-6, in float32 1e-5), or after 50 steps.

        Returns:
            The mean, without the averaged axes.
        """
        dims = check_dims(dims, points.ndim)
        mean = self.mean(self.deform(points), dims, steps, tol).value
        return self.undeform(mean.squeeze(dims))

    def frechet_variance(
        self, points: Tensor, dims: Sequence[int] = (0,), steps: int | None = None, tol: float | None = None
    ) -> Tensor:
        """The Fréchet variance over the axes ``dims``: the mean squared distance to the Fréchet mean."""
        dims = check_dims(dims, points.ndim)
        w = self.deform(points)
        tangent = self.log(w, self.mean(w, dims, steps, tol))
        return self.square_norm(tangent.value).mean(dims)


class FlatGeometry(Geometry):
    """A geometry whose working space is a vector space: mean, product and geodesic are the plain ones."""

    def identity(self, n: int) -> Tensor:
        return torch.zeros(n, n, dtype=torch.float64)

    def mean(self, w: Tensor, dims: Sequence[int], steps: int | None = None, tol: float | None = None) -> Center:
        return Center(w.mean(tuple(dims), keepdim=True))

    def log(self, w: Tensor, at: Center) -> Tangent:
        return Tangent(w - at.value)

    def exp(self, tangent: Tangent) -> Tensor:
        return tangent.value

    def square_norm(self, tangent: Tensor) -> Tensor:
        return tangent.square().sum((-2, -1))

    def translate(self, w: Tensor, by: Tensor) -> Tensor:
        return w + by

    def between(self, start: Tensor, end: Tensor, t: float) -> Tensor:
        return torch.lerp(start, end, t)


def karcher_limit(steps: int | None, tol: float | None, dtype: torch.dtype) -> tuple[int, float | None]:
    """How many steps at most, and the tolerance that ends them; None: take all the steps."""
    if steps is not None:
        return steps, None
    return 50, tol if tol is not None else (1e-6 if dtype == torch.float64 else 1e-5)


def check_dims(dims: Sequence[int], ndim: int) -> tuple[int, ...]:
    """Axes over which to average, sorted; raise unless they are distinct and before the last two."""
    found = tuple(sorted(dims))
    if not found or len(set(found)) < len(found) or found[0] < 0 or found[-1] >= ndim - 2:
        raise ValueError(
            f"dims={tuple(dims)}: expected one or more different axes from 0 to {ndim - 3}; the last two axes of the "
            f"{ndim} are the matrices."
        )
    return found
