r"""Rotations of space, SO(3), as a Lie group with the bi-invariant metric.

The logarithm goes through the unit quaternion and is accurate up to half a turn; the exponential is Rodrigues'
formula. Both have finite gradients at the identity. Distances are the Frobenius norm of the logarithm,
:math:`d(R, S) = \|\log R^\top S\| = \sqrt 2\,φ` for the angle :math:`φ \in [0, π]` between them.

Use :class:`SO3` for means, distances and geodesics of rotations (poses of joints, orientations).

Reference:
    Ziheng Chen, Yue Song, Yunmei Liu & Nicu Sebe, *A Lie Group Approach to Riemannian Batch Normalization*,
    ICLR 2024, arXiv 2403.11261, and the authors' released toolbox.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from evenly.manifolds.geometry import Center, Geometry, Tangent, karcher_limit
from evenly.manifolds.matrix_functions import first

__all__ = ["SO3", "so3_exp", "so3_log"]

#: How far RᵀR may be from the identity.
ORTHOGONAL = 1e-4


def so3_log(r: Tensor) -> Tensor:
    """The logarithm of rotations: skew-symmetric matrices.

    Args:
        r: (..., 3, 3), rotations in float32 or float64. Two logarithms exist at half a turn; one of them is returned.

    Raises:
        ValueError: another shape, not orthogonal, a reflection, not finite.
        TypeError: another type than float32 or float64.

    >>> so3_log(torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))[1, 0]  # a quarter turn
    tensor(1.5708)
    """
    return _log(_check(r))


def so3_exp(v: Tensor) -> Tensor:
    """The exponential of skew-symmetric matrices (..., 3, 3): rotations.

    >>> so3_exp(torch.zeros(3, 3))
    tensor([[1., 0., 0.], [0., 1., 0.], [0., 0., 1.]])
    """
    x = 0.5 * v.square().sum((-2, -1), keepdim=True)  # the angle, squared
    near = x < 1e-4
    safe = torch.where(near, 1.0, x)
    angle = safe.sqrt()
    sine = torch.where(near, 1 - x / 6 + x**2 / 120, angle.sin() / angle)
    half = torch.where(near, 0.5 - x / 24 + x**2 / 720, 2 * (angle / 2).sin().square() / safe)
    return torch.eye(3, dtype=v.dtype, device=v.device) + sine * v + half * (v @ v)


class SO3(Geometry):
    """The rotations of space under the bi-invariant metric.

    Args:
        side: ``"left"`` centres by :math:`M^\\top R` and biases by :math:`B R`, ``"right"`` by :math:`R M^\\top` and
            :math:`R B`. Distances, means and geodesics are the same.

    Raises:
        ValueError: another side. Of a point: another shape than (..., 3, 3), :math:`R^\\top R` further than 1e-4 from
            the identity, a reflection, not finite.
        TypeError: points in another type than float32 or float64.

    >>> so3 = SO3()
    >>> quarter = so3_exp(torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]) * torch.pi / 2)
    >>> so3.distance(quarter, torch.eye(3)) / 2**0.5
    tensor(1.5708)
    """

    points = "rotations"

    def __init__(self, side: Literal["left", "right"] = "left") -> None:
        if side not in ("left", "right"):
            raise ValueError(f"side={side!r}, expected 'left' or 'right'.")
        self.side = side

    def __repr__(self) -> str:
        return f"SO3(side={self.side!r})"

    def check_size(self, n: int) -> None:
        """Raise unless n is 3."""
        if n != 3:
            raise ValueError(f"Rotations here are 3 x 3 matrices, got {n} x {n}.")

    def deform(self, points: Tensor) -> Tensor:
        return _check(points)

    def undeform(self, w: Tensor) -> Tensor:
        return w

    def identity(self, n: int) -> Tensor:
        self.check_size(n)
        return torch.eye(3, dtype=torch.float64)

    def mean(self, w: Tensor, dims: Sequence[int], steps: int | None = None, tol: float | None = None) -> Center:
        # The Karcher flow; from the first sample with a number of steps, as in the released code, else from the
        # rotation closest to the arithmetic mean.
        limit, tol = karcher_limit(steps, tol, w.dtype)
        flow = self._flow if tol is None else self._flow_to_tolerance
        return flow(w, tuple(dims), limit, tol)

    def _flow(self, w: Tensor, dims: tuple[int, ...], limit: int, tol: float | None) -> Center:
        if tol is None:
            mean = w
            for dim in dims:
                mean = mean.narrow(dim, 0, 1)
        else:
            with torch.no_grad():
                mean = _project(w.mean(dims, keepdim=True))
        length: Tensor | None = None
        step: Tensor | float = 1.0
        for _ in range(limit):
            tangent = _log(mean.mT @ w).mean(dims, keepdim=True)
            if tol is not None:
                with torch.no_grad():
                    before, length = length, tangent.square().sum((-2, -1), keepdim=True).sqrt()
                    done = bool((length <= tol).all())
                    if before is not None:
                        step = torch.where(length > before, 0.5 * step, step)
                if done and not (torch.is_grad_enabled() and w.requires_grad):
                    break
                mean = mean @ so3_exp(step * tangent)
                if done:  # this last step carried the gradient
                    break
            else:
                mean = mean @ so3_exp(tangent)
        return Center(mean)

    # How many steps it takes depends on values: it runs outside of compiled graphs.
    _flow_to_tolerance = torch.compiler.disable(_flow)

    def log(self, w: Tensor, at: Center) -> Tangent:
        return Tangent(_log(at.value.mT @ w if self.side == "left" else w @ at.value.mT))

    def exp(self, tangent: Tangent) -> Tensor:
        return so3_exp(tangent.value)

    def square_norm(self, tangent: Tensor) -> Tensor:
        return tangent.square().sum((-2, -1))

    def translate(self, w: Tensor, by: Tensor) -> Tensor:
        return by @ w if self.side == "left" else w @ by

    def between(self, start: Tensor, end: Tensor, t: float) -> Tensor:
        r = start @ so3_exp(t * _log(start.mT @ end))
        return 1.5 * r - 0.5 * r @ r.mT @ r  # a step back to the group, so that rounding does not add up

    def product(self, p: Tensor, q: Tensor) -> Tensor:
        """``p @ q``."""
        return self.deform(p) @ self.deform(q)


def _log(r: Tensor) -> Tensor:
    # 4 q qᵀ is linear in the matrix; its row with the largest diagonal gives the quaternion q = (w, v) without
    # cancellation. Then φ = 2 atan(|v| / w).
    d = r.diagonal(dim1=-2, dim2=-1)
    x, y, z = d.unbind(-1)
    s = r + r.mT
    k = r - r.mT
    outer = torch.stack(
        [
            torch.stack([1 + x + y + z, k[..., 2, 1], k[..., 0, 2], k[..., 1, 0]], -1),
            torch.stack([k[..., 2, 1], 1 + x - y - z, s[..., 0, 1], s[..., 0, 2]], -1),
            torch.stack([k[..., 0, 2], s[..., 0, 1], 1 - x + y - z, s[..., 1, 2]], -1),
            torch.stack([k[..., 1, 0], s[..., 0, 2], s[..., 1, 2], 1 - x - y + z], -1),
        ],
        -2,
    )
    best = outer.diagonal(dim1=-2, dim2=-1).argmax(-1, keepdim=True)
    row = outer.gather(-2, best.unsqueeze(-1).expand(*best.shape, 4)).squeeze(-2)
    q = row / (2 * row.gather(-1, best).sqrt())
    q = torch.where(q[..., :1] < 0, -q, q)
    w, v = q[..., :1], q[..., 1:]
    square = v.square().sum(-1, keepdim=True)
    near = square < 1e-4
    ratio = torch.where(near, square, 0.0) / torch.where(near, w, 1.0).square()
    series = 2 * (1 - ratio / 3 + ratio**2 / 5 - ratio**3 / 7) / torch.where(near, w, 1.0)
    sine = torch.where(near, 1.0, square).sqrt()
    factor = torch.where(near, series, 2 * torch.atan2(sine, w) / sine)
    a, b, c = (factor * v).unbind(-1)
    zero = torch.zeros_like(a)
    return torch.stack([zero, -c, b, c, zero, -a, -b, a, zero], -1).unflatten(-1, (3, 3))


def _project(a: Tensor) -> Tensor:
    """The closest rotation to any 3 x 3 matrix."""
    u, _, vt = torch.linalg.svd(a)
    sign = torch.det(u @ vt).sign()
    last = torch.stack([torch.ones_like(sign), torch.ones_like(sign), sign], -1)
    return (u * last.unsqueeze(-2)) @ vt


def _check(r: Tensor) -> Tensor:
    if not isinstance(r, Tensor) or r.dtype not in (torch.float32, torch.float64):
        given = r.dtype if isinstance(r, Tensor) else type(r).__name__
        raise TypeError(f"Expected rotations in float32 or float64, got {given}.")
    if r.ndim < 2 or r.shape[-2:] != (3, 3):
        raise ValueError(f"Expected rotations of shape (..., 3, 3), got shape {tuple(r.shape)}.")
    if not torch.compiler.is_compiling() and r.numel():
        with torch.no_grad():
            off = (r.mT @ r - torch.eye(3, dtype=r.dtype, device=r.device)).abs().amax((-2, -1))
            good = off <= ORTHOGONAL  # false for NaN
            if not good.all():
                worst = off.flatten()[int((~good).flatten().nonzero()[0])]
                if not worst.isfinite():
                    raise ValueError(f"matrix {first(~good)} holds NaN or infinity.")
                raise ValueError(
                    f"matrix {first(~good)} is not a rotation: R.mT @ R differs from the identity by {worst:.3g}, more "
                    f"than {ORTHOGONAL:g}."
                )
            proper = torch.linalg.det(r) > 0
            if not proper.all():
                raise ValueError(f"matrix {first(~proper)} is a reflection: its determinant is -1, expected 1.")
    return r
