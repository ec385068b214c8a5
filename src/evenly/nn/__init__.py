"""Normalization layers: what ``torch.nn`` has, on one primitive, and what it lacks."""

from evenly.core.recompute import low_memory, recomputed
from evenly.nn.batchnorm import BatchNorm, FrozenBatchNorm
from evenly.nn.bcnorm import BCNorm, ChannelActivity, EstBatchNorm, channel_activity, set_moving_speed_
from evenly.nn.create import available, create
from evenly.nn.groupnorm import GroupNorm, InstanceNorm
from evenly.nn.layernorm import LayerNorm, RMSNorm, ScaleNorm
from evenly.nn.layernorm_rnn import LayerNormGRUCell, LayerNormLSTM, LayerNormLSTMCell, LayerNormRNNCell
from evenly.nn.mean_only_batchnorm import MeanOnlyBatchNorm
from evenly.nn.ngpt import NormalizedEmbedding, NormalizedLinear, ProjectedOptimizer, ScaledParameter, project_
from evenly.nn.nonorm import NoNorm
from evenly.nn.norm import Norm
from evenly.nn.onlinenorm import OnlineNorm, OnlineNorm1d, OnlineNorm2d, OnlineNorm3d
from evenly.nn.powernorm import GroupScaling, PowerNorm, PowerNormV, fold_into_linear
from evenly.nn.qknorm import QKNormAttention, qknorm_attention, qknorm_init_scale
from evenly.nn.recalibrate import recalibrate_
from evenly.nn.whiten import Whiten

__all__ = [
    "Norm",
    "NoNorm",
    "BatchNorm",
    "FrozenBatchNorm",
    "MeanOnlyBatchNorm",
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
    "low_memory",
    "recomputed",
    "PowerNorm",
    "PowerNormV",
    "GroupScaling",
    "fold_into_linear",
    "OnlineNorm",
    "OnlineNorm1d",
    "OnlineNorm2d",
    "OnlineNorm3d",
    "BCNorm",
    "EstBatchNorm",
    "set_moving_speed_",
    "ChannelActivity",
    "channel_activity",
    "create",
    "available",
]
