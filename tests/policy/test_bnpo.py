"""BNPO against its equations, written as loops in float64 with SciPy's Beta density, and its exact properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import betaln
from scipy.stats import beta as beta_distribution

from evenly.policy import BNPO, beta_parameters, bnpo_advantages, grpo_advantages, reinforce_advantages


def oracle_parameters(rates, clamp_min=1.0):
    """The method of moments, from a list of success rates."""
    if len(rates) < 2 or np.var(rates, ddof=1) <= 1e-12:
        return 1.0, 1.0
    mean, variance = float(np.mean(rates)), float(np.var(rates, ddof=1))
    nu = mean * (1 - mean) / variance - 1
    pair = 1 + nu * mean / 3, 1 + nu * (1 - mean) / 3
    return pair if clamp_min is None else tuple(max(clamp_min, one) for one in pair)


def oracle(rewards, ids, low=0.0, high=1.0, max_weight=1e6, clamp_min=1.0):
    """The algorithm, rollout by rollout."""
    scores = [(float(r) - low) / (high - low) for r in rewards]
    rates = {label: float(np.mean([s for s, i in zip(scores, ids, strict=True) if i == label])) for label in set(ids)}
    alpha, beta = oracle_parameters(list(rates.values()), clamp_min)
    result = []
    for score, label in zip(scores, ids, strict=True):
        density = beta_distribution.pdf(rates[label], alpha, beta)
        weight = min(max_weight, 1 / density if density > 0 else math.inf)
        result.append(weight * (score - rates[label]) if abs(score - rates[label]) > 1e-14 else 0.0)
    return torch.tensor(result, dtype=torch.float64)


def batch(seed, groups=8, binary=True, decimals=2):
    """Ragged groups of 2 to 9 rollouts in random order."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 10, groups)
    ids = np.repeat(rng.permutation(1000)[:groups], sizes)
    rates = np.repeat(rng.beta(0.8, 1.5, groups), sizes)
    rewards = (rng.random(len(ids)) < rates).astype(float) if binary else rng.random(len(ids)).round(decimals)
    order = rng.permutation(len(ids))
    return torch.from_numpy(rewards[order]), torch.from_numpy(ids[order])


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("options", [{}, {"max_weight": 2.0}, {"clamp_min": None}, {"clamp_min": 1.4}], ids=str)
def test_is_the_algorithm(binary, options):
    for seed in range(10):
        rewards, ids = batch(seed, binary=binary)
        want = oracle(rewards.tolist(), ids.tolist(), **options)
        got = bnpo_advantages(rewards, ids, **options)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        assert (got - rewards).abs().max() > 0.1
        # In float32 the sums are in float64 all the same.
        got = bnpo_advantages(rewards.float(), ids, **options)
        torch.testing.assert_close(
            got.double(), oracle(rewards.float().tolist(), ids.tolist(), **options), rtol=1e-6, atol=1e-7
        )


def test_reward_range():
    rewards, ids = batch(3, binary=False)
    want = oracle((4 * rewards - 1).tolist(), ids.tolist(), -1.0, 3.0)
    got = bnpo_advantages(4 * rewards - 1, ids, reward_range=(-1, 3))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got, bnpo_advantages(rewards, ids), rtol=1e-10, atol=1e-12)


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=6), min_size=1, max_size=6))
def test_any_binary_groups(groups):
    rewards = torch.tensor([float(r) for group in groups for r in group], dtype=torch.float64)
    ids = torch.tensor([number for number, group in enumerate(groups) for _ in group])
    got = bnpo_advantages(rewards, ids)
    assert got.isfinite().all()
    torch.testing.assert_close(got, oracle(rewards.tolist(), ids.tolist()), rtol=1e-9, atol=1e-11)
    for number, group in enumerate(groups):
        assert got[ids == number].sum().abs() < 1e-9
        if len(set(group)) == 1:
            assert (got[ids == number] == 0).all()


def test_three_halves_are_the_textbook_case():
    # M = 1/2 and V = 1/16 give nu = 3, a = b = 3/2, alpha = beta = 3/2.
    spread = math.sqrt(3 / 4) * 0.25  # four values with the sample variance 1/16
    p = 0.5 + spread * torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    assert p.var().item() == pytest.approx(1 / 16)
    alpha, beta = beta_parameters(p)
    assert (alpha.item(), beta.item()) == (pytest.approx(1.5), pytest.approx(1.5))


def test_special_cases():
    rewards, ids = batch(1)
    plain = bnpo_advantages(rewards, ids, parameters=(1.0, 1.0))
    torch.testing.assert_close(plain, reinforce_advantages(rewards, ids), rtol=1e-12, atol=1e-14)
    grpo = grpo_advantages(rewards, ids, correction=0, eps=0.0)
    half = bnpo_advantages(rewards, ids, parameters=(torch.tensor(1.5), 1.5))
    torch.testing.assert_close(half, math.pi / 8 * grpo, rtol=1e-12, atol=1e-14)
    assert half.abs().max() > 0.1


@pytest.mark.parametrize(("a", "b"), [(0.5, 2.0), (1.5, 1.5), (4.0, 0.7)])
def test_parameters_minimize_the_variance(a, b):
    # E_p[p (1 - p) / f(p; alpha, beta)^2] under Beta(a, b), up to a constant, in logarithms.
    def log_variance(pair):
        alpha, beta = pair
        left = a + 3 - 2 * alpha, b + 3 - 2 * beta
        if min(*left, alpha, beta) <= 0:
            return np.inf
        return 2 * betaln(alpha, beta) + betaln(*left)

    best = minimize(log_variance, (1.0, 1.0), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14})
    # Success rates with exactly the moments of Beta(a, b): two values, as far apart as the variance asks.
    mean, variance = a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1))
    apart = math.sqrt(variance)
    low, high = mean - apart, mean + apart
    if low < 0 or high > 1:  # skew: two values with unequal weights
        skew = 0.1 if low < 0 else 10.0
        low, high = mean - apart * math.sqrt(skew), mean + apart / math.sqrt(skew)
        share = skew / (1 + skew)  # of the high value
    else:
        share = 0.5
    n = 110
    count = round(share * n)
    p = torch.tensor([high] * count + [low] * (n - count), dtype=torch.float64)
    p = mean + (p - p.mean()) * math.sqrt(variance / p.var().item())
    alpha, beta = beta_parameters(p, clamp_min=None)
    assert (alpha.item(), beta.item()) == (pytest.approx(1 + a / 3, rel=1e-9), pytest.approx(1 + b / 3, rel=1e-9))
    np.testing.assert_allclose(best.x, (alpha.item(), beta.item()), atol=1e-6)


def test_beta_parameters():
    rng = np.random.default_rng(0)
    for n in (2, 3, 30):
        p = torch.from_numpy(rng.beta(0.6, 1.1, (n, 3)))
        for clamp in (1.0, None, 1.2):
            alpha, beta = beta_parameters(p, clamp)
            want = torch.tensor([oracle_parameters(column, clamp) for column in p.T.tolist()], dtype=torch.float64)
            torch.testing.assert_close(torch.stack([alpha, beta], 1), want)
    # V above M(1 - M), which the unbiased variance can be, makes nu negative.
    alpha, beta = beta_parameters(torch.tensor([0.0, 1.0, 1.0]), clamp_min=None)
    assert alpha < 1 and beta < 1
    assert beta_parameters(torch.tensor([0.0, 1.0, 1.0])) == (1.0, 1.0)


@pytest.mark.parametrize("p", [[], [0.3], [0.0, 0.0, 0.0], [1.0, 1.0], [0.4] * 7], ids=str)
def test_nothing_to_fit_is_reinforce(p):
    alpha, beta = beta_parameters(torch.tensor(p))
    assert (alpha, beta) == (1.0, 1.0)


def test_equally_hard_prompts():
    # The released code gives NaN here.
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    ids = torch.tensor([0, 0, 1, 1, 2, 2])
    torch.testing.assert_close(bnpo_advantages(rewards, ids), rewards - 0.5)
    assert (bnpo_advantages(torch.zeros(6), ids) == 0).all()


def test_large_groups_of_right_answers():
    # A mean of ones in float32 may round to 0.9999999, which the largest weight would blow up.
    sizes = [4097, 3, 10]
    rewards = torch.cat([torch.ones(4097), torch.tensor([1.0, 0.0, 0.0]), torch.full((10,), 1 / 3)])
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    got = bnpo_advantages(rewards, ids)
    assert (got[:4097] == 0).all()
    assert (got[-10:] == 0).all()
    assert got.abs().max() > 0


def test_max_weight_bites_only_where_rewards_are_not_binary():
    rewards = torch.tensor([0.0, 1e-6, 1.0, 1.0, 0.4, 0.6, 0.5, 0.5, 0.45, 0.5], dtype=torch.float64)
    ids = torch.arange(5).repeat_interleave(2)
    loose, tight = (bnpo_advantages(rewards, ids, max_weight=w) for w in (1e6, 2.0))
    assert loose[1] > tight[1]
    torch.testing.assert_close(tight[:2], torch.tensor([-1e-6, 1e-6], dtype=torch.float64))
    unbounded = bnpo_advantages(rewards, ids, max_weight=math.inf)
    assert unbounded.isfinite().all() and (unbounded[2:4] == 0).all()


def test_released_rule_for_single_rollouts():
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 0, 0.5], dtype=torch.float64)
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 9])
    alpha, beta = oracle_parameters([1 / 3, 2 / 3, 0.0])
    want = torch.tensor(
        [
            min(1e6, np.divide(1, f, where=f > 0, out=np.array(np.inf))) * (r - p)
            for r, p in zip(rewards.tolist(), [1 / 3] * 3 + [2 / 3] * 3 + [0.0], strict=True)
            for f in [beta_distribution.pdf(p, alpha, beta)]
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(bnpo_advantages(rewards, ids, singletons="raw"), want)
    assert want[-1] == 5e5
    # Left out, the lone rollout says nothing about how hard prompts are.
    rest = bnpo_advantages(rewards[:6], ids[:6])
    torch.testing.assert_close(
        bnpo_advantages(rewards, ids, singletons="zero"), torch.cat([rest, torch.zeros(1).double()])
    )


def test_parameters_are_those_of_the_batch_by_default():
    bnpo = BNPO()
    for seed in range(4):
        rewards, ids = batch(seed)
        assert torch.equal(bnpo(rewards, ids), bnpo_advantages(rewards, ids))
        rates = [rewards[ids == label].mean() for label in ids.unique()]
        want = oracle_parameters([float(p) for p in rates])
        assert (bnpo.alpha.item(), bnpo.beta.item()) == (pytest.approx(want[0]), pytest.approx(want[1]))
        assert bnpo.count.item() == len(rates)


def test_online_parameters_that_keep_everything_are_those_of_all_prompts():
    bnpo, rates = BNPO(decay=1.0), []
    for seed in range(5):
        rewards, ids = batch(seed, groups=3 + seed)
        got = bnpo(rewards, ids)
        rates += [rewards[ids == label].mean().item() for label in ids.unique()]
        alpha, beta = oracle_parameters(rates)
        assert (bnpo.alpha.item(), bnpo.beta.item()) == (pytest.approx(alpha), pytest.approx(beta))
        torch.testing.assert_close(got, bnpo_advantages(rewards, ids, parameters=(alpha, beta)))
    assert bnpo.count.item() == len(rates)


def test_online_parameters_that_fade():
    decay, bnpo, seen = 0.6, BNPO(decay=0.6, clamp_min=None), []
    for seed in range(6):
        rewards, ids = batch(seed)
        bnpo(rewards, ids)
        seen = [(p, decay * w) for p, w in seen]
        seen += [(rewards[ids == label].mean().item(), 1.0) for label in ids.unique()]
        p, w = map(np.array, zip(*seen, strict=True))
        mean = (w * p).sum() / w.sum()
        variance = (w * (p - mean) ** 2).sum() / (w.sum() - 1)
        nu = mean * (1 - mean) / variance - 1
        assert bnpo.alpha.item() == pytest.approx(1 + nu * mean / 3)
        assert bnpo.beta.item() == pytest.approx(1 + nu * (1 - mean) / 3)


def test_evaluation_uses_what_training_found():
    bnpo = BNPO()
    bnpo(*batch(0))
    alpha, beta = bnpo.alpha.clone(), bnpo.beta.clone()
    bnpo.eval()
    rewards, ids = batch(1)
    torch.testing.assert_close(bnpo(rewards, ids), bnpo_advantages(rewards, ids, parameters=(alpha, beta)))
    assert not torch.allclose(bnpo(rewards, ids), bnpo_advantages(rewards, ids))
    fresh = BNPO().eval()
    torch.testing.assert_close(fresh(rewards, ids), reinforce_advantages(rewards, ids))


def test_noise_of_few_rollouts():
    # Rollouts of Beta(2, 3) prompts: the corrected estimate is near (2, 3), the plain one too spread out.
    rng = np.random.default_rng(0)
    rates = rng.beta(2, 3, 20000)
    rewards = torch.from_numpy((rng.random((20000, 4)) < rates[:, None]).astype(float)).flatten()
    ids = torch.arange(20000).repeat_interleave(4)
    plain, corrected = BNPO(), BNPO(correct_noise=True)
    plain(rewards, ids), corrected(rewards, ids)
    found = [3 * (one.item() - 1) for one in (corrected.alpha, corrected.beta)]
    assert found[0] == pytest.approx(2, abs=0.15) and found[1] == pytest.approx(3, abs=0.2)
    assert 3 * (plain.alpha.item() - 1) < 1.3
    p = rewards.view(-1, 4).mean(1)
    assert corrected.running_noise.item() == pytest.approx((p * (1 - p) / 3).mean().item())


def test_decomposition_has_a_density_for_each_component():
    accuracy, ids = batch(0)
    form = (torch.rand(len(ids), dtype=torch.float64) > 0.2).double()
    bnpo = BNPO(num_rewards=2)
    got = bnpo(torch.stack([accuracy, form], 1), ids)
    torch.testing.assert_close(got, (bnpo_advantages(accuracy, ids) + bnpo_advantages(form, ids)) / 2)
    assert bnpo.alpha.shape == (2,) and bnpo.alpha[0] != bnpo.alpha[1]
    assert not torch.allclose(got, bnpo_advantages((accuracy + form) / 2, ids))


def test_refused():
    for p, kind, message in (
        (torch.tensor([0, 1]), TypeError, "p is torch.int64"),
        ([0.5], TypeError, "p is list"),
        (torch.tensor([0.5, 1.5]), ValueError, r"p must lie in \[0, 1\]"),
        (torch.tensor([0.5, math.nan]), ValueError, r"p must lie in \[0, 1\]"),
        (torch.zeros(2, 2, 2), ValueError, r"p has shape \(2, 2, 2\)"),
    ):
        with pytest.raises(kind, match=message):
            beta_parameters(p)
    rewards, ids = batch(0)
    for parameters, message in (((1.0,), "expected .alpha, beta."), ((0.0, 1.0), "expected finite numbers above 0")):
        with pytest.raises(ValueError, match=message):
            bnpo_advantages(rewards, ids, parameters=parameters)
