"""What each of two processes runs in the suite of reward normalizers (a module, so that spawn can import it)."""

from __future__ import annotations

import torch
import torch.distributed as dist

from conformance.reward_cases import REWARDS


def batches():
    """Three batches of 20 rollouts with ragged groups that lie on both processes; the last two have a mask."""
    gen = torch.Generator().manual_seed(5)
    for number, (start, stop) in enumerate(((0, 11), (0, 20), (0, 5))):
        ids = torch.tensor([3, 3, 9, 9, 9, 1, 1, 1, 1, 4, 4, 3, 9, 1, 4, 4, 7, 7, 7, 3])
        rewards = torch.rand(20, 2, generator=gen, dtype=torch.float64).round(decimals=1)
        mask = torch.rand(20, 2, generator=gen) > 0.1 if number else None
        yield rewards, ids, mask, start, stop


def run(case, rank=None):
    """The advantages of the batches and the state after them; of one process's part, or of everything."""
    normalizer = case(num_rewards=2, singletons="zero", sync=rank is not None)
    out = []
    for rewards, ids, mask, start, stop in batches():
        inside = torch.zeros(20, dtype=torch.bool)
        inside[start:stop] = True
        rows = torch.arange(20) if rank is None else (inside if rank == 0 else ~inside).nonzero()[:, 0]
        # The first process has the mask only where it has rows that are masked: the other may bring one and it none.
        own = None if mask is None or (rank is not None and bool(mask[rows].all())) else mask[rows]
        out.append((rows, normalizer(rewards[rows], ids[rows] if case.groups else None, mask=own)))
    return out, {name: value.clone() for name, value in normalizer.state_dict().items()}


def worker(rank, store, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results = {case.name: run(case, rank) for case in REWARDS}
    # What is wrong on one process is an error on both, so that neither waits for the other for ever.
    bad = torch.tensor([0.5, float("nan") if rank else 0.5])
    try:
        REWARDS[0](sync=True)(bad, torch.tensor([0, 0]))
        results["error"] = ""
    except ValueError as error:
        results["error"] = str(error)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
