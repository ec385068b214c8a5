"""With batches of 2 images weight standardization helps group normalization, and batch-channel normalization
with estimated statistics, on standardized weights, beats batch normalization.

The paper's micro-batch experiment in small: a residual network of 3 blocks and 32 channels on the 8x8 digits.

Reference: S. Qiao, H. Wang, C. Liu, W. Shen and A. Yuille, "Micro-Batch Training with Batch-Channel Normalization and
Weight Standardization", 2019, arXiv 1903.10520, section 5.1 (ImageNet with 1 or 2 images a device).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import evenly.nn
from evenly.claims._harness import Check, Claim, Judgement, Metric, Results, Trial
from evenly.claims._picture import BASELINE, METHOD, dots
from evenly.weights import weight_standardize_

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CLAIM"]

CHANNELS, GROUPS, BLOCKS, BATCH = 32, 8, 3, 2
SPEED = 0.01  # of the estimates, times the learning rate over its first value
RATES = (0.003, 0.01, 0.03)
EPOCHS = {"small": 0.02, "full": 3.0}
TUNING_EPOCHS = {"small": 0.02, "full": 1.0}
TUNING_SEED = 100
SIDES: dict[str, tuple[bool, Callable[[], nn.Module]]] = {
    "BN": (False, lambda: evenly.nn.BatchNorm(CHANNELS)),
    "GN": (False, lambda: evenly.nn.GroupNorm(GROUPS, CHANNELS)),
    "GN+WS": (True, lambda: evenly.nn.GroupNorm(GROUPS, CHANNELS)),
    "BCN+WS": (True, lambda: evenly.nn.BCNorm(CHANNELS, GROUPS, estimate=True, moving_speed=SPEED)),
}
ARMS: dict[str, dict[str, Any]] = {
    f"{'tune ' if tune else ''}{side} lr={rate:g}": {"side": side, "rate": rate, "tune": tune}
    for tune in (True, False)
    for side in SIDES
    for rate in RATES
}


def trial(settings: Mapping[str, Any], seed: int, budget: str) -> dict[str, Any]:
    """Train one network; return its validation and test error."""
    train, validation, test = _digits(seed)
    standardize, norm = SIDES[settings["side"]]
    network = _Network(norm)
    if standardize:
        weight_standardize_(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=settings["rate"], momentum=0.9, weight_decay=1e-4)
    epochs = (TUNING_EPOCHS if settings["tune"] else EPOCHS)[budget]
    steps = max(1, round(epochs * len(train[0]) / BATCH))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.cat([torch.randperm(len(train[0])) for _ in range(int(np.ceil(epochs)))])
    for rows in order.split(BATCH)[:steps]:
        if settings["side"] == "BCN+WS":
            evenly.nn.set_moving_speed_(network, SPEED * schedule.get_last_lr()[0] / settings["rate"])
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(train[0][rows]), train[1][rows]).backward()
        optimizer.step()
        schedule.step()
    network.eval()
    return {"validation": _error(network, *validation), "test": _error(network, *test)}


def plan(budget: str, results: Results) -> list[Trial]:
    """First every side with every rate on a seed of its own; then each side with its best rate on all seeds."""
    tuning = [Trial(arm, TUNING_SEED) for arm, settings in ARMS.items() if settings["tune"]]
    if not all(trial in results for trial in tuning):
        return tuning
    best = _best_rates(results)
    return tuning + [Trial(f"{side} lr={best[side]:g}", seed) for seed in CLAIM.seeds[budget] for side in SIDES]


def judge(results: Results) -> Judgement:
    """Apply the criterion to the test errors, in percent."""
    errors = {side: [100 * outcome["test"] for outcome in _of(results, side)] for side in SIDES}
    mean = {side: statistics.fmean(values) for side, values in errors.items()}
    rates = _best_rates(results)
    names = {side: f"{side}, lr {rates[side]:g}" for side in SIDES}
    gains = [a - b for a, b in zip(errors["BN"], errors["BCN+WS"], strict=True)]
    failed = []
    if mean["GN+WS"] >= mean["GN"]:
        failed.append("Weight standardization does not lower the error of group norm on this easy task.")
    if mean["BCN+WS"] >= mean["BN"]:
        failed.append("Batch norm stands batches of 2 here, where each has 128 values a channel.")
    return Judgement(
        metrics=[
            Metric("test error, %", names[a], errors[a], names[b], errors[b])
            for a, b in (("GN", "GN+WS"), ("BN", "BCN+WS"))
        ],
        checks=[
            Check("points of error of GN - GN+WS", mean["GN"] - mean["GN+WS"], ">", 0.0),
            Check("points of error of BN - BCN+WS", mean["BN"] - mean["BCN+WS"], ">", 0.0),
        ],
        effect=(
            "points of test error, BN - BCN+WS; spread: range over seeds",
            mean["BN"] - mean["BCN+WS"],
            min(gains),
            max(gains),
        ),
        why=" ".join(failed),
        notes={
            "mean test error, %": {side: round(value, 3) for side, value in mean.items()},
            "validation error while tuning": {
                trial.arm: outcome["validation"] for trial, outcome in results.items() if ARMS[trial.arm]["tune"]
            },
        },
    )


def draw(figure: Figure, results: Results, judgement: Judgement) -> None:
    """Test error of the four sides, a dot a seed."""
    sides = [(side, [100 * outcome["test"] for outcome in _of(results, side)]) for side in SIDES]
    colours = [METHOD if "WS" in side else BASELINE for side, _ in sides]
    dots(
        figure.subplots(),
        [(side, values, colour) for (side, values), colour in zip(sides, colours, strict=True)],
        "test error, %",
    )


class _Network(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem = _convolution(1)
        self.norm = norm()
        self.blocks = nn.Sequential(*(_Block(norm) for _ in range(BLOCKS)))
        self.head = nn.Linear(CHANNELS, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.norm(self.stem(x)).relu()).mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.conv2 = _convolution(CHANNELS), _convolution(CHANNELS)
        self.norm1, self.norm2 = norm(), norm()
        nn.init.zeros_(self.norm2.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()


def _convolution(channels: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, CHANNELS, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


def _digits(seed: int) -> list[tuple[Tensor, Tensor]]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x = torch.from_numpy(pixels[order] / 8 - 1).float().view(-1, 1, 8, 8)
    y = torch.from_numpy(labels[order])
    return list(zip(x.split([1200, 297, 300]), y.split([1200, 297, 300]), strict=True))


@torch.no_grad()
def _error(network: nn.Module, x: Tensor, y: Tensor) -> float:
    return round((network(x).argmax(1) != y).float().mean().item(), 4)


def _best_rates(results: Results) -> dict[str, float]:
    best: dict[str, tuple[float, float]] = {}
    for trial, outcome in results.items():
        settings = ARMS[trial.arm]
        if settings["tune"]:
            found = (outcome["validation"], settings["rate"])
            best[settings["side"]] = min(best.get(settings["side"], found), found)
    return {side: rate for side, (_, rate) in best.items()}


def _of(results: Results, side: str) -> list[dict[str, Any]]:
    return [
        outcome for trial, outcome in results.items() if ARMS[trial.arm]["side"] == side and not ARMS[trial.arm]["tune"]
    ]


CLAIM = Claim(
    id="bcn-ws",
    statement=(
        "With batches of 2 images weight standardization lowers the error of group norm, and batch-channel norm by "
        "estimates on standardized weights has less error than batch norm."
    ),
    criterion=(
        "Test error, means over 5 seeds, at batch size 2: GN+WS below GN, and BCN by estimates + WS below BN. "
        "Measured so: 3 epochs of SGD with momentum 0.9, weight decay 1e-4 and a cosine schedule; each arm's learning "
        "rate is the one of 0.003, 0.01, 0.03 with the lowest validation error after 1 epoch on another seed, the "
        "lowest among equals; the last norm of each residual branch starts at weight 0 in every arm; estimates "
        "move at 0.01 times the learning rate over its first value."
    ),
    data=(
        "scikit-learn's digits (1797 images of 8x8 pixels, scaled to [-1, 1]): 1200 train, 297 validation, 300 test, "
        "split anew each seed"
    ),
    arms=ARMS,
    seeds={"small": (0,), "full": (0, 1, 2, 3, 4)},
    trial=trial,
    judge=judge,
    plan=plan,
    draw=draw,
)
