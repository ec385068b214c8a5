"""The benchmark of optimizers runs, measures states, and compares with the right peers."""

from __future__ import annotations

import runpy
import time
from pathlib import Path

import pytest


@pytest.mark.parametrize("size", ["1M", "100M"])  # the large model's way of pairing, at a small size
def test_rows(size: str) -> None:
    script = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "optim.py"))
    script["SIZES"][size] = (16, 1, 32)
    only = ["AdamW (torch, foreach)", "SGDP", "SinkGD", "SWAN", "SWAN (plain)"]
    rows = script["measure"](size, 2, only, time.perf_counter)
    found = {(row["optimizer"], row["gradients"]): row for row in rows}
    assert set(found) == {(name, "random") for name in only} | {
        ("AdamW (torch, foreach)", "orthogonal"),
        ("SGDP", "orthogonal"),
    }
    plain, ours = found["SWAN (plain)", "random"], found["SWAN", "random"]
    assert ours["peer"] == "SWAN (plain)"
    assert ours["peer / ours"] == pytest.approx(plain["of AdamW"] / ours["of AdamW"], rel=0.02)
    parameters = rows[0]["parameters"]
    assert found["SGDP", "random"]["state MB"] == pytest.approx(4 * parameters / 1e6, abs=0.006)
    assert found["SinkGD", "random"]["state MB"] < found["SGDP", "random"]["state MB"]
