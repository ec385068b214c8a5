"""Time of advantages from rewards, beside what trainers compute and what one would write in plain PyTorch.

    python benchmarks/policy.py                     # 100,000 rollouts in groups of 16
    python benchmarks/policy.py --quick             # few rounds
    python benchmarks/policy.py --json out.json

Rewards are 0/1 in float32. All contestants run in turn, round after round; printed are medians, the ratio to the
named peer, and nanoseconds a rollout. "TRL's formula" is what its GRPOTrainer computes: groups of one size, in order,
as the rows of a matrix. "plain" is index_add in float32 on labels that count from 0, and torch.unique before it where
labels are any integers. "loop" is the way of the code released with BNPO, a dictionary of lists and a density for each
rollout, on fewer rollouts. Ours takes groups of any size in any order, checks what it is given, and works in float64.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from evenly import policy

SAMPLES = 16
LOOP = 1600  # rollouts of the loop


def trl_formula(rewards: Tensor) -> Tensor:
    """GRPO's advantages as TRL has them: a matrix with a row a prompt."""
    grouped = rewards.view(-1, SAMPLES)
    mean = torch.nanmean(grouped, dim=1).repeat_interleave(SAMPLES, dim=0)
    variance = torch.nanmean((grouped - torch.nanmean(grouped, dim=1, keepdim=True)) ** 2, dim=1)
    count = torch.sum(~torch.isnan(grouped), dim=1)
    std = torch.sqrt(variance * count / (count - 1)).repeat_interleave(SAMPLES, dim=0)
    return torch.nan_to_num((rewards - mean) / (std + 1e-4), nan=0.0)


def plain_grpo(rewards: Tensor, ids: Tensor, groups: int) -> Tensor:
    """GRPO on labels, written down without further thought."""
    count = torch.zeros(groups).index_add_(0, ids, torch.ones_like(rewards))
    mean = torch.zeros(groups).index_add_(0, ids, rewards) / count
    centred = rewards - mean[ids]
    variance = torch.zeros(groups).index_add_(0, ids, centred.square()) / (count - 1)
    return centred / (variance.sqrt()[ids] + 1e-4)


def plain_bnpo(rewards: Tensor, ids: Tensor, groups: int) -> Tensor:
    """BNPO on labels, written down without further thought."""
    count = torch.zeros(groups).index_add_(0, ids, torch.ones_like(rewards))
    p = torch.zeros(groups).index_add_(0, ids, rewards) / count
    nu = p.mean() * (1 - p.mean()) / p.var() - 1
    alpha, beta = (1 + nu * p.mean() / 3).clamp(min=1), (1 + nu * (1 - p.mean()) / 3).clamp(min=1)
    weight = (1 / torch.distributions.Beta(alpha, beta).log_prob(p).exp()).clamp(max=1e6)
    return weight[ids] * (rewards - p[ids])


def loop_bnpo(rewards: Tensor, ids: list[int]) -> Tensor:
    """BNPO rollout by rollout."""
    groups = defaultdict(list)
    for reward, label in zip(rewards, ids, strict=True):
        groups[label].append(reward)
    rates = {label: torch.tensor(every).mean() for label, every in groups.items()}
    p = torch.stack(list(rates.values()))
    nu = p.mean() * (1 - p.mean()) / p.var() - 1
    alpha, beta = (1 + nu * p.mean() / 3).clamp(min=1), (1 + nu * (1 - p.mean()) / 3).clamp(min=1)
    result = rewards.clone()
    for row, label in enumerate(ids):
        weight = (1 / torch.distributions.Beta(alpha, beta).log_prob(rates[label]).exp()).clamp(max=1e6)
        result[row] = weight * (rewards[row] - rates[label])
    return result


def contestants(rollouts: int) -> dict[str, tuple[Callable[[], Tensor], str | None, int]]:
    """Name: what it runs, the peer that it is compared with, how many rollouts."""
    gen = torch.Generator().manual_seed(0)
    groups = rollouts // SAMPLES
    rates = torch.rand(groups, generator=gen) * 0.98 + 0.01
    rewards = torch.bernoulli(rates.repeat_interleave(SAMPLES), generator=gen)
    dense = torch.arange(groups).repeat_interleave(SAMPLES)
    shuffled = torch.randperm(len(dense), generator=gen)
    names = torch.randint(10**12, (groups,), generator=gen)[dense[shuffled]]
    mixed, mixed_ids = rewards[shuffled], dense[shuffled]
    few, few_ids = rewards[:LOOP], dense[:LOOP].tolist()

    def unique(formula: Callable[[Tensor, Tensor, int], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            found, index = torch.unique(names, return_inverse=True)
            return formula(mixed, index, len(found))

        return run

    size = len(rewards)
    return {
        "TRL's formula, GRPO": (lambda: trl_formula(rewards), None, size),
        "plain GRPO": (lambda: plain_grpo(mixed, mixed_ids, groups), None, size),
        "plain GRPO, any labels": (unique(plain_grpo), None, size),
        "plain BNPO": (lambda: plain_bnpo(mixed, mixed_ids, groups), None, size),
        "plain BNPO, any labels": (unique(plain_bnpo), None, size),
        "loop BNPO": (lambda: loop_bnpo(few, few_ids), None, LOOP),
        "GRPO": (lambda: policy.grpo_advantages(mixed, mixed_ids, num_groups=groups), "plain GRPO", size),
        "GRPO, any labels": (lambda: policy.grpo_advantages(mixed, names), "plain GRPO, any labels", size),
        "RLOO": (lambda: policy.rloo_advantages(mixed, mixed_ids, num_groups=groups), "plain GRPO", size),
        "BNPO": (lambda: policy.bnpo_advantages(mixed, mixed_ids, num_groups=groups), "plain BNPO", size),
        "BNPO, any labels": (lambda: policy.bnpo_advantages(mixed, names), "plain BNPO, any labels", size),
        "BNPO, as the loop": (
            lambda: policy.bnpo_advantages(few, dense[:LOOP]),
            "loop BNPO",
            LOOP,
        ),
    }


def measure(rollouts: int, rounds: int, clock: Callable[[], float]) -> list[dict]:
    """Time every contestant; a row a contestant."""
    makers = contestants(rollouts)
    for ours, peer in (("GRPO", "plain GRPO"), ("BNPO", "plain BNPO"), ("BNPO, as the loop", "loop BNPO")):
        torch.testing.assert_close(makers[ours][0](), makers[peer][0](), rtol=1e-3, atol=1e-3)
    times: dict[str, list[float]] = {name: [] for name in makers}
    for turn in range(rounds + 1):  # the first is not counted
        for name, (run, _, size) in makers.items():
            if size == LOOP and "loop BNPO" in name and turn > 2:
                continue
            started = clock()
            run()
            if turn:
                times[name].append(clock() - started)
    rows = []
    for name, (_, peer, size) in makers.items():
        ms = 1e3 * statistics.median(times[name])
        against = 1e3 * statistics.median(times[peer]) if peer else None
        rows.append(
            {
                "advantages": name,
                "rollouts": size,
                "ms": round(ms, 3),
                "ns a rollout": round(1e6 * ms / size, 1),
                "peer": peer,
                "of the peer": round(ms / against, 3) if against else None,
            }
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="CPU time, for a machine that is busy; with one thread")
    parser.add_argument("--quick", action="store_true", help="5 rounds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.cpu_time:
        options.threads = 1
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    rows = measure(options.rollouts, 5 if options.quick else options.rounds, clock)
    print(f"{'advantages':26}{'rollouts':>10}{'ms':>10}{'ns a rollout':>14}{'of the peer':>13}  peer")
    for row in rows:
        print(
            f"{row['advantages']:26}{row['rollouts']:10}{row['ms']:10.2f}{row['ns a rollout']:14.1f}"
            f"{row['of the peer'] or '':>13}  {row['peer'] or ''}"
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
