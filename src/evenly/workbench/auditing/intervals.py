"""Intervals and tests of an audit: Wilson, differences and ratios of two groups, the bootstrap, Holm.

With k successes of n, p = k / n and z the normal quantile of the confidence, Wilson's interval (1927) is ::

    (p + z²/2n ± z sqrt(p (1 - p) / n + z²/4n²)) / (1 + z²/n)

It stays inside [0, 1] and is sensible for k = 0, k = n and small n. What is put together of independent estimates
takes its interval from theirs ("square and add", Newcombe 1998, Statistics in
Medicine 17:873; Zou and Donner 2008, doi:10.1002/sim.3095). For d = Σ w_i p_i with intervals (l_i, u_i)::

    low = d - sqrt(Σ (w_i p_i - min(w_i l_i, w_i u_i))²)      high = d + sqrt(Σ (max(w_i l_i, w_i u_i) - w_i p_i)²)

and for a ratio p_1 / p_2 the like (Donner and Zou 2012, doi:10.1177/0962280210383082). Everything else is resampled:
rows are drawn with replacement within each group, so that every group keeps its size, and the interval is that of
percentiles (:func:`bootstrap_sums`). The expected calibration error is a mean of absolute values, too large already,
and larger when resampled; its interval is mirrored (:func:`pivotal`), so that the two do not add up.

Holm (1979): the ordered p-values p_(1) <= ... <= p_(m) become ``max over j <= i of min(1, (m - j + 1) p_(j))``. At a
level a, the chance of one false flag or more among all m is at most a, however the tests depend on one another.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

__all__ = [
    "bootstrap_sums",
    "combine",
    "difference",
    "exact_test",
    "holm",
    "percentile",
    "pivotal",
    "ratio",
    "welch",
    "wilson",
]

Array = np.ndarray[Any, Any]

UNDEFINED = 0.05
"""No interval is given where a measure is undefined in more than this share of the resamples."""

_CHUNK = 1 << 20


def wilson(successes: Any, count: Any, confidence: float = 0.95) -> tuple[Array, Array]:
    """Wilson's interval of a proportion, elementwise; NaN where ``count`` is 0.

    Args:
        successes: k, 0 <= k <= count.
        count: n.
        confidence: of the two-sided interval.

    >>> low, high = wilson(8, 10)
    >>> print(f"{low:.3f} {high:.3f}")
    0.490 0.943
    """
    from scipy.special import ndtri

    k, n = np.asarray(successes, float), np.asarray(count, float)
    z2 = float(ndtri(0.5 + confidence / 2)) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        p = k / n
        middle, half = p + z2 / (2 * n), np.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n)))
        low, high = (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)
    # The ends are exactly 0 and 1 there; rounding would leave 1e-17.
    return np.where((k == 0) & (n > 0), 0.0, low), np.where((k == n) & (n > 0), 1.0, high)


def combine(values: Array, low: Array, high: Array, weights: Array) -> tuple[Array, Array]:
    """The interval of a weighted sum of independent estimates, summed over the last axis.

    >>> low, high = combine(np.array([0.8, 0.6]), np.array([0.7, 0.5]), np.array([0.9, 0.7]), np.array([0.5, 0.5]))
    >>> print(f"{low:.3f} {high:.3f}")
    0.629 0.771
    """
    ends = np.stack([weights * low, weights * high])
    middle, total = weights * values, (weights * values).sum(-1)
    below, above = ((middle - ends.min(0)) ** 2).sum(-1), ((ends.max(0) - middle) ** 2).sum(-1)
    return total - np.sqrt(below), total + np.sqrt(above)


def difference(first: tuple[float, float, float], second: tuple[float, float, float]) -> tuple[float, float, float]:
    """Two independent estimates, each (value, low, high), subtracted: value, low, high.

    >>> print("{:.2f} {:.2f} {:.2f}".format(*difference((0.8, 0.7, 0.9), (0.5, 0.4, 0.6))))
    0.30 0.16 0.44
    """
    p, low, high = (np.array(pair) for pair in zip(first, second, strict=True))
    ends = combine(p, low, high, np.array([1.0, -1.0]))
    return float(p[0] - p[1]), float(ends[0]), float(ends[1])


def ratio(first: tuple[float, float, float], second: tuple[float, float, float]) -> tuple[float, float, float]:
    """Two independent estimates of positive numbers, each (value, low, high), divided: value, low, high.

    The ratio is NaN where the second value is 0; the upper end is infinite where the second may be 0.

    >>> print("{:.2f} {:.2f} {:.2f}".format(*ratio((0.4, 0.3, 0.5), (0.8, 0.7, 0.9))))
    0.50 0.37 0.65
    """
    (p, l1, u1), (q, l2, u2) = first, second
    if not q > 0 or any(v != v for v in (*first, *second)):
        return (np.nan,) * 3
    product = p * q
    lower = u2 * (2 * q - u2)
    if abs(lower) < 1e-12:  # the limit of the quotient below
        low = l1 * (2 * p - l1) / (2 * product) if product else 0.0
    else:
        low = (product - np.sqrt(max(0.0, product**2 - l1 * (2 * p - l1) * lower))) / lower
    upper = l2 * (2 * q - l2)
    high = (product + np.sqrt(max(0.0, product**2 - u1 * (2 * p - u1) * upper))) / upper if upper > 1e-12 else np.inf
    return p / q, float(low), float(high)


def bootstrap_sums(terms: Array, resamples: int, seed: int, label: str) -> Array:
    """Sums over the rows of a group, resampled.

    Args:
        terms: (n, r), the terms of each row.
        resamples: how many, B.
        seed, label: each group has random numbers of its own, which depend on these two alone.

    Returns:
        (B, r): sums over n rows drawn with replacement. Costs O(B n r) operations and bounded memory.

    >>> sums = bootstrap_sums(np.arange(100.0)[:, None], 200, 0, "a")
    >>> sums.shape, bool(abs(sums.mean() - 4950) < 100)
    ((200, 1), True)
    """
    n, r = terms.shape
    out = np.zeros((resamples, r))
    if n == 0 or r == 0:
        return out
    rng = np.random.default_rng([seed, zlib.crc32(label.encode())])
    step = max(1, _CHUNK // n)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(0, n, size=(rows, n), dtype=np.int64)
        drawn += n * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        with np.errstate(invalid="ignore"):  # a term may be infinite: 0 times it is undefined
            out[start : start + rows] = counts.astype(float) @ terms
    return out


def percentile(samples: Array, confidence: float) -> tuple[float, float]:
    """The percentile interval of resampled values; NaN where too many of them are undefined (:data:`UNDEFINED`).

    >>> low, high = percentile(np.arange(101.0), 0.9)
    >>> print(f"{low:.1f} {high:.1f}")
    5.0 95.0
    """
    defined = samples[np.isfinite(samples)]
    if not len(samples) or len(defined) < (1 - UNDEFINED) * len(samples):
        return np.nan, np.nan
    low, high = np.quantile(defined, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def pivotal(value: float, samples: Array, confidence: float, least: float = -np.inf) -> tuple[float, float]:
    """The percentile interval mirrored at the estimate: for a measure that resampling makes larger, as it already is.

    Args:
        value: the estimate.
        samples: its resampled values.
        confidence: of the interval.
        least: what the measure cannot be below; the ends are not either.

    >>> pivotal(30.0, np.arange(101.0), 0.9, least=0.0)
    (0.0, 55.0)
    """
    low, high = percentile(samples, confidence)
    return max(least, 2 * value - high), max(least, 2 * value - low)


def exact_test(k: int, n: int, k_rest: int, n_rest: int) -> float:
    """Fisher's exact test that two proportions are the same, two-sided; NaN where one of them has no rows.

    >>> print(f"{exact_test(1, 10, 9, 12):.4f}")
    0.0037
    """
    if not n or not n_rest:
        return np.nan
    from scipy.stats import fisher_exact

    return float(fisher_exact([[k, n - k], [k_rest, n_rest - k_rest]]).pvalue)


def welch(mean: float, var: float, n: float, mean_rest: float, var_rest: float, n_rest: float) -> float:
    """Welch's test that two means are the same, two-sided, of means and biased variances; NaN where it is undefined.

    >>> print(f"{welch(1.0, 4.0, 100, 2.0, 4.0, 100):.4f}")
    0.0005
    """
    if n < 2 or n_rest < 2 or not np.isfinite([mean, var, mean_rest, var_rest]).all():
        return np.nan
    a, b = var / (n - 1), var_rest / (n_rest - 1)
    if a + b == 0:
        return 1.0 if mean == mean_rest else np.nan
    from scipy.stats import t

    df = (a + b) ** 2 / (a * a / (n - 1) + b * b / (n_rest - 1))
    return float(2 * t.sf(abs(mean - mean_rest) / np.sqrt(a + b), df))


def holm(p: Any) -> Array:
    """Holm's adjusted p-values; NaN stays NaN and does not count as a test.

    >>> holm([0.01, 0.04, 0.03, float("nan")])
    array([0.03, 0.06, 0.06,  nan])
    """
    p = np.asarray(p, float)
    out = np.full(p.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    out[order] = np.minimum(1.0, np.maximum.accumulate(factors * p[order])) if len(order) else []
    return out
