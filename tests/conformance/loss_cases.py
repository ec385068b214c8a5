"""The tables of losses and samplers on groups of samples. The suites are in test_losses.py and test_samplers.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Sampler

from evenly import robust

COUNTS = (50, 30, 15, 5)  # training samples in the groups of the suite's problem


@dataclass(frozen=True)
class LossCase:
    """A loss on groups: ``make(n_groups, group_counts, **settings)`` builds it; called as (logits, targets, groups)."""

    name: str
    object: str  # "module:Name", as in the catalog
    make: Callable[..., nn.Module]
    catalog: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    state: tuple[str, ...] = ()  # what the state dict holds
    moves: bool = True  # its group weights depend on its state
    refuses: tuple[tuple[dict[str, Any], str], ...] = ()  # settings and a part of the message
    shows: tuple[str, ...] = ()  # what its repr must print

    def __call__(self, n_groups: int = 4, counts=COUNTS, **more) -> nn.Module:
        return self.make(n_groups, counts, **{**self.settings, **more})

    def __str__(self) -> str:
        return self.name


_EVERY = (
    ({"n_groups": 0}, "n_groups=0, expected a positive integer"),
    ({"counts": (1, 2)}, "group_counts has shape (2,), expected (4,)"),
    ({"counts": (1, 2, 3, -1)}, "group_counts must be whole numbers of at least 0"),
    ({"counts": (1, 2, 3, 0.5)}, "group_counts must be whole numbers of at least 0"),
    ({"counts": (0, 0, 0, 0)}, "group_counts are all 0"),
    ({"loss": "hinge"}, "loss='hinge', expected 'cross_entropy', 'binary_cross_entropy' or a function"),
    ({"gamma": 0.0}, "gamma=0.0, expected a number above 0 and at most 1"),
    ({"dtype": torch.bfloat16}, "dtype=torch.bfloat16, expected torch.float32 or torch.float64"),
)
_ADJUSTED = (
    *_EVERY,
    ({"adjustment": -1.0}, "adjustment=-1.0, expected finite numbers of at least 0"),
    ({"adjustment": [1.0, 2.0]}, "adjustment has shape (2,), expected one number or (4,)"),
    ({"adjustment": 1.0, "counts": (1, 2, 3, 0)}, "group_counts[3] is 0 and its adjustment is positive"),
)
_DRO = (
    *_ADJUSTED,
    ({"step_size": -0.1}, "step_size=-0.1, expected a number of at least 0"),
    ({"step_size": float("nan")}, "step_size=nan"),
    ({"adjustment": 1.0, "counts": None}, "adjustment needs group_counts"),
)
_CVAR = (
    *_ADJUSTED,
    ({"alpha": 0.0}, "alpha=0.0, expected a number above 0 and at most 1"),
    ({"min_var_weight": 1.5}, "min_var_weight=1.5, expected a number of at least 0 and at most 1"),
    ({"counts": None}, "needs group_counts"),
)
_ERM = (
    *_EVERY,
    ({"reweight": True, "counts": None}, "reweight=True needs group_counts"),
    ({"reweight": True, "counts": (1, 0, 2, 3)}, "group_counts[1] is 0: a group without samples"),
)


def _smoothed(logits, targets):
    return functional.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)


def _loss(name: str, cls: str, settings: dict[str, Any] | None = None, **more: Any) -> LossCase:
    return LossCase(name, f"evenly.robust:{cls}", getattr(robust, cls), "group-dro", settings or {}, **more)


LOSSES = (
    _loss(
        "GroupDROLoss",
        "GroupDROLoss",
        {"step_size": 0.3},
        state=("ema", "seen", "log_q"),
        refuses=_DRO,
        shows=("4", "step_size=0.3", "normalize_loss=False"),
    ),
    _loss(
        "GroupDROLoss (adjusted)",
        "GroupDROLoss",
        {"step_size": 0.3, "adjustment": [2.0, 0.0, 1.0, 3.0]},
        state=("ema", "seen", "log_q"),
        shows=("adjustment=[2.0, 0.0, 1.0, 3.0]",),
    ),
    _loss(
        "GroupDROLoss (normalized)",
        "GroupDROLoss",
        {"step_size": 0.3, "normalize_loss": True, "loss": _smoothed},
        state=("ema", "seen", "log_q"),
        shows=("loss=_smoothed", "normalize_loss=True"),
    ),
    _loss(
        "GroupCVaRLoss",
        "GroupCVaRLoss",
        {"alpha": 0.3, "adjustment": 1.0, "min_var_weight": 0.1},
        state=("ema", "seen"),
        refuses=_CVAR,
        shows=("alpha=0.3", "min_var_weight=0.1"),
    ),
    _loss("GroupLoss", "GroupLoss", state=("ema", "seen"), moves=False, refuses=_EVERY, shows=("4", "gamma=0.1")),
    _loss("ERMLoss", "ERMLoss", state=("ema", "seen"), moves=False, refuses=_ERM, shows=("4", "gamma=0.1")),
    _loss(
        "ERMLoss (reweighted)",
        "ERMLoss",
        {"reweight": True},
        state=("ema", "seen"),
        moves=False,
        shows=("reweight=True",),
    ),
)


@dataclass(frozen=True)
class SamplerCase:
    """A sampler that balances groups: ``make(groups, **settings)`` builds it."""

    name: str
    object: str
    make: Callable[..., Sampler[int]]
    catalog: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = False  # in an epoch the groups differ by one draw at most
    distinct: bool = False  # no index comes twice in an epoch
    refuses: tuple[tuple[dict[str, Any], str], ...] = ()

    def __call__(self, groups, **more) -> Sampler[int]:
        return self.make(groups, **{**self.settings, **more})

    def __str__(self) -> str:
        return self.name


_SAMPLER = (
    ({"groups": []}, "groups has shape (0,), expected (N,) with at least one sample"),
    ({"groups": torch.zeros(2, 2).long()}, "groups has shape (2, 2), expected (N,)"),
    ({"groups": [0.0, 1.0]}, "groups are torch.float32, expected integers"),
    ({"num_samples": 0}, "num_samples=0, expected a positive integer"),
    ({"seed": -1}, "seed=-1, expected a non-negative integer"),
    ({"num_replicas": 2, "rank": 2}, "rank=2 of num_replicas=2"),
    ({"num_replicas": 2, "rank": 0, "generator": torch.Generator()}, "give seed= in its place"),
)
_FEWER = (
    *_SAMPLER,
    ({"num_samples": 7}, "num_samples=7 without replacement, expected 4 (groups) times a number from 1 to 5"),
    ({"num_samples": 24}, "num_samples=24 without replacement"),
)


def _sampler(name: str, **more: Any) -> SamplerCase:
    return SamplerCase(name, "evenly.robust:GroupBalancedSampler", robust.GroupBalancedSampler, "group-dro", **more)


SAMPLERS = (
    _sampler("GroupBalancedSampler", refuses=_SAMPLER),
    _sampler("GroupBalancedSampler (stratified)", settings={"stratified": True}, exact=True),
    _sampler(
        "GroupBalancedSampler (subsampling)",
        settings={"replacement": False},
        exact=True,
        distinct=True,
        refuses=_FEWER,
    ),
    _sampler(
        "GroupBalancedSampler (both)",
        settings={"replacement": False, "stratified": True},
        exact=True,
        distinct=True,
    ),
)
