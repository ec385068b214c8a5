"""Which normalization should I use for my model and my data? Answered by measuring.

:func:`compare` trains a network with every normalization, at several batch sizes and from several seeds, each at a
learning rate found on the same budget; tests each on clean data, under 15 corruptions at 5 severities and on
shifted domains; and ranks them, with ties where the difference is smaller than the spread. ``evenly compare`` is
the same on the command line.

On text (``model="gpt", data="text"``) a small language model is trained at every learning rate of a grid and then, at
the best, from several seeds; normalizations are ranked by bits per byte.

Everything is kept in the output folder: ``trials.sqlite`` (every trial), ``report.html``, ``cache/`` (corrupted
test sets; may be deleted). Started again with the same folder, finished trials are loaded and not run again, and
failed ones are tried again.
"""

from __future__ import annotations

import importlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from evenly.workbench.engines import LocalEngine, Outcome, make_engine
from evenly.workbench.language import build_language_model, is_text, load_words, windows
from evenly.workbench.machine import machine
from evenly.workbench.metrics import LOWER, METRICS, Arm, finding, summarize
from evenly.workbench.progress import Watch, print_ranking
from evenly.workbench.sets import data_hash, evaluation_sets, load_data
from evenly.workbench.store import Store
from evenly.workbench.trial import (
    TrialFailure,
    TrialSettings,
    build_model,
    code_version,
)
from evenly.workbench.tune import choose, default_lr, grid

__all__ = ["Comparison", "compare"]

DEFAULT_BATCH_SIZES = (4, 64)
DEFAULT_SEEDS = 3
DEFAULT_EPOCHS = 2
DEFAULT_STEPS = 110
QUICK_BATCH_SIZES = (64,)
QUICK_STEPS = 66
QUICK_SEVERITIES = (1, 3, 5)
QUICK_TEST_SAMPLES = 160
DEFAULT_TEST_SAMPLES = 512
TEXT_BATCH_SIZES = (16,)
TEXT_STEPS = 240
QUICK_TEXT_STEPS = 50


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`.

    Attributes:
        arms: the normalizations, best first; see :class:`evenly.workbench.metrics.Arm`.
        finding: what was found and how sure it is, in one sentence.
        metric: what they are ranked by.
        trials: every planned trial with its outcome, the search for learning rates included.
        loaded: number of trials that came out of the store.
        seconds: wall time.
        out: the output folder.
        report: the HTML report.
    """

    arms: tuple[Arm, ...]
    finding: str
    metric: str
    trials: tuple[tuple[TrialSettings, Outcome], ...]
    loaded: int
    seconds: float
    out: Path
    report: Path

    @property
    def failed(self) -> tuple[tuple[TrialSettings, TrialFailure], ...]:
        """The trials that failed, with their errors."""
        return tuple((s, outcome) for s, outcome in self.trials if isinstance(outcome, TrialFailure))

    def frame(self) -> Any:
        """A :class:`pandas.DataFrame`, one row a normalization, batch size and seed."""
        import pandas as pd

        rows = []
        for arm in self.arms:
            for cell in arm.cells:
                seeds = sorted({seed for table in cell.scores.values() for seed in table} | cell.errors.keys())
                for seed in seeds:
                    row: dict[str, Any] = {"rank": arm.rank, "norm": arm.norm, "batch_size": cell.batch_size}
                    row |= {"seed": seed, "lr": cell.lr, "diverged": seed in cell.diverged}
                    row |= {metric: table.get(seed, math.nan) for metric, table in cell.scores.items()}
                    row["error"] = cell.errors.get(seed)
                    rows.append(row)
        return pd.DataFrame(rows)


def compare(
    norms: Sequence[str] | None = None,
    *,
    data: str = "digits",
    ood: str | None = None,
    model: str | None = None,
    batch_sizes: Sequence[int] | None = None,
    seeds: int | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    tune: bool | None = None,
    device: str = "cpu",
    engine: str = "local",
    address: str | None = None,
    workers: int | None = None,
    out: str | Path = "evenly-compare",
    quick: bool = False,
    rank_by: str | None = None,
    console: Console | None = None,
    command: str | None = None,
) -> Comparison:
    """Compare normalizations by training with each of them.

    Args:
        norms: names in :data:`evenly.models.RECIPES`, or ``"module:attribute"`` paths to your own; ``"all"`` among them
            stands for every recipe for the kind of data; ``None``: the default ones of these.
        data: what to train on, as in :func:`evenly.data.load`; or ``"text"``, the source of Python's standard
            library, or ``"text:FILE"``.
        ood: a second data set with the same classes, tested on and never trained on.
        model: ``"resnet"``, ``"mlp"`` or ``"module:factory"`` (see :func:`evenly.workbench.trial.build_model`);
            ``None``: the ResNet for images, the MLP for features, ``"gpt"`` for text, which has no other.
        batch_sizes: default 4 and 64 (quick: 64); on text 16.
        seeds: number of seeds, default 3.
        epochs: passes over the training set; default: as many as make 110 steps (quick: 66), at least 2, which
            leaves small data and large batches enough steps to learn anything. On text 240 steps (quick: 50).
        lr: the learning rate, or the centre of the grid with ``tune=True``; default 0.02 * sqrt(batch size / 64), on
            text 0.003 * sqrt(batch size / 16).
        tune: search the learning rate of each normalization and batch size (see :mod:`evenly.workbench.tune`).
            ``None``: yes, unless ``lr`` or ``quick`` is given. A trial of the search takes at most 240 steps and is
            tested on nothing but its held-out fifth, so the whole search costs about as much as one seed.
        device: ``"cpu"``, ``"cuda"``, ...
        engine: ``"local"`` or ``"ray"``.
        address: address of a running Ray cluster.
        workers: trials at a time.
        out: the output folder; give the same one to go on where a run was stopped.
        quick: a look in less than half a minute: batch size 64 only, fewer steps, three severities, at most 160
            test samples for them, no search.
        rank_by: one of :data:`evenly.workbench.metrics.METRICS`; default ``"mpc"``, on text ``"bits"``.
        console: where progress goes; default: standard output.
        command: how this was started, for the report; default: this call.

    Returns:
        The comparison; the report is written.

    Raises:
        ValueError: an option is wrong; the message says which and what was expected.
        ImportError: the Ray engine without Ray.
        evenly.workbench.StoreError: the folder holds results of another version, or is in use.
        KeyboardInterrupt: stopped by the user; finished trials are kept.
    """
    began = time.monotonic()
    call = command or _call(locals())
    console = console or Console()
    rank_by = ("bits" if is_text(data) else "mpc") if rank_by is None else rank_by
    plan = _plan(
        norms=norms,
        data=data,
        ood=ood,
        model=model,
        batch_sizes=batch_sizes,
        seeds=seeds,
        epochs=epochs,
        lr=lr,
        tune=tune,
        device=device,
        quick=quick,
        rank_by=rank_by,
    )
    out = Path(out)
    environment = _environment(engine, device)
    with Store(out, call, environment) as store:
        runner = _Runner(plan, store, console)
        try:
            runner.run(
                lambda: make_engine(engine, workers=workers, address=address, device=device, cache=out / "cache")
            )
        except KeyboardInterrupt:
            console.print(
                f"Stopped. {len(runner.outcomes)} finished trials are kept in {out}; "
                "the same command goes on from there.",
                highlight=False,
                soft_wrap=True,
            )
            raise
        runs = store.runs()
    arms = tuple(
        summarize(
            [(s, runner.outcomes.get(s.key)) for s in runner.scored],
            metric=rank_by,
            resolution=plan.resolution,
            at_edge=runner.at_edge,
        )
    )
    comparison = Comparison(
        arms=arms,
        finding=finding(arms, rank_by, plan.resolution),
        metric=rank_by,
        trials=tuple((s, runner.outcomes[s.key]) for s in runner.planned if s.key in runner.outcomes),
        loaded=runner.loaded,
        seconds=time.monotonic() - began,
        out=out,
        report=out / "report.html",
    )
    from evenly.workbench.report import write_report

    write_report(comparison, plan, runs)
    _print(comparison, console)
    return comparison


@dataclass(frozen=True)
class Plan:
    """What a comparison will do, checked.

    Attributes:
        norms, batch_sizes: the arms and their cells.
        epochs: passes over the training set, by batch size.
        seeds: number of seeds.
        tune: whether learning rates are searched.
        metric: what is ranked by.
        resolution: one test sample.
        template: the settings that all trials share.
        lr: the given learning rate.
        data_name, data_kind, sizes: of the data, for the report (``sizes``: training and test samples; of text,
            windows).
    """

    norms: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    epochs: dict[int, int]
    seeds: int
    tune: bool
    metric: str
    resolution: float
    template: TrialSettings
    lr: float | None
    data_name: str
    data_kind: str
    sizes: tuple[int, int]

    def scored(self, norm: str, batch_size: int, lr: float) -> list[TrialSettings]:
        """The scored trials of one cell, one a seed."""
        cell = replace(self.template, norm=norm, batch_size=batch_size, epochs=self.epochs[batch_size], lr=lr)
        cell = replace(cell, code=_code(cell.model, norm))
        return [replace(cell, seed=seed) for seed in range(self.seeds)]

    def base_lr(self, batch_size: int) -> float:
        """The rate without a search, and the centre of the grid with one."""
        return default_lr(batch_size, self.template.data) if self.lr is None else self.lr


def _plan(
    *,
    norms: Sequence[str] | None,
    data: str,
    ood: str | None,
    model: str | None,
    batch_sizes: Sequence[int] | None,
    seeds: int | None,
    epochs: int | None,
    lr: float | None,
    tune: bool | None,
    device: str,
    quick: bool,
    rank_by: str,
) -> Plan:
    from evenly.models import recipe, recipes_for

    here = str(Path.cwd())
    if any(":" in path for path in (model or "", *(norms or ()))) and not {"", here} & set(sys.path):
        sys.path.insert(0, here)  # as `python -m` does: a user's file beside them
    if rank_by not in METRICS:
        raise ValueError(f"cannot rank by {rank_by!r}: known are {', '.join(METRICS)}")
    if (rank_by in LOWER) != is_text(data):
        known = [name for name in METRICS if (name in LOWER) == is_text(data)]
        raise ValueError(f"cannot rank {data} by {rank_by!r}: known are {', '.join(known)}")
    if rank_by == "ood" and ood is None:
        raise ValueError("cannot rank by 'ood' without a second data set: give --ood")
    seeds = DEFAULT_SEEDS if seeds is None else seeds
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}, expected at least 1")
    usual = TEXT_BATCH_SIZES if is_text(data) else QUICK_BATCH_SIZES if quick else DEFAULT_BATCH_SIZES
    sizes = usual if batch_sizes is None else tuple(batch_sizes)
    if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise ValueError(f"batch sizes are {list(sizes)}, expected different numbers of at least 1")
    _check_device(device)
    tune = tune if tune is not None else lr is None and not quick
    if is_text(data):
        return _plan_text(norms, data, ood, model, sizes, seeds, epochs, lr, tune, device, quick)
    if model == "gpt":
        raise ValueError(f"model 'gpt' reads text, and the data are {data!r}: use --data text")
    dataset = load_data(data)
    if ood is not None:
        load_data(ood)
    model = model or ("resnet" if dataset.kind == "image" else "mlp")
    names = _names(norms, "tabular" if model == "mlp" else dataset.kind)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"normalizations are {list(names)}, expected one or more, each once")
    kinds = {name: recipe(name).kinds for name in names}
    if model in ("resnet", "mlp"):
        kind = "tabular" if model == "mlp" else dataset.kind
        wrong = [name for name in names if kind not in kinds[name]]
        if wrong:
            raise ValueError(
                f"{', '.join(wrong)} cannot normalize feature vectors; for model {model!r} known are "
                f"{', '.join(recipes_for(kind))}"
            )
    template = TrialSettings(
        norm=names[0],
        data=data,
        batch_size=sizes[0],
        seed=0,
        epochs=1 if epochs is None else epochs,
        lr=default_lr(sizes[0]) if lr is None else lr,
        model=model,
        ood=ood,
        device=device,
        severities=QUICK_SEVERITIES if quick else (1, 2, 3, 4, 5),
        test_samples=QUICK_TEST_SAMPLES if quick else DEFAULT_TEST_SAMPLES,
        data_hash=data_hash(data, ood),
        code="",
    )
    # Wrong models are refused here, before any process starts. What only one layer dislikes is a failed trial.
    build_model(model, dataset.kind, dataset.input_shape, dataset.num_classes, "none")
    return Plan(
        norms=names,
        batch_sizes=sizes,
        epochs={size: _epochs(len(dataset.train_x), size, quick) if epochs is None else epochs for size in sizes},
        seeds=seeds,
        tune=tune,
        metric=rank_by,
        resolution=1 / len(dataset.test_x),
        template=replace(template, code=_code(model, names[0])),
        lr=lr,
        data_name=dataset.name,
        data_kind=dataset.kind,
        sizes=(len(dataset.train_x), len(dataset.test_x)),
    )


def _plan_text(
    norms: Sequence[str] | None,
    data: str,
    ood: str | None,
    model: str | None,
    sizes: tuple[int, ...],
    seeds: int,
    epochs: int | None,
    lr: float | None,
    tune: bool,
    device: str,
    quick: bool,
) -> Plan:
    from evenly.models import recipe, recipes_for

    if ood is not None:
        raise ValueError(f"a second data set goes with images and tables; the data are text, and --ood is {ood!r}")
    if model not in (None, "gpt"):
        raise ValueError(f"model {model!r} does not read text: use --model gpt")
    text = load_words(data)
    names = _names(norms, "text")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"normalizations are {list(names)}, expected one or more, each once")
    wrong = [name for name in names if "text" not in recipe(name).kinds]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)} cannot normalize the tokens of a language model; known are "
            f"{', '.join(recipes_for('text'))}"
        )
    template = TrialSettings(
        norm=names[0],
        data=data,
        batch_size=sizes[0],
        seed=0,
        epochs=1 if epochs is None else epochs,
        lr=default_lr(sizes[0], data) if lr is None else lr,
        model="gpt",
        device=device,
        max_steps=None if epochs is not None else QUICK_TEXT_STEPS if quick else TEXT_STEPS,
        severities=(),
        data_hash=data_hash(data),
        code=_code("gpt", names[0]),
    )
    build_language_model(names[0])
    return Plan(
        norms=names,
        batch_sizes=sizes,
        epochs=dict.fromkeys(sizes, template.epochs),
        seeds=seeds,
        tune=tune,
        metric="bits",
        resolution=0.0,
        template=template,
        lr=lr,
        data_name="the source of Python's standard library" if text.name == "stdlib" else text.name,
        data_kind="text",
        sizes=(len(windows(text.train)[0]), len(windows(text.val)[0])),
    )


def _names(norms: Sequence[str] | None, kind: str) -> tuple[str, ...]:
    """The normalizations that were asked for."""
    from evenly.models import recipes_for

    if norms is None:
        return tuple(recipes_for(kind, default=True))
    every = tuple(recipes_for(kind))
    return tuple(name for given in norms for name in (every if given == "all" else (given,)))


def _code(model: str, norm: str) -> str:
    # A user's own file counts for the trials that use it, and for no others.
    return code_version(*(path for path in (model, norm) if ":" in path))


def _epochs(samples: int, batch_size: int, quick: bool) -> int:
    steps = QUICK_STEPS if quick else DEFAULT_STEPS
    return max(DEFAULT_EPOCHS, math.ceil(steps / max(1, samples // batch_size)))


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}: expected cpu, cuda, or cuda:N") from error
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but this PyTorch finds no CUDA device; use --device cpu")


class _Runner:
    # Submits what the store lacks, hands every outcome to the store, and follows each search with its scored trials.
    def __init__(self, plan: Plan, store: Store, console: Console) -> None:
        self.plan = plan
        self.store = store
        self.console = console
        self.outcomes: dict[str, Outcome] = {}
        self.planned: list[TrialSettings] = []
        self.scored: list[TrialSettings] = []
        self.loaded = 0
        self.at_edge: frozenset[tuple[str, int]] = frozenset()
        self._searches: dict[tuple[str, int], list[TrialSettings]] = {}
        # Small batches first: they take longest, and a long trial at the end would leave the others idle.
        self.cells = [(norm, batch) for batch in sorted(plan.batch_sizes) for norm in plan.norms]

    def run(self, start: Callable[[], Any]) -> None:
        plan = self.plan
        stored = {key: row for key, row in self.store.trials().items() if not isinstance(row.outcome, TrialFailure)}
        text = plan.data_kind == "text"
        with Watch(self.console, plan.norms, plan.batch_sizes, self._work, 1, text) as watch:
            self.watch = watch
            missing: list[TrialSettings] = []

            def add(trials: Sequence[TrialSettings]) -> list[TrialSettings]:
                lacking = []
                for settings in trials:
                    self.planned.append(settings)
                    if settings.key in stored:
                        self.loaded += 1
                        self.outcomes[settings.key] = stored[settings.key].outcome
                        watch.finished(settings, stored[settings.key].outcome, stored=True)
                    else:
                        lacking.append(settings)
                return lacking

            for norm, batch in self.cells:
                if plan.tune:
                    self._searches[norm, batch] = grid(plan.scored(norm, batch, plan.base_lr(batch))[0])
                    missing += add(self._searches[norm, batch])
            for cell in self.cells:
                missing += self._follow(cell, add)
            count, work = self._whole()
            watch.plan(count, work)
            if self.loaded:
                watch.say(f"{self.loaded} of {count} trials are already in {self.store.folder}")
            if not missing:
                self._place_edges()
                return
            with start() as engine:
                watch.workers = engine.workers
                watch.say(
                    f"{count - self.loaded} trials to run, {engine.workers} at a time: {len(plan.norms)} "
                    f"normalizations x batch {', '.join(map(str, plan.batch_sizes))} x {plan.seeds} seeds"
                    + (", after a search for the learning rate" if plan.tune else "")
                )
                if isinstance(engine, LocalEngine):
                    engine.warm_up()
                if plan.data_kind != "text":
                    evaluation_sets(plan.template, self.store.folder / "cache")  # while the workers start
                watch.started = time.monotonic()
                for settings in missing:
                    engine.submit(settings)
                for settings, outcome in engine.completed():
                    self.store.save(settings, outcome)
                    self.outcomes[settings.key] = outcome
                    watch.finished(settings, outcome)
                    if settings.purpose == "tune":
                        for following in self._follow((settings.norm, settings.batch_size), add):
                            engine.submit(following)
            self._place_edges()

    def _follow(
        self, cell: tuple[str, int], add: Callable[[Sequence[TrialSettings]], list[TrialSettings]]
    ) -> list[TrialSettings]:
        # The scored trials of a cell, as soon as its search is over.
        lr = self.plan.base_lr(cell[1])
        if self.plan.tune:
            search = self._searches[cell]
            if any(s.key not in self.outcomes for s in search):
                return []
            # If every trial of the search failed, the scored trials record the same error at the default rate.
            lr = choose({s.lr: self.outcomes[s.key] for s in search}) or lr
        trials = self.plan.scored(*cell, lr)
        self.scored += trials
        return add(trials)

    def _place_edges(self) -> None:
        edges = set()
        for cell, search in self._searches.items():
            results = {s.lr: self.outcomes[s.key] for s in search}
            best = choose(results)
            if best is not None and best in (min(results), max(results)):
                edges.add(cell)
        self.at_edge = frozenset(edges)
        order = {name: index for index, name in enumerate(self.plan.norms)}
        sizes = {size: index for index, size in enumerate(self.plan.batch_sizes)}
        self.scored.sort(key=lambda s: (order[s.norm], sizes[s.batch_size], s.seed))

    def _whole(self) -> tuple[int, float]:
        count, work = 0, 0.0
        for norm, batch in self.cells:
            trials = self.plan.scored(norm, batch, self.plan.base_lr(batch))
            trials += self._searches.get((norm, batch), [])
            count += len(trials)
            work += sum(map(self._work, trials))
        return count, work

    def _work(self, settings: TrialSettings) -> float:
        # In steps: a step costs a fixed part and a part by sample; a test forward pass a third of a training one.
        samples, test = self.plan.sizes
        steps = settings.epochs * (samples // settings.batch_size)
        if settings.max_steps is not None:
            steps = min(steps, settings.max_steps)
        if self.plan.data_kind == "text":
            return 10 + steps * (1 + settings.batch_size / 8)
        tested = test
        if settings.purpose == "score":
            tested += (15 * len(settings.severities) + 5) * min(test, settings.test_samples)
        return 10 + steps * (1 + settings.batch_size / 32) + tested / 96


def _environment(engine: str, device: str) -> dict[str, Any]:
    found: dict[str, Any] = {**machine(), "engine": engine, "device": device}
    if device.startswith("cuda"):
        found["device"] = f"{device} ({torch.cuda.get_device_name(device)})"
    if engine == "ray":
        try:
            found["ray"] = importlib.metadata.version("ray")
        except importlib.metadata.PackageNotFoundError:
            found["ray"] = "not installed"
    return found


def _call(values: dict[str, Any]) -> str:
    import inspect

    given = []
    for name, parameter in inspect.signature(compare).parameters.items():
        if name not in ("console", "command") and values[name] != parameter.default:
            value = str(values[name]) if isinstance(values[name], Path) else values[name]
            given.append(f"{name}={value!r}")
    return f"evenly.workbench.compare({', '.join(given)})"


def _print(comparison: Comparison, console: Console) -> None:
    console.print()
    print_ranking(console, comparison.arms, comparison.metric)
    for settings, failure in comparison.failed:
        if settings.purpose == "score" and settings.seed == 0:
            console.print(
                f"failed: {settings.norm}, batch {settings.batch_size}: {failure.error}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
    console.print(comparison.finding, highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"{len(comparison.trials)} trials in {comparison.seconds:.0f} s; report: {comparison.report}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
