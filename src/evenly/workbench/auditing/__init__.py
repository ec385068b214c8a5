"""How well does a model serve each group? Accuracy, calibration and selection rates by group and intersection.

:func:`audit` is the whole of it, from arrays; :func:`audit_table` takes a table and a model; ``evenly audit`` is the
same on the command line. The statistics are in :mod:`~evenly.workbench.auditing.intervals`, the measures in
:mod:`~evenly.workbench.auditing.measures`.
"""

from __future__ import annotations

from evenly.workbench.auditing.audit import Audit, audit
from evenly.workbench.auditing.groups import parse_groups
from evenly.workbench.auditing.inputs import AuditData, audit_table, labels_like, load_model, read_data
from evenly.workbench.auditing.intervals import holm, wilson
from evenly.workbench.auditing.measures import MEASURES, Measure

__all__ = [
    "MEASURES",
    "Audit",
    "AuditData",
    "Measure",
    "audit",
    "audit_table",
    "holm",
    "labels_like",
    "load_model",
    "parse_groups",
    "read_data",
    "wilson",
]
