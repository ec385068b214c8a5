"""Time of the layers on manifolds, forward and backward, beside plain autograd and the authors' code.

    python benchmarks/manifolds.py                        # covariance matrices of several sizes, float64
    python benchmarks/manifolds.py --quick                # few rounds
    python benchmarks/manifolds.py --peers FOLDER         # also the authors' layers, where that folder holds them
    python benchmarks/manifolds.py --threads 1 --clock process --json out.json

All layers of an input run in turn, round after round, on the same matrices; printed are medians, the ratio to the plain
SPD batch normalization (Riemannian mean by one step of the Karcher flow, congruence with its root, no variance) and the
ratio to the named peer. "plain" layers are written here in a few lines of torch: their gradients go through
``torch.linalg.eigh``, which is infinite at equal eigenvalues. The authors' toolbox (GitZH-Chen/LieBN, package
``LieBN``) is not part of this repository; it is timed where ``--peers`` leads to it. It imports geoopt and, for its
rotations, pytorch3d.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evenly.manifolds import LieBNSPD

SHAPES = {"256 of 8 x 8": (256, 8), "30 of 20 x 20": (30, 20), "30 of 64 x 64": (30, 64)}
METRICS: dict[str, dict[str, Any]] = {
    "LEM": {},
    "LCM": {},
    "LCM, θ 0.5": {"theta": 0.5},
    "AIM": {},
    "AIM, θ 1.5": {"theta": 1.5},
}
Contestants = dict[str, tuple[Callable[[int], nn.Module], str | None]]


def function(a: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of symmetric matrices as one writes it."""
    values, vectors = torch.linalg.eigh(a)
    return (vectors * f(values).unsqueeze(-2)) @ vectors.mT


def plain_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the Karcher flow; the mean and the inverse of its root."""
    mean = x.mean(0)
    half, back = function(mean, torch.sqrt), function(mean, torch.rsqrt)
    mean = half @ function(function(back @ x @ back, torch.log).mean(0), torch.exp) @ half
    return mean, function(mean, torch.rsqrt)


class PlainSPDBatchNorm(nn.Module):
    """Centre by the Riemannian mean, bias by congruence: SPDNetBN."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.eye(n, dtype=torch.float64))
        self.register_buffer("running_mean", torch.eye(n, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            mean, back = plain_mean(x)
            half, other = function(self.running_mean, torch.sqrt), function(self.running_mean, torch.rsqrt)
            self.running_mean.copy_(half @ function(other @ mean @ other, lambda v: v**0.1) @ half)
        root = function(self.bias, torch.sqrt)
        return root @ back @ x @ back @ root


class PlainLieBN(nn.Module):
    """LieBN in plain torch, one step of the Karcher flow."""

    def __init__(self, n: int, metric: str, theta: float = 1.0) -> None:
        super().__init__()
        self.metric, self.theta = metric, theta
        self.bias = nn.Parameter(torch.eye(n, dtype=torch.float64))
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def deform(self, x: Tensor) -> Tensor:
        if self.metric == "LEM":
            return function(x, torch.log)
        if self.theta != 1:
            x = function(x, lambda v: v**self.theta)
        if self.metric == "AIM":
            return x
        k = torch.linalg.cholesky(x)
        return k.tril(-1) + torch.diag_embed(k.diagonal(dim1=-2, dim2=-1).log())

    def undeform(self, w: Tensor) -> Tensor:
        if self.metric == "LEM":
            return function(w, torch.exp)
        if self.metric == "LCM":
            k = w.tril(-1) + torch.diag_embed(w.diagonal(dim1=-2, dim2=-1).exp())
            w = k @ k.mT
        return w if self.theta == 1 else function(w, lambda v: v ** (1 / self.theta))

    def forward(self, x: Tensor) -> Tensor:
        w, by = self.deform(x), self.deform(self.bias)
        if self.metric != "AIM":
            w = w - w.mean(0).detach()
            var = w.detach().square().sum((-2, -1)).mean() / self.theta**2
            return self.undeform(w * self.weight / (var + 1e-5).sqrt() + by)
        with torch.no_grad():
            k = torch.linalg.cholesky(plain_mean(w)[0])
        w = torch.linalg.solve_triangular(k, w, upper=False)
        w = torch.linalg.solve_triangular(k, w.mT, upper=False)
        var = function(w.detach(), torch.log).square().sum((-2, -1)).mean() / self.theta**2
        w = function(w, lambda v: v ** (self.weight / (var + 1e-5).sqrt()))
        k = torch.linalg.cholesky(by)
        return self.undeform(k @ w @ k.mT)


def contestants() -> Contestants:
    """Every layer: how to make it for a size, and the peer to compare it with."""
    found: Contestants = {"SPD batch norm (plain)": (PlainSPDBatchNorm, None)}
    authors = _module("LieBN")
    for name, settings in METRICS.items():
        metric = name.split(",")[0]

        def ours(n: int, metric: str = metric, settings: dict[str, Any] = settings, **more: Any) -> nn.Module:
            return LieBNSPD(n, metric, dtype=torch.float64, **settings, **more)

        def plain(n: int, metric: str = metric, settings: dict[str, Any] = settings) -> nn.Module:
            return PlainLieBN(n, metric, **settings)

        found[f"LieBN {name} (plain)"] = plain, None
        if authors is not None:

            def theirs(n: int, metric: str = metric, settings: dict[str, Any] = settings) -> nn.Module:
                return authors.LieBNSPD([n, n], metric=metric, power=settings.get("theta", 1.0)).double()

            found[f"LieBN {name} (authors)"] = theirs, None
        peer = f"LieBN {name} ({'plain' if authors is None else 'authors'})"
        if metric == "AIM":
            found[f"LieBNSPD {name}, 1 step"] = lambda n, make=ours: make(n, karcher_steps=1), peer
        found[f"LieBNSPD {name}"] = ours, peer
    return found


def _module(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError:
        return None


def measure(count: int, n: int, found: Contestants, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Median times of every layer on one input, in milliseconds."""
    torch.manual_seed(0)
    a = torch.randn(count, n, 2 * n, dtype=torch.float64)
    x = (a @ a.mT / (2 * n)).requires_grad_()
    grad = torch.randn(count, n, n, dtype=torch.float64)
    grad = grad + grad.mT
    layers = {name: make(n) for name, (make, _) in found.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
    for turn in range(rounds + 2):  # the first two are not counted
        for name, layer in layers.items():
            x.grad = None
            layer.zero_grad()
            started = clock()
            y = layer(x)
            between = clock()
            y.backward(grad)
            ended = clock()
            if turn > 1:
                times[name].append((between - started, ended - started))
    return {
        name: {
            "forward_ms": 1e3 * statistics.median(t[0] for t in found_times),
            "both_ms": 1e3 * statistics.median(t[1] for t in found_times),
        }
        for name, found_times in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 rounds instead of 21")
    parser.add_argument("--only", nargs="*", help="inputs whose name contains one of these words")
    parser.add_argument("--peers", type=Path, help="a folder with the authors' package LieBN")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--clock", choices=("wall", "process"), default="wall")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    args = parser.parse_args()
    if args.peers is not None:
        sys.path.insert(0, str(args.peers))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    rounds = 5 if args.quick else 21
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, float64, median of "
        f"{rounds} rounds, {args.clock} clock"
    )
    found, tables = contestants(), {}
    for name, (count, n) in SHAPES.items():
        if args.only and not any(word in name for word in args.only):
            continue
        rows = measure(count, n, found, rounds, clock)
        plain = rows["SPD batch norm (plain)"]["both_ms"]
        print(f"\n{name}\n{'layer':32}{'forward':>10}{'fwd+bwd':>10}{'/ plain':>9}{'/ peer':>8}")
        for layer, row in rows.items():
            peer = found[layer][1]
            row["ratio_plain"] = row["both_ms"] / plain
            row["ratio_peer"] = row["both_ms"] / rows[peer]["both_ms"] if peer else None
            ratio = "" if row["ratio_peer"] is None else f"{row['ratio_peer']:.2f}"
            print(f"{layer:32}{row['forward_ms']:8.2f}ms{row['both_ms']:8.2f}ms{row['ratio_plain']:9.2f}{ratio:>8}")
        tables[name] = [{"method": "liebn", "layer": layer, **row} for layer, row in rows.items()]
    if args.json is not None:
        args.json.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
