"""The reference for the tests of ``evenly.core``: numpy, float64 results, extended precision inside.

Written from the definition, not from the library: every value of ``x`` gets the number of its group, and each
group is then measured and normalized on its own, as a plain vector.

    y = activation((x - mean) / s * weight + bias + residual)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# Extended precision where the machine has it; float64 elsewhere.
WIDE = np.longdouble

EPS = {"std": 1e-5, "rms": 1e-5, "l2": 1e-12, "l1": 1e-12, "max": 1e-12, None: 0.0}


def _tokens(side: str, ndim: int | None = None) -> list[list[str]]:
    """'n (g c) 1 ...' -> [['n'], ['g', 'c'], [], ['...0'], ...]; an anonymous number gets a name of its own."""
    side = side.replace("(", " ( ").replace(")", " ) ")
    dims: list[list[str]] = []
    inside: list[str] | None = None
    for i, word in enumerate(side.split()):
        if word == "(":
            inside = []
        elif word == ")":
            dims.append(inside)
            inside = None
        else:
            names = [] if word == "1" else [f"{word}#{i}" if word.isdecimal() else word]
            if inside is None:
                dims.append(names)
            else:
                inside.extend(names)
    if ndim is not None and ["..."] in dims:
        at, extra = dims.index(["..."]), ndim - (len(dims) - 1)
        dims[at : at + 1] = [[f"...{k}"] for k in range(extra)]
    return dims


@dataclass
class Layout:
    """Where each value of ``x`` belongs."""

    names: list[str]  # elementary axes, in the order of the left side
    sizes: dict[str, int]
    right: list[list[str]]
    shape: tuple[int, ...]

    def index(self, names: list[str]) -> np.ndarray:
        """The row-major number of each value of ``x`` along the axes ``names`` (shape of ``x``)."""
        elementary = [self.sizes[n] for n in self.names]
        place = dict(zip(self.names, np.indices(elementary), strict=True))
        number = np.zeros(elementary, dtype=np.int64)
        for n in names:
            number = number * self.sizes[n] + place[n]
        return number.reshape(self.shape)

    @property
    def kept(self) -> list[str]:
        return [n for dim in self.right for n in dim]

    @property
    def right_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes[n] for n in dim) for dim in self.right)


def layout(pattern: str, shape: tuple[int, ...], **given: int) -> Layout:
    left_text, right_text = pattern.split("->")
    left = _tokens(left_text, len(shape))
    assert len(left) == len(shape), (pattern, shape)
    sizes: dict[str, int] = {}
    for names, length in zip(left, shape, strict=True):
        unknown = []
        known = 1
        for n in names:
            size = int(n.split("#")[0]) if "#" in n else given.get(n)
            if size is None:
                unknown.append(n)
            else:
                sizes[n] = size
                known *= size
        if unknown:
            (name,) = unknown
            sizes[name] = length // known
            known *= sizes[name]
        assert known == length, (pattern, shape, given)
    flat = [n for dim in left for n in dim]
    spread = [n for n in flat if n.startswith("...")]
    right: list[list[str]] = []
    for dim in _tokens(right_text):
        if dim == ["..."]:
            right.extend([n] for n in spread)
        else:
            right.append([m for n in dim for m in (spread if n == "..." else [n])])
    return Layout(flat, sizes, right, tuple(shape))


@dataclass
class Groups:
    number: np.ndarray  # group of each value of x
    shape: tuple[int, ...]  # shape of a statistic
    layout: Layout

    def __iter__(self):
        flat = self.number.ravel()
        order = np.argsort(flat, kind="stable")
        count = math.prod(self.shape)
        starts = np.searchsorted(flat[order], np.arange(count + 1))
        for g in range(count):
            yield g, order[starts[g] : starts[g + 1]]


def groups(pattern: str, shape, *, by=None, num_groups: int | None = None, **sizes: int) -> Groups:
    lay = layout(pattern, tuple(shape), **sizes)
    number = lay.index(lay.kept)
    stat_shape = lay.right_shape
    if by is not None:
        by = np.asarray(by)
        if num_groups is None:
            distinct = np.unique(by)
            by = np.searchsorted(distinct, by)
            num_groups = len(distinct)
        label = by.reshape((-1,) + (1,) * (len(shape) - 1))
        number = number + label * math.prod(stat_shape)
        stat_shape = (num_groups, *stat_shape)
    return Groups(number, stat_shape, lay)


def moments(x, pattern: str, *, by=None, mask=None, correction=0, num_groups=None, **sizes):
    """(mean, var, count), each of the shape of the right-hand side (after the axis of the labels)."""
    x = np.asarray(x)
    part = groups(pattern, x.shape, by=by, num_groups=num_groups, **sizes)
    values = x.astype(WIDE).ravel()
    keep = _mask(mask, x.shape).ravel()
    total = math.prod(part.shape)
    mean, var, count = np.full(total, np.nan, WIDE), np.full(total, np.nan, WIDE), np.zeros(total)
    with np.errstate(all="ignore"):
        for g, members in part:
            v = values[members[keep[members]]]
            count[g] = len(v)
            if len(v):
                mean[g] = v.sum() / len(v)
                if len(v) > correction:
                    var[g] = ((v - mean[g]) ** 2).sum() / (len(v) - correction)
    out = (mean.reshape(part.shape), var.reshape(part.shape), count.reshape(part.shape))
    return tuple(a.astype(np.float64) for a in out)


def normalize(
    x,
    pattern: str,
    *,
    by=None,
    center=True,
    scale="std",
    eps=None,
    correction=0,
    weight=None,
    bias=None,
    affine=None,
    residual=None,
    activation=None,
    mask=None,
    stats=None,
    num_groups=None,
    **sizes,
):
    x = np.asarray(x)
    eps = EPS[scale] if eps is None else eps
    part = groups(pattern, x.shape, by=by, num_groups=num_groups, **sizes)
    values = x.astype(WIDE).ravel()
    keep = _mask(mask, x.shape).ravel()
    y = np.zeros(values.shape, WIDE)
    with np.errstate(all="ignore"):
        for g, members in part:
            members = members[keep[members]]
            v = values[members]
            if not len(v):
                continue
            if stats is None:
                mean = v.sum() / len(v)
                var = ((v - mean) ** 2).sum() / WIDE(len(v) - correction)
            else:
                mean, var = (WIDE(np.asarray(s).ravel()[g]) for s in stats)
            u = v - mean if center else v
            y[members] = u / _size(u, var, scale, eps, mean=0 if center else mean, given=stats is not None)
        y = y.reshape(x.shape)
        if weight is not None:
            y = y * _spread(weight, part.layout, affine)
        if bias is not None:
            y = y + _spread(bias, part.layout, affine)
        if residual is not None:
            y = y + np.broadcast_to(np.asarray(residual).astype(WIDE), x.shape)
        y = _activate(y, activation)
    return np.where(keep.reshape(x.shape), y, 0).astype(np.float64)


def whiten(x, pattern: str, *, by=None, method="zca", eps=1e-5, shrinkage=0.0, mask=None, num_groups=None, **sizes):
    """Centre each group, then multiply by a square root of the inverse of its covariance + eps.

    The last axis on the right is the feature axis; what else is on the right keeps a covariance of its own.
    ``shrinkage`` a: (1 - a) C + a tr(C)/d I. One value of the mask for all features of a sample is assumed.
    """
    x = np.asarray(x)
    lay = layout(pattern, x.shape, **sizes)
    *others, feature = lay.kept
    d = lay.sizes[feature]
    number = lay.index(others)
    if by is not None:
        by = np.asarray(by)
        label = by if num_groups is not None else np.searchsorted(np.unique(by), by)
        cells = math.prod(lay.sizes[n] for n in others)
        number = number + label.reshape((-1,) + (1,) * (x.ndim - 1)) * cells
    column = lay.index([feature]).ravel()
    sample = lay.index([n for n in lay.names if n != feature]).ravel()
    keep = _mask(mask, x.shape).ravel()
    values, number = x.astype(np.float64).ravel(), number.ravel()
    y = np.zeros(values.shape)
    for g in np.unique(number):
        at = np.flatnonzero((number == g) & keep)
        if not len(at):
            continue
        at = at[np.lexsort((column[at], sample[at]))].reshape(-1, d)
        v = values[at]
        u = v - v.mean(0)
        c = u.T @ u / len(u)
        c = (1 - shrinkage) * c + shrinkage * np.trace(c) / d * np.eye(d) + eps * np.eye(d)
        if method in ("zca", "newton"):
            lam, q = np.linalg.eigh(c)
            w = q @ np.diag(lam**-0.5) @ q.T
        elif method == "cholesky":
            w = np.linalg.inv(np.linalg.cholesky(c))
        else:
            raise ValueError(f"{method}: not unique, test its properties")
        y[at] = u @ w.T
    return y.reshape(x.shape)


def _mask(mask, shape) -> np.ndarray:
    return np.ones(shape, bool) if mask is None else np.broadcast_to(np.asarray(mask), shape)


def _size(u, var, scale, eps, *, mean=0, given=False):
    if scale is None:
        return WIDE(1)
    if scale == "std":
        return np.sqrt(var + WIDE(eps))
    if scale == "rms":
        return np.sqrt((var + mean**2 if given else (u**2).mean()) + WIDE(eps))
    assert not given, "only a mean and a variance can be given"
    norm = {"l2": lambda: np.sqrt((u**2).sum()), "l1": lambda: abs(u).sum(), "max": lambda: abs(u).max()}[scale]()
    return norm if np.isnan(norm) else max(norm, WIDE(eps))


def _spread(w, lay: Layout, affine: str | None):
    """A weight on the axes ``affine`` (None: see the contract), one value for each value of x."""
    w = np.asarray(w).astype(WIDE)
    if w.ndim == 0:
        return w
    if affine is None:
        kept = lay.kept
        if any(n.startswith("...") for n in kept):
            names = [n for n in lay.names if n not in kept]
        else:
            (names,) = [kept]
            assert len(kept) == 1, "affine= needed"
    else:
        names = [n for dim in _tokens(affine) for n in dim]
    return w.ravel()[lay.index(names)]


def _activate(y, name):
    if name is None:
        return y
    if name == "relu":
        return np.where(y < 0, 0, y)
    if name == "silu":
        return y / (1 + np.exp(-y))
    if name == "gelu":
        # Normal distribution function by erfc, which keeps its digits in the left tail.
        phi = np.array([0.5 * math.erfc(-float(v) / math.sqrt(2)) for v in y.ravel()]).reshape(y.shape)
        return y * phi
    raise ValueError(name)
