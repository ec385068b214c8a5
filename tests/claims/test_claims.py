"""Every claim: its file is in order, its smoke test runs, its predicate can fail, and its stored result is its own."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evenly import catalog, claims
from evenly.claims import Trial
from evenly.claims import batch_normalization as bn
from evenly.claims import layer_normalization as ln
from evenly.cli import app

ALL = claims.available()


def test_every_file_of_a_claim_is_named_for_a_method():
    public = {path.stem for path in Path(claims.__file__).parent.glob("[a-z]*.py")} - {"conftest"}
    assert {name.replace("_", "-") for name in public} == set(ALL)


def test_the_readme_tells_the_stored_results():
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    results = [result for id in ALL if (result := claims.stored(id)) is not None]
    for result in results:
        holds = f"{sum(check['passed'] for check in result['checks'])} of {len(result['checks'])}"
        name, value, low, high = (result["effect"][key] for key in ("name", "value", "low", "high"))
        row = f"| [`{result['id']}`](docs/claims/{result['id']}.json) | {result['verdict']} | {holds} | "
        assert f"{row}{name}: {value:.3g} [{low:.3g}, {high:.3g}] |" in readme
    held = sum(result["verdict"] == "reproduced" for result in results)
    assert f"{held} of {len(results)} hold." in readme


@pytest.mark.parametrize("id", ALL)
def test_a_claim_is_in_order(id):
    claim = claims.get(id)
    row = catalog.method(id)
    assert claim.id == id
    module = importlib.import_module(f"evenly.claims.{row.module}")
    assert (row.arxiv or row.reference) in module.__doc__
    assert claim.criterion
    assert claim.statement
    assert len(claim.seeds["full"]) >= 3
    assert len(claim.arms) >= 2


@pytest.mark.parametrize("id", ALL)
def test_the_stored_result_belongs_to_the_file(id):
    claim, result = claims.get(id), claims.stored(id)
    if result is None:
        pytest.skip(f"no stored result of {id}; run `evenly claim {id}`")
    assert result["budget"] == "full"
    assert result["criterion"] == claim.criterion
    assert result["seeds"] == list(claim.seeds["full"])
    # The verdict follows from the stored trials by the predicate in the file.
    trials = {
        Trial(one["arm"], one["seed"]): {key: value for key, value in one.items() if key not in ("arm", "seed")}
        for one in result["trials"]
    }
    judgement = claim.judge(trials)
    assert result["verdict"] == ("reproduced" if judgement.passed else "not reproduced")
    assert [check["passed"] for check in result["checks"]] == [check.passed for check in judgement.checks]
    assert bool(result["why"]) != judgement.passed


@pytest.mark.parametrize("id", ALL)
def test_smoke(id, tmp_path):
    answer = CliRunner().invoke(app, ["claim", id, "--budget", "small", "--out", str(tmp_path)])
    assert answer.exit_code == 0, answer.output
    assert "verdict\tnot judged (small budget" in answer.stdout
    result = json.loads((tmp_path / f"{id}.small.json").read_text())
    for metric in result["metrics"]:
        assert len(metric["baseline"]["per_seed"]) == len(metric["method"]["per_seed"]) == 1
    assert (tmp_path / f"{id}.small.svg").stat().st_size > 1000


def test_the_command_refuses():
    for arguments in (["claim"], ["claim", "batch-normalization", "--all"]):
        answer = CliRunner().invoke(app, arguments)
        assert answer.exit_code == 2
        assert "give one ID, or --all" in answer.stderr
    answer = CliRunner().invoke(app, ["claim", "xmen"])
    assert answer.exit_code == 2
    assert "has no claim yet" in answer.stderr
    answer = CliRunner().invoke(app, ["claim", "batch-normalization", "--budget", "huge"])
    assert answer.exit_code == 2
    assert "expected one of small, full" in answer.stderr


def bn_results(plain_reach, normed_reach, normed_best=2.5):
    """Curves of 120 checkpoints that reach 0.9 at the given checkpoint, at learning rate 2.5 or ``normed_best``."""

    def curve(reach):
        accuracy = [0.1 if place < reach else 0.9 for place in range(1, 121)]
        return {"validation": accuracy, "test": accuracy, "drift": 0.0}

    results = {}
    for seed in range(10):
        for arm, settings in bn.ARMS.items():
            best = settings["lr"] == (normed_best if settings["norm"] else 2.5)
            reach = (normed_reach if settings["norm"] else plain_reach) if best else 120
            results[Trial(arm, seed)] = curve(reach)
    return results


@pytest.mark.parametrize(
    ("plain", "normed", "best", "passed", "speedup", "says"),
    [
        (60, 10, 2.5, [True, True], 6.0, ""),
        (30, 10, 2.5, [True, True], 3.0, ""),
        (29, 10, 2.5, [False, True], 2.9, "above the 1.5x"),
        (13, 10, 2.5, [False, True], 1.3, "below 1.5x, which refutes"),
        (60, 10, 0.5, [True, False], 6.0, "The speed-up holds"),
    ],
)
def test_batch_normalization_is_judged_by_its_criterion(plain, normed, best, passed, speedup, says):
    judgement = bn.judge(bn_results(plain, normed, best))
    assert [check.passed for check in judgement.checks] == passed
    assert math.isclose(judgement.checks[0].value, speedup)
    if says:
        assert says in judgement.why


def test_batch_normalization_that_never_gets_there_fails():
    results = bn_results(60, 10)
    for one, outcome in results.items():
        if bn.ARMS[one.arm]["norm"]:
            outcome["test"] = [0.5] * 120
    judgement = bn.judge(results)
    assert judgement.checks[0].value == 0
    assert not judgement.passed


def ln_results(**changes):
    """Numbers that pass, but for the changes: {arm: {key: values over seeds}}."""
    results = {}
    for arm, settings in ln.ARMS.items():
        for seed in range(10):
            if "norm" in settings:
                outcome = {"nll": {"LN": 0.01, "BN": 0.05, "none": 0.02}[settings["norm"]], "error": 2.0}
            else:
                outcome = {"loss": {"LN-LSTM": 1.5, "LSTM": 1.8}[settings["cell"]], "step_ms": 1.0}
            results[Trial(arm, seed)] = outcome
    for arm in ln.ARMS:
        if not arm.startswith("mlp"):
            for seed in range(10):
                value = results.pop(Trial(arm, seed))
                if arm.endswith("lr=0.003") and seed < 5:
                    results[Trial(arm, seed)] = value
            results[Trial(arm, ln.TUNING_SEED)] = {"loss": 1.0 if arm.endswith("lr=0.003") else 2.0, "step_ms": 1.0}
    for (arm, seed), values in changes.get("set", {}).items():
        results[Trial(arm, seed)] = {**results[Trial(arm, seed)], **values}
    return results


def test_layer_normalization_passes_and_fails_by_its_criterion():
    assert ln.judge(ln_results()).passed
    two = {("mlp BN batch=4", seed): {"nll": 0.001} for seed in range(2)}
    assert ln.judge(ln_results(set=two)).passed
    three = {("mlp BN batch=4", seed): {"nll": 0.001} for seed in range(3)}
    assert [check.passed for check in ln.judge(ln_results(set=three)).checks] == [False, True, True]
    shifted = {("mlp LN batch=128", seed): {"error": 2.5} for seed in range(10)}
    judgement = ln.judge(ln_results(set=shifted))
    assert [check.passed for check in judgement.checks] == [True, False, True]
    assert "LN 2.50 to 2.00, BN 2.00 to 2.00, none 2.00 to 2.00 %" in judgement.why
    one = {("LN-LSTM lr=0.003", 0): {"loss": None}}  # a loss that was not finite loses
    assert ln.judge(ln_results(set=one)).passed
    two = {**one, ("LN-LSTM lr=0.003", 1): {"loss": 1.9}}
    assert [check.passed for check in ln.judge(ln_results(set=two)).checks] == [True, True, False]


def test_layer_normalization_plans_the_tuned_learning_rates():
    first = ln.plan("full", {})
    assert len(first) == 6 * 10 + 6
    results = {one: {"loss": 1.0 if one.arm in ("LSTM lr=0.01", "LN-LSTM lr=0.003") else 2.0} for one in first}
    added = [one for one in ln.plan("full", results) if one not in results]
    assert len(added) == 10
    assert {one.arm for one in added} == {"LSTM lr=0.01", "LN-LSTM lr=0.003"}
    assert {one.seed for one in added} == set(range(5))


def test_both_sides_of_a_claim_see_the_same_numbers_of_settings():
    assert sum(settings["norm"] for settings in bn.ARMS.values()) == len(bn.ARMS) / 2
    cells = [settings["cell"] for settings in ln.ARMS.values() if "cell" in settings]
    assert cells.count("LSTM") == cells.count("LN-LSTM") == 3
