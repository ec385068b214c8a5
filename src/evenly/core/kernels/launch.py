"""What kernels of every kind of device share: a call that is ready to run, and who runs it.

A subclass of :class:`Entry` launches the kernels of one kind of device; :func:`serve` makes it known.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from evenly.core.kernels import reference
from evenly.core.kernels.lowering import Block
from evenly.core.patterns import Plan

__all__ = [
    "ACTIVATIONS",
    "DTYPES",
    "MEASURED",
    "PLAIN",
    "SCALES",
    "Entry",
    "Unsupported",
    "kind_of",
    "knows",
    "ordinary",
    "rows",
    "serve",
    "served",
]

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ACTIVATIONS = {None: 0, "relu": 1, "silu": 2, "gelu": 3}
SCALES = {None: 0, "std": 1, "rms": 2, "l2": 3, "l1": 4, "max": 5}
PLAIN = (Tensor, torch.nn.Parameter)
MEASURED: tuple[Tensor | None, Tensor | None] = (None, None)

_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state


def ordinary() -> bool:
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
        "means",
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
            rows(options["scale"], x.dtype, masked=mask is not None),
            lowered.sizes[0] * lowered.sizes[2],
        )
        # One number seen through strides of 0: to allocate like it is cheaper than from a shape and a dtype.
        self.stats_like = torch.empty(1, dtype=self.stats_dtype, device=x.device).expand(self.stats_shape)
        self.means = bool(options["center"]) or options["scale"] == "std"  # or the mean is zero, a constant
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


def rows(scale: str | None, dtype: torch.dtype, *, masked: bool) -> int:
    """Rows of the statistics that are kept for the backward pass."""
    return 5 if masked or scale in ("l1", "max") or (scale == "l2" and dtype == torch.float64) else 3


class Unsupported(Exception):
    """Raised by the constructor of an entry: no kernel takes the call."""


_devices: dict[str, Callable[[], type[Entry] | None]] = {}


def serve(device: str, load: Callable[[], type[Entry] | None]) -> None:
    """Let kernels compute for a type of device.

    Args:
        device: its type, such as ``"cuda"``.
        load: the class of their entries, or None where they cannot be used; called when there is something to do.
    """
    _devices[device] = load


def knows(device: str) -> bool:
    """Whether somebody serves a type of device; nothing is loaded."""
    return device in _devices


def kind_of(device: str) -> type[Entry] | None:
    """The class of the entries of a type of device; None where its kernels cannot be used."""
    load = _devices.get(device)
    return None if load is None else load()


def _marked(function: Any) -> Any:
    # Runs while the compiler traces, and counts as a constant (what torch.compiler.assume_constant_result does,
    # without importing the compiler).
    function._dynamo_marked_constant = True
    return function


@_marked
def served(device: str) -> bool:
    """Whether kernels can be used on a type of device."""
    return kind_of(device) is not None
