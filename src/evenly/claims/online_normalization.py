"""Online normalization at batch size 1 reaches batch normalization at 32, and its control process is needed.

The paper's fully connected experiment in small: an MLP with a normalization before each rectifier on the 8x8 digits.
Online and layer normalization train one sample at a time, batch normalization on batches of 32, with learning rates
scaled by the batch. The fourth arm is online normalization whose gradient treats the statistics as constants.

Reference: V. Chiley et al., "Online Normalization for Training Neural Networks", NeurIPS 2019, arXiv 1905.05894,
section 4 (fully connected network) and section 3.2 (what the control process corrects).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

import evenly.nn
from evenly.claims._harness import Check, Claim, Judgement, Metric, Results, Trial
from evenly.claims._picture import BASELINE, METHOD, dots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CLAIM"]

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # at batch 32; scaled by B / 32
EPOCHS = {"small": 0.05, "full": 5.0}
TUNING_EPOCHS = {"small": 0.05, "full": 2.0}
TUNING_SEED = 100
SIDES: dict[str, tuple[int, Callable[[int], nn.Module]]] = {
    "batch": (32, evenly.nn.BatchNorm),
    "layer": (1, evenly.nn.LayerNorm),
    "online": (1, evenly.nn.OnlineNorm1d),
    # with alpha_bkw at 1 nothing is ever subtracted from the gradient
    "no control": (1, lambda c: evenly.nn.OnlineNorm1d(c, alpha_bkw=1 - 1e-12)),
}
ARMS: dict[str, dict[str, Any]] = {
    f"{'tune ' if tune else ''}{side} lr={rate:g}": {"side": side, "rate": rate, "tune": tune}
    for tune in (True, False)
    for side in SIDES
    for rate in RATES
}


def trial(settings: Mapping[str, Any], seed: int, budget: str) -> dict[str, Any]:
    """Train one network; return its validation and test accuracy."""
    train, validation, test = _digits(seed)
    batch, norm = SIDES[settings["side"]]
    network = _network(norm)
    rate = settings["rate"] * batch / 32
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
    epochs = (TUNING_EPOCHS if settings["tune"] else EPOCHS)[budget]
    steps = max(1, round(epochs * len(train[0]) / batch))
    order = torch.cat([torch.randperm(len(train[0])) for _ in range(int(np.ceil(epochs)) + 1)])
    for step in range(steps):
        rows = order[step * batch : (step + 1) * batch]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(train[0][rows]), train[1][rows])
        loss.backward()
        optimizer.step()
        if step % 100 == 0 and not loss.isfinite():
            break
    network.eval()
    return {"validation": _accuracy(network, *validation), "test": _accuracy(network, *test)}


def plan(budget: str, results: Results) -> list[Trial]:
    """First every side with every rate on a seed of its own; then each side with its best rate on all seeds."""
    tuning = [Trial(arm, TUNING_SEED) for arm, settings in ARMS.items() if settings["tune"]]
    if not all(trial in results for trial in tuning):
        return tuning
    best = _best_rates(results)
    return tuning + [Trial(f"{side} lr={best[side]:g}", seed) for seed in CLAIM.seeds[budget] for side in SIDES]


def judge(results: Results) -> Judgement:
    """Apply the criterion to the test accuracies, in points."""
    points = {side: [100 * outcome["test"] for outcome in _of(results, side)] for side in SIDES}
    mean = {side: statistics.fmean(values) for side, values in points.items()}
    worse = [a < b for a, b in zip(points["no control"], points["online"], strict=True)]
    rates = _best_rates(results)
    gaps = [a - b for a, b in zip(points["online"], points["batch"], strict=True)]
    failed = []
    if mean["batch"] - mean["online"] > 0.7:
        failed.append("Online normalization trails batch normalization here.")
    if mean["online"] < mean["layer"]:
        failed.append("Layer normalization is better at batch size 1 on this small network.")
    if sum(worse) < 3:
        failed.append("On a network of three layers the control process is not needed.")
    names = {side: f"{side}, lr {rates[side]:g}" for side in SIDES}
    name = "test accuracy, %"
    return Judgement(
        metrics=[
            Metric(name, names[side], points[side], names["online"], points["online"])
            for side in ("batch", "layer", "no control")
        ],
        checks=[
            Check("points by which online norm trails batch norm", mean["batch"] - mean["online"], "<=", 0.7),
            Check("points of online norm over layer norm", mean["online"] - mean["layer"], ">=", 0.0),
            Check("seeds in which it is worse without control", sum(worse), ">=", 3),
        ],
        effect=(
            "points of online norm at batch 1 over batch norm at 32; spread: range over seeds",
            mean["online"] - mean["batch"],
            min(gaps),
            max(gaps),
        ),
        why=" ".join(failed),
        notes={
            "mean test accuracy, %": {side: round(value, 2) for side, value in mean.items()},
            "validation accuracy while tuning": {
                trial.arm: outcome["validation"] for trial, outcome in results.items() if ARMS[trial.arm]["tune"]
            },
        },
    )


def draw(figure: Figure, results: Results, judgement: Judgement) -> None:
    """Test accuracy of the four sides, a dot a seed."""
    sides = [(side, [100 * outcome["test"] for outcome in _of(results, side)], side == "online") for side in SIDES]
    labels = {"batch": "batch norm\nbatch 32", "layer": "layer norm\nbatch 1", "online": "online norm\nbatch 1"}
    labels["no control"] = "online norm\nwithout control"
    dots(
        figure.subplots(),
        [(labels[side], values, METHOD if ours else BASELINE) for side, values, ours in sides],
        "test accuracy, %",
    )


def _network(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    width = 64
    for _ in range(3):
        layers += [nn.Linear(width, 128, bias=False), norm(128), nn.ReLU()]
        width = 128
    return nn.Sequential(*layers, nn.Linear(width, 10))


def _digits(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x = torch.from_numpy(pixels[order] / 16).float()
    y = torch.from_numpy(labels[order])
    return list(zip(x.split([1200, 297, 300]), y.split([1200, 297, 300]), strict=True))


@torch.no_grad()
def _accuracy(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return round((network(x).argmax(1) == y).float().mean().item(), 4)


def _best_rates(results: Results) -> dict[str, float]:
    best: dict[str, tuple[float, float]] = {}
    for trial, outcome in results.items():
        settings = ARMS[trial.arm]
        if settings["tune"]:
            best[settings["side"]] = max(
                best.get(settings["side"], (-1.0, 0.0)), (outcome["validation"], -settings["rate"])
            )
    return {side: -rate for side, (_, rate) in best.items()}


def _of(results: Results, side: str) -> list[dict[str, Any]]:
    return [
        outcome for trial, outcome in results.items() if ARMS[trial.arm]["side"] == side and not ARMS[trial.arm]["tune"]
    ]


CLAIM = Claim(
    id="online-normalization",
    statement=(
        "Online normalization, one sample at a time, is as accurate as batch normalization with batches of 32, and "
        "needs its control process."
    ),
    criterion=(
        "Test accuracy, means over seeds: online norm within 0.7 points of batch norm and at least that of layer norm; "
        "without control it is worse, or diverges, in at least 3 of 5 seeds. Refuted if online norm trails batch norm "
        "by more than 2 points, or if removing the control changes nothing. Measured so: SGD with momentum 0.9, 5 "
        "epochs; each arm's learning rate is one of 0.001, 0.003, 0.01, 0.03, 0.1 times B / 32, the one with the "
        "highest validation accuracy after 2 epochs on a seed of its own, the lowest among equals."
    ),
    data=(
        "scikit-learn's digits (1797 images of 8x8 pixels, divided by 16): 1200 train, 297 validation, 300 test, "
        "split anew each seed"
    ),
    arms=ARMS,
    seeds={"small": (0,), "full": (0, 1, 2, 3, 4)},
    trial=trial,
    judge=judge,
    plan=plan,
    draw=draw,
)
