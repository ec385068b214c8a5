"""What each of two processes runs in the test of synchronized batch norm (a module, so that spawn can import it)."""

from __future__ import annotations

import torch
import torch.distributed as dist

from evenly.nn import BatchNorm

SPLIT = 3  # the first process has 3 samples, the second 5


def batches():
    gen = torch.Generator().manual_seed(5)
    x = torch.randn(3, 8, 4, 3, 2, dtype=torch.float64, generator=gen) * 2 + 1
    seed = torch.randn(3, 8, 4, 3, 2, dtype=torch.float64, generator=gen)
    return x, seed


def make_layer(momentum, sync, activation):
    layer = BatchNorm(4, momentum=momentum, sync=sync, activation=activation).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, -1.0, 2.0, 1.5]))
        layer.bias.copy_(torch.tensor([0.1, 0.2, -0.3, 0.0]))
    return layer


def steps(layer, x, seed):
    out = []
    for a, s in zip(x, seed, strict=True):
        leaf = a.clone().requires_grad_()
        layer.zero_grad()
        y = layer(leaf)
        y.backward(s)
        out.append([t.detach().clone() for t in (y, leaf.grad, layer.weight.grad, layer.bias.grad)])
    layer.eval()
    out.append([layer(x[0]).detach(), *(b.clone() for b in layer.buffers())])
    return out


def worker(rank, store, folder, momentum, activation):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    x, seed = batches()
    part = slice(0, SPLIT) if rank == 0 else slice(SPLIT, None)
    layer = make_layer(momentum, True, activation)
    torch.save(steps(layer, x[:, part], seed[:, part]), f"{folder}/{rank}.pt")
    # One sample of one value each: too few for one process, enough for two together.
    tiny = BatchNorm(4, sync=True).double()
    y = tiny(torch.full((1, 4), float(rank), dtype=torch.float64))
    assert torch.allclose(y, torch.full((1, 4), 2.0 * rank - 1, dtype=torch.float64), atol=1e-3), y
    # A process without a sample still takes part.
    empty = make_layer(momentum, True, None)
    rows = torch.randn(6, 4, 2, dtype=torch.float64) if rank else torch.empty(0, 4, 2, dtype=torch.float64)
    rows.requires_grad_()
    y = empty(rows)
    y.sum().backward()
    if rank:
        alone = make_layer(momentum, False, None)
        assert torch.allclose(y, alone(rows), rtol=0, atol=1e-10)
        assert torch.allclose(empty.running_var, alone.running_var, rtol=0, atol=1e-10)
    dist.destroy_process_group()
