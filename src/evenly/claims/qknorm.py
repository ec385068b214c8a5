"""Query-key normalization is as good at the best learning rate, and better at a large one.

The paper's idea in small: a byte-level language model of two layers on the source of Python's standard library, with
attention on cosines times a learned scale against attention on dot products divided by sqrt(head dimension). All
else is the same on both sides.

Reference: A. Henry, P. R. Dachapally, S. Pawar and Y. Chen, "Query-Key Normalization for Transformers", Findings of
EMNLP 2020, arXiv 2010.04245, section 3 (the method) and figure 1 (saturated softmax).
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from evenly.claims._harness import Check, Claim, Judgement, Metric, Results
from evenly.claims._picture import BASELINE, METHOD, tidy
from evenly.data import TextData, load_text
from evenly.models import GPT, Attention, gpt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CLAIM"]

LEARNING_RATES = (1e-3, 1e-2, 3e-2)
LENGTH, BATCH, WARMUP = 64, 16, 50
STEPS = {"small": 8, "full": 500}
WINDOWS = {"small": 16, "full": 256}  # of the validation text
SIDES = {"dot product": None, "query-key norm": "l2"}
ARMS = {f"{name} lr={lr:g}": {"qk_norm": kind, "lr": lr} for name, kind in SIDES.items() for lr in LEARNING_RATES}


def trial(settings: Mapping[str, Any], seed: int, budget: str) -> dict[str, Any]:
    """Train one language model; return its validation loss, the logits of its attention and the learned scales."""
    text = _text()
    model = gpt(text.vocabulary, qk_norm=settings["qk_norm"], dim=64, depth=2, num_heads=4, block_size=LENGTH)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["lr"])
    windows = text.train.unfold(0, LENGTH + 1, 1)
    order = torch.Generator().manual_seed(seed)  # both sides see the same windows
    for step in range(STEPS[budget]):
        rows = windows[torch.randint(len(windows), (BATCH,), generator=order)].long()
        for group in optimizer.param_groups:
            group["lr"] = settings["lr"] * min(1.0, (step + 1) / WARMUP)
        optimizer.zero_grad()
        _, loss = model(rows[:, :-1], rows[:, 1:])
        if not math.isfinite(loss.item()):
            break
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    held = text.val.unfold(0, LENGTH + 1, LENGTH)[: WINDOWS[budget]].long()
    return _measure(model.eval(), held)


def judge(results: Results) -> Judgement:
    """Apply the criterion to the means over seeds."""
    losses = {side: {lr: _values(results, side, lr, "loss") for lr in LEARNING_RATES} for side in SIDES}
    means = {side: {lr: statistics.fmean(values) for lr, values in row.items()} for side, row in losses.items()}
    best = {side: min(row, key=lambda lr: row[lr]) for side, row in means.items()}
    base, method = SIDES
    highest = LEARNING_RATES[-1]
    gap = means[method][best[method]] - means[base][best[base]]
    gaps = [
        a - b for a, b in zip(losses[method][best[method]], losses[base][best[base]], strict=True) if math.isfinite(b)
    ]
    # Of each trial, how far its largest logit in absolute value lies above the learned scale of its layer.
    excess = max(value for lr in LEARNING_RATES for value in _values(results, method, lr, "excess"))
    worse = all(means[method][lr] - means[base][lr] > 0.05 for lr in LEARNING_RATES)
    if worse:
        why = "Query-key normalization is worse at every learning rate, which refutes the claim on this model."
    elif gap > 0.03:
        why = "At its best learning rate query-key normalization is behind the dot product here."
    else:
        why = "The dot product stands the largest learning rate as well here."
    return Judgement(
        metrics=[
            Metric(
                "validation loss at the best learning rate, nats a byte",
                f"{base}, lr {best[base]:g}",
                losses[base][best[base]],
                f"{method}, lr {best[method]:g}",
                losses[method][best[method]],
            ),
            Metric(
                f"validation loss at learning rate {highest:g}, nats a byte",
                base,
                losses[base][highest],
                method,
                losses[method][highest],
            ),
            Metric(
                f"mean over queries of the largest logit, at learning rate {highest:g} (not judged)",
                base,
                _values(results, base, highest, "logit"),
                method,
                _values(results, method, highest, "logit"),
            ),
        ],
        checks=[
            Check("loss with query-key norm - without, each at its best learning rate", gap, "<=", 0.03),
            Check(
                "loss without query-key norm - with, at the highest learning rate",
                means[base][highest] - means[method][highest],
                ">",
                0.0,
            ),
            Check("largest logit / learned scale - 1, over all trials", excess, "<=", 1e-4),
        ],
        effect=("loss at the best learning rate, with - without; spread: range over seeds", gap, min(gaps), max(gaps)),
        why=why,
        notes={
            "mean validation loss": {
                side: {f"{lr:g}": round(value, 4) for lr, value in row.items()} for side, row in means.items()
            },
            "learned scales of the layers at the highest learning rate": [
                outcome["scales"] for trial, outcome in results.items() if ARMS[trial.arm] == _arm(method, highest)
            ],
        },
    )


def draw(figure: Figure, results: Results, judgement: Judgement) -> None:
    """Validation loss, and the largest logit, against the learning rate; a dot a seed."""
    left, right = figure.subplots(1, 2)
    for axes, key, name in ((left, "loss", "validation loss, nats a byte"), (right, "logit", "mean largest logit")):
        for side, colour in zip(SIDES, (BASELINE, METHOD), strict=True):
            rows = [[v for v in _values(results, side, lr, key) if math.isfinite(v)] for lr in LEARNING_RATES]
            shown = [(lr, statistics.fmean(row)) for lr, row in zip(LEARNING_RATES, rows, strict=True) if row]
            axes.plot(*zip(*shown, strict=True), "-", color=colour, label=side, linewidth=1.4)
            for lr, row in zip(LEARNING_RATES, rows, strict=True):
                axes.plot([lr] * len(row), row, "o", color=colour, markersize=4, alpha=0.6)
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel(name)
        tidy(axes)
    left.legend(frameon=False, fontsize=8)


@functools.cache
def _text() -> TextData:
    return load_text("stdlib")


@torch.no_grad()
def _measure(model: GPT, held: torch.Tensor) -> dict[str, Any]:
    inputs: list[tuple[Attention, torch.Tensor]] = []
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    hooks = [layer.qkv.register_forward_hook(_keep(layer, inputs)) for layer in layers]
    _, loss = model(held[:, :-1], held[:, 1:])
    for hook in hooks:
        hook.remove()
    means, excess, scales = [], [], []
    for layer, x in inputs:
        q, k, _ = layer.project(x)
        logits = q @ k.mT if layer.scale is not None else q @ k.mT / math.sqrt(layer.head_dim)
        later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        means.append(logits.masked_fill(later, -math.inf).amax(-1).mean().item())
        if layer.scale is not None:
            scales.append(layer.scale.item())
            excess.append(logits.abs().max().item() / abs(layer.scale.item()) - 1)
    return {
        "loss": round(loss.item(), 6),
        "logit": round(statistics.fmean(means), 4),
        "scales": [round(value, 4) for value in scales],
        "excess": max(excess, default=0.0),
    }


def _keep(layer: Attention, inputs: list[tuple[Attention, torch.Tensor]]) -> Any:
    return lambda module, arguments, output: inputs.append((layer, arguments[0]))


def _arm(side: str, lr: float) -> dict[str, Any]:
    return {"qk_norm": SIDES[side], "lr": lr}


def _values(results: Results, side: str, lr: float, key: str) -> list[float]:
    # A number that was not finite is stored as None: the run diverged.
    chosen = [outcome[key] for trial, outcome in results.items() if ARMS[trial.arm] == _arm(side, lr)]
    return [math.inf if value is None else value for value in chosen]


CLAIM = Claim(
    id="qknorm",
    statement=(
        "Attention on normalized queries and keys trains as well as on dot products at the best learning rate, and "
        "better at a large one, with logits that stay bounded by the learned scale."
    ),
    criterion=(
        "QKNorm <= baseline + 0.03 at best lr, and strictly better (or baseline diverged) at the highest lr; max "
        "logit bounded by learned g. Refuted if QKNorm is worse by more than 0.05 at every lr. Measured so: mean over "
        "seeds of the validation loss in nats after 500 steps of Adam, learning rates 1e-3, 1e-2 and 3e-2 with 50 "
        "steps of linear warm-up and then constant, gradients clipped to norm 1, batches of 16 windows of 64 bytes; "
        "two pre-norm layers with 64 features, 4 heads and rotary positions on both sides; best lr: that with the "
        "lowest mean loss, for each side."
    ),
    data=(
        "source text of the running Python's standard library: 900,000 bytes train, the first 16,384 of the 100,000 "
        "after them validate"
    ),
    arms=ARMS,
    seeds={"small": (0,), "full": (0, 1, 2)},
    trial=trial,
    judge=judge,
    draw=draw,
)
