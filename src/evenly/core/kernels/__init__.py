"""Backends: who computes a normalization.

``normalize`` describes what it wants as a :class:`Call`; the first registered backend that supports the call
computes it, and the PyTorch reference computes whatever no backend takes. A backend is registered with
:func:`register` when its module is imported, never by the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from evenly.core.kernels import compiled, cuda, operator, reference
from evenly.core.kernels.cpu import entry as cpu_entry
from evenly.core.kernels.launch import serve
from evenly.core.patterns import Plan

__all__ = ["Backend", "Call", "Result", "backends", "register", "run"]

Result = reference.Result
Call = reference.Call


@dataclass(frozen=True)
class Backend:
    """A set of kernels.

    Attributes:
        name: as ``evenly doctor`` prints it.
        supports: whether the backend computes this call on this input.
        run: computes it.
        describe: one line on where the backend is used.
    """

    name: str
    supports: Callable[[torch.Tensor, Plan, Call], bool]
    run: Callable[[torch.Tensor, Plan, Call], Result]
    describe: str


_reference = Backend(
    "reference",
    lambda x, plan, call: True,
    reference.normalize,
    "PyTorch operators; any device, any layout, any order of derivative",
)
_backends: list[Backend] = []


def register(backend: Backend) -> None:
    """Put a backend before those registered earlier."""
    _backends.insert(0, backend)


def backends() -> tuple[Backend, ...]:
    """All backends, in the order in which they are asked."""
    return (*_backends, _reference)


def run(x: torch.Tensor, plan: Plan, call: Call) -> Result:
    """Compute a call with the first backend that supports it."""
    if torch.compiler.is_compiling():
        if compiled.supports(x, plan, call):
            return compiled.run(x, plan, call)
        return reference.normalize(x, plan, call)
    for backend in _backends:
        if backend.supports(x, plan, call):
            return backend.run(x, plan, call)
    return reference.normalize(x, plan, call)


def _on(device: str) -> Callable[[torch.Tensor, Plan, Call], bool]:
    return lambda x, plan, call: x.device.type == device and operator.supports(x, plan, call)


serve("cuda", cuda.load)
register(
    Backend(
        "cuda",
        _on("cuda"),
        operator.run,
        "Triton kernels for contiguous and channels-last memory: std, rms and l2, masks; first order",
    )
)
serve("cpu", cpu_entry.load)
register(
    Backend(
        "cpu",
        _on("cpu"),
        operator.run,
        "C++ kernels for contiguous and channels-last memory: every scale, masks; first order",
    )
)
