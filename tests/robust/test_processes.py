"""Two processes with the parts of a batch are one process with the batch: values, states, gradients, sampler."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from conformance.loss_cases import LOSSES
from evenly.robust import GroupBalancedSampler, GroupDROLoss, WorstGroupAccuracy

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")

SPLIT = 9  # of 24: the first process has fewer samples, and none of group 3


def batch(step):
    gen = torch.Generator().manual_seed(step)
    x, y = torch.randn(24, 5, generator=gen), torch.randint(3, (24,), generator=gen)
    groups = torch.cat([torch.arange(9) % 3, torch.arange(15) % 4])
    return x, y, groups, torch.rand(24, generator=gen)


def network():
    torch.manual_seed(0)
    return nn.Linear(5, 3)


def train(case, part, sync, weighted):
    loss, model = case(sync=sync), network()
    if sync:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    values = []
    for step in range(4):
        x, y, groups, weights = (v[part] for v in batch(step))
        value = loss(model(x), y, groups, weights if weighted else None)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.detach())
    plain = model.module if sync else model
    return values, loss.state_dict(), [p.detach() for p in plain.parameters()]


def work(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    try:
        part = slice(0, SPLIT) if rank == 0 else slice(SPLIT, None)
        for case in LOSSES:
            for weighted in (False, True):
                want = train(case, slice(None), False, weighted)
                got = train(case, part, True, weighted)
                message = f"{case} weighted={weighted}"
                for a, b in zip(
                    (*got[0], *got[1].values(), *got[2]), (*want[0], *want[1].values(), *want[2]), strict=True
                ):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=message: f"{n}: {m}")
        # One process has an empty part of the batch.
        loss, alone = GroupDROLoss(4, sync=True, step_size=1.0), GroupDROLoss(4, step_size=1.0)
        losses, groups = torch.rand(8, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4
        mine = slice(0, 0) if rank == 0 else slice(None)
        torch.testing.assert_close(loss.reduce(losses[mine], groups[mine]), alone.reduce(losses, groups))
        torch.testing.assert_close(loss.log_q, alone.log_q)
        loss.eval()  # no process waits for another
        if rank == 0:
            loss.reduce(losses, groups)

        sampler = GroupBalancedSampler(groups, num_samples=10, seed=2)
        assert (sampler.num_replicas, sampler.rank, len(sampler)) == (2, rank, 5)
        parts: list = [None, None]
        dist.all_gather_object(parts, list(sampler))
        whole = list(GroupBalancedSampler(groups, num_samples=10, seed=2, num_replicas=1))
        assert [index for turn in zip(*parts, strict=True) for index in turn] == whole

        metric = WorstGroupAccuracy(4)
        metric.update(torch.full((8,), rank), torch.zeros(8, dtype=torch.int64), groups)
        metric.sync()
        assert metric.compute().average == 0.5
        assert metric.counts.tolist() == [4, 4, 4, 4]
    finally:
        dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    mp.spawn(work, (str(tmp_path / "meet"),), nprocs=2)
