"""The CUDA kernels under Triton's interpreter, on tensors of the CPU; run by ``test_cuda_kernels.py``.

Triton looks for ``TRITON_INTERPRET`` when it is first imported, so that this is a process of its own.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import evenly
from core import oracle
from evenly.core import patterns
from evenly.core.kernels import cuda, operator, reference
from evenly.core.kernels.cuda import entry as launches
from evenly.core.kernels.launch import serve
from evenly.core.patterns import bind

serve("cpu", cuda.load)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Case:
    """A pattern, a shape, the axes of the weight; ``last``: channels-last memory."""

    pattern: str
    shape: tuple[int, ...]
    affine: str
    last: bool = False


# Each reaches a loop of its own: short rows, long rows, one statistic for all; weights by value, by run, by segment,
# by period, not from their first; columns, columns of several values; axes of size 1.
CASES = [
    Case("n d -> n", (13, 5), "d"),
    Case("n d -> n", (3, 131), "n"),
    Case("n d -> ", (5, 67), "d"),
    Case("n c l -> c", (3, 7, 49), "c"),
    Case("n c l -> c", (7, 6, 4), "c"),
    Case("n c -> c", (41, 37), "c"),
    Case("n c -> c", (1, 9), "c"),
    Case("n c l -> n c", (3, 5, 31), "c"),
    Case("n c l -> n c", (3, 5, 31), "c l"),
    Case("n g c l -> n g", (2, 3, 5, 17), "g c"),
    Case("n g c l -> g", (2, 3, 2, 37), "g c"),
    Case("n c h w -> c", (3, 10, 3, 7), "c", True),
    Case("n c h w -> n c", (2, 6, 5, 3), "c", True),
    Case("n c h w -> n", (2, 6, 1, 7), "c", True),
    Case("n g c h w -> n g", (2, 3, 2, 5, 1), "g c"),
    Case("n c h w -> n", (2, 3, 5, 7), "c h w"),
    Case("n d -> n d", (3, 5), "d"),
]
LAUNCHES = {"fused": {}, "split": {"fused": 1, "tile": 256, "columns": 16, "programs": 2, "gradient": 16}}
HOW = [
    {},
    {"correction": 1},
    {"center": False},
    {"center": False, "scale": "rms"},
    {"center": False, "scale": "l2"},
    {"scale": "l2"},
    {"scale": None},
    {"scale": "rms"},
]
ACTIVATIONS = [None, "relu", "silu", "gelu"]


@pytest.fixture(params=LAUNCHES)
def launch(request, monkeypatch):
    """The kernels for small groups and for large ones, whatever the size."""
    for name, value in LAUNCHES[request.param].items():
        monkeypatch.setattr(launches.limits, name, value)
    _forget()
    yield request.param
    _forget()


def _forget() -> None:
    patterns._plans.clear()
    operator._quick.clear()


def formula(x, case, w, b, r, how, act):
    """From the definition, in the dtype of its arguments (float64)."""
    left, kept = case.pattern.split("->")[0].split(), case.pattern.split("->")[1].split()
    dims = [i for i, name in enumerate(left) if name not in kept]
    n = 1
    for i in dims:
        n *= x.shape[i]
    mean = x.mean(dims, keepdim=True) if dims else x
    u = x - mean
    var = u.square().sum(dims, keepdim=True) / (n - how.get("correction", 0)) if dims else u.square()
    v = u if how.get("center", True) else x
    scale = how.get("scale", "std")
    total = v.square().sum(dims, keepdim=True) if dims else v.square()
    if scale == "std":
        v = v / (var + 1e-5).sqrt()
    elif scale == "rms":
        v = v / (total / n + 1e-5).sqrt()
    elif scale == "l2":
        v = v / total.sqrt().clamp(min=1e-12)
    shape = [size if name in case.affine.split() else 1 for name, size in zip(left, x.shape, strict=True)]
    v = v * w.reshape(shape) + b.reshape(shape)
    v = v if r is None else v + r
    return v if act is None else getattr(F, act)(v)


def leaves(case: Case, dtype: torch.dtype, offset: int, residual: bool, seed: int = 0) -> list[Tensor | None]:
    """x, weight, bias, residual and the gradient of the output, ``offset`` values into their storage."""
    generator = torch.Generator().manual_seed(seed)

    def one(shape: tuple[int, ...], last: bool = False) -> Tensor:
        flat = torch.randn(int(np.prod(shape)) + offset, generator=generator, dtype=torch.float64).to(dtype)[offset:]
        if last:
            n, c, h, w = shape
            return flat.reshape(n, h, w, c).permute(0, 3, 1, 2)
        return flat.reshape(shape)

    left = case.pattern.split("->")[0].split()
    width = tuple(case.shape[left.index(name)] for name in case.affine.split())
    x = one(case.shape, case.last) * 2 + 1
    return [x, one(width), one(width), one(case.shape, case.last) if residual else None, one(case.shape, case.last)]


def grid():
    """Every case; options, dtypes, activations and residuals in turn, so that all of them meet."""
    for number, case in enumerate(CASES):
        for step, launch in zip(
            ((0, 1, 2), (2, 0, 3), (3, 1, 0), (0, 2, 1), (1, 3, 2))[number % 5],
            ("fused", "fused", "split"),
            strict=True,
        ):
            turn = number * 4 + step
            how = HOW[(number + 3 * step) % len(HOW)] if case.pattern != "n d -> n d" and case.shape[0] > 1 else {}
            dtype = DTYPES[step]
            if how.get("scale") == "l2" and dtype == torch.float64:
                how = {}
            act = ACTIVATIONS[(number + step) % 4]
            yield pytest.param(launch, case, dtype, how, act, turn % 3 != 1, turn % 4, id=f"{launch}-{number}-{step}")


@pytest.mark.parametrize(
    ("launch", "case", "dtype", "how", "act", "residual", "offset"), list(grid()), indirect=["launch"]
)
def test_against_float64(launch, case, dtype, how, act, residual, offset):
    x, w, b, r, dy = leaves(case, dtype, offset, residual)
    inputs = [t.detach().requires_grad_() for t in (x, w, b, *([r] if residual else []))]
    rest = inputs[3] if residual else None
    y = evenly.normalize(
        inputs[0], case.pattern, weight=inputs[1], bias=inputs[2], affine=case.affine, residual=rest,
        activation=act, **how,
    )  # fmt: skip
    assert type(y.grad_fn).__name__ == "NormalizeBackward"
    assert isinstance(y.grad_fn.spec[0], launches.CudaEntry)
    got = torch.autograd.grad(y, inputs, dy)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    want = formula(*wide[:1], case, wide[1], wide[2], wide[3] if residual else None, how, act)
    wanted = torch.autograd.grad(want, wide, dy.double())
    assert y.dtype == dtype
    assert y.stride() == x.stride()
    for name, a, e in [("y", y, want), *zip(("dx", "dw", "db", "dr"), got, wanted, strict=False)]:
        assert a.shape == e.shape
        size = e.abs().max() if name in ("y", "dr") else torch.maximum(e.abs().max(), dy.abs().max().double())
        slack = 40 if name in ("dw", "db") else 4
        error = (a.double() - e).abs().max()
        assert error <= slack * TOLERANCE[dtype] * (size + 1e-6), (name, float(error), float(size))


# ---- what is not in the output --------------------------------------------------------------------------------------

PATTERNS = [
    ("n c h w -> c", (5, 7, 3, 5), False),
    ("n c h w -> c", (5, 7, 3, 5), True),
    ("n c h w -> n", (3, 4, 3, 5), False),
    ("n c h w -> n", (3, 4, 3, 5), True),
    ("n d -> n", (6, 37), False),
]


def laid(shape: tuple[int, ...], last: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


@pytest.mark.parametrize(("pattern", "shape", "last"), PATTERNS)
def test_moments_and_their_gradients(launch, pattern, shape, last):
    torch.manual_seed(0)
    x = laid(shape, last) + 3
    mean, var, count = evenly.moments(x, pattern, correction=1)
    want = oracle.moments(x.numpy(), pattern, correction=1)
    for got, expected in zip((mean, var, count), want, strict=True):
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    _, m = evenly.normalize(leaf, pattern, return_stats=True)
    a, b = torch.randn_like(m.mean), torch.randn_like(m.var)
    (got,) = torch.autograd.grad((m.mean * a).sum() + (m.var * b).sum(), leaf)
    wide = x.double().requires_grad_()
    _, m = evenly_reference(wide, pattern)
    (want,) = torch.autograd.grad((m[0] * a).sum() + (m[1] * b).sum(), wide)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("act", [None, "relu", "silu"])
@pytest.mark.parametrize(("pattern", "shape", "last"), PATTERNS)
def test_statistics_with_gradients(launch, pattern, shape, last, act):
    """Measured, changed and given back: by kernels, and as the reference in float64."""
    torch.manual_seed(0)
    x, r, dy = laid(shape, last) + 3, laid(shape, last), laid(shape, last)
    found = []
    for dtype in (torch.float32, torch.float64):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (x, r)]
        if dtype == torch.float32:
            m = evenly.moments(inputs[0], pattern)
            y = evenly.normalize(
                inputs[0], pattern, residual=inputs[1], activation=act, stats=(m.mean * 1.5, m.var * 0.7 + 0.3)
            )
            assert type(y.grad_fn).__name__ == "NormalizeGivenBackward"
            assert isinstance(y.grad_fn.entry, launches.CudaEntry)
        else:
            plan = bind(pattern, x.shape)
            mean, var, _ = reference.measure(inputs[0], plan, mask=None, groups=None, correction=0)
            call = reference.Call(residual=inputs[1], activation=act, mean=mean * 1.5, var=var * 0.7 + 0.3)
            y = reference.normalize(inputs[0], plan, call).y
        found.append((y, *torch.autograd.grad(y, inputs, dy.to(dtype))))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


# masks of every way to lie in memory: along a run, a flag a run, of the outermost axes, of both ends, of none in order
MASKED = [
    ("n d -> n", (13, 37), "d", (13, 37), False),
    ("n d -> ", (13, 37), "d", (13, 1), False),
    ("n c l -> c", (7, 6, 50), "c", (7, 1, 50), False),
    ("n c l -> n", (3, 5, 31), "c l", (3, 1, 31), False),
    ("n c h w -> c", (5, 7, 3, 5), "c", (5, 1, 3, 5), True),
    ("n c h w -> n c", (5, 6, 3, 5), "c", (5, 1, 3, 5), True),
    ("n c h w -> n", (3, 4, 3, 5), "c", (1, 4, 3, 1), False),
    ("n g c l -> n g", (2, 3, 4, 17), "g c", (2, 3, 1, 17), False),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("how", "act", "residual"),
    [({}, None, True), ({"correction": 1}, "relu", True), ({"center": False, "scale": "rms"}, "silu", False)],
    ids=["plain", "relu", "silu"],
)
@pytest.mark.parametrize(("pattern", "shape", "affine", "flags", "last"), MASKED)
def test_masks_against_float64(launch, pattern, shape, affine, flags, last, how, act, residual, dtype):
    """Output, statistics and every gradient; the first group has no value that counts, the second two."""
    case = Case(pattern, shape, affine, last)
    x, w, b, r, dy = leaves(case, dtype, 0, residual)
    x = (x.double() + 3 * (dtype != torch.bfloat16)).to(dtype)
    mask = torch.rand(flags, generator=torch.Generator().manual_seed(1)) > 0.3
    if flags[0] == shape[0]:
        mask[0] = False
        mask[1] = False
        mask[1].view(-1)[:2] = True
    found = []
    for kind in (dtype, torch.float64):
        inputs = [t.detach().to(kind).requires_grad_() for t in (x, w, b, *([r] if residual else []))]
        rest = inputs[3] if residual else None
        if kind is dtype and found == []:
            options = {"affine": affine, "mask": mask, "residual": rest, "activation": act, "return_stats": True}
            y, m = evenly.normalize(inputs[0], pattern, weight=inputs[1], bias=inputs[2], **options, **how)
            assert isinstance(y.grad_fn.spec[0], launches.CudaEntry)
        else:
            plan = bind(pattern, x.shape)
            axes = [[pattern.split("->")[0].split().index(name)] for name in affine.split()]
            call = reference.Call(
                weight=inputs[1], bias=inputs[2], affine=axes, mask=mask, residual=rest, activation=act,
                want_stats=True, **how,
            )  # fmt: skip
            m = reference.normalize(inputs[0], plan, call)
            y = m.y
        spread = (m.mean.nan_to_num(0) + m.var.nan_to_num(0)).sum()
        grads = torch.autograd.grad((y * dy.to(kind)).sum() + spread.to(kind) * 0.1, inputs)
        found.append((m.mean, m.var, m.count, y, *grads))
    for name, got, want in zip(("mean", "var", "count", "y", "dx", "dw", "db", "dr"), *found, strict=False):
        slack = 40 if name in ("dw", "db", "var") else 8
        size = max(1.0, float(want.detach().nan_to_num(0).abs().max()))
        both = torch.isnan(want) & torch.isnan(got)
        error = (got.double() - want).masked_fill(both, 0).abs().max()
        assert error <= slack * TOLERANCE[dtype] * size, (name, float(error), size)


def test_the_operator_with_a_mask(launch):
    torch.manual_seed(0)
    x, mask = torch.randn(4, 6, 10, requires_grad=True), torch.rand(4, 1, 10) > 0.3
    options = ("n c l -> c", [], [], "", True, "std", 1e-5, 0.0, "silu", True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.evenly.fused_normalize.default, (x, None, None, None, None, None, mask, *options), test_utils=checks
    )
    y, *_ = torch.ops.evenly.fused_normalize(x, None, None, None, None, None, mask, *options)
    want = evenly.normalize(x, "n c l -> c", mask=mask, activation="silu")
    torch.testing.assert_close(y, want, rtol=0, atol=0)
    seed = torch.randn_like(y)
    assert torch.equal(*(torch.autograd.grad(t, x, seed)[0] for t in (y, want)))


def evenly_reference(x: Tensor, pattern: str) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    result = reference.normalize(x, bind(pattern, x.shape), reference.Call(want_stats=True))
    return result.y, (result.mean, result.var)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
def test_batch_norm_trains_and_evaluates(launch, last, dtype):
    """The layer against PyTorch's: output, gradients, running statistics, evaluation with and without gradient."""
    torch.manual_seed(0)
    ours = evenly.nn.BatchNorm(6, dtype=dtype)
    theirs = torch.nn.BatchNorm2d(6, dtype=torch.float64)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    if dtype == torch.float64:
        tolerance = {"rtol": 1e-11, "atol": 1e-11}
    for step in range(6):
        ours.train(step < 4)
        theirs.train(step < 4)
        x = laid((4, 6, 3, 5), last, dtype) * 2 + 1
        leaf, wide = x.requires_grad_(step != 5), x.detach().double().requires_grad_()
        y, want = ours(leaf), theirs(wide)
        torch.testing.assert_close(y.double(), want, **tolerance)
        if step == 5:
            continue
        seed = torch.randn_like(want)
        got = torch.autograd.grad(y, (leaf, ours.weight, ours.bias), seed.to(dtype))
        wanted = torch.autograd.grad(want, (wide, theirs.weight, theirs.bias), seed.to(dtype).double())
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a.double(), b, **tolerance)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        got, want = getattr(ours, name), getattr(theirs, name)
        torch.testing.assert_close(got.double(), want.double(), **tolerance)
    assert any(type(e) is launches.CudaEntry for e in operator._quick.values())


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (1, 7), (7, 1)])
@pytest.mark.parametrize("pattern", ["n d -> n", "n d -> d", "n d -> ", "n d -> n d"])
def test_empty_and_single(shape, pattern):
    x = torch.randn(shape, requires_grad=True)
    y = evenly.normalize(x, pattern)
    want = reference.normalize(x.double(), bind(pattern, x.shape), reference.Call()).y
    torch.testing.assert_close(y, want.float(), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_memory_with_gaps_and_scalar_weights(launch):
    torch.manual_seed(0)
    x = torch.randn(6, 9, 10)[:, ::2].requires_grad_()
    w, b = torch.tensor(1.5, requires_grad=True), torch.tensor(-0.5, requires_grad=True)
    r = torch.randn(6, 10, 5).transpose(1, 2)
    y = evenly.normalize(x, "n c l -> n", weight=w, bias=b, residual=r, activation="gelu")
    u = (x - x.mean((1, 2), keepdim=True)) / (x.var((1, 2), correction=0, keepdim=True) + 1e-5).sqrt()
    want = F.gelu(u * w + b + r)
    torch.testing.assert_close(y, want)
    seed = torch.randn_like(want)
    for a, e in zip(torch.autograd.grad(y, (x, w, b), seed), torch.autograd.grad(want, (x, w, b), seed), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("pattern", "shape", "last"), PATTERNS)
def test_the_second_derivative_and_the_sign_bits(launch, pattern, shape, last):
    """relu with a residual keeps one bit a value, which PyTorch unpacks where a derivative is differentiated."""
    torch.manual_seed(0)
    x, r = laid(shape, last, torch.float64).requires_grad_(), laid(shape, last, torch.float64)

    def penalty(normalize):
        y = normalize(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    plan = bind(pattern, x.shape)
    call = reference.Call(residual=r, activation="relu")
    got = penalty(lambda x: evenly.normalize(x, pattern, residual=r, activation="relu"))
    want = penalty(lambda x: reference.normalize(x, plan, call).y)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_operator_of_the_compiler(launch):
    x = torch.randn(4, 6, 10, requires_grad=True)
    w, b = (torch.randn(6, requires_grad=True) for _ in range(2))
    r = torch.randn_like(x, requires_grad=True)
    arguments = ("n c l -> c", [], [], "1", True, "std", 1e-5, 0.0, "silu", True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.evenly.fused_normalize.default, (x, w, b, r, None, None, None, *arguments), test_utils=checks
    )


# ---- accuracy, determinism ------------------------------------------------------------------------------------------

ILL = {
    "mean 1e4, std 1": lambda shape: torch.randn(shape, dtype=torch.float64) + 1e4,
    "values of 1e-20": lambda shape: torch.randn(shape, dtype=torch.float64) * 1e-20,
    "values of 1e20": lambda shape: torch.randn(shape, dtype=torch.float64) * 1e20,
    "one outlier of 1e8": lambda shape: torch.randn(shape, dtype=torch.float64).index_put(
        (torch.tensor([0]), torch.tensor([0])), torch.tensor(1e8, dtype=torch.float64)
    ),
    "drift": lambda shape: torch.randn(shape, dtype=torch.float64) + torch.linspace(0, 1e4, shape[0])[:, None],
}


@pytest.mark.parametrize("kind", ILL)
@pytest.mark.parametrize("pattern", ["n d -> n", "n d -> d", "n d -> "])
def test_never_less_accurate_than_pytorch(launch, kind, pattern):
    torch.manual_seed(0)
    x = ILL[kind]((64, 31)).float()
    eps = 1e-44 if "1e-20" in kind else 1e-5
    dims = {"n d -> n": 1, "n d -> d": 0, "n d -> ": (0, 1)}[pattern]
    u = x.double() - x.double().mean(dims, keepdim=True)
    want = u / (u.square().mean(dims, keepdim=True) + eps).sqrt()
    ours = evenly.normalize(x, pattern, eps=eps)
    flat = {"n d -> n": x[None], "n d -> d": x.T[None], "n d -> ": x.reshape(1, 1, -1)}[pattern]
    theirs = F.batch_norm(flat, None, None, training=True, eps=eps)[0]
    theirs = theirs.T if pattern == "n d -> d" else theirs.reshape(64, 31)

    def error(y: Tensor) -> float:
        return float(((y.double() - want).abs().max() / want.abs().max()).nan_to_num(nan=float("inf")))

    # Two units in the last place are the rounding of x - mean, of 1/s and of their product. With one outlier the other
    # squares are equal, and all rounded the same way by the interpreter, which adds a column one after another.
    limit = 2**-19 if "outlier" in kind else 2**-22
    assert error(ours) <= max(error(theirs), limit), (kind, error(ours), error(theirs))
    assert error(ours) < 2e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("pattern", ["n d -> n", "n d -> d", "n d -> "])
def test_nan_and_infinity_stay_where_they_belong(launch, bad, pattern):
    x = torch.randn(9, 40)
    x[3, 7] = bad
    want = reference.normalize(x, bind(pattern, x.shape), reference.Call()).y
    torch.testing.assert_close(evenly.normalize(x, pattern), want, equal_nan=True, rtol=1e-5, atol=1e-5)
    m = evenly.moments(x, pattern)
    assert torch.equal(m.mean.isfinite(), m.var.isfinite())
    assert int((~m.mean.isfinite()).sum()) == 1


@pytest.mark.parametrize(("pattern", "shape", "last"), PATTERNS[:2] + PATTERNS[4:])
def test_the_same_bits_from_run_to_run(launch, pattern, shape, last):
    torch.manual_seed(0)
    x = laid(shape, last).requires_grad_()
    w = torch.randn(shape[1]).requires_grad_()
    axes = "c" if len(shape) == 4 else "d"

    def once() -> list[Tensor]:
        y = evenly.normalize(x, pattern, weight=w, bias=w, affine=axes, activation="silu")
        return [y.detach(), *torch.autograd.grad(y, (x, w), torch.ones_like(y))]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))
