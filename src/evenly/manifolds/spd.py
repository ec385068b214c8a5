r"""Symmetric positive definite matrices as a Lie group: affine-invariant, log-Euclidean and log-Cholesky metrics.

Covariance matrices are positive definite; averaging and interpolating them entry by entry swells their determinant
and ignores the geometry. :class:`SPD` gives distances, geodesics and means under the metrics that make them a Lie
group. Choose ``"LEM"`` or ``"LCM"`` for means in closed form, ``"LCM"`` for speed (Cholesky only), ``"AIM"`` where
distances must not change under :math:`X \mapsto A X A^\top`.

==========  ==========================================  ===================================================
metric      working space                               squared distance to the identity
==========  ==========================================  ===================================================
``"AIM"``   :math:`P^θ`, product :math:`L X L^\top`     :math:`(α\|\log P^θ\|^2 + β(\log\det P^θ)^2) / θ^2`
``"CRIM"``  inverse of :math:`P^θ` in that group        as AIM, of the inverse
``"LEM"``   :math:`\log P`, sum                         :math:`α\|\log P\|^2 + β(\mathrm{tr} \log P)^2`
``"LCM"``   :math:`⌊L⌋ + \log 𝔻(L)`, sum                :math:`(\|⌊L⌋\|^2 + \|\log 𝔻(L)\|^2) / θ^2`
==========  ==========================================  ===================================================

:math:`L` is the Cholesky factor (of :math:`P^θ`; for the product, of the left operand), :math:`⌊\cdot⌋` its strictly
lower part, :math:`𝔻` its diagonal. ``"AIM"`` is invariant to translation from the left, ``"CRIM"`` from the right; for
the other two the group is commutative.

Reference:
    Ziheng Chen, Yue Song, Yunmei Liu & Nicu Sebe, *A Lie Group Approach to Riemannian Batch Normalization*,
    ICLR 2024, arXiv 2403.11261, tables 1 and 2; CRIM: the authors' released toolbox.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from evenly.manifolds.geometry import Center, FlatGeometry, Tangent, karcher_limit
from evenly.manifolds.matrix_functions import (
    Eig,
    check_symmetric,
    cholesky,
    decompose,
    exp,
    log,
    positive,
    power,
    power_by,
    spectral,
)

__all__ = ["SPD", "cholesky_log", "exp", "log", "power"]

METRICS = ("AIM", "LEM", "LCM", "CRIM")


def cholesky_log(p: Tensor) -> Tensor:
    """The log-Cholesky chart: the Cholesky factor with the logarithm of its diagonal.

    Args:
        p: (..., n, n), symmetric positive definite.

    Returns:
        Lower triangular matrices of the same shape.

    Raises:
        ValueError: not square, not symmetric, not finite, not positive definite.
        TypeError: another type than float32 or float64.

    >>> cholesky_log(torch.tensor([[1.0, 2.0], [2.0, 5.0]]))
    tensor([[0., 0.], [2., 0.]])
    """
    return _chart(cholesky(check_symmetric(p)))


class SPD(FlatGeometry):
    """Symmetric positive definite matrices under one of the invariant metrics.

    Args:
        metric: ``"AIM"``, ``"LEM"``, ``"LCM"`` or ``"CRIM"``.
        theta: power of the deformation, not 0; LEM does not change under it and takes none.
        alpha, beta: weights of ``α tr(V W) + β tr(V) tr(W)``, with ``alpha > 0`` and ``alpha + n beta > 0``; LCM
            takes none.

    Raises:
        ValueError: an unknown metric; ``theta`` of 0; weights that give no inner product; a parameter that the metric
            does not have. Of a point: not square, not symmetric (beyond 1e-4 of the largest entry), not finite, not
            positive definite. Nothing is clamped.
        TypeError: points in another type than float32 or float64.

    >>> spd = SPD("AIM")
    >>> p, q = torch.diag(torch.tensor([1.0, 4.0])), torch.eye(2)
    >>> spd.distance(p, q)  # log 4
    tensor(1.3863)
    >>> spd.geodesic(q, p, 0.5).diagonal()
    tensor([1., 2.])
    >>> spd.frechet_mean(torch.stack([p, q])).diagonal().round(decimals=4)
    tensor([1., 2.])
    """

    points = "symmetric positive definite matrices"

    # The class itself is the log-Euclidean metric, the default; the others are subclasses that override it.
    def __new__(cls, metric: str = "LEM", theta: float = 1.0, alpha: float = 1.0, beta: float = 0.0) -> SPD:
        if metric not in METRICS:
            raise ValueError(f"metric={metric!r}, expected one of {', '.join(map(repr, METRICS))}.")
        others = {"AIM": _AffineInvariant, "CRIM": _CholeskyRightInvariant, "LCM": _LogCholesky}
        return super().__new__(others.get(metric, SPD) if cls is SPD else cls)

    def __init__(self, metric: str = "LEM", theta: float = 1.0, alpha: float = 1.0, beta: float = 0.0) -> None:
        self.metric, self.theta, self.alpha, self.beta = metric, float(theta), float(alpha), float(beta)
        if self.theta == 0 or not math.isfinite(self.theta):
            raise ValueError(f"theta={theta}, expected a finite number that is not 0 (towards 0, AIM becomes LEM).")
        if metric == "LEM" and self.theta != 1:
            raise ValueError(f"theta={theta}: the log-Euclidean metric does not change under powers; leave theta at 1.")
        if metric == "LCM" and (self.alpha, self.beta) != (1.0, 0.0):
            raise ValueError(
                f"alpha={alpha}, beta={beta}: the log-Cholesky metric has no such weights; leave them at 1 and 0."
            )
        if not self.alpha > 0 or not math.isfinite(self.alpha + self.beta):
            raise ValueError(f"alpha={alpha}, beta={beta}: expected finite numbers with alpha above 0.")

    def deform(self, points: Tensor) -> Tensor:
        return log(points)

    def undeform(self, w: Tensor) -> Tensor:
        return spectral(w, "exp", decompose(w))

    def square_norm(self, tangent: Tensor) -> Tensor:
        return self._weighted(tangent)

    def __getnewargs__(self) -> tuple[str, float, float, float]:
        return self.metric, self.theta, self.alpha, self.beta

    def check_size(self, n: int) -> None:
        """Raise unless alpha + n beta is positive: else this is no inner product on n x n matrices."""
        if not self.alpha + n * self.beta > 0:
            raise ValueError(
                f"alpha={self.alpha}, beta={self.beta}: alpha + n * beta is {self.alpha + n * self.beta:g} for "
                f"{n} x {n} matrices, expected above 0."
            )

    def __repr__(self) -> str:
        parts = [repr(self.metric)]
        if self.metric != "LEM":
            parts.append(f"theta={self.theta:g}")
        if self.metric != "LCM":
            parts.append(f"alpha={self.alpha:g}, beta={self.beta:g}")
        return f"SPD({', '.join(parts)})"

    def _weighted(self, v: Tensor) -> Tensor:
        self.check_size(v.shape[-1])
        square = self.alpha * v.square().sum((-2, -1))
        if self.beta:
            square = square + self.beta * v.diagonal(dim1=-2, dim2=-1).sum(-1).square()
        return square

    def _power(self, p: Tensor) -> Tensor:
        """P^θ of points that were checked."""
        return p if self.theta == 1 else power_by(p, self.theta, positive(decompose(p)))

    def _root(self, w: Tensor) -> Tensor:
        return w if self.theta == 1 else power_by(w, 1 / self.theta, positive(decompose(w)))


class _LogCholesky(SPD):
    def deform(self, points: Tensor) -> Tensor:
        return _chart(cholesky(self._power(check_symmetric(points))))

    def undeform(self, w: Tensor) -> Tensor:
        factor = w.tril(-1) + torch.diag_embed(w.diagonal(dim1=-2, dim2=-1).exp())
        return self._root(factor @ factor.mT)

    def square_norm(self, tangent: Tensor) -> Tensor:
        return tangent.square().sum((-2, -1)) / self.theta**2


class _AffineInvariant(SPD):
    def deform(self, points: Tensor) -> Tensor:
        points = check_symmetric(points)
        if self.theta == 1:  # the others meet the eigenvalues at once
            cholesky(points.detach())
        return self._power(points)

    def undeform(self, w: Tensor) -> Tensor:
        return self._root(w)

    def identity(self, n: int) -> Tensor:
        return torch.eye(n, dtype=torch.float64)

    def mean(self, w: Tensor, dims: Sequence[int], steps: int | None = None, tol: float | None = None) -> Center:
        # The Karcher flow, with unit steps (as published) or, to a tolerance, with safe ones. By affine invariance
        # the step G^½ exp(mean log(G^-½ X G^-½)) G^½ may use any root of G; with the Cholesky factor the batch that
        # it takes logarithms of is the batch centred by G.
        limit, tol = karcher_limit(steps, tol, w.dtype)
        flow = self._flow if tol is None else self._flow_to_tolerance
        return flow(w, tuple(dims), limit, tol)

    def _flow(self, w: Tensor, dims: tuple[int, ...], limit: int, tol: float | None) -> Center:
        mean = self._start(w, dims)
        length: Tensor | None = None
        trust: Tensor | float = 1.0
        for _ in range(limit):
            factor, centred = _congruence(w, mean)
            eig = positive(decompose(centred), "centred matrix")
            tangent = spectral(centred, "log", eig).mean(dims, keepdim=True)
            if tol is not None:
                with torch.no_grad():
                    before, length = length, tangent.square().sum((-2, -1), keepdim=True).sqrt()
                    if bool((length <= tol).all()):
                        return Center(mean, eig)
                    if before is not None:  # a step that went too far
                        trust = torch.where(length > before, 0.5 * trust, trust)
                    step = trust * _step_size(eig.values, dims)
                # The determinant is a flat direction, in which a whole step is exact.
                flat = torch.diag_embed(
                    tangent.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).expand(tangent.shape[:-1])
                )
                tangent = flat + step * (tangent - flat)
            mean = factor @ spectral(tangent, "exp", decompose(tangent)) @ factor.mT
            mean = 0.5 * (mean + mean.mT)
        return Center(mean)

    # How many steps it takes depends on values: it runs outside of compiled graphs.
    _flow_to_tolerance = torch.compiler.disable(_flow)

    def log(self, w: Tensor, at: Center) -> Tangent:
        _, centred = _congruence(w, at.value)
        eig = at.eig if at.eig is not None else positive(decompose(centred), "centred matrix")
        return Tangent(spectral(centred, "log", eig), Eig(eig.values.log(), eig.vectors))

    def exp(self, tangent: Tangent) -> Tensor:
        return spectral(tangent.value, "exp", tangent.eig if tangent.eig is not None else decompose(tangent.value))

    def square_norm(self, tangent: Tensor) -> Tensor:
        return self._weighted(tangent) / self.theta**2

    def translate(self, w: Tensor, by: Tensor) -> Tensor:
        factor = cholesky(by)
        y = factor @ w @ factor.mT
        return 0.5 * (y + y.mT)

    def between(self, start: Tensor, end: Tensor, t: float) -> Tensor:
        factor, centred = _congruence(end, start)
        y = factor @ power_by(centred, t, positive(decompose(centred), "centred matrix")) @ factor.mT
        return 0.5 * (y + y.mT)

    def _start(self, w: Tensor, dims: tuple[int, ...]) -> Tensor:
        return w.mean(dims, keepdim=True)


class _CholeskyRightInvariant(_AffineInvariant):
    # The inverse of the group, P = LLᵀ to L⁻¹L⁻ᵀ, is an isometry from this metric to AIM that turns translations from
    # the right into translations from the left. So the working space is AIM's, of the inverses.
    def deform(self, points: Tensor) -> Tensor:
        return _group_inverse(super().deform(points))

    def undeform(self, w: Tensor) -> Tensor:
        return super().undeform(_group_inverse(w))

    def _start(self, w: Tensor, dims: tuple[int, ...]) -> Tensor:
        return _group_inverse(_group_inverse(w).mean(dims, keepdim=True))

    def product(self, p: Tensor, q: Tensor) -> Tensor:
        """The group's product ``p ⊙ q``."""
        # (p ⊙ q)⁻¹ = q⁻¹ ⊙ p⁻¹
        return self.undeform(self.translate(self.deform(p), self.deform(q)))


def _step_size(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """2 / (1 + L): the Hessian of the mean of d²/2 lies between 1 and L, the mean of (δ/2) coth(δ/2).

    δ is the logarithm of a centred matrix's condition number. A step of 1 need not converge where L is above 2.
    """
    half = 0.5 * (values[..., -1] / values[..., 0]).log()
    bound = torch.where(half < 1e-3, 1.0, half / half.clamp(min=1e-3).tanh())
    return (2 / (1 + bound.mean(dims, keepdim=True)))[..., None, None]


def _chart(factor: Tensor) -> Tensor:
    return factor.tril(-1) + torch.diag_embed(factor.diagonal(dim1=-2, dim2=-1).log())


def _inverse_factor(factor: Tensor) -> Tensor:
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)


def _group_inverse(p: Tensor) -> Tensor:
    inverse = _inverse_factor(cholesky(p))
    return inverse @ inverse.mT


def _congruence(w: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factor L of ``by`` and L⁻¹ w L⁻ᵀ."""
    factor = cholesky(by)
    inverse = _inverse_factor(factor)
    centred = inverse @ w @ inverse.mT
    return factor, 0.5 * (centred + centred.mT)
