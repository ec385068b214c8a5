"""The primitive: patterns, moments, normalize, whiten."""

from evenly.core.merge import merge, merge_processes
from evenly.core.normalize import Moments, moments, normalize
from evenly.core.patterns import PatternError
from evenly.core.whiten import Covariance, covariance, principal_axes, whiten, whitening_matrix

__all__ = [
    "Covariance",
    "Moments",
    "PatternError",
    "covariance",
    "merge",
    "merge_processes",
    "moments",
    "normalize",
    "principal_axes",
    "whiten",
    "whitening_matrix",
]
