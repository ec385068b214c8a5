"""Statistics shared between processes.

Each process brings the mean, variance and count of its part of the batch; together they are merged by the
formula of Chan, Golub & LeVeque (1983), which never subtracts large squares:

.. math::
    N = \\sum_k n_k, \\quad M = \\sum_k \\tfrac{n_k}{N} m_k, \\quad
    V = \\sum_k \\tfrac{n_k}{N} \\big( v_k + (m_k - M)^2 \\big).

Forward is one all-gather, backward one all-reduce. The gradient is that of the sum of all processes' losses,
as in ``torch.nn.SyncBatchNorm``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from evenly.core import Moments

__all__ = ["sync_moments"]


def sync_moments(local: Moments, process_group: Any = None) -> Moments:
    """The moments of the joined batch of all processes; differentiable in the local ones.

    Without an initialized process group, or in a group of one, the local moments are returned. Processes may
    bring different counts, zero included.

    >>> sync_moments(Moments(torch.zeros(2), torch.ones(2), torch.full((2,), 4.0))).count
    tensor([4., 4.])
    """
    if not (dist.is_available() and dist.is_initialized()):
        return local
    group = process_group if process_group is not None else dist.group.WORLD
    if dist.get_world_size(group) == 1:
        return local
    mean = torch.where(local.count > 0, local.mean, torch.zeros_like(local.mean))
    var = torch.where(local.count > 0, local.var, torch.zeros_like(local.var))
    return Moments(*_SyncMoments.apply(mean, var, local.count, group))


class _SyncMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, count: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
        local = torch.stack([mean, var, count]).contiguous()
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, local, group=group)
        means, variances, counts = torch.stack(parts).unbind(1)
        total = counts.sum(0)
        share = counts / total.clamp(min=1)
        joined = (share * means).sum(0)
        spread = (share * (variances + (means - joined).square())).sum(0)
        ctx.group = group
        ctx.save_for_backward(count / total.clamp(min=1), mean - joined)
        ctx.mark_non_differentiable(total)
        return joined, spread, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        share, offset = ctx.saved_tensors
        grads = torch.stack([grad_mean, grad_var]).contiguous()
        dist.all_reduce(grads, group=ctx.group)
        grad_mean, grad_var = grads.unbind(0)
        return share * (grad_mean + 2 * offset * grad_var), share * grad_var, None, None
