"""Merge: the statistics of two sets of samples, from the statistics of each.

Means, variances and covariances that were measured apart combine exactly (Chan, Golub & LeVeque), so that data can
be read in pieces, or live on several processes:

.. math::

    n = n_a + n_b, \\quad \\delta = m_b - m_a, \\quad m = m_a + \\frac{n_b}{n}\\delta, \\quad
    C = \\frac{n_a}{n} C_a + \\frac{n_b}{n} C_b + \\frac{n_a n_b}{n^2} \\delta\\delta^T.

No sum of raw squares is ever formed, so a large mean costs no accuracy.

Reference:
    T. F. Chan, G. H. Golub and R. J. LeVeque, *Algorithms for computing the sample variance*, The American
    Statistician 37(3), 1983, equations 1.5.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from evenly.core.normalize import Moments
from evenly.core.whiten import Covariance

__all__ = ["merge", "merge_processes"]

Stats = TypeVar("Stats", Moments, Covariance)


def merge(first: Stats, second: Stats) -> Stats:
    """Combine two :class:`Moments`, or two covariances, of disjoint sets of samples.

    Args:
        first, second: results of :func:`evenly.moments` or of :func:`evenly.core.covariance` with ``correction=0``
            and the same pattern. A count of 0 is neutral.

    Returns:
        What the same function gives for both sets together.

    Raises:
        TypeError: they are not of one kind.
        ValueError: their shapes differ.

    >>> x = torch.arange(12.0).reshape(6, 2) ** 2
    >>> from evenly.core import covariance
    >>> both = merge(covariance(x[:2], "n d -> d"), covariance(x[2:], "n d -> d"))
    >>> torch.allclose(both.cov, covariance(x, "n d -> d").cov)
    True
    """
    if type(first) is not type(second) or not isinstance(first, Moments | Covariance):
        raise TypeError(f"merge expects two Moments or two Covariances, got {_kind(first)} and {_kind(second)}.")
    if first[1].shape != second[1].shape:
        raise ValueError(f"merge expects statistics of one shape, got {_shape(first)} and {_shape(second)}.")
    count = first.count + second.count
    share = second.count / count.clamp(min=1)
    delta = second.mean - first.mean
    if isinstance(first, Moments):
        spread = share * (1 - share) * delta.square()
        return type(first)(first.mean + share * delta, torch.lerp(first[1], second[1], share) + spread, count)
    share = share[..., None]
    mean = first.mean + share * delta
    share = share[..., None]
    spread = share * (1 - share) * delta[..., :, None] * delta[..., None, :]
    return type(first)(mean, torch.lerp(first[1], second[1], share) + spread, count)


def merge_processes(stats: Stats, process_group: dist.ProcessGroup | None = None) -> Stats:
    """Combine the statistics of the samples of every process of a group; each gets the result.

    Two rounds of all-reduce: counts and means first, then second moments about the common mean (C² numbers a
    covariance). Statistics must be on a device that the group's backend serves.

    Args:
        stats: as in :func:`merge`, of this process's samples.
        process_group: default: the world.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialized.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("merge_processes needs a process group: call torch.distributed.init_process_group first.")
    second_order = isinstance(stats, Covariance)
    count = stats.count.clone()
    each = stats.count[..., None] if second_order else stats.count
    total = stats.mean * each
    dist.all_reduce(count, group=process_group)
    dist.all_reduce(total, group=process_group)
    safe = count.clamp(min=1)
    mean = total / (safe[..., None] if second_order else safe)
    delta = stats.mean - mean
    if second_order:
        second = (stats[1] + delta[..., :, None] * delta[..., None, :]) * each[..., None]
        safe = safe[..., None, None]
    else:
        second = (stats[1] + delta.square()) * each
    dist.all_reduce(second, group=process_group)
    return type(stats)(mean, second / safe, count)


def _kind(stats: object) -> str:
    return type(stats).__name__


def _shape(stats: Moments | Covariance) -> tuple[int, ...]:
    second: Tensor = stats[1]
    return tuple(second.shape)
