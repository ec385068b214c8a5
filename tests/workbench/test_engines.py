"""Engines: every submitted trial comes back once, whatever happens to it."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evenly.workbench import Engine, LocalEngine, RayEngine, TrialFailure, TrialResult, TrialSettings, run_trial
from evenly.workbench.engines import make_engine

GOOD = TrialSettings(
    "layer", "breast_cancer", batch_size=64, seed=0, epochs=1, lr=0.1, model="mlp", purpose="tune", max_steps=3
)
KILLED = replace(GOOD, norm="workbench.factories:killer")
RAISING = replace(GOOD, norm="workbench.factories:raising")


def check(engine: Engine, killed: str) -> None:
    """Two good trials, one that raises, one whose process dies, and one submitted while the others run."""
    late = replace(GOOD, seed=7)
    for settings in (GOOD, RAISING, KILLED, replace(GOOD, seed=1)):
        engine.submit(settings)
    outcomes: dict[str, Any] = {}
    for settings, outcome in engine.completed():
        assert settings.key not in outcomes
        outcomes[settings.key] = outcome
        if settings == GOOD:
            engine.submit(late)
    assert len(outcomes) == 5
    for settings in (GOOD, late):
        assert isinstance(outcomes[settings.key], TrialResult)
    assert outcomes[GOOD.key].scores() == run_trial(GOOD).scores()
    raised = outcomes[RAISING.key]
    assert isinstance(raised, TrialFailure)
    assert raised.error == "RuntimeError: no layer for 64 features and a second line"
    assert "factories.py" in raised.trace
    dead = outcomes[KILLED.key]
    assert isinstance(dead, TrialFailure)
    assert killed in dead.error


def test_local_engine() -> None:
    with LocalEngine(1) as engine:
        check(engine, "WorkerDied: the process of the trial ended by signal SIGKILL")
        assert list(engine.completed()) == []
        processes = [worker.process for worker in engine._pool]
        assert processes
    assert not any(process.is_alive() for process in processes)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    pytest.importorskip("ray", reason="Ray is not installed: pip install evenly[ray]")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made.address
    made.shutdown()


def test_ray_engine_on_a_running_cluster(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))  # where workers find our factories

    with RayEngine(address=cluster) as engine:
        assert engine.workers == 1
        check(engine, "WorkerCrashedError")
        assert list(engine.completed()) == []
    assert not ray.is_initialized()


def test_ray_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_ray(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "ray":
            raise ImportError("No module named 'ray'")
        return real(name, *rest, **more)

    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_ray)
    with pytest.raises(ImportError, match=r"pip install evenly\[ray\]"):
        make_engine("ray")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "slurm"}, "unknown engine 'slurm': known are local and ray"),
        ({"name": "local", "workers": 0}, "workers is 0"),
        ({"name": "local", "address": "auto"}, "address is for --engine ray"),
    ],
)
def test_bad_engines(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_engine(**options)
