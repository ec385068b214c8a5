"""Fixup trains residual networks without normalization at the learning rates of batch normalization, at any depth.

Residual networks of 3, 9, 27 and 54 blocks of two convolutions on the 8x8 digits, trained by SGD: without normalization
and initialized after He et al., with batch normalization, and with Fixup; at the largest depth also Fixup without its
rescaling and without its scalars.

The shortcuts are the paper's, which take every second position where the resolution is halved. A first run had ones
that average squares of four, and there Fixup hardly learned in 150 steps at any depth: a network whose branches start
at 0 is at first what its shortcuts leave of the image.

Reference: H. Zhang, Y. N. Dauphin and T. Ma, "Fixup Initialization: Residual Learning Without Normalization", ICLR
2019, arXiv 1901.09321, section 4.1 (training at increasing depth) and 4.2.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from evenly.claims._harness import Check, Claim, Judgement, Metric, Results, Trial
from evenly.claims._picture import BASELINE, METHOD, tidy
from evenly.models import resnet
from evenly.nn import NoNorm
from evenly.weights import fixup_, fixup_param_groups

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CLAIM"]

DEPTHS = {"small": (1,), "full": (1, 3, 9, 18)}  # blocks of each of three stages
KINDS = ("he", "batch norm", "fixup")
ABLATIONS = ("fixup without rule 2", "fixup without scalars")
LEARNING_RATES = (0.01, 0.03, 0.1, 0.3)
JUDGED = 0.1  # the rate at which Fixup must not diverge
STEPS = {"small": 3, "full": 150}
TUNING_STEPS = {"small": 2, "full": 75}
TUNING_SEED = 1000
BATCH = 64
ARMS = {
    f"{kind} n={blocks} lr={lr:g}": {"kind": kind, "blocks": blocks, "lr": lr}
    for blocks in DEPTHS["full"]
    for kind in (*KINDS, *(ABLATIONS if blocks == DEPTHS["full"][-1] else ()))
    for lr in LEARNING_RATES
}


def trial(settings: Mapping[str, Any], seed: int, budget: str) -> dict[str, Any]:
    """Train one network; return its accuracy on the test set (tuning: on held-out images) and whether it diverged."""
    tuning = seed == TUNING_SEED
    train, validation, test = _digits(seed)
    network = _network(settings["kind"], settings["blocks"])
    optimizer = torch.optim.SGD(fixup_param_groups(network, settings["lr"]), momentum=0.9)
    order = torch.randperm(len(train[0]))
    used = 0
    diverged = False
    for _ in range(TUNING_STEPS[budget] if tuning else STEPS[budget]):
        if used + BATCH > len(order):
            order, used = torch.randperm(len(order)), 0
        rows = order[used : used + BATCH]
        used += BATCH
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(train[0][rows]), train[1][rows])
        # Ten times the loss of guessing: it will not come back within these steps.
        if not loss.item() < 10 * math.log(10):
            diverged = True
            break
        loss.backward()
        optimizer.step()
    network.eval()
    x, y = validation if tuning else test
    with torch.no_grad():
        logits = network(x)
    right = (logits.argmax(1) == y) & logits.isfinite().all(1)
    return {"accuracy": round(right.double().mean().item(), 4), "diverged": diverged}


def plan(budget: str, results: Results) -> Sequence[Trial]:
    """The search for each learning rate, then every seed at the best one, and Fixup's also at the judged one."""
    tuning = [Trial(arm, TUNING_SEED) for arm, settings in ARMS.items() if settings["blocks"] in DEPTHS[budget]]
    if any(one not in results for one in tuning):
        return tuning
    scored: dict[Trial, None] = {}
    for kind, blocks in _cells(results):
        rates = {_best(results, kind, blocks), *([JUDGED] if kind == "fixup" else [])}
        for lr in sorted(rates):
            for seed in CLAIM.seeds[budget]:
                scored[Trial(f"{kind} n={blocks} lr={lr:g}", seed)] = None
    return [*tuning, *scored]


def judge(results: Results) -> Judgement:
    """Apply the criterion: divergence at the judged rate, the gap to batch normalization, the gap to He."""
    cells = _cells(results)
    depths = sorted({blocks for _, blocks in cells})
    accuracy = {cell: [run["accuracy"] for run in _runs(results, *cell, _best(results, *cell))] for cell in cells}
    diverged = sum(run["diverged"] for blocks in depths for run in _runs(results, "fixup", blocks, JUDGED))
    gaps = {
        blocks: [100 * (b - a) for a, b in zip(accuracy["fixup", blocks], accuracy["batch norm", blocks], strict=True)]
        for blocks in depths
    }
    last = depths[-1]
    worst = max(statistics.mean(values) for values in gaps.values())
    deep = [blocks for blocks in depths if blocks >= 9] or depths
    behind = []  # points that He is behind Fixup; 100 where it diverged in every run
    for blocks in deep:
        runs = _runs(results, "he", blocks, _best(results, "he", blocks))
        lead = statistics.mean(accuracy["fixup", blocks]) - statistics.mean(accuracy["he", blocks])
        behind.append(100.0 if all(run["diverged"] for run in runs) else 100 * lead)
    he_rates = {
        f"n={blocks}": f"lr {_best(results, 'he', blocks):g}: {100 * statistics.mean(accuracy['he', blocks]):.1f} %"
        for blocks in depths
    }
    if diverged or worst > 3:
        at = max(depths, key=lambda blocks: statistics.mean(gaps[blocks]))
        values = ", ".join(f"{100 * value:.0f}" for value in accuracy["fixup", at])
        judged = statistics.mean(run["accuracy"] for run in _runs(results, "fixup", at, JUDGED))
        he = "He diverges" if behind[-1] == 100 else f"He is {behind[-1]:.0f} points behind Fixup"
        gap = statistics.mean(gaps[last])
        why = (
            f"The worst depth is n={at}, where the search of {TUNING_STEPS['full']} steps picked the rate "
            f"{_best(results, 'fixup', at):g} and the seeds end at {values} %; at {JUDGED:g} their mean is "
            f"{100 * judged:.0f} %. At n={last} Fixup is {abs(gap):.1f} points {'behind' if gap > 0 else 'ahead of'} "
            f"batch normalization, and {he}."
        )
    else:
        why = (
            "Fixup keeps up with batch normalization at every depth; the network initialized after He trains too, at "
            f"the learning rate that suits it ({', '.join(he_rates.values())})."
        )
    return Judgement(
        metrics=[
            Metric(
                f"test accuracy, n={blocks}",
                f"batch norm, lr {_best(results, 'batch norm', blocks):g}",
                accuracy["batch norm", blocks],
                f"Fixup, lr {_best(results, 'fixup', blocks):g}",
                accuracy["fixup", blocks],
            )
            for blocks in depths
        ],
        checks=[
            Check(f"runs of Fixup that diverge at learning rate {JUDGED:g}", diverged, "<=", 0),
            Check("points that Fixup is behind batch normalization at its worst depth (means)", worst, "<=", 3.0),
            Check("points that He is behind Fixup at n >= 9, least (100: it diverges)", min(behind), ">", 20.0),
        ],
        effect=(
            f"points that Fixup is behind batch normalization at n={last}; spread: range over seeds",
            statistics.mean(gaps[last]),
            min(gaps[last]),
            max(gaps[last]),
        ),
        why=why,
        notes={
            "mean test accuracy, %, at the best rate": {
                f"{kind} n={blocks} lr={_best(results, kind, blocks):g}": round(100 * statistics.mean(values), 2)
                for (kind, blocks), values in accuracy.items()
            },
            "Fixup at the judged rate, %": {
                f"n={blocks}": round(
                    100 * statistics.mean(run["accuracy"] for run in _runs(results, "fixup", blocks, JUDGED)), 2
                )
                for blocks in depths
            },
            "held-out accuracy in the search, %": {
                one.arm: "diverged" if run["diverged"] else round(100 * run["accuracy"], 1)
                for one, run in results.items()
                if one.seed == TUNING_SEED
            },
        },
    )


def draw(figure: Figure, results: Results, judgement: Judgement) -> None:
    """Left: accuracy over depth at the best rate. Right: the search at the largest depth."""
    left, right = figure.subplots(1, 2)
    colours = {"he": "#888888", "batch norm": BASELINE, "fixup": METHOD}
    cells = _cells(results)
    depths = sorted({blocks for _, blocks in cells})
    for kind, colour in colours.items():
        runs = np.array([[run["accuracy"] for run in _runs(results, kind, n, _best(results, kind, n))] for n in depths])
        left.plot([3 * n for n in depths], 100 * runs.mean(1), "o-", color=colour, label=kind, markersize=4)
        left.fill_between([3 * n for n in depths], 100 * runs.min(1), 100 * runs.max(1), color=colour, alpha=0.15, lw=0)
    styles = {**dict.fromkeys(KINDS, "o-"), ABLATIONS[0]: "s--", ABLATIONS[1]: "^:"}
    for kind in [kind for kind, blocks in cells if blocks == depths[-1]]:
        tuned = [results[Trial(f"{kind} n={depths[-1]} lr={lr:g}", TUNING_SEED)]["accuracy"] for lr in LEARNING_RATES]
        colour = colours.get(kind, METHOD)
        right.plot(LEARNING_RATES, [100 * a for a in tuned], styles[kind], color=colour, label=kind, markersize=4)
    left.set_xscale("log")
    left.set_xlabel("residual blocks")
    left.set_ylabel("test accuracy at the best rate, %")
    right.set_xscale("log")
    right.set_xlabel(f"learning rate, {3 * depths[-1]} blocks, {TUNING_STEPS['full']} steps")
    right.set_ylabel("held-out accuracy, %")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        tidy(axes)


def _network(kind: str, blocks: int) -> nn.Module:
    layer = "batch" if kind == "batch norm" else lambda channels: NoNorm()
    network = resnet(1, 10, norm=layer, widths=(8, 16, 32), blocks=blocks)
    for block in network.get_submodule("blocks").children():
        shortcut: Any = block.get_submodule("shortcut")
        block.add_module("shortcut", _Pick(shortcut.stride, shortcut.more))
    if kind.startswith("fixup"):
        fixup_(
            network,
            torch.zeros(2, 1, 8, 8),
            rescale=kind != ABLATIONS[0],
            scalars=kind != ABLATIONS[1],
        )
    return network


class _Pick(nn.Module):
    # The paper's shortcut: every second position, new channels 0.
    def __init__(self, stride: int, more: int) -> None:
        super().__init__()
        self.stride, self.more = stride, more

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))


def _digits(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    # 1200 images to train on, 297 to choose the learning rate by, 300 to measure with; another split each seed.
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x = torch.from_numpy(pixels[order] / 8 - 1).float().view(-1, 1, 8, 8)
    y = torch.from_numpy(labels[order])
    return list(zip(x.split([1200, 297, 300]), y.split([1200, 297, 300]), strict=True))


def _cells(results: Results) -> list[tuple[str, int]]:
    return list(dict.fromkeys((ARMS[one.arm]["kind"], ARMS[one.arm]["blocks"]) for one in results))


def _runs(results: Results, kind: str, blocks: int, lr: float) -> list[dict[str, Any]]:
    arm = f"{kind} n={blocks} lr={lr:g}"
    return [run for one, run in results.items() if one.arm == arm and one.seed != TUNING_SEED]


def _best(results: Results, kind: str, blocks: int) -> float:
    """The rate with the highest held-out accuracy in the search that did not diverge; the lowest among equals."""

    def merit(lr: float) -> tuple[bool, float, float]:
        run = results[Trial(f"{kind} n={blocks} lr={lr:g}", TUNING_SEED)]
        return (not run["diverged"], run["accuracy"], -lr)

    return max(LEARNING_RATES, key=merit)


CLAIM = Claim(
    id="fixup",
    statement=(
        "Fixup trains residual networks without normalization as stably as batch normalization does, at any depth."
    ),
    criterion=(
        "At n = 1, 3, 9 and 18 blocks a stage Fixup does not diverge at learning rate 0.1 and is within 3 points of "
        "batch normalization in test accuracy after 150 steps, and He initialization without normalization diverges or "
        "is more than 20 points behind Fixup at n >= 9 (means over seeds, each side at its best rate). Refuted if "
        "Fixup trails by more than 5 points and leaving out its rescaling changes nothing at n = 18. Measured so: "
        "three stages of width 8, 16, 32 on 8x8 images, batches of 64, SGD with momentum 0.9, scalars at a tenth of "
        "the rate; of 0.01, 0.03, 0.1, 0.3 the best is that with the highest held-out accuracy after 75 steps on "
        "another seed, the lowest among equals; a run diverges when its loss passes ten times that of guessing. Fixup "
        "without its rescaling and without its scalars is run at n = 18 and reported."
    ),
    data=(
        "scikit-learn's digits (1797 images of 8x8 pixels, scaled to [-1, 1]): 1200 train, 297 validation, 300 test, "
        "split anew each seed"
    ),
    arms=ARMS,
    seeds={"small": (0,), "full": (0, 1, 2)},
    trial=trial,
    judge=judge,
    plan=plan,
    draw=draw,
)
