"""Time and state of the optimizers' steps, beside what a user would pick instead.

    python benchmarks/optim.py                     # models of 1 and 100 million parameters
    python benchmarks/optim.py --quick             # 1 million only, few rounds
    python benchmarks/optim.py --json out.json

The model is a Transformer's parameters (no forward pass); gradients are random, and once more orthogonal to each
row of the weights, so that AdamP and SGDP project every matrix. All optimizers step in turn, round after round, on
the same parameters; of the large model each steps in turn with AdamW alone, so that no more than two hold a state,
and peers are compared by their ratios to it. Printed are medians, the ratio to ``torch.optim.AdamW(foreach=True)``,
the ratio to the peer named beside it, and the bytes of state that each holds. pytorch_optimizer's classes are timed
where it is installed. It has no SWAN: SWAN's peers are its Muon (and torch's), which also makes singular values
equal, and SWAN as its paper writes it, with ten coupled Newton-Schulz iterations, which is written out here; public
implementations take the same number of iterations.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import evenly.optim

SIZES = {"1M": (128, 4, 1024), "100M": (768, 11, 28000)}  # width, layers, vocabulary
BOUNDS = {"AdamP": 1.3, "SGDP": 1.3, "SinkGD": 1.3}  # of AdamW's step
SWAN_BOUND = 1.5  # times faster than its peer
BASE = "AdamW (torch, foreach)"
SLOW = ("SWAN", "SWAN (plain)")
SLOW_ROUNDS = 2  # of these on the large model
SLOWER = ("Muon (torch)", "Muon (peer)")  # small model only: their bfloat16 products take minutes on most CPUs

Make = Callable[[nn.Module], list[torch.optim.Optimizer]]


class PlainSWAN(torch.optim.Optimizer):
    """SWAN as its paper writes it: rows by their root mean square, then coupled Newton-Schulz on the Gram matrix."""

    def __init__(self, params, lr=1e-3, iterations=10):
        super().__init__(params, {"lr": lr, "iterations": iterations})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                g = p.grad / p.grad.pow(2).mean(1, keepdim=True).sqrt()
                x = g.mT if g.shape[0] > g.shape[1] else g
                y = x @ x.mT
                norm = y.norm()
                eye = torch.eye(len(y))
                y, z = y / norm, eye.clone()
                for _ in range(group["iterations"]):
                    t = (3 * eye - z @ y) / 2
                    y, z = y @ t, t @ z
                x = z @ x / norm.sqrt() * math.sqrt(max(g.shape))
                p.add_(x.mT if g.shape[0] > g.shape[1] else x, alpha=-group["lr"])


class Transformer(nn.Module):
    """The parameters of a decoder: embedding, layers of attention and MLP, norms."""

    def __init__(self, width: int, layers: int, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(nn.ModuleDict(_layer(width)) for _ in range(layers))
        self.norm = nn.LayerNorm(width)


def _layer(width: int) -> dict[str, nn.Module]:
    parts: dict[str, nn.Module] = {name: nn.Linear(width, width) for name in ("q", "k", "v", "out")}
    parts |= {"up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width)}
    return parts | {"norm1": nn.LayerNorm(width), "norm2": nn.LayerNorm(width)}


def contestants() -> dict[str, tuple[Make, str | None]]:
    """Name: how to make the optimizers of a model, and whom to compare with besides AdamW."""
    sgd = {"lr": 1e-4, "momentum": 0.9, "nesterov": True}
    made: dict[str, tuple[Make, str | None]] = {
        "AdamW (torch, foreach)": (lambda m: [torch.optim.AdamW(m.parameters(), foreach=True)], None),
        "AdamW (torch, fused)": (lambda m: [torch.optim.AdamW(m.parameters(), fused=True)], None),
        "SGD (torch, foreach)": (lambda m: [torch.optim.SGD(m.parameters(), foreach=True, **sgd)], None),
        "AdamP": (lambda m: [evenly.optim.AdamP(m.parameters(), weight_decay=1e-2)], "AdamP (peer)"),
        "AdamP (foreach=False)": (
            lambda m: [evenly.optim.AdamP(m.parameters(), weight_decay=1e-2, foreach=False)],
            "AdamP (peer)",
        ),
        "SGDP": (lambda m: [evenly.optim.SGDP(m.parameters(), weight_decay=1e-5, **sgd)], "SGDP (peer)"),
        "SinkGD": (lambda m: [evenly.optim.SinkGD(evenly.optim.for_model(m, lr=1e-3))], None),
        "SWAN": (lambda m: [evenly.optim.SWAN(evenly.optim.for_model(m, lr=1e-3))], "SWAN (plain)"),
        "SWAN (plain)": (lambda m: _split(m, lambda params: PlainSWAN(params)), None),
        "Muon (torch)": (lambda m: _split(m, lambda params: torch.optim.Muon(params)), None),
    }
    try:
        import pytorch_optimizer as peers
    except ImportError:
        print("pytorch_optimizer is not installed: its classes are left out")
        return made
    made["AdamP (peer)"] = (lambda m: [peers.AdamP(m.parameters(), weight_decay=1e-2)], None)
    made["SGDP (peer)"] = (lambda m: [peers.SGDP(m.parameters(), weight_decay=1e-5, **sgd)], None)
    made["Muon (peer)"] = (
        lambda m: _split(
            m, lambda params: peers.Muon([{"params": params, "use_muon": True, "lr": 1e-3, "weight_decay": 0.0}])
        ),
        None,
    )
    return made


def _split(
    model: nn.Module, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> list[torch.optim.Optimizer]:
    # The hidden matrices to one optimizer, the rest to fused AdamW, as SWAN's and SinkGD's groups have it.
    groups = evenly.optim.for_model(model)
    matrices = [p for group in groups if group["rule"] == "matrix" for _, p in group["params"]]
    rest = [p for group in groups if group["rule"] == "adam" for _, p in group["params"]]
    return [make(matrices), torch.optim.AdamW(rest, fused=True)]


def measure(size: str, rounds: int, only: list[str] | None, clock: Callable[[], float]) -> list[dict]:
    """Time every contestant on one size; a row a contestant. Of the large model two at a time hold their states."""
    makers = {name: entry for name, entry in contestants().items() if only is None or name in only}
    if size == "100M":
        makers = {name: entry for name, entry in makers.items() if name not in SLOWER}
    sittings = [list(makers)] if size == "1M" else [[BASE, name] for name in makers if name != BASE]
    found: dict[tuple[str, str], dict] = {}
    for sitting in sittings:
        turns = min(rounds, SLOW_ROUNDS) if size == "100M" and set(sitting) & set(SLOW) else rounds
        for row in _sit(size, {name: makers[name][0] for name in sitting}, turns, clock):
            found.setdefault((row["optimizer"], row["gradients"]), row)
            if len(sittings) > 1:
                print(f"{size}: {row['optimizer']}, {row['gradients']}: {row['ms']:.0f} ms", file=sys.stderr)
    for (name, kind), row in found.items():
        peer = found.get((makers[name][1] or "", kind))
        row["peer"] = peer["optimizer"] if peer else None
        # Each relative to AdamW beside it, so that two sittings compare.
        row["peer / ours"] = round(peer["of AdamW"] / row["of AdamW"], 2) if peer else None
    for row in found.values():
        row["of AdamW"] = round(row["of AdamW"], 3)
    return sorted(found.values(), key=lambda row: row["gradients"], reverse=True)


def _sit(size: str, makers: dict[str, Make], rounds: int, clock: Callable[[], float]) -> list[dict]:
    torch.manual_seed(0)
    model = Transformer(*SIZES[size])
    params = list(model.parameters())
    grads = [1e-3 * torch.randn_like(p) for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizers = {name: make(model) for name, make in makers.items()}
    projecting = any("AdamP" in name or "SGDP" in name for name in optimizers)
    times: dict[tuple[str, str], list[float]] = {}
    for kind in ("random", "orthogonal") if projecting else ("random",):
        for turn in range(rounds + 1):  # the first makes the states and is not counted
            if kind == "orthogonal":
                _make_orthogonal(params, grads)  # steps move the weights: anew in every round
            for name, made in optimizers.items():
                if kind == "orthogonal" and not any(base in name for base in ("AdamP", "SGDP", "AdamW (torch, f")):
                    continue
                started = clock()
                for optimizer in made:
                    optimizer.step()
                if turn:
                    times.setdefault((name, kind), []).append(clock() - started)
    rows = []
    for (name, kind), values in times.items():
        ms = 1e3 * statistics.median(values)
        state = sum(
            value.nbytes
            for optimizer in optimizers[name]
            for held in optimizer.state.values()
            for value in held.values()
            if isinstance(value, torch.Tensor)
        )
        rows.append(
            {
                "model": size,
                "parameters": sum(p.numel() for p in params),
                "gradients": kind,
                "optimizer": name,
                "rounds": len(values),
                "ms": round(ms, 3),
                "of AdamW": ms / (1e3 * statistics.median(times[BASE, kind])),
                "peer": None,
                "peer / ours": None,
                "state MB": round(state / 1e6, 2),
            }
        )
    return rows


def _make_orthogonal(params: list[nn.Parameter], grads: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for p, g in zip(params, grads, strict=True):
            if p.dim() == 2:
                g.sub_(p * ((g * p).sum(-1, keepdim=True) / p.square().sum(-1, keepdim=True)))


def main() -> None:
    """Measure, print, and say whether the bounds hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", choices=SIZES, help="default: all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", action="append", help="an optimizer by name; AdamW (torch, foreach) always runs")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time, for a machine that is busy; with one thread")
    parser.add_argument("--quick", action="store_true", help="1M only, 5 rounds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.cpu_time:
        options.threads = 1
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    unknown = set(options.only or ()) - set(contestants())
    if unknown:
        parser.error(f"--only {', '.join(sorted(unknown))}: not one of {', '.join(contestants())}.")
    only = None if options.only is None else [*options.only, BASE]
    rows = []
    for size in ["1M"] if options.quick else options.size or list(SIZES):
        measured = measure(size, 5 if options.quick else options.rounds, only, clock)
        rows += measured
        print(f"\n{size}: {measured[0]['parameters'] / 1e6:.1f} million parameters, {options.threads} threads")
        print(f"{'optimizer':26}{'gradients':12}{'ms':>10}{'of AdamW':>10}{'peer/ours':>11}{'state MB':>10}  bound")
        for row in measured:
            bound = ""
            if row["optimizer"] in BOUNDS:
                limit = BOUNDS[row["optimizer"]]
                bound = f"{'holds' if row['of AdamW'] <= limit else 'MISSED'} (<= {limit} AdamW)"
            elif row["optimizer"] == "SWAN" and row["peer / ours"]:
                bound = f"{'holds' if row['peer / ours'] >= SWAN_BOUND else 'MISSED'} (>= {SWAN_BOUND}x its peer)"
            print(
                f"{row['optimizer']:26}{row['gradients']:12}{row['ms']:10.2f}{row['of AdamW']:10.2f}"
                f"{row['peer / ours'] or '':>11}{row['state MB']:10.2f}  {bound}"
            )
    if options.json:
        facts = {
            "torch": torch.__version__,
            "machine": platform.machine(),
            "threads": options.threads,
            "clock": clock.__name__,
        }
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
