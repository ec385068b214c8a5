"""The search behind :mod:`evenly.fair.bias_scoring`: which decisions to flip.

Every row has a vector of scores g (K,) and a cost c >= 0; a linear rule z flips the rows where ``z . g > c``. What a
flip changes is known a row: the accuracy by ``gain``, the rate of event e by ``effect[e]``. Wanted is the rule, or
the mixture of rules, that keeps most accuracy while in each family of events the largest and the smallest rate differ
by at most the family's tolerance.

Along a line of rules, z = z0 + step d, each row is flipped from one step on or up to one; a sort and cumulative sums
give accuracy and rates of all of them, O(n log n + n E). From z0 = 0 the rules z = u / t are thresholds t on u . g / c:
with one score there is one such line, and that is all. With several, the linear program over mixtures of rules is
solved by column generation: its prices are the z of the next rule, whose best response is exact and costs one line.
The single best rule is then looked for on further lines: from 0 in other directions, through the best rule so far, and
for two scores through the rules that leave one row undecided. Where all rows are tried that way, two scores are exact,
as the best half-plane can be moved until its edge touches a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Problem", "Solution", "mixture", "single"]

Array = NDArray[np.float64]

_FEASIBLE = 1e-10  # rounding of a rate
_APART = 1e-9  # scores closer than this, relative, are one: no threshold between them
_PENALTY = 1e3  # price of a unit of violation, in accuracy
_ROUNDS = 200


@dataclass(frozen=True)
class Problem:
    """What flips cost and change.

    Attributes:
        g: (n, K) scores, signed so that a rule flips where ``g @ z > c``.
        c: (n,) costs, at least 0.
        gain: (n,) change of accuracy by the flip of a row.
        effect: (E, n) change of each event's rate by the flip of a row.
        accuracy: without flips.
        rates: (E,) without flips.
        families: the events that each family has, as rows of ``effect``; the last of them is the reference.
        tol: the tolerance of each family.
    """

    g: Array
    c: Array
    gain: Array
    effect: Array
    accuracy: float
    rates: Array
    families: Sequence[slice]
    tol: Sequence[float]

    def violation(self, rates: Array) -> Array:
        """By how much rates (E, ...) exceed the tolerances; negative or 0 where they hold."""
        worst = []
        for family, tol in zip(self.families, self.tol, strict=True):
            high = low = rates[family.start]
            for event in range(family.start + 1, family.stop):  # few: a reduction over a short axis is slow
                high, low = np.maximum(high, rates[event]), np.minimum(low, rates[event])
            worst.append(high - low - tol)
        return worst[0] if len(worst) == 1 else np.maximum.reduce(worst)

    def flips(self, z: Array) -> NDArray[np.bool_]:
        """The rows that a rule flips."""
        return flips(self.g, self.c, z)

    def of(self, z: Array) -> tuple[float, Array]:
        """Accuracy and rates of a rule."""
        chosen = self.flips(z)
        return self.accuracy + float(self.gain[chosen].sum()), self.rates + self.effect[:, chosen].sum(1)


@dataclass(frozen=True)
class Solution:
    """Rules (J, K), their weights (J,), and by how much the tolerances are exceeded (0: not at all)."""

    rules: Array
    weights: Array
    excess: float


def flips(g: Array, c: Array, z: Array) -> NDArray[np.bool_]:
    """Whether the rule z flips rows with scores g (n, K) and costs c (n,)."""
    return g @ z > c


def single(problem: Problem, lines: int, random_state: np.random.RandomState) -> Solution:
    """The best single rule: exact over all thresholds for one score, searched for on ``lines`` lines for several."""
    size = problem.g.shape[1]
    if problem.violation(problem.rates) <= _FEASIBLE:
        return _no_flip(size)
    best = _Best(problem)
    if size == 1:
        best.offer(_towards_zero(problem))
        return best.solution()
    for path in _generate(problem)[1]:
        best.offer(path)
    for path in _lines(problem, best, lines, random_state):
        best.offer(path)
    return best.solution()


def mixture(problem: Problem) -> Solution:
    """The best mixture of rules."""
    size = problem.g.shape[1]
    if problem.violation(problem.rates) <= _FEASIBLE:
        return _no_flip(size)
    if size == 1:
        return _marginal(problem, _towards_zero(problem))
    return _generate(problem)[0]


class _Path:
    """Accuracy (m,) and rates (E, m) of the rules origin + step * direction, for m steps."""

    def __init__(
        self, problem: Problem, origin: Array, direction: Array, steps: Array, accuracy: Array, rates: Array
    ) -> None:
        self.origin, self.direction, self.steps = origin, direction, steps
        self.accuracy, self.rates, self.excess = accuracy, rates, problem.violation(rates)

    def rule(self, place: int) -> Array:
        return self.origin + self.steps[place] * self.direction

    def first(self, count: int) -> None:
        self.steps, self.accuracy, self.rates, self.excess = (
            part[..., :count] for part in (self.steps, self.accuracy, self.rates, self.excess)
        )


class _Best:
    """The best single rule seen: within the tolerances and most accurate, else least outside."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.z = np.zeros(problem.g.shape[1])
        self.accuracy, self.excess = -np.inf, np.inf

    def offer(self, path: _Path) -> None:
        inside = path.excess <= _FEASIBLE
        if inside.any():
            place = int(np.argmax(np.where(inside, path.accuracy, -np.inf)))
            better = self.excess > _FEASIBLE or path.accuracy[place] > self.accuracy + 1e-12
        else:
            least = path.excess.min()
            place = int(np.argmax(np.where(path.excess <= least + _FEASIBLE, path.accuracy, -np.inf)))
            better = least < self.excess - _FEASIBLE
        if not better:
            return
        z = path.rule(place)
        accuracy, rates = self.problem.of(z)
        if abs(accuracy - path.accuracy[place]) < 1e-9:  # else rounding decides about some row: not this rule
            self.z, self.accuracy, self.excess = z, accuracy, float(self.problem.violation(rates))

    def solution(self) -> Solution:
        excess = 0.0 if self.excess <= _FEASIBLE else self.excess
        return Solution(self.z[None], np.ones(1), excess)


def _no_flip(size: int) -> Solution:
    return Solution(np.zeros((1, size)), np.ones(1), 0.0)


def _lines(problem: Problem, best: _Best, lines: int, random_state: np.random.RandomState) -> Iterator[_Path]:
    # The lines that are tried for the single best of several scores.
    size = problem.g.shape[1]
    through = np.zeros(0, dtype=np.int64)
    if size == 2:
        through = np.flatnonzero(problem.g.any(1))
        if 2 * len(through) > lines:
            through = random_state.permutation(through)[: lines // 4]
    rest = max(0, lines - 2 * len(through))
    for number in range(rest // 2):
        direction: Array = np.asarray(random_state.standard_normal(size))
        length = np.linalg.norm(best.z)
        if number % 2 and length > 0:
            direction = best.z / length + direction * 0.5 * 0.02 ** (2 * number / rest)
        yield _path(problem, direction)
    for row in through:
        g = problem.g[row]
        across = np.array([-g[1], g[0]])
        for side in (1 - _APART, 1 + _APART):  # the row is not flipped, and is
            yield _sweep(problem, side * problem.c[row] / (g @ g) * g, across)
    for _ in range(rest - rest // 2):
        yield _sweep(problem, best.z, np.asarray(random_state.standard_normal(size)))


def _path(problem: Problem, direction: Array) -> _Path:
    # The rules u / t: thresholds from inf down to 0, most flips last.
    direction = direction / np.linalg.norm(direction)
    along = problem.g @ direction
    rows = np.flatnonzero(along > 0)
    with np.errstate(divide="ignore", over="ignore"):
        ratio = along[rows] / problem.c[rows]
    order = np.argsort(-ratio, kind="stable")
    ratio, rows = ratio[order], rows[order]
    t = _cuts(ratio)
    place = np.flatnonzero(~np.isnan(t))  # thresholds with that many flips
    accuracy = _running(problem.accuracy, problem.gain[rows])
    rates = _running(problem.rates, np.take(problem.effect, rows, axis=1))
    return _Path(
        problem, np.zeros(len(direction)), direction, 1 / t[place], accuracy[place], np.take(rates, place, axis=1)
    )


def _running(start: Array | float, changes: Array) -> Array:
    # start, start + the first change, ...: (..., m + 1)
    total = np.empty((*changes.shape[:-1], changes.shape[-1] + 1))
    total[..., 0] = start
    total[..., 1:] = changes
    return np.cumsum(total, axis=-1, out=total)


def _cuts(ratio: Array) -> Array:
    # The threshold that flips the first j of the falling ratios, j = 0 .. n; NaN where j splits equal ones.
    t = np.full(len(ratio) + 1, np.nan)
    t[0] = np.inf
    if not len(ratio):
        return t
    t[-1] = ratio[-1] / 2 if np.isfinite(ratio[-1]) else 1.0
    high, low = ratio[:-1], ratio[1:]
    with np.errstate(invalid="ignore", over="ignore"):
        between = np.where(np.isinf(high), 2 * low, low + (high - low) / 2)
        apart = np.isinf(high) | (high - low > _APART * high)
    t[1:-1] = np.where(apart & np.isfinite(low), between, np.nan)
    return t


def _sweep(problem: Problem, origin: Array, direction: Array) -> _Path:
    # The rules origin + step * direction. A row with offset a and slope b is flipped where a + step b > 0.
    a, b = problem.g @ origin - problem.c, problem.g @ direction
    start = (b < 0) | ((b == 0) & (a > 0))  # flipped far down
    rows = np.flatnonzero(b)
    with np.errstate(over="ignore"):
        step = -a[rows] / b[rows]
    rows, step = rows[np.isfinite(step)], step[np.isfinite(step)]
    order = np.argsort(step, kind="stable")
    rows, step = rows[order], step[order]
    if not len(rows):
        step = np.zeros(1)
        turn = np.zeros(0)
    else:
        turn = np.sign(b[rows])
        low, high = step[:-1], step[1:]
        apart = high - low > _APART * np.maximum(np.abs(low), np.abs(high))
        ends = np.maximum(1.0, np.abs(step[[0, -1]]))
        step = np.concatenate(
            [step[:1] - ends[0], np.where(apart, low + (high - low) / 2, np.nan), step[-1:] + ends[1]]
        )
    place = np.flatnonzero(~np.isnan(step))
    accuracy = _running(problem.accuracy + problem.gain[start].sum(), turn * problem.gain[rows])
    rates = _running(problem.rates + problem.effect[:, start].sum(1), turn * np.take(problem.effect, rows, axis=1))
    return _Path(problem, origin, direction, step[place], accuracy[place], np.take(rates, place, axis=1))


def _towards_zero(problem: Problem) -> _Path:
    # One score: from no flip on, until the difference of the two rates has changed its sign.
    difference = problem.rates[0] - problem.rates[1]
    path = _path(problem, np.sign(difference)[None])
    crossed = np.flatnonzero((path.rates[0] - path.rates[1]) * np.sign(difference) < -_FEASIBLE)
    if len(crossed):
        path.first(crossed[0] + 1)
    return path


def _marginal(problem: Problem, path: _Path) -> Solution:
    # The last threshold outside and the first inside, mixed so that the tolerance is met exactly; or the best single
    # rule, where counting labels makes it more accurate than that.
    best = _Best(problem)
    best.offer(path)
    difference = path.rates[0] - path.rates[1]
    sign, tol = np.sign(difference[0]), problem.tol[0]
    inside = np.flatnonzero(sign * difference <= tol + _FEASIBLE)
    if not len(inside):
        return best.solution()
    after = int(inside[0])
    above, below = sign * difference[after - 1] - tol, tol - sign * difference[after]
    share = above / (above + below) if above + below > 0 else 1.0
    mixed = share * path.accuracy[after] + (1 - share) * path.accuracy[after - 1]
    if (best.excess <= _FEASIBLE and best.accuracy >= mixed) or share >= 1:
        return best.solution()
    return Solution(np.stack([path.rule(after), path.rule(after - 1)]), np.array([share, 1 - share]), 0.0)


def _generate(problem: Problem) -> tuple[Solution, list[_Path]]:
    # Column generation. The columns of the master program are rules, with their accuracy and rates.
    size = problem.g.shape[1]
    free = np.concatenate([np.arange(family.start, family.stop - 1) for family in problem.families])
    rules, accuracy, rates = [np.zeros(size)], [problem.accuracy], [problem.rates]
    paths: list[_Path] = []
    weights, excess = np.ones(1), np.inf
    for _ in range(_ROUNDS):
        weights, prices, worth, excess = _master(problem, np.array(accuracy), np.array(rates).T)
        z = prices[free]
        if not np.any(z):
            break
        path = _path(problem, z)
        paths.append(path)
        value = path.accuracy - prices @ path.rates
        place = int(np.argmax(value))
        rule = path.rule(place)
        found = problem.of(rule)
        if min(value[place], found[0] - found[1] @ prices) <= worth + 1e-9:
            break
        rules.append(rule)
        accuracy.append(found[0])
        rates.append(found[1])
    used = weights > 1e-12
    kept = weights[used] / weights[used].sum()
    return Solution(np.array(rules)[: len(weights)][used], kept, 0.0 if excess <= 1e-9 else excess), paths


def _master(problem: Problem, accuracy: Array, rates: Array) -> tuple[Array, Array, float, float]:
    # Maximize accuracy of the mixture minus the penalty of what exceeds the tolerances. Variables: the weights, the
    # lowest rate of each family (free), the excess of each family. Returns the weights, the price of each event's
    # rate, the worth that a new column must exceed, and the largest excess.
    from scipy.optimize import linprog

    columns, families = len(accuracy), len(problem.families)
    count = len(rates)
    owner = np.zeros((count, families))
    for number, family in enumerate(problem.families):
        owner[family, number] = 1
    nothing = np.zeros((count, families))
    upper = np.hstack([rates, -owner, -owner])
    lower = np.hstack([-rates, owner, nothing])
    answer = linprog(
        np.concatenate([-accuracy, np.zeros(families), np.full(families, _PENALTY)]),
        A_ub=np.vstack([upper, lower]),
        b_ub=np.concatenate([owner @ np.asarray(problem.tol), np.zeros(count)]),
        A_eq=np.concatenate([np.ones(columns), np.zeros(2 * families)])[None],
        b_eq=[1.0],
        bounds=[(0, None)] * columns + [(None, None)] * families + [(0, None)] * families,
        method="highs",
    )
    if answer.status != 0:
        raise RuntimeError(f"the linear program over {columns} rules was not solved: {answer.message}")
    marginals = -answer.ineqlin.marginals
    prices = marginals[:count] - marginals[count:]
    prices[np.abs(prices) < 1e-12] = 0
    return answer.x[:columns], prices, -float(answer.eqlin.marginals[0]), float(answer.x[columns + families :].max())
