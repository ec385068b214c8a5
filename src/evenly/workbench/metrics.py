"""From trials to a ranking: performance under corruption, spread over seeds, ties.

With P[c, s] the accuracy under corruption c at severity s and P the clean accuracy (Dalva et al. 2021,
arXiv:2109.01123)::

    P_c = mean over s of P[c, s]        mPC = mean over c of P_c        rPC = mPC / P

**The spread and the tie rule.** A normalization's score of one seed is its mean over the batch sizes. Two
normalizations are compared seed by seed, on the n seeds that both have: d_i is the difference of their scores of
seed i. They *tie* unless

    |mean(d)| > max(t * sd(d) / sqrt(n), one test sample),

t being the 97.5 % point of Student's distribution with n - 1 degrees of freedom: the 95 % paired interval of the
difference has to leave zero out. With one seed there is no spread, and everything ties. The rank of a
normalization is 1 plus the number of those that are better than it and do not tie with it; so all of rank 1 are
beaten by none. Each interval is for one pair; no correction is made for the number of pairs. The test set is the
same for all, so the spread is that of training (initial weights, order of samples) and says nothing about another
test set.

A normalization that lacks a trial (a failure) is not ranked: its mean would be over other conditions than the
means of the rest. A trial that diverged counts with the accuracy that it has.

Everything here holds for bits per byte too, of which less is better (:data:`LOWER`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, stdev

from evenly.workbench.trial import TrialFailure, TrialResult, TrialSettings

__all__ = [
    "LOWER",
    "METRICS",
    "Arm",
    "Cell",
    "Difference",
    "difference",
    "amount",
    "family_means",
    "finding",
    "mpc",
    "rank",
    "rpc",
    "summarize",
    "worst_corruption",
]

METRICS = {
    "mpc": "mean accuracy under corruption (mPC)",
    "clean": "clean accuracy",
    "rpc": "relative performance under corruption (rPC)",
    "worst": "accuracy under the worst corruption",
    "domain": "mean accuracy on shifted domains",
    "ood": "accuracy on the second data set",
    "bits": "bits per byte",
}
"""What can be ranked by; ``"bits"`` is of text, the others of images and tables."""

LOWER = frozenset({"bits"})
"""Metrics of which less is better; all others are fractions of which more is better."""

CONFIDENCE = 0.95

Table = Mapping[str, Sequence[float]]


def mpc(table: Table) -> float:
    """Mean performance under corruption: the mean over corruptions of the mean over severities.

    Args:
        table: accuracies by corruption, one for each severity.

    Raises:
        ValueError: there is no corruption, or one without severities.

    >>> mpc({"fog": [0.8, 0.6], "snow": [0.5, 0.3]})
    0.55
    """
    if not table or not all(len(row) for row in table.values()):
        raise ValueError("mpc needs at least one corruption with at least one severity")
    return fmean(fmean(row) for row in table.values())


def rpc(table: Table, clean: float) -> float:
    """Relative performance under corruption: mPC divided by the clean accuracy.

    Raises:
        ValueError: as :func:`mpc`, and if ``clean`` is not above 0.

    >>> round(rpc({"fog": [0.8, 0.6], "snow": [0.5, 0.3]}, clean=0.9), 4)
    0.6111
    """
    if not clean > 0:
        raise ValueError(f"clean accuracy is {clean}, rPC needs one above 0")
    return mpc(table) / clean


def worst_corruption(table: Table) -> tuple[str, float]:
    """The corruption with the lowest mean over severities, and that mean.

    >>> worst_corruption({"fog": [0.75, 0.5], "snow": [0.5, 0.25]})
    ('snow', 0.375)
    """
    mpc(table)  # the same checks
    name = min(table, key=lambda each: fmean(table[each]))
    return name, fmean(table[name])


def family_means(table: Table, families: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """The mean over the corruptions of each family; families without any are left out.

    >>> family_means({"fog": [0.8, 0.6], "snow": [0.5, 0.3]}, {"weather": ["fog", "snow"], "blur": ["zoom"]})
    {'weather': 0.55}
    """
    found = {}
    for family, names in families.items():
        rows = {name: table[name] for name in names if name in table}
        if rows:
            found[family] = mpc(rows)
    return found


@dataclass(frozen=True)
class Difference:
    """A compared with B over the seeds that both have.

    Attributes:
        mean: mean of A minus B.
        half_width: half the width of the 95 % paired interval; infinite for one seed, NaN-free.
        n: number of seeds.
        tie: the difference is not larger than the spread (see the module).
    """

    mean: float
    half_width: float
    n: int
    tie: bool


def difference(a: Mapping[int, float], b: Mapping[int, float], resolution: float = 0.0) -> Difference:
    """Compare two normalizations, paired by seed.

    Args:
        a, b: score by seed.
        resolution: differences up to this size always tie (one test sample).

    Raises:
        ValueError: no seed in common.

    >>> difference({0: 0.9, 1: 0.8}, {0: 0.6, 1: 0.5}).tie
    False
    >>> difference({0: 0.9}, {0: 0.1}).tie
    True
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        raise ValueError(f"no seed in common: {sorted(a)} and {sorted(b)}")
    gaps = [a[seed] - b[seed] for seed in seeds]
    mean = fmean(gaps)
    n = len(gaps)
    if n == 1:
        return Difference(mean, math.inf, 1, True)
    from scipy.stats import t

    half = float(t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * stdev(gaps) / math.sqrt(n)
    # The slack keeps scores that are equal up to rounding from being told apart.
    return Difference(mean, half, n, not abs(mean) > max(half, resolution) + 1e-12)


def rank(scores: Mapping[str, Mapping[int, float]], resolution: float = 0.0, *, lower: bool = False) -> dict[str, int]:
    """Ranks by the tie rule of the module: 1 plus the number of those that are surely better.

    Args:
        scores: score by seed, by name. Higher is better.
        resolution: differences up to this size always tie.
        lower: lower is better.

    Returns:
        Rank by name, best mean first.

    >>> sure, unsure, worse = {0: 0.90, 1: 0.91, 2: 0.92}, {0: 0.85, 1: 0.93, 2: 0.9}, {0: 0.5, 1: 0.5, 2: 0.51}
    >>> rank({"a": worse, "b": sure, "c": unsure})
    {'b': 1, 'c': 1, 'a': 3}
    """
    sign = -1 if lower else 1
    order = sorted(scores, key=lambda name: -sign * fmean(scores[name].values()))
    ranks = {}
    for name in order:
        better = 0
        for other in order:
            if other != name:
                gap = difference(scores[other], scores[name], resolution)
                better += sign * gap.mean > 0 and not gap.tie
        ranks[name] = 1 + better
    return ranks


@dataclass(frozen=True)
class Cell:
    """One normalization at one batch size.

    Attributes:
        norm, batch_size: which.
        lr: the learning rate of the trials; ``None`` if there is none yet.
        at_edge: the search for it ended at the end of its grid.
        planned: number of trials (seeds).
        scores: metric (see :data:`METRICS`) by seed; metrics that do not exist are left out.
        corruptions: mean accuracy by corruption and severity, over the seeds.
        domains: mean accuracy by shifted domain, over the seeds.
        curves: learning curve by seed.
        diverged: seeds that diverged.
        errors: error by seed that failed.
        seconds_per_step: median over the seeds.
        memory_bytes: largest over the seeds.
        memory_kind: see :class:`TrialResult`.
        parameters: number of trainable parameters.
    """

    norm: str
    batch_size: int
    lr: float | None = None
    at_edge: bool = False
    planned: int = 0
    scores: dict[str, dict[int, float]] = field(default_factory=dict)
    corruptions: dict[str, tuple[float, ...]] = field(default_factory=dict)
    domains: dict[str, float] = field(default_factory=dict)
    curves: dict[int, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    diverged: tuple[int, ...] = ()
    errors: dict[int, str] = field(default_factory=dict)
    seconds_per_step: float = math.nan
    memory_bytes: int = 0
    memory_kind: str = "saved"
    parameters: int = 0

    def mean(self, metric: str) -> float:
        """Mean of a metric over the seeds, NaN without trials."""
        values = self.scores.get(metric, {}).values()
        return fmean(values) if values else math.nan


@dataclass(frozen=True)
class Arm:
    """One normalization over all batch sizes.

    Attributes:
        norm: which.
        cells: one for each batch size.
        rank: see the module; ``None`` if a trial is missing.
        scores: metric by seed: the mean over the batch sizes, for the seeds that have all of them.
        corruptions: mean accuracy by corruption and severity, over seeds and batch sizes.
        worst: name of the worst corruption.
    """

    norm: str
    cells: tuple[Cell, ...]
    rank: int | None
    scores: dict[str, dict[int, float]]
    corruptions: dict[str, tuple[float, ...]]
    worst: str | None

    @property
    def complete(self) -> bool:
        """Whether every planned trial has a result."""
        return all(max(map(len, cell.scores.values()), default=0) == cell.planned for cell in self.cells)

    @property
    def diverged(self) -> int:
        """Number of trials that diverged."""
        return sum(len(cell.diverged) for cell in self.cells)

    @property
    def failed(self) -> int:
        """Number of trials that failed."""
        return sum(len(cell.errors) for cell in self.cells)

    def mean(self, metric: str) -> float:
        """Mean of a metric over the seeds, NaN without trials."""
        values = self.scores.get(metric, {}).values()
        return fmean(values) if values else math.nan

    def spread(self, metric: str) -> float:
        """Standard deviation of a metric over the seeds, NaN for fewer than two."""
        values = list(self.scores.get(metric, {}).values())
        return stdev(values) if len(values) > 1 else math.nan


def summarize(
    trials: Sequence[tuple[TrialSettings, TrialResult | TrialFailure | None]],
    *,
    metric: str = "mpc",
    resolution: float = 0.0,
    at_edge: frozenset[tuple[str, int]] = frozenset(),
) -> list[Arm]:
    """The normalizations of a comparison, by rank and then by mean, those without a rank last.

    Args:
        trials: the planned trials of purpose ``"score"`` with their outcomes; ``None``: not run yet.
        metric: what to rank by, one of :data:`METRICS`.
        resolution: one test sample, 1 / (size of the test set).
        at_edge: (norm, batch size) whose learning rate lies at the end of the grid.

    Raises:
        ValueError: an unknown metric.
    """
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}: known are {', '.join(METRICS)}")
    grouped: dict[str, dict[int, list[tuple[TrialSettings, TrialResult | TrialFailure | None]]]] = {}
    for settings, outcome in trials:
        grouped.setdefault(settings.norm, {}).setdefault(settings.batch_size, []).append((settings, outcome))
    arms = []
    for norm, by_batch in grouped.items():
        cells = tuple(_cell(norm, batch, rows, (norm, batch) in at_edge) for batch, rows in by_batch.items())
        arms.append(_arm(norm, cells))
    complete = {arm.norm: arm.scores[metric] for arm in arms if arm.complete and arm.scores.get(metric)}
    ranks = rank(complete, resolution, lower=metric in LOWER)
    ranked = [_with_rank(arm, ranks.get(arm.norm)) for arm in arms]

    def order(arm: Arm) -> tuple[float, float]:
        mean = -arm.mean(metric) if metric in LOWER else arm.mean(metric)
        return math.inf if arm.rank is None else arm.rank, (-mean if math.isfinite(mean) else math.inf)

    return sorted(ranked, key=order)


def finding(arms: Sequence[Arm], metric: str = "mpc", resolution: float = 0.0) -> str:
    """What was found, and how sure it is, in one sentence.

    Args:
        arms: from :func:`summarize`.
        metric: what they were ranked by.
        resolution: as in :func:`summarize`.
    """
    ranked = [arm for arm in arms if arm.rank is not None]
    left_out = [arm.norm for arm in arms if arm.rank is None]
    without = f"; not ranked, for want of finished trials: {_listed(left_out)}" if left_out else ""
    what = METRICS[metric]
    if not ranked:
        return "Nothing can be ranked: no normalization finished all of its trials."
    seeds = len(ranked[0].scores[metric])
    best = ranked[0]
    if len(ranked) == 1:
        return f"{best.norm} alone finished its trials: {what} {amount(metric, best.mean(metric))}{without}."
    if seeds == 1:
        second, most = ranked[1], "fewest" if metric in LOWER else "highest"
        return (
            f"{best.norm} has the {most} {what}, {amount(metric, best.mean(metric))} against "
            f"{amount(metric, second.mean(metric))} for {second.norm}, but one seed has no spread, so nothing is sure"
            f"{without}."
        )
    top = [arm for arm in ranked if arm.rank == 1]
    rest = [arm for arm in ranked if arm.rank != 1]
    if len(top) == 1:
        gap = difference(best.scores[metric], ranked[1].scores[metric], resolution)
        if metric in LOWER:
            size, low, high = (f"{abs(gap.mean) + d:.3f}" for d in (0, -gap.half_width, gap.half_width))
            lead, unit = f"{size} below", ""
        else:
            low, high = (f"{100 * (gap.mean + d):.1f}" for d in (-gap.half_width, gap.half_width))
            lead, unit = f"{100 * gap.mean:.1f} points above", " points"
        text = (
            f"{best.norm} is best in {what}: {amount(metric, best.mean(metric))}, {lead} {ranked[1].norm}, the next "
            f"(95 % interval {low} to {high}{unit}, over {seeds} seeds)"
        )
    else:
        means = ", ".join(amount(metric, arm.mean(metric)).removesuffix(" %") for arm in top)
        means += "" if metric in LOWER else " %"
        text = (
            f"{_listed([arm.norm for arm in top])} tie for the best {what} ({means}): their differences are smaller "
            f"than the spread over {seeds} seeds"
        )
        if rest:
            text += f", while {_listed([arm.norm for arm in rest])} {'is' if len(rest) == 1 else 'are'} worse than "
            text += "at least one of them with 95 % confidence a pair"
    return f"{text}{_clean_clause(ranked, metric, resolution)}{without}."


def _clean_clause(ranked: Sequence[Arm], metric: str, resolution: float) -> str:
    if metric == "clean" or any("clean" not in arm.scores for arm in ranked):
        return ""
    ranks = rank({arm.norm: arm.scores["clean"] for arm in ranked}, resolution)
    top = [arm for arm in ranked if ranks[arm.norm] == 1]
    means = sorted(100 * arm.mean("clean") for arm in top)
    if len(top) == 1:
        return f"; on clean data {top[0].norm} is best ({means[0]:.1f} %)"
    span = f"{means[0]:.1f} to {means[-1]:.1f} %" if f"{means[0]:.1f}" != f"{means[-1]:.1f}" else f"{means[0]:.1f} %"
    return f"; on clean data {_listed([arm.norm for arm in top])} tie for the best ({span})"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def amount(metric: str, value: float) -> str:
    """A score in words: a percentage, or a number of bits.

    >>> amount("clean", 0.5), amount("bits", 2.5)
    ('50.0 %', '2.500')
    """
    return f"{value:.3f}" if metric in LOWER else f"{100 * value:.1f} %"


def _cell(
    norm: str,
    batch: int,
    rows: Sequence[tuple[TrialSettings, TrialResult | TrialFailure | None]],
    at_edge: bool,
) -> Cell:
    scores: dict[str, dict[int, float]] = {}
    results: dict[int, TrialResult] = {}
    errors: dict[int, str] = {}
    for settings, outcome in rows:
        if isinstance(outcome, TrialFailure):
            errors[settings.seed] = outcome.error
        elif outcome is not None:
            results[settings.seed] = outcome
            for metric, value in _metrics(outcome).items():
                scores.setdefault(metric, {})[settings.seed] = value
    each = list(results.values())
    return Cell(
        norm=norm,
        batch_size=batch,
        lr=rows[0][0].lr,
        at_edge=at_edge,
        planned=len(rows),
        scores=scores,
        corruptions=_mean_table([result.corruptions for result in each]),
        domains={name: fmean(r.domains[name] for r in each) for name in (each[0].domains if each else ())},
        curves={seed: result.curve for seed, result in results.items()},
        diverged=tuple(seed for seed, result in results.items() if result.diverged),
        errors=errors,
        seconds_per_step=median(r.seconds_per_step for r in each) if each else math.nan,
        memory_bytes=max((r.memory_bytes for r in each), default=0),
        memory_kind=each[0].memory_kind if each else "saved",
        parameters=each[0].parameters if each else 0,
    )


def _metrics(result: TrialResult) -> dict[str, float]:
    found: dict[str, float] = {}
    if result.clean is not None:
        found["clean"] = result.clean
    if result.corruptions:
        found["mpc"] = mpc(result.corruptions)
        found["worst"] = worst_corruption(result.corruptions)[1]
        if result.clean:
            found["rpc"] = rpc(result.corruptions, result.clean)
    if result.domains:
        found["domain"] = fmean(result.domains.values())
    if result.ood is not None:
        found["ood"] = result.ood
    if result.bits is not None:
        found["bits"] = result.bits
    return found


def _arm(norm: str, cells: tuple[Cell, ...]) -> Arm:
    scores: dict[str, dict[int, float]] = {}
    for metric in METRICS:
        tables = [cell.scores.get(metric, {}) for cell in cells]
        seeds = set.intersection(*(set(table) for table in tables))
        if seeds:
            scores[metric] = {seed: fmean(table[seed] for table in tables) for seed in sorted(seeds)}
    corruptions = _mean_table([cell.corruptions for cell in cells if cell.corruptions])
    return Arm(norm, cells, None, scores, corruptions, worst_corruption(corruptions)[0] if corruptions else None)


def _with_rank(arm: Arm, value: int | None) -> Arm:
    return Arm(arm.norm, arm.cells, value, arm.scores, arm.corruptions, arm.worst)


def _mean_table(tables: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, tuple[float, ...]]:
    if not tables:
        return {}
    return {
        name: tuple(fmean(values) for values in zip(*(table[name] for table in tables), strict=True))
        for name in tables[0]
    }
