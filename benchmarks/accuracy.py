"""Error of normalization on ill-conditioned input, beside PyTorch's.

    python benchmarks/accuracy.py                # operators x inputs x dtypes, forward and gradient
    python benchmarks/accuracy.py --quick        # two operators on small input
    python benchmarks/accuracy.py --json out.json

Both get the same values, rounded to the dtype, and are compared with the definition in float64. An error is the
largest of all elements, over the largest exact value, in units of the dtype's spacing at 1
(``torch.finfo(dtype).eps``): half of one is the rounding of the largest value alone. The gradients are those of x, and
of weight and bias, for one random gradient of the output. A cell is *worse* if our error is above 1.05 times PyTorch's
and more than one unit above it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import evenly

SHAPE = (16, 32, 24, 24)
QUICK_SHAPE = (4, 8, 6, 6)
GROUPS = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

LAYOUTS = ("contiguous", "channels_last")


def _outlier(z: Tensor) -> Tensor:
    z = z.clone()
    z.view(-1)[z.numel() // 3] = 1e8
    return z


@dataclass(frozen=True)
class Input:
    """Values made from normal ones, and the eps that leaves something to measure."""

    make: Callable[[Tensor], Tensor]
    eps: float | None = None


INPUTS = {
    "normal": Input(lambda z: z),
    "mean 1e4, std 1": Input(lambda z: z + 1e4),
    "values of 1e-20": Input(lambda z: z * 1e-20),
    "values of 1e-20, eps 1e-44": Input(lambda z: z * 1e-20, 1e-44),
    "values of 1e20": Input(lambda z: z * 1e20),
    "one outlier of 1e8": Input(_outlier),
}


@dataclass(frozen=True)
class Operator:
    """One normalization: ours, PyTorch's, and the axes of the statistic after x is reshaped for the definition."""

    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    split: bool  # the statistic is that of a group of channels
    dims: tuple[int, ...]
    affine: str  # "channel", "all" or ""
    center: bool = True
    norm: bool = False


def _batch(x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    return functional.batch_norm(x, None, None, w, b, training=True, eps=eps)


OPERATORS = {
    "batch": Operator(
        lambda x, w, b, eps: evenly.normalize(x, "n c h w -> c", weight=w, bias=b, eps=eps),
        _batch, False, (0, 2, 3), "channel",
    ),
    "instance": Operator(
        lambda x, w, b, eps: evenly.normalize(x, "n c h w -> n c", weight=w, bias=b, affine="c", eps=eps),
        lambda x, w, b, eps: functional.instance_norm(x, weight=w, bias=b, eps=eps),
        False, (2, 3), "channel",
    ),
    "group": Operator(
        lambda x, w, b, eps: evenly.normalize(
            x, "n (g c) h w -> n g", g=GROUPS, weight=w, bias=b, affine="(g c)", eps=eps
        ),
        lambda x, w, b, eps: functional.group_norm(x, GROUPS, w, b, eps),
        True, (2, 3, 4), "channel",
    ),
    "layer": Operator(
        lambda x, w, b, eps: evenly.normalize(x, "n c h w -> n", weight=w, bias=b, affine="c h w", eps=eps),
        lambda x, w, b, eps: functional.layer_norm(x, x.shape[1:], w, b, eps),
        False, (1, 2, 3), "all",
    ),
    "rms": Operator(
        lambda x, w, b, eps: evenly.normalize(
            x, "n c h w -> n", center=False, scale="rms", weight=w, affine="c h w", eps=eps
        ),
        lambda x, w, b, eps: functional.rms_norm(x, x.shape[1:], w, eps),
        False, (1, 2, 3), "weight", center=False,
    ),
    "l2": Operator(
        lambda x, w, b, eps: evenly.normalize(x, "n c h w -> n c h", center=False, scale="l2", eps=eps),
        lambda x, w, b, eps: functional.normalize(x, dim=-1, eps=eps),
        False, (3,), "", center=False, norm=True,
    ),
}  # fmt: skip


def definition(op: Operator, x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
    """The result in the dtype of the arguments, from the equations."""
    v = x.unflatten(1, (GROUPS, -1)) if op.split else x
    if op.center:
        v = v - v.mean(op.dims, keepdim=True)
    square = v.square()
    if op.norm:
        v = v / square.sum(op.dims, keepdim=True).sqrt().clamp(min=eps)
    else:
        v = v / (square.mean(op.dims, keepdim=True) + eps).sqrt()
    v = v.reshape(x.shape)
    if w is not None:
        v = v * (w if w.ndim > 1 else w[:, None, None])
    if b is not None:
        v = v + (b if b.ndim > 1 else b[:, None, None])
    return v


def cell(name: str, kind: str, dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Errors of one operator on one input in one dtype and memory layout."""
    op, how = OPERATORS[name], INPUTS[kind]
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = how.make(z).to(dtype)
    dy = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "channels_last":
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    width = shape[1:2] if op.affine == "channel" else shape[1:]
    w = b = None
    if op.affine:
        w = (torch.rand(width, generator=generator, dtype=torch.float64) + 0.5).to(dtype)
        b = torch.randn(width, generator=generator, dtype=torch.float64).to(dtype) if op.affine != "weight" else None
    eps = how.eps if how.eps is not None else 1e-12 if op.norm else 1e-5

    def run(f: Callable[..., Tensor], wide: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        leaves = [t if t is None else (t.double() if wide else t).detach().clone().requires_grad_() for t in (x, w, b)]
        y = f(*leaves, eps)
        grads = torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(y.dtype))
        return y.detach(), grads[0], list(grads[1:])

    exact = run(lambda *a: definition(op, *a), True)
    unit = torch.finfo(dtype).eps

    def error(found: Tensor, want: Tensor) -> float:
        size = float(want.abs().max())
        off = float((found.double() - want).abs().max()) / (size or 1.0) / unit
        return off if math.isfinite(off) else math.inf

    row: dict[str, Any] = {"operator": name, "input": kind, "dtype": str(dtype)[6:], "layout": layout}
    found = {"evenly": run(op.ours, False), "torch": run(op.theirs, False)}
    for part, index in (("forward", 0), ("gradient of x", 1), ("gradient of weight and bias", 2)):
        if index == 2 and not exact[2]:
            continue
        errors = {}
        for who, result in found.items():
            if index < 2:
                errors[who] = error(result[index], exact[index])
            else:
                errors[who] = max(error(f, e) for f, e in zip(result[2], exact[2], strict=True))
        a, t = errors["evenly"], errors["torch"]
        row[part] = {"evenly": _digits(a), "torch": _digits(t), "worse": bool(a > 1.05 * t and a > t + 1)}
    return row


def _digits(error: float) -> float | None:
    """Three digits; None where the result is not finite."""
    return float(f"{error:.3g}") if math.isfinite(error) else None


PARTS = ("forward", "gradient of x", "gradient of weight and bias")


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """For each input and dtype, the largest error over the operators: lines of a Markdown table."""
    lines = [
        "| input | dtype | forward: ours / PyTorch | gradient of x | of weight and bias | cells that are worse |",
        "|---|---|---|---|---|---|",
    ]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for kind in dict.fromkeys(row["input"] for row in rows):
            mine = [row for row in rows if row["input"] == kind and row["dtype"] == dtype]
            cells, worse, total = [], 0, 0
            for part in PARTS:
                found = [row[part] for row in mine if part in row]
                worst = [max((math.inf if f[who] is None else f[who]) for f in found) for who in ("evenly", "torch")]
                cells.append(" / ".join("not finite" if math.isinf(v) else f"{v:.3g}" for v in worst))
                worse += sum(f["worse"] for f in found)
                total += len(found)
            lines.append(f"| {kind} | {dtype} | " + " | ".join(cells) + f" | {worse} of {total} |")
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="batch and layer norm on small input")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    print(f"{'operator':10}{'input':28}{'dtype':10}{'layout':15}" + "".join(f"{part:>30}" for part in PARTS))
    print(f"{'':63}" + f"{'ours':>12}{'PyTorch':>10}{'ratio':>8}" * len(PARTS))
    for dtype in DTYPES.values():
        for name in ("batch", "layer") if options.quick else OPERATORS:
            for kind, layout in itertools.product(INPUTS, LAYOUTS):
                row = cell(name, kind, dtype, layout, QUICK_SHAPE if options.quick else SHAPE)
                rows.append(row)
                line = f"{name:10}{kind:28}{row['dtype']:10}{layout:15}"
                for part in PARTS:
                    if part not in row:
                        continue
                    a, t = row[part]["evenly"], row[part]["torch"]
                    ratio = f"{a / t:.2f}" if a is not None and t else "-"
                    shown = ["inf" if v is None else f"{v:.3g}" for v in (a, t)]
                    line += f"{shown[0]:>12}{shown[1]:>10}{ratio:>7}{'!' if row[part]['worse'] else ' '}"
                print(line)
    print("\nLargest error over the operators, in units of the dtype's spacing; worse: by more than rounding")
    print("\n".join(summary(rows)))
    if options.json:
        facts = {"torch": torch.__version__, "machine": platform.machine(), "shape": list(SHAPE)}
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
