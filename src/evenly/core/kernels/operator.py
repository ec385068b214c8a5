"""Fused kernels as a backend of ``normalize`` and ``moments``: how a call finds what launches it.

A call is looked up by pattern, shape, dtype and options; what was worked out for it (the canonical block, where
weights lie) is kept in an :class:`~evenly.core.kernels.launch.Entry`, so that a repeated call costs a lookup, an
allocation and the launch. There are three ways in:

- without gradient: directly;
- with gradient: an autograd function whose backward is a kernel too, and whose second derivative is PyTorch's
  (:mod:`evenly.core.kernels.derivatives`);
- while compiling or exporting: operators (:mod:`evenly.core.kernels.compiled`).

Under ``torch.func`` transforms, forward-mode derivatives, tracing and dispatch modes the PyTorch reference is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evenly.core.kernels import reference
from evenly.core.kernels.derivatives import Measure, Normalize, NormalizeGiven, applied
from evenly.core.kernels.launch import (
    DTYPES,
    MEASURED,
    PLAIN,
    SCALES,
    Entry,
    Unsupported,
    kind_of,
    knows,
    ordinary,
    served,
)
from evenly.core.kernels.lowering import block, dense_order, laid_mask, mask_index, weight_index
from evenly.core.kernels.reference import Call, Result
from evenly.core.patterns import Plan

__all__ = ["again", "build", "measure", "possible", "recall", "remember", "run", "supports"]

_grad_enabled = torch.is_grad_enabled
_function = applied(Normalize)


def possible(x: Tensor, call: Call) -> bool:
    """Whether kernels may compute a call, as far as memory does not matter; also asked while compiling."""
    device = x.device
    if not knows(device.type) or x.dtype not in DTYPES or x.layout != torch.strided:
        return False
    if call.scale not in SCALES or call.groups is not None:
        return False
    if call.mask is not None and call.mask.device != device:
        return False
    given = call.mean is not None or call.var is not None
    if given and call.want_stats and (call.var is None or call.mask is not None):
        return False
    for stat in (call.mean, call.var):
        if stat is not None and stat.device != device:
            return False
    if _graded(call) and (call.mask is not None or torch.compiler.is_compiling()):
        return False
    if call.residual is not None and (call.residual.dtype != x.dtype or call.residual.device != device):
        return False
    first = call.weight if call.weight is not None else call.bias
    for parameter in (call.weight, call.bias):
        if parameter is None:
            continue
        assert first is not None
        if (
            # the compiler cannot trace the question; what it passes on has no negative bit
            (not torch.compiler.is_compiling() and parameter.is_neg())
            or parameter.dtype not in DTYPES
            or parameter.dtype != first.dtype
            or parameter.device != device
        ):
            return False
        if parameter.shape != first.shape or (parameter.dtype == torch.float64) > (x.dtype == torch.float64):
            return False
    return True


def _graded(call: Call) -> bool:
    """Whether the statistics that are given are to have a gradient."""
    return torch.is_grad_enabled() and any(stat is not None and stat.requires_grad for stat in (call.mean, call.var))


def _entry(x: Tensor, plan: Plan, call: Call) -> Entry | None:
    """The entry for a call; None if no kernel takes it."""
    order = dense_order(x)
    if order is None:
        return None
    first = call.weight if call.weight is not None else call.bias
    given = call.mean is not None or call.var is not None
    graded = _graded(call)
    signs = call.activation == "relu" and call.residual is not None
    where = None if call.mask is None else mask_index(x.shape, order, call.mask.shape)
    key = (
        order,
        x.dtype,
        x.device,
        call.center,
        call.scale,
        call.eps,
        call.correction,
        call.affine if first is not None else None,
        None if first is None else (first.dtype, first.shape),
        call.activation,
        signs,
        given,
        graded,
        where,
    )
    found = plan.cache.get(key, False)
    if found is not False:
        return found
    entry = build(x, plan, call, order, first, given=given, signs=signs, graded=graded, where=where)
    plan.cache[key] = entry
    return entry


def build(
    x: Tensor,
    plan: Plan,
    call: Call,
    order: tuple[int, ...],
    first: Tensor | None,
    *,
    given: bool,
    signs: bool,
    graded: bool = False,
    where: tuple[int, int, int] | None = None,
) -> Entry | None:
    lowered = block(plan, order)
    if lowered is None or lowered.kept != tuple(sorted(lowered.kept)):
        return None
    index: tuple[int, int] | None = (1, 0)
    if first is not None:
        if first.ndim == 0:
            index = (1, 1)
        else:
            plan.affine_in(first, call.affine, "weight" if call.weight is not None else "bias")
            assert call.affine is not None
            index = weight_index(plan, order, call.affine)
    if index is None:
        return None
    if graded:
        # the gradient of a statistic follows from those of a weight and a bias of its own
        k0, r0, k1, r1 = lowered.sizes
        own = (r1, k0 * k1) if k0 * k1 > 1 else (1, 1)
        if (k0 != 1 and r0 != 1) or (first is not None and index != own):
            return None
        index = own
        shape = (k0 * k1,) if first is None else first.shape
        first = x.new_empty(shape, dtype=reference.accumulate_dtype(x.dtype))
    options = {
        "center": call.center,
        "scale": call.scale,
        "eps": call.eps,
        "correction": call.correction,
        "affine": call.affine,
        "activation": call.activation,
    }
    kind = kind_of(x.device.type)
    assert kind is not None
    try:
        return kind(plan, order, lowered, index, x, first, options, signs=signs, given=given, mask=where)
    except Unsupported:
        return None


def _dense(x: Tensor) -> Tensor:
    """``x``, copied once if its memory has gaps."""
    x = x.resolve_neg()
    return x if dense_order(x) is not None else x.contiguous()


def supports(x: Tensor, plan: Plan, call: Call) -> bool:
    """Whether the kernels compute this call."""
    if not possible(x, call) or not served(x.device.type):
        return False
    if x.numel() == 0 or not ordinary() or type(x) not in PLAIN:
        return False
    return _entry(_dense(x), plan, call) is not None


def run(x: Tensor, plan: Plan, call: Call) -> Result:
    """Compute a call that is supported."""
    x = _dense(x)
    entry = _entry(x, plan, call)
    assert entry is not None
    given = MEASURED
    if call.mean is not None or call.var is not None:
        given = (
            None if call.mean is None or not call.center else entry.flat(call.mean, "mean"),
            None if call.var is None or call.scale is None else entry.flat(call.var, "var"),
        )
    measures = call.want_stats and given is MEASURED
    mask = None if call.mask is None else laid_mask(x.shape, entry.order, call.mask)
    out: Any
    if _graded(call):
        out = (_apply_statistics(entry, x, call, given), None, None)
    else:
        out = _apply(entry, x, call.weight, call.bias, call.residual, given, measures, mask=mask)
    y, mean, var = out[:3]
    if not call.want_stats:
        return Result(y, None, None, None)
    if measures:
        mean, var = entry.shaped(mean), entry.shaped(var)
    else:  # those that were given; gradients of them are left to PyTorch
        assert call.var is not None
        var = entry.shaped(entry.flat(call.var, "var"))
        mean = torch.zeros_like(var) if call.mean is None else entry.shaped(entry.flat(call.mean, "mean"))
    count = torch.full_like(var, plan.count, requires_grad=False) if mask is None else entry.shaped(out[3])
    return Result(y, mean, var, count)


def _apply(
    entry: Entry,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    given: tuple[Tensor | None, Tensor | None] = MEASURED,
    want_stats: bool = False,
    running: tuple[Tensor, Tensor, float] | None = None,
    mask: Tensor | None = None,
) -> Any:
    """The output, mean and variance; with a mask and statistics the count too."""
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if _grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        spec = (
            entry.spec
            if given is MEASURED and running is None and not want_stats and mask is None
            else (entry, given, want_stats, running, mask)
        )
        out = _function(x, weight, bias, residual, spec)
        return out if want_stats else (out, None, None)
    if residual is not None:
        residual = entry.like(residual, x)
    if not want_stats:
        return entry.forward(x, weight, bias, residual, None, None, given, None, running, mask), None, None
    moments = entry.empty_moments()
    if mask is None:
        return (entry.forward(x, weight, bias, residual, None, None, given, moments, running), *moments)
    stats = torch.empty_like(entry.stats_like)
    y = entry.forward(x, weight, bias, residual, stats, None, given, moments, running, mask)
    return y, *moments, stats[3]


def _apply_statistics(entry: Entry, x: Tensor, call: Call, given: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """The output, differentiable in the statistics that are given."""
    assert entry.weight_shape is not None
    like = x.new_ones(entry.weight_shape, dtype=entry.stats_dtype)
    weight = like if call.weight is None else call.weight.to(like.dtype).contiguous()
    bias = torch.zeros_like(like) if call.bias is None else call.bias.to(like.dtype).contiguous()
    return NormalizeGiven.apply(x, weight, bias, call.residual, *given, entry)


def measure(x: Tensor, plan: Plan, correction: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """Mean, variance and count; None if no kernel takes the call."""
    graded = _grad_enabled() and x.requires_grad
    # the weight makes nothing of a gradient of values that there is not, see Measure
    call = Call(
        scale=None,
        correction=correction,
        weight=x.new_zeros((), dtype=reference.accumulate_dtype(x.dtype)) if graded else None,
        want_stats=True,
    )
    if (graded and plan.count <= correction) or not supports(x, plan, call):
        return None
    x = _dense(x)
    entry = _entry(x, plan, call)
    assert entry is not None
    found = Measure.apply(x, call.weight, entry) if graded else entry.moments(x)
    mean, var = (entry.shaped(stat) for stat in found)
    return mean, var, torch.full_like(var, plan.count, requires_grad=False)


# ---- the shortest way -----------------------------------------------------------------------------------------------

_quick: dict[tuple[Any, ...], Entry] = {}


def remember(key: tuple[Any, ...], x: Tensor, plan: Plan, call: Call) -> None:
    """Let the next call with this key, in this memory layout, take the short way."""
    if _graded(call):
        return
    first = call.weight if call.weight is not None else call.bias
    if dense_order(x) is not None and supports(x, plan, call) and (first is None or call.affine is not None):
        entry = _entry(x, plan, call)
        assert entry is not None
        if entry.ready is None:
            entry.prepare(_function)
        if len(_quick) >= 8192:
            _quick.clear()
        if x.is_cpu:
            _quick[key if x.is_contiguous() else (key, x.stride())] = entry
        else:
            _quick[(key, x.stride(), x.device)] = entry


def recall(key: tuple[Any, ...], x: Tensor) -> Entry | None:
    """The entry of a call like one that was remembered."""
    if type(x) not in PLAIN:
        return None
    try:
        if x.is_cpu:
            return _quick.get(key if x.is_contiguous() else (key, x.stride()))
        return _quick.get((key, x.stride(), x.device)) if x.layout is torch.strided else None
    except TypeError:  # symbolic sizes, or arguments that are about to be refused
        return None


def again(
    entry: Entry,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    momentum: float | None = None,
    tracked: Tensor | None = None,
) -> Tensor | None:
    """The output of a call like one that was remembered; None if it must take the long way.

    Args:
        mean, var: what to use, if the key says so; with a momentum running statistics, which move towards what is
            measured.
        tracked: a counter of such moves.
    """
    if entry.ready is not None:
        y = entry.ready(x, weight, bias, residual, mean, var, momentum, tracked)
        if y is not None:
            return y
    if x.is_neg() or not ordinary():
        return None
    if not (weight is None or _is_parameter(weight, entry)) or not (bias is None or _is_parameter(bias, entry)):
        return None
    if residual is not None and (
        residual.shape != entry.shape
        or residual.dtype != x.dtype
        or not (residual.is_cpu if entry.on_cpu else residual.device == entry.device)
        or type(residual) not in PLAIN
    ):
        return None
    if mean is None and var is None:
        return _apply(entry, x, weight, bias, residual)[0]
    if mean is None or var is None or not (_is_statistic(mean, entry) and _is_statistic(var, entry)):
        return None
    as_they_are = mean.dtype == var.dtype and (
        mean.dtype == entry.stats_dtype or (entry.converts and mean.dtype in DTYPES)
    )
    stats = (mean, var) if as_they_are else (mean.to(entry.stats_dtype), var.to(entry.stats_dtype))
    if momentum is None:
        return _apply(entry, x, weight, bias, residual, stats)[0]
    if entry.plan.count < 2:
        return None
    y = _apply(entry, x, weight, bias, residual, running=(*stats, momentum))[0]
    if as_they_are:
        torch.autograd.graph.increment_version(stats)
    else:
        mean.copy_(stats[0])
        var.copy_(stats[1])
    if tracked is not None:
        tracked.add_(1)
    return y


def _is_parameter(parameter: Tensor, entry: Entry) -> bool:
    return (
        parameter.shape == entry.weight_shape
        and parameter.dtype == entry.weight_dtype
        and parameter.is_contiguous()
        and (parameter.is_cpu if entry.on_cpu else parameter.device == entry.device)
        and not parameter.is_neg()
        and type(parameter) in PLAIN
    )


def _is_statistic(stat: Tensor, entry: Entry) -> bool:
    return (
        stat.shape == entry.plan.out_shape
        and stat.is_contiguous()
        and (stat.is_cpu if entry.on_cpu else stat.device == entry.device)
        and not stat.requires_grad
        and type(stat) in PLAIN
        and entry.natural
    )
