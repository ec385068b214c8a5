"""Weight normalization with data-dependent initialization makes plain SGD work at more learning rates and scales.

A perceptron of six hidden layers of 64 rectified units on the 8x8 digits, whose initial weights are 0.3, 1 or 3 times
as large as He et al. have them, trained by SGD at nine learning rates; the same with weight normalization, from the
same weights, initialized on one batch. The question is at how many of these 27 pairs each side learns.

Reference: T. Salimans and D. P. Kingma, "Weight Normalization: A Simple Reparameterization to Accelerate Training of
Deep Neural Networks", NIPS 2016, arXiv 1602.07868, sections 2 and 3 (robustness to the learning rate and the
initialization).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from evenly.claims._harness import Check, Claim, Judgement, Metric, Results
from evenly.claims._picture import BASELINE, METHOD, tidy
from evenly.weights import data_dependent_init_, weight_normalize_

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CLAIM"]

LEARNING_RATES = tuple(2.0**power for power in range(-8, 1))
FACTORS = (0.3, 1.0, 3.0)  # times the standard deviation of He et al.
THRESHOLD = 0.5
STEPS = {"small": 5, "full": 300}
BATCH = 64
FIRST = 256  # samples of the batch that initializes
ARMS = {
    f"{'weight norm' if norm else 'plain'} init={factor:g} lr={lr:g}": {"norm": norm, "factor": factor, "lr": lr}
    for norm in (False, True)
    for factor in FACTORS
    for lr in LEARNING_RATES
}


def trial(settings: Mapping[str, Any], seed: int, budget: str) -> dict[str, Any]:
    """Train one network and return its training loss and test accuracy at the end; no loss if it is not finite."""
    train, test = _digits(seed)
    network = _network(settings["factor"])
    if settings["norm"]:
        weight_normalize_(network)
        data_dependent_init_(network, train[0][:FIRST], v_std=None, dead="keep")
    optimizer = torch.optim.SGD(network.parameters(), lr=settings["lr"])
    order = torch.randperm(len(train[0]))
    used = 0
    for _ in range(STEPS[budget]):
        if used + BATCH > len(order):
            order, used = torch.randperm(len(order)), 0
        rows = order[used : used + BATCH]
        used += BATCH
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(train[0][rows]), train[1][rows])
        if not math.isfinite(loss.item()):
            break
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        final = nn.functional.cross_entropy(network(train[0]), train[1]).item()
        accuracy = (network(test[0]).argmax(1) == test[1]).double().mean().item()
    return {"loss": round(final, 5) if math.isfinite(final) else None, "accuracy": round(accuracy, 4)}


def judge(results: Results) -> Judgement:
    """Apply the criterion: the pairs that reach the threshold, and the loss at each side's best pair."""
    solved = {norm: _solved(results, norm) for norm in (False, True)}
    ratios = [b / max(a, 1) for a, b in zip(solved[False], solved[True], strict=True)]
    ratio = statistics.mean(solved[True]) / max(statistics.mean(solved[False]), 1e-9)
    best = {norm: _best(results, norm) for norm in (False, True)}
    losses = {norm: _losses(results, settings) for norm, settings in best.items()}
    final = statistics.mean(losses[True]) / statistics.mean(losses[False])
    plain, normed = statistics.mean(solved[False]), statistics.mean(solved[True])
    if ratio < 1.5:
        why = (
            f"The plain network learns at {plain:.1f} of the {len(ARMS) // 2} pairs, weight normalization at "
            f"{normed:.1f}; the other pairs are too slow for 300 steps or diverge on both sides."
        )
    else:
        why = "It learns at more pairs, and the plain network's best loss, at a rate that suits it, is lower."
    names = ("plain", "weight norm")
    return Judgement(
        metrics=[
            Metric(f"pairs of 27 with a loss below {THRESHOLD}", names[0], solved[False], names[1], solved[True]),
            Metric(
                "training loss at the best pair",
                f"plain, init {best[False]['factor']:g}, lr {best[False]['lr']:g}",
                losses[False],
                f"weight norm, init {best[True]['factor']:g}, lr {best[True]['lr']:g}",
                losses[True],
            ),
        ],
        checks=[
            Check("pairs solved, weight norm / plain (ratio of means)", ratio, ">=", 1.5),
            Check("loss at the best pair, weight norm / plain (ratio of means)", final, "<=", 1.1),
        ],
        effect=("pairs solved, weight norm / plain; spread: range over seeds", ratio, min(ratios), max(ratios)),
        why=why,
        notes={
            "seeds of 5 that reach the threshold": {
                arm: sum(loss < THRESHOLD for loss in _losses(results, settings)) for arm, settings in ARMS.items()
            },
            "mean test accuracy at the best pair": {
                name: round(statistics.mean(run["accuracy"] for run in _runs(results, best[norm])), 4)
                for name, norm in zip(names, (False, True), strict=True)
            },
        },
    )


def draw(figure: Figure, results: Results, judgement: Judgement) -> None:
    """The median training loss over the learning rates, a picture for each scale of the initial weights."""
    axes = figure.subplots(1, 3, sharey=True)
    for one, factor in zip(axes, FACTORS, strict=True):
        for norm, colour, name in ((False, BASELINE, "plain"), (True, METHOD, "weight norm")):
            runs = np.array([_losses(results, {"norm": norm, "factor": factor, "lr": lr}) for lr in LEARNING_RATES])
            runs = np.minimum(runs, 10.0)
            one.plot(LEARNING_RATES, np.median(runs, 1), "o-", color=colour, label=name, markersize=3, linewidth=1.4)
            one.fill_between(LEARNING_RATES, runs.min(1), runs.max(1), color=colour, alpha=0.15, lw=0)
        one.axhline(THRESHOLD, color="#999999", linewidth=0.8, linestyle=":")
        one.set_xscale("log", base=2)
        one.set_yscale("log")
        one.set_xlabel(f"learning rate; initial weights {factor:g} x He")
        tidy(one)
    axes[0].set_ylabel("training loss after 300 steps")
    axes[0].legend(frameon=False, fontsize=8)


def _network(factor: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    layers.append(nn.Linear(64, 10))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=factor * math.sqrt(2 / 64))
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def _digits(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    # 1437 images to train on, 360 to test with; another split each seed. Pixels that never vary stay 0.
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x = torch.from_numpy(pixels[order]).float()
    y = torch.from_numpy(labels[order])
    train, test = x.split([1437, 360])
    mean, std = train.mean(0), train.std(0, correction=0)
    std = torch.where(std > 0, std, torch.ones_like(std))
    classes = y.split([1437, 360])
    return [((train - mean) / std, classes[0]), ((test - mean) / std, classes[1])]


def _runs(results: Results, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [outcome for trial, outcome in results.items() if ARMS[trial.arm] == settings]


def _losses(results: Results, settings: Mapping[str, Any]) -> list[float]:
    """The final losses; infinite where a run diverged."""
    return [math.inf if run["loss"] is None else run["loss"] for run in _runs(results, settings)]


def _solved(results: Results, norm: bool) -> list[int]:
    """Pairs below the threshold, seed by seed."""
    table = [_losses(results, settings) for settings in ARMS.values() if settings["norm"] == norm]
    return [sum(loss < THRESHOLD for loss in column) for column in zip(*table, strict=True)]


def _best(results: Results, norm: bool) -> Mapping[str, Any]:
    own = [settings for settings in ARMS.values() if settings["norm"] == norm]
    return min(own, key=lambda settings: statistics.mean(_losses(results, settings)))


CLAIM = Claim(
    id="weight-normalization",
    statement=(
        "With weight normalization and data-dependent initialization, SGD trains a deep perceptron at many more pairs "
        "of learning rate and initial scale, and no worse at the best."
    ),
    criterion=(
        "Weight normalization reaches a training loss below 0.5 after 300 steps at >= 1.5x as many pairs of learning "
        "rate (2^-8 to 2^0) and initial scale (0.3, 1, 3 times He) as the plain network (means over seeds), and its "
        "loss at its best pair is not above 1.1x the plain network's at its best. Refuted if the plain network solves "
        "as many. Measured so: both sides start from the same weights; weight normalization keeps their directions and "
        "sets lengths and biases on one batch of 256; SGD without momentum, batches of 64; the loss is that of the "
        "whole training set."
    ),
    data=(
        "scikit-learn's digits (1797 images of 8x8 pixels, standardized): 1437 train, 360 test, split anew each seed"
    ),
    arms=ARMS,
    seeds={"small": (0,), "full": (0, 1, 2, 3, 4)},
    trial=trial,
    judge=judge,
    draw=draw,
)
