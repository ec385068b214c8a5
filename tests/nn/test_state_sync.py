"""Layers that share running state: two processes with the parts of a batch are one process with the batch."""

from __future__ import annotations

import pytest
import torch

from nn.state_sync_worker import MAKE, steps, worker


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sync")
    torch.multiprocessing.spawn(worker, args=(str(folder / "store"), str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", MAKE)
def test_two_processes_are_one(parts, name):
    want, state = steps(MAKE[name](False).double(), slice(None))
    (first, first_state), (second, second_state) = parts[0][name], parts[1][name]
    for (whole, whole_params), (a, a_params), (b, b_params) in zip(want, first, second, strict=True):
        for w, u, v in zip(whole, a, b, strict=True):
            torch.testing.assert_close(torch.cat([u, v]), w)
        for w, u, v in zip(whole_params, a_params, b_params, strict=True):
            torch.testing.assert_close(u + v, w)
    for key, value in state.items():
        torch.testing.assert_close(first_state[key], value)
        torch.testing.assert_close(second_state[key], value)
