"""Hadamard matrices: orthogonal matrices whose entries all have the same size.

A Hadamard matrix of order n has entries ±1 and orthogonal rows, :math:`HH^T = nI`; divided by :math:`\\sqrt n` it is
a rotation that spreads every axis evenly over all of them. It exists only for n = 1, 2 and multiples of 4 (for which
all is conjectured, not known). What is built here:

==============  =========================================================================================
Sylvester       n a power of two: :math:`H_{2n} = [[H, H], [H, -H]]`
Paley I         n = q + 1, q a prime power, q ≡ 3 mod 4: :math:`H = I + [[0, 1^T], [-1, Q]]`
Paley II        n = 2 (q + 1), q a prime power, q ≡ 1 mod 4: the symmetric conference matrix
                :math:`[[0, 1^T], [1, Q]]` with 0 → [[1, -1], [-1, -1]] and ±1 → ±[[1, 1], [1, -1]]
Kronecker       the product of two of any kind
==============  =========================================================================================

:math:`Q_{ab} = \\chi(a - b)` for the elements a, b of GF(q), where χ is 1 for nonzero squares, -1 for non-squares and
0 for 0. All arithmetic is in whole numbers. Of the orders up to 200 only 92, 116, 156, 172, 184 and 188 are missing
(they need other constructions, such as Williamson's); :func:`has_hadamard` says which.

References:
    R. E. A. C. Paley, *On orthogonal matrices*, Journal of Mathematics and Physics 12, 1933.
    M. Ranzinger et al., *PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation*, ICLR 2025,
    arXiv 2410.01680 (which orders a vision transformer needs).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

__all__ = ["Construction", "hadamard", "hadamard_construction", "has_hadamard"]

Construction = Literal["auto", "sylvester", "paley-1", "paley-2"]
_METHODS = ("auto", "sylvester", "paley-1", "paley-2")
_Factors = tuple[tuple[str, int], ...]


def hadamard(
    n: int, method: Construction = "auto", *, normalized: bool = True, dtype: torch.dtype = torch.float64
) -> Tensor:
    """A Hadamard matrix of order ``n``, shape (n, n), always the same one.

    Args:
        n: the order: 1, 2 or a multiple of 4.
        method: ``"sylvester"``, ``"paley-1"``, ``"paley-2"``; ``"auto"`` takes what there is: Sylvester's for powers
            of two, else the Kronecker product of the largest Sylvester matrix with a Paley matrix (fields of prime
            order before those of prime powers), else a product of two others.
        normalized: entries :math:`\\pm 1/\\sqrt n`, so that :math:`HH^T = I`; else ±1.
        dtype: of the result. It is computed in whole numbers, and divided in float64.

    Raises:
        ValueError: no matrix of this order exists, or none that these constructions reach.
        TypeError: ``n`` is not a whole number.

    >>> hadamard(4, normalized=False, dtype=torch.int8)
    tensor([[ 1,  1,  1,  1],
            [ 1, -1,  1, -1],
            [ 1,  1, -1, -1],
            [ 1, -1, -1,  1]], dtype=torch.int8)
    >>> h = hadamard(12)
    >>> torch.allclose(h @ h.T, torch.eye(12, dtype=h.dtype)), h.abs().unique().numel()
    (True, 1)
    """
    factors = _checked(n, method)
    if factors is None:
        raise ValueError(_missing(n, method))
    matrix = _build(factors)
    if not normalized:
        return torch.from_numpy(matrix.copy()).to(dtype)
    return torch.from_numpy(matrix / np.sqrt(float(n))).to(dtype)


def has_hadamard(n: int) -> bool:
    """Whether :func:`hadamard` builds a matrix of order ``n``.

    >>> [n for n in range(1, 30) if has_hadamard(n)]
    [1, 2, 4, 8, 12, 16, 20, 24, 28]
    """
    return _checked(n, "auto") is not None


def hadamard_construction(n: int) -> str:
    """How :func:`hadamard` builds order ``n``, in words.

    Raises:
        ValueError, TypeError: as :func:`hadamard`.

    >>> hadamard_construction(768), hadamard_construction(1152)
    ('sylvester(64) ⊗ paley-1(12)', 'sylvester(32) ⊗ paley-2(36)')
    """
    factors = _checked(n, "auto")
    if factors is None:
        raise ValueError(_missing(n, "auto"))
    return " ⊗ ".join(f"{kind}({size})" for kind, size in factors)


def _checked(n: int, method: str) -> _Factors | None:
    if isinstance(n, bool) or not isinstance(n, int | np.integer):
        raise TypeError(f"n={n!r} is {type(n).__name__}, expected a whole number.")
    if n < 1:
        raise ValueError(f"n={n}, expected at least 1.")
    if method not in _METHODS:
        raise ValueError(f"method={method!r} is unknown, expected one of {', '.join(map(repr, _METHODS))}.")
    n = int(n)
    if method == "auto":
        return _plan(n)
    if method == "sylvester":
        return (("sylvester", n),) if n & (n - 1) == 0 else None
    return ((method, n),) if _paley_field(method, n) else None


def _missing(n: int, method: str) -> str:
    if n > 2 and n % 4:
        return f"no Hadamard matrix of order {n}: it must be 1, 2 or a multiple of 4."
    if method != "auto":
        return f"method={method!r} has no Hadamard matrix of order {n}; method='auto' looks at every construction."
    return f"no Hadamard matrix of order {n} is built here: neither Sylvester's, nor Paley's, nor a product of these."


@lru_cache(maxsize=4096)
def _plan(n: int) -> _Factors | None:
    """The factors of order ``n``, left to right; None where there is no construction."""
    if n & (n - 1) == 0:
        return (("sylvester", n),)
    if n % 4:
        return None
    twos = (n & -n).bit_length() - 1
    for primes_only in (True, False):
        for i in range(twos, -1, -1):
            rest = n >> i
            for kind in ("paley-1", "paley-2"):
                field = _paley_field(kind, rest)
                if field is not None and (field[1] == 1 or not primes_only):
                    return ((("sylvester", 2**i),) if i else ()) + ((kind, rest),)
    for left in range(12, int(n**0.5) + 1, 4):
        if n % left == 0 and left & (left - 1):
            first, second = _plan(left), _plan(n // left)
            if first and second:
                return first + second
    return None


def _paley_field(kind: str, n: int) -> tuple[int, int] | None:
    """``(p, k)`` of the field GF(p^k) of a Paley matrix of order ``n``, if there is one."""
    if kind == "paley-1":
        q, residue = n - 1, 3
    else:
        q, residue = n // 2 - 1, 1
        if n % 2:
            return None
    return _prime_power(q) if q > 1 and q % 4 == residue else None


def _prime_power(q: int) -> tuple[int, int] | None:
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None


def _build(factors: _Factors) -> np.ndarray:
    out = np.ones((1, 1), dtype=np.int8)
    for kind, size in factors:
        out = np.kron(out, _sylvester(size) if kind == "sylvester" else _paley(kind, size))
    return out


def _sylvester(n: int) -> np.ndarray:
    out = np.ones((1, 1), dtype=np.int8)
    while len(out) < n:
        out = np.block([[out, out], [out, -out]])
    return out


def _paley(kind: str, n: int) -> np.ndarray:
    field = _paley_field(kind, n)
    assert field is not None
    q = field[0] ** field[1]
    out = np.zeros((q + 1, q + 1), dtype=np.int8)
    out[0, 1:] = 1
    out[1:, 0] = -1 if kind == "paley-1" else 1
    out[1:, 1:] = _jacobsthal(*field)
    if kind == "paley-1":
        return out + np.eye(n, dtype=np.int8)
    zero, one = np.array([[1, -1], [-1, -1]], dtype=np.int8), np.array([[1, 1], [1, -1]], dtype=np.int8)
    return np.kron(out == 0, zero) + np.kron(out, one)


def _jacobsthal(p: int, k: int) -> np.ndarray:
    """``Q[a, b] = χ(a - b)`` over GF(p^k); element number i has the digits of i in base p as coefficients."""
    q = p**k
    character = np.full(q, -1, dtype=np.int8)
    character[0] = 0
    character[_squares(p, k)] = 1
    powers = p ** np.arange(k)
    digits = np.arange(q)[:, None] // powers % p
    return character[sum((digits[:, None, i] - digits[None, :, i]) % p * powers[i] for i in range(k))]


def _squares(p: int, k: int) -> np.ndarray:
    """The numbers of the nonzero squares of GF(p^k), p odd."""
    q = p**k
    if k == 1:
        return np.arange(1, q, dtype=np.int64) ** 2 % q
    # The even powers of x modulo a primitive polynomial x^k - (tail), which is found by trying.
    for number in range(1, q):
        tail = [number // p**i % p for i in range(k)]
        element, powers = [1] + [0] * (k - 1), []
        for _ in range(q - 1):
            powers.append(sum(c * p**i for i, c in enumerate(element)))
            top = element[-1]
            element = [(c + top * t) % p for c, t in zip([0, *element[:-1]], tail, strict=True)]
            if powers[-1] == 1 and len(powers) > 1:
                break
        if len(set(powers)) == q - 1:
            return np.array(powers[::2])
    raise AssertionError(f"GF({p}^{k}) has a primitive polynomial")
