"""The CPU kernels: every loop against float64, ill-conditioned input against PyTorch, threads, forks, sanitizers."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import evenly
from evenly.core import kernels, recompute
from evenly.core.kernels import cpu, operator, reference
from evenly.core.kernels.lowering import block, dense_order, weight_index
from evenly.core.patterns import bind

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"CPU kernels {cpu.why_not()}")

SOURCES = Path(cpu.__file__).parent
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Case:
    pattern: str
    shape: tuple[int, ...]
    affine: str
    last: bool = False  # channels-last memory


# Each reaches a loop of its own: rows shorter than a register, of one block, of many; one statistic for all; runs of
# 49; weights by segment, by period, by column; short runs; rows that are widened with a part left over.
CASES = [
    Case("n d -> n", (300, 5), "d"),
    Case("n d -> n", (7, 1031), "d"),
    Case("n d -> n", (3, 9001), "d"),
    Case("n d -> n", (2, 40009), "n"),
    Case("n d -> ", (11, 10007), "d"),
    Case("n c l -> c", (5, 7, 49), "c"),
    Case("n c l -> c", (2, 3, 20011), "c"),
    Case("n c l -> c", (33, 6, 4), "c"),
    Case("n c -> c", (4099, 37), "c"),
    Case("n c -> c", (77, 3), "c"),
    Case("n c -> c", (300, 1000), "c"),
    Case("n c l -> n c", (3, 5, 131), "c"),
    Case("n g c l -> n g", (4, 3, 5, 49), "g c"),
    Case("n g c l -> n g", (40, 2, 3, 16), "g c"),
    Case("n c h w -> c", (3, 10, 9, 7), "c", True),
    Case("n c h w -> n c", (5, 6, 9, 7), "c", True),
    Case("n c h w -> n", (5, 6, 9, 7), "c", True),
    Case("n c h w -> n", (5, 6, 9, 7), "c"),
    Case("n c h w -> n", (5, 6, 9, 7), "c h w"),
    Case("n d -> n d", (6, 5), "d"),
    Case("n d -> d", (1, 9), "d"),
    # many short runs at a time: a weight each, weights that start over within a batch, several batches, two rows of
    # them, rows that are added up, several segments a run and more than a table holds, long ones
    Case("n d -> n", (77, 49), "n"),
    Case("n c l -> n c", (70, 5, 49), "c"),
    Case("n c l -> n c", (3, 500, 49), "c"),
    Case("n c l -> c", (2, 70, 49), "c"),
    Case("n c l -> c", (2, 32, 49), "c"),
    Case("n c l -> c", (2, 3, 7001), "c"),
    Case("n c l -> c", (2, 40, 12), "c"),
    Case("n c l -> c", (64, 16, 64), "c"),
    Case("b n c l -> b c", (3, 5, 40, 49), "c"),
    Case("b n c l -> b c", (3, 2, 40, 49), "c"),
    Case("n g c l -> n g", (3, 2, 40, 17), "g c"),
    Case("n g c l -> n g", (64, 8, 2, 64), "g c"),
    Case("n c l -> n", (3, 2, 20011), "c"),
    # weights along the run: rows together, periods, runs that start at different places of one, several rows
    Case("n d -> n", (203, 96), "d"),
    Case("n m d -> n", (13, 6, 33), "d"),
    Case("n m d -> n m", (5, 4, 48), "m d"),
    Case("n m d -> m", (7, 5, 64), "d"),
    # columns: several parts, a statistic of two columns, rows side by side
    Case("n h c -> n c", (2, 300, 200), "c"),
    Case("n h g c -> n g", (30, 64, 8, 2), "g c"),
    Case("b n c -> b c", (2, 49, 700), "c"),
    Case("b h g c -> b g", (2, 49, 32, 16), "g c"),
    Case("h g c -> g", (40, 30, 5), "g c"),
    Case("h g c -> g", (40, 30, 5), "g"),
    Case("n c l -> c", (20, 40, 9), "c"),
    Case("n c l -> c", (6, 512, 4), "c"),
    Case("n c l -> c", (16, 300, 16), "c"),
    # runs as one stream of vectors: shorter than two vectors, weights that start over, several pieces a statistic
    Case("n c l -> n c", (3, 90, 17), "c"),
    Case("n c l -> n c", (700, 2, 33), "c"),
    Case("n g c l -> n g", (2, 32, 16, 49), "g c"),
    Case("n g c l -> n g", (70, 4, 3, 20), "g c"),
    Case("n g c l -> n g", (11, 5, 7, 36), "g c"),
    Case("n g c l -> n g", (9, 2, 40, 50), "g c"),
]


def formula(
    x: Tensor,
    case: Case,
    w: Tensor,
    b: Tensor,
    r: Tensor | None,
    how: dict[str, object],
    act: str | None,
    stats: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """From the definition, in the dtype of its arguments (float64)."""
    left = case.pattern.split("->")[0].split()
    kept = case.pattern.split("->")[1].split()
    dims = [i for i, name in enumerate(left) if name not in kept]
    n = 1
    for i in dims:
        n *= x.shape[i]
    keep = [1 if i in dims else size for i, size in enumerate(x.shape)]
    mean = stats[0].reshape(keep) if stats else x.mean(dims, keepdim=True) if dims else x
    u = x - mean
    correction = how.get("correction", 0)
    var = u.square().sum(dims, keepdim=True) / (n - correction) if dims else u.square()
    var = stats[1].reshape(keep) if stats else var
    v = u if how.get("center", True) else x
    scale = how.get("scale", "std")
    if scale == "std":
        v = v / (var + 1e-5).sqrt()
    elif scale == "rms":
        v = v / (v.square().sum(dims, keepdim=True) / n + 1e-5).sqrt() if dims else v / (v.square() + 1e-5).sqrt()
    elif scale == "l2":
        v = v / (v.square().sum(dims, keepdim=True).sqrt() if dims else v.abs()).clamp(min=1e-12)
    axes = case.affine.split()
    shape = [size if name in axes else 1 for name, size in zip(left, x.shape, strict=True)]
    v = v * w.reshape(shape) + b.reshape(shape)
    if r is not None:
        v = v + r
    return v if act is None else getattr(F, act)(v)


HOW = [{}, {"correction": 1}, {"center": False}, {"center": False, "scale": "rms"}, {"center": False, "scale": "l2"},
       {"scale": "l2"}, {"scale": None}, {"scale": "rms"}]  # fmt: skip


def leaves(case: Case, dtype: torch.dtype, seed: int, offset: int, residual: bool) -> list[Tensor]:
    """x, weight, bias, residual and the gradient of the output, starting ``offset`` elements into their storage."""
    generator = torch.Generator().manual_seed(seed)

    def one(shape: tuple[int, ...], last: bool = False) -> Tensor:
        count = 1
        for size in shape:
            count *= size
        flat = torch.randn(count + offset, generator=generator, dtype=torch.float64).to(dtype)[offset:]
        if last:
            n, c, h, w = shape
            return flat.reshape(n, h, w, c).permute(0, 3, 1, 2)
        return flat.reshape(shape)

    left = case.pattern.split("->")[0].split()
    width = tuple(case.shape[left.index(name)] for name in case.affine.split())
    x = one(case.shape, case.last) * 2 + 1
    return [x, one(width), one(width), one(case.shape, case.last) if residual else None, one(case.shape, case.last)]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    case=st.sampled_from(CASES),
    dtype=st.sampled_from(DTYPES),
    how=st.sampled_from(HOW),
    act=st.sampled_from([None, "relu", "silu", "gelu"]),
    residual=st.booleans(),
    given_stats=st.booleans(),
    threads=st.sampled_from([1, 1, 2, 3, 16]),
    far=st.booleans(),
    offset=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_against_float64(case, dtype, how, act, residual, given_stats, threads, far, offset, seed):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with past_the_caches(far):
            check_against_float64(case, dtype, how, act, residual, given_stats, offset, seed)
    finally:
        torch.set_num_threads(before)


@contextmanager
def past_the_caches(far: bool) -> Iterator[None]:
    """Let the kernels write past the caches whatever the size, or as they do."""
    before = cpu.extension().set_far(0 if far else 16 << 20)
    try:
        yield
    finally:
        cpu.extension().set_far(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_written_past_the_caches_as_through_them(case, dtype):
    """The same bits; the compiler may round an activation in one loop as it does not in another."""
    for act in (None, "relu", "silu"):
        for residual in (False, True):
            for offset in (0, 3):
                x, w, b, r, dy = leaves(case, dtype, 0, offset, residual)
                leaf = [t.detach().requires_grad_() for t in (x, w, b, r) if t is not None]
                runs = []
                for far in (False, True):
                    with past_the_caches(far):
                        y = evenly.normalize(
                            leaf[0], case.pattern, weight=leaf[1], bias=leaf[2], affine=case.affine,
                            residual=leaf[3] if residual else None, activation=act,
                        )  # fmt: skip
                        runs.append((y.detach(), *torch.autograd.grad(y, leaf, dy)))
                for one, other in zip(*runs, strict=True):
                    if act == "silu":
                        torch.testing.assert_close(
                            other, one, rtol=0, atol=4 * torch.finfo(dtype).eps * float(one.abs().max())
                        )
                    else:
                        assert torch.equal(other, one), (act, residual, offset)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_large_tensors_are_written_past_the_caches(act, last):
    """The size that decides; the same bits on both sides of it."""
    torch.manual_seed(0)
    x, r = (torch.randn(8, 256, 28, 28).requires_grad_() for _ in range(2))
    if last:
        x, r = (t.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, r))
    w = torch.rand(256, requires_grad=True)
    runs = []
    for far in (16 << 20, 1 << 60):
        before = cpu.extension().set_far(far)
        try:
            y = evenly.normalize(x, "n c h w -> c", weight=w, residual=r, activation=act)
            runs.append((y.detach(), *torch.autograd.grad(y, (x, r, w), x.detach())))
        finally:
            cpu.extension().set_far(before)
    assert before == 16 << 20
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def check_against_float64(case, dtype, how, act, residual, given_stats, offset, seed):
    if case.pattern in ("n d -> n d", "n d -> d") and (how.get("correction") or how.get("scale") == "l2"):
        how = {}
    if case.shape[0] == 1 and not how.get("center", True):
        how = {}
    x, w, b, r, dy = leaves(case, dtype, seed, offset, residual)
    stats = None
    if given_stats:
        how = {}
        stats = tuple(s.double() + 0.5 for s in evenly.moments(x, case.pattern)[:2])
    inputs = [t.requires_grad_() for t in (x.detach(), w.detach(), b.detach())]
    if r is not None:
        inputs.append(r.detach().requires_grad_())
    y = evenly.normalize(
        inputs[0],
        case.pattern,
        weight=inputs[1],
        bias=inputs[2],
        affine=case.affine,
        residual=inputs[3] if residual else None,
        activation=act,
        stats=None if stats is None else tuple(s.to(reference.accumulate_dtype(dtype)) for s in stats),
        **how,
    )
    order = dense_order(x)
    plan = bind(case.pattern, x.shape)
    groups = reference_groups(case, plan)
    if block(plan, order) is not None and weight_index(plan, order, groups) is not None:
        assert type(y.grad_fn).__name__ == "NormalizeBackward"
    got = torch.autograd.grad(y, inputs, dy)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    want = formula(*wide[:1], case, wide[1], wide[2], wide[3] if residual else None, how, act, stats)
    wanted = torch.autograd.grad(want, wide, dy.double())
    tolerance = TOLERANCE[dtype]
    assert y.dtype == dtype
    assert y.stride() == x.stride() or not x.is_contiguous()
    for name, a, e in [("y", y, want), *zip(("dx", "dw", "db", "dr"), got, wanted, strict=False)]:
        assert a.shape == e.shape
        # Relative to what goes into the sum: parameters' gradients and dx may cancel.
        size = e.abs().max() if name in ("y", "dr") else torch.maximum(e.abs().max(), dy.abs().max().double())
        slack = 40 if name in ("dw", "db") else 4
        error = (a.double() - e).abs().max()
        assert error <= slack * tolerance * (size + 1e-6), (name, float(error), float(size))


NORMS = [{"scale": s, "center": c} for s in ("l1", "max", "l2") for c in (True, False)]


@contextmanager
def reference_alone() -> Iterator[None]:
    """Let PyTorch operators compute everything."""
    registered = kernels._backends[:]
    measured = operator.measure
    kernels._backends.clear()
    operator._quick.clear()
    operator.measure = lambda *a: None
    try:
        yield
    finally:
        operator.measure = measured
        kernels._backends.extend(registered)
        operator._quick.clear()


def by_reference(x: Tensor, pattern: str, how: dict[str, object]) -> tuple[Tensor, evenly.Moments | None]:
    """What the PyTorch reference computes of the same call."""
    with reference_alone():
        out = evenly.normalize(x, pattern, **how)
    return out if isinstance(out, tuple) else (out, None)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    case=st.sampled_from([c for c in CASES if c.pattern not in ("n d -> n d", "n d -> d")]),
    dtype=st.sampled_from(DTYPES),
    how=st.sampled_from(HOW + NORMS),
    act=st.sampled_from([None, "relu", "silu", "gelu"]),
    residual=st.booleans(),
    carried=st.lists(st.booleans(), min_size=4, max_size=4),
    share=st.sampled_from([None, 0.0, 0.3, 0.9]),
    behind=st.sampled_from([float("nan"), float("inf"), 3.0]),
    want_stats=st.booleans(),
    offset=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_masks_and_norms_against_float64(
    case, dtype, how, act, residual, carried, share, behind, want_stats, offset, seed
):
    """Forward, statistics and gradients as the reference in float64, whatever stands behind the mask."""
    x, w, b, r, dy = leaves(case, dtype, seed, offset, residual)
    mask = None
    if share is not None:
        shape = [n if c else 1 for n, c in zip(case.shape, carried, strict=False)]
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
        x = torch.where(mask, x, torch.full_like(x, behind)) if x.is_contiguous() else x.masked_fill(~mask, behind)
    count = bind(case.pattern, x.shape).count if mask is None else evenly.moments(x, case.pattern, mask=mask).count
    few = not isinstance(count, int) and bool((count == 1).any())
    if few and how.get("center", True):  # x - mean is rounding, and so is what is made of it
        how = {"center": False}
    want_stats = want_stats and how.get("scale", "std") in ("std", "rms", None) and not how.get("correction")
    leaf = [None if t is None else t.detach().requires_grad_() for t in (x, w, b, r)]
    wide = [None if t is None else t.detach().double().requires_grad_() for t in leaf]
    found = []
    for t in (leaf, wide):
        options = {
            "weight": t[1], "bias": t[2], "affine": case.affine, "residual": t[3], "activation": act, "mask": mask,
            "return_stats": want_stats, **how,
        }  # fmt: skip
        if t is leaf:
            out = evenly.normalize(t[0], case.pattern, **options)
            y, m = out if isinstance(out, tuple) else (out, None)
            assert type(y.grad_fn).__name__ == "NormalizeBackward" or case.last or case.affine == "c h w"
        else:
            y, m = by_reference(t[0], case.pattern, options)
        outputs, seeds = [y], [dy.to(y.dtype)]
        if m is not None:
            outputs.append(m.var)
            seeds.append(torch.linspace(-1, 1, m.var.numel()).reshape(m.var.shape).to(m.var.dtype))
        found.append((y, m, torch.autograd.grad(outputs, [v for v in t if v is not None], seeds)))
    (y, m, got), (want, n, wanted) = found
    tolerance = TOLERANCE[dtype]
    for name, a, e in [("y", y, want), *zip(("dx", "dw", "db", "dr"), got, wanted, strict=False)]:
        size = e.abs().max() if name in ("y", "dr") else torch.maximum(e.abs().max(), dy.abs().max().double())
        slack = 60 if name in ("dw", "db") else 8
        assert (a.double() - e).abs().max() <= slack * tolerance * (size + 1e-6), name
        if mask is not None and name in ("y", "dx", "dr"):
            assert (a.masked_select(~mask.expand(a.shape)) == 0).all(), name
    if m is not None:
        for a, e in zip(m, n, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", ["n d -> n", "n d -> d", "n d -> "])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_of_the_largest_share_its_gradient(pattern, dtype):
    """Small integers: the largest occurs often, with both signs."""
    x = torch.randint(-3, 4, (40, 37), generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    dy = torch.randn(40, 37, dtype=dtype, generator=torch.Generator().manual_seed(1))
    for scale in ("max", "l1"):
        how = {"scale": scale, "center": False}
        y = evenly.normalize(x, pattern, **how)
        assert type(y.grad_fn).__name__ == "NormalizeBackward"
        (got,) = torch.autograd.grad(y, x, dy)
        wide = x.detach().double().requires_grad_()
        (want,) = torch.autograd.grad(by_reference(wide, pattern, how)[0], wide, dy.double())
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("magnitude", [1e-200, 1e200, 1e300])
@pytest.mark.parametrize("pattern", ["n d -> n", "n d -> d"])
def test_norm_of_float64_neither_overflows_nor_vanishes(pattern, magnitude):
    x = torch.randn(50, 60, dtype=torch.float64)
    how = {"scale": "l2", "center": False, "eps": 0.0}
    want = evenly.normalize(x, pattern, **how)
    torch.testing.assert_close(evenly.normalize(x * magnitude, pattern, **how), want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("how", [{}, {"scale": "l1"}, {"scale": "max"}], ids=str)
def test_masked_bits_do_not_depend_on_the_number_of_threads(how, last):
    torch.manual_seed(0)
    x = torch.randn(6, 10, 60, 61)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    mask = torch.rand(6, 1, 60, 61) < 0.7
    before = torch.get_num_threads()
    for pattern in ("n c h w -> c", "n c h w -> n", "n c h w -> "):
        runs = []
        try:
            for threads in (1, 2, 3, 2, 1):
                torch.set_num_threads(threads)
                leaf, w = x.detach().clone().requires_grad_(), torch.linspace(0.5, 2, 10).requires_grad_()
                y = evenly.normalize(leaf, pattern, weight=w, affine="c", activation="silu", mask=mask, **how)
                runs.append((y.detach(), *torch.autograd.grad(y, (leaf, w), x.roll(1, 0))))
        finally:
            torch.set_num_threads(before)
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", ["rms", None])
def test_a_mean_that_is_not_measured_is_a_constant(scale, masked):
    x = torch.randn(5, 40, requires_grad=True)
    mask = torch.rand(5, 40) > 0.3 if masked else None
    _, m = evenly.normalize(x, "n d -> n", center=False, scale=scale, mask=mask, return_stats=True)
    assert not m.mean.requires_grad
    assert not m.mean.any()

    def total(x: Tensor) -> Tensor:
        y, m = evenly.normalize(x, "n d -> n", center=False, scale=scale, mask=mask, return_stats=True)
        return m.mean.sum() + 0 * y.sum()

    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    assert not torch.autograd.grad(compiled(x), x)[0].any()


@pytest.mark.parametrize("kernel", [True, False])
def test_a_group_of_which_nothing_counts_leaves_gradients_alone(kernel):
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[0] = False
    options = {"mask": mask, "correction": 1, "weight": w, "affine": "d"}
    with nullcontext() if kernel else reference_alone():
        y, m = evenly.normalize(x, "n d -> n", **options, return_stats=True)
        dx, dw = torch.autograd.grad(y.square().sum(), (x, w))
    assert m.var[0] == 0
    assert not dx[0].any()
    assert dw.isfinite().all()


def test_given_statistics_are_returned():
    x, mean, var = torch.randn(5, 6, 7), torch.randn(6), torch.rand(6)
    y, m = evenly.normalize(x, "n c l -> c", stats=(mean, var), return_stats=True)
    assert torch.equal(m.mean, mean) and torch.equal(m.var, var) and (m.count == 35).all()
    torch.testing.assert_close(y, (x - mean[:, None]) / (var[:, None] + 1e-5).sqrt())


SHARED = [
    ("n c h w -> c", (4, 6, 5, 7), False, "c"),
    ("n c h w -> c", (4, 6, 5, 7), True, "c"),
    ("n c h w -> c", (4, 6, 5, 7), True, None),
    ("n c -> n", (30, 50), False, "n"),
    ("n c -> ", (30, 50), False, None),
    ("n c h w -> n c", (4, 6, 5, 7), False, None),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", [None, "relu", "silu"])
@pytest.mark.parametrize(("pattern", "shape", "last", "affine"), SHARED)
def test_statistics_with_gradients(pattern, shape, last, affine, act, dtype):
    """What processes share: measured, changed and given back, all of it differentiable and all by kernels."""
    torch.manual_seed(0)

    def laid() -> Tensor:
        t = torch.randn(shape).to(dtype)
        return t.contiguous(memory_format=torch.channels_last) if last else t

    x, r, dy = laid() * 2 + 1, laid(), laid()
    features = None if affine is None else shape[pattern.split("->")[0].split().index(affine)]
    whole = [None if features is None else (torch.rand(features) + 0.5).to(dtype) for _ in range(2)]
    for weight, bias, residual in ((whole[0], whole[1], r), (whole[0], None, None), (None, whole[1], None)):
        for options in ({}, {"scale": None}, {"center": False}):
            found = []
            for wide in (False, True):
                inputs = [None if t is None else t.detach().to(torch.float64 if wide else dtype).requires_grad_()
                          for t in (x, weight, bias, residual)]  # fmt: skip

                def run(inputs=inputs, options=options):
                    m = evenly.moments(inputs[0], pattern, correction=1)
                    stats = (m.mean * 1.5 + 0.1, m.var * 0.7 + 0.3)
                    return evenly.normalize(
                        inputs[0], pattern, weight=inputs[1], bias=inputs[2], affine=affine, residual=inputs[3],
                        activation=act, stats=stats, **options,
                    )  # fmt: skip

                with reference_alone() if wide else nullcontext():
                    y = run()
                assert (type(y.grad_fn).__name__ == "NormalizeGivenBackward") != wide
                leaf = [t for t in inputs if t is not None]
                found.append((y, *torch.autograd.grad(y, leaf, dy.to(y.dtype))))
            for number, (got, want) in enumerate(zip(*found, strict=True)):
                size = want.abs().max() + dy.abs().max().double() * (number > 0)
                slack = 40 if got.ndim < 2 else 4
                assert (got.double() - want).abs().max() <= slack * TOLERANCE[dtype] * size, (number, options)


def test_statistics_with_gradients_twice():
    """Second derivatives, transforms, and means alone."""
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)

    def given(x: Tensor) -> Tensor:
        m = evenly.moments(x, "n c l -> c")
        return evenly.normalize(x, "n c l -> c", stats=(m.mean * 1.1, m.var * 1.2), activation="silu")

    def measured(x: Tensor) -> tuple[Tensor, Tensor]:
        return evenly.moments(x, "n c l -> c", correction=1)[:2]

    for run in (given, measured):
        assert torch.autograd.gradcheck(run, x)
        assert torch.autograd.gradgradcheck(run, x)
    assert type(given(x).grad_fn).__name__ == "NormalizeGivenBackward"
    want = torch.autograd.functional.jacobian(given, x)
    torch.testing.assert_close(torch.func.jacrev(given)(x), want)
    torch.testing.assert_close(torch.func.jacfwd(given)(x), want)
    with_nan = x.detach().clone()
    with_nan[0, 0, 0] = float("nan")
    (dx,) = torch.autograd.grad(measured(with_nan.requires_grad_())[0].sum(), with_nan)
    torch.testing.assert_close(dx, torch.full_like(dx, 1 / 15))


def test_shared_statistics_in_low_memory():
    """The output is computed again from the statistics of that moment."""
    torch.manual_seed(0)
    x, w = torch.randn(4, 6, 5, 7, requires_grad=True), torch.randn(6, 6, 1, 1, requires_grad=True)
    layer = evenly.nn.BatchNorm(6, sync=True, activation="relu")
    found = []
    for context in (nullcontext(), evenly.nn.low_memory()):
        with context:
            y = F.conv2d(layer(F.conv2d(x, w)), w)
        layer.weight.data.add_(0)  # not seen by autograd
        found.append(torch.autograd.grad(y.square().sum(), (x, w, layer.weight, layer.bias)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_second_derivative_with_a_mask():
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    r = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 5) < 0.8
    mask[:, :2] = True

    def run(x, r):
        return evenly.normalize(x, "n d -> n", residual=r, mask=mask, activation="silu")

    assert torch.autograd.gradcheck(run, (x, r))
    assert torch.autograd.gradgradcheck(run, (x, r))


def test_benchmark_of_accuracy(monkeypatch, capsys, tmp_path):
    script = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "accuracy.py"))
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--quick", "--json", str(tmp_path / "out.json")])
    script["main"]()
    assert "values of 1e20" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 48


def reference_groups(case: Case, plan) -> tuple[tuple[int, ...], ...]:
    return tuple((plan.resolved.axes.index(name),) for name in case.affine.split())


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (1, 7), (7, 1)])
@pytest.mark.parametrize("pattern", ["n d -> n", "n d -> d", "n d -> ", "n d -> n d"])
def test_empty_and_single(shape, pattern):
    x = torch.randn(shape, dtype=torch.float32, requires_grad=True)
    y = evenly.normalize(x, pattern)
    plan = bind(pattern, x.shape)
    want = reference.normalize(x.double(), plan, reference.Call()).y
    torch.testing.assert_close(y, want.float(), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert x.grad.shape == x.shape


# ---- accuracy -------------------------------------------------------------------------------------------------------

ILL = {
    "mean 1e4, std 1": lambda g: torch.randn(g, dtype=torch.float64) + 1e4,
    "values of 1e-20": lambda g: torch.randn(g, dtype=torch.float64) * 1e-20,
    "values of 1e20": lambda g: torch.randn(g, dtype=torch.float64) * 1e20,
    "one outlier of 1e8": lambda g: torch.randn(g, dtype=torch.float64).index_put(
        (torch.tensor([0]), torch.tensor([0])), torch.tensor(1e8, dtype=torch.float64)
    ),
}


def errors(kind: str, rows: int = 64, length: int = 3001) -> dict[str, tuple[float, float]]:
    """Largest error relative to the largest output: (evenly, PyTorch), for rows, columns and images."""
    torch.manual_seed(0)
    x = ILL[kind]((rows, length)).float()
    wide = x.double()
    eps = 1e-44 if "1e-20" in kind else 1e-5

    def error(y: Tensor, want: Tensor) -> float:
        return float(((y.double() - want).abs().max() / want.abs().max()).nan_to_num(nan=float("inf")))

    found = {}
    for name, dims in (("rows", 1), ("columns", 0)):
        u = wide - wide.mean(dims, keepdim=True)
        want = u / (u.square().mean(dims, keepdim=True) + eps).sqrt()
        pattern = "n d -> n" if dims else "n d -> d"
        theirs = F.layer_norm(x, (length,), eps=eps) if dims else F.batch_norm(x, None, None, training=True, eps=eps)
        found[name] = (error(evenly.normalize(x, pattern, eps=eps), want), error(theirs, want))
    image, wide_image = x.reshape(4, 16, length), wide.reshape(4, 16, length)
    u = wide_image - wide_image.mean((0, 2), keepdim=True)
    want = u / (u.square().mean((0, 2), keepdim=True) + eps).sqrt()
    ours = evenly.normalize(image, "n c l -> c", eps=eps)
    found["image"] = (error(ours, want), error(F.batch_norm(image, None, None, training=True, eps=eps), want))
    return found


@pytest.mark.parametrize("kind", ILL)
def test_never_less_accurate_than_pytorch(kind, record_property):
    for name, (ours, theirs) in errors(kind).items():
        record_property(f"{kind}, {name}", f"evenly {ours:.1e}, PyTorch {theirs:.1e}")
        # two units in the last place are the rounding of x - mean, of 1/s and of their product
        assert ours <= max(theirs, 2**-22), (kind, name, ours, theirs)
        assert ours < 1e-6, (kind, name, ours)


def test_drifting_columns():
    """Columns whose mean moves far from that of the first rows: the pivot of the first block is not good enough."""
    torch.manual_seed(0)
    x = torch.randn(20000, 24) + torch.linspace(0, 1e4, 20000)[:, None]
    m = evenly.moments(x, "n c -> c")
    wide = x.double()
    torch.testing.assert_close(m.mean.double(), wide.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(m.var.double(), wide.var(0, correction=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("pattern", ["n d -> n", "n d -> d", "n d -> "])
def test_nan_and_infinity_stay_where_they_belong(bad, pattern):
    x = torch.randn(9, 40)
    x[3, 7] = bad
    y = evenly.normalize(x, pattern)
    want = reference.normalize(x, bind(pattern, x.shape), reference.Call()).y
    assert torch.equal(y.isnan(), want.isnan())
    torch.testing.assert_close(y, want, equal_nan=True, rtol=1e-5, atol=1e-5)
    m = evenly.moments(x, pattern)
    assert (m.mean.isfinite() == (x.sum(0) if pattern.endswith(" d") else x.sum(1) if pattern.endswith(" n") else
                                  x.sum()).isfinite()).all()  # fmt: skip


# ---- runs, threads, processes ---------------------------------------------------------------------------------------


def everything(x: Tensor, pattern: str, given: bool = False) -> tuple[Tensor, ...]:
    leaf = x.detach().clone().requires_grad_()
    w = torch.linspace(0.5, 2, x.shape[1]).requires_grad_()
    stats = evenly.moments(x, pattern)[:2] if given else None
    y = evenly.normalize(leaf, pattern, weight=w, affine="c", activation="silu", stats=stats)
    return (y.detach(), *torch.autograd.grad(y, (leaf, w), x.roll(1, 0)))


@pytest.mark.parametrize(
    "shape", [(6, 10, 60, 61), (2, 512, 7, 7), (64, 16, 8, 8), (40, 20, 6, 8), (12, 200, 4, 4), (70, 90, 3, 3)]
)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("pattern", ["n c h w -> c", "n c h w -> n", "n c h w -> n c", "n c h w -> "])
def test_bits_do_not_depend_on_the_number_of_threads(pattern, given, last, shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3, 16, 1):
            torch.set_num_threads(threads)
            runs.append(everything(x, pattern, given))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(300, 1, 1, 49), (40, 1, 1, 7 * 20), (1, 30, 9, 35), (1, 40, 33, 9), (2, 40, 33, 1)])
def test_bits_do_not_depend_on_where_memory_starts(sizes, dtype):
    """Vectors are stored where lines of the cache begin; what is in them is the same."""
    module = cpu.extension()
    code = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}[dtype]
    k0, r0, k1, r1 = sizes
    n, count, width = k0 * r0 * k1 * r1, k0 * k1, 20 if r1 == 140 else k1
    wdiv = 7 if r1 == 140 else r1
    layout = module.Layout(*sizes, wdiv, width, code, code, 0, 1, True, False, False, 1e-5, 0.0)
    torch.manual_seed(0)
    x, dy = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    w, b = torch.rand(width).to(dtype), torch.rand(width).to(dtype)
    runs = []
    for offset in (0, 1, 5, 17):

        def room(of: Tensor, offset: int = offset) -> Tensor:
            return torch.full((of.numel() + 64,), 7.0).to(of.dtype)[offset : offset + of.numel()]

        stats = torch.empty(3, count, dtype=reference.accumulate_dtype(dtype))
        y, dx, here = room(x), room(x), room(x).copy_(x)
        dw, db = torch.empty_like(w), torch.empty_like(b)
        layout.forward(here, y, stats, w, b, *[None] * 8, 0.0, 0)
        layout.backward(dy, here, stats, w, b, None, None, dx, dw, db, None, None, None)
        for t in (y, dx):
            edges = t.as_strided((n + 64,), (1,), 0).clone()
            edges[offset : offset + n] = 7.0
            assert (edges == 7.0).all()
        runs.append((y.clone(), dx.clone(), dw, db))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("pattern", "shape", "options"),
    [
        ("n c h w -> c", (3, 16, 30, 31), {}),
        ("n c h w -> n c", (3, 16, 30, 31), {}),
        ("n (g c) h w -> n g", (3, 16, 30, 31), {"g": 4, "affine": "(g c)"}),
        ("n c -> c", (1500, 33), {}),
        ("n d -> n", (700, 65), {"affine": "d"}),
        ("n d -> n", (700, 65), {"affine": "d", "center": False, "scale": "rms"}),
        ("n d -> n", (3, 17), {"affine": "d", "center": False}),
    ],
)
@pytest.mark.parametrize("layout", ["first", "last", "given"])
def test_the_output_once_more_is_the_same_to_the_bit(pattern, shape, options, layout, dtype):
    torch.manual_seed(0)
    x, residual = (torch.randn(shape, dtype=dtype) * 3 + 1 for _ in range(2))
    if layout == "last" and x.ndim == 4:
        x = x.to(memory_format=torch.channels_last)
    sizes = {"g": options["g"]} if "g" in options else {}
    stats = evenly.moments(x, pattern, **sizes)[:2] if layout == "given" else None
    features = shape[1]
    weight = torch.randn(features, requires_grad=True)
    options = {"affine": "c", **options}
    for activation in (None, "relu", "silu", "gelu"):
        for r in (None, residual):
            with recompute.low_memory():
                held = recompute._pack(residual)  # as a layer before it would
                y = evenly.normalize(
                    x, pattern, weight=weight, bias=weight, residual=r, activation=activation, stats=stats, **options
                )
                found = recompute._lookup(y)
                assert found is not None
                assert torch.equal(found.tensor(), y)
                assert held.tensor() is not None


def test_concurrent_calls():
    torch.manual_seed(0)
    inputs = [torch.randn(3, 8, 40, 41) for _ in range(6)]
    want = [everything(x, "n c h w -> c") for x in inputs]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            for got, expected in zip(pool.map(lambda x: everything(x, "n c h w -> c"), inputs), want, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def _child(queue, x):
    queue.put([t.sum().item() for t in everything(x, "n c h w -> c")])


@pytest.mark.skipif(sys.platform != "linux", reason="fork")
def test_fork_after_first_use():
    """A forked child (a worker of a data loader) computes after its parent has used threads; it does not hang."""
    torch.manual_seed(0)
    x = torch.randn(8, 16, 64, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        want = [t.sum().item() for t in everything(x, "n c h w -> c")]
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = context.Process(target=_forked_with_one_thread, args=(queue, x))
            child.start()
        child.join(60)
        alive = child.is_alive()
        if alive:
            child.kill()
        assert not alive, "the child hangs"
        assert child.exitcode == 0
        got = queue.get()
    finally:
        torch.set_num_threads(before)
    assert got == pytest.approx(want, rel=1e-4, abs=1e-2)


def _forked_with_one_thread(queue, x):
    # PyTorch's own operators may hang in a forked child unless they run on one thread; the kernels take care of
    # themselves and are called with the thread count that was inherited.
    y = evenly.normalize(x, "n c h w -> c")
    assert cpu.extension().threads() == 1
    torch.set_num_threads(1)
    assert y.isfinite().all()
    _child(queue, x)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PyTorch may come with another runtime")
def test_threads_are_those_of_pytorch():
    """Also where the runtime is private to PyTorch's library, as in its wheels for Arm."""
    assert cpu.extension().pool() == "PyTorch's OpenMP"
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert cpu.extension().threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_other_instruction_sets(isa):
    """The same cases on an older instruction set than this machine's."""
    script = textwrap.dedent(
        """
        import torch, evenly
        from evenly.core.kernels import cpu
        from torch.nn import functional as F
        torch.manual_seed(0)
        print(cpu.extension().isa())
        f32, f64, b16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
        for dtype, tolerance in ((f32, 1e-5), (f64, 1e-12), (b16, 2e-2), (f16, 2e-3)):
            for shape, pattern in (((33, 70), "n c -> c"), ((33, 70), "n c -> n"), ((5, 6, 49), "n c l -> c")):
                for activation in (None, "relu", "silu", "gelu"):
                    x = torch.randn(shape, dtype=torch.float64)
                    r = torch.randn(shape, dtype=torch.float64)
                    dims = [i for i, a in enumerate(pattern.split("->")[0].split()) if a not in pattern.split("->")[1]]
                    leaf = x.to(dtype).requires_grad_()
                    y = evenly.normalize(leaf, pattern, residual=r.to(dtype), activation=activation)
                    (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y) + x.to(dtype))
                    wide = leaf.detach().double().requires_grad_()
                    u = wide - wide.mean(dims, keepdim=True)
                    v = u / (u.square().mean(dims, keepdim=True) + 1e-5).sqrt() + r.to(dtype).double()
                    v = v if activation is None else getattr(F, activation)(v)
                    (want,) = torch.autograd.grad(v, wide, 1 + x.to(dtype).double())
                    assert (y.double() - v).abs().max() < 5 * tolerance * v.abs().max(), (dtype, pattern, activation)
                    limit = 9 * tolerance * max(want.abs().max(), 1.0)
                    assert (dx.double() - want).abs().max() < limit, (dtype, pattern)
        """
    )
    environment = {**os.environ, "EVENLY_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SOURCES.parents[3]), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    known = ["portable", "avx2", "avx512"]
    assert done.stdout.strip() in known[: known.index(isa) + 1]  # no newer one than was asked for


# ---- as operators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["", "relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(activation, dtype):
    x = torch.randn(4, 6, 10, dtype=dtype, requires_grad=True)
    w, b = (torch.randn(6, dtype=dtype, requires_grad=True) for _ in range(2))
    r = torch.randn_like(x, requires_grad=True)
    arguments = ("n c l -> c", [], [], "1", True, "std", 1e-5, 0.0, activation, True)
    mask = torch.rand(4, 1, 10) < 0.7
    for residual, flags in ((None, None), (r, None), (r, mask)):
        torch.library.opcheck(
            torch.ops.evenly.fused_normalize.default, (x, w, b, residual, None, None, flags, *arguments)
        )
    _, stats, _, _ = torch.ops.evenly.fused_normalize(x, w, b, r, None, None, None, *arguments)
    torch.library.opcheck(
        torch.ops.evenly.fused_normalize_backward.default,
        (
            torch.randn_like(x), x.detach(), w.detach(), b.detach(), r.detach(), stats.detach(), None, None, None,
            *arguments[:-1], False, [True, True, True, True],
        ),
    )  # fmt: skip


def test_compiled_graph_has_one_operator():
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    x = torch.randn(4, 6, 10)
    run = torch.compile(lambda x: evenly.normalize(x, "n (g c) l -> n g", g=3), fullgraph=True, backend=backend)
    torch.testing.assert_close(run(x), evenly.normalize(x, "n (g c) l -> n g", g=3))
    assert any("fused_normalize" in name for name in seen), seen
    torch._dynamo.reset()


@pytest.mark.parametrize("flags", [(4, 1, 10), (4, 6, 1), (10,)], ids=str)
@pytest.mark.parametrize("scale", ["std", "l1"])
def test_compiled_with_a_mask(scale, flags):
    """One operator, the bits of the same call outside, statistics and their count included."""
    torch.manual_seed(0)
    x, r, w = torch.randn(4, 6, 10), torch.randn(4, 6, 10), torch.rand(6)
    mask = torch.rand(flags) < 0.7
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def run(x, r, w, mask):
        return evenly.normalize(
            x, "n c l -> c", weight=w, residual=r, mask=mask, scale=scale, return_stats=scale == "std"
        )

    torch._dynamo.reset()
    found = []
    for function in (run, torch.compile(run, fullgraph=True, backend=backend)):
        leaves = [t.clone().requires_grad_() for t in (x, r, w)]
        out = function(*leaves, mask)
        y, m = out if scale == "std" else (out, None)
        extra = () if m is None else (m.mean, m.var)
        total = y.square().sum() + sum(((k + 1) * s.square()).sum() for k, s in enumerate(extra))
        counts = () if m is None else (m.count,)
        found.append((y, *extra, *counts, *torch.autograd.grad(total, leaves)))
    torch._dynamo.reset()
    assert any("fused_normalize" in name for name in seen), seen
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_export():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = evenly.nn.LayerNorm(12)

        def forward(self, x):
            return self.norm(x)

    net, x = Net(), torch.randn(3, 12)
    program = torch.export.export(net, (x,))
    torch.testing.assert_close(program.module()(x), net(x))


def test_the_short_way_is_the_long_way():
    """The second call with the same settings takes the remembered entry; nothing changes."""
    torch.manual_seed(0)
    x, w = torch.randn(5, 6, 7), torch.randn(6)
    operator._quick.clear()
    first = evenly.normalize(x, "n c l -> c", weight=w, activation="relu")
    assert operator._quick
    assert torch.equal(evenly.normalize(x, "n c l -> c", weight=w, activation="relu"), first)
    assert torch.equal(evenly.normalize(x, "n c l -> c", activation="relu"),
                       evenly.normalize(x, "n c l -> c", weight=torch.ones(6), activation="relu"))  # fmt: skip
    with pytest.raises(ValueError, match="weight has shape"):
        evenly.normalize(x, "n c l -> c", weight=torch.randn(7), activation="relu")
    with pytest.raises(ValueError, match="residual"):
        evenly.normalize(x, "n c l -> c", weight=w, activation="relu", residual=torch.randn(5, 6, 1))


def test_the_short_way_is_for_tensors_with_memory_only():
    """A remembered call on a meta tensor, a fake tensor or under a transform takes the long way."""
    x, w = torch.randn(5, 6, 7), torch.randn(6)
    for _ in range(2):
        evenly.normalize(x, "n c l -> c", weight=w)
    y = evenly.normalize(x.to("meta"), "n c l -> c", weight=w.to("meta"))
    assert y.device.type == "meta"
    with torch._subclasses.FakeTensorMode() as mode:
        y = evenly.normalize(mode.from_tensor(x), "n c l -> c", weight=mode.from_tensor(w))
    assert y.shape == x.shape
    got = torch.vmap(lambda t: evenly.normalize(t, "n c l -> c", weight=w))(x.expand(3, 5, 6, 7))
    torch.testing.assert_close(got[1], evenly.normalize(x, "n c l -> c", weight=w), rtol=1e-5, atol=1e-5)


def test_lazy_negation():
    """A view with the negative bit is stored with the other sign."""
    x = torch._neg_view(torch.randn(4, 5))
    assert x.is_neg()
    for _ in range(2):
        torch.testing.assert_close(evenly.normalize(x, "n d -> d"), evenly.normalize(x.clone(), "n d -> d"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
def test_batch_norm_layer_as_pytorch(dtype, last):
    """Training with running statistics moved by the kernel, then evaluation; both by the short way."""
    torch.manual_seed(0)
    ours, theirs = evenly.nn.BatchNorm(6, dtype=dtype), torch.nn.BatchNorm2d(6, dtype=dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for _ in range(4):
        x = torch.randn(8, 6, 9, 9).mul(3).add(2).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        torch.testing.assert_close(ours(x), theirs(x), **tolerance)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), **tolerance)
    version = ours.running_mean._version
    ours(x)
    assert ours.running_mean._version > version
    ours.eval()
    theirs.load_state_dict(ours.state_dict())
    theirs.eval()
    for _ in range(2):
        torch.testing.assert_close(ours(x), theirs(x), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True])
def test_running_statistics_of_any_dtype(dtype, last):
    """They are moved and used as if they had been converted for each call."""
    torch.manual_seed(0)
    layer, plain = evenly.nn.BatchNorm(70), evenly.nn.BatchNorm(70)
    for mode in (True, False):  # the first call of a kind takes the long way
        x = torch.randn(5, 70, 6, 6)
        evenly.nn.BatchNorm(70).train(mode)(x.contiguous(memory_format=torch.channels_last) if last else x)
    layer.running_mean, layer.running_var = layer.running_mean.to(dtype), layer.running_var.to(dtype)
    for _ in range(3):
        x = torch.randn(5, 70, 6, 6) * 3 + 2
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        plain.running_mean = layer.running_mean.float()
        plain.running_var = layer.running_var.float()
        version = layer.running_mean._version
        assert torch.equal(layer(x), plain(x))
        assert layer.running_mean._version > version
        assert layer.running_mean.dtype == dtype
        if dtype != torch.float64:  # which keeps digits that float32 has not
            assert torch.equal(layer.running_mean, plain.running_mean.to(dtype))
            assert torch.equal(layer.running_var, plain.running_var.to(dtype))
        torch.testing.assert_close(layer.running_mean, plain.running_mean.to(dtype))
        torch.testing.assert_close(layer.running_var, plain.running_var.to(dtype))
    plain.running_mean, plain.running_var = layer.running_mean.float(), layer.running_var.float()
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    y, want = layer.eval()(ours), plain.eval()(theirs)
    assert torch.equal(y, want)
    for a, b in zip(
        torch.autograd.grad(y, (ours, layer.weight), x),
        torch.autograd.grad(want, (theirs, plain.weight), x),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_without_the_extension(monkeypatch):
    """No extension: one warning, and PyTorch computes."""
    cpu.extension.cache_clear()
    monkeypatch.setattr(cpu, "_load", lambda: (None, "not compiled"))
    operator._quick.clear()
    try:
        with pytest.warns(RuntimeWarning, match="C\\+\\+ compiler"):
            y = evenly.normalize(torch.randn(3, 4, requires_grad=True), "n d -> n")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            evenly.normalize(torch.randn(3, 5), "n d -> n")
        assert type(y.grad_fn).__name__ != "NormalizeBackward"
        assert not cpu.available()
        assert cpu.describe() == "missing (not compiled)"
    finally:
        monkeypatch.undo()
        cpu.extension.cache_clear()


def test_import_does_not_load_the_extension():
    script = "import evenly, sys; assert 'evenly.core.kernels.cpu._kernels' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(SOURCES.parents[3])}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)


# ---- sanitizers -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (SOURCES / "pool.cpp").exists(), reason="installed without its C++ sources")
@pytest.mark.parametrize("source", ["sanitize_cpu_kernels.cpp", "sanitize_cpu_pieces.cpp"])
def test_under_sanitizers(source, tmp_path):
    """The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on buffers of exactly the right size."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++17", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wno-psabi"]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    built = subprocess.run(
        [compiler, *flags, str(probe), "-o", str(tmp_path / "probe")], capture_output=True, check=False
    )
    if built.returncode or subprocess.run([str(tmp_path / "probe")], check=False).returncode:
        pytest.skip("the compiler has no sanitizer runtime")
    driver = Path(__file__).with_name(source)
    program = tmp_path / "driver"
    command = [compiler, *flags, f"-I{SOURCES}", str(driver), str(SOURCES / "pool.cpp"), "-ldl", "-pthread", "-o"]
    subprocess.run([*command, str(program)], check=True, timeout=900)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "problems" in done.stdout
