"""What each of two processes runs in the test of layers that share running state (a module, so that spawn can import
it)."""

from __future__ import annotations

import torch
import torch.distributed as dist

from evenly.nn import BCNorm, EstBatchNorm, PowerNorm, PowerNormV

SPLIT = 3  # the first process has 3 samples, the second 5

MAKE = {
    "PowerNorm": lambda sync: PowerNorm(4, warmup_iters=2, group_num=2, channel_dim=1, sync=sync),
    "PowerNormV": lambda sync: PowerNormV(4, channel_dim=1, sync=sync),
    "EstBatchNorm": lambda sync: EstBatchNorm(4, moving_speed=0.3, sync=sync),
    "BCNorm": lambda sync: BCNorm(4, 2, estimate=True, moving_speed=0.3, sync=sync),
}


def steps(layer, part):
    gen = torch.Generator().manual_seed(5)
    out = []
    for _ in range(4):
        x, grad = torch.randn(2, 8, 4, 3, 2, dtype=torch.float64, generator=gen) * 2 + 1
        leaf = x[part].clone().requires_grad_()
        layer.zero_grad()
        y = layer(leaf)
        y.backward(grad[part])
        out.append(([y.detach(), leaf.grad], [p.grad.clone() for p in layer.parameters()]))
    return out, {k: v.clone() for k, v in layer.state_dict().items()}


def worker(rank, store, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    part = slice(0, SPLIT) if rank == 0 else slice(SPLIT, None)
    torch.save({name: steps(make(True).double(), part) for name, make in MAKE.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
