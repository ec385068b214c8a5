"""Fused kernels for NVIDIA GPUs, in Triton.

The same set as on the CPU: moments, normalize with affine parameters, residual and activation, batch statistics with
running update, channels-last memory, given statistics; forward and backward; float32, float64, bfloat16 and float16
with statistics of float32 (float64 for float64). Triton comes with PyTorch's CUDA builds and compiles a kernel when
it is first needed; until then it is not imported. Without it, PyTorch computes the same.

Three thin layers, as in Liger-Kernel: ``kernels`` (what a program computes), ``entry`` (how a call becomes programs),
and the operator, which is shared with the CPU (:mod:`evenly.core.kernels.compiled`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evenly.core.kernels.launch import Entry

__all__ = ["describe", "interpreted", "load", "why_not"]


def interpreted() -> bool:
    """Whether Triton runs in its interpreter (``TRITON_INTERPRET=1`` when it is first imported): slow, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.lru_cache(maxsize=1)
def _load() -> tuple[type[Entry] | None, str]:
    if importlib.util.find_spec("triton") is None:
        return None, "Triton is not installed: pip install 'evenly[cuda]'"
    try:
        module = importlib.import_module(f"{__name__}.entry")
    except ImportError as error:
        return None, str(error)
    return module.CudaEntry, ""


def load() -> type[Entry] | None:
    """The class of the entries; None where the kernels cannot be used. Imports Triton."""
    return _load()[0]


def why_not() -> str:
    """Why the kernels cannot be used; empty if they can. Imports Triton where there is a device."""
    import torch

    if not torch.cuda.is_available() and not interpreted():
        return "no CUDA device"
    return _load()[1]


def describe() -> str:
    """One line for ``evenly doctor``; imports nothing where there is no device."""
    why = why_not()
    if why:
        return f"not used ({why})"
    return f"Triton {importlib.import_module('triton').__version__}{', interpreted' if interpreted() else ''}"
