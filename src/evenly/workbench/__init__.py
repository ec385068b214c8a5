"""Compare normalizations by training with each of them; audit a model by groups.

:func:`compare` is the whole of it; ``evenly compare`` is the same on the command line. The parts can be used by
themselves: :func:`run_trial` is a pure function of :class:`TrialSettings`, :class:`LocalEngine` and
:class:`RayEngine` run trials side by side, :class:`Store` keeps them.

:func:`audit` measures predictions by group and intersection; ``evenly audit`` is the same on the command line.
"""

from __future__ import annotations

from evenly.workbench.auditing import Audit, audit, audit_table
from evenly.workbench.compare import Comparison, compare
from evenly.workbench.engines import Engine, LocalEngine, RayEngine
from evenly.workbench.metrics import difference, family_means, mpc, rank, rpc, worst_corruption
from evenly.workbench.store import Store, StoreError
from evenly.workbench.trial import TrialFailure, TrialResult, TrialSettings, run_trial

__all__ = [
    "Audit",
    "Comparison",
    "Engine",
    "LocalEngine",
    "RayEngine",
    "Store",
    "StoreError",
    "TrialFailure",
    "TrialResult",
    "TrialSettings",
    "audit",
    "audit_table",
    "compare",
    "difference",
    "family_means",
    "mpc",
    "rank",
    "rpc",
    "run_trial",
    "worst_corruption",
]
