"""The optional dependency of this area: geoopt, for parameters that live on a manifold and their optimizers."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["PARAMETRIZATIONS", "check_parametrization", "geoopt"]

#: "manifold": a ``geoopt.ManifoldParameter``; "free": an unconstrained parameter that is mapped to the manifold.
PARAMETRIZATIONS = ("manifold", "free")


def geoopt() -> Any:
    """The module ``geoopt``, or one error that says how to get it."""
    try:
        return importlib.import_module("geoopt")
    except ImportError as error:
        raise ImportError(
            'parametrization="manifold" needs geoopt: pip install "evenly[manifolds]". Without it, use '
            'parametrization="free", which trains with any optimizer of torch.'
        ) from error


def check_parametrization(given: str) -> str:
    """Raise for anything but the two words."""
    if given not in PARAMETRIZATIONS:
        raise ValueError(f"parametrization={given!r}, expected one of {', '.join(map(repr, PARAMETRIZATIONS))}.")
    return given
