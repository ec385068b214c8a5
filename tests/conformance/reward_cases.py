"""The table of reward normalizers: one row a normalizer with its settings, held to the suite in test_rewards.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from evenly import policy
from evenly.policy import RewardNormalizer


@dataclass(frozen=True)
class RewardCase:
    """A reward normalizer: ``make(**settings, **more)`` builds it."""

    name: str
    object: str  # "module:Name", as in the catalog
    make: Callable[..., RewardNormalizer]
    settings: Mapping[str, Any] = field(default_factory=dict)
    catalog: str | None = None
    function: Callable[..., Any] | None = None  # the function beside it, with the same settings
    groups: bool = True  # it needs labels
    local: bool = True  # a group's advantages do not depend on the other groups
    sums_to_zero: bool = True  # the advantages of a group do
    equal_is_zero: bool = True  # equal rewards in a group have the advantage 0
    state: tuple[str, ...] = ()  # names in the state dict
    shift: bool = True  # a constant added to all rewards changes nothing
    scale: float | None = None  # rewards times k: advantages times k to this power; None: no such rule
    bounded: bool = False  # rewards have a range, and their affine maps with it change nothing
    refuses: tuple[tuple[dict[str, Any], str], ...] = ()  # settings and a part of the message
    shows: tuple[str, ...] = ()  # what its repr must print

    def __call__(self, **more: Any) -> RewardNormalizer:
        return self.make(**{**self.settings, **more})

    def __str__(self) -> str:
        return self.name


_EVERY = (
    ({"num_rewards": 0}, "num_rewards=0, expected a whole number of at least 1"),
    ({"singletons": "drop"}, "singletons='drop', expected 'error', 'zero' or 'raw'"),
)
_EPS = (({"eps": -1.0}, "eps=-1.0, expected a number of at least 0"), ({"eps": "small"}, "eps='small'"))
_BNPO = (
    *_EVERY,
    ({"decay": 1.5}, "decay=1.5, expected a number of at least 0 and at most 1"),
    ({"reward_range": (1.0, 0.0)}, "reward_range=(1.0, 0.0), expected two finite numbers, the lower one first"),
    ({"reward_range": 1.0}, "reward_range=1.0, expected two numbers"),
    ({"max_weight": 0.0}, "max_weight=0.0, expected a number above 0"),
    ({"clamp_min": -1.0}, "clamp_min=-1.0"),
)
_STATE = ("alpha", "beta", "count", "running_mean", "running_var", "running_noise")


def _bnpo(name: str, function: Callable[..., Any] | None, **settings: Any) -> RewardCase:
    return RewardCase(
        name,
        "evenly.policy:BNPO",
        policy.BNPO,
        settings,
        catalog="bnpo",
        function=function,
        local=False,
        state=_STATE,
        shift=False,
        bounded=True,
        refuses=_BNPO,
        shows=("decay=", "reward_range=(0.0, 1.0)", "max_weight=", "clamp_min="),
    )


def _grpo(name: str, scale: str | None, power: float | None, **settings: Any) -> RewardCase:
    return RewardCase(
        name,
        "evenly.policy:GRPO",
        policy.GRPO,
        {"scale": scale, **settings},
        function=policy.grpo_advantages,
        local=scale != "batch",
        scale=power,
        refuses=(*_EVERY, *_EPS, ({"scale": "std"}, "scale='std', expected 'group', 'batch' or None")),
        shows=(f"scale={scale!r}", "eps=", "correction="),
    )


def _reinforce(name: str, function: Callable[..., Any] | None, baseline: Any, **more: Any) -> RewardCase:
    settings = more.pop("settings", {})
    return RewardCase(
        name,
        "evenly.policy:Reinforce",
        policy.Reinforce,
        {"baseline": baseline, **settings},
        function=function,
        refuses=(
            *_EVERY,
            *_EPS,
            ({"baseline": "mean"}, "baseline='mean', expected 'group', 'batch', 'running' or a finite number"),
            ({"decay": -0.1}, "decay=-0.1"),
            ({"scale": "group"}, "scale='group', expected 'batch' or None"),
        ),
        shows=(f"baseline={baseline!r}", "scale="),
        **more,
    )


_NO_GROUPS: dict[str, Any] = {"groups": False, "local": False, "sums_to_zero": False, "equal_is_zero": False}

REWARDS = (
    _bnpo("BNPO", policy.bnpo_advantages),
    _bnpo("BNPO (decay)", None, decay=0.7, correct_noise=True),
    _bnpo("BNPO (no clamp)", policy.bnpo_advantages, clamp_min=None, max_weight=50.0),
    _grpo("GRPO", "group", 0, eps=0.0),
    _grpo("GRPO (eps)", "group", None),
    _grpo("GRPO (no scale)", None, 1),
    _grpo("GRPO (batch)", "batch", 0, eps=0.0),
    RewardCase(
        "RLOO",
        "evenly.policy:RLOO",
        policy.RLOO,
        function=policy.rloo_advantages,
        scale=1,
        refuses=(*_EVERY, *_EPS, ({"scale": "group"}, "scale='group', expected 'batch' or None")),
        shows=("scale=None", "eps="),
    ),
    RewardCase(
        "RLOO (batch)",
        "evenly.policy:RLOO",
        policy.RLOO,
        {"scale": "batch", "eps": 0.0},
        function=policy.rloo_advantages,
        local=False,
        scale=0,
    ),
    _reinforce("REINFORCE", policy.reinforce_advantages, "group", scale=1),
    _reinforce(
        "REINFORCE (whitened)",
        policy.reinforce_advantages,
        "group",
        scale=0,
        local=False,
        settings={"scale": "batch", "eps": 0.0},
    ),
    _reinforce("REINFORCE (batch)", policy.reinforce_advantages, "batch", scale=1, **_NO_GROUPS),
    _reinforce(
        "REINFORCE (running)", None, "running", scale=1, state=("count", "running_mean", "running_var"), **_NO_GROUPS
    ),
    _reinforce("REINFORCE (number)", policy.reinforce_advantages, 0.5, shift=False, **_NO_GROUPS),
)
