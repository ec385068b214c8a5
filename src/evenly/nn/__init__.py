"""Normalization layers: what ``torch.nn`` has, on one primitive, and what it lacks."""

from evenly.nn.batchnorm import BatchNorm, FrozenBatchNorm
from evenly.nn.create import available, create
from evenly.nn.groupnorm import GroupNorm, InstanceNorm
from evenly.nn.layernorm import LayerNorm, RMSNorm, ScaleNorm
from evenly.nn.nonorm import NoNorm
from evenly.nn.norm import Norm
from evenly.nn.whiten import Whiten

__all__ = [
    "Norm",
    "NoNorm",
    "BatchNorm",
    "FrozenBatchNorm",
    "LayerNorm",
    "RMSNorm",
    "ScaleNorm",
    "GroupNorm",
    "InstanceNorm",
    "Whiten",
    "create",
    "available",
]
