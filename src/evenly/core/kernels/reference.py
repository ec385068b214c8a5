"""The PyTorch reference: any device, any layout, any order of derivative.

It is the fallback where no kernel applies and what kernels are tested against. Statistics are computed in
float32 (float64 for float64 input) in two passes: the mean, then the moments of the centred values. The mean
is corrected by the mean of the centred values, so that its rounding does not enter the result:

.. math::  m_0 = \\overline{x}, \\quad m = m_0 + \\overline{x - m_0}, \\quad v = \\overline{(x - m)^2}.

The correction is zero in exact arithmetic and so is its derivative; it is therefore not differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from evenly.core.patterns import Plan

__all__ = ["Call", "Groups", "Result", "accumulate_dtype", "measure", "normalize"]


@dataclass(frozen=True)
class Groups:
    """Ragged groups: element ``i`` of the leading axis belongs to group ``index[i]`` of ``size`` groups."""

    index: Tensor
    size: int


@dataclass(frozen=True)
class Call:
    """What ``normalize`` was asked to do, checked and complete."""

    center: bool = True
    scale: str | None = "std"
    eps: float = 1e-5
    correction: float = 0
    weight: Tensor | None = None
    bias: Tensor | None = None
    affine: tuple[tuple[int, ...], ...] | None = None
    residual: Tensor | None = None
    activation: str | None = None
    mask: Tensor | None = None
    groups: Groups | None = None
    mean: Tensor | None = None  # statistics to use instead of measuring, in the order of the right-hand side
    var: Tensor | None = None
    want_stats: bool = False


class Result(NamedTuple):
    """The normalized tensor and, where wanted, the statistics in the order of the right-hand side."""

    y: Tensor
    mean: Tensor | None
    var: Tensor | None
    count: Tensor | None  # type: ignore[assignment]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of a tensor are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Sharing:
    """The two directions between values and the statistics that they share: reduce, and spread back."""

    def __init__(self, plan: Plan, mask: Tensor | None, groups: Groups | None, dtype: torch.dtype) -> None:
        self.plan = plan
        self.mask = mask
        self.groups = groups
        self.dims = plan.reduced
        self.inner = tuple(axis for axis in plan.reduced if axis != 0) if groups is not None else plan.reduced
        self.count: Tensor | float
        if mask is None and groups is None:
            self.count = plan.count
        elif groups is None:
            assert mask is not None
            self.count = self.total(mask.to(dtype).expand(plan.sizes))
        else:
            # (rows, …) of how many values each row brings, then added up by group
            index = groups.index
            if mask is None:
                each = plan.count // plan.sizes[0] if plan.sizes[0] else 0
                rows = torch.full((plan.sizes[0],), each, dtype=dtype, device=index.device)
                ones = [1] * (len(plan.sizes) - 1)
                self.count = rows.new_zeros(groups.size).index_add(0, index, rows).reshape(-1, *ones)
            else:
                self.count = self.total(mask.to(dtype).expand(plan.sizes))

    def total(self, v: Tensor) -> Tensor:
        """Sum of the values that share a statistic; masked values are zero already."""
        if self.groups is None:
            return v.sum(self.dims, keepdim=True) if self.dims else v
        rows = v.sum(self.inner, keepdim=True) if self.inner else v
        out = rows.new_zeros((self.groups.size, *rows.shape[1:]))
        return out.index_add(0, self.groups.index, rows)

    def mean(self, v: Tensor) -> Tensor:
        if isinstance(self.count, Tensor):
            return self.total(v) / self.count.clamp(min=1)
        if not self.dims:
            return v
        return v.mean(self.dims, keepdim=True)

    def largest(self, v: Tensor) -> Tensor:
        """Largest of non-negative values that share a statistic; 0 of none."""
        if v.numel() == 0:
            lead = self.plan.stat_shape if self.groups is None else (self.groups.size, *self.plan.stat_shape[1:])
            return v.new_zeros(lead)
        if self.groups is None:
            return v.amax(self.dims, keepdim=True) if self.dims else v
        rows = v.amax(self.inner, keepdim=True) if self.inner else v
        out = rows.new_zeros((self.groups.size, *rows.shape[1:]))
        index = self.groups.index.reshape(-1, *[1] * (rows.ndim - 1)).expand_as(rows)
        return out.scatter_reduce(0, index, rows, "amax")

    def spread(self, stat: Tensor) -> Tensor:
        """A statistic, broadcast back to the values that share it."""
        return stat if self.groups is None else stat.index_select(0, self.groups.index)

    def hide(self, v: Tensor) -> Tensor:
        """Zero where the mask is false."""
        return v if self.mask is None else torch.where(self.mask, v, v.new_zeros(()))

    def out(self, stat: Tensor) -> Tensor:
        """A statistic in the order of the right-hand side, groups first."""
        if self.groups is None:
            return self.plan.statistic_out(stat)
        kept = [axis for group in self.plan.resolved.outputs for axis in group]
        stat = stat.permute(0, *kept, *[a for a in self.plan.reduced if a != 0])
        return stat.reshape(self.groups.size, *self.plan.out_shape)


def _elementary(x: Tensor, plan: Plan) -> Tensor:
    return x.reshape(plan.sizes) if plan.split else x


def _mask_elementary(mask: Tensor, plan: Plan) -> Tensor:
    return mask.expand(plan.shape).reshape(plan.sizes) if plan.split else mask.expand(plan.sizes)


def _center(v: Tensor, sharing: _Sharing) -> tuple[Tensor, Tensor]:
    """Centred values and their mean, corrected for the rounding of the mean."""
    mean = sharing.mean(v)
    centred = sharing.hide(v - sharing.spread(mean))
    correction = sharing.mean(centred.detach())
    # An infinite or missing value must give what the plain formula gives.
    correction = torch.where(correction.isfinite(), correction, torch.zeros_like(correction))
    return sharing.hide(centred - sharing.spread(correction)), mean + correction


def _corrected(var: Tensor, sharing: _Sharing, correction: float) -> Tensor:
    if not correction:
        return var
    count = sharing.count
    if isinstance(count, Tensor):
        share = count / (count - correction).clamp(min=0)
        return var * torch.where(count > 0, share, torch.zeros_like(share))  # the variance of nothing is zero
    left = max(count - correction, 0)
    return var * (count / left if left else float("nan"))


def measure(
    x: Tensor, plan: Plan, *, mask: Tensor | None, groups: Groups | None, correction: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count in the order of the right-hand side."""
    dtype = accumulate_dtype(x.dtype)
    sharing = _Sharing(plan, None if mask is None else _mask_elementary(mask, plan), groups, dtype)
    v = sharing.hide(_elementary(x, plan).to(dtype))
    centred, mean = _center(v, sharing)
    var = _corrected(sharing.mean(centred.square()), sharing, correction)
    return sharing.out(mean), sharing.out(var), _count_out(sharing, mean)


def _count_out(sharing: _Sharing, like: Tensor) -> Tensor:
    count = sharing.count
    if not isinstance(count, Tensor):
        count = torch.full_like(like, count, requires_grad=False)
    return sharing.out(count.expand(like.shape))


def _activate(y: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return y
    if activation == "relu":
        return torch.relu(y)
    if activation == "silu":
        return torch.nn.functional.silu(y)
    return torch.nn.functional.gelu(y)


def normalize(x: Tensor, plan: Plan, call: Call) -> Result:
    """Normalize a tensor as a call describes."""
    dtype = accumulate_dtype(x.dtype)
    mask = None if call.mask is None else _mask_elementary(call.mask, plan)
    sharing = _Sharing(plan, mask, call.groups, dtype)
    v = sharing.hide(_elementary(x, plan).to(dtype))

    mean: Tensor | None = None
    var: Tensor | None = None
    if call.var is not None or call.mean is not None:
        v, mean, var = _given(v, plan, call, sharing, dtype)
    else:
        v, mean, var = _measured(v, call, sharing)

    y = _affine(v, plan, call, dtype)
    if call.residual is not None:
        y = y + sharing.hide(_elementary(call.residual, plan).to(dtype))
    y = sharing.hide(_activate(y, call.activation))
    y = y.reshape(plan.shape).to(x.dtype) if plan.split else y.to(x.dtype)
    if not call.want_stats:
        return Result(y, None, None, None)
    assert var is not None
    if mean is None:
        mean = torch.zeros_like(var)
    return Result(y, sharing.out(mean), sharing.out(var), _count_out(sharing, var))


def _given(
    v: Tensor, plan: Plan, call: Call, sharing: _Sharing, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    mean = var = None
    if call.mean is not None:
        mean = _stat_in(call.mean, "mean", plan, sharing, dtype)
        if call.center:
            v = v - sharing.spread(mean)
    if call.var is not None:
        var = _stat_in(call.var, "var", plan, sharing, dtype)
        if call.scale is not None:
            v = v / sharing.spread(torch.sqrt(var + call.eps))
    return v, mean, var


def _stat_in(stat: Tensor, name: str, plan: Plan, sharing: _Sharing, dtype: torch.dtype) -> Tensor:
    if sharing.groups is None:
        return plan.statistic_in(stat.to(dtype), name)
    size, expected = sharing.groups.size, plan.out_shape
    if tuple(stat.shape) != (size, *expected):
        raise ValueError(
            f"{name} has shape {tuple(stat.shape)}, expected {(size, *expected)}: the groups, then the axes on "
            f"the right of {plan.resolved.text!r}."
        )
    order = [axis for group in plan.resolved.outputs for axis in group]
    stat = stat.to(dtype).reshape([size, *[plan.sizes[axis] for axis in order]])
    stat = stat.permute(0, *[1 + order.index(axis) for axis in sorted(order)])
    return stat.reshape([size, *plan.stat_shape[1:]])


def _measured(v: Tensor, call: Call, sharing: _Sharing) -> tuple[Tensor, Tensor | None, Tensor | None]:
    mean: Tensor | None = None
    var: Tensor | None = None
    scale = call.scale
    if scale == "std" and not call.center:
        # divide by the standard deviation, keep the mean
        centred, mean = _center(v, sharing)
        var = _corrected(sharing.mean(centred.square()), sharing, call.correction)
        return v / sharing.spread(torch.sqrt(var + call.eps)), mean, var
    if call.center:
        v, mean = _center(v, sharing)
    if scale in ("std", "rms") or (scale is None and call.want_stats):
        var = _corrected(sharing.mean(v.square()), sharing, call.correction)
        if scale is not None:
            v = v / sharing.spread(torch.sqrt(var + call.eps))
    elif scale is not None:
        v = v / sharing.spread(_norm(v, scale, call.eps, sharing))
    return v, mean, var


def _norm(v: Tensor, scale: str, eps: float, sharing: _Sharing) -> Tensor:
    if scale == "l1":
        return sharing.total(v.abs()).clamp(min=eps)
    if scale == "max":
        return sharing.largest(v.abs()).clamp(min=eps)
    # Scaled by the largest value, squares neither overflow nor underflow. The norm does not depend on that
    # scale, which is therefore not differentiated. The root has no derivative at zero: the clamp makes it 0.
    largest = sharing.largest(v.detach().abs())
    largest = torch.where((largest > 0) & largest.isfinite(), largest, torch.ones_like(largest))
    total = sharing.total((v / sharing.spread(largest)).square())
    return (total.clamp(min=torch.finfo(v.dtype).tiny).sqrt() * largest).clamp(min=eps)


def _affine(v: Tensor, plan: Plan, call: Call, dtype: torch.dtype) -> Tensor:
    if call.weight is not None:
        v = v * plan.affine_in(call.weight.to(dtype), call.affine, "weight")
    if call.bias is not None:
        v = v + plan.affine_in(call.bias.to(dtype), call.affine, "bias")
    return v
