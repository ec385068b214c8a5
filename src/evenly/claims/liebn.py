"""Lie group batch normalization helps an SPDNet on covariance matrices whose sessions are each shifted.

Synthetic classification of 8 x 8 covariance matrices: four classes, six sessions, each session seen through a random
linear map of its own; two sessions are held out. An SPDNet 8-6-4 without normalization, with Euclidean batch
normalization of the features after the matrix logarithm, and with LieBN under three metrics. A batch holds matrices
of one session. In the test, every normalizing network uses the statistics of the held-out session's unlabelled
matrices, as in the paper's experiments on EEG; accuracy with running statistics is reported and not judged.

Reference: Z. Chen, Y. Song, Y. Liu and N. Sebe, "A Lie Group Approach to Riemannian Batch Normalization", ICLR 2024,
arXiv 2403.11261, proposition 4.2 (control of mean and variance) and section 6 (accuracy).
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import evenly.nn
from evenly.claims._harness import Check, Claim, Judgement, Metric, Results, Trial
from evenly.claims._picture import BASELINE, METHOD, tidy
from evenly.manifolds import BiMap, LieBNSPD, LogEig, ReEig
from evenly.manifolds.geometry import Center

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CLAIM"]

SIZE, CLASSES, SESSIONS, HELD_OUT = 8, 4, 6, 2
PER_CLASS = 32  # matrices of a class in a session
DEGREES = 24  # of freedom of a matrix
SPREAD = 0.15  # of the classes' log-means
SHIFT = 0.6  # of the sessions' linear maps from the identity
BATCH = 32
EPOCHS = {"small": 2, "full": 30}
RATES = (0.005, 0.02, 0.08)
NORMS = ("none", "euclidean", "LEM", "AIM", "LCM")
LIE = NORMS[2:]
ARMS = {f"{norm} lr={rate:g}": {"norm": norm, "lr": rate} for norm in NORMS for rate in RATES}
TUNING = (100, 101, 102)


def trial(settings: Mapping[str, Any], seed: int, budget: str) -> dict[str, Any]:
    """Train one network; return accuracy on held-out sessions, the loss of each epoch, and how well control held."""
    import geoopt

    sessions = _sessions(seed)
    network = _network(settings["norm"])
    layers = [module for module in network.modules() if isinstance(module, LieBNSPD)]
    control = {"mean": 0.0, "variance": 0.0}
    for layer in layers:
        kept = _keep_mean(layer)
        layer.register_forward_hook(lambda layer, args, y, kept=kept: _watch(layer, args[0], y, kept, control))
    optimizer = geoopt.optim.RiemannianAdam(network.parameters(), lr=settings["lr"], amsgrad=True)
    losses = []
    for _ in range(EPOCHS[budget]):
        total = 0.0
        batches = [(x[rows], y[rows]) for x, y in sessions[HELD_OUT:] for rows in torch.randperm(len(x)).split(BATCH)]
        for at in torch.randperm(len(batches)).tolist():
            x, y = batches[at]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(round(total / len(batches), 5))
    with torch.no_grad():
        running = copy.deepcopy(network).eval()
        accuracy = [_accuracy(network(x), y) for x, y in sessions[:HELD_OUT]]  # still in training mode
        by_running = [_accuracy(running(x), y) for x, y in sessions[:HELD_OUT]]
    return {
        "accuracy": statistics.fmean(accuracy),
        "accuracy by running statistics": statistics.fmean(by_running),
        "losses": losses,
        "control": control,
    }


def plan(budget: str, results: Results) -> list[Trial]:
    """Tune the learning rate of each network on problems of their own, then run it on the seeds."""
    if budget == "small":
        return [Trial(f"{norm} lr={RATES[1]:g}", seed) for norm in NORMS for seed in CLAIM.seeds[budget]]
    tuning = [Trial(arm, seed) for arm in ARMS for seed in TUNING]
    if any(one not in results for one in tuning):
        return tuning
    return tuning + [Trial(_chosen(results, norm), seed) for norm in NORMS for seed in CLAIM.seeds[budget]]


def judge(results: Results) -> Judgement:
    """Apply the criterion to the means over seeds, at each network's own learning rate."""
    runs = {norm: _of(results, norm) for norm in NORMS}
    accuracy = {norm: [100 * run["accuracy"] for run in runs[norm]] for norm in NORMS}
    mean = {norm: statistics.fmean(values) for norm, values in accuracy.items()}
    best = max(LIE, key=lambda norm: mean[norm])
    # Epochs until the loss is down to where training without normalization ends.
    goals = [run["losses"][-1] for run in runs["none"]]
    epochs = {
        norm: [_reached(run["losses"], goal) for run, goal in zip(runs[norm], goals, strict=True)] for norm in NORMS
    }
    length = len(runs["none"][0]["losses"])
    fraction = statistics.fmean(epochs[best]) / length
    gains = [a - b for a, b in zip(accuracy[best], accuracy["none"], strict=True)]
    over_euclidean = mean[best] - mean["euclidean"]
    faster = statistics.fmean(epochs["euclidean"]) - statistics.fmean(epochs[best])
    control = {
        part: max(_number(run["control"][part]) for norm in LIE for run in runs[norm]) for part in ("mean", "variance")
    }
    return Judgement(
        metrics=[
            Metric("accuracy on held-out sessions, %", "no normalization", accuracy["none"], best, accuracy[best]),
            Metric("accuracy on held-out sessions, %", "Euclidean", accuracy["euclidean"], best, accuracy[best]),
            Metric(
                "epochs to the final loss without normalization", "Euclidean", epochs["euclidean"], best, epochs[best]
            ),
        ],
        checks=[
            Check("points gained over no normalization (mean)", mean[best] - mean["none"], ">=", 3.0),
            Check("share of the epochs to reach its final training loss (mean)", fraction, "<=", 0.7),
            Check("largest distance of an output's mean from B, all batches", control["mean"], "<=", 1e-4),
            Check("largest relative error of an output's variance, all batches", control["variance"], "<=", 1e-4),
            Check(
                "ahead of Euclidean batch normalization by over 0.5 points, or faster (1: yes)",
                float(over_euclidean > 0.5 or faster > 0),
                ">=",
                1.0,
            ),
        ],
        effect=(
            f"points gained by {best} over no normalization; spread: range over seeds",
            mean[best] - mean["none"],
            min(gains),
            max(gains),
        ),
        why=(
            f"{best} is the best of the three metrics; Euclidean batch normalization after the logarithm is "
            f"{abs(over_euclidean):.1f} points {'behind' if over_euclidean > 0 else 'ahead'} of it."
        ),
        notes={
            "mean accuracy, %": {norm: round(value, 2) for norm, value in mean.items()},
            "mean accuracy by running statistics, %": {
                norm: round(100 * statistics.fmean(run["accuracy by running statistics"] for run in runs[norm]), 2)
                for norm in NORMS
            },
            "mean epochs to the final loss without normalization": {
                norm: round(statistics.fmean(values), 1) for norm, values in epochs.items()
            },
            "learning rates": {norm: ARMS[_chosen(results, norm)]["lr"] for norm in NORMS},
        },
    )


def draw(figure: Figure, results: Results, judgement: Judgement) -> None:
    """Left: accuracy of every network, a dot a seed. Right: the training loss."""
    left, right = figure.subplots(1, 2)
    for place, norm in enumerate(NORMS):
        runs = _of(results, norm)
        colour = METHOD if norm in LIE else BASELINE
        values = [100 * run["accuracy"] for run in runs]
        left.plot([place] * len(values), values, "o", color=colour, markersize=4, alpha=0.7)
        left.plot([place - 0.25, place + 0.25], [statistics.fmean(values)] * 2, color=colour, linewidth=1.6)
        curve = torch.tensor([run["losses"] for run in runs]).mean(0)
        style = {"none": "-", "euclidean": ":", "LEM": "-", "AIM": "--", "LCM": ":"}[norm]
        right.plot(range(1, len(curve) + 1), curve, style, color=colour, label=norm, linewidth=1.4)
    left.set_xticks(range(len(NORMS)), NORMS)
    left.set_ylabel("accuracy on held-out sessions, %")
    right.set_xlabel("epoch")
    right.set_ylabel("training loss")
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        tidy(axis)


def _sessions(seed: int) -> list[tuple[Tensor, Tensor]]:
    """The matrices and labels of every session."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    roots = []
    for _ in range(CLASSES):
        a = normal(SIZE, SIZE)
        roots.append(torch.linalg.matrix_exp(0.5 * SPREAD * (a + a.mT) / math.sqrt(2)))
    sessions = []
    for _ in range(SESSIONS):
        through = torch.linalg.matrix_exp(SHIFT * normal(SIZE, SIZE) / math.sqrt(SIZE))
        parts = []
        for root in roots:
            a = through @ root @ normal(PER_CLASS, SIZE, DEGREES)
            parts.append(a @ a.mT / DEGREES)
        sessions.append((torch.cat(parts), torch.arange(CLASSES).repeat_interleave(PER_CLASS)))
    return sessions


def _network(norm: str) -> nn.Module:
    def spd(n: int) -> list[nn.Module]:
        return [LieBNSPD(n, metric=norm, dtype=torch.float64)] if norm in LIE else []

    features = 4 * (4 + 1) // 2
    euclidean = [evenly.nn.BatchNorm(features, dtype=torch.float64)] if norm == "euclidean" else []
    return nn.Sequential(
        BiMap(SIZE, 6, dtype=torch.float64),
        *spd(6),
        ReEig(),
        BiMap(6, 4, dtype=torch.float64),
        *spd(4),
        LogEig(flatten=True),
        *euclidean,
        nn.Linear(features, CLASSES, dtype=torch.float64),
    )


def _keep_mean(layer: LieBNSPD) -> dict[str, Center]:
    """Where the mean of the layer's last batch is found, so that to watch it does not take a second Karcher flow."""
    kept: dict[str, Center] = {}
    mean = layer.geometry.mean

    def keeping(*args: Any, **options: Any) -> Center:
        kept["mean"] = mean(*args, **options)
        return kept["mean"]

    layer.geometry.mean = keeping  # type: ignore[method-assign]
    return kept


@torch.no_grad()
def _watch(layer: LieBNSPD, x: Tensor, y: Tensor, kept: dict[str, Center], worst: dict[str, float]) -> None:
    """How far mean and variance of the output are from what the theory says they are."""
    if not y.requires_grad:  # training only
        return
    geometry, bias = layer.geometry, layer.bias_point()
    assert bias is not None
    tangent = geometry.log(geometry.deform(y), Center(geometry.deform(bias).unsqueeze(0))).value
    variance = geometry.square_norm(geometry.log(geometry.deform(x), kept["mean"]).value).mean()
    wanted = layer.weight.square() * variance / (variance + layer.eps)
    found = geometry.square_norm(tangent).mean()
    worst["mean"] = max(worst["mean"], geometry.square_norm(tangent.mean(0)).sqrt().item())
    worst["variance"] = max(worst["variance"], ((found - wanted).abs() / wanted).item())


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return (scores.argmax(1) == labels).double().mean().item()


def _chosen(results: Results, norm: str) -> str:
    """The learning rate with the best mean accuracy on the tuning problems; without them, the one that ran."""
    arms = [arm for arm in ARMS if ARMS[arm]["norm"] == norm and any(one.arm == arm for one in results)]

    def tuned(arm: str) -> float:
        found = [outcome["accuracy"] for one, outcome in results.items() if one.arm == arm and one.seed in TUNING]
        return statistics.fmean(found) if found else 0.0

    return max(arms, key=tuned)


def _of(results: Results, norm: str) -> list[dict[str, Any]]:
    arm = _chosen(results, norm)
    return [outcome for one, outcome in results.items() if one.arm == arm and one.seed not in TUNING]


def _reached(losses: list[float], goal: float) -> float:
    """The first epoch with a loss of at most ``goal``; one past the end where there is none."""
    return float(next((epoch for epoch, loss in enumerate(losses, 1) if loss <= goal), len(losses) + 1))


def _number(value: float | None) -> float:
    return math.inf if value is None else value


CLAIM = Claim(
    id="liebn",
    statement=(
        "Batch normalization on the Lie group of covariance matrices controls the mean and the variance of every "
        "batch, and an SPDNet with it is more accurate and trains faster."
    ),
    criterion=(
        "Best of LieBN under LEM, AIM and LCM (by mean accuracy) against the same SPDNet without normalization: at "
        "least 3 points more accurate on held-out sessions (mean over seeds), and down to that network's final "
        "training loss in at most 0.7 of the epochs; in every training batch the output's mean is within 1e-4 of B and "
        "its variance within 1e-4 (relative) of s² v² / (v² + eps). Refuted also if Euclidean batch normalization "
        "after the matrix logarithm comes within 0.5 points and is as fast. SPDNet 8-6-4, 30 epochs, batches of 32 "
        "from one session, geoopt's AMSGrad; the learning rate of each network is the best of 0.005, 0.02 and 0.08 on "
        "3 tuning problems. Normalizing networks use the statistics of the held-out session in the test."
    ),
    data=(
        "synthetic: 8 x 8 Wishart matrices of 24 degrees of freedom, 4 classes, 6 sessions of 128 matrices under a "
        "random linear map each, 2 sessions held out"
    ),
    arms=ARMS,
    seeds={"small": (0,), "full": (0, 1, 2, 3, 4)},
    trial=trial,
    judge=judge,
    plan=plan,
    draw=draw,
)
