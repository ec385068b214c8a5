"""Hadamard matrices: what defines them, in whole numbers, for every order there is."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from evenly.stats import hadamard, hadamard_construction, has_hadamard

#: Orders up to 1000 that neither Sylvester nor Paley nor products of these reach (all are multiples of 4).
MISSING = {92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292, 324, 356, 372, 376, 404, 412, 428, 436, 452, 472, 476}
MISSING |= {508, 520, 532, 536, 584, 596, 604, 612, 652, 668, 712, 716, 732, 756, 764, 772, 808, 836, 852, 856, 872}
MISSING |= {876, 892, 904, 932, 940, 944, 952, 956, 964, 980, 988, 996}
SMALL = [n for n in range(1, 201) if (n < 3 or n % 4 == 0) and n not in MISSING]


def check(n):
    h = hadamard(n, normalized=False, dtype=torch.float64).numpy()
    assert h.shape == (n, n)
    assert set(np.unique(h)) <= {-1.0, 1.0}
    assert np.array_equal(h @ h.T, n * np.eye(n))  # exact: whole numbers below 2^53


@pytest.mark.parametrize("start", range(0, 200, 50))
def test_every_order_up_to_200(start):
    for n in SMALL:
        if start < n <= start + 50:
            check(n)


@pytest.mark.parametrize("n", [256, 384, 768, 1024, 1152, 1280, 1408, 1664])
def test_widths_of_vision_transformers(n):
    check(n)


def test_which_orders_there_are():
    for n in range(1, 1001):
        assert has_hadamard(n) == (n < 3 or (n % 4 == 0 and n not in MISSING))


@pytest.mark.parametrize("k", range(8))
def test_sylvester_is_scipys(k):
    assert np.array_equal(hadamard(2**k, normalized=False).numpy(), scipy.linalg.hadamard(2**k))


def test_prime_powers():
    """Fields that are not the whole numbers modulo a prime: GF(9), GF(25), GF(27), GF(49), GF(81), GF(125), GF(343)."""
    for method, n in [
        ("paley-2", 20),
        ("paley-2", 52),
        ("paley-1", 28),
        ("paley-2", 100),
        ("paley-2", 164),
        ("paley-2", 252),
        ("paley-1", 344),
    ]:
        h = hadamard(n, method, normalized=False).numpy()
        assert np.array_equal(h @ h.T, n * np.eye(n)), (method, n)


def test_paley_against_the_definition():
    """Order 12 from the Legendre symbol by Euler's criterion."""
    q = 11
    chi = lambda a: 0 if a % q == 0 else (1 if pow(a % q, (q - 1) // 2, q) == 1 else -1)  # noqa: E731
    want = np.eye(12)
    want[0, 1:], want[1:, 0] = 1, -1
    want[1:, 1:] += [[chi(i - j) for j in range(q)] for i in range(q)]
    assert np.array_equal(hadamard(12, normalized=False).numpy(), want)


def test_constructions():
    for n, words in {
        1: "sylvester(1)",
        12: "paley-1(12)",
        28: "paley-2(28)",
        36: "paley-2(36)",
        52: "paley-2(52)",
        1280: "sylvester(64) ⊗ paley-1(20)",
        1408: "sylvester(32) ⊗ paley-1(44)",
        1664: "sylvester(16) ⊗ paley-1(104)",
    }.items():
        assert hadamard_construction(n) == words


def test_normalized_and_types():
    h = hadamard(20)
    torch.testing.assert_close(h @ h.T, torch.eye(20, dtype=torch.float64), rtol=0, atol=1e-14)
    assert torch.equal(h.abs(), torch.full((20, 20), 20**-0.5, dtype=torch.float64))
    assert hadamard(4, dtype=torch.bfloat16).dtype == torch.bfloat16
    first = hadamard(8, normalized=False)
    first.zero_()
    assert hadamard(8, normalized=False).abs().min() == 1


def test_bad_orders():
    with pytest.raises(ValueError, match="no Hadamard matrix of order 6: it must be 1, 2 or a multiple of 4"):
        hadamard(6)
    with pytest.raises(ValueError, match="no Hadamard matrix of order 92 is built here"):
        hadamard(92)
    with pytest.raises(ValueError, match="no Hadamard matrix of order 92 is built here"):
        hadamard_construction(92)
    with pytest.raises(ValueError, match="method='sylvester' has no Hadamard matrix of order 12"):
        hadamard(12, "sylvester")
    with pytest.raises(ValueError, match="method='williamson' is unknown"):
        hadamard(12, "williamson")
    for n in (0, -4):
        with pytest.raises(ValueError, match=f"n={n}, expected at least 1"):
            has_hadamard(n)
    for n in (4.0, True, "4"):
        with pytest.raises(TypeError, match="expected a whole number"):
            hadamard(n)
