"""Make activations, weights, gradients and outcomes even.

To normalize is to choose which values share a statistic, measure it, and take out what they share.
:func:`evenly.normalize` does that for any pattern of axes::

    evenly.normalize(x, "n c h w -> c")               # batch normalization
    evenly.normalize(x, "n (g c) h w -> n g", g=32)   # group normalization
    evenly.normalize(x, "... d -> ...")               # layer normalization

and the rest of the library is built on it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from evenly.core import Moments, moments, normalize, whiten

if TYPE_CHECKING:
    from evenly.conversion import convert as convert

__version__ = "0.1.0"

__all__ = ["normalize", "moments", "whiten", "Moments", "convert"]

_SUBMODULES = {
    "catalog",
    "claims",
    "conversion",
    "core",
    "data",
    "fair",
    "manifolds",
    "models",
    "nn",
    "optim",
    "policy",
    "robust",
    "stats",
    "weights",
    "workbench",
}


def __getattr__(name: str) -> Any:
    # Everything but the primitive is imported when it is first used: `import evenly` stays as quick as torch.
    if name == "convert":
        return importlib.import_module("evenly.conversion").convert
    if name in _SUBMODULES:
        return importlib.import_module(f"evenly.{name}")
    raise AttributeError(f"module 'evenly' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
