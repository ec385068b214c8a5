"""One small experiment a paper that could have failed.

A claim is a file ``claims/<id>.py`` (dashes become underscores) with a module-level ``CLAIM``: what the paper
says, a criterion that was written down before the run, the seeds, and a trial that trains one arm with one
seed. :func:`run_claim` runs the trials, judges the criterion and keeps the numbers; ``evenly claim ID`` does
that from the command line. What came out is stored in ``docs/claims/ID.json`` with a picture beside it.

>>> from evenly import claims
>>> "batch-normalization" in claims.available()
True
>>> print(claims.get("batch-normalization").arms["plain lr=0.5"])
{'norm': False, 'lr': 0.5}
"""

from __future__ import annotations

import importlib
import pkgutil

from evenly.claims._harness import (
    BUDGETS,
    Check,
    Claim,
    ClaimError,
    Judgement,
    Metric,
    Results,
    Trial,
    run_claim,
)
from evenly.claims._store import results_dir, rows, stored, summary, verdict

__all__ = [
    "BUDGETS",
    "Check",
    "Claim",
    "ClaimError",
    "Judgement",
    "Metric",
    "Results",
    "Trial",
    "available",
    "get",
    "results_dir",
    "rows",
    "run_claim",
    "stored",
    "summary",
    "verdict",
]


def available() -> list[str]:
    """Return the ids of all claims, sorted. Reads file names only; imports none of them.

    A file whose name is not the id of a method of the register holds no claim.
    """
    from evenly import catalog

    methods = {method.id for method in catalog.methods()}
    return sorted(methods & {info.name.replace("_", "-") for info in pkgutil.iter_modules(__path__)})


def get(id: str) -> Claim:
    """Return the claim of the method ``id``.

    Raises:
        ClaimError: there is no such claim; the message lists those there are.
    """
    if id not in available():
        from evenly import catalog

        catalog.method(id)  # an unknown id has its own message, with close matches
        raise ClaimError(f"{id!r} has no claim yet; there are claims for {', '.join(available())}")
    claim = importlib.import_module(f"evenly.claims.{id.replace('-', '_')}").CLAIM
    if claim.id != id:
        raise ClaimError(f"the file of {id!r} holds a claim that calls itself {claim.id!r}")
    return claim
