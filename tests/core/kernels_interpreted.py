"""The CUDA kernels under Triton's interpreter, on tensors of the CPU; run by ``test_cuda_kernels.py``.

Triton looks for ``TRITON_INTERPRET`` when it is first imported, so that this is a process of its own.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from core import oracle
from torch import Tensor
from torch.nn import functional as F

import evenly
from evenly.core.kernels import cuda, operator, reference
from evenly.core.kernels.cuda import entry as launches
from evenly.core.patterns import bind

operator.serve("cpu", cuda.load)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
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
LAUNCHES = {"fused": {}, "split": {"fused": 1, "tile": 64, "columns": 8, "programs": 3, "gradient": 16}}
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
    from evenly.core import patterns

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
        for step in (0, 1, 2 + number % 2):
            turn = number * 4 + step
            how = HOW[(number + 3 * step) % len(HOW)] if case.pattern != "n d -> n d" and case.shape[0] > 1 else {}
            dtype = DTYPES[step]
            if how.get("scale") == "l2" and dtype == torch.float64:
                how = {}
            act = ACTIVATIONS[(number + step) % 4]
            yield pytest.param(case, dtype, how, act, turn % 3 != 1, turn % 4, id=f"{number}-{step}")


@pytest.mark.parametrize(("case", "dtype", "how", "act", "residual", "offset"), list(grid()))
def test_against_float64(launch, case, dtype, how, act, residual, offset):
    x, w, b, r, dy = leaves(case, dtype, offset, residual)
    inputs = [t.detach().requires_grad_() for t in (x, w, b, *([r] if residual else []))]
    rest = inputs[3] if residual else None
    y = evenly.normalize(
        inputs[0], case.pattern, weight=inputs[1], bias=inputs[2], affine=case.affine, residual=rest,
        activation=act, **how,
    )  # fmt: skip
    assert type(y.grad_fn).__name__ == "_NormalizeBackward"
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
