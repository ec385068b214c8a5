"""Normalization of weights: parametrizations in the idiom of ``torch.nn.utils.parametrizations``."""

from evenly.weights.weight_standardization import (
    WeightStandardization,
    WSConv2d,
    weight_standardization,
    weight_standardize_,
)

__all__ = ["WSConv2d", "WeightStandardization", "weight_standardization", "weight_standardize_"]
