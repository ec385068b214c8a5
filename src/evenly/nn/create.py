"""Layers by name: what models, ``evenly.convert`` and ``evenly compare`` ask for.

One table. A layer that gains a row here can be a model's ``norm=``, a target of ``evenly.convert`` and a row
of ``evenly compare``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from torch import nn

from evenly.nn.batchnorm import BatchNorm, FrozenBatchNorm
from evenly.nn.bcnorm import BCNorm
from evenly.nn.groupnorm import GroupNorm, InstanceNorm
from evenly.nn.layernorm import LayerNorm, RMSNorm, ScaleNorm
from evenly.nn.mean_only_batchnorm import MeanOnlyBatchNorm
from evenly.nn.nonorm import NoNorm
from evenly.nn.norm import Norm
from evenly.nn.onlinenorm import OnlineNorm
from evenly.nn.powernorm import PowerNorm

__all__ = ["available", "create", "default_groups"]


def default_groups(num_features: int) -> int:
    """The number of groups where none is given: at most 32, at least 2 channels each, a divisor.

    >>> [default_groups(c) for c in (8, 24, 64, 256, 7)]
    [4, 12, 32, 32, 1]
    """
    most = max(1, min(32, num_features // 2))
    return max(g for g in range(1, most + 1) if num_features % g == 0)


def _group(c: int, groups: int | None, last: bool, o: dict[str, Any]) -> nn.Module:
    groups = default_groups(c) if groups is None else groups
    if last:
        return Norm("... (g c) -> ... g", c, affine="(g c)", g=groups, **o)
    return GroupNorm(groups, c, **o)


def _layer(c: int, groups: int | None, last: bool, o: dict[str, Any]) -> nn.Module:
    return LayerNorm(c, **o) if last else GroupNorm(1, c, **o)


def _rms(c: int, groups: int | None, last: bool, o: dict[str, Any]) -> nn.Module:
    if last:
        return RMSNorm(c, **({"eps": 1e-5} | o))
    return Norm("n c ... -> n", c, affine="c", bias=False, center=False, scale="rms", **o)


def _scale(c: int, groups: int | None, last: bool, o: dict[str, Any]) -> nn.Module:
    if last:
        return ScaleNorm(c, **o)
    return Norm("n c ... -> n", (), bias=False, center=False, scale="rms", **o)


def _instance(c: int, groups: int | None, last: bool, o: dict[str, Any]) -> nn.Module:
    if last:
        return Norm("n ... c -> n c", c, affine="c", **o)
    return InstanceNorm(c, affine=True, **o)


def _frozen(c: int, groups: int | None, last: bool, o: dict[str, Any]) -> nn.Module:
    if last:
        raise ValueError("'frozen' is for channels at axis 1, as in (N, C, H, W); got channel_dim=-1.")
    return FrozenBatchNorm(c, **o)


def _mean_only(c: int, groups: int | None, last: bool, o: dict[str, Any]) -> nn.Module:
    o = {key: value for key, value in o.items() if key != "eps"}
    return MeanOnlyBatchNorm(c, channel_dim=-1 if last else 1, **o)


def _power(c: int, groups: int | None, last: bool, o: dict[str, Any]) -> nn.Module:
    # The class's warm-up is that of a translation recipe of 100000 steps; here the state is warm after some dozens.
    o = {"warmup_iters": 100, "group_num": 1 if groups is None else groups} | _without_activation("power", o)
    return PowerNorm(c, channel_dim=-1 if last else 1, **o)


def _online(c: int, groups: int | None, last: bool, o: dict[str, Any]) -> nn.Module:
    return OnlineNorm(c, channel_dim=-1 if last else 1, **_without_activation("online", o))


def _batch_channel(estimate: bool) -> Callable[[int, int | None, bool, dict[str, Any]], nn.Module]:
    def build(c: int, groups: int | None, last: bool, o: dict[str, Any]) -> nn.Module:
        if last:
            raise ValueError("Batch-channel normalization is for channels at axis 1, as in (N, C, H, W).")
        speed = {"moving_speed": 0.1} if estimate else {}
        return BCNorm(c, default_groups(c) if groups is None else groups, estimate=estimate, **(speed | o))

    return build


def _without_activation(name: str, o: dict[str, Any]) -> dict[str, Any]:
    if o.get("activation") is not None:
        raise ValueError(
            f"{name!r} has no fused activation, got activation={o['activation']!r}; put it after the layer."
        )
    return {key: value for key, value in o.items() if key != "activation"}


def _none(c: int, groups: int | None, last: bool, o: dict[str, Any]) -> nn.Module:
    return NoNorm(activation=o.get("activation"))


_LAYERS: dict[str, Callable[[int, int | None, bool, dict[str, Any]], nn.Module]] = {
    "none": _none,
    "batch": lambda c, groups, last, o: BatchNorm(c, channel_dim=-1 if last else 1, **o),
    "sync": lambda c, groups, last, o: BatchNorm(c, sync=True, channel_dim=-1 if last else 1, **o),
    "frozen": _frozen,
    "mean-only": _mean_only,
    "layer": _layer,
    "rms": _rms,
    "scale": _scale,
    "group": _group,
    "instance": _instance,
    "power": _power,
    "online": _online,
    "bcn": _batch_channel(False),
    "bcn-est": _batch_channel(True),
}


def available() -> tuple[str, ...]:
    """The names that :func:`create` knows.

    >>> "group" in available()
    True
    """
    return tuple(_LAYERS)


def create(
    name: str,
    num_features: int,
    *,
    channel_dim: int = 1,
    num_groups: int | None = None,
    **options: Any,
) -> nn.Module:
    """A normalization layer by name.

    ===========  ==========================================  ==============================
    name         channels at axis 1: (N, C, ...)             channels last: (..., C)
    ===========  ==========================================  ==============================
    batch        one statistic a channel                     the same
    sync         the same, over all processes                the same
    frozen       constants                                   refused
    mean-only    one mean a channel; no scale                the same
    layer        one statistic a sample                      one a position
    rms          the same, without mean                      one a position, without mean
    scale        rms with one learned scale                  l2 with one learned length
    group        one a sample and group                      one a position and group
    instance     one a sample and channel                    the same
    power        a running mean square a channel             the same
    online       a running mean and variance a channel       the same
    bcn          batch, then group                           refused
    bcn-est      the same, by estimates (micro-batches)      refused
    none         residual and activation only                the same
    ===========  ==========================================  ==============================

    Args:
        name: one of :func:`available`.
        num_features: C.
        channel_dim: 1 or -1.
        num_groups: of ``"group"`` and ``"bcn"``; default :func:`default_groups`. Of ``"power"``: of its group
            scaling; default 1.
        **options: ``eps`` (not of ``"none"`` and ``"mean-only"``, which divide by nothing), ``activation``,
            ``device``, ``dtype``, passed to the layer.

    Raises:
        ValueError: an unknown name.

    >>> create("group", 64)
    GroupNorm(32, 64, eps=1e-05, affine=True)
    """
    if name not in _LAYERS:
        close = difflib.get_close_matches(name, _LAYERS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"There is no layer named {name!r}; there are {', '.join(_LAYERS)}.{hint}")
    if channel_dim not in (1, -1):
        raise ValueError(f"channel_dim={channel_dim}, expected 1 for (N, C, ...) or -1 for (..., C).")
    return _LAYERS[name](num_features, num_groups, channel_dim == -1, options)
