"""`BatchNorm` against torch.nn.BatchNorm1d/2d/3d, and over two processes against one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.checkpoint import checkpoint

import evenly
from evenly.nn import BatchNorm, FrozenBatchNorm, InstanceNorm
from nn.sync_worker import batches, make_layer, steps, worker

CLOSE = {"rtol": 0, "atol": 1e-12}
RANKS = {
    "n c": (nn.BatchNorm1d, (6, 4)),
    "n c l": (nn.BatchNorm1d, (6, 4, 5)),
    "n c h w": (nn.BatchNorm2d, (6, 4, 5, 3)),
    "n c d h w": (nn.BatchNorm3d, (3, 4, 2, 5, 3)),
}


def pair(torch_class, **options):
    """The same layer of torch and of evenly, with the same random parameters, in float64."""
    theirs = torch_class(4, **options).double()
    if theirs.affine:
        nn.init.normal_(theirs.weight)
        nn.init.normal_(theirs.bias)
    kind = BatchNorm if "BatchNorm" in torch_class.__name__ else InstanceNorm
    ours = kind(4, **options).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def same(ours, theirs, x, **close):
    """Outputs, gradients and buffers agree; returns nothing."""
    close = close or CLOSE
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    seed = torch.randn_like(x)
    ya, yb = ours(a), theirs(b)
    torch.testing.assert_close(ya, yb, **close)
    ours.zero_grad()
    theirs.zero_grad()
    ya.backward(seed)
    yb.backward(seed)
    torch.testing.assert_close(a.grad, b.grad, **close)
    for (name, p), (other, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(p.grad, q.grad, **close)
    mine, their = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(their)
    for k in their:
        # torch's instance norm has num_batches_tracked but never counts.
        if not (k == "num_batches_tracked" and isinstance(ours, InstanceNorm)):
            torch.testing.assert_close(mine[k], their[k], **close)
        assert mine[k].dtype == their[k].dtype


@pytest.mark.parametrize("momentum", [0.1, 0.7, 0.0, 1.0, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("rank", RANKS)
def test_as_torch(rank, track, affine, momentum):
    torch_class, shape = RANKS[rank]
    ours, theirs = pair(torch_class, affine=affine, track_running_stats=track, momentum=momentum)
    for _ in range(3):
        same(ours, theirs, torch.randn(shape, dtype=torch.float64) * 3 + 1)
    if track:
        assert ours.num_batches_tracked == 3
    ours.eval()
    theirs.eval()
    same(ours, theirs, torch.randn(shape, dtype=torch.float64))
    same(ours, theirs, torch.randn(1, *shape[1:], dtype=torch.float64)) if len(shape) > 2 or track else None
    if track:
        assert ours.num_batches_tracked == 3
    ours.train()
    theirs.train()
    same(ours, theirs, torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_eps(eps):
    ours, theirs = pair(nn.BatchNorm2d, eps=eps)
    same(ours, theirs, torch.randn(3, 4, 5, 5, dtype=torch.float64))


def test_float32_as_torch():
    for torch_class, shape in RANKS.values():
        theirs = torch_class(4)
        ours = BatchNorm(4)
        ours.load_state_dict(theirs.state_dict())
        same(ours, theirs, torch.randn(shape), rtol=1e-5, atol=1e-6)


def test_other_ranks():
    """Five spatial axes are five spatial axes."""
    x = torch.randn(3, 4, 2, 2, 3, 2, 2, dtype=torch.float64)
    ours, theirs = pair(nn.BatchNorm1d)
    torch.testing.assert_close(ours(x), theirs(x.flatten(2)).reshape(x.shape), **CLOSE)


def test_half_input_keeps_float32_state():
    x = torch.randn(8, 4, 5, 5).bfloat16()
    layer = BatchNorm(4)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert layer.running_mean.dtype == torch.float32
    torch.testing.assert_close(layer.running_mean, 0.1 * x.float().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_running_variance_is_unbiased():
    x = torch.randn(5, 4, dtype=torch.float64)
    layer = BatchNorm(4, momentum=1.0).double()
    layer(x)
    torch.testing.assert_close(layer.running_var, x.var(0, correction=1), **CLOSE)


@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1), (1, 4, 1, 1)])
def test_one_value_a_channel(shape):
    layer = BatchNorm(4)
    with pytest.raises(ValueError, match=r"more than 1 value|more than one value|one value") as caught:
        layer(torch.randn(shape))
    assert str(tuple(shape)) in str(caught.value) or str(list(shape)) in str(caught.value)
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_mean, torch.zeros(4))
    layer.eval()
    layer(torch.randn(shape))


@pytest.mark.parametrize("shape", [(4,), (), (3, 5), (3, 5, 4), (4, 3)])
def test_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"4|at least 2") as caught:
        BatchNorm(4)(torch.randn(shape))
    assert str(tuple(shape)) in str(caught.value)


def test_bad_settings():
    for bad in [0, -1]:
        with pytest.raises(ValueError, match="num_features"):
            BatchNorm(bad)
    with pytest.raises(ValueError, match="eps"):
        BatchNorm(4, eps=-1.0)
    for bad in [-0.1, 1.5]:
        with pytest.raises(ValueError, match="momentum"):
            BatchNorm(4, momentum=bad)
    with pytest.raises(ValueError, match=r"activation|tanh"):
        BatchNorm(4, activation="tanh")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu"])
def test_fused_residual_and_activation(activation, training):
    ours, theirs = pair(nn.BatchNorm2d)
    ours.train(training)
    theirs.train(training)
    fused = BatchNorm(4, activation=activation).double().train(training)
    fused.load_state_dict(theirs.state_dict())
    act = {None: nn.Identity(), "relu": nn.ReLU(), "silu": nn.SiLU(), "gelu": nn.GELU()}[activation]
    x, r = (torch.randn(6, 4, 5, 3, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(fused(x, residual=r), act(theirs(x) + r), **CLOSE)
    torch.testing.assert_close(fused.running_mean, theirs.running_mean, **CLOSE)


def test_mask_equals_leaving_out():
    """Masked positions count neither in the statistic of the batch nor in the running ones."""
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    keep = torch.rand(6, 1, 5) < 0.6
    ours, theirs = pair(nn.BatchNorm1d)
    y = ours(x.masked_fill(~keep, float("nan")), mask=keep)
    rows = x.movedim(1, 2)[keep[:, 0]]
    want = theirs(rows)
    torch.testing.assert_close(y.movedim(1, 2)[keep[:, 0]], want, **CLOSE)
    assert (y.movedim(1, 2)[~keep[:, 0]] == 0).all()
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, **CLOSE)
    torch.testing.assert_close(ours.running_var, theirs.running_var, **CLOSE)
    ours.eval()
    theirs.eval()
    y = ours(x.masked_fill(~keep, float("nan")), mask=keep)
    torch.testing.assert_close(y.movedim(1, 2)[keep[:, 0]], theirs(rows), **CLOSE)


def test_reset():
    layer = BatchNorm(4)
    layer(torch.randn(5, 4) + 3)
    layer.reset_running_stats()
    assert torch.equal(layer.running_mean, torch.zeros(4))
    assert torch.equal(layer.running_var, torch.ones(4))
    assert layer.num_batches_tracked == 0
    with torch.no_grad():
        layer.weight.fill_(3)
    layer.reset_parameters()
    assert torch.equal(layer.weight, torch.ones(4))
    assert torch.equal(layer.bias, torch.zeros(4))


def test_running_statistics_carry_no_graph_and_old_checkpoints_load():
    layer = BatchNorm(4)
    layer(torch.randn(5, 4, requires_grad=True))
    assert not layer.running_mean.requires_grad
    assert layer.running_mean.grad_fn is None
    # Before torch 0.4.1 there was no num_batches_tracked; torch's own layers still load such a file.
    old = {k: v for k, v in layer.state_dict().items() if k != "num_batches_tracked"}
    plain = nn.BatchNorm1d(4)
    old_format = copy.deepcopy(old)
    plain.load_state_dict(old_format, strict=True)
    BatchNorm(4).load_state_dict(old, strict=True)


# ---- frozen ----------------------------------------------------------------------------------------------


def test_frozen_is_the_formula_of_torchvision():
    """scale = weight / sqrt(running_var + eps); y = x * scale + (bias - running_mean * scale); all are buffers."""
    layer = FrozenBatchNorm(4, eps=1e-3).double()
    assert not list(layer.parameters())
    assert set(layer.state_dict()) == {"weight", "bias", "running_mean", "running_var"}
    state = {k: torch.rand(4, dtype=torch.float64) + 0.5 for k in layer.state_dict()}
    layer.load_state_dict(state)
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    v = {k: t.reshape(1, 4, 1, 1) for k, t in state.items()}
    scale = v["weight"] * (v["running_var"] + 1e-3).rsqrt()
    want = x * scale + (v["bias"] - v["running_mean"] * scale)
    for mode in [True, False]:
        layer.train(mode)
        y = layer(x)
        torch.testing.assert_close(y, want, **CLOSE)
    (g,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(g, scale.expand_as(x), **CLOSE)
    for k, t in layer.state_dict().items():
        torch.testing.assert_close(t, state[k], rtol=0, atol=0)


def test_frozen_loads_a_batch_norm():
    theirs = nn.BatchNorm2d(4)
    theirs(torch.randn(5, 4, 3, 3) * 2 + 1)
    theirs.eval()
    layer = FrozenBatchNorm(4, eps=theirs.eps)
    layer.load_state_dict(theirs.state_dict(), strict=True)  # num_batches_tracked is dropped, as in torchvision
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(layer(x), theirs(x), rtol=1e-5, atol=1e-6)


# ---- instance norm with running statistics ---------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.6])
@pytest.mark.parametrize(
    ("torch_class", "shape"),
    [
        (nn.InstanceNorm1d, (3, 4, 7)),
        (nn.InstanceNorm2d, (3, 4, 5, 3)),
        (nn.InstanceNorm3d, (3, 4, 2, 3, 3)),
    ],
)
def test_instance_norm(torch_class, shape, momentum, track, affine):
    ours, theirs = pair(torch_class, affine=affine, track_running_stats=track, momentum=momentum)
    for _ in range(2):
        same(ours, theirs, torch.randn(shape, dtype=torch.float64) * 2 + 1)
    ours.eval()
    theirs.eval()
    same(ours, theirs, torch.randn(shape, dtype=torch.float64))


def test_instance_norm_defaults_are_those_of_torch():
    assert not list(InstanceNorm(4).parameters())
    assert list(InstanceNorm(4).state_dict()) == list(nn.InstanceNorm2d(4).state_dict())
    with pytest.raises(ValueError, match=r"spatial|more than 1|one value"):
        InstanceNorm(4)(torch.randn(3, 4, 1, 1))


# ---- two processes ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.parametrize(("momentum", "activation"), [(0.1, None), (None, "silu")])
def test_sync_two_processes_equal_one(tmp_path, momentum, activation):
    mp.spawn(worker, (tmp_path / "store", str(tmp_path), momentum, activation), nprocs=2, join=True)
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    x, seed = batches()
    layer = make_layer(momentum, False, activation)
    whole = steps(layer, x, seed)
    close = {"rtol": 0, "atol": 1e-10}
    for a, b, w in zip(first[:-1], second[:-1], whole[:-1], strict=True):
        torch.testing.assert_close(torch.cat([a[0], b[0]]), w[0], **close)  # outputs
        torch.testing.assert_close(torch.cat([a[1], b[1]]), w[1], **close)  # gradients of the input
        torch.testing.assert_close(a[2] + b[2], w[2], **close)  # of the weight: each process its share
        torch.testing.assert_close(a[3] + b[3], w[3], **close)
    torch.testing.assert_close(torch.cat([first[-1][0], second[-1][0]]), whole[-1][0], **close)
    for a, b, w in zip(first[-1][1:], second[-1][1:], whole[-1][1:], strict=True):
        torch.testing.assert_close(a, w, **close)  # running statistics, the same everywhere
        torch.testing.assert_close(b, w, **close)


def test_sync_without_a_process_group_is_a_plain_batch_norm():
    a, b = make_layer(0.1, True, None), make_layer(0.1, False, None)
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(a(x), b(x), **CLOSE)
    torch.testing.assert_close(a.running_var, b.running_var, **CLOSE)
    a.eval()
    b.eval()
    torch.testing.assert_close(a(x), b(x), **CLOSE)


def test_batch_norm_is_not_the_identity():
    x = torch.randn(50, 4) * 5 + 3
    y = evenly.nn.BatchNorm(4)(x)
    torch.testing.assert_close(y.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.var(0, correction=0), torch.ones(4), rtol=1e-4, atol=0)


def test_activation_checkpointing_counts_a_batch_once():
    """The forward pass that is run again inside the backward pass must not move the running statistics again."""
    x = torch.randn(6, 4, 5, dtype=torch.float64, requires_grad=True)
    plain, recomputed = (BatchNorm(4, activation="silu").double() for _ in range(2))
    (want,) = torch.autograd.grad(plain(x).pow(3).sum(), x)
    y = checkpoint(recomputed, x, use_reentrant=False)
    (got,) = torch.autograd.grad(y.pow(3).sum(), x)
    torch.testing.assert_close(got, want, **CLOSE)
    torch.testing.assert_close(recomputed.running_mean, plain.running_mean, **CLOSE)
    assert recomputed.num_batches_tracked == 1


def test_channel_dim():
    """Channels last, as tokens have them."""
    ours, theirs = BatchNorm(4, channel_dim=-1).double(), nn.BatchNorm1d(4).double()
    x = torch.randn(6, 5, 4, dtype=torch.float64) * 2 + 1
    for _ in range(2):
        torch.testing.assert_close(ours(x), theirs(x.mT).mT, **CLOSE)
    torch.testing.assert_close(ours.running_var, theirs.running_var, **CLOSE)
    with pytest.raises(ValueError, match="channel_dim"):
        BatchNorm(4, channel_dim=2)
