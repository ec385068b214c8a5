"""Odd tables and wrong input of an audit: nothing is lost, and what is wrong is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenly.workbench import audit, audit_table
from evenly.workbench.auditing import parse_groups
from evenly.workbench.auditing.groups import groupings


@st.composite
def tables(draw: st.DrawFn) -> dict[str, list]:
    n = draw(st.integers(1, 30))
    column = lambda values: draw(st.lists(st.sampled_from(values), min_size=n, max_size=n))  # noqa: E731
    return {
        "y": column(draw(st.sampled_from([[0], [1], [0, 1]]))),
        "score": column([0.0, 0.05, 0.5, 0.9999, 1.0]),
        "a": column(draw(st.sampled_from([["x"], ["x", None], ["x", "y", "z"]]))),
        "b": column(draw(st.sampled_from([[None], [1, 2], [float("nan"), 0.25, 7.5]]))),
    }


@settings(max_examples=30)
@given(tables(), st.integers(1, 12))
def test_no_row_is_lost_in_odd_tables(table: dict[str, list], min_group: int) -> None:
    n = len(table["y"])
    found = audit(
        table["y"],
        y_score=table["score"],
        groups={"a": table["a"], "b": table["b"]},
        min_group=min_group,
        resamples=100,
    )
    assert (found.by_group.groupby("grouping")["rows"].sum() == n).all()
    assert (found.by_intersection.groupby("grouping")["rows"].sum() == n).all()
    assert (found.table["small"] == (found.table["rows"] < min_group)).all()
    shares = found.table[found.table["measure"].isin(["accuracy", "tpr", "fpr", "precision", "selection_rate"])]
    defined = shares[shares["count"] > 0]
    assert ((defined["low"] <= defined["value"]) & (defined["value"] <= defined["high"])).all()
    assert ((defined["low"] >= 0) & (defined["high"] <= 1)).all()
    assert shares[shares["count"] == 0]["value"].isna().all()
    missing = [value for value in table["a"] if value is None]
    if missing:
        assert found.by_group.loc["a=missing", "rows"] == len(missing)
    json.dumps(found.to_dict(), allow_nan=False)
    assert found.finding.endswith(".")


@settings(max_examples=40)
@given(
    st.lists(st.one_of(st.integers(-5, 40).map(float), st.just(float("nan"))), min_size=1, max_size=40),
    st.one_of(
        st.sampled_from(["q2", "q4"]), st.lists(st.integers(0, 30), min_size=1, max_size=4, unique=True).map(sorted)
    ),
)
def test_every_number_falls_into_the_bin_that_is_named(values: list[float], bins: object) -> None:
    (one,) = groupings({"age": values}, {"age": bins}, 2)
    for value, code in zip(values, one.codes, strict=True):
        name = one.values[code][0]
        if value != value:
            assert name == "missing"
        elif name.startswith("<"):
            assert value < float(name[1:])
        elif name.endswith("+"):
            assert value >= float(name[:-1])
        elif name != "all":
            low, _, high = name.partition("-")
            assert float(low) <= value <= float(high or low)


def test_bins() -> None:
    assert parse_groups("sex, age:25,45 ,65,race") == {"sex": None, "age": (25.0, 45.0, 65.0), "race": None}
    assert parse_groups("a:b:q3") == {"a:b": "q3"}
    for text, message in (
        ("sex,,race", "empty name"),
        ("sex,sex", "'sex' twice"),
        ("age:old", "neither edges"),
        ("age:q1", "neither edges"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_groups(text)
    (one,) = groupings({"x": [0.1, 0.5, 0.9]}, {"x": (0.5,)}, 1)
    assert one.labels == ("x<0.5", "x=0.5+")
    (one,) = groupings({"x": [10, 25, 26, 44, 45, 65]}, {"x": (25, 26, 45, 65)}, 1)
    assert one.labels == ("x<25", "x=25", "x=26-44", "x=45-64", "x=65+")
    assert list(one.codes) == [0, 1, 2, 2, 3, 4]
    (one,) = groupings({"x": list(range(100))}, {}, 1)
    assert np.bincount(one.codes).tolist() == [25, 25, 25, 25]
    assert "quarters" in one.notes[0]
    (one,) = groupings({"x": [0, 1, 1, 0]}, {}, 1)
    assert one.labels == ("x=0", "x=1")
    with pytest.raises(ValueError, match="holds no numbers"):
        groupings({"x": ["a", "b"]}, {"x": (1,)}, 1)
    with pytest.raises(ValueError, match="not increasing"):
        groupings({"x": [1, 2]}, {"x": (3, 1)}, 1)
    with pytest.raises(ValueError, match="201 different values"):
        groupings({"x": [f"id{i}" for i in range(201)]}, {}, 1)
    with pytest.raises(ValueError, match="print alike"):
        groupings({"x": pd.Series([1, "1"], dtype=object)}, {}, 1)
    with pytest.raises(ValueError, match="not among the group columns"):
        groupings({"x": [1, 2]}, {"y": (1,)}, 1)


def test_groups_without_rows_are_shown() -> None:
    found = audit([0, 1, 1], [0, 1, 0], groups={"age": [30, 31, 50]}, bins={"age": (20, 40)}, resamples=100)
    assert found.by_group.loc["age<20", "rows"] == 0
    assert np.isnan(found.by_group.loc["age<20", "accuracy"])
    kind = pd.Categorical(["a", "a", "b"], categories=["a", "b", "c"])
    found = audit([0, 1, 1], [0, 1, 0], groups={"kind": kind, "age": [1, 1, 2]}, resamples=100)
    assert found.by_group.loc["kind=c", "rows"] == 0
    assert "combinations of kind × age have no rows" in " ".join(found.notes)


def test_a_missing_value_beside_the_word() -> None:
    found = audit([0, 1, 1], [0, 1, 0], groups={"a": ["missing", None, "x"]}, resamples=100)
    assert set(found.by_group.index) == {"a=missing", "a=missing (no value)", "a=x"}


def test_labels_and_positive() -> None:
    groups = {"g": list("aabb")}
    text = ["no", "yes", "yes", "no"]
    with pytest.raises(ValueError, match=r"which of the labels \['no', 'yes'\] is the positive one"):
        audit(text, text, groups=groups)
    assert audit(text, text, groups=groups, positive="no", resamples=100).overall["prevalence"] == 0.5
    with pytest.raises(ValueError, match="positive='maybe' is not among"):
        audit(text, text, groups=groups, positive="maybe")
    with pytest.raises(ValueError, match="different types"):
        audit(text, [0, 1, 1, 0], groups=groups, positive="yes", task="binary")
    with pytest.raises(ValueError, match="4 labels together"):
        audit(text, ["n", "y", "y", "n"], groups=groups, positive="yes")
    assert (
        audit([True, False], [True, True], groups={"g": "ab"}.fromkeys("g", list("ab")), resamples=100).task == "binary"
    )
    signs = audit([-1, 1, 1, -1], [1, 1, 1, -1], groups=groups, resamples=100)
    assert signs.settings["positive"] == "1"
    with pytest.raises(ValueError, match="only label is 'a'"):
        audit(["a", "a"], ["a", "a"], groups={"g": [1, 2]})
    assert audit(["a", "a"], ["a", "a"], groups={"g": [1, 2]}, positive="a", resamples=100).overall["tpr"] == 1.0
    assert audit([0, 0], [0, 0], groups={"g": [1, 2]}, resamples=100).overall["selection_rate"] == 0.0
    score = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4]])
    found = audit(text, y_score=score, classes=["yes", "no"], positive="yes", groups=groups, resamples=100)
    assert found.overall["accuracy"] == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_score": [0.1, float("nan"), 0.2, 0.3]}, r"y_score has 1 missing or infinite values \(first at rows 1\)"),
        ({"y_score": [0.1, float("inf"), 0.2, 0.3]}, "y_score has 1 missing or infinite"),
        ({"y_score": [0.1, 0.2]}, r"y_score has shape \(2,\), expected \(4,\)"),
        ({"y_score": ["a", "b", "c", "d"]}, "no number"),
        ({"y_score": np.ones((4, 3)) / 3}, "y_score has 3 columns for the 2 classes"),
        ({"y_score": np.full((4, 2), 0.4)}, "no probabilities"),
        ({"y_true": [0, 1, None, 1]}, "y_true has 1 missing values"),
        ({"y_true": []}, "no rows"),
        ({"y_pred": [0, 1, 1]}, "y_pred has 3 rows and y_true has 4"),
        ({"y_pred": None}, "give y_pred"),
        ({"y_pred": np.zeros((4, 2))}, "one value a row"),
        ({"groups": {}}, "no columns"),
        ({"groups": {"g": [1, 2]}}, r"'g' has shape \(2,\), expected \(4,\)"),
        ({"intersections": 0}, "intersections=0"),
        ({"min_group": 0}, "min_group=0"),
        ({"confidence": 1.0}, "confidence=1.0"),
        ({"resamples": 10}, "resamples=10"),
        ({"rank_by": "auc"}, "rank_by='auc' is not measured here; measured are prevalence, accuracy"),
        ({"task": "ranking"}, "task='ranking' is unknown"),
        ({"threshold": 0.3}, "goes with y_score"),
        ({"threshold": 0.3, "y_score": [0.1, 0.2, 0.3, 0.4]}, "not both"),
        (
            {"y_true": [0.5, 1.5, 2.5, 3.5], "y_pred": None, "y_score": [0.1, 0.2, 0.3, 0.4]},
            "give y_pred and no y_score",
        ),
        ({"task": "regression", "y_true": list("abcd")}, "a regression needs numbers"),
        ({"classes": [0, 2], "positive": 2}, "not among the classes"),
        ({"classes": [0]}, "at least two"),
    ],
)
def test_what_is_wrong_is_said(change: dict, message: str) -> None:
    good = {"y_true": [0, 1, 0, 1], "y_pred": [0, 1, 1, 1], "groups": {"g": list("aabb")}}
    audit(**good, resamples=100)
    with pytest.raises(ValueError, match=message):
        audit(**(good | change))


def test_tensors_series_and_arrays() -> None:
    y, pred = torch.tensor([0, 1, 1, 0]), torch.tensor([[0], [1], [0], [0]])
    table = audit(y, pred, groups=np.array(list("aabb")), resamples=100).by_group
    assert table["accuracy"].to_dict() == {"group=b": 0.5, "group=a": 1.0}
    shuffled = pd.Series([0, 1, 1, 0], index=[7, 3, 3, 1])  # rows go by position, not by index
    frame = pd.DataFrame({"group": list("aabb")}, index=[9, 8, 7, 6])
    assert audit(shuffled, pred.numpy(), groups=frame, resamples=100).by_group.equals(table)


def test_tables_say_which_column_is_wrong() -> None:
    table = pd.DataFrame({"y": [0, 1], "p": [0, 1], "g": ["a", "b"]})
    good = {"target": "y", "groups": "g", "prediction": "p"}
    audit_table(table, **good, resamples=100)
    for change, message in (
        ({"target": "z"}, "no target 'z'; their columns are: y, p, g"),
        ({"groups": "g,h"}, "no group column 'h'"),
        ({"prediction": "q"}, "no prediction 'q'"),
        ({"prediction": None}, "give a model, or columns"),
        ({"model": object()}, "not both"),
        ({"prediction": None, "model": object()}, "something with predict"),
        ({"target": None}, "--target"),
        ({"features": ["k"]}, "no feature 'k'"),
    ):
        with pytest.raises(ValueError, match=message):
            audit_table(table, **(good | change))


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = audit([0, 1, 0, 1], [0, 1, 1, 1], groups={"g": list("aabb")}, resamples=100)
    file = tmp_path / "out.json"
    file.write_text("before")

    def stop(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(OSError, match="no space"):
        found.to_json(file)
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]
