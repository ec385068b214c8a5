"""`evenly list`, `show` and `doctor`: what they print in a pipe, as JSON and on a terminal."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evenly import catalog, doctor, terminal
from evenly.cli import app

runner = CliRunner()


def run(*arguments, code=0):
    result = runner.invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result


def test_list_in_a_pipe_is_a_line_a_row():
    lines = run("list").stdout.splitlines()
    assert len(lines) == 119
    assert [line.split("\t")[0] for line in lines] == [row.id for row in catalog.methods()]
    assert {len(line.split("\t")) for line in lines} == {5}


def test_list_filters():
    assert [line.split("\t")[0] for line in run("list", "--area", "manifolds").stdout.splitlines()] == [
        "gyrobn",
        "liebn",
    ]
    todo, done = run("list", "--todo").stdout.splitlines(), run("list", "--done").stdout.splitlines()
    assert len(todo) + len(done) == 119
    assert {line.split("\t")[2] for line in todo} <= {"planned", "built"}
    assert all(line.split("\t")[2] == "done" for line in done)


def test_list_json():
    rows = json.loads(run("list", "--area", "graphs", "--json").stdout)
    assert {row["area"] for row in rows} == {"graphs"}
    assert rows[0]["link"].startswith("https://arxiv.org/abs/")


def test_list_refuses():
    wrong = run("list", "--area", "layers", code=2)
    assert "area is 'layers'; expected one of nn, weights" in wrong.stderr
    assert "exclude each other" in run("list", "--todo", "--done", code=2).stderr


def test_show():
    lines = [line.split("\t") for line in run("show", "batch-normalization").stdout.splitlines()]
    found = {}
    for label, text in lines:
        found.setdefault(label, []).append(text)
    assert found["paper"] == ["https://arxiv.org/abs/1502.03167"]
    assert found["area"][0].startswith("nn (")
    assert any(text.startswith("evenly.nn.BatchNorm(num_features: int, eps: float = 1e-05") for text in found["object"])
    assert any(text.startswith("Batch normalization of inputs") for text in found["object"])
    assert found["run it"] == ["evenly claim batch-normalization"]


def test_show_planned_and_unknown():
    planned = run("show", "xmen").stdout
    assert "object\tnone yet" in planned
    assert "claim\tnone yet" in planned
    assert "run it" not in planned
    assert "did you mean 'layer-normalization'" in run("show", "layernormalization", code=2).stderr


def test_show_json():
    facts = json.loads(run("show", "layer-normalization", "--json").stdout)
    assert facts["id"] == "layer-normalization"
    assert "evenly.nn.LayerNormLSTM" in [entry["name"] for entry in facts["objects"]]


def test_doctor():
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["cpu"]["threads"] >= 1
    names = {backend["name"] for backend in facts["backends"]}
    assert "reference" in names
    assert {row["backend"] for row in facts["operators"]} <= names
    assert {row["operator"] for row in facts["operators"]} >= {"batch norm", "layer norm", "group norm"}
    text = run("doctor").stdout
    assert "operator\tbatch norm on cpu: float32 by" in text
    assert f"torch\t{facts['versions']['torch']}" in text
    assert f"CPU kernels\t{facts['kernels']['cpu']}" in text


def test_doctor_reports_what_an_extra_would_add(monkeypatch):
    monkeypatch.setitem(doctor.EXTRAS, "future", ("fly", ("no-such-package-here",)))
    text = run("doctor").stdout
    assert "extra future\tfly (missing no-such-package-here; pip install 'evenly[future]')" in text


def test_doctor_knows_every_extra():
    if sys.version_info < (3, 11):
        import tomli as tomllib
    else:
        import tomllib
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    for extra, requirements in project["optional-dependencies"].items():
        names = [re.split(r"[\[>=;]", name)[0].strip() for name in requirements if not name.startswith("evenly")]
        assert list(doctor.EXTRAS[extra][1]) == names


def test_on_a_terminal_a_table_is_drawn(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "interactive", lambda stream=None: True)
    terminal.table(
        ["id", "what"], [("a", "[bold]first[/bold]"), ("b", "second")], title="two rows", styles=["green", ""]
    )
    terminal.pairs("heading", [("label", "a text\nof two lines")])
    drawn = capsys.readouterr().out
    assert "two rows" in drawn
    assert "[bold]first[/bold]" in drawn  # cells are text, not markup
    assert "─" in drawn
    assert "heading" in drawn
    assert "of two lines" in drawn


def test_progress_bar_only_on_a_terminal(monkeypatch):
    with terminal.progress() as report:
        assert report is None
    monkeypatch.setattr(terminal, "interactive", lambda stream=None: True)
    with terminal.progress() as report:
        report("step", 1, 2)
        report("step", 2, 2)


def test_a_ragged_table_is_refused():
    with pytest.raises(ValueError, match="a row has 1 cells; expected 2"):
        terminal.table(["a", "b"], [("x",)])
