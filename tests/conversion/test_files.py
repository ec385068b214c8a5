"""The command line and its files."""

from __future__ import annotations

import json
import pickle
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from evenly.cli import app
from evenly.conversion import InputFiles, load_converted, load_weights

NETS = """
import torch
from torch import nn

def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3),
                         nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "convertible_nets.py").write_text(NETS)
    (tmp_path / "inputs").mkdir()
    np.save(tmp_path / "inputs" / "a.npy", np.random.default_rng(0).normal(size=(12, 3, 10, 10)).astype(np.float32))
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("convertible_nets", None)
    import convertible_nets

    model = convertible_nets.small()
    model(torch.randn(8, 3, 10, 10))
    save_file(model.state_dict(), tmp_path / "in.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path, convertible_nets


def call(*arguments: str):
    return CliRunner().invoke(app, ["convert", "--model", "convertible_nets:small", *arguments])


@pytest.mark.parametrize(("to", "more"), [("group", ["--groups", "2"]), ("rms", []), ("none", []), ("folded", [])])
def test_round_trip(place, to, more):
    folder, nets = place
    result = call(
        "--weights", "in.safetensors", "--to", to, "--calibrate", "inputs", "--out", "out.safetensors",
        "--report", "report.json", "--refine", "2", *more,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "BatchNorm2d" in result.output
    report = json.loads((folder / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["1", "4"]
    model = load_converted(nets.small(), "out.safetensors").eval()
    x = torch.from_numpy(np.load("inputs/a.npy"))
    original = nets.small()
    original.load_state_dict(load_file("in.safetensors"))
    with torch.no_grad():
        cosine = torch.cosine_similarity(model(x), original.eval()(x)).mean().item()
    assert cosine == pytest.approx(report["agreement"]["cosine"], abs=1e-4)
    assert not list(folder.glob(".out*"))


def test_only_and_torch_files(place):
    folder, nets = place
    torch.save({"state_dict": nets.small().state_dict()}, folder / "in.pt")
    result = call("--weights", "in.pt", "--to", "layer", "--only", "4", "--out", "out.safetensors")
    assert result.exit_code == 0, result.output
    assert isinstance(load_converted(nets.small(), "out.safetensors")[1], nn.BatchNorm2d)


class Evil:
    def __reduce__(self):
        return (Path("pwned").touch, ())


def test_untrusted_files_are_not_unpickled(place):
    folder, _ = place
    (folder / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"state_dict": Evil()}, folder / "evil2.pt")
    for file in ("evil.pt", "evil2.pt"):
        result = call("--weights", file, "--to", "group", "--out", "out.safetensors")
        assert result.exit_code == 2
        assert "not loaded" in result.output
    np.save(folder / "inputs" / "a.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    result = call("--calibrate", "inputs", "--to", "group", "--out", "out.safetensors")
    assert result.exit_code == 2
    assert "not a plain array" in result.output
    assert not (folder / "pwned").exists()
    assert not (folder / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "grop"], "Did you mean"),
        (["--to", "group", "--groups", "3"], "does not divide"),
        (["--to", "group", "--weights", "absent.safetensors"], "no file"),
        (["--to", "group", "--calibrate", "absent"], "no file or folder"),
        (["--to", "group", "--refine", "2"], "needs data"),
        (["--to", "group", "--only", "9"], "matches no normalization layer"),
    ],
)
def test_errors_are_one_message(place, arguments, message):
    result = call("--out", "out.safetensors", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_images(tmp_path):
    (tmp_path / "deep").mkdir()
    for i in range(3):
        Image.fromarray(np.full((6, 5, 3), 51 * i, dtype=np.uint8)).save(tmp_path / "deep" / f"{i}.png")
    (batch, last) = InputFiles(tmp_path, batch_size=2, mean=(0.2,), std=(0.5,))
    assert batch.shape == (2, 3, 6, 5)
    assert torch.allclose(batch[1], torch.zeros(3, 6, 5), atol=1e-6)
    assert torch.allclose(last, torch.full((1, 3, 6, 5), 0.4), atol=1e-6)
    Image.new("L", (8, 8)).save(tmp_path / "z.png")
    with pytest.raises(ValueError, match="--size"):
        list(InputFiles(tmp_path))
    assert next(iter(InputFiles(tmp_path, size=(4, 4), gray=True))).shape == (4, 1, 4, 4)
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(ValueError, match="both images and arrays"):
        InputFiles(tmp_path)


def test_named_inputs_and_damaged_files(tmp_path):
    save_file({"x": torch.zeros(2, 3), "mask": torch.ones(2)}, tmp_path / "a.safetensors")
    assert set(next(iter(InputFiles(tmp_path)))) == {"x", "mask"}
    (tmp_path / "b.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_weights(tmp_path / "b.safetensors")


def test_benchmark_smoke(tmp_path):
    script = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "convert.py"))
    arguments = ["--tiny", "--nets", "resnet", "--targets", "instance", "folded", "--no-sentences", "--json"]
    result = script["main"]([*arguments, str(tmp_path / "out.json")])
    assert {row["to"] for row in result["images"]} == {"instance", "folded"}
    folded = next(row for row in result["images"] if row["to"] == "folded")
    assert folded["plain"] == folded["original"]
