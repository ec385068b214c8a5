"""SinkGD trains a language model as well as Adam, and keeps no state for its matrices.

A byte-level language model of two Transformer layers on the source of Python's standard library. Plain gradient
descent, signed gradient descent, gradients with normalized rows, SinkGD with one and with five rounds, and Adam on
everything. In every arm but Adam's, embedding, output layer, norms and biases are trained by Adam at the global
learning rate and the hidden matrices by the arm's rule, so that the arms differ in nothing else.

Reference: M. Scetbon, C. Ma, W. Gong and T. Meeds, "Gradient Multi-Normalization for Stateless and Scalable LLM
Training", NeurIPS 2025, arXiv 2502.06742, section 5 (LLaMA on C4), here at the size of two cores.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import evenly.nn
import evenly.optim
from evenly.claims._harness import Check, Claim, Judgement, Metric, Results, Trial
from evenly.claims._picture import BASELINE, METHOD, dots, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CLAIM"]

WIDTH, LAYERS, HEADS, CONTEXT, BATCH = 96, 2, 4, 32, 8
STEPS = {"small": 4, "full": 600}
TUNING_STEPS = {"small": 2, "full": 200}
EVERY = 50  # steps between validations
GLOBAL_LR = 5e-3  # of Adam on embedding, output layer, norms and biases, in every arm
TUNING_SEED = 100
GRIDS = {
    "Adam": (5e-4, 1e-3, 2e-3, 5e-3, 1e-2),
    "SGD": (0.03, 0.1, 0.3, 1.0, 3.0),
    "sign": (5e-5, 1e-4, 2e-4, 5e-4, 1e-3),
    "rows": (5e-5, 1e-4, 2e-4, 5e-4, 1e-3),
    "SinkGD(1)": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3),
    "SinkGD(5)": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3),
}
ARMS = {
    f"{rule} lr={lr:g}{' (tuning)' if tuning else ''}": {"rule": rule, "lr": lr, "tuning": tuning}
    for rule, grid in GRIDS.items()
    for lr in grid
    for tuning in (True, False)
}


def trial(settings: Mapping[str, Any], seed: int, budget: str) -> dict[str, Any]:
    """Train one model; return its validation bits per byte every 50 steps, and the bytes of optimizer state."""
    train, validation = _source()
    model = _Model()
    optimizer = _optimizer(settings, model)
    steps = (TUNING_STEPS if settings["tuning"] else STEPS)[budget]
    rates = [group["lr"] for group in optimizer.param_groups]
    pick = torch.Generator().manual_seed(seed)
    curve: list[float] = []
    for step in range(1, steps + 1):
        part = min(1.0, step / (0.1 * steps)) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * part
        optimizer.zero_grad()
        _bits(model, *_batch(train, BATCH, pick)).backward()
        optimizer.step()
        if step % EVERY == 0 or step == steps:
            with torch.no_grad():
                curve.append(round(_bits(model, *_batch(validation, 256, torch.Generator().manual_seed(1))).item(), 5))
    matrices = {id(parameter) for name, parameter in model.named_parameters() if _hidden(name, parameter)}
    held = {False: 0, True: 0}
    for parameter, state in optimizer.state.items():
        held[id(parameter) in matrices] += sum(value.nbytes for value in state.values() if value.dim() > 0)
    return {"bits": curve, "matrix_state": held[True], "state": held[True] + held[False]}


def plan(budget: str, results: Results) -> Sequence[Trial]:
    """First every learning rate with the tuning seed, then each rule's best with the seeds that are judged."""
    trials = [Trial(arm, TUNING_SEED) for arm, settings in ARMS.items() if settings["tuning"]]
    if any(trial not in results for trial in trials):
        return trials
    best = {rule: _tuned(results, rule) for rule in GRIDS}
    chosen = [f"{rule} lr={lr:g}" for rule, lr in best.items()]
    return trials + [Trial(arm, seed) for seed, arm in itertools.product(CLAIM.seeds[budget], chosen)]


def judge(results: Results) -> Judgement:
    """Apply the criterion to the final bits per byte of each rule at its best learning rate."""
    final = {rule: [run["bits"][-1] for run in _runs(results, rule)] for rule in GRIDS}
    adam, sink = final["Adam"], final["SinkGD(5)"]
    behind = [s - a for s, a in zip(sink, adam, strict=True)]
    mean = {rule: statistics.mean(values) for rule, values in final.items()}
    reach = []
    for run, target in zip(_runs(results, "SinkGD(5)"), adam, strict=True):
        reach.append(next((EVERY * (k + 1) for k, bits in enumerate(run["bits"]) if bits <= target), math.inf))
    sides = (f"Adam, lr {_tuned(results, 'Adam'):g}", f"SinkGD(5), lr {_tuned(results, 'SinkGD(5)'):g}")
    memory = [[run["matrix_state"] for run in _runs(results, rule)] for rule in ("Adam", "SinkGD(5)")]
    gap = statistics.mean(behind)
    others = {rule: mean[rule] - mean["SinkGD(5)"] for rule in ("SGD", "rows", "sign")}
    if gap > 0.02:
        why = "A model of 0.2 million hidden weights and small batches leaves Adam ahead."
    else:
        simpler = min(("SGD", "rows", "sign"), key=lambda rule: mean[rule])
        why = (
            f"SinkGD(5) keeps up with Adam without state, but at the rates that the short tuning chose "
            f"({_tuned(results, 'SinkGD(5)'):g} for it, {_tuned(results, simpler):g} for {simpler!r}) the simpler rule "
            f"ends {-others[simpler]:.3f} bits per byte lower, and SinkGD(1) at "
            f"{_tuned(results, 'SinkGD(1)'):g} {mean['SinkGD(5)'] - mean['SinkGD(1)']:.3f} lower."
        )
    return Judgement(
        metrics=[
            Metric("validation bits per byte after the last step", sides[0], adam, sides[1], sink),
            Metric(
                "steps to Adam's final value",
                sides[0],
                [EVERY * len(run["bits"]) for run in _runs(results, "Adam")],
                sides[1],
                reach,
            ),
            Metric("bytes of optimizer state of the hidden matrices", sides[0], memory[0], sides[1], memory[1]),
        ],
        checks=[
            Check("SinkGD(5) behind Adam, bits per byte (mean)", gap, "<=", 0.02),
            Check("SGD behind SinkGD(5), bits per byte (mean)", others["SGD"], ">", 0.0),
            Check("row normalization alone behind SinkGD(5), bits per byte (mean)", others["rows"], ">", 0.0),
            Check("signed gradients behind SinkGD(5), bits per byte (mean)", others["sign"], ">", 0.0),
            Check("bytes of state of the matrices under SinkGD", max(memory[1]), "<=", 0.0),
        ],
        effect=("SinkGD(5) behind Adam, bits per byte; spread: range over seeds", gap, min(behind), max(behind)),
        why=why,
        notes={
            "final bits per byte": final,
            "learning rate chosen": {rule: _tuned(results, rule) for rule in GRIDS},
            "bits per byte at the end of tuning": {
                rule: {f"{lr:g}": _tuning(results, rule, lr) for lr in grid} for rule, grid in GRIDS.items()
            },
        },
    )


def draw(figure: Figure, results: Results, judgement: Judgement) -> None:
    """Left: bits per byte over steps, the mean over seeds. Right: the final value of each seed."""
    left, right = figure.subplots(1, 2, width_ratios=[1.4, 1])
    styles = {"Adam": "-", "SGD": ":", "sign": "-.", "rows": "--", "SinkGD(1)": "--", "SinkGD(5)": "-"}
    columns = []
    for rule, style in styles.items():
        colour = METHOD if rule.startswith("SinkGD") else BASELINE
        curves = np.array([run["bits"] for run in _runs(results, rule)])
        steps = EVERY * np.arange(1, curves.shape[1] + 1)
        left.plot(steps, curves.mean(0), style, color=colour, label=rule, linewidth=1.4)
        columns.append((rule, list(curves[:, -1]), colour))
    left.set_xlabel("steps")
    left.set_ylabel("validation bits per byte")
    left.set_ylim(top=min(left.get_ylim()[1], 5))
    left.legend(frameon=False, fontsize=8)
    tidy(left)
    dots(right, columns, "final bits per byte")
    right.tick_params("x", labelrotation=30)


class _Model(nn.Module):
    """Bytes in, logits of the next byte out: (N, T) to (N, T, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.embed_place = nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        self.layers = nn.ModuleList(_Layer() for _ in range(LAYERS))
        self.norm = evenly.nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * LAYERS) if "out" in name else 1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.embed_place
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = evenly.nn.RMSNorm(WIDTH), evenly.nn.RMSNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.attention_out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp_in, self.mlp_out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention_norm(x)
        q, k, v = (part(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(y.transpose(1, 2).flatten(2))
        return x + self.mlp_out(nn.functional.gelu(self.mlp_in(self.mlp_norm(x))))


def _optimizer(settings: Mapping[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    rule, lr = settings["rule"], settings["lr"]
    groups = evenly.optim.for_model(model, lr=GLOBAL_LR, scale=lr / GLOBAL_LR)
    match rule:
        case "Adam":
            for group in groups:
                group["rule"] = "adam"
            return evenly.optim.SinkGD(groups)
        case "SGD":
            return evenly.optim.MultiNormGD(groups, [_as_it_is])
        case "sign":
            return evenly.optim.MultiNormGD(groups, [evenly.optim.project_sign])
        case "rows":
            return evenly.optim.MultiNormGD(groups, [evenly.optim.project_row_rms])
        case "SinkGD(1)":
            return evenly.optim.SinkGD(groups, iters=1)
    return evenly.optim.SinkGD(groups, iters=5)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _hidden(name: str, parameter: Tensor) -> bool:
    return name.startswith("layers.") and parameter.dim() == 2


@functools.lru_cache(maxsize=1)
def _source() -> tuple[Tensor, Tensor]:
    # The modules at the top of the standard library: every eighth, by name, is for validation.
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for place, path in enumerate(files):
        parts[place % 8 == 7].append(path.read_bytes())
    train, validation = (torch.from_numpy(np.frombuffer(b"".join(part), np.uint8).copy()) for part in parts)
    return train, validation


def _batch(text: Tensor, size: int, pick: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(0, len(text) - CONTEXT - 1, (size, 1), generator=pick)
    window = text[starts + torch.arange(CONTEXT + 1)].long()
    return window[:, :-1], window[:, 1:]


def _bits(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()) / math.log(2)


def _runs(results: Results, rule: str) -> list[dict[str, Any]]:
    return [
        outcome
        for trial, outcome in results.items()
        if ARMS[trial.arm]["rule"] == rule and not ARMS[trial.arm]["tuning"]
    ]


def _tuning(results: Results, rule: str, lr: float) -> float:
    bits = results[Trial(f"{rule} lr={lr:g} (tuning)", TUNING_SEED)]["bits"][-1]
    return math.inf if bits is None else bits


def _tuned(results: Results, rule: str) -> float:
    return min(GRIDS[rule], key=lambda lr: _tuning(results, rule, lr))


CLAIM = Claim(
    id="multi-normalization-sinkgd",
    statement=(
        "SinkGD, which keeps no state for the hidden matrices, trains a byte language model as well as Adam and "
        "better than plain, signed or row-normalized gradient descent."
    ),
    criterion=(
        "Final validation bits per byte: SinkGD(5) <= Adam + 0.02, below SGD, below row normalization alone and "
        "below signed gradients; bytes of optimizer state of the matrices 0. Refuted if row normalization or signed "
        "gradients equal SinkGD, or Adam wins by more than 0.05. Measured so: for each rule the best of five "
        "learning rates by the bits per byte after 200 steps with a seed of its own, then 600 steps with each "
        "seed at that rate; warm-up over a tenth, cosine to a tenth; embedding, output layer, norms and biases by "
        "Adam at 0.005 in every arm; means over seeds."
    ),
    data=(
        "the .py files at the top of Python's standard library as bytes, every eighth for validation (256 windows "
        "of 32 bytes); batches of 8 windows"
    ),
    arms=ARMS,
    seeds={"small": (0,), "full": tuple(range(5))},
    trial=trial,
    judge=judge,
    plan=plan,
    draw=draw,
)
