"""``evenly audit``: tables, models, image folders, what it refuses, what it prints."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import Result
from PIL import Image
from safetensors.torch import save_file
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

from evenly import terminal
from evenly.cli import app
from evenly.workbench.auditing import audit_table, load_model, read_data

FACTORIES = """
import numpy as np, pandas as pd, torch
from sklearn.linear_model import LogisticRegression
def classifier():
    table = pd.read_csv("people.csv")
    return LogisticRegression().fit(table[["x1", "x2"]], table["paid"])
def network():
    return torch.nn.Sequential(torch.nn.Linear(2, 1))
def wide():
    return torch.nn.Sequential(torch.nn.Linear(2, 2))
def pixels():
    class Brightness(torch.nn.Module):
        def forward(self, x):
            bright = x.mean((1, 2, 3))
            return torch.stack([0.5 - bright, bright - 0.5, torch.full_like(bright, -9.0)], 1)
    return Brightness()
def number():
    return 3
"""


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    n = 300
    sex = rng.choice(["f", "m"], n)
    age = rng.integers(18, 80, n)
    x1, x2 = rng.normal(size=(2, n))
    paid = np.where(x1 + 0.5 * x2 + 0.5 * (sex == "m") + rng.normal(0, 0.7, n) > 0, "yes", "no")
    score = 1 / (1 + np.exp(-2 * x1))
    frame = pd.DataFrame({"x1": x1, "x2": x2, "age": age, "sex": sex, "paid": paid, "score": score})
    frame["region"] = np.where(np.arange(n) % 11 == 0, None, rng.choice(["n", "s"], n))
    frame["guess"] = np.where(score >= 0.5, "yes", "no")
    frame["amount"] = 3 * x1 + rng.normal(size=n)
    return frame


@pytest.fixture
def folder(tmp_path: Path, table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    import sys

    table.to_csv(tmp_path / "people.csv", index=False)
    (tmp_path / "audit_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("audit_factories", None)
    yield tmp_path
    sys.modules.pop("audit_factories", None)


def run(*arguments: str, fails: bool = False) -> Result:
    result = CliRunner().invoke(app, ["audit", "--resamples", "100", *arguments])
    assert result.exit_code == (2 if fails else 0), result.output
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def numbers(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["group"], row["measure"]): row for row in json.loads(path.read_text())["table"]}


def test_columns_of_predictions_need_no_model(folder: Path, table: pd.DataFrame) -> None:
    result = run(
        *("--data", "people.csv", "--target", "paid", "--groups", "sex,region,age:25,45,65", "--prediction", "guess"),
        *("--score", "score", "--positive", "yes", "--out", "r.html", "--json", "r.json", "--min-group", "20"),
    )
    lines = result.stdout.splitlines()
    assert lines[0].split("\t")[:3] == ["group", "rows", "accuracy"]
    assert lines[1].startswith("all rows\t300\t")
    assert len(lines[0].split("\t")) == len(lines[1].split("\t"))
    found = numbers(folder / "r.json")
    f = table[table["sex"] == "f"]
    assert found["sex=f", "accuracy"]["value"] == pytest.approx((f["paid"] == f["guess"]).mean())
    assert found["sex=f", "brier"]["value"] == pytest.approx(((f["paid"] == "yes") - f["score"]).pow(2).mean())
    assert found["region=missing", "accuracy"]["rows"] == table["region"].isna().sum()
    middle = table["age"].between(25, 44)
    assert found["age=25-44", "accuracy"]["rows"] == middle.sum()
    assert ("sex=f, age=25-44", "tpr") in found
    assert any(line.startswith("sex=f, age=25-44\t") for line in lines)
    html = (folder / "r.html").read_text()
    assert "evenly audit" in html or "pytest" in html  # the command line of this process
    settings = json.loads((folder / "r.json").read_text())["settings"]
    assert (settings["min_group"], settings["positive"], settings["name"]) == (20, "yes", "people.csv")


def test_parquet(folder: Path, table: pd.DataFrame) -> None:
    pytest.importorskip("pyarrow")
    table.to_parquet("people.parquet")
    given = ("--target", "paid", "--groups", "sex,region", "--prediction", "guess", "--positive", "yes")
    one, two = run("--data", "people.parquet", *given), run("--data", "people.csv", *given)
    assert one.stdout == two.stdout


def test_an_estimator_from_a_factory(folder: Path, table: pd.DataFrame) -> None:
    run(
        *("--data", "people.csv", "--target", "paid", "--groups", "sex", "--model", "audit_factories:classifier"),
        *("--positive", "no", "--json", "r.json"),
    )
    model = LogisticRegression().fit(table[["x1", "x2"]], table["paid"])
    m = table[table["sex"] == "m"]
    found = numbers(folder / "r.json")
    assert found["sex=m", "accuracy"]["value"] == pytest.approx(model.score(m[["x1", "x2"]], m["paid"]), rel=1e-12)
    s = model.predict_proba(m[["x1", "x2"]])[:, 0]
    assert found["sex=m", "calibration"]["value"] == pytest.approx(s.mean() - (m["paid"] == "no").mean(), abs=1e-12)
    run(
        *("--data", "people.csv", "--target", "paid", "--groups", "sex", "--model", "audit_factories:classifier"),
        *("--positive", "yes", "--threshold", "0.8", "--json", "r.json"),
    )
    assert numbers(folder / "r.json")["sex=m", "selection_rate"]["value"] == pytest.approx((1 - s >= 0.8).mean())


def test_a_skops_file(folder: Path, table: pd.DataFrame) -> None:
    skops = pytest.importorskip("skops.io")
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(table[["x1", "x2"]], table["paid"])
    skops.dump(model, "model.skops")
    given = ("--data", "people.csv", "--target", "paid", "--groups", "sex", "--positive", "yes")
    run(*given, "--model", "model.skops", "--json", "r.json")
    expected = model.score(table[["x1", "x2"]], table["paid"])
    assert numbers(folder / "r.json")["all rows", "accuracy"]["value"] == pytest.approx(expected, rel=1e-12)
    skops.dump({"model": model, "other": Path("x")}, "odd.skops")
    result = run(*given, "--model", "odd.skops", fails=True)
    assert "not known to be safe: pathlib" in result.output
    assert "--trust pathlib" in result.output


class Bomb:
    opened = False

    def __reduce__(self) -> Any:
        return setattr, (Bomb, "opened", True)


def test_a_pickle_is_not_opened_unless_trusted(folder: Path, table: pd.DataFrame) -> None:
    given = ("--data", "people.csv", "--target", "paid", "--groups", "sex", "--positive", "yes")
    for name in ("bomb.pkl", "bomb.pickle", "bomb.joblib"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
        result = run(*given, "--model", name, fails=True)
        assert "can run any code" in result.output
    assert not Bomb.opened
    model = LogisticRegression().fit(table[["x1", "x2"]], table["paid"])
    (folder / "mine.pkl").write_bytes(pickle.dumps(model))
    result = run(*given, "--model", "mine.pkl", "--trust-pickle")
    assert f"{100 * model.score(table[['x1', 'x2']], table['paid']):.1f}" in result.stdout.splitlines()[1]


@pytest.mark.parametrize("factory", ["network", "wide"])
def test_a_network_on_a_table(folder: Path, table: pd.DataFrame, factory: str) -> None:
    outputs = 1 if factory == "network" else 2
    weight = torch.tensor([[2.0, 1.0]]) if outputs == 1 else torch.tensor([[-1.0, -0.5], [1.0, 0.5]])
    save_file({"0.weight": weight, "0.bias": torch.zeros(outputs)}, "w.safetensors")
    given = ("--data", "people.csv", "--target", "paid", "--groups", "sex", "--model", f"audit_factories:{factory}")
    given = (*given, "--positive", "yes", "--weights", "w.safetensors")
    run(*given, "--features", "x1,x2", "--json", "r.json")
    logit = 2 * table["x1"] + table["x2"]
    yes = table["paid"] == "yes"
    found = numbers(folder / "r.json")
    assert found["all rows", "accuracy"]["value"] == pytest.approx(((logit > 0) == yes).mean())
    s = 1 / (1 + np.exp(-logit))
    assert found["all rows", "calibration"]["value"] == pytest.approx(s.mean() - yes.mean(), abs=1e-6)
    assert "these columns hold none: sex" in run(*given, fails=True).output
    if outputs == 2:
        run(*given, "--features", "x1,x2", "--classes", "yes,no", "--json", "r.json")
        turned = numbers(folder / "r.json")["all rows", "accuracy"]["value"]
        assert turned == pytest.approx(1 - found["all rows", "accuracy"]["value"])


def test_a_converted_network(folder: Path, table: pd.DataFrame) -> None:
    from torch import nn

    from evenly.conversion import convert, save_converted

    (folder / "audit_normed.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), "
        "nn.Linear(8, 1))\n"
    )
    original = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    original(torch.randn(50, 2))
    original.eval()
    changed, report = convert(original, "folded")
    save_converted(changed, original, report, "folded.safetensors")
    model = load_model("audit_normed:build", "folded.safetensors")
    x = torch.randn(5, 2)
    torch.testing.assert_close(model.eval()(x), original(x))


def test_a_regression(folder: Path, table: pd.DataFrame) -> None:
    model = LinearRegression().fit(table[["x1"]], table["amount"])
    found = audit_table(table, target="amount", groups="sex,age:q3", model=model, resamples=100)
    assert found.task == "regression"
    error = model.predict(table[["x1"]]) - table["amount"]
    assert found.overall["rmse"] == pytest.approx(float(np.sqrt((error**2).mean())))
    run(*("--data", "people.csv", "--target", "amount", "--groups", "sex", "--prediction", "score", "--out", "r.html"))
    assert "Mean absolute error" in (folder / "r.html").read_text()


def test_a_folder_of_images(folder: Path) -> None:
    rows = []
    for index in range(40):
        kind, camera = ("day", "night")[index % 2], ("old", "new")[index // 20]
        bright = 200 if kind == "day" else 40
        if camera == "old" and index % 4 == 0:
            bright = 90  # a dark day
        place = folder / "photos" / kind
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 6, 3), bright, np.uint8)).save(place / f"{index:02d}.png")
        if index < 38:
            rows.append({"file": f"{kind}/{index:02d}.png", "camera": camera})
    pd.DataFrame(rows).to_csv(folder / "photos" / "groups.csv", index=False)
    given = ("--groups", "camera", "--model", "audit_factories:pixels", "--min-group", "5")
    run("--data", "folder:photos?size=6x6", *given, "--classes", "night,day,dusk", "--json", "r.json")
    found = numbers(folder / "r.json")
    assert found["camera=old", "accuracy"]["value"] == 0.75
    assert found["camera=new", "accuracy"]["value"] == 1.0
    assert found["camera=missing", "accuracy"]["rows"] == 2
    assert json.loads((folder / "r.json").read_text())["task"] == "multiclass"
    assert found["camera=old", "recall:day"]["value"] == 0.5
    wrong = run("--data", "folder:photos", *given, fails=True)
    assert "3 outputs and the target 'class' has 2 values" in wrong.output
    pd.DataFrame([*rows, {"file": "day/99.png", "camera": "x"}]).to_csv("other.csv", index=False)
    wrong = run("--data", "folder:photos?groups=other.csv", *given, fails=True)
    assert "1 images that are not in photos, such as 'day/99.png'" in wrong.output
    assert "unknown option colour" in run("--data", "folder:photos?colour=1", *given, fails=True).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--groups", "sex,height"], "no group column 'height'"),
        (["--groups", "age:young"], "neither edges"),
        (["--model", "audit_factories:network"], "not both"),
        (["--model", "nothing:here"], "No module named 'nothing'"),
        (["--target", "paid", "--positive", "perhaps"], "positive='perhaps'"),
        (["--data", "absent.csv"], "absent.csv does not exist"),
        (["--rank-by", "charm"], "rank_by='charm'"),
    ],
)
def test_what_is_wrong_ends_with_its_message(folder: Path, arguments: list[str], message: str) -> None:
    base = {"--data": "people.csv", "--target": "paid", "--groups": "sex", "--prediction": "guess", "--positive": "yes"}
    base |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    result = run(*(part for pair in base.items() for part in pair), fails=True)
    assert message in result.output
    assert "Traceback" not in result.output


def test_models_that_are_none(folder: Path) -> None:
    for spec, message in (
        ("audit_factories:number", "number gave a int"),
        ("audit_factories:absent", "no callable named 'absent'"),
        ("weights.pt", "neither module:factory nor a .skops file"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(spec, "w.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no file absent\.skops"):
        load_model("absent.skops")


def test_adult_and_compas(shared_data: Path) -> None:
    adult = read_data(f"adult:{shared_data / 'adult'}")
    assert (len(adult.frame), adult.target) == (16281, "target")
    compas = read_data(f"compas:{shared_data / 'compas'}")
    # What COMPAS's own score says, from medium risk on: ProPublica's table of false positive rates.
    found = audit_table(compas, groups="race,sex", score="decile_score", threshold=5, resamples=100)
    by_group = found.by_group
    assert by_group.loc["race=African-American", "fpr"] == pytest.approx(0.4234, abs=2e-4)
    assert by_group.loc["race=Caucasian", "fpr"] == pytest.approx(0.2201, abs=2e-4)
    assert {"fpr", "selection_rate"} <= set(by_group.loc["race=African-American", "differs"])
    assert "fpr" in by_group.loc["race=Caucasian", "differs"]


SNAPSHOT = """\
Audit of toy, in %, worst accuracy first, with its 95 % interval

 group           rows               accuracy   selected      TPR      FPR   precision
 ────────────────────────────────────────────────────────────────────────────────────────────
 all rows         204      72.1 [65.5, 77.8]       72.1     94.1     50.0        65.3
 where=south      100     45.0 [35.6, 54.8]*      95.0*     90.0   100.0*       47.4*
 where=north      100     98.0 [93.0, 99.4]*      50.0*     98.0     2.0*       98.0*
 where=missing      4    100.0 [51.0, 100.0]       50.0    100.0      0.0       100.0   small

What it says
finding  Accuracy is lowest for where=south: 45.0 % (95 % interval 35.6 to 54.8) of 100 rows, against 98.1 % for the
         rest. Selection rates go from 50.0 % (where=north) to 95.0 % (where=south). Of 3 groups, 2 differ from the rest
         in at least one measure (Holm over 15 tests, 5 %); 1 has fewer than 30 rows.
*        differs from the rest (all other rows): Holm-adjusted p ≤ 0.05
small    fewer than 30 rows: shown after the others
"""


def test_the_terminal_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from evenly.workbench import audit

    y = np.arange(204) % 2
    pred = np.where((np.arange(204) < 100) & (np.arange(204) % 20 != 1), 1, y)
    pred[[1, 21, 41, 61, 81]] = 0
    pred[[150, 151]] = 1 - y[[150, 151]]
    where = ["south"] * 100 + ["north"] * 100 + [None] * 4
    found = audit(y, pred, groups={"where": where}, name="toy", resamples=100)
    monkeypatch.setattr(terminal, "interactive", lambda stream=None: True)
    monkeypatch.setenv("COLUMNS", "120")
    found.print()
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert printed == SNAPSHOT.rstrip()


@pytest.mark.parametrize("width", [60, 80, 100])
def test_no_number_is_cut_on_a_narrow_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], table: pd.DataFrame
) -> None:
    long = table.assign(background=np.where(table["sex"] == "f", "a long name of a group", "another long name"))
    found = audit_table(
        long, target="paid", groups="background,region", score="score", positive="yes", resamples=100, name="toy"
    )
    monkeypatch.setattr(terminal, "interactive", lambda stream=None: True)
    monkeypatch.setenv("COLUMNS", str(width))
    found.print()
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width
    assert "…" not in printed
    row = found.by_group.iloc[0]
    assert f"{100 * row['accuracy']:.1f} [{100 * row['accuracy_low']:.1f}, {100 * row['accuracy_high']:.1f}]" in printed
    left_out = " ".join(printed.split()).partition("left out for want of width: ")[2].partition(";")[0].split(", ")
    for measure, short in (("selection_rate", "selected"), ("tpr", "TPR"), ("precision", "precision")):
        assert (short in left_out) != (f"{100 * row[measure]:.1f}" in printed), measure
