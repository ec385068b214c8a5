"""The derivatives of normalization and moments by kernels, and by PyTorch operators where they are differentiated
themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from evenly.core import recompute
from evenly.core.kernels import reference
from evenly.core.kernels.launch import Entry, ordinary
from evenly.core.kernels.reference import Call

__all__ = ["Measure", "Normalize", "NormalizeGiven", "announced", "applied"]

_grad_enabled = torch.is_grad_enabled


class Normalize(torch.autograd.Function):
    """Kernels forward and backward; the derivative of the backward is PyTorch's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, spec: Any
    ) -> Any:
        entry, given, want_stats, running, mask = spec
        ctx.spec = spec
        stats = torch.empty_like(entry.stats_like) if entry.keeps else None
        if residual is None and not want_stats and mask is None:
            # the usual call
            ctx.save_for_backward(x, weight, bias, stats)
            y = entry.forward(x, weight, bias, None, stats, None, given, None, running)
            if recompute.watching():
                _announce(entry, given, y, x, weight, bias, None, stats)
            return y
        bits = torch.empty(entry.signs, dtype=torch.uint8, device=entry.device) if entry.signs else None
        moments = entry.empty_moments() if want_stats else None
        laid = None if residual is None else entry.like(residual, x)
        y = entry.forward(x, weight, bias, laid, stats, bits, given, moments, running, mask)
        # Recomputing what the activation saw takes the residual; its sign alone is kept as bits.
        keep = residual if entry.activation is not None and bits is None else None
        ctx.save_for_backward(x, weight, bias, stats, keep, bits, mask)
        if mask is None and recompute.watching():
            _announce(entry, given, y, x, weight, bias, residual, stats)
        if moments is None:
            return y
        ctx.set_materialize_grads(False)
        constant = [] if entry.means else [moments[0]]
        if mask is None:
            ctx.mark_non_differentiable(*constant)
            return (y, *moments)
        assert stats is not None
        count = stats[3].clone()
        ctx.mark_non_differentiable(count, *constant)
        return (y, *moments, count)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dmean: Tensor | None = None, dvar: Tensor | None = None, dcount: None = None
    ) -> Any:
        saved = ctx.saved_tensors
        needs = ctx.needs_input_grad
        entry: Entry = ctx.spec[0]
        x, weight, bias, stats = saved[:4]
        residual, bits, mask = saved[4:] if len(saved) > 4 else (None, None, None)
        if _grad_enabled() or not ordinary():
            saved = (x, weight, bias, residual, *ctx.spec[1])
            return (*_differentiable(entry, saved, bits, mask, needs, dy, dmean, dvar)[:4], None)
        if dy is None:
            dy = torch.zeros_like(x)
        dy = entry.like(dy, x)
        if residual is not None:
            residual = entry.like(residual, x)
        if dmean is not None:
            dmean = dmean.contiguous()
        if dvar is not None:
            dvar = dvar.contiguous()
        return (*entry.backward(dy, x, weight, bias, residual, stats, bits, needs, dmean, dvar, mask), None)


class NormalizeGiven(torch.autograd.Function):
    """The same with statistics that are given and have a gradient, such as those that processes share.

    With :math:`y = (x - m) r w + b`, :math:`r = (v + \\epsilon)^{-1/2}` and a weight and a bias for each statistic

    .. math:: dm = -r w \\, db, \\qquad dv = -\\tfrac12 r^2 w \\, dw.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        entry: Entry,
    ) -> Tensor:
        given = (mean, var)
        stats = torch.empty_like(entry.stats_like)
        bits = torch.empty(entry.signs, dtype=torch.uint8, device=entry.device) if entry.signs else None
        laid = None if residual is None else entry.like(residual, x)
        y = entry.forward(x, weight, bias, laid, stats, bits, given)
        keep = residual if entry.activation is not None and bits is None else None
        ctx.entry = entry
        ctx.save_for_backward(x, weight, bias, stats, keep, bits, mean, var)
        if recompute.watching():
            _announce(entry, given, y, x, weight, bias, residual, stats)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        entry: Entry = ctx.entry
        x, weight, bias, stats, residual, bits, mean, var = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if _grad_enabled() or not ordinary():
            saved = (x, weight, bias, residual, mean, var)
            return (*_differentiable(entry, saved, bits, None, needs, dy, None, None), None)
        if residual is not None:
            residual = entry.like(residual, x)
        wanted = (needs[0], needs[1] or needs[5], needs[2] or needs[4], needs[3])
        dx, dw, db, dr = entry.backward(entry.like(dy, x), x, weight, bias, residual, stats, bits, wanted)
        dmean = dvar = None
        slope = stats[1] * weight.flatten()
        if needs[4]:
            assert db is not None
            dmean = (-slope * db.flatten()).view_as(mean)
        if needs[5]:
            assert dw is not None
            dvar = (-0.5 * stats[1] * slope * dw.flatten()).view_as(var)
        return dx, dw if needs[1] else None, db if needs[2] else None, dr, dmean, dvar, None


class Measure(torch.autograd.Function):
    """Mean and variance, flat.

    Their gradient is the backward pass of a normalization that divides by nothing, whose output has no gradient:
    ``weight`` is a zero, and ``x`` stands where the gradient of the output would.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, entry: Entry) -> tuple[Tensor, Tensor]:
        stats = torch.empty_like(entry.stats_like)
        ctx.entry = entry
        ctx.save_for_backward(x, weight, stats)
        ctx.set_materialize_grads(False)
        return entry.moments(x, stats)

    @staticmethod
    def backward(ctx: Any, dmean: Tensor | None, dvar: Tensor | None) -> Any:
        entry: Entry = ctx.entry
        x, weight, stats = ctx.saved_tensors
        plan = entry.plan
        if dmean is None and dvar is None:
            return None, None, None
        if dvar is None or _grad_enabled() or not ordinary():
            with torch.enable_grad():
                leaf = x.view_as(x)
                mean, var, _ = reference.measure(
                    leaf, plan, mask=None, groups=None, correction=entry.options["correction"]
                )
                pairs = [(s, entry.shaped(d)) for s, d in ((mean, dmean), (var, dvar)) if d is not None]
                outputs, grads = zip(*pairs, strict=True)
                (dx,) = torch.autograd.grad(outputs, leaf, grads, create_graph=torch.is_grad_enabled())
            return dx, None, None
        dx = entry.backward(
            x, x, weight, None, None, stats, None, (True, False, False, False),
            None if dmean is None else dmean.contiguous(), dvar.contiguous(),
        )[0]  # fmt: skip
        return dx, None, None


def _announce(
    entry: Entry,
    given: tuple[Tensor | None, Tensor | None],
    y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stats: Tensor | None,
) -> None:
    """Let the output be computed again in the backward pass rather than kept; see :mod:`evenly.core.recompute`."""
    mean, var = given
    # Running statistics may move before the backward pass.
    given = (None if mean is None else mean.clone(), None if var is None else var.clone())
    # The sign bits stand for the residual in the backward pass; an activation without bits keeps it.
    spare = residual if entry.signs or entry.activation is None else None
    recompute.announce(y, partial(entry.again, given), (x, weight, bias, residual, stats), spare)


def announced(ctx: Any, y: Tensor) -> None:
    """What :class:`Normalize` does after an ordinary forward pass, for one that was made elsewhere."""
    if recompute.watching():
        entry, given = ctx.spec[:2]
        x, weight, bias, stats = ctx.to_save
        _announce(entry, given, y, x, weight, bias, None, stats)


def applied(kind: Any) -> Callable[..., Any]:
    """What applies an autograd function.

    The public ``apply`` first asks whether a transform of torch.func is active, and binds arguments to defaults. The
    callers here have asked; without it a call is a quarter cheaper.
    """
    return super(torch.autograd.Function, kind).apply


def _differentiable(
    entry: Entry,
    saved: tuple[Tensor | None, ...],
    bits: Tensor | None,
    mask: Tensor | None,
    needs: tuple[bool, ...],
    dy: Tensor | None,
    dmean: Tensor | None,
    dvar: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients by PyTorch operators, so that they have derivatives themselves.

    ``saved`` are x, weight, bias, residual and the statistics that were given.
    """
    x, residual = saved[0], saved[3]
    assert x is not None
    needs = (*needs[:4], False, False) if len(needs) < 6 else needs[:6]
    options = dict(entry.options)
    through: Tensor | None = None
    if bits is not None:
        # y = relu(v + residual): its derivative is the sign, which is constant
        dy = None if dy is None else torch.where(entry.positive(bits, x), dy, dy.new_zeros(()))
        options["activation"] = None
    if needs[3] and residual is None:
        through = dy
    plan = entry.plan
    if mask is not None:
        mask = mask.permute([entry.order.index(axis) for axis in range(x.ndim)])
        if through is not None:
            through = torch.where(mask, through, through.new_zeros(()))
    with torch.enable_grad():
        # Views, so that one tensor in two places has a gradient for each.
        inputs = [None if t is None else t.view_as(t) for t in saved]
        call = Call(
            **options,
            weight=inputs[1],
            bias=inputs[2],
            residual=inputs[3],
            mask=mask,
            mean=None if inputs[4] is None else entry.shaped(inputs[4].to(entry.stats_dtype)),
            var=None if inputs[5] is None else entry.shaped(inputs[5].to(entry.stats_dtype)),
            want_stats=dmean is not None or dvar is not None,
        )
        assert inputs[0] is not None
        result = reference.normalize(inputs[0], plan, call)
        outputs, grads = [], []
        for out, grad in ((result.y, dy), (result.mean, dmean), (result.var, dvar)):
            if out is not None and grad is not None and out.requires_grad:
                outputs.append(out)
                grads.append(grad if out is result.y else grad.reshape(plan.stat_shape))
        outputs = [out if out is result.y else _unshaped(entry, out) for out in outputs]
        wanted = [t for t, need in zip(inputs, needs, strict=True) if t is not None and need]
        found = iter(
            torch.autograd.grad(outputs, wanted, grads, create_graph=torch.is_grad_enabled(), allow_unused=True)
            if outputs and wanted
            else [None] * len(wanted)
        )
    result_grads = [next(found) if t is not None and need else None for t, need in zip(inputs, needs, strict=True)]
    if needs[3] and through is not None:
        result_grads[3] = through
    return tuple(result_grads)


def _unshaped(entry: Entry, stat: Tensor) -> Tensor:
    return entry.plan.statistic_in(stat, "statistic")
