"""The table of invariances in the layer normalization paper (table 1), rows for batch and layer normalization.

Each row changes the weights or the data of ``norm(x Wᵀ)`` and says whether the output stays the same.
"""

from __future__ import annotations

import pytest
import torch

from evenly.nn import BatchNorm, LayerNorm

SAMPLES, FEATURES, UNITS = 12, 7, 9
DELTA = 3.7


def scale_weights(x, w, vector):
    return x, w * DELTA


def add_vector_to_every_row(x, w, vector):
    return x, w + vector


def scale_one_unit(x, w, vector):
    return x, w * torch.where(torch.arange(UNITS) == 4, DELTA, 1.0).double()[:, None]


def scale_data(x, w, vector):
    return x * DELTA, w


def shift_data(x, w, vector):
    return x + vector, w


def scale_one_sample(x, w, vector):
    return x * torch.where(torch.arange(SAMPLES) == 2, DELTA, 1.0).double()[:, None], w


TABLE = [
    (scale_weights, True, True),
    (add_vector_to_every_row, False, True),
    (scale_one_unit, True, False),
    (scale_data, True, True),
    (shift_data, True, False),
    (scale_one_sample, False, True),
]


@pytest.mark.parametrize(("change", "batch", "layer"), TABLE, ids=[row[0].__name__ for row in TABLE])
def test_table_of_invariances(change, batch, layer):
    x, w = torch.randn(SAMPLES, FEATURES).double(), torch.randn(UNITS, FEATURES).double()
    changed_x, changed_w = change(x, w, torch.randn(FEATURES).double())
    for norm, holds in ((BatchNorm(UNITS, eps=0.0), batch), (LayerNorm(UNITS, eps=0.0), layer)):
        norm.double()
        difference = (norm(changed_x @ changed_w.T) - norm(x @ w.T)).abs().max()
        if holds:
            assert difference < 1e-11
        else:
            assert difference > 1e-2


@pytest.mark.parametrize("make", [BatchNorm, LayerNorm])
def test_a_negative_factor_turns_the_sign(make):
    norm = make(UNITS, eps=0.0).double()
    a = torch.randn(SAMPLES, UNITS).double()
    torch.testing.assert_close(norm(-2.5 * a + 4.0), -norm(a), rtol=0, atol=1e-11)


@pytest.mark.parametrize("make", [BatchNorm, LayerNorm])
def test_the_gradient_shrinks_as_the_weights_grow(make):
    # norm((aW)u) = norm(Wu), therefore the gradient at aW is 1/a of that at W.
    norm = make(UNITS, eps=0.0).double()
    x, target = torch.randn(SAMPLES, FEATURES).double(), torch.randn(SAMPLES, UNITS).double()
    w = torch.randn(UNITS, FEATURES).double()

    def gradient(weight):
        weight = weight.clone().requires_grad_()
        (norm(x @ weight.T) * target).sum().backward()
        return weight.grad

    torch.testing.assert_close(gradient(DELTA * w), gradient(w) / DELTA, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("make", [BatchNorm, LayerNorm])
def test_the_gradient_is_orthogonal_to_ones_and_to_the_output(make):
    norm = make(UNITS, eps=0.0).double()
    axis = 0 if make is BatchNorm else -1
    x = torch.randn(SAMPLES, UNITS).double().requires_grad_()
    y = norm(x)
    (gradient,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), x)
    assert gradient.abs().max() > 1e-2
    assert gradient.sum(axis).abs().max() < 1e-12
    assert (gradient * y.detach()).sum(axis).abs().max() < 1e-11
