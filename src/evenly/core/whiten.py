"""Whitening: take out what features share to second order.

Values along the feature axis are centred, and decorrelated with the covariance :math:`C` that their group
shares, :math:`y = W (x - m)` with :math:`W C W^T = I`:

=============  ==================================================================  ==========================
method         :math:`W`                                                           when
=============  ==================================================================  ==========================
``"zca"``      :math:`C^{-1/2}`                                                     closest to the input
``"cholesky"`` :math:`L^{-1}, C = L L^T`                                            cheapest, depends on the order
``"pca"``      :math:`\\Lambda^{-1/2} U^T, C = U \\Lambda U^T`                        ordered by variance
``"newton"``   Newton–Schulz iterations towards :math:`C^{-1/2}`                    in networks: matmuls only
=============  ==================================================================  ==========================

References:
    Kessy, Lewin & Strimmer, *Optimal whitening and decorrelation*, 2018, arXiv 1512.00809.
    Huang, Yang, Lang & Deng, *Decorrelated Batch Normalization*, CVPR 2018, arXiv 1804.08450.
    Huang, Zhou, Zhu, Liu & Shao, *Iterative Normalization*, CVPR 2019, arXiv 1904.03441, equation 5.
    Ledoit & Wolf, *A well-conditioned estimator for large-dimensional covariance matrices*, 2004.
    Chen, Wiesel, Eldar & Hero, *Shrinkage algorithms for MMSE covariance estimation*, 2010 (OAS).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from evenly.core.kernels.reference import Groups, accumulate_dtype
from evenly.core.normalize import _check_input, _checked_mask, _labels
from evenly.core.patterns import PatternError, Plan, affine_groups, bind, product

__all__ = ["Covariance", "Method", "covariance", "principal_axes", "whiten", "whitening_matrix"]

Method = Literal["zca", "cholesky", "pca", "newton"]
Shrinkage = float | Literal["ledoit-wolf", "oas"]
_METHODS = ("zca", "cholesky", "pca", "newton")


class Covariance(NamedTuple):
    """Second-order statistics: ``mean`` (..., F), ``cov`` (..., F, F), ``count`` (...)."""

    mean: Tensor
    cov: Tensor
    count: Tensor  # type: ignore[assignment]


def whiten(
    x: Tensor,
    pattern: str | None = None,
    *,
    by: Tensor | None = None,
    method: Method = "zca",
    shrinkage: Shrinkage = 0.0,
    eps: float = 1e-5,
    iterations: int = 5,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    affine: str | None = None,
    mask: Tensor | None = None,
    stats: tuple[Tensor, Tensor] | Covariance | None = None,
    num_groups: int | None = None,
    **sizes: int,
) -> Tensor:
    """Centre and decorrelate the features that a pattern's last kept axis names.

    Args:
        x: a floating-point tensor.
        pattern: the pattern of the mean. The **last axis on the right** is the feature axis; the others keep a
            covariance of their own: ``"n c h w -> c"`` whitens channels over the batch,
            ``"n (g c) h w -> g c"`` within groups of channels, ``"n c h w -> n c"`` within each sample. With
            ``by`` it defaults to ``"n ... d -> ... d"``.
        by: labels of the leading axis, as in :func:`evenly.normalize`.
        method: ``"zca"``, ``"cholesky"``, ``"pca"`` or ``"newton"`` (see the module).
        shrinkage: weight in [0, 1] of ``trace(C)/F * I`` in the covariance, or ``"ledoit-wolf"`` or ``"oas"``
            to estimate it from the data.
        eps: added to the diagonal of the covariance after shrinkage.
        iterations: Newton–Schulz steps (``"newton"`` only).
        weight, bias: scale and shift after whitening: a scalar, or a tensor that carries the axes named by
            ``affine``. Default: the axis of the input that holds the features, ``"c"`` or ``"(g c)"``.
        affine: as in :func:`evenly.normalize`.
        mask: boolean, broadcastable to ``x`` and of size 1 along the feature axis: a sample counts whole.
        stats: use this ``(mean, covariance)`` instead of measuring (of the shapes that :func:`covariance`
            returns).
        num_groups: as in :func:`evenly.normalize`.
        **sizes: sizes of axes by name.

    Returns:
        A tensor of the shape and dtype of ``x``. Gradients flow through mean and covariance; those of
        ``"zca"`` are exact at equal eigenvalues too, those of ``"pca"`` exist only where eigenvalues differ.

    Raises:
        PatternError: the pattern keeps no axis, or does not fit.
        ValueError: unknown method, shrinkage outside [0, 1], negative eps.
        torch.linalg.LinAlgError: the covariance is singular and ``eps`` is 0 (``"cholesky"``).

    >>> x = torch.randn(200, 3) @ torch.randn(3, 3)
    >>> y = whiten(x, "n d -> d", eps=0.0)
    >>> torch.allclose(y.T @ y / 200, torch.eye(3), atol=1e-3)
    True
    """
    _check_input(x, "whiten")
    _check_method(method, shrinkage, eps, iterations)
    view = _View(x, pattern, by, mask, num_groups, sizes)
    with _full_precision(x.device.type):
        v = view.features_last(x)
        if stats is None:
            mean, cov, count, kurtosis = view.measure(v, fourth=shrinkage == "ledoit-wolf")
        else:
            mean, cov = view.given(stats)
            if isinstance(shrinkage, str):
                raise ValueError(f"shrinkage={shrinkage!r} is estimated from data, and stats= was given.")
            count, kurtosis = None, None
        cov = _shrink(cov, shrinkage, count, kurtosis)
        matrix = whitening_matrix(cov, method=method, eps=eps, iterations=iterations)
        centred = v - view.spread(mean).unsqueeze(-2)
        if view.mask is not None:
            centred = torch.where(view.mask, centred, centred.new_zeros(()))
        y = centred @ view.spread(matrix).mT
        if weight is not None or bias is not None:
            y = view.scale_shift(y, weight, bias, affine, tuple(sizes))
        return view.restore(y).to(x.dtype)


def covariance(
    x: Tensor,
    pattern: str | None = None,
    *,
    by: Tensor | None = None,
    mask: Tensor | None = None,
    shrinkage: Shrinkage = 0.0,
    correction: float = 0,
    num_groups: int | None = None,
    **sizes: int,
) -> Covariance:
    """Mean, covariance and count of the features that a pattern's last kept axis names.

    Arguments as in :func:`whiten`; the covariance divides by ``count - correction``.

    >>> c = covariance(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]]), "n d -> d")
    >>> c.cov
    tensor([[0.5000, 0.0000],
            [0.0000, 2.0000]])
    """
    _check_input(x, "covariance")
    _check_method("zca", shrinkage, 0.0, 1)
    view = _View(x, pattern, by, mask, num_groups, sizes)
    with _full_precision(x.device.type):
        mean, cov, count, kurtosis = view.measure(view.features_last(x), fourth=shrinkage == "ledoit-wolf")
        cov = _shrink(cov, shrinkage, count, kurtosis)
        if correction:
            cov = cov * (count / (count - correction))[..., None, None]
    return Covariance(mean, cov, count)


def whitening_matrix(cov: Tensor, *, method: Method = "zca", eps: float = 0.0, iterations: int = 5) -> Tensor:
    """A matrix ``W`` with ``W (C + eps I) Wᵀ = I`` for each covariance ``C`` of shape (..., F, F).

    ``"newton"`` is approximate: it converges from below as ``iterations`` grows. Cost O(F³).

    >>> whitening_matrix(torch.diag(torch.tensor([4.0, 1.0])))
    tensor([[0.5000, 0.0000],
            [0.0000, 1.0000]])
    """
    _check_method(method, 0.0, eps, iterations)
    size = cov.shape[-1]
    eye = torch.eye(size, dtype=cov.dtype, device=cov.device)
    cov = cov + eps * eye
    if method == "zca":
        return inverse_sqrt(cov)
    if method == "cholesky":
        factor = torch.linalg.cholesky(cov)
        return torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
    if method == "pca":
        values, vectors = principal_axes(cov)
        return values.clamp(min=torch.finfo(cov.dtype).tiny).rsqrt().unsqueeze(-1) * vectors.mT
    trace = cov.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    # The coupled form is stable where the uncoupled one diverges after it has converged: `sqrt` tends to the
    # root of the scaled covariance, `root` to its inverse.
    sqrt, root = cov / trace, eye.expand_as(cov)
    for _ in range(iterations):
        step = 1.5 * eye - 0.5 * (root @ sqrt)
        sqrt, root = sqrt @ step, step @ root
    return root * trace.rsqrt()


def principal_axes(cov: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., F), largest first, and eigenvectors (..., F, F), in columns, of symmetric matrices.

    An eigenvector has no sign of its own: the largest entry of each is made positive.

    >>> principal_axes(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
    (tensor([4., 1.]), tensor([[0., 1.],
            [1., 0.]]))
    """
    values, vectors = torch.linalg.eigh(cov)
    values, vectors = values.flip(-1), vectors.flip(-1)
    if not vectors.numel():
        return values, vectors
    largest = vectors.detach().abs().argmax(dim=-2, keepdim=True)
    return values, vectors * torch.sign(vectors.detach().gather(-2, largest))


def inverse_sqrt(cov: Tensor) -> Tensor:
    """``C^{-1/2}`` of symmetric positive definite matrices, with derivatives that are stable at equal eigenvalues.

    The derivative of :math:`W = C^{-1/2}` solves the Lyapunov equation
    :math:`S\\, dW + dW\\, S = -W\\, dC\\, W` with :math:`S = C^{1/2}`, which never divides by a difference of
    eigenvalues.

    >>> c = torch.eye(3, dtype=torch.float64, requires_grad=True)
    >>> inverse_sqrt(c).sum().backward()
    >>> c.grad[0, 0].item()
    -0.5
    """
    return _InverseSqrt.apply(cov)


class _InverseSqrt(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(cov: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(cov)
        floor = torch.finfo(cov.dtype).tiny
        return (vectors * values.clamp(min=floor).rsqrt().unsqueeze(-2)) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        cov, root = ctx.saved_tensors
        sqrt = cov @ root
        sqrt = (sqrt + sqrt.mT) / 2
        solved = _Lyapunov.apply(sqrt, (grad + grad.mT) / 2)
        return -root @ solved @ root


class _Lyapunov(torch.autograd.Function):
    """``Y`` with ``S Y + Y S = Q`` for symmetric positive definite ``S`` and symmetric ``Q``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(s: Tensor, q: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(s)
        inner = vectors.mT @ q @ vectors
        return vectors @ (inner / (values.unsqueeze(-1) + values.unsqueeze(-2))) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        s, y = ctx.saved_tensors
        z = _Lyapunov.apply(s, (grad + grad.mT) / 2)
        cross = z @ y
        return -(cross + cross.mT), z


class _View:
    """One input as (kept…, samples, features), and back; ragged groups as rows with an index."""

    def __init__(
        self,
        x: Tensor,
        pattern: str | None,
        by: Tensor | None,
        mask: Tensor | None,
        num_groups: int | None,
        sizes: dict[str, int],
    ) -> None:
        if pattern is None:
            if by is None:
                raise TypeError("whiten and covariance need a pattern such as 'n c h w -> c', or labels as by=.")
            pattern = "n ... d -> ... d"
        self.plan: Plan = bind(pattern, x.shape, sizes)
        resolved = self.plan.resolved
        if not resolved.outputs or len(resolved.outputs[-1]) != 1:
            raise PatternError(
                f"{pattern!r} must end in the axis of the features to decorrelate, such as 'n c h w -> c'."
            )
        self.feature = resolved.outputs[-1][0]
        self.batch = [axis for group in resolved.outputs[:-1] for axis in group]
        self.groups: Groups | None = None
        reduced = list(resolved.reduced)
        if by is not None:
            self.groups = _labels(x, self.plan, by, num_groups)
            reduced.remove(0)
        elif num_groups is not None:
            raise TypeError(f"num_groups={num_groups} goes with by=.")
        rows = [0] if self.groups is not None else []
        self.order = [*rows, *self.batch, *reduced, self.feature]
        sizes_ = self.plan.sizes
        self.lead = [sizes_[axis] for axis in (*rows, *self.batch)]
        self.samples = product([sizes_[axis] for axis in reduced])
        self.size = sizes_[self.feature]
        self.dtype = accumulate_dtype(x.dtype)
        self.mask: Tensor | None = None
        checked = _checked_mask(mask, x)
        if checked is not None:
            self.mask = self._sample_mask(checked, x)

    def _sample_mask(self, mask: Tensor, x: Tensor) -> Tensor:
        full = mask.reshape([1] * (x.ndim - mask.ndim) + list(mask.shape))
        tensor_axis = next(i for i, group in enumerate(self.plan.resolved.inputs) if self.feature in group)
        if full.shape[tensor_axis] != 1:
            raise PatternError(
                f"mask has size {full.shape[tensor_axis]} along the feature axis of {self.plan.resolved.text!r}, "
                f"expected 1: a sample counts with all of its features or not at all."
            )
        full = full.expand(x.shape).reshape(self.plan.sizes).permute(self.order)
        return full.reshape(*self.lead, self.samples, self.size)[..., :1]

    def features_last(self, x: Tensor) -> Tensor:
        v = x.reshape(self.plan.sizes).permute(self.order).reshape(*self.lead, self.samples, self.size)
        v = v.to(self.dtype)
        return v if self.mask is None else torch.where(self.mask, v, v.new_zeros(()))

    def restore(self, v: Tensor) -> Tensor:
        sizes = self.plan.sizes
        v = v.reshape([sizes[axis] for axis in self.order])
        return v.permute([self.order.index(axis) for axis in range(len(sizes))]).reshape(self.plan.shape)

    def scale_shift(
        self, y: Tensor, weight: Tensor | None, bias: Tensor | None, affine: str | None, names: tuple[str, ...]
    ) -> Tensor:
        """Apply a weight and a bias, which carry axes of the input."""
        plan = self.plan
        if affine is None:
            axes = tuple(group for group in plan.resolved.inputs if self.feature in group)
        else:
            axes = affine_groups(affine, plan.resolved.text, len(plan.shape), names)
        for value, name in ((weight, "weight"), (bias, "bias")):
            if value is None:
                continue
            carried = plan.affine_in(value.to(self.dtype), axes, name)
            if carried.ndim:
                carried = carried.expand(plan.sizes).permute(self.order)
                carried = carried.reshape(*self.lead, self.samples, self.size)
            y = y * carried if name == "weight" else y + carried
        return y if self.mask is None else torch.where(self.mask, y, y.new_zeros(()))

    def total(self, v: Tensor) -> Tensor:
        """Add up rows of one group; dense groups are one row already."""
        if self.groups is None:
            return v
        out = v.new_zeros((self.groups.size, *v.shape[1:]))
        return out.index_add(0, self.groups.index, v)

    def spread(self, stat: Tensor) -> Tensor:
        return stat if self.groups is None else stat.index_select(0, self.groups.index)

    def measure(self, v: Tensor, *, fourth: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Mean, covariance, count, and (for Ledoit–Wolf) the mean fourth power of the centred norm."""
        full = v.new_full(v.shape[:-2], self.samples)
        each = full if self.mask is None else self.mask[..., 0].to(self.dtype).sum(-1)
        count = self.total(each)
        safe = count.clamp(min=1)
        mean = self.total(v.sum(-2)) / safe[..., None]
        centred = v - self.spread(mean).unsqueeze(-2)
        if self.mask is not None:
            centred = torch.where(self.mask, centred, centred.new_zeros(()))
        cov = self._outer(centred) / safe[..., None, None]
        power = None
        if fourth:
            power = self.total(centred.square().sum(-1).square().sum(-1)) / safe
        return mean, cov, count, power

    def _outer(self, centred: Tensor) -> Tensor:
        if self.groups is None:
            return centred.mT @ centred
        # chunks of rows bound the memory of the outer products
        step = max(1, 2**22 // max(1, self.size * self.size * product(self.lead[1:])))
        out = centred.new_zeros((self.groups.size, *self.lead[1:], self.size, self.size))
        for start in range(0, centred.shape[0], step):
            part = centred[start : start + step]
            out = out.index_add(0, self.groups.index[start : start + step], part.mT @ part)
        return out

    def given(self, stats: tuple[Tensor, Tensor] | Covariance) -> tuple[Tensor, Tensor]:
        mean, cov = stats[0].to(self.dtype), stats[1].to(self.dtype)
        lead = list(self.lead)
        if self.groups is not None:
            lead[0] = self.groups.size
        want_mean, want_cov = (*lead, self.size), (*lead, self.size, self.size)
        if tuple(mean.shape) != want_mean or tuple(cov.shape) != want_cov:
            raise PatternError(
                f"stats= has shapes {tuple(mean.shape)} and {tuple(cov.shape)}, expected {want_mean} and "
                f"{want_cov} for {self.plan.resolved.text!r}."
            )
        return mean, cov


def _full_precision(device: str) -> AbstractContextManager[Any]:
    """No autocast: a covariance in bfloat16 is no covariance."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _shrink(cov: Tensor, shrinkage: Shrinkage, count: Tensor | None, power: Tensor | None) -> Tensor:
    if isinstance(shrinkage, float | int) and shrinkage == 0:
        return cov
    size = cov.shape[-1]
    trace = cov.diagonal(dim1=-2, dim2=-1).sum(-1)
    centre = trace / size
    weight: Tensor | float
    if isinstance(shrinkage, str):
        assert count is not None
        square = cov.square().sum((-2, -1))
        if shrinkage == "oas":
            # equation 23 of Chen et al., with the data-driven trace terms (as scikit-learn's OAS)
            alpha = square / size**2
            top = alpha + centre.square()
            bottom = (count + 1) * (alpha - centre.square() / size)
            weight = torch.where(bottom > 0, top / bottom.clamp(min=torch.finfo(cov.dtype).tiny), 1.0)
        else:
            assert power is not None
            # Ledoit & Wolf, lemma 3.2–3.4: b²/d² with b² = (mean ‖x‖⁴ − ‖C‖²) / n
            beta = (power - square) / count.clamp(min=1) / size
            delta = square / size - centre.square()
            beta = torch.minimum(beta, delta)
            weight = torch.where(delta > 0, beta / delta.clamp(min=torch.finfo(cov.dtype).tiny), 0.0)
        weight = weight.clamp(0, 1)[..., None, None]
    else:
        weight = shrinkage
    eye = torch.eye(size, dtype=cov.dtype, device=cov.device)
    return (1 - weight) * cov + weight * centre[..., None, None] * eye


def _check_method(method: str, shrinkage: Shrinkage, eps: float, iterations: int) -> None:
    if method not in _METHODS:
        raise ValueError(f"method={method!r} is unknown, expected one of {', '.join(map(repr, _METHODS))}.")
    if isinstance(shrinkage, str):
        if shrinkage not in ("ledoit-wolf", "oas"):
            raise ValueError(f"shrinkage={shrinkage!r} is unknown, expected a number, 'ledoit-wolf' or 'oas'.")
    elif not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage={shrinkage} is outside [0, 1].")
    if not eps >= 0:
        raise ValueError(f"eps={eps}, expected at least 0.")
    if iterations < 1:
        raise ValueError(f"iterations={iterations} is not positive.")
