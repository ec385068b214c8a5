"""Text in the workbench: windows, bits per byte, the rule of each network's training, ranking, report."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from evenly.models import NGPT, RECIPES, recipes_for
from evenly.nn import ProjectedOptimizer
from evenly.workbench import Comparison, TrialResult, TrialSettings, compare, run_trial
from evenly.workbench.language import (
    bits_per_byte,
    build_language_model,
    is_text,
    language_optimizer,
    load_words,
    windows,
)
from evenly.workbench.metrics import Arm, Cell, finding, rank, summarize
from evenly.workbench.tune import choose, grid


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; " * 300, encoding="ascii")
    return f"text:{path}"


def settings(data: str, **changes: object) -> TrialSettings:
    base: dict[str, object] = {"norm": "layer", "data": data, "batch_size": 8, "seed": 0, "epochs": 1, "lr": 1e-2}
    return TrialSettings(**(base | {"model": "gpt", "max_steps": 6, "severities": ()} | changes))  # type: ignore[arg-type]


def test_windows_cover_the_text_once() -> None:
    text = torch.arange(64 * 3 + 1).to(torch.uint8)
    x, y = windows(text)
    assert torch.equal(x.flatten(), text[:-1].long())
    assert torch.equal(y.flatten(), text[1:].long())
    assert len(windows(text[:-1])[0]) == 2


def test_bits_per_byte_is_the_mean_cost_of_a_byte() -> None:
    model = build_language_model("rms").eval()
    x, y = torch.randint(256, (70, 64)), torch.randint(256, (70, 64))
    logits = model(x)[0].double()
    chosen = logits.log_softmax(-1).gather(-1, y[..., None])
    assert bits_per_byte(model, x, y) == pytest.approx(min(8.0, -chosen.mean().item() / math.log(2)), rel=1e-5)
    nn.init.zeros_(model.head.weight)  # type: ignore[union-attr, arg-type]
    assert bits_per_byte(model, x, y) == pytest.approx(8.0)
    nn.init.constant_(model.head.weight, math.nan)  # type: ignore[union-attr, arg-type]
    assert bits_per_byte(model, x, y) == 8.0


def test_the_rows_for_text_are_of_one_size() -> None:
    assert recipes_for("text") == ["layer", "rms", "scale", "qknorm", "ngpt"]
    sizes = {name: sum(p.numel() for p in build_language_model(name).parameters()) for name in recipes_for("text")}
    assert max(sizes.values()) < 1.02 * min(sizes.values())


def test_each_network_is_trained_by_its_own_rule() -> None:
    optimizer, warms_up = language_optimizer(build_language_model("layer"), 1e-3)
    assert warms_up
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(p.ndim == 1 for p in optimizer.param_groups[1]["params"])
    model = build_language_model("ngpt")
    optimizer, warms_up = language_optimizer(model, 1e-3)
    assert not warms_up
    assert isinstance(model, NGPT)
    assert isinstance(optimizer, ProjectedOptimizer)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("norm", ["qknorm", "ngpt", "torch.nn:RMSNorm"])
def test_a_trial_learns_and_repeats(book: str, norm: str) -> None:
    chosen = settings(book, norm=norm, max_steps=12)
    first, again = run_trial(chosen), run_trial(chosen)
    assert first.scores() == again.scores()
    assert first.bits is not None
    assert first.bits < 7.9
    assert first.clean is None
    assert not first.corruptions
    assert first.steps == 12
    assert TrialResult.from_json(first.to_json()) == first


def test_the_search_holds_out_the_last_fifth(book: str) -> None:
    trials = grid(settings(book, lr=0.03))
    assert [trial.lr for trial in trials] == [0.01, 0.03, 0.1, 0.3, 1.0]
    assert {trial.max_steps for trial in trials} == {6}
    results = {trial.lr: run_trial(trial) for trial in trials[:2]}
    for result in results.values():
        assert result.bits is None
        assert result.validation["loss"] == pytest.approx(result.validation["bits"] * math.log(2))
    assert choose(results) == min(results, key=lambda lr: results[lr].validation["bits"])  # type: ignore[type-var]


def test_less_is_better() -> None:
    scores = {"a": {0: 3.0, 1: 3.0, 2: 3.01}, "b": {0: 2.0, 1: 2.01, 2: 2.0}}
    assert rank(scores, lower=True) == {"b": 1, "a": 2}
    assert rank(scores) == {"a": 1, "b": 2}
    trials = [
        (settings("text", norm=norm, seed=seed), TrialResult(False, 5, ((5, 2.0),), bits=value))
        for norm, row in scores.items()
        for seed, value in row.items()
    ]
    arms = summarize(trials, metric="bits")
    assert [(arm.norm, arm.rank, arm.complete) for arm in arms] == [("b", 1, True), ("a", 2, True)]
    text = finding(arms, "bits")
    assert text.startswith("b is best in bits per byte: 2.003, 1.000 below a, the next (95 % interval 0.9")
    assert "%" not in text.replace("95 %", "")
    one = [Arm(n, (Cell(n, 16),), r, {"bits": {0: v}}, {}, None) for n, r, v in (("b", 1, 2.0), ("a", 1, 3.0))]
    assert "has the fewest bits per byte, 2.000 against 3.000 for a" in finding(one, "bits")
    assert "tie for the best bits per byte (2.005, 3.000)" in finding(
        summarize([(s, o) for s, o in trials if s.seed < 2], metric="bits", resolution=5.0), "bits"
    )


@pytest.fixture(scope="module")
def compared(book: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, str]:
    out = io.StringIO()
    comparison = compare(
        ["layer", "ngpt"],
        data=book,
        seeds=2,
        quick=True,
        epochs=1,
        tune=True,
        workers=1,
        out=tmp_path_factory.mktemp("compare"),
        console=Console(file=out, width=200),
    )
    return comparison, out.getvalue()


def test_comparison(compared: tuple[Comparison, str]) -> None:
    comparison, printed = compared
    assert comparison.metric == "bits"
    assert {arm.norm for arm in comparison.arms} == {"layer", "ngpt"}
    assert len(comparison.trials) == 2 * (5 + 2)
    assert not comparison.failed
    assert all(set(arm.scores) == {"bits"} and arm.rank is not None for arm in comparison.arms)
    assert "Ranked by bits per byte; less is better, ± standard deviation over seeds" in printed
    assert comparison.finding in printed
    assert set(comparison.frame().columns) >= {"norm", "lr", "bits"}


def test_report(compared: tuple[Comparison, str]) -> None:
    html = compared[0].report.read_text(encoding="utf-8")
    for heading in ("Ranking", "Over learning rates", "Learning curves", "Cost", "Learning rates"):
        assert f"<h2>{heading}</h2>" in html
    for absent in ("Corruption by corruption", "Accuracy by batch size", "mPC", "accuracy"):
        assert absent not in html
    best = compared[0].arms[0]
    assert f"{best.mean('bits'):.3f}" in html
    assert html.count('class="dot s0"') == 5  # one point a learning rate
    assert html.count('class="ring s0"') == 1  # the chosen one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "text", "model": "resnet"}, "'resnet' does not read text: use --model gpt"),
        ({"data": "digits", "model": "gpt"}, "use --data text"),
        ({"data": "text", "ood": "digits"}, "a second data set goes with images"),
        ({"data": "text", "rank_by": "mpc"}, "cannot rank text by 'mpc': known are bits"),
        ({"data": "digits", "rank_by": "bits"}, "cannot rank digits by 'bits'"),
        ({"data": "text", "norms": ["batch"]}, "batch cannot normalize the tokens"),
        ({"data": "text", "norms": ["layer", "layer"]}, "each once"),
    ],
)
def test_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        compare(**options, out=tmp_path, console=Console(file=io.StringIO()))  # type: ignore[arg-type]


def test_a_short_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(b"x" * 300)
    with pytest.raises(ValueError, match="30 to test, expected more than 64"):
        load_words(f"text:{path}")
    assert is_text(f"text:{path}")
    assert "layer" in RECIPES
