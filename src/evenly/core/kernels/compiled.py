"""Normalization under ``torch.compile`` and ``torch.export``: the operators ``evenly::fused_normalize`` and
``evenly::fused_normalize_backward``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evenly.core.kernels import reference
from evenly.core.kernels.launch import Entry, rows, served
from evenly.core.kernels.lowering import block, dense_order, laid_mask, mask_index, weight_index
from evenly.core.kernels.operator import build, possible
from evenly.core.kernels.reference import Call, Result
from evenly.core.patterns import Plan, bind

__all__ = ["run", "supports"]

_SCHEMA = (
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mean, Tensor? var, Tensor? mask, str pattern, "
    "str[] names, SymInt[] sizes, str affine, bool center, str scale, float eps, float correction, str activation, "
    "bool want_stats) -> (Tensor y, Tensor stats, Tensor mean, Tensor var)"
)
_SCHEMA_BACKWARD = (
    "(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor stats, Tensor? dmean, Tensor? dvar, "
    "Tensor? mask, str pattern, str[] names, SymInt[] sizes, str affine, bool center, str scale, float eps, "
    "float correction, str activation, bool given, bool[] needs) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)"
)
_library = torch.library.Library("evenly", "DEF")
_library.define("fused_normalize" + _SCHEMA)
_library.define("fused_normalize_backward" + _SCHEMA_BACKWARD)


def _rebuilt(
    x: Tensor,
    first: Tensor | None,
    pattern: str,
    names: list[str],
    sizes: list[int],
    affine: str,
    options: tuple[Any, ...],
    given: bool,
    mask: Tensor | None,
) -> tuple[Entry, Tensor | None]:
    """The entry of an operator's arguments, and the mask in the order of memory."""
    center, scale, eps, correction, activation = options
    plan = bind(pattern, x.shape, dict(zip(names, sizes, strict=True)))
    order = dense_order(x)
    assert order is not None
    where = None if mask is None else mask_index(x.shape, order, mask.shape)
    laid = None if mask is None else laid_mask(x.shape, order, mask)
    groups = tuple(tuple(int(i) for i in group.split()) for group in affine.split(",")) if affine else None
    carried = None if first is None else (first.dtype, first.shape)
    key = ("operator", order, x.dtype, x.device, options, affine, carried, given, where)
    entry = plan.cache.get(key)
    if entry is None:
        call = Call(
            center=center,
            scale=scale or None,
            eps=eps,
            correction=correction,
            weight=first,
            affine=groups,
            activation=activation or None,
        )
        entry = build(x, plan, call, order, first, given=given, signs=False, where=where)
        assert entry is not None
        plan.cache[key] = entry
    return entry, laid


def _filled(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _operator(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    mask: Tensor | None,
    pattern: str,
    names: list[str],
    sizes: list[int],
    affine: str,
    center: bool,
    scale: str,
    eps: float,
    correction: float,
    activation: str,
    want_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first = weight if weight is not None else bias
    given = mean is not None or var is not None
    options = (center, scale, eps, correction, activation)
    entry, flags = _rebuilt(x, first, pattern, names, sizes, affine, options, given, mask)
    stats = torch.empty_like(entry.stats_like)
    moments = entry.empty_moments() if want_stats else (stats.new_empty(0), stats.new_empty(0))
    fixed = (
        None if mean is None or not center else entry.flat(mean, "mean"),
        None if var is None or not scale else entry.flat(var, "var"),
    )
    laid = None if residual is None else entry.like(residual, x)
    y = entry.forward(
        x, _filled(weight), _filled(bias), laid, stats, given=fixed, moments=moments if want_stats else None, mask=flags
    )
    return y, stats, *moments


def _operator_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    mask: Tensor | None,
    pattern: str,
    names: list[str],
    sizes: list[int],
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan = bind(pattern, x.shape, dict(zip(names, sizes, strict=True)))
    many = 1
    for size in plan.stat_shape:
        many = many * size
    dtype = reference.accumulate_dtype(x.dtype)
    kept = many if rest[-1] else 0
    stats = x.new_empty((rows(rest[2] or None, x.dtype, masked=mask is not None), many), dtype=dtype)
    return torch.empty_like(x), stats, x.new_empty(kept, dtype=dtype), x.new_empty(kept, dtype=dtype)


def _operator_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stats: Tensor,
    dmean: Tensor | None,
    dvar: Tensor | None,
    mask: Tensor | None,
    pattern: str,
    names: list[str],
    sizes: list[int],
    affine: str,
    center: bool,
    scale: str,
    eps: float,
    correction: float,
    activation: str,
    given: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first = weight if weight is not None else bias
    options = (center, scale, eps, correction, activation)
    entry, flags = _rebuilt(x, first, pattern, names, sizes, affine, options, given, mask)
    laid = None if residual is None else entry.like(residual, x)
    weight, bias = _filled(weight), _filled(bias)
    wanted = (needs[0], needs[1], needs[2], needs[3] and (entry.activation is not None or mask is not None))
    found = entry.backward(
        entry.like(dy, x), x, weight, bias, laid, stats, None, wanted, _filled(dmean), _filled(dvar), flags
    )
    nothing = (x.new_empty(0), x.new_empty(0), x.new_empty(0), x.new_empty(0))
    return tuple(n if f is None else f for f, n in zip(found, nothing, strict=True))  # type: ignore[return-value]


def _operator_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs, activation, mask = rest[-1], rest[-3], rest[3]

    def like(t: Tensor | None, need: bool) -> Tensor:
        return torch.empty_like(t, memory_format=torch.preserve_format) if t is not None and need else x.new_empty(0)

    def parameter(t: Tensor | None, need: bool) -> Tensor:
        return t.new_empty(t.shape) if t is not None and need else x.new_empty(0)

    return (
        like(x, needs[0]),
        parameter(weight, needs[1]),
        parameter(bias, needs[2]),
        like(x, needs[3] and (activation != "" or mask is not None)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, mean, var, mask, *rest = inputs
    keep = residual if rest[-2] else None
    ctx.save_for_backward(x, weight, bias, keep, output[1], mask)
    ctx.arguments = rest[:-1]
    ctx.want_stats = rest[-1]
    ctx.given = mean is not None or var is not None
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)


def _operator_autograd(
    ctx: Any, dy: Tensor | None, dstats: Tensor | None, dmean: Tensor | None, dvar: Tensor | None
) -> tuple[Any, ...]:
    x, weight, bias, residual, stats, mask = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    if dy is None:
        dy = torch.zeros_like(x)
    if not ctx.want_stats:
        dmean = dvar = None
    center, scale = ctx.arguments[4:6]
    if not center and scale != "std":
        dmean = None  # the mean is zero, a constant
    activation = ctx.arguments[-1]
    wanted = [needs[0], needs[1] and weight is not None, needs[2] and bias is not None, needs[3]]
    dx, dweight, dbias, dresidual = torch.ops.evenly.fused_normalize_backward(
        dy, x, weight, bias, residual, stats, dmean, dvar, mask, *ctx.arguments, ctx.given, wanted
    )
    if activation == "" and mask is None:
        dresidual = dy
    grads = [g if need else None for g, need in zip((dx, dweight, dbias, dresidual), wanted, strict=True)]
    return (*grads, *[None] * 13)


for _dispatch in ("CPU", "CUDA"):
    _library.impl("fused_normalize", _operator, _dispatch)
    _library.impl("fused_normalize_backward", _operator_backward, _dispatch)
torch.library.register_fake("evenly::fused_normalize", _operator_fake, lib=_library)
torch.library.register_fake("evenly::fused_normalize_backward", _operator_backward_fake, lib=_library)
torch.library.register_autograd(
    "evenly::fused_normalize", _operator_autograd, setup_context=_setup_context, lib=_library
)


def supports(x: Tensor, plan: Plan, call: Call) -> bool:
    """Whether the operator computes this call; asked while compiling, where sizes may be symbols."""
    if not possible(x, call) or not served(x.device.type) or x.numel() == 0:
        return False
    if call.want_stats and (call.mean is not None or call.var is not None):
        return False
    own_norm = call.scale in ("l1", "max") or (call.scale == "l2" and x.dtype == torch.float64)
    if x.device.type == "cuda" and own_norm:
        return False  # as the constructor of its entries says
    order = tuple(range(x.ndim))
    lowered = block(plan, order)
    if lowered is None or lowered.kept != tuple(sorted(lowered.kept)):
        return False
    first = call.weight if call.weight is not None else call.bias
    if first is None or first.ndim == 0:
        return True
    if call.affine is None:
        return False
    plan.affine_in(first, call.affine, "weight")
    index = weight_index(plan, order, call.affine)
    # a weight that starts over inside a run, or lasts longer than one, is rare and left to PyTorch
    return index is not None and _tiles(lowered.sizes, index)


def _tiles(sizes: tuple[int, int, int, int], index: tuple[int, int]) -> bool:
    k1, r1 = sizes[2:]
    wdiv, wsize = index
    return bool(
        wdiv % r1 == 0 or r1 % (wdiv * wsize) == 0 or (wdiv * wsize) % r1 == 0 or (k1 * r1) % (wdiv * wsize) == 0
    )


def run(x: Tensor, plan: Plan, call: Call) -> Result:
    """A call as one operator of the graph."""
    if not x.is_contiguous():
        x = x.contiguous()
    affine = "" if call.affine is None else ",".join([" ".join([str(i) for i in group]) for group in call.affine])
    names, sizes = plan.named_sizes()
    y, stats, mean, var = torch.ops.evenly.fused_normalize(
        x,
        call.weight,
        call.bias,
        call.residual,
        call.mean if call.center else None,
        call.var if call.scale is not None else None,
        call.mask,
        plan.resolved.text,
        names,
        sizes,
        affine,
        call.center,
        call.scale or "",
        call.eps,
        float(call.correction),
        call.activation or "",
        call.want_stats,
    )
    if not call.want_stats:
        return Result(y, None, None, None)
    mean = plan.statistic_out(mean.reshape(plan.stat_shape))
    var = plan.statistic_out(var.reshape(plan.stat_shape))
    if call.mask is None:
        return Result(y, mean, var, torch.full_like(var, plan.count, requires_grad=False))
    return Result(y, mean, var, plan.statistic_out(stats[3].detach().reshape(plan.stat_shape)))
