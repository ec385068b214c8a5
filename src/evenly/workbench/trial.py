"""One trial: train a network with one normalization, then test it on everything.

A trial is a pure function of its settings: :func:`run_trial` seeds every generator itself, computes on one
thread and gives the same scores bit for bit on the same machine. What a clock or an allocator measures (time a
step, memory) is not part of that promise.

Training: AdamW (betas 0.9 and 0.999, weight decay 0.01 on all parameters), cross entropy, the learning rate rising
linearly over the first fifth of the steps to ``lr`` and falling to zero along a cosine; images are centred and
scaled by the mean and standard deviation of the training set. The last incomplete batch of an epoch is left out, so
every step costs the same and no statistic is taken over a lone remainder.

Initializations that need data (weight normalization's) get 256 training inputs, whatever the batch size.

Divergence is a result and no error: if the loss is not finite, or its running mean exceeds ten times the loss of
guessing, log(number of classes), training stops and the trial is marked as diverged. It is tested as it is; a
prediction that is not finite counts as wrong.

On text (``data="text"``) the network is a language model and the score bits per byte; see
:mod:`evenly.workbench.language`.

Protocol of the corruptions and domains: Dalva et al. 2021, arXiv:2109.01123.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import inspect
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from evenly.workbench.language import (
    TEST_WINDOWS,
    bits_per_byte,
    build_language_model,
    is_text,
    language_optimizer,
    load_words,
    windows,
)
from evenly.workbench.sets import EvaluationSets, evaluation_sets, load_data

__all__ = ["TrialFailure", "TrialResult", "TrialSettings", "build_model", "code_version", "run_trial"]

WEIGHT_DECAY = 0.01
WARMUP = 0.2
INITIAL_SAMPLES = 256  # training inputs for initializations that take data
VALIDATION = 0.2
CURVE_POINTS = 40
EXPLODED = 10.0
EVALUATION_VALUES = (
    2**14
)  # values of input in one batch of evaluation: 256 images of 8 x 8, whose activations fit a cache


@dataclass(frozen=True)
class TrialSettings:
    """Everything that a trial depends on.

    Args:
        norm: a name in :data:`evenly.models.RECIPES`, or ``"module:attribute"``.
        data: the data to train on, as in :func:`evenly.data.load`, or ``"text"`` or ``"text:FILE"``.
        batch_size: samples a step.
        seed: seeds the initial weights and the order of the samples. The split of the data is the same for all.
        epochs: passes over the training set.
        lr: the highest learning rate.
        model: ``"resnet"``, ``"mlp"`` or ``"module:factory"``; see :func:`build_model`. For text: ``"gpt"``.
        ood: a second data set with the same classes, tested on and never trained on; ``None`` for none.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...
        purpose: ``"score"``: train on the whole training set, test on everything. ``"tune"``: hold out a fifth
            of the training set, and report accuracy and loss on that fifth only.
        max_steps: stop training after so many steps (the schedule is fitted to them); ``None`` for no limit.
        severities: the severities of the corruptions, out of 1..5.
        corruption_seed: seeds the corruptions and the shifted domains, which are the same for all trials.
        test_samples: at most so many test samples are corrupted or shifted (the first of a fixed shuffle). Clean
            accuracy always counts the whole test set.
        data_hash: a digest of the data, so that a changed file is another trial.
        code: version of the code that decides the result; see :func:`code_version`.

    >>> settings = TrialSettings("batch", "digits", batch_size=4, seed=0, epochs=1, lr=0.1)
    >>> TrialSettings.from_json(settings.to_json()) == settings
    True
    >>> len(settings.key)
    16
    """

    norm: str
    data: str
    batch_size: int
    seed: int
    epochs: int
    lr: float
    model: str = "resnet"
    ood: str | None = None
    device: str = "cpu"
    purpose: str = "score"
    max_steps: int | None = None
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    corruption_seed: int = 0
    test_samples: int = 512
    data_hash: str = ""
    code: str = ""

    def __post_init__(self) -> None:
        if self.purpose not in ("score", "tune"):
            raise ValueError(f"purpose is {self.purpose!r}, expected 'score' or 'tune'")
        for name in ("batch_size", "epochs", "max_steps", "test_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr is {self.lr}, expected a finite number above 0")
        if not set(self.severities) <= {1, 2, 3, 4, 5}:
            raise ValueError(f"severities is {self.severities}, expected numbers out of 1..5")

    def to_json(self) -> str:
        """Canonical JSON: sorted names, no spaces."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> TrialSettings:
        """The inverse of :meth:`to_json`."""
        values = json.loads(text)
        values["severities"] = tuple(values["severities"])
        return cls(**values)

    @functools.cached_property
    def key(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the canonical JSON: the name of the trial."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


@dataclass(frozen=True)
class TrialResult:
    """What a trial measured. Accuracies are fractions in [0, 1].

    Attributes:
        diverged: the loss became infinite, not a number, or exploded; see the module.
        steps: training steps taken.
        curve: (step, mean training loss since the point before), at most 40 points.
        validation: ``{"accuracy", "loss"}`` on the held-out fifth (purpose ``"tune"``), else empty. For text:
            ``{"bits", "loss"}``.
        clean: accuracy on the test set (purpose ``"score"``), else ``None``.
        corruptions: accuracy by corruption, one for each severity in the order of the settings.
        domains: accuracy by shifted domain.
        ood: accuracy on the second data set, if there is one.
        bits: for text, bits per byte on the test text (purpose ``"score"``).
        parameters: number of trainable parameters.
        seconds_per_step: median time of a training step.
        memory_bytes: see ``memory_kind``.
        memory_kind: ``"saved"``: bytes of the tensors that autograd keeps for the backward pass of one step, each
            storage once, parameters left out (CPU). ``"peak"``: highest memory allocated by PyTorch on the device
            during training (CUDA).
        seconds: wall time of the trial.
    """

    diverged: bool
    steps: int
    curve: tuple[tuple[int, float], ...]
    validation: dict[str, float] = field(default_factory=dict)
    clean: float | None = None
    corruptions: dict[str, tuple[float, ...]] = field(default_factory=dict)
    domains: dict[str, float] = field(default_factory=dict)
    ood: float | None = None
    bits: float | None = None
    parameters: int = 0
    seconds_per_step: float = 0.0
    memory_bytes: int = 0
    memory_kind: str = "saved"
    seconds: float = 0.0

    MEASURED = ("seconds_per_step", "memory_bytes", "memory_kind", "seconds")

    def scores(self) -> dict[str, Any]:
        """The part that is the same every time: all but the time and the memory."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.MEASURED}

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TrialResult:
        values = json.loads(text)
        values["curve"] = tuple((step, loss) for step, loss in values["curve"])
        values["corruptions"] = {name: tuple(row) for name, row in values["corruptions"].items()}
        return cls(**values)


@dataclass(frozen=True)
class TrialFailure:
    """A trial that raised, or whose process died.

    Attributes:
        error: one line: the class of the error and its message.
        trace: the traceback, or what is known about the death of the process.
        seconds: wall time until then.
    """

    error: str
    trace: str = ""
    seconds: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TrialFailure:
        return cls(**json.loads(text))


def run_trial(settings: TrialSettings, cache: str | Path | None = None) -> TrialResult:
    """Train and test one network.

    Args:
        settings: what to do.
        cache: a folder in which the corrupted and shifted test sets are kept between trials and processes.
            Changes nothing in the result. ``None``: they are kept in this process only.

    Returns:
        The result; the same scores every time on the same machine.

    Raises:
        ValueError: the settings do not fit the data or the model.
        Exception: whatever the model raises.

    >>> settings = TrialSettings("batch", "digits", 64, seed=0, epochs=1, lr=0.1, purpose="tune", max_steps=2)
    >>> run_trial(settings).steps
    2
    """
    if is_text(settings.data):
        return _run_on_text(settings)
    from evenly.models import recipe

    started = time.perf_counter()
    data = load_data(settings.data)
    with _reproducible(settings.seed):
        shape = data.input_shape
        model = build_model(settings.model, data.kind, shape, data.num_classes, settings.norm)
        device = torch.device(settings.device)
        model.to(device)
        inputs, labels = data.train_x, data.train_y
        held_out: tuple[Tensor, Tensor] | None = None
        if settings.purpose == "tune":
            order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(settings.seed))
            cut = max(1, round(len(inputs) * VALIDATION))
            held_out = (inputs[order[:cut]], labels[order[:cut]])
            inputs, labels = inputs[order[cut:]], labels[order[cut:]]

        def prepare(x: Tensor) -> Tensor:
            return data.normalize(x).to(device)

        few = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(settings.seed))[:INITIAL_SAMPLES]
        recipe(settings.norm).initialize(model, [prepare(inputs[few])])
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=WEIGHT_DECAY, fused=True)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            return functional.cross_entropy(model(x), y)

        training = _train(model, prepare(inputs), labels.to(device), settings, data.num_classes, loss, optimizer)
        model.eval()
        if held_out is not None:
            accuracy, held_loss = _evaluate(model, held_out[0], held_out[1], prepare)
            validation = {"accuracy": accuracy, "loss": held_loss}
            return TrialResult(**training, validation=validation, seconds=time.perf_counter() - started)
        sets = evaluation_sets(settings, cache)
        return TrialResult(**training, **_test(model, sets, settings, prepare), seconds=time.perf_counter() - started)


def _run_on_text(settings: TrialSettings) -> TrialResult:
    started = time.perf_counter()
    text = load_words(settings.data)
    if settings.model != "gpt":
        raise ValueError(f"model {settings.model!r} does not read text: use --model gpt")
    with _reproducible(settings.seed):
        model = build_language_model(settings.norm)
        device = torch.device(settings.device)
        model.to(device)
        inputs, labels = windows(text.train)
        if settings.purpose == "tune":
            cut = len(inputs) - max(1, round(len(inputs) * VALIDATION))
            inputs, held_x, labels, held_y = inputs[:cut], inputs[cut:], labels[:cut], labels[cut:]
        else:
            held_x, held_y = windows(text.val)
        optimizer, warms_up = language_optimizer(model, settings.lr)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            value = model(x, y)[1]
            assert value is not None
            return value

        training = _train(
            model,
            inputs.to(device),
            labels.to(device),
            settings,
            text.vocabulary,
            loss,
            optimizer,
            warmup=WARMUP if warms_up else 0.0,
            clip=1.0,
        )
        model.eval()
        bits = bits_per_byte(model, held_x[:TEST_WINDOWS].to(device), held_y[:TEST_WINDOWS].to(device))
        seconds = time.perf_counter() - started
        if settings.purpose == "tune":
            return TrialResult(**training, validation={"bits": bits, "loss": bits * math.log(2)}, seconds=seconds)
        return TrialResult(**training, bits=bits, seconds=seconds)


def build_model(model: str, kind: str, shape: tuple[int, ...], num_classes: int, norm: str) -> nn.Module:
    """The network of a trial.

    Args:
        model: ``"resnet"`` (images), ``"mlp"`` (any data), or ``"module:factory"``: an import path to a callable
            ``factory(in_features, num_classes, *, norm)`` that returns a module from a batch of inputs to logits.
            ``in_features`` is the number of channels for images and the number of features else. ``norm`` is a
            callable from a number of features to a new normalization layer, the same that ``"resnet"`` and
            ``"mlp"`` use; with ``--norms none`` it returns a layer that does nothing. What the recipe does to the
            whole network (weight standardization, Fixup) is applied to what the factory returns.
        kind: ``"image"`` or ``"tabular"``.
        shape: shape of one input.
        num_classes: length of the output.
        norm: a name in :data:`evenly.models.RECIPES`, or ``"module:attribute"``.

    Raises:
        ValueError: an unknown model, a model that does not fit the data, or a factory that takes no ``norm``.
        TypeError: the factory returned no module.

    >>> build_model("mlp", "tabular", (30,), 2, "group").head
    Linear(in_features=64, out_features=2, bias=True)
    """
    from evenly.models import mlp, recipe, resnet

    row = recipe(norm)
    if model == "resnet":
        if kind != "image":
            raise ValueError(f"model 'resnet' needs images, the data are {kind}: use --model mlp")
        return resnet(shape[0], num_classes, norm=row)
    if model == "mlp":
        return mlp(math.prod(shape), num_classes, norm=row)
    factory = _factory(model)
    built = factory(shape[0], num_classes, norm=row.build)
    if not isinstance(built, nn.Module):
        raise TypeError(f"model {model!r} returned {type(built).__name__}, expected a torch.nn.Module")
    return row.finish(built, torch.zeros(2, *shape))


@functools.lru_cache
def code_version(*extra: str) -> str:
    """The version of everything that decides the result of a trial: of evenly, and a digest of its sources.

    Args:
        extra: ``"module:attribute"`` paths whose source files count too (a user's model or normalization).

    >>> code_version().partition("+")[0] == __import__("evenly").__version__
    True
    """
    import evenly

    digest = hashlib.sha256()
    package = Path(evenly.__file__).parent
    here = ("core", "nn", "weights", "models", "data")
    files = [path for part in here for path in sorted((package / part).rglob("*.*")) if path.suffix in (".py", ".cpp")]
    files += [package / "workbench" / name for name in ("trial.py", "sets.py", "language.py")]
    for path in files:
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    for path_to in extra:
        source = inspect.getsourcefile(importlib.import_module(path_to.partition(":")[0]))
        if source is not None:
            digest.update(Path(source).read_bytes())
    return f"{evenly.__version__}+{digest.hexdigest()[:12]}"


def _factory(model: str) -> Callable[..., Any]:
    module, _, attribute = model.partition(":")
    if not attribute:
        raise ValueError(
            f"unknown model {model!r}: known are resnet, mlp and, for text, gpt; or give your own as 'module:factory'"
        )
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model {model!r} cannot be imported: {error}") from error
    parameters = inspect.signature(factory).parameters
    if "norm" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ValueError(
            f"model {model!r} takes no norm=: expected factory(in_features, num_classes, *, norm), "
            "where norm builds a normalization layer for a number of features"
        )
    return factory


@contextlib.contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    # One thread, seeded generators, deterministic algorithms; the caller's state comes back afterwards.
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def _train(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    settings: TrialSettings,
    num_classes: int,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    warmup: float = WARMUP,
    clip: float | None = None,
) -> dict[str, Any]:
    batch = settings.batch_size
    per_epoch = len(inputs) // batch
    if per_epoch == 0:
        raise ValueError(f"batch size {batch} is larger than the training set of {len(inputs)} samples")
    total = per_epoch * settings.epochs
    if settings.max_steps is not None:
        total = min(total, settings.max_steps)
    rising = max(1, round(total * warmup)) if warmup else 0
    on_cuda = inputs.device.type == "cuda"
    parameters = [p for p in model.parameters() if p.requires_grad]
    order = torch.Generator().manual_seed(settings.seed)
    limit = EXPLODED * math.log(max(num_classes, 2))
    curve = _Curve(total)
    times: list[float] = []
    running: float | None = None
    memory = 0
    diverged = False
    step = 0
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(inputs.device)
    model.train()
    while step < total and not diverged:
        permutation = torch.randperm(len(inputs), generator=order).to(inputs.device)
        for first in range(0, per_epoch * batch, batch):
            if step == total:
                break
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * _schedule(step, total, rising)
            chosen = permutation[first : first + batch]
            if step == 0 and not on_cuda:
                saved = _SavedBytes(parameters)
                with saved:
                    loss = loss_of(inputs[chosen], labels[chosen])
                memory = saved.bytes
            else:
                loss = loss_of(inputs[chosen], labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            value = loss.item()
            times.append(time.perf_counter() - began)
            step += 1
            running = value if running is None else 0.9 * running + 0.1 * value
            if not math.isfinite(value) or running > limit:
                diverged = True
                break
            curve.add(step, value)
    if on_cuda:
        memory = torch.cuda.max_memory_allocated(inputs.device)
    return {
        "diverged": diverged,
        "steps": step,
        "curve": curve.points(),
        "parameters": sum(p.numel() for p in parameters),
        "seconds_per_step": statistics.median(times),
        "memory_bytes": memory,
        "memory_kind": "peak" if on_cuda else "saved",
    }


def _schedule(step: int, total: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


class _Curve:
    # The mean loss of each of at most CURVE_POINTS equal stretches of the training.
    def __init__(self, total: int) -> None:
        self.stretch = math.ceil(total / CURVE_POINTS)
        self.sums: list[list[float]] = []

    def add(self, step: int, value: float) -> None:
        if (step - 1) // self.stretch == len(self.sums):
            self.sums.append([0, 0.0, 0.0])
        last = self.sums[-1]
        last[0], last[1], last[2] = step, last[1] + 1, last[2] + value

    def points(self) -> tuple[tuple[int, float], ...]:
        return tuple((int(step), total / count) for step, count, total in self.sums)


class _SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    # Counts what autograd keeps for the backward pass: each storage once, without the parameters.
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.seen = {p.untyped_storage().data_ptr() for p in parameters}
        self.bytes = 0
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


@torch.no_grad()
def _evaluate(model: nn.Module, x: Tensor, y: Tensor, prepare: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    hits, loss = _hits(model, x, y, prepare)
    return hits.double().mean().item(), loss


@torch.no_grad()
def _hits(model: nn.Module, x: Tensor, y: Tensor, prepare: Callable[[Tensor], Tensor]) -> tuple[Tensor, float]:
    # Which samples are classified rightly, and the mean loss; a prediction that is not finite is wrong.
    size = max(1, EVALUATION_VALUES // max(1, math.prod(x.shape[1:])))
    hits, total = [], 0.0
    for chunk, labels in zip(x.split(size), y.split(size), strict=True):
        logits = model(prepare(chunk)).cpu()
        right = (logits.argmax(1) == labels) & logits.isfinite().all(1)
        hits.append(right)
        total += functional.cross_entropy(logits.double(), labels, reduction="sum").item()
    return torch.cat(hits), total / len(x)


def _test(
    model: nn.Module, sets: EvaluationSets, settings: TrialSettings, prepare: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    clean, _ = _evaluate(model, sets.clean_x, sets.clean_y, prepare)
    corruptions: dict[str, tuple[float, ...]] = {}
    domains: dict[str, float] = {}
    if len(sets.shifted_x):
        # All corrupted and shifted sets in one go: (sets, samples, ...) as one long batch.
        count, samples = sets.shifted_x.shape[:2]
        hits, _ = _hits(model, sets.shifted_x.flatten(0, 1), sets.shifted_y.flatten(), prepare)
        by_name: dict[str, list[float]] = {}
        accuracies = hits.view(count, samples).double().mean(1).tolist()
        for (name, severity), accuracy in zip(sets.shifts, accuracies, strict=True):
            if severity:
                by_name.setdefault(name, []).append(accuracy)
            else:
                domains[name] = accuracy
        corruptions = {name: tuple(row) for name, row in by_name.items()}
    ood = None
    if sets.ood_x is not None and sets.ood_y is not None:
        ood, _ = _evaluate(model, sets.ood_x, sets.ood_y, prepare)
    return {"clean": clean, "corruptions": corruptions, "domains": domains, "ood": ood}
