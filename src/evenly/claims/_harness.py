"""Run a claim: train every arm with every seed, judge the criterion, keep the numbers.

A trial is one arm with one seed and is a pure function of both, so trials can run in any order, in other
processes, and be kept: each finished trial is written to ``.partial`` in the output folder at once and is reused
when a run that was killed starts again. Only the driver writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import itertools
import json
import os
import platform
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from evenly.claims._store import checkout_dir, dumps, number, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BUDGETS", "Check", "Claim", "ClaimError", "Judgement", "Metric", "Results", "Trial", "run_claim"]

#: "full" decides; "small" is a smoke test of a few seconds that decides nothing.
BUDGETS = ("small", "full")

#: ``report(what, done, total)``, called after each trial.
Progress = Callable[[str, int, int], None]


class ClaimError(ValueError):
    """A claim was asked for wrongly, or one of its trials failed."""


class Trial(NamedTuple):
    """One run: the name of an arm and a seed."""

    arm: str
    seed: int


#: What each trial returned, in the order of the plan. Numbers that are not finite are None.
Results = dict[Trial, dict[str, Any]]


@dataclass(frozen=True)
class Metric:
    """One number, for each seed, of the baseline and of the method. None: the run never got there."""

    name: str
    baseline: str
    baseline_values: Sequence[float | None]
    method: str
    method_values: Sequence[float | None]


@dataclass(frozen=True)
class Check:
    """One part of the criterion: ``value relation threshold``. The claim holds when every check passes."""

    name: str
    value: float
    relation: str
    threshold: float

    def __post_init__(self) -> None:
        if self.relation not in _RELATIONS:
            raise ClaimError(f"relation is {self.relation!r}; expected one of {', '.join(_RELATIONS)}")

    @property
    def passed(self) -> bool:
        """Whether the value stands in the relation to the threshold; NaN never does."""
        return _RELATIONS[self.relation](self.value, self.threshold)

    def __str__(self) -> str:
        return f"{self.name} is {number(self.value)}, wanted {self.relation} {number(self.threshold)}"


@dataclass(frozen=True)
class Judgement:
    """What a claim's results say.

    Attributes:
        metrics: the numbers of baseline and method, one value a seed.
        checks: the criterion, part by part.
        effect: the headline difference: ``(name, value, low, high)`` where low and high are its spread over seeds.
        why: one sentence, used where the claim is not reproduced, on what is behind the failed check.
        notes: numbers that are reported but not judged.
    """

    metrics: Sequence[Metric]
    checks: Sequence[Check]
    effect: tuple[str, float, float, float]
    why: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every check passes."""
        return all(check.passed for check in self.checks)


@dataclass(frozen=True)
class Claim:
    """A paper's claim as an experiment that could fail.

    Attributes:
        id: the id of the method in the register.
        statement: what the paper says, in one sentence.
        criterion: the pass criterion in words, fixed in the file before the run.
        data: which data the trials train on.
        arms: the settings of each arm by name; baseline and method get the same tuning budget.
        seeds: the seeds of each budget.
        trial: ``trial(settings, seed, budget)`` trains one arm with one seed and returns numbers as plain data.
        judge: ``judge(results)`` applies the criterion.
        plan: ``plan(budget, results)`` names the trials; it is asked again with the results so far until it
            names no new one, so that later trials may use what tuning trials found. Default: every arm with
            every seed.
        draw: ``draw(figure, results, judgement)`` draws the picture. Default: each metric, a dot a seed.
    """

    id: str
    statement: str
    criterion: str
    data: str
    arms: Mapping[str, Mapping[str, Any]]
    seeds: Mapping[str, Sequence[int]]
    trial: Callable[[Mapping[str, Any], int, str], dict[str, Any]]
    judge: Callable[[Results], Judgement]
    plan: Callable[[str, Results], Sequence[Trial]] | None = None
    draw: Callable[[Figure, Results, Judgement], None] | None = None

    def __post_init__(self) -> None:
        if set(self.seeds) != set(BUDGETS):
            raise ClaimError(f"claim {self.id!r}: seeds are given for {sorted(self.seeds)}; expected {sorted(BUDGETS)}")

    def run(
        self,
        budget: str = "full",
        progress: Progress | None = None,
        *,
        workers: int = 1,
        cache: Path | None = None,
    ) -> Results:
        """Run every trial of a budget and return what each gave.

        Args:
            budget: ``"small"`` or ``"full"``.
            progress: called after each trial with what was done, how many are done, and how many there are.
            workers: processes; 1 runs in this one. The results do not depend on it.
            cache: a folder where finished trials are kept and from which they are reused.

        Raises:
            ClaimError: an unknown budget, fewer than one worker, or a trial that failed (finished ones are kept).
        """
        if budget not in BUDGETS:
            raise ClaimError(f"budget is {budget!r}; expected one of {', '.join(BUDGETS)}")
        if workers < 1:
            raise ClaimError(f"workers is {workers}; expected 1 or more")
        results: Results = {}
        with _runner(self, budget, workers) as run:
            while True:
                planned = list(self.plan(budget, results)) if self.plan else self._every(budget)
                waiting = [trial for trial in planned if trial not in results]
                if not waiting:
                    return {trial: results[trial] for trial in planned}
                if cache is not None:
                    for trial in list(waiting):
                        kept = _kept(cache, trial)
                        if kept is not None:
                            results[trial] = kept
                            waiting.remove(trial)
                if progress is not None:
                    progress(self.id, len(results), len(planned))
                for trial, outcome in run(waiting):
                    results[trial] = outcome
                    if cache is not None:
                        write_atomically(_slot(cache, trial), dumps({**trial._asdict(), "result": outcome}))
                    if progress is not None:
                        progress(f"{self.id}: {trial.arm}", len(results), len(planned))

    def _every(self, budget: str) -> list[Trial]:
        return [Trial(arm, seed) for seed, arm in itertools.product(self.seeds[budget], self.arms)]


def run_claim(
    claim: Claim,
    budget: str = "full",
    *,
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Run a claim, judge it, store the result and the picture, and return the result.

    Args:
        claim: the claim, from :func:`evenly.claims.get`.
        budget: ``"full"`` decides; ``"small"`` is a smoke test and is stored only where ``out`` is given, as
            ``ID.small.json``, never in the place of a full result.
        out: the folder for ``ID.json`` and ``ID.svg``. Default for a full budget: ``docs/claims`` of the checkout,
            or ``claims`` in the current folder where the library is installed.
        progress: called after each trial with what was done, how many are done, and how many there are.
        workers: processes. Default: 1 for a small budget, else one a core, at most 2.

    Returns:
        The stored data: ``id``, ``statement``, ``criterion``, ``budget``, ``verdict`` (``"reproduced"``,
        ``"not reproduced"``, or ``"not judged"`` for a small budget), ``why``, ``effect``, ``metrics``,
        ``checks``, ``notes``, ``seeds``, ``data``, ``command``, ``versions``, ``duration_s`` (by the clock, of this
        run alone), ``cpu_s`` (processor time of all trials, kept ones too) and ``trials``.

    Raises:
        ClaimError: see :meth:`Claim.run`.
    """
    folder = Path(out) if out is not None else None
    if folder is None and budget == "full":
        folder = checkout_dir() or Path("claims")  # an installed package is not a place to write to
    if workers is None:
        workers = 1 if budget == "small" else min(2, os.cpu_count() or 1)
    cache = None
    if folder is not None and budget in BUDGETS:
        cache = folder / ".partial" / claim.id / f"{budget}-{_fingerprint(claim)}"
    started = time.monotonic()
    results = claim.run(budget, progress, workers=workers, cache=cache)
    judgement = claim.judge(results)
    result = _result(claim, budget, results, judgement)
    result["duration_s"] = round(time.monotonic() - started, 1)
    result["cpu_s"] = round(sum(outcome["cpu_seconds"] for outcome in results.values()), 1)
    result["workers"] = workers
    result["trials"] = [{**trial._asdict(), **outcome} for trial, outcome in results.items()]
    if folder is not None:
        from evenly.claims import _picture

        stem = claim.id if budget == "full" else f"{claim.id}.small"
        write_atomically(folder / f"{stem}.svg", _picture.svg(claim, results, judgement))
        write_atomically(folder / f"{stem}.json", dumps(result) + "\n")
        shutil.rmtree(folder / ".partial" / claim.id)  # the result now holds every trial
        with contextlib.suppress(OSError):  # another claim still keeps trials there
            (folder / ".partial").rmdir()
    return json.loads(dumps(result))


def _result(claim: Claim, budget: str, results: Results, judgement: Judgement) -> dict[str, Any]:
    if budget == "small":
        verdict, why = "not judged", "A small budget is a smoke test and decides nothing."
    elif judgement.passed:
        verdict, why = "reproduced", ""
    else:
        failed = "; ".join(str(check) for check in judgement.checks if not check.passed)
        verdict, why = "not reproduced", " ".join(f"{failed[:1].upper()}{failed[1:]}. {judgement.why}".split())
    name, value, low, high = judgement.effect
    return {
        "id": claim.id,
        "statement": claim.statement,
        "criterion": claim.criterion,
        "budget": budget,
        "verdict": verdict,
        "why": why,
        "effect": {"name": name, "value": value, "low": low, "high": high},
        "metrics": [
            {
                "name": metric.name,
                "baseline": {"name": metric.baseline, "per_seed": list(metric.baseline_values)},
                "method": {"name": metric.method, "per_seed": list(metric.method_values)},
            }
            for metric in judgement.metrics
        ],
        "checks": [{**vars(check), "passed": check.passed} for check in judgement.checks],
        "notes": dict(judgement.notes),
        "seeds": list(claim.seeds[budget]),
        "data": claim.data,
        "command": f"evenly claim {claim.id} --budget {budget}",
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    import numpy
    import sklearn
    import torch

    import evenly

    return {
        "evenly": evenly.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scikit-learn": sklearn.__version__,
        "machine": platform.machine(),
    }


def _fingerprint(claim: Claim) -> str:
    # Kept trials are reused only by the same code: the library's sources, the claim's file and torch.
    import torch

    package = Path(__file__).resolve().parents[1]
    files = {*package.rglob("*.py"), *package.rglob("*.cpp")} - set((package / "claims").rglob("*"))
    own = inspect.getsourcefile(claim.trial)
    if own is not None:
        files |= {Path(own).resolve()}
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _slot(cache: Path, trial: Trial) -> Path:
    words = re.sub(r"[^A-Za-z0-9.]+", "-", trial.arm).strip("-")
    tag = hashlib.sha256(trial.arm.encode()).hexdigest()[:8]
    return cache / f"{words}-{tag}-seed{trial.seed}.json"


def _kept(cache: Path, trial: Trial) -> dict[str, Any] | None:
    path = _slot(cache, trial)
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))["result"]


@contextlib.contextmanager
def _runner(
    claim: Claim, budget: str, workers: int
) -> Iterator[Callable[[Sequence[Trial]], Iterator[tuple[Trial, dict[str, Any]]]]]:
    if workers == 1:

        def here(trials: Sequence[Trial]) -> Iterator[tuple[Trial, dict[str, Any]]]:
            for trial in trials:
                with _named(claim, trial):
                    outcome = _run_trial(claim, trial, budget)
                yield trial, outcome

        yield here
        return

    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_end_with_parent,
        initargs=(os.getpid(),),
    )

    def there(trials: Sequence[Trial]) -> Iterator[tuple[Trial, dict[str, Any]]]:
        futures = {pool.submit(_run_by_id, claim.id, trial, budget): trial for trial in trials}
        for future in as_completed(futures):
            with _named(claim, futures[future]):
                outcome = future.result()
            yield futures[future], outcome

    try:
        yield there
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run_by_id(id: str, trial: Trial, budget: str) -> dict[str, Any]:
    from evenly import claims

    return _run_trial(claims.get(id), trial, budget)


def _run_trial(claim: Claim, trial: Trial, budget: str) -> dict[str, Any]:
    # One thread a trial: the numbers do not depend on how many cores there are.
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    started, cpu = time.perf_counter(), time.process_time()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(trial.seed)
            outcome = claim.trial(claim.arms[trial.arm], trial.seed, budget)
    finally:
        torch.set_num_threads(threads)
    seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    outcome = {**outcome, **{name: round(value, 2) for name, value in seconds.items()}}
    return json.loads(dumps(outcome))  # a fresh result and a kept one read the same


@contextlib.contextmanager
def _named(claim: Claim, trial: Trial) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ClaimError(
            f"claim {claim.id!r}: the trial {trial.arm!r} with seed {trial.seed} failed: "
            f"{type(error).__name__}: {error}"
        ) from error


def _end_with_parent(parent: int) -> None:
    # A worker whose driver was killed would wait for work for ever; it ends itself instead.
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_RELATIONS: dict[str, Callable[[float, float], bool]] = {
    ">=": lambda value, threshold: value >= threshold,
    ">": lambda value, threshold: value > threshold,
    "<=": lambda value, threshold: value <= threshold,
    "<": lambda value, threshold: value < threshold,
}
