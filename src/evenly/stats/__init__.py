"""Groups of variables, tasks and neighbours: standardizers of features, Hadamard matrices."""

from evenly.stats.hadamard import hadamard, hadamard_construction, has_hadamard
from evenly.stats.multi_teacher import MultiTeacherLoss
from evenly.stats.phi_s import Drift, PHIStandardizer
from evenly.stats.standardize import Standardize

__all__ = [
    "PHIStandardizer",
    "Drift",
    "Standardize",
    "MultiTeacherLoss",
    "hadamard",
    "has_hadamard",
    "hadamard_construction",
]
