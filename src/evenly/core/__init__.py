"""The primitive: patterns, moments, normalize, whiten."""

from evenly.core.normalize import Moments, moments, normalize
from evenly.core.patterns import PatternError
from evenly.core.whiten import covariance, whiten, whitening_matrix

__all__ = ["Moments", "PatternError", "covariance", "moments", "normalize", "whiten", "whitening_matrix"]
