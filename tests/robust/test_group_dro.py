"""Group DRO and its baselines against float64 references written from the paper, and their properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.nn import functional

from evenly.robust import ERMLoss, GroupCVaRLoss, GroupDROLoss, GroupLoss

COUNTS = [60, 25, 10, 5]


def problem(steps=20, size=40, m=4, seed=0):
    """Losses and groups of a number of batches; some groups are absent from some batches."""
    rng = np.random.default_rng(seed)
    groups = [rng.choice(m, size, p=np.array(COUNTS) / 100) for _ in range(steps)]
    return [(rng.gamma(2.0, 0.5, size) * (1 + g), g) for g in groups]


def means(losses, groups, m=4):
    """Mean loss of each group, with loops."""
    out, present = np.zeros(m), np.zeros(m, dtype=bool)
    for g in range(m):
        members = [x for x, k in zip(losses, groups, strict=True) if k == g]
        if members:
            out[g], present[g] = sum(members) / len(members), True
    return out, present


def dro(batches, eta, c=0.0, normalize=False):
    """Algorithm 1 in its batch form, in plain probabilities."""
    q, values, path = np.ones(4) / 4, [], []
    for losses, groups in batches:
        mean, _ = means(losses, groups)
        adjusted = mean + np.broadcast_to(c, 4) / np.sqrt(COUNTS)
        if normalize:
            adjusted = adjusted / adjusted.sum()
        q = q * np.exp(eta * adjusted)
        q = q / q.sum()
        values.append(q @ mean)
        path.append(q)
    return values, path


def cvar(batches, alpha, c, v, gamma=0.1):
    """The greedy variant: whole groups, worst first, until the mass alpha is used."""
    ema, seen, values = np.zeros(4), np.zeros(4, dtype=bool), []
    share = np.array(COUNTS) / 100
    for losses, groups in batches:
        mean, present = means(losses, groups)
        for g in range(4):
            if present[g]:
                ema[g] = (1 - gamma) * ema[g] + gamma * mean[g] if seen[g] else mean[g]
        seen |= present
        w, left = np.zeros(4), alpha
        for g in sorted(range(4), key=lambda g: -(ema[g] + c / math.sqrt(COUNTS[g]))):
            w[g] = min(share[g], left)
            left -= w[g]
        values.append((v * share + (1 - v) * w / alpha) @ mean)
    return values, ema


def run(loss, batches):
    got = [loss.reduce(torch.tensor(losses), torch.tensor(groups)) for losses, groups in batches]
    return np.array([float(value) for value in got])


@pytest.mark.parametrize(
    "settings",
    [
        {"eta": 0.01},
        {"eta": 1.0},
        {"eta": 0.3, "c": 2.0},
        {"eta": 0.3, "c": np.array([1.0, 0.0, 3.0, 0.5])},  # the authors' code drops this one
        {"eta": 2.0, "c": 1.0, "normalize": True},
    ],
)
def test_dro_is_the_papers(settings):
    batches = problem()
    want, path = dro(batches, **settings)
    c = settings.get("c", 0.0)
    loss = GroupDROLoss(
        4,
        COUNTS,
        step_size=settings["eta"],
        adjustment=c.tolist() if isinstance(c, np.ndarray) else c,
        normalize_loss=settings.get("normalize", False),
        dtype=torch.float64,
    )
    np.testing.assert_allclose(run(loss, batches), want, rtol=1e-12)
    np.testing.assert_allclose(loss.q, path[-1], rtol=1e-11)
    assert loss.q.max() > 0.26


@pytest.mark.parametrize(("alpha", "c", "v"), [(0.2, 0.0, 0.0), (0.2, 1.0, 0.0), (0.5, 3.0, 0.3), (1.0, 0.0, 0.0)])
def test_cvar_is_the_codes(alpha, c, v):
    batches = problem()
    want, ema = cvar(batches, alpha, c, v)
    loss = GroupCVaRLoss(4, COUNTS, alpha, c, v, dtype=torch.float64)
    np.testing.assert_allclose(run(loss, batches), want, rtol=1e-12)
    np.testing.assert_allclose(loss.ema, ema, rtol=1e-12)
    weights = loss.group_weights(loss.ema, loss.ema)
    assert float(weights.sum()) == pytest.approx(1)
    if v == 0:
        assert (weights <= torch.tensor(COUNTS) / 100 / alpha + 1e-12).all()


def test_erm_is_the_mean_and_reweighting_is_importance_weighting():
    for losses, groups in problem(5):
        erm = ERMLoss(4).double().reduce(torch.tensor(losses), torch.tensor(groups))
        assert float(erm) == pytest.approx(losses.mean(), rel=1e-12)
        again = ERMLoss(4, COUNTS, reweight=True, dtype=torch.float64)
        weight = np.array([100 / (4 * COUNTS[g]) for g in groups])
        got = float(again.reduce(torch.tensor(losses), torch.tensor(groups)))
        assert got == pytest.approx((weight * losses).mean(), rel=1e-12)
    # Over the training set every group has the same say.
    groups = torch.arange(4).repeat_interleave(torch.tensor(COUNTS))
    losses = torch.rand(100, dtype=torch.float64)
    balanced = torch.stack([losses[groups == g].mean() for g in range(4)]).mean()
    torch.testing.assert_close(ERMLoss(4, COUNTS, reweight=True, dtype=torch.float64).reduce(losses, groups), balanced)


def test_one_step_by_hand():
    loss = GroupDROLoss(2, step_size=1.0, dtype=torch.float64)
    value = loss.reduce(torch.tensor([1.0, 0.0]).double(), torch.tensor([0, 1]))
    assert float(value) == pytest.approx(math.e / (math.e + 1))
    np.testing.assert_allclose(loss.q, [math.e / (math.e + 1), 1 / (math.e + 1)])


def test_the_gradient_takes_the_new_weights_as_constants():
    loss = GroupDROLoss(2, step_size=2.0, dtype=torch.float64)
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    y, groups = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 0, 0, 0, 1, 1])
    (got,) = torch.autograd.grad(loss(logits, y, groups), logits)
    softmax = logits.detach().softmax(1) - functional.one_hot(y, 3)
    want = softmax * (loss.q[groups] / torch.tensor([4.0, 2.0])[groups]).unsqueeze(1)
    torch.testing.assert_close(got, want)
    # Differentiating through exp(eta L) would be something else.
    through = torch.stack([functional.cross_entropy(logits[groups == g], y[groups == g]) for g in (0, 1)])
    (wrong,) = torch.autograd.grad((torch.softmax(2 * through, 0) * through).sum(), logits)
    assert not torch.allclose(got, wrong, rtol=1e-2)


def test_limits_of_the_step_size():
    losses, groups = problem(1)[0]
    mean, present = means(losses, groups)
    assert present.all()
    still = run(GroupDROLoss(4, step_size=0.0, dtype=torch.float64), [(losses, groups)])
    assert still[0] == pytest.approx(mean.mean())
    greedy = run(GroupDROLoss(4, step_size=1e9, dtype=torch.float64), [(losses, groups)])
    assert greedy[0] == pytest.approx(mean.max())


def test_constant_losses_give_exponential_weights_and_a_constant_changes_nothing():
    level = torch.tensor([0.1, 0.5, 0.2, 0.9], dtype=torch.float64)
    groups = torch.arange(8) % 4
    first, second = (GroupDROLoss(4, step_size=0.3, dtype=torch.float64) for _ in range(2))
    for _ in range(7):
        first.reduce(level[groups], groups)
        second.reduce(level[groups] + 5, groups)
    torch.testing.assert_close(first.q, torch.softmax(7 * 0.3 * level, 0))
    torch.testing.assert_close(second.q, first.q)
    assert float(first.q.sum()) == pytest.approx(1)


def test_absent_groups_count_as_no_loss():
    loss = GroupDROLoss(3, [9, 4, 1], step_size=1.0, adjustment=1.0, dtype=torch.float64)
    loss.reduce(torch.tensor([0.7], dtype=torch.float64), torch.tensor([1]))
    torch.testing.assert_close(loss.q, torch.softmax(torch.tensor([1 / 3, 0.7 + 1 / 2, 1.0]).double(), 0))


def test_the_value_is_not_adjusted():
    losses, groups = torch.tensor([1.0, 3.0]), torch.tensor([0, 1])
    assert GroupDROLoss(2, [100, 1], step_size=0.0, adjustment=5.0).reduce(losses, groups) == 2


def test_normalized_losses_do_not_depend_on_the_unit():
    batches = problem()
    paths = []
    for unit in (1.0, 1e-6):
        loss = GroupDROLoss(4, step_size=1.0, normalize_loss=True, dtype=torch.float64)
        run(loss, [(unit * losses, groups) for losses, groups in batches])
        paths.append(loss.q)
    torch.testing.assert_close(paths[0], paths[1])


def test_binary_cross_entropy_and_probabilities():
    logits, groups = torch.randn(6, dtype=torch.float64), torch.arange(6) % 2
    y = torch.tensor([0, 1, 1, 0, 1, 0])
    binary = GroupDROLoss(2, loss="binary_cross_entropy", dtype=torch.float64)
    two = GroupDROLoss(2, dtype=torch.float64)
    pair = torch.stack([torch.zeros_like(logits), logits], 1)
    want = two(pair, y, groups)
    torch.testing.assert_close(binary(logits, y, groups), want)
    binary.reset()
    torch.testing.assert_close(binary(logits.unsqueeze(1), y.bool().unsqueeze(1), groups), want)
    two.reset()
    torch.testing.assert_close(two(pair, functional.one_hot(y, 2).double(), groups), want)
    with pytest.raises(ValueError, match=r"takes logits and targets \(B,\) or \(B, 1\); got \(6, 2\) and \(6,\)"):
        binary(pair, y, groups)


def test_weights_of_samples_have_gradients():
    losses, groups = torch.rand(6, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1, 1])
    weights = torch.tensor([1.0, 2.0, 0.0, 0.5, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    loss = GroupDROLoss(2, dtype=torch.float64).eval()

    def mean(w):
        return sum(
            (w[3 * g : 3 * g + 3] * losses[3 * g : 3 * g + 3]).sum() / w[3 * g : 3 * g + 3].sum() for g in (0, 1)
        )

    (got,) = torch.autograd.grad(loss.reduce(losses, groups, weights), weights)
    (want,) = torch.autograd.grad(mean(weights) / 2, weights)
    used = weights > 0  # a weight of 0 leaves the sample out
    torch.testing.assert_close(got[used], want[used])


def test_one_number_does_not_step_out_of_float32():
    # Probabilities in float32 would underflow to 0 and never come back.
    loss = GroupDROLoss(2, step_size=1.0)
    for _ in range(200):
        loss.reduce(torch.tensor([1.0, 0.0]), torch.tensor([0, 1]))
    assert loss.q[1] == 0
    for _ in range(200):
        loss.reduce(torch.tensor([0.0, 1.0]), torch.tensor([0, 1]))
    torch.testing.assert_close(loss.q, torch.tensor([0.5, 0.5]), rtol=1e-3, atol=0)


def test_a_loss_of_ones_own():
    class Worst(GroupLoss):
        def group_weights(self, mean, mass):
            return functional.one_hot(mean.argmax(), self.n_groups).to(mean.dtype)

    assert Worst(2).reduce(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 1, 1])) == 4


def test_convex_problem_ends_at_the_minimax_value():
    # Logistic regression on three groups that want different things; the value to reach is min t, L_g <= t.
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(90, 2, generator=gen, dtype=torch.float64)
    groups = torch.arange(90) % 3
    direction = torch.tensor([[1.0, 0.0], [0.3, 1.0], [-0.6, 0.8]], dtype=torch.float64)
    y = ((x * direction[groups]).sum(1) + 0.3 * torch.randn(90, generator=gen, dtype=torch.float64) > 0).double()

    def levels(theta):
        each = functional.binary_cross_entropy_with_logits(x @ theta, y, reduction="none")
        return torch.stack([each[groups == g].mean() for g in range(3)])

    def limits(v):
        return v[2] - levels(torch.tensor(v[:2])).numpy()

    best = minimize(lambda v: v[2], [0.0, 0.0, 1.0], method="SLSQP", constraints={"type": "ineq", "fun": limits})
    assert best.success

    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    loss = GroupDROLoss(3, loss="binary_cross_entropy", step_size=0.1, dtype=torch.float64)
    total = torch.zeros(2, dtype=torch.float64)
    steps = 1500
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss(x @ theta, y, groups), theta)
        with torch.no_grad():
            theta -= 0.1 * gradient
            total += theta / steps
    reached = float(levels(total).max())
    assert best.fun - 1e-6 <= reached < best.fun + 0.005
    erm = minimize(lambda v: float(functional.binary_cross_entropy_with_logits(x @ torch.tensor(v), y)), [0.0, 0.0])
    assert float(levels(torch.tensor(erm.x)).max()) > best.fun + 0.02
