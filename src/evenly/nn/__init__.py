"""Normalization layers: what ``torch.nn`` has, on one primitive, and what it lacks."""

from evenly.nn.batchnorm import BatchNorm, FrozenBatchNorm
from evenly.nn.create import available, create
from evenly.nn.groupnorm import GroupNorm, InstanceNorm
from evenly.nn.layernorm import LayerNorm, RMSNorm, ScaleNorm
from evenly.nn.layernorm_rnn import LayerNormGRUCell, LayerNormLSTM, LayerNormLSTMCell, LayerNormRNNCell
from evenly.nn.ngpt import NormalizedEmbedding, NormalizedLinear, ProjectedOptimizer, ScaledParameter, project_
from evenly.nn.nonorm import NoNorm
from evenly.nn.norm import Norm
from evenly.nn.qknorm import QKNormAttention, qknorm_attention, qknorm_init_scale
from evenly.nn.recalibrate import recalibrate_
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
    "LayerNormRNNCell",
    "LayerNormLSTMCell",
    "LayerNormGRUCell",
    "LayerNormLSTM",
    "QKNormAttention",
    "qknorm_attention",
    "qknorm_init_scale",
    "NormalizedLinear",
    "NormalizedEmbedding",
    "ScaledParameter",
    "ProjectedOptimizer",
    "project_",
    "recalibrate_",
    "create",
    "available",
]
