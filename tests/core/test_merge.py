"""`merge`: statistics measured apart are those of everything together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evenly.core import Covariance, Moments, covariance, merge, merge_processes, moments, principal_axes


def close(got, want):
    assert type(got) is type(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("measure", [moments, covariance])
@pytest.mark.parametrize("cut", [0, 1, 3, 10, 20])
def test_two_parts_are_the_whole(measure, cut):
    x = torch.randn(20, 6, 5, dtype=torch.float64) * torch.rand(6, 5) + 100
    for pattern, sizes in [("n c t -> c", {}), ("n (g c) t -> g c", {"g": 2})]:
        first, second = (measure(part, pattern, **sizes) for part in (x[:cut], x[cut:]))
        first, second = (
            type(s)(s[0].nan_to_num(), s[1].nan_to_num(), s[2]) for s in (first, second)
        )  # the mean of no values
        close(merge(first, second), measure(x, pattern, **sizes))


def test_against_numpy_far_from_zero():
    x = np.random.default_rng(0).normal(size=(40, 3)) + 1e8
    parts = [covariance(torch.from_numpy(part), "n c -> c") for part in np.split(x, [7, 20, 21])]
    total = parts[0]
    for part in parts[1:]:
        total = merge(total, part)
    shifted = x - 1e8
    np.testing.assert_allclose(total.cov.numpy(), np.cov(shifted.T, bias=True), rtol=0, atol=1e-7)
    assert total.count == 40


def test_bad_arguments():
    x = torch.randn(5, 3)
    with pytest.raises(TypeError, match="two Moments or two Covariances, got Moments and Covariance"):
        merge(moments(x, "n c -> c"), covariance(x, "n c -> c"))
    with pytest.raises(TypeError, match="got tuple and tuple"):
        merge((x, x, x), (x, x, x))
    with pytest.raises(ValueError, match=r"one shape, got \(3, 3\) and \(2, 2\)"):
        merge(covariance(x, "n c -> c"), covariance(x[:, :2], "n c -> c"))
    with pytest.raises(RuntimeError, match="init_process_group first"):
        merge_processes(moments(x, "n c -> c"))
    assert issubclass(Moments, tuple)
    assert issubclass(Covariance, tuple)


def test_principal_axes():
    m = torch.randn(3, 5, 5, dtype=torch.float64)
    cov = m @ m.mT
    values, vectors = principal_axes(cov)
    torch.testing.assert_close(vectors * values[:, None] @ vectors.mT, cov)
    assert (values.diff(dim=-1) <= 0).all()
    assert (vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True)) > 0).all()
    assert principal_axes(torch.empty(0, 0))[0].shape == (0,)
