"""Sharded and replicated tensors: two processes take the steps that one takes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from evenly import optim

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")

MAKERS = {
    "AdamP": lambda params: optim.AdamP(params, lr=0.01, weight_decay=0.1),
    "AdamP, all": lambda params: optim.AdamP(params, lr=0.01, weight_decay=0.1, delta=1e6),
    "SGDP": lambda params: optim.SGDP(params, lr=0.01, momentum=0.9, weight_decay=0.1),
    "SGDP, code": lambda params: optim.SGDP(params, lr=0.01, momentum=0.9, delta=1e6, buffer="code"),
    "SinkGD": lambda params: optim.SinkGD(params, lr=0.01, momentum=0.5, weight_decay=0.1),
    "SinkGD, transposed": lambda params: optim.SinkGD([{"params": params, "transpose": True}], lr=0.01),
    "SinkGD, skipping": lambda params: optim.SinkGD(params, lr=0.01, skip_nonfinite=True),
    "SinkGD, Adam": lambda params: optim.SinkGD([{"params": params, "rule": "adam"}], lr=0.01),
    "SWAN": lambda params: optim.SWAN(params, lr=0.01),
    "MultiNormGD": lambda params: optim.MultiNormGD(params, [optim.project_row_rms, optim.project_sign], lr=0.01),
}
SHAPES = ((6, 4), (5, 3), (1, 8), (4, 7))  # 5 and 3 split unevenly; of one row one process has nothing


def gradient(w, step, k):
    """The first two tensors get gradients orthogonal to their rows, the last one orthogonal to the whole."""
    g = torch.randn(w.shape, generator=torch.Generator().manual_seed(1000 + 10 * step + k))
    if k < 2:
        return g - w * (w * g).sum(1, keepdim=True) / w.square().sum(1, keepdim=True)
    return g - w * (w * g).sum() / w.square().sum() if k == 3 else g


def alone(make, steps=4):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    start = [p.detach().clone() for p in params]
    optimizer = make(params)
    for step in range(steps):
        for k, p in enumerate(params):
            p.grad = gradient(start[k], step, k)
        if step == 2 and optimizer.defaults.get("skip_nonfinite"):
            params[0].grad[0, 0] = float("inf")
        optimizer.step()
    return [p.detach() for p in params], getattr(optimizer, "projected", None)


def work(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (2,))
        for name, make in MAKERS.items():
            want, projected = alone(make)
            for placement in (Shard(0), Shard(1), Replicate()):
                torch.manual_seed(0)
                start = [torch.randn(shape) for shape in SHAPES]
                params = [nn.Parameter(distribute_tensor(w.clone(), mesh, [placement])) for w in start]
                optimizer = make(params)
                for step in range(4):
                    for k, p in enumerate(params):
                        g = gradient(start[k], step, k)
                        if step == 2 and k == 0 and optimizer.defaults.get("skip_nonfinite"):
                            g[0, 0] = float("inf")
                        p.grad = distribute_tensor(g, mesh, [placement])
                    if step == 1:  # a gradient in another layout is brought into the parameter's
                        params[0].grad = distribute_tensor(gradient(start[0], step, 0), mesh, [Replicate()])
                    optimizer.step()
                for k, (p, w) in enumerate(zip(params, want, strict=True)):
                    torch.testing.assert_close(
                        p.full_tensor().detach(),
                        w,
                        rtol=1e-4,
                        atol=1e-5,
                        msg=lambda m, n=name, s=placement, k=k: f"{n} {s} {k}: {m}",
                    )
                    for value in optimizer.state[p].values() if p in optimizer.state else ():
                        assert value.dim() == 0 or value.placements == p.placements
                assert getattr(optimizer, "projected", None) == projected, (name, placement)

        # A fully sharded model, beside the same model trained whole on both halves of the batch.
        for make in (
            lambda m: optim.SinkGD(optim.for_model(m, exclude=["2"])),
            lambda m: optim.AdamP(m.parameters(), lr=0.01),
        ):
            torch.manual_seed(1)
            whole = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
            torch.manual_seed(1)
            sharded = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
            fully_shard(sharded, mesh=mesh)
            one, two = make(whole), make(sharded)
            for step in range(3):
                x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
                whole(x).square().mean().backward()
                sharded(x[4 * rank : 4 * rank + 4]).square().mean().backward()
                for optimizer in (one, two):
                    optimizer.step()
                    optimizer.zero_grad()
            for p, q in zip(whole.parameters(), sharded.parameters(), strict=True):
                torch.testing.assert_close(q.full_tensor().detach(), p.detach(), rtol=1e-3, atol=1e-4)

        partial = nn.Parameter(torch.distributed.tensor.DTensor.from_local(torch.ones(2, 2), mesh, [Partial()]))
        partial.grad = torch.distributed.tensor.DTensor.from_local(torch.ones(2, 2), mesh, [Partial()])
        with pytest.raises(TypeError, match="expected Shard or Replicate"):
            optim.AdamP([partial]).step()
        fused = nn.Parameter(distribute_tensor(torch.ones(6, 2), mesh, [Shard(0)]))
        with pytest.raises(ValueError, match="is sharded, and its group has blocks=3"):
            optim.SinkGD([{"params": [fused], "blocks": 3}])
    finally:
        dist.destroy_process_group()


def test_two_processes_take_the_steps_of_one(tmp_path):
    mp.spawn(work, (str(tmp_path / "meet"),), nprocs=2)


def test_the_problem_has_every_kind_of_projection():
    assert alone(MAKERS["AdamP"], steps=1)[1] == {"channel": 2, "layer": 1, "none": 1}
