r"""Correlation matrices of full rank as a vector space, under four flat metrics.

A correlation matrix is positive definite with a unit diagonal. Each metric is a chart onto a vector space, in which
the mean and the distances are the plain ones:

=========  ============================================================================  =========================
metric     chart                                                                         vector space
=========  ============================================================================  =========================
``"ECM"``   :math:`⌊𝔻(L)^{-1} L⌋`, :math:`L = \mathrm{Chol}(C)`                          strictly lower triangular
``"LECM"``  :math:`\log(𝔻(L)^{-1} L)`                                                    strictly lower triangular
``"OLM"``   off-diagonal of :math:`\log C`                                               symmetric, zero diagonal
``"LSM"``   :math:`\log(D C D)`, D diagonal such that rows of :math:`DCD` sum to 1       symmetric, zero row sums
=========  ============================================================================  =========================

The inverse of OLM's chart needs the diagonal D for which :math:`\exp(V + D)` has a unit diagonal, LSM's chart the
scaling D; both are found by iteration and differentiated implicitly, so that a gradient costs no iterations.

Reference:
    Ziheng Chen, Yue Song, Yunmei Liu & Nicu Sebe, *A Lie Group Approach to Riemannian Batch Normalization*,
    ICLR 2024, arXiv 2403.11261, and the authors' released toolbox;
    Y. Thanwerdas & X. Pennec, *Theoretically and computationally convenient geometries on full-rank correlation
    matrices*, 2022, arXiv 2201.06282 (ECM, LECM); Y. Thanwerdas, *Permutation-invariant log-Euclidean geometries on
    full-rank correlation matrices*, 2024, arXiv 2411.19471 (OLM, LSM).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from evenly.manifolds.geometry import FlatGeometry
from evenly.manifolds.matrix_functions import (
    Eig,
    check_symmetric,
    cholesky,
    decompose,
    exp_pairs,
    first,
    positive,
    spectral,
)

__all__ = ["Correlation", "correlation"]

METRICS = ("ECM", "LECM", "OLM", "LSM")
#: How far the diagonal of a correlation matrix may be from 1.
DIAGONAL = 1e-4
ITERATIONS = 100


def correlation(covariance: Tensor) -> Tensor:
    """The correlation matrices of covariance matrices (..., n, n): divided by the standard deviations.

    >>> correlation(torch.tensor([[4.0, 1.0], [1.0, 1.0]]))
    tensor([[1.0000, 0.5000], [0.5000, 1.0000]])
    """
    deviation = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    return covariance / (deviation.unsqueeze(-1) * deviation.unsqueeze(-2))


class Correlation(FlatGeometry):
    """Correlation matrices under one of four flat metrics.

    Args:
        metric: ``"ECM"`` (Euclidean-Cholesky), ``"LECM"`` (log-Euclidean-Cholesky), ``"OLM"`` (off-log) or ``"LSM"``
            (log-scaled). OLM and LSM do not depend on the order of the variables. OLM has no second derivative.

    Raises:
        ValueError: an unknown metric. Of a point: not square, not symmetric, a diagonal further than 1e-4 from 1, not
            positive definite, not finite.
        TypeError: points in another type than float32 or float64.
        RuntimeError: the iteration for OLM or LSM did not reach its tolerance.

    >>> c = torch.tensor([[1.0, 0.6], [0.6, 1.0]])
    >>> [round(Correlation(metric).distance(c, torch.eye(2)).item(), 4) for metric in ("ECM", "LECM", "OLM", "LSM")]
    [0.75, 0.75, 0.9803, 1.3863]
    """

    points = "correlation matrices"

    def __init__(self, metric: str = "ECM") -> None:
        if metric not in METRICS:
            raise ValueError(f"metric={metric!r}, expected one of {', '.join(map(repr, METRICS))}.")
        self.metric = metric

    def __repr__(self) -> str:
        return f"Correlation({self.metric!r})"

    def deform(self, points: Tensor) -> Tensor:
        c = _check(points)
        if self.metric == "OLM":
            y = spectral(c, "log", positive(decompose(c)))
            return y - torch.diag_embed(y.diagonal(dim1=-2, dim2=-1))
        if self.metric == "LSM":
            scale = _unit_rows(c)
            scaled = scale.unsqueeze(-1) * c * scale.unsqueeze(-2)
            return spectral(scaled, "log", positive(decompose(scaled)))
        factor = cholesky(c)
        unit = factor / factor.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        strict = unit.tril(-1)
        return strict if self.metric == "ECM" else _nilpotent(strict, "log")

    def undeform(self, w: Tensor) -> Tensor:
        if self.metric == "OLM":
            full = w + torch.diag_embed(_unit_diagonal(w))
            return _with_unit_diagonal(spectral(full, "exp", decompose(full)))
        if self.metric == "LSM":
            return _with_unit_diagonal(correlation(spectral(w, "exp", decompose(w))))
        eye = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
        unit = eye + (w if self.metric == "ECM" else _nilpotent(w, "exp"))
        return _with_unit_diagonal(correlation(unit @ unit.mT))

    def project(self, v: Tensor) -> Tensor:
        """Map any matrices (..., n, n) into the vector space of the chart; those that are in it stay as they are."""
        if self.metric in ("ECM", "LECM"):
            return v.tril(-1)
        v = 0.5 * (v + v.mT)
        if self.metric == "OLM":
            return v - torch.diag_embed(v.diagonal(dim1=-2, dim2=-1))
        v = v - v.mean(-1, keepdim=True)
        return v - v.mean(-2, keepdim=True)


def _check(points: Tensor) -> Tensor:
    c = check_symmetric(points)
    if not torch.compiler.is_compiling() and c.numel():
        with torch.no_grad():
            off = (c.diagonal(dim1=-2, dim2=-1) - 1).abs().amax(-1)
            if not (off <= DIAGONAL).all():
                worst = off.flatten()[int((off > DIAGONAL).flatten().nonzero()[0])]
                raise ValueError(
                    f"matrix {first(off > DIAGONAL)} is not a correlation matrix: its diagonal differs from 1 by "
                    f"{worst:.3g}. Use evenly.manifolds.correlation for covariance matrices."
                )
    return c


def _with_unit_diagonal(c: Tensor) -> Tensor:
    """Exactly 1 where rounding left 1."""
    eye = torch.eye(c.shape[-1], dtype=torch.bool, device=c.device)
    return torch.where(eye, 1.0, c)


def _nilpotent(strict: Tensor, what: str) -> Tensor:
    """log(I + N), or exp(N) - I, of strictly lower triangular N: a polynomial of degree n - 1, by Horner's rule."""
    n = strict.shape[-1]
    eye = torch.eye(n, dtype=strict.dtype, device=strict.device)
    if what == "log":
        y = torch.zeros_like(strict)
        for k in range(n - 1, 0, -1):
            y = strict @ (eye / k - y)
        return y
    y = eye.expand_as(strict)
    for k in range(n - 1, 0, -1):
        y = eye + strict @ y / k
    return y - eye


def _unit_rows(c: Tensor) -> Tensor:
    """The positive x with x_i (C x)_i = 1: the minimum of the convex ½ xᵀC x - Σ log x, by damped Newton steps."""
    x = _find_unit_rows(c.detach())
    # Newton's steps at the solution carry its derivatives: one the first, two the second.
    for _ in range(2):
        x = x - _newton_rows(c, x)[0]
    return x


@torch.compiler.disable
@torch.no_grad()
def _find_unit_rows(c: Tensor) -> Tensor:
    x = torch.ones_like(c[..., 0])
    for _ in range(ITERATIONS):
        change, decrement = _newton_rows(c, x)
        x = x - change / (1 + decrement)
        if bool((decrement <= 1e-4).all()):
            return x
    raise _not_converged("LSM", decrement, 1e-4)


def _newton_rows(c: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Newton's step and its decrement."""
    gradient = (c @ x.unsqueeze(-1)).squeeze(-1) - 1 / x
    change = torch.linalg.solve(c + torch.diag_embed(x**-2), gradient)
    return change, (gradient * change).sum(-1, keepdim=True).clamp(min=0).sqrt()


@torch.compiler.disable
def _unit_diagonal(v: Tensor) -> Tensor:
    return _UnitDiagonal.apply(v)


class _UnitDiagonal(torch.autograd.Function):
    """The d with diag(exp(V + diag d)) = 1, by d - log diag exp(V + diag d), a contraction, and then Newton's steps."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        d = torch.zeros_like(v[..., 0])
        tolerance = 1e-12 if v.dtype == torch.float64 else 2e-6
        for _ in range(ITERATIONS):
            eig = decompose(v + torch.diag_embed(d))
            diagonal = (eig.vectors.square() * eig.values.exp().unsqueeze(-2)).sum(-1)
            off = diagonal.log().abs().amax(-1, keepdim=True)
            if bool((off <= tolerance).all()):
                break
            newton = torch.linalg.solve(_diagonal_jacobian(eig), diagonal - 1)
            d = d - torch.where(off < 0.1, newton, diagonal.log())
        else:
            if not bool((off <= 100 * tolerance).all()):  # rounding may keep it from the last digits
                raise _not_converged("OLM", off, 100 * tolerance)
        ctx.save_for_backward(*eig)
        return d

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # diag(Dexp(Y)[dV + diag dd]) = 0, and Dexp(Y) is self-adjoint.
        eig = Eig(*ctx.saved_tensors)
        weights = torch.linalg.solve(_diagonal_jacobian(eig), grad)
        inner = eig.vectors.mT @ (weights.unsqueeze(-1) * eig.vectors)
        return -eig.vectors @ (exp_pairs(eig.values) * inner) @ eig.vectors.mT


def _diagonal_jacobian(eig: Eig) -> Tensor:
    """∂ diag exp(Y) / ∂ diag Y."""
    u = eig.vectors
    pairs = u.unsqueeze(-1) * u.unsqueeze(-2)  # i, k, l
    return torch.einsum("...ikl,...kl,...jkl->...ij", pairs, exp_pairs(eig.values), pairs)


def _not_converged(metric: str, residual: Tensor, tolerance: float) -> RuntimeError:
    return RuntimeError(
        f"{metric}: {ITERATIONS} iterations left a residual of {residual.max():.3g}, wanted {tolerance:g}; the "
        "matrices are too close to singular for this metric, or need float64."
    )
