"""Power normalization trains a transformer where batch normalization does poorly, about as well as layer norm.

The paper's language-model experiment in small: a character-level transformer on the source of Python's standard
library, with the normalization after each sublayer ("post-norm"). All arms share model, data, optimizer, learning
rate and steps.

Reference: S. Shen, Z. Yao, A. Gholami, M. W. Mahoney and K. Keutzer, "PowerNorm: Rethinking Batch Normalization in
Transformers", ICML 2020, arXiv 2003.07845, section 5 (language modelling) and figures 1 and 2 (batch statistics).
"""

from __future__ import annotations

import functools
import math
import statistics
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import evenly.nn
from evenly.claims._harness import Check, Claim, Judgement, Metric, Results

__all__ = ["CLAIM"]

WIDTH, HEADS, LAYERS, LENGTH, BATCH = 128, 4, 2, 64, 16
STEPS = {"small": 12, "full": 600}
TRAIN, VALID = 1_000_000, 100_000  # bytes
WARMUP = 200
LAST = 100  # training steps at the end over which the distance of statistics is averaged
ARMS = {name: {"norm": name} for name in ("layer", "batch", "power-v", "power")}


def trial(settings: Mapping[str, Any], seed: int, budget: str) -> dict[str, Any]:
    """Train one language model; return its validation loss and how far batch statistics were from running ones."""
    train, valid = _source(TRAIN, VALID if budget == "full" else 8 * BATCH * LENGTH + 1)
    model = _Transformer(_LAYERS[settings["norm"]])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    steps = STEPS[budget]
    distances: list[float] = []
    offsets = torch.arange(LENGTH + 1)
    for step in range(steps):
        rows = train[torch.randint(len(train) - LENGTH, (BATCH, 1)) + offsets]
        watch = steps - step <= LAST and step % 5 == 0
        before = _running(model) if watch else []
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()
        if watch:
            distances.extend(_distance(old, new) for old, new in zip(before, _running(model), strict=True))
    outcome = {"bpc": _bits(model.eval(), valid)}
    if settings["norm"] == "batch":
        outcome["bpc by batch statistics"] = _bits(_by_batch(model), valid)
    outcome["distance"] = statistics.fmean(distances) if distances else 0.0
    return outcome


def judge(results: Results) -> Judgement:
    """Apply the criterion to the means over seeds."""
    bpc = {arm: [_number(outcome["bpc"]) for outcome in _of(results, arm)] for arm in ARMS}
    mean = {arm: statistics.fmean(values) for arm, values in bpc.items()}
    gains = [a - b for a, b in zip(bpc["batch"], bpc["power"], strict=True)]
    gap = [_number(outcome["bpc"]) - _number(outcome["bpc by batch statistics"]) for outcome in _of(results, "batch")]
    distance = {arm: [_number(outcome["distance"]) for outcome in _of(results, arm)] for arm in ARMS}
    trained = sum(math.isfinite(value) and value < 8 for value in bpc["power"])
    if mean["power"] >= mean["batch"]:
        why = "Batch normalization is at least as good here, which refutes the claim on this model."
    else:
        why = "Power normalization is better than batch normalization, by less than asked for or behind layer norm."
    return Judgement(
        metrics=[
            Metric("validation bits per character", "batch norm", bpc["batch"], "power norm", bpc["power"]),
            Metric("validation bits per character", "layer norm", bpc["layer"], "power norm", bpc["power"]),
            Metric(
                "relative distance of batch from running variance / mean square (not judged)",
                "batch norm",
                distance["batch"],
                "power norm",
                distance["power"],
            ),
        ],
        checks=[
            Check("bits per character of batch norm - power norm", mean["batch"] - mean["power"], ">=", 0.02),
            Check("bits per character of power norm - layer norm", mean["power"] - mean["layer"], "<=", 0.03),
            Check("seeds in which power norm trained", trained, ">=", len(bpc["power"])),
        ],
        effect=(
            "bits per character gained over batch norm; spread: range over seeds",
            mean["batch"] - mean["power"],
            min(gains),
            max(gains),
        ),
        why=why,
        notes={
            "mean bits per character": {arm: round(value, 4) for arm, value in mean.items()},
            "batch norm: bits by running statistics - bits by batch statistics": [round(value, 4) for value in gap],
        },
    )


_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: evenly.nn.LayerNorm(WIDTH),
    "batch": lambda: evenly.nn.BatchNorm(WIDTH, channel_dim=-1),
    "power-v": lambda: nn.Sequential(evenly.nn.GroupScaling(HEADS), evenly.nn.PowerNormV(WIDTH)),
    "power": lambda: evenly.nn.PowerNorm(WIDTH, warmup_iters=WARMUP, group_num=HEADS),
}


class _Transformer(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.token = nn.Embedding(256, WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        nn.init.normal_(self.token.weight, std=0.02)
        self.blocks = nn.Sequential(*(_Block(norm) for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.blocks(self.token(rows) + self.place[: rows.shape[1]]))


class _Block(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.norm1, self.norm2 = norm(), norm()

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = self.norm1(x + self.out(attended.transpose(1, 2).reshape(n, t, WIDTH)))
        return self.norm2(x + self.mlp(x))


@functools.cache
def _source(train: int, valid: int) -> tuple[Tensor, Tensor]:
    """The source of the standard library: training bytes, then validation bytes from other files."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in folder.glob("*.py") if path.is_file())
    held_out = paths[::8]  # every eighth file is never trained on
    texts = [
        b"".join(path.read_bytes() for path in part) for part in ([p for p in paths if p not in held_out], held_out)
    ]
    parts = [
        torch.frombuffer(bytearray(text[:size]), dtype=torch.uint8).long()
        for text, size in zip(texts, (train, valid), strict=True)
    ]
    return parts[0], parts[1]


@torch.no_grad()
def _bits(model: nn.Module, valid: Tensor) -> float:
    rows = (len(valid) - 1) // LENGTH
    inputs, targets = valid[: rows * LENGTH].view(rows, LENGTH), valid[1 : rows * LENGTH + 1].view(rows, LENGTH)
    total = 0.0
    for x, y in zip(inputs.split(BATCH), targets.split(BATCH), strict=True):
        total += nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
    return total / (rows * LENGTH) / math.log(2)


def _by_batch(model: nn.Module) -> nn.Module:
    """Batch norms measure each batch of the validation set, as in training; nothing else changes."""
    for module in model.modules():
        if isinstance(module, evenly.nn.BatchNorm):
            module.train()
    return model


def _running(model: nn.Module) -> list[tuple[Tensor, float]]:
    """The running variance or mean square of every layer, and the decay by which it moves."""
    found: list[tuple[Tensor, float]] = []
    for module in model.modules():
        if isinstance(module, evenly.nn.PowerNormV):
            found.append((module.running_phi.clone(), module.alpha_fwd))
        elif isinstance(module, evenly.nn.BatchNorm):
            assert module.running_var is not None
            found.append((module.running_var.clone(), 0.9))
    return found


def _distance(old: tuple[Tensor, float], new: tuple[Tensor, float]) -> float:
    # The running value moved by (1 - decay) (batch - running).
    batch = old[0] + (new[0] - old[0]) / (1 - old[1])
    return ((batch - old[0]).abs() / old[0]).mean().item()


def _of(results: Results, arm: str) -> list[dict[str, Any]]:
    return [outcome for trial, outcome in results.items() if trial.arm == arm]


def _number(value: float | None) -> float:
    return math.inf if value is None else value


CLAIM = Claim(
    id="powernorm",
    statement=(
        "In a transformer for text power normalization is better than batch normalization and about as good as "
        "layer normalization."
    ),
    criterion=(
        "Validation bits per character, means over seeds: power norm at least 0.02 below batch norm, and at most 0.03 "
        "above layer norm; power norm trains in all seeds. Refuted if batch norm is at least as good, or power norm "
        "diverges. All arms: 600 steps of Adam at 1e-3, batches of 16 rows of 64 characters, 2 post-norm layers of "
        "width 128 with 4 heads; power norm with 200 steps of warm-up and 4 groups. No arm is tuned."
    ),
    data=(
        "the source of Python's standard library, one byte a character: 1 MB to train on, 100 kB of other files (every "
        "eighth) to validate on"
    ),
    arms=ARMS,
    seeds={"small": (0,), "full": (0, 1, 2)},
    trial=trial,
    judge=judge,
)
