"""Without the radial part of momentum's update, the norms of scale-invariant weights stay small.

A convolutional network of four layers with batch normalization on the 8x8 digits, trained at a constant learning
rate by SGD with Nesterov momentum and by AdamW, and by SGDP and AdamP with the same settings. Momentum lengthens
weights whose length does not matter, so their effective step shrinks; the question is how much, and whether the
classifier is the worse for it.

Reference: B. Heo et al., "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights",
ICLR 2021, arXiv 2006.08217, section 2.4 (norm growth under momentum) and table 1 (accuracy).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

import evenly.nn
import evenly.optim
from evenly.claims._harness import Check, Claim, Judgement, Metric, Results
from evenly.claims._picture import BASELINE, METHOD, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CLAIM"]

LEARNING_RATES = {"sgd": (0.01, 0.03, 0.1, 0.3, 1.0), "adam": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)}
DECAY = 1e-4
EPOCHS = {"small": 3, "full": 60}
BATCH = 100
LAST = 10  # epochs whose accuracy is averaged
PAIRS = (("sgd", "sgdp", "sgd"), ("adam", "adamp", "adam"))  # baseline, method, learning rates
SETTINGS = [
    {"optimizer": name, "lr": lr, "decay": decay}
    for baseline, method, rates in PAIRS
    for decay in (0.0, DECAY)
    for lr in (LEARNING_RATES[rates] if decay == 0 else LEARNING_RATES[rates][2:3])
    for name in (baseline, method)
]
ARMS = {f"{one['optimizer']} lr={one['lr']:g} wd={one['decay']:g}": one for one in SETTINGS}


def trial(settings: Mapping[str, Any], seed: int, budget: str) -> dict[str, Any]:
    """Train one network; return the squared norm of its kernels and its test accuracy in the last epochs."""
    train, test = _digits(seed)
    network = _network()
    kernels = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
    optimizer = _optimizer(settings, network)
    norms, accuracies, projected = [_norm(kernels)], [], []
    for epoch in range(EPOCHS[budget]):
        order = torch.randperm(len(train[0]))
        for rows in order.split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(train[0][rows]), train[1][rows]).backward()
            optimizer.step()
            if isinstance(optimizer, evenly.optim.SGDP | evenly.optim.AdamP):
                projected.append(optimizer.projected["channel"] + optimizer.projected["layer"])
        norms.append(round(_norm(kernels), 4))
        if epoch >= EPOCHS[budget] - LAST:
            network.eval()
            with torch.no_grad():
                accuracies.append(round((network(test[0]).argmax(1) == test[1]).double().mean().item(), 5))
            network.train()
    return {
        "norms": norms,
        "accuracies": accuracies,
        "accuracy": round(float(np.mean(accuracies)), 5),
        "projected": round(float(np.mean(projected)), 3) if projected else 0.0,
    }


def judge(results: Results) -> Judgement:
    """Apply the criterion at the middle learning rate: the ratio of squared norms, and the paired gain."""
    middle = _middle("sgd")
    sgd, sgdp = (_of(results, name, middle, 0.0) for name in ("sgd", "sgdp"))
    norms = [[run["norms"][-1] for run in side] for side in (sgd, sgdp)]
    accuracies = [[run["accuracy"] for run in side] for side in (sgd, sgdp)]
    ratios = [a / b for a, b in zip(*norms, strict=True)]
    gains = [100 * (b - a) for a, b in zip(*accuracies, strict=True)]
    gain = statistics.mean(gains)
    ratio = statistics.median(ratios)
    sides = (f"SGD, lr {middle:g}", f"SGDP, lr {middle:g}")
    growth = [statistics.median(run["norms"][-1] - run["norms"][0] for run in side) for side in (sgd, sgdp)]
    if ratio < 2:
        why = (
            f"The squared norm starts near {sgd[0]['norms'][0]:.0f} and grows by {growth[0]:.1f} under SGD and by "
            f"{growth[1]:.1f} under SGDP: the growth is stopped, but this training is too short for it to double the "
            f"whole at this learning rate."
        )
    else:
        why = "The norms differ as the paper says, and the digits are classified no better for it."
    return Judgement(
        metrics=[
            Metric("squared norm of the kernels at the end", sides[0], norms[0], sides[1], norms[1]),
            Metric(f"test accuracy, mean of the last {LAST} epochs", sides[0], accuracies[0], sides[1], accuracies[1]),
        ],
        checks=[
            Check("squared norm, SGD's / SGDP's (median over seeds)", ratio, ">=", 2.0),
            Check("paired gain in test accuracy at the middle learning rate, points (mean)", gain, ">", 0.0),
        ],
        effect=("squared norm, SGD's / SGDP's; spread: range over seeds", ratio, min(ratios), max(ratios)),
        why=why,
        notes={
            "mean test accuracy, %": {
                arm: round(100 * statistics.mean(run["accuracy"] for run in _of(results, **_keys(settings))), 2)
                for arm, settings in ARMS.items()
            },
            "median squared norm at the end": {
                arm: round(statistics.median(run["norms"][-1] for run in _of(results, **_keys(settings))), 1)
                for arm, settings in ARMS.items()
            },
            "tensors projected a step, of 5 that could be": {
                arm: statistics.mean(run["projected"] for run in _of(results, **_keys(settings)))
                for arm, settings in ARMS.items()
                if settings["optimizer"] in ("sgdp", "adamp") and settings["decay"] == 0
            },
        },
    )


def draw(figure: Figure, results: Results, judgement: Judgement) -> None:
    """Left: the squared norm over epochs at the middle learning rates. Right: accuracy over the learning rates."""
    left, right = figure.subplots(1, 2)
    for (baseline, method, rates), style in zip(PAIRS, ("-", "--"), strict=True):
        lr = _middle(rates)
        for name, colour in ((baseline, BASELINE), (method, METHOD)):
            curves = np.array([run["norms"] for run in _of(results, name, lr, 0.0)])
            left.plot(curves.mean(0), style, color=colour, label=f"{name}, lr {lr:g}", linewidth=1.4)
            left.fill_between(range(curves.shape[1]), curves.min(0), curves.max(0), color=colour, alpha=0.15, lw=0)
            means = [
                100 * statistics.mean(run["accuracy"] for run in _of(results, name, rate, 0.0))
                for rate in LEARNING_RATES[rates]
            ]
            right.plot(LEARNING_RATES[rates], means, f"o{style}", color=colour, label=name, markersize=4)
    left.set_yscale("log")
    left.set_xlabel("epoch")
    left.set_ylabel("squared norm of the kernels")
    left.legend(frameon=False, fontsize=8)
    right.set_xscale("log")
    right.set_xlabel("learning rate")
    right.set_ylabel("test accuracy, %")
    right.legend(frameon=False, fontsize=8)
    tidy(left)
    tidy(right)


def _network() -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 1
    for stride in (1, 2, 1, 2):
        layers += [
            nn.Conv2d(channels, 16, 3, stride=stride, padding=1, bias=False),
            evenly.nn.BatchNorm(16),
            nn.ReLU(),
        ]
        channels = 16
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def _optimizer(settings: Mapping[str, Any], network: nn.Module) -> torch.optim.Optimizer:
    params, lr, decay = network.parameters(), settings["lr"], settings["decay"]
    match settings["optimizer"]:
        case "sgd":
            return torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True, weight_decay=decay)
        case "sgdp":
            return evenly.optim.SGDP(params, lr=lr, momentum=0.9, nesterov=True, weight_decay=decay)
        case "adam":
            return torch.optim.AdamW(params, lr=lr, weight_decay=decay)
    return evenly.optim.AdamP(params, lr=lr, weight_decay=decay)


def _norm(kernels: list[torch.Tensor]) -> float:
    return sum(kernel.detach().square().sum().item() for kernel in kernels)


def _digits(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    # 400 images to train on, 1397 to measure with; another split each seed.
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x = torch.from_numpy(pixels[order] / 16).float().view(-1, 1, 8, 8)
    y = torch.from_numpy(labels[order])
    return list(zip(x.split([400, 1397]), y.split([400, 1397]), strict=True))


def _keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": settings["optimizer"], "lr": settings["lr"], "decay": settings["decay"]}


def _of(results: Results, name: str, lr: float, decay: float) -> list[dict[str, Any]]:
    wanted = {"optimizer": name, "lr": lr, "decay": decay}
    return [outcome for trial, outcome in results.items() if ARMS[trial.arm] == wanted]


def _middle(rates: str) -> float:
    return sorted(LEARNING_RATES[rates])[len(LEARNING_RATES[rates]) // 2]


CLAIM = Claim(
    id="adamp",
    statement=(
        "Momentum lengthens scale-invariant weights and so shrinks their effective step; taking the radial part out "
        "of the update (SGDP) stops most of that growth, and the network is the better for it."
    ),
    criterion=(
        "Without weight decay and at the middle one of five learning rates, the final squared norm of the "
        "convolution kernels under SGD is >= 2x that under SGDP (median over seeds), and SGDP's test accuracy is "
        "higher (mean paired gain over seeds > 0). Refuted if the norms differ and the accuracy does not gain. "
        "Measured so: SGD with Nesterov momentum 0.9, learning rates 0.01, 0.03, 0.1, 0.3, 1, constant, 60 epochs "
        "of batches of 100; accuracy is the mean over the last 10 epochs. AdamW and AdamP over their "
        "rates, and weight decay 1e-4 at the middle ones, are run with the same seeds and reported."
    ),
    data="scikit-learn's digits (1797 images of 8x8 pixels, divided by 16): 400 train, 1397 test, split anew each seed",
    arms=ARMS,
    seeds={"small": (0,), "full": tuple(range(5))},
    trial=trial,
    judge=judge,
    draw=draw,
)
