"""GRPO, RLOO and REINFORCE against plain loops, and the formulas that trainers have for groups of one size."""

from __future__ import annotations

import statistics

import pytest
import torch

from evenly.policy import GRPO, Reinforce, grpo_advantages, reinforce_advantages, rloo_advantages

IDS = torch.tensor([4, 4, 1, 4, 1, 7, 7, 7, 7, 1, 1])
REWARDS = torch.tensor([0.1, 0.9, 3.0, -0.4, 2.5, 1.0, 0.0, 0.0, 1.0, 2.75, -1.0], dtype=torch.float64)


def others(i, same=True):
    return [float(r) for k, r in enumerate(REWARDS) if IDS[k] == IDS[i] and (same or k != i)]


def expect(got, rule):
    want = torch.tensor([rule(i, float(r)) for i, r in enumerate(REWARDS)], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_grpo():
    expect(
        grpo_advantages(REWARDS, IDS),
        lambda i, r: (r - statistics.mean(others(i))) / (statistics.stdev(others(i)) + 1e-4),
    )
    expect(
        grpo_advantages(REWARDS, IDS, correction=0, eps=1e-6),
        lambda i, r: (r - statistics.mean(others(i))) / (statistics.pstdev(others(i)) + 1e-6),
    )
    whole = statistics.stdev(REWARDS.tolist())
    expect(grpo_advantages(REWARDS, IDS, scale="batch"), lambda i, r: (r - statistics.mean(others(i))) / (whole + 1e-4))
    expect(grpo_advantages(REWARDS, IDS, scale=None), lambda i, r: r - statistics.mean(others(i)))


def test_rloo():
    expect(rloo_advantages(REWARDS, IDS), lambda i, r: r - statistics.mean(others(i, same=False)))
    plain = [float(r) - statistics.mean(others(i, same=False)) for i, r in enumerate(REWARDS)]
    expect(rloo_advantages(REWARDS, IDS, scale="batch"), lambda i, r: plain[i] / (statistics.stdev(plain) + 1e-4))


def test_reinforce():
    expect(reinforce_advantages(REWARDS, IDS), lambda i, r: r - statistics.mean(others(i)))
    mean = statistics.mean(REWARDS.tolist())
    expect(reinforce_advantages(REWARDS, baseline="batch"), lambda i, r: r - mean)
    expect(reinforce_advantages(REWARDS, baseline=0.25), lambda i, r: r - 0.25)
    expect(
        reinforce_advantages(REWARDS, baseline="batch", scale="batch"),
        lambda i, r: (r - mean) / (statistics.stdev(REWARDS.tolist()) + 1e-4),
    )
    with pytest.raises(ValueError, match=r"use evenly.policy.Reinforce"):
        reinforce_advantages(REWARDS, baseline="running")


def test_groups_of_one_size_are_the_trainers_formulas():
    r = torch.rand(12, 5, dtype=torch.float64)
    ids = torch.arange(12).repeat_interleave(5)
    want = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(grpo_advantages(r.flatten(), ids).view(12, 5), want)
    want = r - (r.sum(1, keepdim=True) - r) / 4
    torch.testing.assert_close(rloo_advantages(r.flatten(), ids).view(12, 5), want)


def test_leave_one_out_is_unbiased_and_the_group_mean_shrinks():
    # All outcomes of three Bernoulli rollouts: the score-function gradient of the success rate is 1.
    p, total = 0.3, {"loo": 0.0, "mean": 0.0}
    ids = torch.zeros(3, dtype=torch.long)
    for outcome in range(8):
        r = torch.tensor([(outcome >> k) & 1 for k in range(3)], dtype=torch.float64)
        chance = torch.where(r == 1, p, 1 - p).prod()
        score = torch.where(r == 1, 1 / p, -1 / (1 - p))
        total["loo"] += (chance * (rloo_advantages(r, ids) * score).mean()).item()
        total["mean"] += (chance * (reinforce_advantages(r, ids) * score).mean()).item()
    assert total["loo"] == pytest.approx(1)
    assert total["mean"] == pytest.approx(2 / 3)


def test_running_baseline_is_of_the_batches_before():
    batches = [torch.rand(n, dtype=torch.float64) for n in (4, 1, 6)]
    reinforce, seen = Reinforce(baseline="running", decay=0.5), []
    for batch in batches:
        got = reinforce(batch)
        baseline = sum(w * r for r, w in seen) / sum(w for _, w in seen) if seen else batch.mean().item()
        torch.testing.assert_close(got, batch - baseline)
        seen = [(r, 0.5 * w) for r, w in seen] + [(float(r), 1.0) for r in batch]
    everything = Reinforce(baseline="running", decay=1.0)
    for batch in batches:
        everything(batch)
    torch.testing.assert_close(everything.running_mean, torch.cat(batches).mean().view(1))
    torch.testing.assert_close(everything.running_var, torch.cat(batches).var(correction=0).view(1))
    assert everything.count.item() == 11


def test_a_subclass_needs_a_rule():
    from evenly.policy import RewardNormalizer

    with pytest.raises(TypeError, match=r"has no rule: write _rule"):
        RewardNormalizer()(REWARDS, IDS)


def test_modules_move():
    assert Reinforce(baseline="running", device="meta").running_mean.is_meta
    assert not GRPO().state_dict()
