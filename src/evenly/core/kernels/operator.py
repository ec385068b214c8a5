"""Fused kernels as a backend of ``normalize`` and ``moments``: what those of the CPU and of CUDA share.

A call is looked up by pattern, shape, dtype and options; what was worked out for it (the canonical block, where
weights lie) is kept in an :class:`Entry`, so that a repeated call costs a lookup, an allocation and the launch. How
kernels are launched is said by a subclass for each kind of device, made known with :func:`serve`. There are three
ways in:

- without gradient: directly;
- with gradient: an autograd function whose backward is a kernel too, and whose second derivative is PyTorch's;
- while compiling or exporting: the operators ``evenly::fused_normalize`` and ``evenly::fused_normalize_backward``.

Under ``torch.func`` transforms, forward-mode derivatives, tracing and dispatch modes the PyTorch reference is used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from evenly.core import recompute
from evenly.core.kernels import reference
from evenly.core.kernels.lowering import Block, block, dense_order, laid_mask, mask_index, weight_index
from evenly.core.kernels.reference import Call, Result
from evenly.core.patterns import Plan, bind

__all__ = [
    "ACTIVATIONS",
    "DTYPES",
    "MEASURED",
    "SCALES",
    "Entry",
    "Normalize",
    "again",
    "announced",
    "applied",
    "measure",
    "recall",
    "remember",
    "run",
    "run_compiled",
    "serve",
    "supports",
    "supports_compiled",
]

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ACTIVATIONS = {None: 0, "relu": 1, "silu": 2, "gelu": 3}
SCALES = {None: 0, "std": 1, "rms": 2, "l2": 3, "l1": 4, "max": 5}
_PLAIN = (Tensor, torch.nn.Parameter)
MEASURED: tuple[Tensor | None, Tensor | None] = (None, None)

_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state
_grad_enabled = torch.is_grad_enabled


def _ordinary() -> bool:
    """Nothing is watching: no transform, no tracing, no dispatch mode, no forward-mode derivative."""
    return not (_dispatch_modes() or _transforms() or forward_ad._current_level >= 0 or _tracing() is not None)


class Entry(ABC):
    """A call on an input of one shape, dtype, device and memory layout, ready to run.

    A subclass launches the kernels of a kind of device: :meth:`forward`, :meth:`backward`, :meth:`moments` and
    :meth:`positive`. Its constructor raises :class:`Unsupported` for a call that they do not take.
    """

    converts = False  # whether given and running statistics may have any dtype

    __slots__ = (
        "activation",
        "block",
        "contiguous",
        "device",
        "index",
        "keeps",
        "mask",
        "natural",
        "on_cpu",
        "options",
        "order",
        "plan",
        "ready",
        "shape",
        "signs",
        "spec",
        "stats_dtype",
        "stats_like",
        "stats_shape",
        "weight_dtype",
        "weight_shape",
    )

    def __init__(
        self,
        plan: Plan,
        order: tuple[int, ...],
        lowered: Block,
        index: tuple[int, int],
        x: Tensor,
        weight: Tensor | None,
        options: dict[str, Any],
        *,
        signs: bool,
        given: bool,
        mask: tuple[int, int, int] | None = None,
    ) -> None:
        self.plan = plan
        self.order = order
        self.contiguous = order == tuple(range(len(order)))
        self.block = lowered
        self.index = index
        self.device = x.device
        self.on_cpu = x.device.type == "cpu"
        self.options = options
        self.activation = options["activation"]
        self.weight_dtype = None if weight is None else weight.dtype
        self.weight_shape = None if weight is None else weight.shape
        self.stats_dtype = reference.accumulate_dtype(x.dtype)
        self.mask = mask  # where the flag of a value lies, see lowering.mask_index
        self.stats_shape = (
            _rows(options["scale"], x.dtype, masked=mask is not None),
            lowered.sizes[0] * lowered.sizes[2],
        )
        # One number seen through strides of 0: to allocate like it is cheaper than from a shape and a dtype.
        self.stats_like = torch.empty(1, dtype=self.stats_dtype, device=x.device).expand(self.stats_shape)
        self.keeps = True  # statistics, from the forward pass to the backward pass
        self.signs = 0  # bytes of the sign bits that are kept for the backward pass
        self.shape = plan.shape
        # whether a statistic has the order of the right-hand side
        outputs = [axis for group in plan.resolved.outputs for axis in group]
        self.natural = outputs == sorted(outputs)
        self.spec = (self, MEASURED, False, None, None)
        self.ready: Any = None  # a call without a line of Python in between, see prepare

    def prepare(self, function: Callable[..., Any]) -> None:  # noqa: B027
        """Make :attr:`ready`, where calls have a shorter way; ``function`` is for those with gradient.

        It takes x, weight, bias, residual, mean, var, momentum and a counter of calls, and returns None where the
        call is not like the one that the entry was made for.
        """

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        stats: Tensor | None = None,
        bits: Tensor | None = None,
        given: tuple[Tensor | None, Tensor | None] = MEASURED,
        moments: tuple[Tensor, Tensor] | None = None,
        running: tuple[Tensor, Tensor, float] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The output; ``stats``, ``bits`` and ``moments`` are filled, ``running`` moves towards what was measured.

        ``mask`` lies in memory in the order of ``x``; with it, the fourth row of ``stats`` is the count.
        """

    def again(
        self,
        given: tuple[Tensor | None, Tensor | None],
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        stats: Tensor | None,
    ) -> Tensor:
        """The output once more, bit for bit; ``stats`` are what the forward pass kept."""
        residual = None if residual is None else self.like(residual, x)
        return self.forward(x, weight, bias, residual, None, None, given)

    @abstractmethod
    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        stats: Tensor | None,
        bits: Tensor | None,
        needs: tuple[bool, ...],
        dmean: Tensor | None = None,
        dvar: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, weight, bias and residual, those that are needed; without ``stats`` they are measured."""

    @abstractmethod
    def moments(self, x: Tensor, stats: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and variance, flat; ``stats`` are filled."""

    @abstractmethod
    def positive(self, bits: Tensor, x: Tensor) -> Tensor:
        """The sign bits as a boolean tensor of the shape of ``x``."""

    def like(self, t: Tensor, x: Tensor) -> Tensor:
        """A tensor in the memory layout of ``x``."""
        t = t.resolve_neg()
        if (self.contiguous and t.is_contiguous()) or t.stride() == x.stride():
            return t
        return torch.empty_like(x, dtype=t.dtype).copy_(t)

    def empty_moments(self) -> tuple[Tensor, Tensor]:
        """Room for a mean and a variance, flat."""
        return torch.empty_like(self.stats_like[0]), torch.empty_like(self.stats_like[0])

    def shaped(self, stat: Tensor) -> Tensor:
        """A flat statistic in the order of the right-hand side."""
        return self.plan.statistic_out(stat.reshape(self.plan.stat_shape))

    def flat(self, stat: Tensor, name: str) -> Tensor:
        """The inverse of :meth:`shaped`, in the dtype of statistics."""
        return self.plan.statistic_in(stat.to(self.stats_dtype), name).contiguous()


def _rows(scale: str | None, dtype: torch.dtype, *, masked: bool) -> int:
    """Rows of the statistics that are kept for the backward pass."""
    return 5 if masked or scale in ("l1", "max") or (scale == "l2" and dtype == torch.float64) else 3


class Unsupported(Exception):
    """Raised by the constructor of an entry: no kernel takes the call."""


# ---- kinds of devices -----------------------------------------------------------------------------------------------

_devices: dict[str, Callable[[], type[Entry] | None]] = {}


def serve(device: str, load: Callable[[], type[Entry] | None]) -> None:
    """Let kernels compute for a type of device.

    Args:
        device: its type, such as ``"cuda"``.
        load: the class of their entries, or None where they cannot be used; called when there is something to do.
    """
    _devices[device] = load


def _marked(function: Any) -> Any:
    # Runs while the compiler traces, and counts as a constant (what torch.compiler.assume_constant_result does,
    # without importing the compiler).
    function._dynamo_marked_constant = True
    return function


@_marked
def _served(device: str) -> bool:
    load = _devices.get(device)
    return load is not None and load() is not None


# ---- looking entries up ---------------------------------------------------------------------------------------------


def _static(x: Tensor, call: Call) -> bool:
    """What can be said without looking at memory; also asked while compiling."""
    device = x.device
    if device.type not in _devices or x.dtype not in DTYPES or x.layout != torch.strided:
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
    entry = _build(x, plan, call, order, first, given=given, signs=signs, graded=graded, where=where)
    plan.cache[key] = entry
    return entry


def _build(
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
    kind = _devices[x.device.type]()
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
    if not _static(x, call) or not _served(x.device.type):
        return False
    if x.numel() == 0 or not _ordinary() or type(x) not in _PLAIN:
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
    if type(x) not in _PLAIN:
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
    if x.is_neg() or not _ordinary():
        return None
    if not (weight is None or _is_parameter(weight, entry)) or not (bias is None or _is_parameter(bias, entry)):
        return None
    if residual is not None and (
        residual.shape != entry.shape
        or residual.dtype != x.dtype
        or not (residual.is_cpu if entry.on_cpu else residual.device == entry.device)
        or type(residual) not in _PLAIN
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
        and type(parameter) in _PLAIN
    )


def _is_statistic(stat: Tensor, entry: Entry) -> bool:
    return (
        stat.shape == entry.plan.out_shape
        and stat.is_contiguous()
        and (stat.is_cpu if entry.on_cpu else stat.device == entry.device)
        and not stat.requires_grad
        and type(stat) in _PLAIN
        and entry.natural
    )


# ---- derivatives ----------------------------------------------------------------------------------------------------


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
        if mask is None:
            return (y, *moments)
        assert stats is not None
        count = stats[3].clone()
        ctx.mark_non_differentiable(count)
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
        if _grad_enabled() or not _ordinary():
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
        if _grad_enabled() or not _ordinary():
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
        if dvar is None or _grad_enabled() or not _ordinary():
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


_function = applied(Normalize)


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


# ---- operators for torch.compile and torch.export -------------------------------------------------------------------

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
        entry = _build(x, plan, call, order, first, given=given, signs=False, where=where)
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
    stats = x.new_empty((_rows(rest[2] or None, x.dtype, masked=mask is not None), many), dtype=dtype)
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


def supports_compiled(x: Tensor, plan: Plan, call: Call) -> bool:
    """Whether the operator computes this call; asked while compiling, where sizes may be symbols."""
    if not _static(x, call) or not _served(x.device.type) or x.numel() == 0:
        return False
    if call.want_stats and (call.mean is not None or call.var is not None):
        return False
    own_norm = call.scale in ("l1", "max") or (call.scale == "l2" and x.dtype == torch.float64)
    if x.device.type == "cuda" and (own_norm or call.mask is not None):
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


def run_compiled(x: Tensor, plan: Plan, call: Call) -> Result:
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
