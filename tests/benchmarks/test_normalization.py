"""The benchmarks of normalization and of layers run on little, and what they store follows from what they timed."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(name: str, monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> dict[str, Any]:
    script = runpy.run_path(str(BENCHMARKS / name))
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--json", str(out)])
    script["main"]()
    return json.loads(out.read_text())


def test_normalize(monkeypatch, tmp_path, capsys):
    stored = run(
        "normalize.py", monkeypatch, tmp_path / "n.json", "--quick", "--no-compile", "--only", "1x1x4096 float32"
    )
    assert {cell["operator"] for cell in stored["cells"]} == {"layer", "rms", "l2"}
    for cell in stored["cells"]:
        moved = (1.5, 3.5) if cell["fused"] == "residual+relu" else (1, 2.5)  # a residual is read, its gradient written
        for direction, copies in zip(("forward", "both"), moved, strict=True):
            found = cell[direction]
            seconds = found["seconds"]
            assert set(seconds) == {"evenly", "eager", "einops", "copy"}
            assert found["speedup"] == min(seconds["eager"], seconds["einops"]) / seconds["evenly"]
            assert found["over_limit"] == pytest.approx(seconds["evenly"] / (copies * seconds["copy"]))
    speedups = [cell["forward"]["speedup"] for cell in stored["cells"]]
    assert stored["summary"]["forward"]["worst_speedup"] == min(speedups)
    assert "geometric_mean_speedup" in capsys.readouterr().out


def test_layers(monkeypatch, tmp_path, capsys):
    stored = run("layers.py", monkeypatch, tmp_path / "l.json", "--quick", "--runs", "3", "--only", "features 128x512")
    (rows,) = stored.values()
    plain = rows[0]
    assert plain["layer"] == "BatchNorm1d (torch)"
    assert plain["range"] == [1, 1]
    for row in rows:
        low, high = row["range"]
        assert low <= row["ratio_plain"] <= high
    assert "medians of 3 runs" in capsys.readouterr().out
