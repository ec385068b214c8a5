"""Normalization of weights: parametrizations in the idiom of ``torch.nn.utils.parametrizations``, initializations."""

from evenly.weights.fixup import (
    FixupBranch,
    FixupReport,
    fixup_,
    fixup_init_,
    fixup_param_groups,
    fixup_scale,
)
from evenly.weights.weight_normalization import (
    WeightNorm,
    data_dependent_init_,
    from_torch_state_dict,
    remove_weight_norm,
    weight_norm,
    weight_normalize_,
)
from evenly.weights.weight_standardization import (
    WeightStandardization,
    WSConv2d,
    weight_standardization,
    weight_standardize_,
)

__all__ = [
    "FixupBranch",
    "FixupReport",
    "WSConv2d",
    "WeightNorm",
    "WeightStandardization",
    "data_dependent_init_",
    "fixup_",
    "fixup_init_",
    "fixup_param_groups",
    "fixup_scale",
    "from_torch_state_dict",
    "remove_weight_norm",
    "weight_norm",
    "weight_normalize_",
    "weight_standardization",
    "weight_standardize_",
]
