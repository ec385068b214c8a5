"""Time of losses and samplers on groups, beside what a user would pick instead.

    python benchmarks/losses.py                  # batches from 128 x 10 to 4096 x 1000, epochs to 1 million draws
    python benchmarks/losses.py --quick          # the smallest of each, few rounds
    python benchmarks/losses.py --json out.json

A loss step is forward and backward on logits that are there already, in training mode. Its peers are torch's cross
entropy (no groups at all) and group DRO as it is usually written, with a product by the matrix of group members and
without checks, moving averages or logarithms. ``--peer FILE`` adds the class ``LossComputer`` of a file on disk,
in the form of the authors' repository (it must run on the CPU). A sampler's epoch is beside ``WeightedRandomSampler``,
which draws from the same distribution. All run in turn, round after round; printed are medians and ratios.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import WeightedRandomSampler

from evenly.robust import ERMLoss, GroupBalancedSampler, GroupCVaRLoss, GroupDROLoss

SHAPES = {
    "128 x 10, 4 groups": (128, 10, 4),
    "128 x 1000, 6 groups": (128, 1000, 6),
    "4096 x 1000, 64 groups": (4096, 1000, 64),
}
DRAWS = {"10,000 of 10,000": 10_000, "1,000,000 of 1,000,000": 1_000_000}


class PlainGroupDRO:
    """The equations and nothing else."""

    def __init__(self, n_groups: int, step_size: float = 0.01) -> None:
        self.q, self.n_groups, self.step_size = torch.full((n_groups,), 1 / n_groups), n_groups, step_size

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        losses = functional.cross_entropy(logits, targets, reduction="none")
        members = (groups == torch.arange(self.n_groups).unsqueeze(1)).float()
        mean = members @ losses / members.sum(1).clamp(min=1)
        self.q = self.q * torch.exp(self.step_size * mean.detach())
        self.q = self.q / self.q.sum()
        return mean @ self.q


def contestants(n_groups: int, peer: Path | None) -> dict[str, Callable[..., torch.Tensor]]:
    """Name: a function of (logits, targets, groups)."""
    counts = torch.arange(1, n_groups + 1) * 100
    made: dict[str, Callable[..., torch.Tensor]] = {
        "cross_entropy (torch)": lambda logits, targets, groups: functional.cross_entropy(logits, targets),
        "group DRO (plain)": PlainGroupDRO(n_groups),
        "GroupDROLoss": GroupDROLoss(n_groups, counts, adjustment=1.0),
        "GroupCVaRLoss": GroupCVaRLoss(n_groups, counts),
        "ERMLoss": ERMLoss(n_groups),
    }
    if peer is not None:
        spec = importlib.util.spec_from_file_location("peer", peer)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

        class _Data:
            def __init__(self) -> None:
                self.n_groups, self.group_str = n_groups, str

            def group_counts(self) -> torch.Tensor:
                return counts.float()

        criterion = torch.nn.CrossEntropyLoss(reduction="none")
        computer = module.LossComputer(criterion, True, _Data(), alpha=0.2)
        made["group DRO (authors)"] = lambda logits, targets, groups: computer.loss(logits, targets, groups, True)
    return made


def measure(
    makers: dict[str, Callable[[], Any]], rounds: int, repeats: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median seconds of each, in turn."""
    times: dict[str, list[float]] = {name: [] for name in makers}
    for turn in range(rounds + 1):  # the first is not counted
        for name, run in makers.items():
            started = clock()
            for _ in range(repeats):
                run()
            if turn:
                times[name].append((clock() - started) / repeats)
    return {name: statistics.median(values) for name, values in times.items()}


def losses(shape: str, rounds: int, peer: Path | None, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """Rows of one shape of batch."""
    size, classes, n_groups = SHAPES[shape]
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(size, classes, generator=gen).requires_grad_()
    targets, groups = (torch.randint(n, (size,), generator=gen) for n in (classes, n_groups))

    def step(loss: Callable[..., torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            logits.grad = None
            loss(logits, targets, groups).backward()

        return run

    makers = {name: step(loss) for name, loss in contestants(n_groups, peer).items()}
    found = measure(makers, rounds, 20 if size * classes < 1e6 else 2, clock)
    return [
        {
            "case": shape,
            "what": name,
            "us": round(1e6 * seconds, 1),
            "of cross entropy": round(seconds / found["cross_entropy (torch)"], 2),
            "of plain": round(seconds / found["group DRO (plain)"], 2),
            "of authors": round(seconds / found["group DRO (authors)"], 2) if peer else None,
        }
        for name, seconds in found.items()
    ]


def samplers(draws: str, rounds: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """Rows of one length of epoch."""
    count = DRAWS[draws]
    groups = torch.multinomial(torch.tensor([0.9, 0.07, 0.02, 0.01]), count, True)
    counts = torch.bincount(groups)
    made: dict[str, Any] = {
        "WeightedRandomSampler (torch)": WeightedRandomSampler((1 / counts.double())[groups], count),
        "GroupBalancedSampler": GroupBalancedSampler(groups),
        "GroupBalancedSampler (stratified)": GroupBalancedSampler(groups, stratified=True),
    }

    def epoch(sampler: Any) -> Callable[[], None]:
        def run() -> None:
            for _ in sampler:
                pass

        return run

    found = measure({name: epoch(sampler) for name, sampler in made.items()}, rounds, 1, clock)
    base = found["WeightedRandomSampler (torch)"]
    return [
        {"case": draws, "what": name, "us": round(1e6 * seconds, 1), "of torch": round(seconds / base, 2)}
        for name, seconds in found.items()
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peer", type=Path, help="a file with a class LossComputer")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time, for a machine that is busy; with one thread")
    parser.add_argument("--quick", action="store_true", help="the smallest case of each, 3 rounds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.cpu_time:
        options.threads = 1
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    rounds, last = (3, 1) if options.quick else (options.rounds, None)
    rows = []
    print(f"{options.threads} threads")
    print(f"{'a loss step':36}{'us':>10}{'of cross entropy':>18}{'of plain':>10}{'of authors':>12}")
    for shape in list(SHAPES)[:last]:
        print(shape)
        for row in losses(shape, rounds, options.peer, clock):
            rows.append(row)
            authors = row["of authors"] if row["of authors"] is not None else ""
            ratios = f"{row['of cross entropy']:18.2f}{row['of plain']:10.2f}{authors:>12}"
            print(f"  {row['what']:34}{row['us']:10.1f}{ratios}")
    print(f"{'an epoch of a sampler':36}{'us':>10}{'of torch':>18}")
    for draws in list(DRAWS)[:last]:
        print(draws)
        for row in samplers(draws, rounds, clock):
            rows.append(row)
            print(f"  {row['what']:34}{row['us']:10.1f}{row['of torch']:18.2f}")
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
