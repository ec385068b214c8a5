"""Fused kernels for the CPU, in C++.

One pass over memory forward and one backward where a group fits in cache, affine parameters, residual and activation
included; float32, float64, bfloat16 and float16 with statistics of float32 (float64 for float64). The extension is
compiled when the package is installed and loaded when it is first needed. Without it (no compiler at installation)
PyTorch computes the same.

Where a processor converts to bfloat16 itself (AVX512_BF16), it does; what is below the smallest normal number, 1.2e-38,
is zero then.

The environment variable ``EVENLY_CPU_ISA`` (``portable``, ``avx2``, ``avx512``) keeps a newer instruction set from
being used.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import warnings
from types import ModuleType

__all__ = ["available", "describe", "extension", "why_not"]

_forked = False


def _after_fork() -> None:
    # The threads of the OpenMP runtime do not survive a fork, and it waits for them for ever.
    global _forked
    _forked = True
    module = sys.modules.get(f"{__name__}._kernels")
    if module is not None:
        module.set_serial(True)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module(f"{__name__}._kernels")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        return None, "not compiled: evenly was installed where there is no C++17 compiler" if missing else str(error)
    if _forked:
        module.set_serial(True)
    return module, ""


@functools.lru_cache(maxsize=1)
def extension() -> ModuleType | None:
    """The compiled module; None, with one warning, where there is none."""
    module, why = _load()
    if module is None:
        warnings.warn(
            f"The CPU kernels of evenly are missing ({why}); PyTorch computes instead, slower. Install a C++ compiler "
            "and reinstall evenly.",
            RuntimeWarning,
            stacklevel=2,
        )
    return module


def available() -> bool:
    """Whether the kernels can be used. Warns of nothing."""
    return _load()[0] is not None


def why_not() -> str:
    """Why the kernels cannot be used; empty if they can."""
    return _load()[1]


def describe() -> str:
    """One line for ``evenly doctor``."""
    module, why = _load()
    if module is None:
        return f"missing ({why})"
    return f"{module.isa()}, {module.threads()} threads of {module.pool()}"
