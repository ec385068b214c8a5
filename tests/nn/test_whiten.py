"""The layer `Whiten`: whitening of the batch in training, of the running statistics in evaluation."""

from __future__ import annotations

import pytest
import torch

import evenly
from evenly.nn import BatchNorm, Whiten

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
METHODS = ["newton", "zca", "cholesky", "pca"]


def mixed(*shape):
    x = torch.randn(shape, dtype=torch.float64)
    mix = torch.randn(shape[1], shape[1], dtype=torch.float64) / 3 + torch.eye(shape[1], dtype=torch.float64)
    return torch.einsum("ij,nj...->ni...", mix, x) + 2


@pytest.mark.parametrize("method", METHODS)
def test_training_is_whiten_then_scale_and_shift(method):
    layer = Whiten(6, 3, method, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    x = mixed(20, 6, 4, 3)
    want = evenly.whiten(x, "n (g c) h w -> g c", g=2, method=method)
    want = want * layer.weight.reshape(-1, 1, 1) + layer.bias.reshape(-1, 1, 1)
    torch.testing.assert_close(layer(x), want, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_running_statistics(method):
    """With momentum 1 they are those of the last batch, so that evaluation repeats training (but for n - 1)."""
    layer = Whiten(6, 2, method, momentum=1.0, dtype=torch.float64)
    x = mixed(200, 6, 3)
    y = layer(mixed(50, 6, 3))
    y = layer(x)
    torch.testing.assert_close(layer.running_mean.reshape(-1), x.mean((0, 2)), **CLOSE)
    layer.eval()
    torch.testing.assert_close(layer(x), y, rtol=5e-3, atol=5e-3)
    # Momentum is the weight of the new value, as in torch.
    slow = Whiten(6, 2, method, momentum=0.25, dtype=torch.float64)
    slow(x)
    torch.testing.assert_close(slow.running_mean.reshape(-1), 0.25 * x.mean((0, 2)), **CLOSE)
    eye = torch.eye(2, dtype=torch.float64).expand(3, 2, 2)
    torch.testing.assert_close(slow.running_cov, 0.75 * eye + 0.25 * layer.running_cov, **CLOSE)
    assert slow.num_batches_tracked == 1


def test_groups_of_one_are_batch_norm():
    x = mixed(30, 4, 5)
    ours, theirs = Whiten(4, 1, "zca", dtype=torch.float64), BatchNorm(4, dtype=torch.float64)
    for _ in range(3):
        torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
    torch.testing.assert_close(ours.running_mean.reshape(-1), theirs.running_mean, **CLOSE)
    torch.testing.assert_close(ours.running_cov.reshape(-1), theirs.running_var, rtol=1e-2, atol=1e-2)


def test_bad_settings():
    with pytest.raises(ValueError, match=r"4.*6|6.*4"):
        Whiten(6, 4)
    with pytest.raises(ValueError, match="method"):
        Whiten(6, method="qr")
    with pytest.raises(ValueError, match="eps"):
        Whiten(6, eps=-1.0)
    with pytest.raises(ValueError, match="shrinkage"):
        Whiten(6, shrinkage=2.0)
    with pytest.raises(ValueError, match="iterations"):
        Whiten(6, iterations=0)
    with pytest.raises(ValueError, match="momentum"):
        Whiten(6, momentum=2.0)
    with pytest.raises(ValueError, match="more than 1 value"):
        Whiten(6)(torch.randn(1, 6))
