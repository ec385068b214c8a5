"""The search for a learning rate, one for each normalization and batch size.

A comparison at one learning rate for all would measure who happens to like it. So each (normalization, batch
size) is tried at every rate of the same small grid around the default, on the same budget: a short training on
four fifths of the training set, scored on the other fifth. The test set takes no part. The rate with the highest
accuracy on the held-out fifth wins; of equals the one with the lower loss. Trials that diverged lose. On text there is
no accuracy, the loss alone decides, and the trainings of the search are as long as the scored ones, so that their
losses are a curve over learning rates.

The default rate is 0.02 at batch size 64 (0.003 at 16 on text), for AdamW, and grows with the square root of the batch
size; the grid multiplies it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from evenly.workbench.language import is_text
from evenly.workbench.trial import TrialFailure, TrialResult, TrialSettings

__all__ = ["GRID", "TEXT_GRID", "TUNE_SEED", "TUNE_STEPS", "choose", "default_lr", "grid"]

GRID = (1 / 3, 1.0, 3.0)
"""What the default rate is multiplied by."""

TEXT_GRID = (1 / 3, 1.0, 10 / 3, 10.0, 100 / 3)
"""The same for text: networks with normalized weights like rates that others do not stand."""

TUNE_STEPS = 240
"""A trial of the search takes at most so many steps: all epochs at batch size 64 on digits, most of one at 4."""

TUNE_SEED = 1_000_000
"""The seed of the search, which no scored trial uses."""


def default_lr(batch_size: int, data: str = "") -> float:
    """The learning rate where none is given: 0.02 * sqrt(batch_size / 64); on text 0.003 * sqrt(batch_size / 16).

    >>> default_lr(64), default_lr(4), default_lr(16, "text")
    (0.02, 0.005, 0.003)
    """
    base = 0.003 * math.sqrt(batch_size / 16) if is_text(data) else 0.02 * math.sqrt(batch_size / 64)
    return float(f"{base:.4g}")


def grid(settings: TrialSettings, factors: Sequence[float] | None = None) -> list[TrialSettings]:
    """The trials of the search for one normalization and batch size.

    Args:
        settings: a scored trial; its ``lr`` is the centre of the grid.
        factors: what it is multiplied by; default :data:`GRID`, :data:`TEXT_GRID` for text.

    >>> settings = TrialSettings("batch", "digits", batch_size=4, seed=0, epochs=2, lr=0.3)
    >>> [trial.lr for trial in grid(settings)]
    [0.1, 0.3, 0.9]
    """
    text = is_text(settings.data)
    if factors is None:
        factors = TEXT_GRID if text else GRID
    return [
        replace(
            settings,
            lr=float(f"{settings.lr * factor:.4g}"),
            seed=TUNE_SEED,
            purpose="tune",
            max_steps=settings.max_steps if text else TUNE_STEPS,
            ood=None,
            severities=(),
        )
        for factor in factors
    ]


def choose(outcomes: Mapping[float, TrialResult | TrialFailure]) -> float | None:
    """The best learning rate, or ``None`` if every trial failed.

    Args:
        outcomes: outcome of the search by learning rate.
    """
    results = {lr: outcome for lr, outcome in outcomes.items() if isinstance(outcome, TrialResult)}
    if not results:
        return None

    def merit(lr: float) -> tuple[bool, float, float, float]:
        result = results[lr]
        loss = result.validation["loss"]
        return (
            not result.diverged,
            result.validation.get("accuracy", 0.0),
            -loss if math.isfinite(loss) else -math.inf,
            -lr,
        )

    return max(results, key=merit)
