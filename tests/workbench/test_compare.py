"""The main job from end to end: it ranks, resumes after SIGKILL, keeps failures, and says what is wrong."""

from __future__ import annotations

import io
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from evenly.cli import app
from evenly.models import RECIPES, Recipe, recipes_for
from evenly.workbench import StoreError, TrialFailure, TrialResult, TrialSettings, compare
from evenly.workbench.engines import Engine
from evenly.workbench.progress import Watch
from workbench.conftest import Finished

MODULE = sys.modules["evenly.workbench.compare"]  # the package's `compare` is the function
ROOT = Path(__file__).resolve().parents[2]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_comparison(finished: Finished) -> None:
    comparison = finished.comparison
    arms = {arm.norm: arm for arm in comparison.arms}
    assert set(arms) == {"batch", "layer", "workbench.factories:raising"}
    assert comparison.arms[-1].norm == "workbench.factories:raising"
    assert comparison.arms[-1].rank is None
    for norm in ("batch", "layer"):
        arm = arms[norm]
        assert arm.complete
        assert arm.rank in (1, 2)
        assert set(arm.scores) == {"mpc", "clean", "rpc", "worst", "domain", "ood"}
        assert len(arm.corruptions) == 15
        # The searched rate is one of the grid, and all seeds have it.
        for cell in arm.cells:
            assert cell.lr is not None
    # 3 rates x 3 normalizations x 2 batch sizes, and 3 x 2 x 2 scored.
    assert len(comparison.trials) == 18 + 12
    assert len(comparison.failed) == 6 + 4
    assert all(failure.error.startswith("RuntimeError: no layer for 16") for _, failure in comparison.failed)
    frame = comparison.frame()
    assert len(frame) == 12
    assert frame[frame.norm == "batch"].clean.notna().all()


def test_plain_lines(finished: Finished) -> None:
    text = finished.printed
    assert "30 trials to run, 1 at a time" in text
    assert "failed: workbench.factories:raising, batch 32, search" in text
    assert "Ranked by mean accuracy under corruption" in text
    assert finished.comparison.finding in text
    assert "\x1b" not in text
    assert text.count("failed: workbench.factories:raising, batch 32, search") == 3
    assert "left)" in text


def run_again(norms: list[str], out: Path, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "data": "digits",
        "ood": "digits",
        "model": "resnet",
        "batch_sizes": [32, 64],
        "seeds": 2,
        "epochs": 1,
        "tune": True,
        "quick": True,
        "workers": 1,
        "out": out,
        "console": quiet(),
    }
    return compare(norms, **options | changes)


def test_the_same_folder_runs_nothing_twice(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(finished.comparison.out, tmp_path / "copy")

    def no_engine(*rest: object, **more: object) -> Engine:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(MODULE, "make_engine", no_engine)
    again = run_again(["batch", "layer"], out)
    assert again.loaded == len(again.trials) == 20
    before = {arm.norm: arm.scores for arm in finished.comparison.arms}
    assert {arm.norm: arm.scores for arm in again.arms} == {n: before[n] for n in ("batch", "layer")}
    # Another ranking needs no new trial.
    assert run_again(["layer", "batch"], out, rank_by="clean").metric == "clean"
    # Failed trials are tried again: here they would need the engine.
    with pytest.raises(AssertionError, match="an engine was started"):
        run_again(["workbench.factories:raising"], out)


class Here(Engine):
    """Runs trials in this process, and does what the test wants after each."""

    workers = 1

    def __init__(self, after: Any = None) -> None:
        self.queue: list[TrialSettings] = []
        self.after = after

    def submit(self, settings: TrialSettings) -> None:
        self.queue.append(settings)

    def completed(self) -> Any:
        from evenly.workbench.engines import _attempt

        count = 0
        while self.queue:
            settings = self.queue.pop(0)
            yield settings, _attempt(settings, None)
            count += 1
            if self.after is not None:
                self.after(count)

    def close(self) -> None:
        self.queue.clear()


TINY: dict[str, Any] = {"data": "wine", "batch_sizes": [16], "seeds": 2, "epochs": 1, "tune": False}


def test_interrupt_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(count: int) -> None:
        if count == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(MODULE, "make_engine", lambda *a, **k: Here(interrupt))
    console = quiet()
    with pytest.raises(KeyboardInterrupt):
        compare(["batch", "layer"], out=tmp_path, console=console, **TINY)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"Stopped. 3 finished trials are kept in {tmp_path}; the same command goes on from there." in said
    monkeypatch.setattr(MODULE, "make_engine", lambda *a, **k: Here())
    done = compare(["batch", "layer"], out=tmp_path, console=quiet(), **TINY)
    assert (done.loaded, len(done.trials)) == (3, 4)


def test_a_layer_that_cannot_is_a_failed_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Batch normalization of feature vectors needs two samples in a batch; layer normalization does not.
    monkeypatch.setattr(MODULE, "make_engine", lambda *a, **k: Here())
    done = compare(["batch", "layer"], out=tmp_path, console=quiet(), **TINY | {"batch_sizes": [1], "seeds": 1})
    arms = {arm.norm: arm for arm in done.arms}
    assert arms["batch"].failed == 1
    assert arms["batch"].rank is None
    assert arms["layer"].rank == 1
    assert isinstance(done.failed[0][1], TrialFailure)
    assert done.failed[0][1].error


def test_a_new_recipe_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "brand-new", Recipe("brand-new", lambda c: nn.LayerNorm(c), kinds=("tabular",)))
    monkeypatch.setattr(MODULE, "make_engine", lambda *a, **k: Here())
    done = compare(out=tmp_path, console=quiet(), **TINY | {"seeds": 1})
    assert "brand-new" in {arm.norm for arm in done.arms}
    assert "instance" not in {arm.norm for arm in done.arms}


def test_named_rows_and_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "make_engine", lambda *a, **k: Here())
    done = compare(["all"], out=tmp_path / "all", console=quiet(), **TINY | {"seeds": 1})
    assert {arm.norm for arm in done.arms} == set(recipes_for("tabular"))
    done = compare(out=tmp_path / "default", console=quiet(), **TINY | {"seeds": 1})
    names = {arm.norm for arm in done.arms}
    assert "wn" in names  # initialized from data
    assert "power" not in names
    assert not done.failed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"norms": ["batchnorm"]}, "unknown normalization 'batchnorm': known are none, batch"),
        ({"norms": ["batch", "batch"]}, "each once"),
        ({"norms": ["instance"], "data": "wine"}, "instance cannot normalize feature vectors"),
        ({"data": "cifar"}, "unknown data 'cifar'"),
        ({"model": "vgg"}, "unknown model 'vgg'"),
        ({"model": "resnet", "data": "wine"}, "needs images"),
        ({"ood": "wine"}, "both must be the same"),
        ({"seeds": 0}, "seeds is 0"),
        ({"batch_sizes": [4, 4]}, "different numbers"),
        ({"batch_sizes": []}, "different numbers"),
        ({"epochs": 0}, "epochs is 0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"rank_by": "accuracy"}, "known are mpc, clean"),
        ({"rank_by": "ood"}, "give --ood"),
        ({"engine": "slurm"}, "unknown engine 'slurm'"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_bad_options(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        compare(out=tmp_path, console=quiet(), **options)


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    runner = CliRunner()
    result = runner.invoke(app, ["compare", "--norms", "batchnorm", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "unknown normalization 'batchnorm': known are none, batch" in result.output
    result = runner.invoke(app, ["compare", "--batch-sizes", "4,many"])
    assert result.exit_code == 2
    assert "whole numbers" in result.output


def test_a_store_of_another_version(tmp_path: Path) -> None:
    (tmp_path / "trials.sqlite").write_bytes(b"no database" * 500)
    with pytest.raises(StoreError, match="cannot be read"):
        compare(["batch"], out=tmp_path, console=quiet(), **TINY)


def test_watch_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    settings = TrialSettings("batch", "digits", batch_size=4, seed=0, epochs=1, lr=0.1)
    with Watch(console, ["batch", "layer"], [4, 64], lambda s: 1.0, 1) as watch:
        watch.plan(4, 4.0)
        watch.finished(settings, TrialResult(False, 1, (), clean=0.9, corruptions={"fog": (0.5,)}))
        shown = io.StringIO()
        Console(file=shown, width=100).print(watch._view())
    text = shown.getvalue()
    assert "90.0 / 50.0 (1)" in text
    assert "1/4" in text
    assert "left" in text


# ------------------------------------------------------------------------------------------------ kill and resume


def start(out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "evenly", "compare", "--data", "breast_cancer", "--norms", "batch,layer,group"]
    command += ["--batch-sizes", "16", "--seeds", "3", "--epochs", "4", "--lr", "0.005", "--workers", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, "--out", str(out)], env=environment, stdout=subprocess.PIPE)


def rows(out: Path) -> dict[str, tuple[Any, ...]]:
    path = out / "trials.sqlite"
    if not path.exists():
        return {}
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)
    try:
        found = connection.execute("SELECT key, state, outcome, run, tries, finished FROM trials").fetchall()
    except sqlite3.OperationalError:  # its tables are not made yet
        return {}
    finally:
        connection.close()
    return {row[0]: row[1:] for row in found}


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


def test_killed_and_started_again_it_loses_and_repeats_nothing(tmp_path: Path) -> None:
    driver = start(tmp_path)
    limit = time.monotonic() + 120
    while len(rows(tmp_path)) < 2:
        assert driver.poll() is None, "the comparison ended before it could be killed"
        assert time.monotonic() < limit
        time.sleep(0.01)
    workers = children(driver.pid)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    kept = rows(tmp_path)
    assert 2 <= len(kept) < 9, "killed too late to show anything"

    # Workers end with the driver, though nobody told them to.
    limit = time.monotonic() + 30
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < limit, "a worker outlived the driver"
        time.sleep(0.05)

    second = start(tmp_path)
    printed = second.communicate(timeout=240)[0].decode()
    assert second.returncode == 0
    assert f"{len(kept)} of 9 trials are already in" in printed
    assert f"{9 - len(kept)} trials to run" in printed
    after = rows(tmp_path)
    assert len(after) == 9
    assert all(after[key] == row for key, row in kept.items())  # not one was run again
    assert all(tries == 1 for _, _, _, tries, _ in after.values())
    assert {run for _, _, run, _, _ in after.values()} == {1, 2}
    assert (tmp_path / "report.html").exists()


def test_a_script_without_a_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(
        "from evenly.workbench import compare\n"
        "print('begun')\n"
        "done = compare(['layer'], data='wine', batch_sizes=[16], seeds=1, epochs=1, tune=False, workers=1)\n"
        "print(len(done.trials), 'trials')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("begun") == 1
    assert "1 trials" in done.stdout
    assert (tmp_path / "evenly-compare" / "report.html").exists()
