"""Normalization on Riemannian manifolds: covariance matrices, rotations, correlation matrices."""

from evenly.manifolds import matrix_functions, spd
from evenly.manifolds.correlation import Correlation, correlation
from evenly.manifolds.geometry import Geometry
from evenly.manifolds.liebn import DomainLieBN, LieBNCorrelation, LieBNRotation, LieBNSPD, momentum_schedule
from evenly.manifolds.rotation import SO3, so3_exp, so3_log
from evenly.manifolds.spd import SPD
from evenly.manifolds.spdnet import BiMap, LogEig, ReEig

__all__ = [
    "LieBNSPD",
    "LieBNRotation",
    "LieBNCorrelation",
    "DomainLieBN",
    "momentum_schedule",
    "BiMap",
    "ReEig",
    "LogEig",
    "Geometry",
    "SPD",
    "SO3",
    "Correlation",
    "correlation",
    "so3_exp",
    "so3_log",
    "spd",
    "matrix_functions",
]
