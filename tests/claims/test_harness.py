"""The harness: what runs, what is kept, what is judged, and what is written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from evenly import claims
from evenly.claims import Check, Claim, ClaimError, Judgement, Metric, Trial, run_claim
from evenly.claims._store import dumps, rows, spread, summary, write_atomically

CALLS: list[tuple[str, int, str]] = []


def trial(settings, seed, budget):
    CALLS.append((settings["name"], seed, budget))
    if settings.get("fails") == seed:
        raise RuntimeError("no luck")
    return {"score": settings["gain"] + torch.rand(()).item() / 10, "worst": float("inf")}


def judge(results):
    scores = {arm: [out["score"] for one, out in results.items() if one.arm == arm] for arm in ("base", "ours")}
    gain = sum(scores["ours"]) / len(scores["ours"]) - sum(scores["base"]) / len(scores["base"])
    return Judgement(
        metrics=[Metric("score", "base", scores["base"], "ours", scores["ours"])],
        checks=[Check("gain", gain, ">=", 0.5)],
        effect=("gain", gain, gain, gain),
        why="The method gains too little.",
        notes={"runs": len(results)},
    )


def make(gain=1.0, **changes):
    settings = {
        "id": "toy",
        "statement": "Ours is better.",
        "criterion": "gain >= 0.5",
        "data": "none",
        "arms": {"base": {"name": "base", "gain": 0.0}, "ours": {"name": "ours", "gain": gain}},
        "seeds": {"small": (0,), "full": (0, 1, 2)},
        "trial": trial,
        "judge": judge,
    }
    return Claim(**{**settings, **changes})


@pytest.fixture(autouse=True)
def _no_calls():
    CALLS.clear()


def test_verdicts(tmp_path):
    good = run_claim(make(), out=tmp_path / "a", workers=1)
    assert (good["verdict"], good["why"]) == ("reproduced", "")
    bad = run_claim(make(gain=0.1), out=tmp_path / "b", workers=1)
    assert bad["verdict"] == "not reproduced"
    assert bad["why"].startswith("Gain is 0.")
    assert bad["why"].endswith("wanted >= 0.5. The method gains too little.")
    small = run_claim(make(), "small")
    assert small["verdict"] == "not judged"


def test_what_is_stored(tmp_path):
    result = run_claim(make(), out=tmp_path, workers=1)
    assert json.loads((tmp_path / "toy.json").read_text()) == result
    assert {"id", "statement", "criterion", "seeds", "data", "command", "versions", "duration_s"} <= set(result)
    assert result["cpu_s"] == pytest.approx(sum(one["cpu_seconds"] for one in result["trials"]), abs=0.06)
    assert result["command"] == "evenly claim toy --budget full"
    assert result["seeds"] == [0, 1, 2]
    assert result["metrics"][0]["method"]["per_seed"] == [
        one["score"] for one in result["trials"] if one["arm"] == "ours"
    ]
    assert result["checks"][0]["passed"]
    assert result["notes"] == {"runs": 6}
    assert {one["worst"] for one in result["trials"]} == {None}  # not a finite number
    assert (tmp_path / "toy.svg").read_text().lstrip().startswith("<?xml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.json", "toy.svg"]
    assert claims.stored("toy", tmp_path) == result
    assert claims.stored("other", tmp_path) is None


def test_a_seed_gives_the_same_numbers_again(tmp_path):
    first = make().run("full")
    torch.rand(7)  # the state outside does not matter, nor does the order
    second = make(arms=dict(reversed(make().arms.items()))).run("full")
    assert {key: value["score"] for key, value in first.items()} == {
        key: value["score"] for key, value in second.items()
    }
    before = torch.get_rng_state()
    make().run("small")
    assert torch.equal(torch.get_rng_state(), before)


def test_small_never_replaces_full_and_is_not_stored_by_default(tmp_path, monkeypatch):
    monkeypatch.setattr("evenly.claims._harness.checkout_dir", lambda: tmp_path)
    run_claim(make(), "small")
    assert list(tmp_path.iterdir()) == []
    run_claim(make(), "full", workers=1)
    full = (tmp_path / "toy.json").read_text()
    run_claim(make(), "small", out=tmp_path)
    assert (tmp_path / "toy.json").read_text() == full
    assert json.loads((tmp_path / "toy.small.json").read_text())["budget"] == "small"


def test_a_failed_trial_says_which_and_finished_ones_are_kept(tmp_path):
    broken = make()
    broken.arms["ours"]["fails"] = 1
    with pytest.raises(ClaimError, match="the trial 'ours' with seed 1 failed: RuntimeError: no luck"):
        run_claim(broken, out=tmp_path, workers=1)
    assert CALLS == [("base", 0, "full"), ("ours", 0, "full"), ("base", 1, "full"), ("ours", 1, "full")]
    CALLS.clear()
    run_claim(make(), out=tmp_path, workers=1)
    assert CALLS == [("ours", 1, "full"), ("base", 2, "full"), ("ours", 2, "full")]


def test_kept_trials_of_other_code_are_not_used(tmp_path, monkeypatch):
    broken = make()
    broken.arms["ours"]["fails"] = 2
    with pytest.raises(ClaimError):
        run_claim(broken, out=tmp_path, workers=1)
    CALLS.clear()
    monkeypatch.setattr("evenly.claims._harness._fingerprint", lambda claim: "changed")
    run_claim(make(), out=tmp_path, workers=1)
    assert len(CALLS) == 6


def test_a_plan_may_follow_from_results():
    def plan(budget, results):
        first = [Trial("base", 0), Trial("ours", 0)]
        if not all(one in results for one in first):
            return first
        best = max(first, key=lambda one: results[one]["score"])
        return [*first, Trial(best.arm, 1)]

    results = make(plan=plan).run("full")
    assert list(results) == [Trial("base", 0), Trial("ours", 0), Trial("ours", 1)]


def test_progress_counts_every_trial():
    seen = []
    make().run("full", lambda what, done, total: seen.append((done, total)))
    assert seen == [(number, 6) for number in range(7)]


def test_threads_are_restored_and_one_during_a_trial():
    seen = []
    threads = torch.get_num_threads()
    make(trial=lambda *arguments: {"score": seen.append(torch.get_num_threads()) or 1.0}).run("small")
    assert seen == [1, 1]
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("value", "relation", "threshold", "passed"),
    [(3.0, ">=", 3.0, True), (3.0, ">", 3.0, False), (0.4, "<", 0.5, True), (1.0, "<=", 0.5, False)],
)
def test_checks(value, relation, threshold, passed):
    assert Check("x", value, relation, threshold).passed is passed
    assert not Check("x", float("nan"), relation, threshold).passed


def test_wrong_arguments():
    with pytest.raises(ClaimError, match="budget is 'huge'; expected one of small, full"):
        make().run("huge")
    with pytest.raises(ClaimError, match="workers is 0"):
        make().run("small", workers=0)
    with pytest.raises(ClaimError, match="relation is '=='"):
        Check("x", 1.0, "==", 1.0)
    with pytest.raises(ClaimError, match=r"seeds are given for \['full'\]"):
        make(seeds={"full": (0,)})
    with pytest.raises(ClaimError, match="'xmen' has no claim yet"):
        claims.get("xmen")
    with pytest.raises(ValueError, match="did you mean 'batch-normalization'"):
        claims.get("batch-normalisation")


def test_text_of_a_result(tmp_path):
    result = run_claim(make(), out=tmp_path, workers=1)
    assert rows(result)[0][:2] == ("toy", "score")
    lines = summary(result).splitlines()
    assert lines[0] == "reproduced (full budget, seeds 0 to 2)"
    assert "criterion: gain >= 0.5" in lines
    assert spread([1.0, 3.0, 2.0]) == "2 [1, 3]"
    assert spread([1.0, None, None]) == "none [1, none]"


def test_json_is_compact_and_exact():
    value = {"a": [1, 2.5, float("nan")], "b": {"c": [], "d": {}}, "e": [{"x": 1}, {"x": [1]}], "f": "é\n", "g": True}
    text = dumps(value)
    assert json.loads(text) == {**value, "a": [1, 2.5, None]}
    assert '"a": [1, 2.5, null]' in text


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_atomically(path, "old")

    def broken(*arguments):
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


SLOW = """
import sys, time
sys.path.insert(0, {source!r})
from evenly.claims import Check, Claim, Judgement, Metric, run_claim

def trial(settings, seed, budget):
    with open({log!r}, "a") as log:
        log.write(f"{{seed}}\\n")
    if seed == 2 and {wait}:
        time.sleep(600)
    return {{"score": 1.0}}

def judge(results):
    return Judgement([Metric("score", "a", [1.0], "a", [1.0])], [Check("x", 1.0, ">=", 1.0)], ("x", 1.0, 1.0, 1.0))

claim = Claim("slow", "s", "c", "d", {{"a": {{}}}}, {{"small": (0,), "full": tuple(range(4))}}, trial, judge)
run_claim(claim, out={out!r}, workers=1)
"""


def test_a_killed_run_repeats_no_finished_trial(tmp_path):
    # The script is one file in both runs, since kept trials belong to the code that made them.
    log, script = tmp_path / "log", tmp_path / "slow.py"
    source = str(Path(claims.__file__).parents[2])
    text = SLOW.format(source=source, log=str(log), out=str(tmp_path / "out"), wait="'wait' in sys.argv")
    script.write_text(text)
    process = subprocess.Popen([sys.executable, str(script), "wait"])
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().split()) == 3):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "slow.json").exists()
    subprocess.run([sys.executable, str(script)], check=True)
    assert log.read_text().split() == ["0", "1", "2", "2", "3"]
    assert json.loads((tmp_path / "out" / "slow.json").read_text())["verdict"] == "reproduced"
    assert not (tmp_path / "out" / ".partial").exists()


def test_where_results_are_kept(tmp_path, monkeypatch):
    folder = claims.results_dir()
    assert folder.name == "claims"
    # An installed package reads its own copy, and writes to the folder it is called in.
    monkeypatch.setattr("evenly.claims._store.checkout_dir", lambda: None)
    assert claims.results_dir().parts[-4:] == ("evenly", "claims", "results", "claims")
    monkeypatch.setattr("evenly.claims._harness.checkout_dir", lambda: None)
    monkeypatch.chdir(tmp_path)
    run_claim(make(), workers=1)
    assert (tmp_path / "claims" / "toy.json").is_file()
