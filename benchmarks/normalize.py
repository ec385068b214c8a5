"""Time of normalization against its peers, and against the time to move the same bytes.

    python benchmarks/normalize.py                       # the full grid, CPU
    python benchmarks/normalize.py --quick               # a smoke test of a minute
    python benchmarks/normalize.py --json out.json --threads 2
    python benchmarks/normalize.py --device cuda
    python benchmarks/normalize.py --clock cpu           # on a busy machine: CPU time of one thread

All contestants of a cell run interleaved in one process, in another order each round; a number is the median of
several rounds. Both the forward pass without gradient and forward + backward are timed. The limit is the time of copies
that move the same bytes, a copy of the input that allocates its output: one (forward), 2.5 (forward + backward: read x,
write y; read x and dy, write dx), with a residual 1.5 and 3.5 (it is read, and its gradient written). Ratios above 1
mean that evenly is faster than the peer; ours / limit is how many times the limit it takes, below 1 where it writes
past the caches and PyTorch's copy does not.

On CUDA times are those between events, the bandwidth of a copy of 1 GiB is printed first, and Liger-Kernel is a peer
where it is installed (layer, RMS and group norm, plain).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

import evenly

IMAGES = ((32, 64, 56, 56), (8, 256, 28, 28), (2, 512, 7, 7), (64, 16, 8, 8))
TOKENS = ((16, 1024, 768), (4, 2048, 4096), (1, 1, 4096), (4096, 256))
WEIGHTS = ((512, 512, 3, 3),)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FUSED = {
    "plain": (None, False),
    "relu": ("relu", False),
    "silu": ("silu", False),
    "residual+relu": ("relu", True),
}


@dataclass(frozen=True)
class Cell:
    """One line of the table."""

    operator: str
    shape: tuple[int, ...]
    layout: str  # "contiguous" or "channels_last"
    dtype: str
    fused: str

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        last = " cl" if self.layout == "channels_last" else ""
        return f"{self.operator} {shape}{last} {self.dtype} {self.fused}"


def cells(quick: bool) -> list[Cell]:
    """The grid: every operator and shape plain in float32; fused forms and bfloat16 on the large shapes."""
    found = []
    images = IMAGES[2:] if quick else IMAGES
    tokens = TOKENS[2:] if quick else TOKENS
    for operator in ("batch", "batch-eval", "group", "instance"):
        for shape in images:
            for layout in ("contiguous", "channels_last"):
                for dtype in DTYPES:
                    found.append(Cell(operator, shape, layout, dtype, "plain"))
    for shape in images[:2]:
        for operator in ("batch", "group"):
            for fused in ("relu", "silu", "residual+relu"):
                found.append(Cell(operator, shape, "contiguous", "float32", fused))
        found.append(Cell("batch", shape, "channels_last", "float32", "residual+relu"))
        found.append(Cell("batch-eval", shape, "contiguous", "float32", "residual+relu"))
    for operator in ("layer", "rms", "l2"):
        for shape in tokens:
            for dtype in DTYPES:
                found.append(Cell(operator, shape, "contiguous", dtype, "plain"))
    for fused in ("relu", "silu", "residual+relu"):
        found.append(Cell("layer", tokens[0], "contiguous", "float32", fused))
    found.append(Cell("batch", (4096, 256), "contiguous", "float32", "plain"))
    for shape in WEIGHTS:
        for dtype in DTYPES:
            found.append(Cell("weight", shape, "contiguous", dtype, "plain"))
    return found


# ---- contestants ----------------------------------------------------------------------------------------------------


def _groups(channels: int) -> int:
    return min(32, channels // 2)


def ours(cell: Cell, options: dict[str, Any]) -> Callable[[Tensor, Tensor | None], Tensor]:
    """evenly's layer, or its function where it has no layer."""
    activation, _ = FUSED[cell.fused]
    channels = cell.shape[1]
    layer: nn.Module
    if cell.operator in ("batch", "batch-eval"):
        layer = evenly.nn.BatchNorm(channels, activation=activation, **options)
        return layer.train(cell.operator == "batch")
    if cell.operator == "group":
        return evenly.nn.GroupNorm(_groups(channels), channels, activation=activation, **options)
    if cell.operator == "instance":
        return evenly.nn.InstanceNorm(channels, affine=True, activation=activation, **options)
    if cell.operator == "layer":
        return evenly.nn.LayerNorm(cell.shape[-1], activation=activation, **options)
    if cell.operator == "rms":
        return evenly.nn.RMSNorm(cell.shape[-1], eps=1e-5, activation=activation, **options)
    if cell.operator == "l2":
        return lambda x, r: evenly.normalize(x, "... d -> ...", center=False, scale="l2", residual=r)
    return lambda x, r: evenly.normalize(x, "o i kh kw -> o", residual=r)


def eager(cell: Cell, options: dict[str, Any]) -> Callable[[Tensor, Tensor | None], Tensor]:
    """What a PyTorch user writes."""
    activation, _ = FUSED[cell.fused]
    channels = cell.shape[1]
    norm: Callable[[Tensor], Tensor]
    if cell.operator in ("batch", "batch-eval"):
        kind = nn.BatchNorm2d if len(cell.shape) == 4 else nn.BatchNorm1d
        norm = kind(channels, **options).train(cell.operator == "batch")
    elif cell.operator == "group":
        norm = nn.GroupNorm(_groups(channels), channels, **options)
    elif cell.operator == "instance":
        norm = nn.InstanceNorm2d(channels, affine=True, **options)
    elif cell.operator == "layer":
        norm = nn.LayerNorm(cell.shape[-1], **options)
    elif cell.operator == "rms":
        norm = nn.RMSNorm(cell.shape[-1], eps=1e-5, **options)
    elif cell.operator == "l2":
        norm = lambda x: F.normalize(x, dim=-1)  # noqa: E731
    else:
        norm = _weight_standardization

    def run(x: Tensor, r: Tensor | None) -> Tensor:
        y = norm(x)
        if r is not None:
            y = y + r
        return y if activation is None else getattr(F, activation)(y)

    run.norm = norm  # type: ignore[attr-defined]
    return run


def _weight_standardization(w: Tensor) -> Tensor:
    flat = w.reshape(1, w.shape[0], -1)
    return F.batch_norm(flat, None, None, training=True).reshape(w.shape)


def composition(cell: Cell, norm: Any) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The same by einops and arithmetic."""
    activation, _ = FUSED[cell.fused]

    def channels(p: Tensor) -> Tensor:
        return rearrange(p, "c -> c 1 1") if len(cell.shape) == 4 else p

    def run(x: Tensor, r: Tensor | None) -> Tensor:
        if cell.operator == "l2":
            y = x / reduce(x.square(), "... d -> ... 1", "sum").sqrt().clamp(min=1e-12)
        elif cell.operator == "rms":
            y = x * (reduce(x.square(), "... d -> ... 1", "mean") + 1e-5).rsqrt() * norm.weight
        elif cell.operator == "layer":
            d = x - reduce(x, "... d -> ... 1", "mean")
            y = d * (reduce(d.square(), "... d -> ... 1", "mean") + 1e-5).rsqrt() * norm.weight + norm.bias
        elif cell.operator == "weight":
            d = x - reduce(x, "o i kh kw -> o 1 1 1", "mean")
            y = d * (reduce(d.square(), "o i kh kw -> o 1 1 1", "mean") + 1e-5).rsqrt()
        elif cell.operator == "batch-eval":
            scale = (norm.running_var + 1e-5).rsqrt() * norm.weight
            y = (x - channels(norm.running_mean)) * channels(scale) + channels(norm.bias)
        elif cell.operator == "group":
            g = rearrange(x, "n (g c) h w -> n g c h w", g=norm.num_groups)
            d = g - reduce(g, "n g c h w -> n g 1 1 1", "mean")
            d = d * (reduce(d.square(), "n g c h w -> n g 1 1 1", "mean") + 1e-5).rsqrt()
            y = rearrange(d, "n g c h w -> n (g c) h w") * channels(norm.weight) + channels(norm.bias)
        else:
            where = {"batch": "n c ... -> 1 c ...", "instance": "n c ... -> n c ..."}[cell.operator]
            spatial = " 1 1" if len(cell.shape) == 4 else ""
            left = "n c h w" if len(cell.shape) == 4 else "n c"
            right = where.split("->")[1].replace(" ...", spatial)
            d = x - reduce(x, f"{left} ->{right}", "mean")
            d = d * (reduce(d.square(), f"{left} ->{right}", "mean") + 1e-5).rsqrt()
            y = d * channels(norm.weight) + channels(norm.bias)
        if r is not None:
            y = y + r
        return y if activation is None else getattr(F, activation)(y)

    return run


def liger(cell: Cell, options: dict[str, Any]) -> nn.Module | None:
    """Liger-Kernel's layer; None where it has none, or is not installed."""
    if options["device"].type != "cuda" or cell.fused != "plain" or cell.layout != "contiguous":
        return None
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers import LigerLayerNorm, LigerRMSNorm
    from liger_kernel.transformers.group_norm import LigerGroupNorm

    if cell.operator == "layer":
        return LigerLayerNorm(cell.shape[-1], eps=1e-5).to(**options)
    if cell.operator == "rms":
        return LigerRMSNorm(cell.shape[-1], eps=1e-5).to(**options)
    if cell.operator == "group":
        return LigerGroupNorm(cell.shape[1], _groups(cell.shape[1]), eps=1e-5).to(**options)
    return None


# ---- timing ---------------------------------------------------------------------------------------------------------


def _clock(name: str) -> Callable[[], float]:
    if name == "cpu":
        return lambda: time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID)
    return time.perf_counter


def by_clock(clock: Callable[[], float]) -> Callable[[Callable[[], Any], int], float]:
    """Seconds of a number of calls by a clock."""

    def seconds(run: Callable[[], Any], repeats: int) -> float:
        start = clock()
        for _ in range(repeats):
            run()
        return clock() - start

    return seconds


def by_events(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of a number of calls on the current CUDA stream, between two events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy of 1 GiB reads and writes."""
    source = torch.empty(1 << 28, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.numel() * 4 * 10 / by_events(lambda: target.copy_(source), 10)


def interleaved(
    contestants: dict[str, Callable[[], Any]],
    timer: Callable[[Callable[[], Any], int], float],
    rounds: int,
    seconds: float,
) -> dict[str, float]:
    """Median seconds of each, run in turn, in another order each round: who follows finds what the one before left.

    Memory that one gives back to the system the next has to ask for, page by page.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    repeats = {}
    for name, run in contestants.items():
        timer(run, 1)
        repeats[name] = max(1, min(100, int(1e-3 / max(timer(run, 1), 1e-7))))
    begin = time.perf_counter()
    order = random.Random(0)
    turns = list(contestants.items())
    for number in range(rounds):
        order.shuffle(turns)
        for name, run in turns:
            times[name].append(timer(run, repeats[name]) / repeats[name])
        if number >= 4 and time.perf_counter() - begin > seconds:
            break
    return {name: statistics.median(each) for name, each in times.items()}


def measure(cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """Times of one cell."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    device, dtype = torch.device(args.device), DTYPES[cell.dtype]
    options = {"device": device, "dtype": dtype}
    _, with_residual = FUSED[cell.fused]

    def made() -> Tensor:
        t = torch.randn(cell.shape, device=device).to(dtype)
        return t.contiguous(memory_format=torch.channels_last) if cell.layout == "channels_last" else t

    x, dy = made(), made()
    r = made() if with_residual else None
    peer = eager(cell, options)
    runs = {"evenly": ours(cell, options), "eager": peer, "einops": composition(cell, peer.norm)}  # type: ignore[attr-defined]
    other = liger(cell, options)
    if other is not None:
        runs["liger"] = lambda x, r: other(x)
        runs["liger"].norm = other  # type: ignore[attr-defined]
    if args.compile:
        runs["compile"] = torch.compile(eager(cell, options), dynamic=False)

    def forward(run: Any) -> Callable[[], Any]:
        def call() -> None:
            with torch.no_grad():
                run(x, r)

        return call

    def both(run: Any) -> Callable[[], Any]:
        leaf = x.clone().requires_grad_()
        extra = None if r is None else r.clone().requires_grad_()
        module = run if isinstance(run, nn.Module) else getattr(run, "norm", None)
        parameters = list(module.parameters()) if isinstance(module, nn.Module) else []
        inputs = [leaf, *([] if extra is None else [extra]), *parameters]

        def call() -> None:
            torch.autograd.grad(run(leaf, extra), inputs, dy, allow_unused=True)

        return call

    timer = by_events if args.device == "cuda" else by_clock(_clock(args.clock))
    rounds, seconds = (7, 0.3) if args.quick else (25, args.seconds)
    copy = {"copy": lambda: x.clone()}
    fwd = interleaved({n: forward(f) for n, f in runs.items()} | copy, timer, rounds, seconds)
    fb = interleaved({n: both(f) for n, f in runs.items()} | copy, timer, rounds, seconds)
    row: dict[str, Any] = {
        "operator": cell.operator,
        "shape": list(cell.shape),
        "layout": cell.layout,
        "dtype": cell.dtype,
        "fused": cell.fused,
    }
    for name, found, copies in (
        ("forward", fwd, 1.5 if r is not None else 1.0),
        ("both", fb, 3.5 if r is not None else 2.5),
    ):
        peers = {n: t for n, t in found.items() if n not in ("evenly", "copy")}
        best = min(peers, key=lambda n: peers[n])
        row[name] = {
            "seconds": found,
            "best_peer": best,
            "speedup": peers[best] / found["evenly"],
            "speedup_eager": found["eager"] / found["evenly"],
            "over_limit": found["evenly"] / (copies * found["copy"]),
        }
    return row


def _geometric(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else float("nan")


def main() -> None:
    """Run the grid and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: time of one thread, implies 1")
    parser.add_argument("--seconds", type=float, default=1.5, help="time a cell and direction may take")
    parser.add_argument("--only", help="cells whose name contains this")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    args = parser.parse_args()
    if args.clock == "cpu":
        args.threads = 1
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: PyTorch {torch.__version__} sees no CUDA device; the default is --device cpu.")
    if args.device == "cuda" and args.clock == "cpu":
        parser.error("--clock cpu measures the time of the CPU; on CUDA times are those between events.")

    rows = []
    chosen = [cell for cell in cells(args.quick) if not args.only or args.only in str(cell)]
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, clock: {args.clock}")
    if args.device == "cuda":
        device = torch.device("cuda")
        print(f"{torch.cuda.get_device_name(device)}, copy bandwidth {copy_bandwidth(device) / 1e9:.0f} GB/s")
    print(f"{'':52s}  forward: us   best peer    /limit   both: us   best peer    /limit")
    for cell in chosen:
        row = measure(cell, args)
        rows.append(row)
        f, b = row["forward"], row["both"]
        print(
            f"{cell!s:52s} {f['seconds']['evenly'] * 1e6:10.1f} {f['speedup']:6.2f}x {f['best_peer']:7s}"
            f"{f['over_limit']:6.2f} {b['seconds']['evenly'] * 1e6:10.1f} {b['speedup']:6.2f}x {b['best_peer']:7s}"
            f"{b['over_limit']:6.2f}",
            flush=True,
        )
    summary = {}
    for name in ("forward", "both"):
        speedups = [row[name]["speedup"] for row in rows]
        large = [
            row[name]["over_limit"]
            for row in rows
            if math.prod(row["shape"]) * (4 if row["dtype"] == "float32" else 2) >= 2**24
        ]
        fused = [row[name]["speedup_eager"] for row in rows if row["fused"] == "residual+relu"]
        summary[name] = {
            "geometric_mean_speedup": _geometric(speedups),
            "worst_speedup": min(speedups, default=float("nan")),
            "below_0.9": sum(s < 0.9 for s in speedups),
            "worst_over_limit_from_16MiB": max(large, default=float("nan")),
            "fused_over_eager": _geometric(fused),
        }
        text = ", ".join(f"{key} {value:.2f}" for key, value in summary[name].items())
        print(f"{name}: {text}")
    if args.json:
        info = {"torch": torch.__version__, "threads": torch.get_num_threads(), "clock": args.clock}
        args.json.write_text(json.dumps({"setup": info, "summary": summary, "cells": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
