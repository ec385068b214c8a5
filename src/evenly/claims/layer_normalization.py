"""Layer normalization does not care about the batch size, and an LSTM with it trains faster.

Two experiments. First, the paper's permutation-invariant MNIST in small: an MLP on the 8x8 digits with no
normalization, batch normalization or layer normalization, at batch 128 and at batch 4, the same number of samples
each. Second, a character LSTM on the standard library's source text, with and without layer normalization.

Reference: J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer Normalization", 2016, arXiv 1607.06450, section 6.6 (the
MLP at two batch sizes) and sections 6.2 to 6.5 (recurrent networks).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

import evenly.nn
from evenly.claims._harness import Check, Claim, Judgement, Metric, Results, Trial
from evenly.claims._picture import BASELINE, METHOD, dots
from evenly.data import load_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CLAIM"]

EPOCHS = {"small": 1, "full": 8}
IMAGES = {"small": 256, "full": 1408}  # 1408 = 11 x 128 = 352 x 4: both batch sizes see every image
STEPS = {"small": 2, "full": 400}
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
TUNING_SEED = 1000  # chooses the recurrent learning rates; its runs are not counted
LSTM_SEEDS = 5

ARMS: dict[str, dict[str, Any]] = {
    **{
        f"mlp {norm} batch={batch}": {"norm": norm, "batch": batch}
        for norm in ("none", "BN", "LN")
        for batch in (128, 4)
    },
    **{f"{cell} lr={lr:g}": {"cell": cell, "lr": lr} for cell in ("LSTM", "LN-LSTM") for lr in LEARNING_RATES},
}


def trial(settings: Mapping[str, Any], seed: int, budget: str) -> dict[str, Any]:
    """Train one MLP or one LSTM."""
    if "norm" in settings:
        return _mlp(settings["norm"], settings["batch"], seed, budget)
    return _lstm(settings["cell"], settings["lr"], STEPS[budget])


def plan(budget: str, results: Results) -> list[Trial]:
    """Name the trials: every MLP; each LSTM learning rate once to tune; then the chosen ones with each seed."""
    seeds = CLAIM.seeds[budget]
    trials = [Trial(arm, seed) for seed in seeds for arm in ARMS if arm.startswith("mlp")]
    tuning = [Trial(arm, TUNING_SEED) for arm in ARMS if not arm.startswith("mlp")]
    trials += tuning
    if all(one in results for one in tuning):
        trials += [Trial(_tuned(results, cell), seed) for seed in seeds[:LSTM_SEEDS] for cell in ("LSTM", "LN-LSTM")]
    return trials


def judge(results: Results) -> Judgement:
    """Apply the criterion: BN and LN at batch 4, LN at both batch sizes, LN-LSTM and LSTM."""
    nll = {arm: _values(results, arm, "nll") for arm in ARMS if arm.startswith("mlp")}
    error = {arm: _values(results, arm, "error") for arm in nll}
    arms = {cell: _tuned(results, cell) for cell in ("LSTM", "LN-LSTM")}
    loss = {cell: _values(results, arm, "loss", counted=True) for cell, arm in arms.items()}
    pace = {cell: _values(results, arm, "step_ms", counted=True) for cell, arm in arms.items()}
    change = abs(float(np.mean(error["mlp LN batch=128"])) - float(np.mean(error["mlp LN batch=4"])))
    wins = _share(nll["mlp LN batch=4"], nll["mlp BN batch=4"])
    recurrent = _share(loss["LN-LSTM"], loss["LSTM"])
    ratios = [bn / ln for bn, ln in zip(nll["mlp BN batch=4"], nll["mlp LN batch=4"], strict=True)]
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    reasons = []
    if wins < 0.8:
        reasons.append("batch norm at batch 4 fits the training digits as well as layer norm")
    if change >= 0.5:
        shifts = ", ".join(
            f"{norm} {np.mean(error[f'mlp {norm} batch=128']):.2f} to {np.mean(error[f'mlp {norm} batch=4']):.2f}"
            for norm in ("LN", "BN", "none")
        )
        large, small = nll["mlp LN batch=128"], nll["mlp LN batch=4"]
        reasons.append(
            f"from batch 128 to 4 the mean test errors go from {shifts} %; LN's training NLL lies between "
            f"{min(small):.3f} and {max(small):.3f} over the seeds at batch 4 and between {min(large):.3f} and "
            f"{max(large):.3f} at batch 128"
        )
        if max(small) - min(small) > 2 * (max(large) - min(large)):
            reasons.append(
                "this points to the constant learning rate, the same at both batch sizes, which leaves some networks "
                "unsettled at batch 4; no other rate was tried"
            )
    if recurrent < 0.8:
        reasons.append("at its own best learning rate the plain LSTM is as good after as many steps")
    why = "; ".join(reasons)
    return Judgement(
        metrics=[
            Metric("training NLL, batch 4", "BN", nll["mlp BN batch=4"], "LN", nll["mlp LN batch=4"]),
            Metric("training NLL, batch 128", "BN", nll["mlp BN batch=128"], "LN", nll["mlp LN batch=128"]),
            Metric("test error %, batch 4", "BN", error["mlp BN batch=4"], "LN", error["mlp LN batch=4"]),
            Metric("test error %, batch 128", "BN", error["mlp BN batch=128"], "LN", error["mlp LN batch=128"]),
            Metric(
                "LSTM training loss at the last step",
                arms["LSTM"],
                loss["LSTM"],
                arms["LN-LSTM"],
                loss["LN-LSTM"],
            ),
        ],
        checks=[
            Check("share of seeds where LN's NLL < BN's at batch 4", wins, ">=", 0.8),
            Check("change of LN's mean test error, batch 128 to 4, in points", change, "<", 0.5),
            Check("share of seeds where LN-LSTM's loss < LSTM's", recurrent, ">=", 0.8),
        ],
        effect=(
            "training NLL at batch 4, BN / LN, median over seeds; spread: quartiles",
            float(middle),
            float(low),
            float(high),
        ),
        why=why[:1].upper() + why[1:] + "." if why else "",
        notes={
            "mean test error %": {arm: round(float(np.mean(values)), 3) for arm, values in error.items()},
            "mean training NLL": {arm: round(float(np.mean(values)), 5) for arm, values in nll.items()},
            "tuning loss": {arm: _values(results, arm, "loss")[0] for arm in ARMS if not arm.startswith("mlp")},
            "median time a step, ms": {cell: float(np.median(values)) for cell, values in pace.items()},
        },
    )


def draw(figure: Figure, results: Results, judgement: Judgement) -> None:
    """Training NLL of the MLPs by batch size, and the LSTMs' losses; a dot a seed."""
    left, right = figure.subplots(1, 2, width_ratios=[1.6, 1])
    colours = {"none": "#999999", "BN": BASELINE, "LN": METHOD}
    groups = [
        (f"{norm}\n{batch}", _values(results, f"mlp {norm} batch={batch}", "nll"), colours[norm])
        for batch in (128, 4)
        for norm in ("none", "BN", "LN")
    ]
    dots(left, groups, "training NLL after the same samples")
    left.set_yscale("log")
    left.set_xlabel("normalization and batch size")
    metric = judgement.metrics[-1]
    sides = [
        (metric.baseline, metric.baseline_values, BASELINE),
        (metric.method, metric.method_values, METHOD),
    ]
    dots(
        right,
        [(name, [v for v in values if v is not None], colour) for name, values, colour in sides],
        metric.name,
    )


def _mlp(norm: str, batch: int, seed: int, budget: str) -> dict[str, Any]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x, x_test = torch.from_numpy(pixels[order] / 16).float().split([1408, 389])
    y, y_test = torch.from_numpy(labels[order]).split([1408, 389])
    x, y = x[: IMAGES[budget]], y[: IMAGES[budget]]
    layer: dict[str, Callable[[int], nn.Module]] = {"BN": evenly.nn.BatchNorm, "LN": evenly.nn.LayerNorm}
    layers: list[nn.Module] = []
    for inputs in (64, 256):
        layers.append(nn.Linear(inputs, 256, bias=norm == "none"))
        if norm in layer:
            layers.append(layer[norm](256))
        layers.append(nn.ReLU())
    network = nn.Sequential(*layers, nn.Linear(256, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(EPOCHS[budget]):
        for rows in torch.randperm(len(x)).split(batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
    network.eval()
    with torch.no_grad():
        nll = nn.functional.cross_entropy(network(x), y).item()
        error = 100 * (network(x_test).argmax(1) != y_test).float().mean().item()
    return {"nll": round(nll, 6), "error": round(error, 3)}


class _Characters(nn.Module):
    def __init__(self, cell: str, vocabulary: int) -> None:
        super().__init__()
        kind = {"LSTM": nn.LSTM, "LN-LSTM": evenly.nn.LayerNormLSTM}[cell]
        self.embed = nn.Embedding(vocabulary, 64)
        self.recurrent = kind(64, 128)
        self.out = nn.Linear(128, vocabulary)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        # text: (T + 1, N) character codes; the loss predicts each character from those before it.
        hidden, _ = self.recurrent(self.embed(text[:-1]))
        return nn.functional.cross_entropy(self.out(hidden).flatten(0, 1), text[1:].flatten())


def _lstm(cell: str, lr: float, steps: int) -> dict[str, Any]:
    text = load_text("stdlib")
    windows = text.train.long().unfold(0, 65, 1)  # every run of 64 characters and the one after each
    held = windows[torch.randint(len(windows), (256,))].T
    network = _Characters(cell, text.vocabulary)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    # The windows come from a generator of their own, so that both sides see the same ones with the same seed.
    generator = torch.Generator().manual_seed(torch.initial_seed())
    times = []
    for _ in range(steps):
        batch = windows[torch.randint(len(windows), (32,), generator=generator)].T
        started = time.perf_counter()
        optimizer.zero_grad()
        network(batch).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        times.append(time.perf_counter() - started)
    with torch.no_grad():
        loss = network(held).item()
    return {"loss": round(loss, 6), "step_ms": round(1000 * float(np.median(times)), 2)}


def _values(results: Results, arm: str, key: str, counted: bool = False) -> list[float]:
    # A loss that was not finite is stored as None and loses every comparison.
    chosen = [
        outcome[key] for one, outcome in results.items() if one.arm == arm and not (counted and one.seed == TUNING_SEED)
    ]
    return [float("inf") if value is None else value for value in chosen]


def _tuned(results: Results, cell: str) -> str:
    def loss(arm: str) -> float:
        value = results[Trial(arm, TUNING_SEED)]["loss"]
        return float("inf") if value is None else value

    return min((arm for arm, settings in ARMS.items() if settings.get("cell") == cell), key=loss)


def _share(lower: Sequence[float], higher: Sequence[float]) -> float:
    return float(np.mean([a < b for a, b in zip(lower, higher, strict=True)]))


CLAIM = Claim(
    id="layer-normalization",
    statement=(
        "Layer normalization trains as well at batch 4 as at batch 128, where batch normalization "
        "degrades, and an LSTM with it trains faster."
    ),
    criterion=(
        "At batch 4 LN's training NLL < BN's in >= 8 of 10 seeds, and LN's final test error changes by less than 0.5 "
        "points between batch 128 and 4. Second part: LN-LSTM has the lower training loss at step 400 in >= 4 of 5 "
        "seeds. Refuted if BN at batch 4 is as good, or the LN-LSTM is slower per step-count. Measured so: MLP "
        "64-256-256-10, Adam 1e-3, 8 epochs, NLL of the trained network in eval mode on all training images, test "
        "errors averaged over seeds; LSTM with 128 units, T = 64, batch 32, Adam with the best of the learning rates "
        "1e-3, 3e-3, 1e-2 for each side by a tuning seed that is not counted, loss at step 400 on 256 windows of the "
        "training text, the same windows for both sides."
    ),
    data=(
        "scikit-learn's digits (1797 images of 8x8 pixels, divided by 16): 1408 train, 389 test, split anew each "
        "seed; the first 900,000 bytes of the source text of the running Python's standard library"
    ),
    arms=ARMS,
    seeds={"small": (0,), "full": tuple(range(10))},
    trial=trial,
    judge=judge,
    plan=plan,
    draw=draw,
)
