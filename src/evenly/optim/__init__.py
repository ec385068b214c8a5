"""Optimizers that know about normalization, in the idiom of ``torch.optim``."""

from evenly.optim.adamp import SGDP, AdamP, project_update
from evenly.optim.for_model import for_model
from evenly.optim.multi_normalization import (
    SWAN,
    MultiNormGD,
    SinkGD,
    multi_normalize,
    project_col_rms,
    project_row_rms,
    project_sign,
    project_spectral,
    sr_sinkhorn,
)

__all__ = [
    "AdamP",
    "SGDP",
    "project_update",
    "SinkGD",
    "SWAN",
    "MultiNormGD",
    "sr_sinkhorn",
    "multi_normalize",
    "project_row_rms",
    "project_col_rms",
    "project_spectral",
    "project_sign",
    "for_model",
]
