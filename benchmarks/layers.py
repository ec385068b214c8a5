"""Time of the layers, forward and backward, beside torch's plain layer and the best public implementation.

    python benchmarks/layers.py                        # every layer on every input
    python benchmarks/layers.py --quick                # few rounds
    python benchmarks/layers.py --runs 3               # medians of three runs, and their range
    python benchmarks/layers.py --peers FOLDER         # also authors' modules that are found there
    python benchmarks/layers.py --threads 1 --clock process --json out.json

All layers of an input run in turn, in another order each round, on the same data; printed are medians, the ratio to
torch's plain layer (``BatchNorm2d``, ``LayerNorm``, ``BatchNorm1d``), the ratio to the named peer, and the bytes that a
layer keeps for its backward pass. Attention and blocks of transformers are compared with plain ones in the same way.
The clock ``process`` counts the processor's time, which a busy machine does not change; it adds up threads. Authors'
modules are not part of this repository: ``online_norm_pytorch`` (Cerebras) and ``mask_powernorm`` (sIncerass/powernorm)
are timed where ``--peers`` leads to them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import evenly.models as em
import evenly.nn as en
import evenly.weights as ew

BOUND = 1.5  # times the plain layer, forward + backward

#: Name: shape, torch's plain layer, contestants (name: how to make it, and the peer to compare with).
Made = dict[str, tuple[Callable[[], nn.Module], str | None]]


class PlainAttention(nn.Module):
    """Attention as one writes it with torch: with and without unit queries and keys."""

    def __init__(self, dim: int, heads: int, normalize: bool = False) -> None:
        super().__init__()
        self.heads, self.normalize = heads, normalize
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.scale = nn.Parameter(torch.tensor(14.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.normalize:
            q, k = nn.functional.normalize(q, dim=-1) * self.scale, nn.functional.normalize(k, dim=-1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0 if self.normalize else None)
        return self.out(y.transpose(1, 2).flatten(2))


class TorchAttention(nn.MultiheadAttention):
    """torch's module as self-attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class NGPTBlock(nn.Module):
    """A block of nGPT alone."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.block = em.NGPT(em.NGPTConfig(2, 1, heads, dim, 128)).blocks[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)[0]


def inputs() -> dict[str, tuple[tuple[int, ...], str, Made]]:
    """Every input with its layers; the second entry names the plain layer, the first of the contestants."""
    c, d = 64, 512
    images: Made = {
        "BatchNorm2d (torch)": (lambda: nn.BatchNorm2d(c), None),
        "GroupNorm (torch)": (lambda: nn.GroupNorm(32, c), None),
        "BatchNorm": (lambda: en.BatchNorm(c), "BatchNorm2d (torch)"),
        "BatchNorm (sync, one process)": (lambda: en.BatchNorm(c, sync=True), "BatchNorm2d (torch)"),
        "GroupNorm": (lambda: en.GroupNorm(32, c), "GroupNorm (torch)"),
        "BatchNorm2d + GroupNorm (torch)": (lambda: nn.Sequential(nn.BatchNorm2d(c), nn.GroupNorm(32, c)), None),
        "BCNorm": (lambda: en.BCNorm(c), "BatchNorm2d + GroupNorm (torch)"),
        "BCNorm (estimated)": (
            lambda: en.BCNorm(c, estimate=True, moving_speed=0.1),
            "BatchNorm2d + GroupNorm (torch)",
        ),
        "MeanOnlyBatchNorm": (lambda: en.MeanOnlyBatchNorm(c), "BatchNorm2d (torch)"),
        "EstBatchNorm": (lambda: en.EstBatchNorm(c, moving_speed=0.1), "BatchNorm2d (torch)"),
        "OnlineNorm": (lambda: en.OnlineNorm2d(c), "OnlineNorm2d (authors)"),
        "OnlineNorm (clamping)": (
            lambda: en.OnlineNorm2d(c, guard="activation_clamping"),
            "OnlineNorm2d (authors, clamping)",
        ),
    }
    tokens: Made = {
        "LayerNorm (torch)": (lambda: nn.LayerNorm(d), None),
        "RMSNorm (torch)": (lambda: nn.RMSNorm(d), None),
        "BatchNorm1d (torch)": (
            lambda: nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(d), nn.Unflatten(0, (32, 64))),
            None,
        ),
        "LayerNorm": (lambda: en.LayerNorm(d), "LayerNorm (torch)"),
        "PowerNorm": (lambda: en.PowerNorm(d, warmup_iters=0, group_num=8), "MaskPowerNorm (authors)"),
        "PowerNorm (no group scaling)": (
            lambda: en.PowerNorm(d, warmup_iters=0, group_scaling=False),
            "MaskPowerNorm (authors)",
        ),
        "PowerNormV": (lambda: en.PowerNormV(d), "RMSNorm (torch)"),
    }
    features: Made = {
        "BatchNorm1d (torch)": (lambda: nn.BatchNorm1d(d), None),
        "LayerNorm (torch)": (lambda: nn.LayerNorm(d), None),
        "MeanOnlyBatchNorm": (lambda: en.MeanOnlyBatchNorm(d), "BatchNorm1d (torch)"),
        "OnlineNorm": (lambda: en.OnlineNorm1d(d), "OnlineNorm1d (authors)"),
    }

    def conv() -> nn.Conv2d:
        return nn.Conv2d(c, c, 3, padding=1)

    weights: Made = {
        "Conv2d (torch)": (conv, None),
        "Conv2d, weight_norm (torch)": (lambda: nn.utils.parametrizations.weight_norm(conv()), None),
        "Conv2d, weight_norm": (lambda: ew.weight_norm(conv()), "Conv2d, weight_norm (torch)"),
        "Conv2d, weight_norm (exp)": (lambda: ew.weight_norm(conv(), gain="exp"), "Conv2d, weight_norm (torch)"),
    }
    linears: Made = {
        "Linear (torch)": (lambda: nn.Linear(d, d), None),
        "Linear, weight_norm (torch)": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(d, d)), None),
        "Linear, weight_norm": (lambda: ew.weight_norm(nn.Linear(d, d)), "Linear, weight_norm (torch)"),
    }
    attention: Made = {
        "attention (torch, plain)": (lambda: PlainAttention(256, 8), None),
        "MultiheadAttention (torch)": (lambda: TorchAttention(256, 8), None),
        "attention, normalize by hand": (lambda: PlainAttention(256, 8, normalize=True), None),
        "QKNormAttention": (lambda: en.QKNormAttention(256, 8, seq_len_p975=128), "attention, normalize by hand"),
        "QKNormAttention (a scale a head)": (
            lambda: en.QKNormAttention(256, 8, seq_len_p975=128, per_head_scale=True),
            "attention, normalize by hand",
        ),
    }
    block: dict[str, Any] = {"dim": 256, "num_heads": 8, "activation": "swiglu", "causal": True}
    blocks: Made = {
        "block, RMSNorm (torch)": (lambda: em.TransformerBlock(norm=nn.RMSNorm, **block), None),
        "block, RMSNorm": (lambda: em.TransformerBlock(norm="rms", **block), "block, RMSNorm (torch)"),
        "block, RMSNorm, qk l2": (
            lambda: em.TransformerBlock(norm="rms", qk_norm="l2", qk_scale=14.0, **block),
            "block, RMSNorm (torch)",
        ),
        "block, RMSNorm, qk rms": (
            lambda: em.TransformerBlock(norm="rms", qk_norm="rms", **block),
            "block, RMSNorm (torch)",
        ),
        "nGPT's block": (lambda: NGPTBlock(256, 8), "block, RMSNorm (torch)"),
    }
    authors = _module("online_norm_pytorch")
    if authors is not None:
        images["OnlineNorm2d (authors)"] = (lambda: authors.OnlineNorm2d(c, ecm="ls"), None)
        images["OnlineNorm2d (authors, clamping)"] = (lambda: authors.OnlineNorm2d(c, ecm="ac"), None)
        features["OnlineNorm1d (authors)"] = (lambda: authors.OnlineNorm1d(d, ecm="ls"), None)
    authors_power = _module("mask_powernorm")
    if authors_power is not None:
        made = lambda: authors_power.MaskPowerNorm(d, warmup_iters=0, group_num=8)  # noqa: E731
        tokens["MaskPowerNorm (authors)"] = (made, None)
    return {
        "images 32x64x28x28": ((32, c, 28, 28), "BatchNorm2d (torch)", images),
        "images 2x64x56x56": ((2, c, 56, 56), "BatchNorm2d (torch)", images),
        "tokens 32x64x512": ((32, 64, d), "LayerNorm (torch)", tokens),
        "attention 8x128x256": ((8, 128, 256), "attention (torch, plain)", attention),
        "blocks 8x128x256": ((8, 128, 256), "block, RMSNorm (torch)", blocks),
        "weights of Conv2d 64x64x3x3, 4 images": ((4, c, 28, 28), "Conv2d (torch)", weights),
        "weights of Linear 512x512, 128 samples": ((128, d), "Linear (torch)", linears),
        "features 128x512": ((128, d), "BatchNorm1d (torch)", features),
        "features 4096x512": ((4096, d), "BatchNorm1d (torch)", features),
    }


def _module(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError:
        return None


def measure(shape: tuple[int, ...], made: Made, rounds: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """Time every layer on one input; a row a layer."""
    torch.manual_seed(0)
    x = torch.randn(shape).requires_grad_()
    grad = torch.randn(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = {name: make() for name, (make, _) in made.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
    saved = {name: _saved_bytes(layer, x) for name, layer in layers.items()}
    order, turns = random.Random(0), list(layers.items())
    for turn in range(rounds + 2):  # the first two are not counted
        order.shuffle(turns)  # who follows finds what the one before left in caches and in the allocator
        for name, layer in turns:
            x.grad = None
            layer.zero_grad()
            started = clock()
            y = layer(x)
            between = clock()
            y.backward(grad)
            ended = clock()
            if turn > 1:
                times[name].append((between - started, ended - started))
    return [
        {
            "layer": name,
            "forward_ms": 1e3 * statistics.median(t[0] for t in times[name]),
            "both_ms": 1e3 * statistics.median(t[1] for t in times[name]),
            "saved_bytes": saved[name],
        }
        for name in layers
    ]


def _saved_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    """Bytes of distinct storage kept between the two passes, the input's own included."""
    seen: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(x)
    del y
    return sum(seen.values())


def _median(rows: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """One row of several runs: the median of each number, and the range of the ratio to the plain layer."""
    found = dict(rows[0])
    for name in ("forward_ms", "both_ms", "ratio_plain", "ratio_peer"):
        if found[name] is not None:
            found[name] = statistics.median(row[name] for row in rows)
    found["range"] = [min(row["ratio_plain"] for row in rows), max(row["ratio_plain"] for row in rows)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="7 rounds instead of 31")
    parser.add_argument("--runs", type=int, default=1, help="of each input, with layers made anew; medians are printed")
    parser.add_argument("--only", nargs="*", help="inputs whose name contains one of these words")
    parser.add_argument("--peers", type=Path, help="a folder with authors' modules")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--clock", choices=("wall", "process"), default="wall")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    args = parser.parse_args()
    if args.peers is not None:
        sys.path.insert(0, str(args.peers))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    rounds = 7 if args.quick else 31
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, median of {rounds} "
        f"rounds, {args.clock} clock" + (f", medians of {args.runs} runs and their range" if args.runs > 1 else "")
    )
    results = {}
    for name, (shape, plain, made) in inputs().items():
        if args.only and not any(word in name for word in args.only):
            continue
        runs = [measure(shape, made, rounds, clock) for _ in range(args.runs)]
        for run in runs:
            both = {row["layer"]: row["both_ms"] for row in run}
            for row in run:
                peer = made[row["layer"]][1]
                row["ratio_plain"] = row["both_ms"] / both[plain]
                row["ratio_peer"] = row["both_ms"] / both[peer] if peer in both else None
        rows = [_median(one) for one in zip(*runs, strict=True)]
        results[name] = rows
        size = 4 * torch.Size(shape).numel()
        print(f"\n{name}\n{'layer':36}{'forward':>9}{'fwd+bwd':>9}{'/ plain':>9}{'/ peer':>8}{'saved / input':>15}")
        for row in rows:
            layer = row["layer"]
            ratio = "" if row["ratio_peer"] is None else f"{row['ratio_peer']:.2f}"
            over = " " if row["ratio_plain"] <= BOUND or "torch" in layer or "authors" in layer else "!"
            spread = f"   {row['range'][0]:.2f} to {row['range'][1]:.2f}" if args.runs > 1 else ""
            print(
                f"{layer:36}{row['forward_ms']:7.2f}ms{row['both_ms']:7.2f}ms{row['ratio_plain']:8.2f}{over}{ratio:>8}"
                f"{row['saved_bytes'] / size:15.2f}{spread}"
            )
    print(f"\n! above {BOUND} times the plain layer of torch")
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
