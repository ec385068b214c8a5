r"""Functions of symmetric matrices, with gradients that stay exact where eigenvalues meet.

:math:`f(A) = U f(Λ) U^\top` for :math:`A = U Λ U^\top`. Differentiating through ``torch.linalg.eigh`` divides by
:math:`λ_i - λ_j` and gives infinity at a repeated eigenvalue, though :math:`f` is smooth there. The formula of
Daleckii and Krein does not need the derivative of the eigenvectors:

.. math::
    Df(A)[H] = U \big(f[λ_i, λ_j] \odot U^\top H U\big) U^\top, \qquad
    f[a, b] = \frac{f(a) - f(b)}{a - b}, \quad f[a, a] = f'(a).

The divided differences are computed without cancellation, so there is no threshold below which two eigenvalues count
as equal: :math:`\log[a, b] = \mathrm{log1p}(x) / (x\,b)` with :math:`x = (a - b)/b`, and
:math:`\exp[a, b] = e^a\,(-\mathrm{expm1}(-d)/d)` with :math:`d = a - b`, for :math:`a ≥ b`. The second derivative is
the same formula with divided differences of three values; a third is refused.

Use :func:`log`, :func:`exp`, :func:`power` and :func:`rectify` where a network computes with covariance matrices.
Each costs one batched eigendecomposition, :math:`O(n^3)` a matrix; the backward pass reuses it.

Reference:
    Yu. L. Daleckii & S. G. Krein, *Integration and differentiation of functions of Hermitian operators*, 1965;
    R. Bhatia, *Matrix Analysis*, 1997, theorem V.3.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Eig", "cholesky", "decompose", "exp", "log", "power", "rectify", "spectral"]


def log(a: Tensor) -> Tensor:
    """The matrix logarithm of symmetric positive definite matrices.

    Args:
        a: (..., n, n), symmetric positive definite, float32 or float64.

    Returns:
        Symmetric matrices of the same shape.

    Raises:
        ValueError: not square, not symmetric, not finite, or not positive definite; the message names the matrix.
        TypeError: another type than float32 or float64.

    >>> torch.allclose(log(torch.diag(torch.tensor([1.0, torch.e]))), torch.diag(torch.tensor([0.0, 1.0])), atol=1e-6)
    True
    """
    a = check_symmetric(a)
    return spectral(a, "log", positive(decompose(a)))


def exp(a: Tensor) -> Tensor:
    """The matrix exponential of symmetric matrices: symmetric positive definite.

    Args:
        a: (..., n, n), symmetric, float32 or float64.

    Raises:
        ValueError: not square, not symmetric or not finite.
        TypeError: another type than float32 or float64.

    >>> exp(torch.zeros(2, 2))
    tensor([[1., 0.], [0., 1.]])
    """
    a = check_symmetric(a)
    return spectral(a, "exp", decompose(a))


def power(a: Tensor, exponent: float | Tensor) -> Tensor:
    """``a`` to a real power, as ``exp(exponent * log(a))`` with one eigendecomposition.

    Args:
        a: (..., n, n), symmetric positive definite.
        exponent: a number, or a tensor that broadcasts with (..., 1, 1) and gets a gradient.

    Raises:
        ValueError, TypeError: see :func:`log`.

    >>> power(torch.diag(torch.tensor([4.0, 9.0])), 0.5)
    tensor([[2., 0.], [0., 3.]])
    """
    a = check_symmetric(a)
    return power_by(a, exponent, positive(decompose(a)))


def rectify(a: Tensor, threshold: float) -> Tensor:
    """Raise every eigenvalue of symmetric matrices to at least ``threshold`` (the ReEig layer of SPDNet).

    Args:
        a: (..., n, n), symmetric.
        threshold: the smallest eigenvalue of the result. Raised eigenvalues get no gradient.

    Raises:
        ValueError: not square, not symmetric or not finite.
        TypeError: another type than float32 or float64.

    >>> rectify(torch.diag(torch.tensor([-1.0, 2.0])), 0.5)
    tensor([[0.5000, 0.0000], [0.0000, 2.0000]])
    """
    a = check_symmetric(a)
    return spectral(a, "rectify", decompose(a), threshold)


class Eig(NamedTuple):
    """Eigenvalues (..., n) and orthonormal eigenvectors (..., n, n) of symmetric matrices, without a graph."""

    values: Tensor
    vectors: Tensor


def decompose(a: Tensor) -> Eig:
    """The eigendecomposition of symmetric matrices, detached: gradients go through :func:`spectral`."""
    with torch.no_grad():
        values, vectors = torch.linalg.eigh(a)
    return Eig(values, vectors)


def spectral(a: Tensor, rule: str, eig: Eig, parameter: float = 0.0) -> Tensor:
    """Apply "log", "exp", "power" or "rectify" to the eigenvalues of ``a``, given its eigendecomposition.

    The eigendecomposition may be shared by several functions of the same matrix, or be known beforehand.
    """
    return _Spectral.apply(a, eig.values, eig.vectors, rule, parameter)


def power_by(a: Tensor, exponent: float | Tensor, eig: Eig) -> Tensor:
    """``a`` to a power, given its eigendecomposition."""
    if not isinstance(exponent, Tensor):
        return spectral(a, "power", eig, float(exponent))
    with torch.no_grad():
        scaled = exponent.squeeze(-1) * eig.values.log()
    return spectral(exponent * spectral(a, "log", eig), "exp", Eig(scaled, eig.vectors))


def exp_pairs(values: Tensor) -> Tensor:
    """The divided differences of exp at all pairs of eigenvalues, (..., n) to (..., n, n)."""
    a, b = values.unsqueeze(-1), values.unsqueeze(-2)
    return _exp_pair(torch.maximum(a, b), torch.minimum(a, b), 0.0)


def check_symmetric(a: Tensor, what: str = "matrix") -> Tensor:
    """Raise unless ``a`` holds finite symmetric matrices in float32 or float64; return their symmetric part."""
    if not isinstance(a, Tensor) or a.dtype not in (torch.float32, torch.float64):
        given = a.dtype if isinstance(a, Tensor) else type(a).__name__
        raise TypeError(f"Expected a tensor of float32 or float64, got {given}: functions of matrices need its digits.")
    if a.ndim < 2 or a.shape[-1] != a.shape[-2]:
        raise ValueError(f"Expected square matrices of shape (..., n, n), got shape {tuple(a.shape)}.")
    if not torch.compiler.is_compiling() and a.numel():
        with torch.no_grad():
            size = a.abs().amax((-2, -1))
            off = (a - a.mT).abs().amax((-2, -1))
            good = off <= SYMMETRY * size  # false for NaN
            if not (good & size.isfinite()).all():
                if not size.isfinite().all():
                    raise ValueError(f"{what} {first(~size.isfinite())} holds NaN or infinity.")
                bad = first(~good)
                worst = off.flatten()[int((~good).flatten().nonzero()[0])]
                raise ValueError(
                    f"{what} {bad} is not symmetric: entries differ from their mirror by up to {worst:.3g}, more than "
                    f"{SYMMETRY:g} of the largest. Use (x + x.mT) / 2 if that is what you mean."
                )
    return 0.5 * (a + a.mT)


def positive(eig: Eig, what: str = "matrix") -> Eig:
    """Raise unless all eigenvalues are positive."""
    if not torch.compiler.is_compiling() and not bool((eig.values > 0).all()):
        lowest = eig.values.amin(-1)
        refuse_indefinite(lowest, what)
    return eig


def refuse_indefinite(lowest: Tensor, what: str = "matrix") -> None:
    """Raise for the first matrix whose smallest eigenvalue is not positive."""
    bad = ~(lowest > 0)
    value = lowest.flatten()[int(bad.flatten().nonzero()[0])]
    raise ValueError(
        f"{what} {first(bad)} is not positive definite: its smallest eigenvalue is {value:.3g}. Add a ridge, such as "
        "x + 1e-3 * torch.eye(n), or put ReEig before; where it is a matter of rounding, use "
        "float64 or a theta closer to 0."
    )


def cholesky(a: Tensor, what: str = "matrix") -> Tensor:
    """The lower Cholesky factor; raises like :func:`log` where there is none, and is NaN there when compiled."""
    factor, info = torch.linalg.cholesky_ex(a)
    if torch.compiler.is_compiling():
        return torch.where((info == 0)[..., None, None], factor, torch.nan)
    if bool(info.any()):
        with torch.no_grad():
            lowest = torch.linalg.eigvalsh(a).amin(-1)
            # Where rounding alone makes the two disagree there is still no factor.
            refuse_indefinite(torch.where(info == 0, lowest.abs() + 1, lowest.clamp(max=0)), what)
    return factor


def first(bad: Tensor) -> str:
    """The place of the first true value, as an index into the batch."""
    index = bad.nonzero()[0].tolist()
    return str(index[0]) if len(index) == 1 else str(tuple(index))


#: How far a matrix may be from its transpose, relative to its largest entry.
SYMMETRY = 1e-4


class _Rule(NamedTuple):
    """A function of eigenvalues. ``parameter`` is the last argument of each."""

    value: Callable[[Tensor, float], Tensor]
    pair: Callable[[Tensor, Tensor, float], Tensor]  # f[high, low] for high >= low
    second: Callable[[Tensor, float], Tensor]  # f''
    relative: bool  # whether the function changes over distances in proportion to its argument


def _log_pair(high: Tensor, low: Tensor, _: float) -> Tensor:
    x = (high - low) / low
    return torch.where(x == 0, 1.0, torch.log1p(x) / torch.where(x == 0, 1.0, x)) / low


def _exp_pair(high: Tensor, low: Tensor, _: float) -> Tensor:
    d = high - low
    return high.exp() * torch.where(d == 0, 1.0, -torch.expm1(-d) / torch.where(d == 0, 1.0, d))


def _power_pair(high: Tensor, low: Tensor, p: float) -> Tensor:
    # The power is exp(p log x), and divided differences obey the chain rule.
    a, b = p * high.log(), p * low.log()
    outer = _exp_pair(a, b, 0.0) if p > 0 else _exp_pair(b, a, 0.0)
    return p * outer * _log_pair(high, low, 0.0)


def _rectify_pair(high: Tensor, low: Tensor, threshold: float) -> Tensor:
    mixed = (high - threshold) / torch.where(high > low, high - low, 1.0)
    return torch.where(low > threshold, 1.0, torch.where(high > threshold, mixed, 0.0)).to(high.dtype)


_RULES = {
    "log": _Rule(lambda x, _: x.log(), _log_pair, lambda x, _: -x.square().reciprocal(), True),
    "exp": _Rule(lambda x, _: x.exp(), _exp_pair, lambda x, _: x.exp(), False),
    "power": _Rule(lambda x, p: x.pow(p), _power_pair, lambda x, p: p * (p - 1) * x.pow(p - 2), True),
    "rectify": _Rule(lambda x, t: x.clamp(min=t), _rectify_pair, lambda x, _: torch.zeros_like(x), False),
}


def _compose(values: Tensor, vectors: Tensor) -> Tensor:
    y = (vectors * values.unsqueeze(-2)) @ vectors.mT
    return 0.5 * (y + y.mT)


def _derivative(h: Tensor, values: Tensor, vectors: Tensor, rule: str, parameter: float) -> Tensor:
    """Df(A)[h], Daleckii and Krein."""
    a, b = values.unsqueeze(-1), values.unsqueeze(-2)
    weights = _RULES[rule].pair(torch.maximum(a, b), torch.minimum(a, b), parameter)
    inner = vectors.mT @ (0.5 * (h + h.mT)) @ vectors
    return vectors @ (weights * inner) @ vectors.mT


def _second_derivative(h: Tensor, k: Tensor, values: Tensor, vectors: Tensor, rule: str, parameter: float) -> Tensor:
    """D²f(A)[h, k] by divided differences of three eigenvalues."""
    functions = _RULES[rule]
    n = values.shape[-1]
    shape = (*values.shape[:-1], n, n, n)
    triple = torch.stack(
        [values[..., :, None, None].expand(shape), values[..., None, :, None].expand(shape), values[..., None, None, :]
         .expand(shape)], -1
    ).sort(-1)[0]  # fmt: skip
    low, middle, high = triple.unbind(-1)
    gap = high - low
    mean = triple.mean(-1)
    close = gap <= torch.finfo(values.dtype).eps ** (1 / 3) * (mean.abs() if functions.relative else 1.0)
    difference = functions.pair(high, middle, parameter) - functions.pair(middle, low, parameter)
    weights = torch.where(
        close, 0.5 * functions.second(mean, parameter), difference / torch.where(close, 1.0, gap)
    )  # indices i, k, j
    h = vectors.mT @ (0.5 * (h + h.mT)) @ vectors
    k = vectors.mT @ (0.5 * (k + k.mT)) @ vectors
    inner = torch.einsum("...ikj,...ik,...kj->...ij", weights, h, k)
    return vectors @ (inner + inner.mT) @ vectors.mT


class _Spectral(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, values: Tensor, vectors: Tensor, rule: str, parameter: float) -> Tensor:
        ctx.save_for_backward(a, values, vectors)
        ctx.rule, ctx.parameter = rule, parameter
        return _compose(_RULES[rule].value(values, parameter), vectors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, values, vectors = ctx.saved_tensors
        return _SpectralGrad.apply(grad, a, values, vectors, ctx.rule, ctx.parameter), None, None, None, None


class _SpectralGrad(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, a: Tensor, values: Tensor, vectors: Tensor, rule: str, parameter: float
    ) -> Tensor:
        ctx.save_for_backward(grad, values, vectors)
        ctx.rule, ctx.parameter = rule, parameter
        return _derivative(grad, values, vectors, rule, parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, h: Tensor) -> Any:
        grad, values, vectors = ctx.saved_tensors
        by_grad = by_a = None
        if ctx.needs_input_grad[0]:
            by_grad = _derivative(h, values, vectors, ctx.rule, ctx.parameter)
        if ctx.needs_input_grad[1]:
            by_a = _second_derivative(grad, h, values, vectors, ctx.rule, ctx.parameter)
        return by_grad, by_a, None, None, None, None
