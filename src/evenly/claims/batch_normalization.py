"""Batch normalization lets a sigmoid network train in fewer steps, at learning rates at least as large.

The paper's MNIST experiment in small: a fully connected network of three layers of 100 sigmoid units on the 8x8
digits, weights drawn from N(0, 0.1²), plain SGD with batches of 60, with and without batch normalization before
each sigmoid. Both sides try the same learning rates with the same steps and seeds.

Reference: S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
Covariate Shift", ICML 2015, arXiv 1502.03167, section 4.1 and figure 1 (the network), section 4.2 (steps to the
baseline's best accuracy).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

import evenly.nn
from evenly.claims._harness import Check, Claim, Judgement, Metric, Results
from evenly.claims._picture import BASELINE, METHOD, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CLAIM"]

LEARNING_RATES = (0.1, 0.5, 2.5)
STEPS = {"small": 50, "full": 3000}
EVERY = 25  # steps between checkpoints
BATCH = 60
ARMS = {
    f"{'batch norm' if norm else 'plain'} lr={lr}": {"norm": norm, "lr": lr}
    for norm in (False, True)
    for lr in LEARNING_RATES
}


def trial(settings: Mapping[str, Any], seed: int, budget: str) -> dict[str, Any]:
    """Train one network and return its validation and test accuracy at every checkpoint, and the drift."""
    train, validation, test = _digits(seed)
    network = _network(settings["norm"])
    optimizer = torch.optim.SGD(network.parameters(), lr=settings["lr"])
    curve: dict[str, list[float]] = {"validation": [], "test": []}
    percentiles = []
    order = torch.randperm(len(train[0]))
    used = 0
    for step in range(1, STEPS[budget] + 1):
        if used + BATCH > len(order):
            order, used = torch.randperm(len(order)), 0
        rows = order[used : used + BATCH]
        used += BATCH
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(train[0][rows]), train[1][rows]).backward()
        optimizer.step()
        if step % EVERY == 0:
            network.eval()
            with torch.no_grad():
                accuracy = (network(validation[0]).argmax(1) == validation[1]).float().mean()
                inputs = network[:-2](test[0])  # what the last hidden layer's sigmoids receive
                correct = (network[-2:](inputs).argmax(1) == test[1]).float().mean()
                percentiles.append(torch.quantile(inputs[:, 0], torch.tensor([0.15, 0.5, 0.85])))
            network.train()
            curve["validation"].append(round(accuracy.item(), 4))
            curve["test"].append(round(correct.item(), 4))
    drift = torch.stack(percentiles).diff(dim=0).abs().mean().item()
    return {**curve, "drift": round(drift, 5)}


def judge(results: Results) -> Judgement:
    """Apply the criterion: the speed-up in steps, and the best learning rates."""
    plain, plain_lr = _best(results, norm=False)
    normed, normed_lr = _best(results, norm=True)
    targets = [max(curve["test"]) for curve in plain]
    plain_steps = [_reach(curve["test"], target) for curve, target in zip(plain, targets, strict=True)]
    normed_steps = [_reach(curve["test"], target) for curve, target in zip(normed, targets, strict=True)]
    speedup = statistics.median(plain_steps) / statistics.median(normed_steps)
    ratios = [a / b for a, b in zip(plain_steps, normed_steps, strict=True)]
    low, high = np.percentile(ratios, [25, 75])
    sides = (f"plain, lr {plain_lr:g}", f"batch norm, lr {normed_lr:g}")

    def metric(name: str, left: Sequence[float], right: Sequence[float]) -> Metric:
        return Metric(name, sides[0], left, sides[1], right)

    best = [max(curve["test"]) for curve in normed]
    drifts = [[curve["drift"] for curve in side] for side in (plain, normed)]
    areas = {
        norm: ", ".join(f"{_area(results, {'norm': norm, 'lr': lr}):.3f}" for lr in LEARNING_RATES)
        for norm in (False, True)
    }
    if speedup >= 3:
        why = (
            "The speed-up holds. With batch norm the network learns at every rate (mean validation accuracy "
            f"{areas[True]} at {', '.join(map(str, LEARNING_RATES))}), so that its best one is decided by little; "
            f"the plain network learns fast enough only at the larger ones ({areas[False]})."
        )
    elif speedup >= 1.5:
        why = "The speed-up is above the 1.5x that would refute the claim, and below the 3x asked for."
    else:
        why = "The speed-up is below 1.5x, which refutes the claim on this network."
    return Judgement(
        metrics=[
            metric("steps to the plain net's best test accuracy", plain_steps, normed_steps),
            metric("best test accuracy", targets, best),
            metric("drift of the last layer's inputs (not judged)", *drifts),
        ],
        checks=[
            Check("speed-up in steps (ratio of medians)", speedup, ">=", 3.0),
            Check("best learning rate with batch norm / the plain one's", normed_lr / plain_lr, ">=", 1.0),
        ],
        effect=("speed-up in steps; spread: quartiles over seeds", speedup, float(low), float(high)),
        why=why,
        notes={
            "mean validation accuracy over the checkpoints": {
                arm: round(_area(results, settings), 4) for arm, settings in ARMS.items()
            },
            "median best test accuracy": {
                arm: statistics.median(max(curve["test"]) for curve in _curves(results, settings))
                for arm, settings in ARMS.items()
            },
        },
    )


def draw(figure: Figure, results: Results, judgement: Judgement) -> None:
    """Test accuracy against steps for every arm: the mean over seeds, the range shaded for the two best."""
    left, right = figure.subplots(1, 2, width_ratios=[1.6, 1])
    for norm, colour in ((False, BASELINE), (True, METHOD)):
        _, best = _best(results, norm)
        for lr, style in zip(LEARNING_RATES, (":", "--", "-"), strict=True):
            curves = np.array([curve["test"] for curve in _curves(results, {"norm": norm, "lr": lr})])
            steps = EVERY * np.arange(1, curves.shape[1] + 1)
            name = f"{'batch norm' if norm else 'plain'}, lr {lr:g}{' (best)' if lr == best else ''}"
            left.plot(steps, 100 * curves.mean(0), style, color=colour, label=name, linewidth=1.4)
            if lr == best:
                left.fill_between(steps, *np.percentile(100 * curves, [0, 100], axis=0), color=colour, alpha=0.15, lw=0)
    left.set_xscale("log")
    left.set_xlabel("steps")
    left.set_ylabel("test accuracy, %")
    left.legend(frameon=False, fontsize=8)
    tidy(left)
    steps_metric = judgement.metrics[0]
    for base, fast in zip(steps_metric.baseline_values, steps_metric.method_values, strict=True):
        if base is not None and fast is not None and math.isfinite(fast):
            right.plot([0, 1], [base, fast], "o-", color="#666666", alpha=0.6, markersize=4, linewidth=0.8)
    right.set_yscale("log")
    right.set_xticks([0, 1], [steps_metric.baseline, steps_metric.method])
    right.set_xlim(-0.4, 1.4)
    missed = sum(value is None or not math.isfinite(value) for value in steps_metric.method_values)
    right.set_ylabel(
        "steps to the plain net's best, a line a seed" + (f"\n({missed} never got there)" if missed else "")
    )
    tidy(right)


def _network(norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    width = 64
    for _ in range(3):
        layers.append(nn.Linear(width, 100, bias=not norm))
        if norm:
            layers.append(evenly.nn.BatchNorm(100))
        layers.append(nn.Sigmoid())
        width = 100
    layers.append(nn.Linear(width, 10))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.1)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def _digits(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    # 1200 images to train on, 297 to choose the learning rate by, 300 to measure with; another split each seed.
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x = torch.from_numpy(pixels[order] / 16).float()
    y = torch.from_numpy(labels[order])
    return list(zip(x.split([1200, 297, 300]), y.split([1200, 297, 300]), strict=True))


def _curves(results: Results, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [outcome for trial, outcome in results.items() if ARMS[trial.arm] == settings]


def _area(results: Results, settings: Mapping[str, Any]) -> float:
    return float(np.mean([curve["validation"] for curve in _curves(results, settings)]))


def _best(results: Results, norm: bool) -> tuple[list[dict[str, Any]], float]:
    settings = max(
        (settings for settings in ARMS.values() if settings["norm"] == norm),
        key=lambda settings: _area(results, settings),
    )
    return _curves(results, settings), float(settings["lr"])


def _reach(curve: list[float], target: float) -> float:
    return next((EVERY * (place + 1) for place, value in enumerate(curve) if value >= target), math.inf)


CLAIM = Claim(
    id="batch-normalization",
    statement=(
        "With batch normalization a sigmoid network reaches the plain network's best accuracy in far fewer steps, "
        "and its best learning rate is at least as large."
    ),
    criterion=(
        "Steps to the plain net's best accuracy reduced >= 3x (medians), best learning rate with BN >= the plain "
        "one's. Refuted if the speed-up is below 1.5x. Measured so: for each side the best of the learning rates "
        "0.1, 0.5, 2.5 is the one with the highest validation accuracy averaged over all checkpoints and seeds; the "
        "plain net's best accuracy is, seed by seed, the highest test accuracy it has at any checkpoint at its best "
        "learning rate; a checkpoint is taken every 25 of 3000 steps."
    ),
    data=(
        "scikit-learn's digits (1797 images of 8x8 pixels, divided by 16): 1200 train, 297 validation, 300 test, "
        "split anew each seed"
    ),
    arms=ARMS,
    seeds={"small": (0,), "full": tuple(range(10))},
    trial=trial,
    judge=judge,
    draw=draw,
)
