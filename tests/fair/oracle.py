"""Bias scoring from the equations: plain loops and linear programs over every row, none of the library's code."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog


def law(rows, groups=2, seed=0, grid=None):
    """eta (n,), joint (n, 2, G), labels and groups drawn from them. ``grid``: probabilities are multiples of 1/grid."""
    state = np.random.default_rng(seed)
    x, label, group = state.normal(size=(rows, 1, 1)), np.arange(2)[:, None], np.linspace(1, -1, groups)
    logits = label * (1.5 * x + 0.3) + group * x + 0.5 * state.gumbel(size=(rows, 2, groups))
    joint = np.exp(logits).reshape(rows, -1)  # the groups in turn are favoured less
    joint /= joint.sum(1, keepdims=True)
    if grid is not None:
        joint = np.ceil(joint * grid) + 1
        joint /= joint.sum(1, keepdims=True)
    cells = np.array([state.choice(2 * groups, p=row) for row in joint])
    cells[: 2 * groups] = np.arange(2 * groups)  # every event occurs
    return joint.reshape(rows, 2, groups)[:, 1].sum(1), joint.reshape(rows, 2, groups), cells // groups, cells % groups


def events(criterion, groups):
    """The families of events (label or None, group) of a criterion."""
    labels = {"dp": [None], "eop": [1], "eo": [1, 0], "fpr": [0], "dp+eo": [None, 1, 0]}[criterion]
    return [[(label, group) for group in range(groups)] for label in labels]


def probability(joint, event):
    label, group = event
    return joint[:, :, group].sum(1) if label is None else joint[:, label, group]


def indicator(y, a, event):
    label, group = event
    return np.array([float(a[k] == group and (label is None or y[k] == label)) for k in range(len(y))])


def rates(decisions, members):
    """P(decision = 1 | event) for each event, given (n,) weights of membership."""
    return [float((decisions * m).sum() / m.sum()) for m in members]


def disparity(decisions, families):
    """The largest difference of rates in any family of memberships."""
    worst = 0.0
    for members in families:
        values = rates(decisions, members)
        worst = max(worst, max(values) - min(values))
    return worst


def program(eta, families, tol):
    """The least loss of expected accuracy over all randomized flips: (loss, kappa). One variable a row, and one level
    a family."""
    n, base = len(eta), (eta > 0.5).astype(float)
    c = np.abs(2 * eta - 1)
    levels = len(families)
    a_ub, b_ub = [], []
    for number, members in enumerate(families):
        for m in members:
            weight = m / m.sum()
            effect = (1 - 2 * base) * weight  # of flipping, on the rate
            level = np.zeros(levels)
            level[number] = 1
            a_ub.append(np.concatenate([effect, -level]))
            b_ub.append(tol - (base * weight).sum())
            a_ub.append(np.concatenate([-effect, level]))
            b_ub.append((base * weight).sum())
    answer = linprog(
        np.concatenate([c / n, np.zeros(levels)]),
        A_ub=np.array(a_ub),
        b_ub=b_ub,
        bounds=[(0, 1)] * n + [(None, None)] * levels,
        method="highs",
    )
    assert answer.status == 0, answer.message
    return answer.fun, answer.x[:n]


def walk(eta, f, y, members, tol):
    """One score, by hand: thresholds from large to small until the difference has changed its sign. Returns the best
    (accuracy, difference) within the tolerance, or the one with the least difference."""
    base = (eta > 0.5).astype(float)

    def outcome(decisions):
        first, second = rates(decisions, members)
        return float(np.mean(decisions == y)), first - second

    start = outcome(base)
    if abs(start[1]) <= tol + 1e-12:
        return start
    sign = np.sign(start[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        s = np.where(np.abs(f) < 1e-12, 0.0, (2 * base - 1) * f / np.abs(2 * eta - 1)) * sign
    seen = [start]
    for t in sorted({round(v, 9) if np.isfinite(v) else v for v in s[s > 0]}, reverse=True):
        decisions = np.where(s >= (t - 1e-8 if np.isfinite(t) else t), 1 - base, base)
        seen.append(outcome(decisions))
        if seen[-1][1] * sign < -1e-12:
            break
    inside = [one for one in seen if abs(one[1]) <= tol + 1e-12]
    return (
        max(inside, key=lambda one: one[0]) if inside else min(seen, key=lambda one: (round(abs(one[1]), 9), -one[0]))
    )


def lines(eta, f, y, families, tol):
    """Two scores, as the authors search: the line through every two points of the plane of scores, whatever their
    quadrant, and the flips on the side that the origin is not on. Returns the best accuracy within the tolerance."""
    base = (eta > 0.5).astype(float)
    s = (2 * base - 1)[:, None] * f / np.abs(2 * eta - 1)[:, None]
    best = -np.inf
    for i in range(len(s)):
        for j in range(i):
            normal = np.array([s[j, 1] - s[i, 1], s[i, 0] - s[j, 0]])
            below = s @ normal < normal @ s[i]
            decisions = np.where(~below if normal @ s[i] > 0 else below, 1 - base, base)
            accuracy = float(np.mean(decisions == y))
            if accuracy > best and disparity(decisions, families) <= tol:
                best = accuracy
    return best
