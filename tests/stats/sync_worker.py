"""What each of two processes runs in the test of statistics over processes (a module, so that spawn can import it)."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from evenly.stats import PHIStandardizer

SPLIT = 5  # rows of the first process; the second has the rest
METHODS = ("phi-s", "standard")


def rows():
    return np.random.default_rng(0).normal(size=(30, 4)) @ np.triu(np.ones((4, 4))) + 50


def worker(rank, store, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    part = rows()[:SPLIT] if rank == 0 else rows()[SPLIT:]
    found = {}
    for method in METHODS:
        estimator = PHIStandardizer(method).partial_fit(part).synchronize()
        found[method] = torch.from_numpy(estimator.transform(rows())), estimator.n_samples_seen_
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
