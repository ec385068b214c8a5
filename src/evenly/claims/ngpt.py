"""nGPT learns a text in fewer steps than a tuned GPT of the same size.

The paper's experiment in small: a byte-level language model on the source of Python's standard library. The GPT has
RMS pre-normalization, rotary positions, SwiGLU, weight decay 0.1 and warm-up; nGPT has neither decay nor warm-up.
Both try the same learning rates on one seed and are then trained with three.

Reference: I. Loshchilov, C.-P. Hsieh, S. Sun and B. Ginsburg, "nGPT: Normalized Transformer with Representation
Learning on the Hypersphere", ICLR 2025, arXiv 2410.01131, section 3.1 (figures 1 and 2: steps to a loss), section
3.2 (condition numbers) and appendix A.6 (settings).
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from evenly.claims._harness import Check, Claim, Judgement, Metric, Results, Trial
from evenly.claims._picture import BASELINE, METHOD, tidy
from evenly.data import TextData, load_text
from evenly.models import GPT, NGPT, Attention, NGPTConfig, gpt
from evenly.nn import ProjectedOptimizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CLAIM"]

LEARNING_RATES = (1e-3, 3e-3, 6e-3)
WIDTH, LAYERS, HEADS, LENGTH, BATCH = 64, 3, 4, 64, 16
WARMUP = 100  # of the GPT
STEPS = {"small": 8, "full": 800}
EVERY = {"small": 4, "full": 40}
WINDOWS = {"small": 16, "full": 256}  # of the validation text, and as many to choose the learning rate by
BYTES = 5_000_000
SIDES = ("GPT", "nGPT")
ARMS = {f"{side} lr={lr:g}": {"side": side, "lr": lr} for side in SIDES for lr in LEARNING_RATES}
TUNING_SEED = 0  # also counted: both sides have it


def trial(settings: Mapping[str, Any], seed: int, budget: str) -> dict[str, Any]:
    """Train one language model; return its validation loss along the way, and how it is conditioned."""
    text = _text(BYTES if budget == "full" else 100_000)
    normalized, steps = settings["side"] == "nGPT", STEPS[budget]
    model, optimizer = _ngpt(settings["lr"]) if normalized else _gpt(settings["lr"])
    warmup = 0 if normalized else WARMUP
    windows = text.train.unfold(0, LENGTH + 1, 1)
    held = text.val.unfold(0, LENGTH + 1, LENGTH)[: 2 * WINDOWS[budget]].long()
    tuning, held = held[WINDOWS[budget] :], held[: WINDOWS[budget]]
    order = torch.Generator().manual_seed(seed)  # both sides see the same windows
    losses = []
    for step in range(steps):
        rows = windows[torch.randint(len(windows), (BATCH,), generator=order)].long()
        share = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = settings["lr"] * share * min(1.0, (step + 1) / max(1, warmup))
        optimizer.zero_grad()
        model(rows[:, :-1], rows[:, 1:])[1].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % EVERY[budget] == 0:
            losses.append(round(_loss(model, held), 6))
    return {"losses": losses, "tuning loss": round(_loss(model, tuning), 6), "condition": round(_condition(model), 3)}


def plan(budget: str, results: Results) -> list[Trial]:
    """Every learning rate with the tuning seed, then each side's best with the other seeds."""
    trials = [Trial(arm, TUNING_SEED) for arm in ARMS]
    seeds = [seed for seed in CLAIM.seeds[budget] if seed != TUNING_SEED]
    if all(one in results for one in trials):
        trials += [Trial(_tuned(results, side), seed) for seed in seeds for side in SIDES]
    return trials


def judge(results: Results) -> Judgement:
    """Apply the criterion to the means over seeds."""
    arms = {side: _tuned(results, side) for side in SIDES}
    curves = {side: _curves(results, arms[side]) for side in SIDES}
    final = {side: [curve[-1] for curve in curves[side]] for side in SIDES}
    means = {side: [statistics.fmean(column) for column in zip(*curves[side], strict=True)] for side in SIDES}
    gap = statistics.fmean(final["nGPT"]) - statistics.fmean(final["GPT"])
    gaps = [a - b for a, b in zip(final["nGPT"], final["GPT"], strict=True)]
    share = _reach(means["nGPT"], means["GPT"][-1])
    shares = [_reach(a, b[-1]) for a, b in zip(curves["nGPT"], curves["GPT"], strict=True)]
    condition = {side: _values(results, arms[side], "condition") for side in SIDES}
    if gap > 0.02:
        why = "The tuned GPT is better by more than 0.02 nats, which refutes the claim at this size."
    elif gap > 0:
        why = "nGPT is about as good as the tuned GPT at this size, and not better."
    else:
        why = "nGPT ends lower, and gets to the GPT's last loss later than asked for."
    names = {side: f"{side}, lr {ARMS[arm]['lr']:g}" for side, arm in arms.items()}
    metrics = [
        Metric(name, names["GPT"], values["GPT"], names["nGPT"], values["nGPT"])
        for name, values in (
            ("validation loss after the last step, nats a byte", final),
            ("share of the steps to the GPT's last loss", {"GPT": [1.0] * len(shares), "nGPT": shares}),
            ("median condition number of W_q and W_k (not judged)", condition),
        )
    ]
    points = [place for place in (4, 9, 19) if place < len(means["GPT"])]
    return Judgement(
        metrics=metrics,
        checks=[
            Check("validation loss of nGPT - of GPT, each at its best learning rate", gap, "<=", 0.0),
            Check("share of the steps after which nGPT's mean loss is at GPT's last", share, "<=", 0.8),
        ],
        effect=("validation loss, nGPT - GPT, nats; spread: range over seeds", gap, min(gaps), max(gaps)),
        why=why,
        notes={
            "tuning loss": {arm: _values(results, arm, "tuning loss")[0] for arm in ARMS},
            "mean validation loss after 200, 400 and 800 steps": {
                side: [round(means[side][place], 4) for place in points] for side in SIDES
            },
        },
    )


def draw(figure: Figure, results: Results, judgement: Judgement) -> None:
    """Validation loss along the training of both sides at their best learning rates, and the condition numbers."""
    left, right = figure.subplots(1, 2, width_ratios=[1.8, 1])
    for place, (side, colour) in enumerate(zip(SIDES, (BASELINE, METHOD), strict=True)):
        arm = _tuned(results, side)
        curves = _curves(results, arm)
        steps = [EVERY["full"] * (index + 1) for index in range(len(curves[0]))]
        for curve in curves:
            left.plot(steps, curve, color=colour, linewidth=0.7, alpha=0.4)
        left.plot(steps, [statistics.fmean(column) for column in zip(*curves, strict=True)], color=colour, label=arm)
        values = _values(results, arm, "condition")
        right.plot([place] * len(values), values, "o", color=colour, alpha=0.7)
    left.set_xlabel("steps")
    left.set_ylabel("validation loss, nats a byte")
    left.set_yscale("log")
    left.legend(frameon=False, fontsize=8)
    right.set_xticks([0, 1], list(SIDES))
    right.set_xlim(-0.5, 1.5)
    right.set_yscale("log")
    right.set_ylabel("condition number of W_q and W_k")
    tidy(left)
    tidy(right)


@functools.cache
def _text(size: int) -> TextData:
    return load_text("stdlib", max_bytes=size)


def _gpt(lr: float) -> tuple[GPT, torch.optim.Optimizer]:
    model = gpt(256, norm="rms", dim=WIDTH, depth=LAYERS, num_heads=HEADS, block_size=LENGTH, activation="swiglu")
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def _ngpt(lr: float) -> tuple[NGPT, torch.optim.Optimizer]:
    model = NGPT(NGPTConfig(256, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, block_size=LENGTH, alpha_init=1 / LAYERS))
    adam = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    return model, ProjectedOptimizer(adam, model)


@torch.no_grad()
def _loss(model: GPT | NGPT, windows: torch.Tensor) -> float:
    return model(windows[:, :-1], windows[:, 1:])[1].item()


@torch.no_grad()
def _condition(model: GPT | NGPT) -> float:
    weights = [p for name, p in model.named_parameters() if name.endswith(("query.weight", "key.weight"))]
    for layer in model.modules():
        if isinstance(layer, Attention):
            weights += layer.qkv.weight.split(WIDTH)[:2]
    return statistics.median(torch.linalg.cond(weight.double()).item() for weight in weights)


def _tuned(results: Results, side: str) -> str:
    def loss(arm: str) -> float:
        value = results[Trial(arm, TUNING_SEED)]["tuning loss"]
        return math.inf if value is None else value

    return min((arm for arm, settings in ARMS.items() if settings["side"] == side), key=loss)


def _curves(results: Results, arm: str) -> list[list[float]]:
    curves = [outcome["losses"] for trial, outcome in results.items() if trial.arm == arm]
    return [[math.inf if value is None else value for value in curve] for curve in curves]


def _values(results: Results, arm: str, key: str) -> list[float]:
    chosen = [outcome[key] for trial, outcome in results.items() if trial.arm == arm]
    return [math.inf if value is None else value for value in chosen]


def _reach(curve: list[float], target: float) -> float:
    # The share of the steps after which the loss is first at most the target.
    return next((place / len(curve) for place, value in enumerate(curve, 1) if value <= target), math.inf)


CLAIM = Claim(
    id="ngpt",
    statement=(
        "nGPT, without weight decay and warm-up, comes to a tuned GPT's validation loss in fewer steps, and ends lower."
    ),
    criterion=(
        "nGPT's best-lr loss at 800 steps <= GPT's best, and it reaches GPT's final loss in <= 0.8 of the steps. "
        "Refuted if GPT (tuned) is better by more than 0.02 nats. Measured so: means over seeds of the validation loss "
        "in nats, evaluated every 40 of 800 steps; AdamW with betas 0.9 and 0.95, gradients clipped to norm 1, a "
        "cosine to 0, batches of 16 windows of 64 bytes; 64 features, 3 layers, 4 heads, SwiGLU of 256; the GPT with "
        "RMS pre-norm, weight decay 0.1 on matrices and 100 steps of warm-up, nGPT with alpha starting at 1/3 (one "
        "over the number of layers); each side at the best of the learning rates 1e-3, 3e-3 and 6e-3 by another part "
        "of the validation text with the first seed."
    ),
    data=(
        "source text of the running Python's standard library, 5,000,000 bytes: the first 90 % train, the first "
        "16,384 bytes of the rest validate, the next 16,384 choose the learning rate"
    ),
    arms=ARMS,
    seeds={"small": (0,), "full": (0, 1, 2)},
    trial=trial,
    judge=judge,
    plan=plan,
    draw=draw,
)
