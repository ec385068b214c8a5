"""The table of recurrent modules: one row an object, held to the suite in test_recurrent.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

import evenly.nn as en


@dataclass(frozen=True)
class RecurrentCase:
    """A module that carries a state: ``make(device=, dtype=)`` builds it, ``shape`` is its input."""

    name: str
    object: str  # "module:Name", as in the catalog
    make: Callable[..., nn.Module]
    shape: tuple[int, ...]
    catalog: str
    samples: int = 0  # the axis of the samples

    def __str__(self) -> str:
        return self.name


RECURRENT = (
    RecurrentCase(
        "LayerNormRNNCell",
        "evenly.nn:LayerNormRNNCell",
        lambda **kw: en.LayerNormRNNCell(3, 8, **kw),
        (4, 3),
        "layer-normalization",
    ),
    RecurrentCase(
        "LayerNormLSTMCell",
        "evenly.nn:LayerNormLSTMCell",
        lambda **kw: en.LayerNormLSTMCell(3, 8, **kw),
        (4, 3),
        "layer-normalization",
    ),
    RecurrentCase(
        "LayerNormLSTMCell (per gate)",
        "evenly.nn:LayerNormLSTMCell",
        lambda **kw: en.LayerNormLSTMCell(3, 8, per_gate=True, **kw),
        (4, 3),
        "layer-normalization",
    ),
    RecurrentCase(
        "LayerNormGRUCell",
        "evenly.nn:LayerNormGRUCell",
        lambda **kw: en.LayerNormGRUCell(3, 8, **kw),
        (4, 3),
        "layer-normalization",
    ),
    RecurrentCase(
        "LayerNormLSTM",
        "evenly.nn:LayerNormLSTM",
        lambda **kw: en.LayerNormLSTM(3, 8, num_layers=2, bidirectional=True, **kw),
        (5, 4, 3),
        "layer-normalization",
        samples=1,
    ),
)
