"""Standardized by PHI-S, a teacher of small variance is learnt as well as one of large variance.

Two synthetic teachers look at the 8x8 digits: fixed random networks of two layers, whose outputs are given a spectrum:
64 dimensions of mean variance 1e-3 with eigenvalues in 1/i, and 48 of mean variance 10 in 1/i². A student (64-128, two
linear heads) is trained on both by mean squared error in the space of each normalizer in turn, and judged after the
inverse, in the teachers' own spaces. All normalizers try the same learning rates with the same steps and seeds.

PHI-S and global standardization differ by a rotation alone, and a squared error does not see rotations: what
differs between them comes from the optimizer and from how errors spread over channels.

Reference: M. Ranzinger et al., "PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation", ICLR 2025,
arXiv 2410.01680, section 4 (average ranks of the normalizers).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from evenly.claims._harness import Check, Claim, Judgement, Metric, Results
from evenly.claims._picture import BASELINE, METHOD, tidy
from evenly.stats import MultiTeacherLoss, PHIStandardizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CLAIM"]

METHODS = ("none", "global", "standard", "pca", "zca", "hadamard", "phi-s")
WHITENING = ("pca", "zca", "hadamard")
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
TEACHERS = {"small": (64, 1e-3, 1.0), "large": (48, 10.0, 2.0)}  # width, mean variance, power of 1/i
EPOCHS = {"small": 1, "full": 40}
BATCH = 60
ARMS = {f"{method} lr={lr:g}": {"method": method, "lr": lr} for method in METHODS for lr in LEARNING_RATES}


def trial(settings: Mapping[str, Any], seed: int, budget: str) -> dict[str, Any]:
    """Train one student; return each teacher's relative error, the probe's accuracy, and how even the errors are."""
    (train, labels), (validation, _), (test, truth) = _digits(seed)
    teachers = {name: _teacher(train, *spec, seed=place) for place, (name, spec) in enumerate(TEACHERS.items())}
    wanted = {name: {"train": f(train), "validation": f(validation), "test": f(test)} for name, f in teachers.items()}
    fitted = {name: PHIStandardizer(settings["method"]).fit(z["train"]) for name, z in wanted.items()}
    loss = MultiTeacherLoss(fitted)
    trunk = nn.Sequential(nn.Linear(64, 128), nn.ReLU())
    heads = nn.ModuleDict({name: nn.Linear(128, width) for name, (width, _, _) in TEACHERS.items()})
    steps = EPOCHS[budget] * (len(train) // BATCH)
    optimizer = torch.optim.Adam([*trunk.parameters(), *heads.parameters()], lr=settings["lr"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS[budget]):
        for rows in torch.randperm(len(train)).split(BATCH):
            optimizer.zero_grad()
            hidden = trunk(train[rows])
            outputs = {name: head(hidden) for name, head in heads.items()}
            loss(outputs, {name: z["train"][rows] for name, z in wanted.items()}).backward()
            optimizer.step()
            schedule.step()
    result: dict[str, Any] = {}
    with torch.no_grad():
        for name, standardizer in fitted.items():
            for part, images in (("validation", validation), ("test", test)):
                y = heads[name](trunk(images)).double()
                error = standardizer.inverse_transform(y) - wanted[name][part]
                total = float(standardizer.var_.sum())
                result[f"{part} {name}"] = round(error.square().sum(1).mean().item() / total, 6)
            each = (y - standardizer.transform(wanted[name]["test"])).square().mean(0)
            result[f"unevenness {name}"] = round((each.std() / each.mean()).item(), 4)
        result["probe"] = round(_probe(trunk(train), labels, trunk(test), truth), 5)
    return result


def judge(results: Results) -> Judgement:
    """Apply the criterion: the worst teacher's error, the small one's without normalization, the mean ranks."""
    best = {method: _best_lr(results, method) for method in METHODS}
    runs = {method: _runs(results, method, best[method]) for method in METHODS}
    worst = {method: statistics.mean(_worst(run, "test") for run in runs[method]) for method in METHODS}
    small = {method: [run["test small"] for run in runs[method]] for method in METHODS}
    ranks = _mean_ranks(runs)
    lowest = min(worst, key=lambda method: worst[method])
    whitener = min(WHITENING, key=lambda method: ranks[method])
    ratios = [a / b for a, b in zip(small["none"], small["phi-s"], strict=True)]
    sides = (f"none, lr {best['none']:g}", f"PHI-S, lr {best['phi-s']:g}")

    def metric(name: str, key: str) -> Metric:
        values = [[run[key] for run in runs[method]] for method in ("none", "phi-s")]
        return Metric(name, sides[0], values[0], sides[1], values[1])

    ratio = statistics.mean(small["none"]) / statistics.mean(small["phi-s"])
    checks = [
        Check("PHI-S's worst-teacher relative error / the lowest of all", worst["phi-s"] / worst[lowest], "<=", 1.02),
        Check("error on the small teacher, none's / PHI-S's (means)", ratio, ">", 2.0),
        Check("PHI-S's mean rank - the best whitening's", ranks["phi-s"] - ranks[whitener], "<", 1.0),
    ]
    return Judgement(
        metrics=[
            metric("relative error on the teacher of small variance", "test small"),
            metric("relative error on the teacher of large variance", "test large"),
            metric("accuracy of a ridge probe on the trunk", "probe"),
        ],
        checks=checks,
        effect=("error on the small teacher, none's / PHI-S's; spread: range over seeds", ratio, *_range(ratios)),
        why=_why(checks, worst, lowest, ratio),
        notes={
            "worst-teacher relative error (mean)": {method: round(value, 4) for method, value in worst.items()},
            "relative error, small and large teacher (mean)": {
                method: [round(statistics.mean(run[f"test {name}"] for run in runs[method]), 4) for name in TEACHERS]
                for method in METHODS
            },
            "probe accuracy, % (mean)": {
                method: round(100 * statistics.mean(run["probe"] for run in runs[method]), 2) for method in METHODS
            },
            "mean rank over both errors and the probe": {method: round(value, 2) for method, value in ranks.items()},
            "best learning rate": best,
            "coefficient of variation of the errors over dimensions, small and large teacher (mean)": {
                method: [
                    round(statistics.mean(run[f"unevenness {name}"] for run in runs[method]), 3) for name in TEACHERS
                ]
                for method in METHODS
            },
        },
    )


def draw(figure: Figure, results: Results, judgement: Judgement) -> None:
    """Left: each teacher's relative error by normalizer, a dot a seed. Right: the mean ranks."""
    left, right = figure.subplots(1, 2, width_ratios=[1.7, 1])
    runs = {method: _runs(results, method, _best_lr(results, method)) for method in METHODS}
    for place, method in enumerate(METHODS):
        for name, shift, colour in (("small", -0.15, METHOD), ("large", 0.15, BASELINE)):
            values = [run[f"test {name}"] for run in runs[method]]
            label = f"teacher of {name} variance" if place == 0 else None
            left.plot([place + shift] * len(values), values, "o", color=colour, markersize=4, alpha=0.7, label=label)
            left.plot([place + shift - 0.1, place + shift + 0.1], [statistics.mean(values)] * 2, color=colour)
    left.set_yscale("log")
    left.set_xticks(range(len(METHODS)), METHODS)
    left.set_ylabel("squared error / total variance, test")
    left.legend(frameon=False, fontsize=8)
    tidy(left)
    ranks = _mean_ranks(runs)
    order = sorted(METHODS, key=lambda method: -ranks[method])
    colours = [METHOD if method == "phi-s" else BASELINE for method in order]
    right.barh(order, [ranks[method] for method in order], color=colours, height=0.6)
    right.set_xlabel("mean rank (1 is best)")
    tidy(right)


def _why(checks: list[Check], worst: Mapping[str, float], lowest: str, ratio: float) -> str:
    first, second, third = (check.passed for check in checks)
    if first and second and third:
        return "The normalizers order as the paper says."
    parts = []
    if not first:
        parts.append(
            f"{lowest} has the lowest worst-teacher error ({worst[lowest]:.4f}; PHI-S {worst['phi-s']:.4f}, global "
            f"standardization, its equal but for a rotation, {worst['global']:.4f})"
        )
    if not second:
        parts.append(
            f"without normalization the small teacher's error is {ratio:.2f} times PHI-S's, since Adam's steps do not "
            f"depend on the size of a head's gradient"
        )
    if not third:
        parts.append("a whitening method ranks better by more than one place")
    return "; ".join(parts).capitalize() + "."


def _range(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


def _worst(run: Mapping[str, float], part: str) -> float:
    return max(run[f"{part} {name}"] for name in TEACHERS)


def _best_lr(results: Results, method: str) -> float:
    def validation(lr: float) -> float:
        return statistics.mean(_worst(run, "validation") for run in _runs(results, method, lr))

    return min(LEARNING_RATES, key=validation)


def _runs(results: Results, method: str, lr: float) -> list[dict[str, Any]]:
    return [outcome for trial, outcome in results.items() if ARMS[trial.arm] == {"method": method, "lr": lr}]


def _mean_ranks(runs: Mapping[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Over seeds and the three numbers, the mean place among the methods; equals share a place."""
    from scipy.stats import rankdata

    places = []
    for seed in range(len(runs["phi-s"])):
        for key, sign in (("test small", 1), ("test large", 1), ("probe", -1)):
            places.append(rankdata([sign * runs[method][seed][key] for method in METHODS]))
    return dict(zip(METHODS, np.mean(places, axis=0).tolist(), strict=True))


def _teacher(images: Tensor, width: int, variance: float, power: float, seed: int) -> Any:
    """A random network whose outputs on ``images`` have the wanted spectrum, in a random basis, and a mean."""
    rng = np.random.default_rng(1000 + seed)
    first, second = rng.normal(size=(64, 256)) / 4, rng.normal(size=(256, width)) / 16

    def raw(x: Tensor) -> np.ndarray:
        return np.tanh(x.double().numpy() @ first) @ second

    out = raw(images)
    mean, (values, axes) = out.mean(0), np.linalg.eigh(np.cov(out.T))
    spectrum = np.arange(1, width + 1.0) ** -power
    spectrum *= variance * width / spectrum.sum()
    basis, _ = np.linalg.qr(rng.normal(size=(width, width)))
    mix = (axes[:, ::-1] * np.sqrt(spectrum / values[::-1])) @ basis
    offset = np.sqrt(variance) * rng.normal(size=width)
    return lambda x: torch.from_numpy((raw(x) - mean) @ mix + offset)


def _probe(x: Tensor, labels: np.ndarray, held: Tensor, truth: np.ndarray) -> float:
    from sklearn.linear_model import RidgeClassifier

    return float(RidgeClassifier().fit(x.numpy(), labels).score(held.numpy(), truth))


def _digits(seed: int) -> list[tuple[Tensor, np.ndarray]]:
    # 1200 images to train on, 297 to choose the learning rate by, 300 to measure with; another split each seed.
    pixels, labels = _images()
    order = np.random.default_rng(seed).permutation(len(labels))
    x = torch.from_numpy(pixels[order] / 16).float()
    ends = [1200, 1497]
    return list(zip(x.split([1200, 297, 300]), np.split(labels[order], ends), strict=True))


@cache
def _images() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)


CLAIM = Claim(
    id="phi-s",
    statement=(
        "A student of a teacher of small and one of large variance learns both about as well as with any other "
        "normalizer when their features are standardized by PHI-S, and neglects the small one without normalization."
    ),
    criterion=(
        "PHI-S's worst-teacher relative error is lowest or within 2 % of the lowest, and 'none' fails on the "
        "small-variance teacher (relative error > 2x PHI-S's). Refuted if a whitening method beats PHI-S in mean rank "
        "by >= 1. Measured so: relative error is the mean of |error|² over the test images after the inverse, divided "
        "by the total variance of the teacher on the training images; worst-teacher error is the larger of a run's "
        "two, its mean over seeds is compared; ranks are among the seven normalizers by the two errors and by the "
        "accuracy of a ridge probe on the trunk, averaged over the three and the seeds; each normalizer takes, of the "
        "learning rates 0.001, 0.003, 0.01 and 0.03, the one with the lowest mean worst-teacher error on the "
        "validation images. Adam, cosine schedule, 40 epochs of batches of 60."
    ),
    data=(
        "scikit-learn's digits (1797 images of 8x8 pixels, divided by 16): 1200 train, 297 validation, 300 test, split "
        "anew each seed; targets from two fixed random networks (64 dimensions, mean variance 1e-3, spectrum 1/i; 48 "
        "dimensions, mean variance 10, spectrum 1/i²)"
    ),
    arms=ARMS,
    seeds={"small": (0,), "full": (0, 1, 2, 3, 4)},
    trial=trial,
    judge=judge,
    draw=draw,
)
