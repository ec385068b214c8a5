"""Loaders on small files written here, on scikit-learn's data, and on real files where they are present."""

from __future__ import annotations

import dataclasses
import gzip
import struct
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_breast_cancer

from evenly.data import Dataset, load, match_classes, read_idx


def _idx(array: np.ndarray) -> bytes:
    code = {"uint8": 8, "int8": 9, "int16": 0x0B, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}[array.dtype.name]
    head = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def _write_mnist(folder: Path, split: str, n: int, *, pack: bool = False, mark: str = "-", labels=None) -> tuple:
    folder.mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng(len(split)).integers(0, 256, (n, 6, 5), dtype=np.uint8)
    y = (np.arange(n) % 3 if labels is None else np.asarray(labels)).astype(np.uint8)
    for what, data, dims in (("images", x, 3), ("labels", y, 1)):
        raw = _idx(data)
        name = f"{split}-{what}{mark}idx{dims}-ubyte" + (".gz" if pack else "")
        (folder / name).write_bytes(gzip.compress(raw) if pack else raw)
    return x, y


def _check(data: Dataset) -> None:
    for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y)):
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        assert len(x) == len(y) > 0
        assert tuple(x.shape[1:]) == data.input_shape
        assert torch.isfinite(x).all()
        assert 0 <= y.min() <= y.max() < data.num_classes
        if data.kind == "image":
            assert 0 <= x.min() <= x.max() <= 1
    assert len(torch.unique(data.train_y)) == data.num_classes


# --------------------------------------------------------------------------------------------------- scikit-learn


@pytest.mark.parametrize(("spec", "shape"), [("digits", (1, 8, 8)), ("breast_cancer", (30,)), ("wine", (13,))])
def test_bundled(spec, shape):
    data = load(spec)
    _check(data)
    assert data.input_shape == shape
    again, other = load(spec), load(spec, seed=1)
    assert torch.equal(data.train_x, again.train_x)
    assert torch.equal(data.test_y, again.test_y)
    assert not torch.equal(data.test_x, other.test_x)
    share = [torch.bincount(y).double() / len(y) for y in (data.train_y, data.test_y)]
    assert (share[0] - share[1]).abs().max() < 0.03  # stratified


def test_tabular_is_standardised_with_the_training_split():
    data = load("breast_cancer", test_fraction=0.3)
    assert torch.allclose(data.train_x.mean(dim=0), torch.zeros(30), atol=1e-5)
    assert torch.allclose(data.train_x.std(dim=0, correction=0), torch.ones(30), atol=1e-4)
    raw = torch.cat([data.train_x, data.test_x]) * data.std + data.mean
    assert torch.allclose(raw.sum(dim=0), torch.from_numpy(load_breast_cancer().data.sum(axis=0)), rtol=1e-5)
    assert data.class_names == ("malignant", "benign")
    assert data.feature_names[0] == "mean radius"
    assert data.normalize(data.test_x) is data.test_x


def test_table_with_large_and_constant_columns(tmp_path):
    n = 40
    frame = pd.DataFrame({"time": 1.7e9 + np.arange(n), "same": 123456789.1, "y": [0, 1] * (n // 2)})
    frame.to_csv(tmp_path / "t.csv", index=False)
    data = load(f"csv:{tmp_path / 't.csv'}:y")
    assert data.train_x[:, 0].mean().abs() < 1e-5
    assert data.train_x[:, 0].std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert data.train_x[:, 1].abs().max() < 1e-6
    assert data.test_x[:, 1].abs().max() < 1e-6


def test_images_are_normalized_for_the_model():
    data = load("digits")
    z = data.normalize(data.train_x)
    assert z.mean().abs() < 1e-5
    assert z.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert data.mean.shape == data.std.shape == (1,)


def test_subset_is_stratified():
    data = load("digits")
    part = data.subset(train=100, test=50, seed=3)
    assert torch.bincount(part.train_y).min() >= 9
    assert len(part.test_y) == len(torch.unique(part.test_x, dim=0)) == 50
    assert len(data.subset(test=359).test_y) == 359
    assert torch.equal(part.mean, data.mean)
    assert data.subset(train=10**6) is data
    with pytest.raises(ValueError, match="cannot hold all 10 classes"):
        data.subset(train=9)


# ------------------------------------------------------------------------------------------------------------ IDX


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(("sub", "mark"), [("", "-"), ("raw", "."), ("MNIST/raw", "-")])
def test_mnist_with_both_splits_keeps_them(tmp_path, pack, sub, mark):
    x, y = _write_mnist(tmp_path / sub, "train", 12, pack=pack, mark=mark)
    tx, ty = _write_mnist(tmp_path / sub, "t10k", 6, pack=pack, mark=mark)
    data = load(f"mnist:{tmp_path}")
    _check(data)
    assert np.array_equal(data.train_x[:, 0].numpy() * np.float32(255), x.astype(np.float32))
    assert data.train_y.tolist() == y.tolist()
    assert np.allclose(data.test_x[:, 0].numpy() * 255, tx)
    assert data.test_y.tolist() == ty.tolist()
    assert data.class_names == ("0", "1", "2")


@pytest.mark.parametrize("split", ["train", "t10k"])
def test_mnist_with_one_split_is_split(tmp_path, split):
    _write_mnist(tmp_path, split, 30, labels=np.arange(30) % 3 + 5)
    data = load(f"mnist:{tmp_path}", seed=4)
    _check(data)
    assert (len(data.train_y), len(data.test_y)) == (24, 6)
    assert data.class_names == ("5", "6", "7")
    assert torch.equal(data.test_x, load(f"mnist:{tmp_path}", seed=4).test_x)


def test_mnist_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(f"mnist:{tmp_path / 'nowhere'}")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"expected train-images-idx3-ubyte.*it holds: notes.txt"):
        load(f"mnist:{tmp_path}")
    _write_mnist(tmp_path, "train", 12)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="has the train images but not the train labels"):
        load(f"mnist:{tmp_path}")
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(_idx(np.zeros(11, np.uint8)))
    with pytest.raises(ValueError, match=r"\(12, 6, 5\).*\(11,\)"):
        load(f"mnist:{tmp_path}")
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(_idx(np.arange(12, dtype=np.uint8) // 11))
    with pytest.raises(ValueError, match=r"at least 2 samples.*'1' \(1\)"):
        load(f"mnist:{tmp_path}")


def test_idx_errors(tmp_path):
    file = tmp_path / "x"
    good = _idx(np.zeros((2, 3), np.uint8))
    for raw, message in (
        (b"", "no IDX file"),
        (b"PNG12345", "no IDX file: it begins with 50 4e 47 31"),
        (good[:6], "ends inside its header"),
        (good[:-1], r"says \(2, 3\) of uint8, 18 bytes, but has 17"),
        (good + b"!", "but has 19"),
        (gzip.compress(good)[:-9], "damaged gzip"),
    ):
        file.write_bytes(raw)
        with pytest.raises(ValueError, match=message):
            read_idx(file)


@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    dtype=st.sampled_from(["uint8", "int8", "int16", "int32", "float32", "float64"]),
    pack=st.booleans(),
)
def test_idx_round_trip(tmp_path_factory, shape, dtype, pack):
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    file = tmp_path_factory.mktemp("idx") / "file"
    file.write_bytes(gzip.compress(_idx(array)) if pack else _idx(array))
    out = read_idx(file)
    assert out.dtype == array.dtype
    assert np.array_equal(out, array)


# -------------------------------------------------------------------------------------------------------- folders


def _save(path: Path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def _write_folder(root: Path, n: int = 5, *, shape=(6, 6, 3), sub: str = "") -> None:
    rng = np.random.default_rng(n)
    for name in ("cat", "dog"):
        for i in range(n):
            _save(root / sub / name / f"{i}.png", rng.integers(0, 256, shape, dtype=np.uint8))


def test_folder_is_split_and_kept_exact(tmp_path):
    _write_folder(tmp_path, 10)
    (tmp_path / "cat" / ".hidden").write_text("x")
    (tmp_path / "cat" / "Thumbs.db").write_text("x")
    data = load(f"folder:{tmp_path}")
    _check(data)
    assert data.class_names == ("cat", "dog")
    assert data.input_shape == (3, 6, 6)
    assert (len(data.train_y), len(data.test_y)) == (16, 4)
    every = torch.cat([data.train_x, data.test_x])
    first = torch.from_numpy(np.asarray(Image.open(tmp_path / "cat" / "0.png")).astype(np.float32) / 255).permute(
        2, 0, 1
    )
    assert (every == first).flatten(1).all(dim=1).any()


@pytest.mark.parametrize("test", ["test", "val", "valid", "validation"])
def test_folder_with_its_own_split(tmp_path, test):
    _write_folder(tmp_path, 4, sub="train")
    _write_folder(tmp_path, 2, sub=test)
    data = load(f"folder:{tmp_path}")
    assert (len(data.train_y), len(data.test_y)) == (8, 4)
    assert data.test_y.tolist() == [0, 0, 1, 1]


def test_folder_gray_is_detected(tmp_path):
    _write_folder(tmp_path / "gray", shape=(6, 6))
    assert load(f"folder:{tmp_path / 'gray'}").input_shape == (1, 6, 6)
    assert load(f"folder:{tmp_path / 'gray'}", channels=3).input_shape == (3, 6, 6)
    rgb = np.repeat(np.arange(36, dtype=np.uint8).reshape(6, 6, 1), 3, axis=2)
    _save(tmp_path / "gray" / "cat" / "colour_mode.png", rgb)
    assert load(f"folder:{tmp_path / 'gray'}").input_shape == (1, 6, 6)  # stored as RGB, but gray
    rgb[0, 0] = (255, 0, 0)
    _save(tmp_path / "gray" / "cat" / "colour.png", rgb)
    assert load(f"folder:{tmp_path / 'gray'}").input_shape == (3, 6, 6)
    assert load(f"folder:{tmp_path / 'gray'}?channels=1").input_shape == (1, 6, 6)


def test_folder_modes_of_images(tmp_path):
    root = tmp_path
    _write_folder(root, 3, shape=(4, 4, 3))
    deep = np.full((4, 4), 65535, np.uint16)
    _save(root / "cat" / "deep.png", deep)
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[..., 0] = 200  # red, but fully transparent
    _save(root / "cat" / "clear.png", clear)
    Image.fromarray(np.full((4, 4), 255, np.uint8)).convert("P").save(root / "dog" / "palette.gif")
    Image.fromarray(np.full((4, 4), 255, np.uint8)).convert("1").save(root / "dog" / "bits.png")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).convert("CMYK").save(root / "dog" / "print.jpg")
    data = load(f"folder:{root}")
    _check(data)
    every = torch.cat([data.train_x, data.test_x])
    assert (every == 1).flatten(1).all(dim=1).sum() == 3  # deep, palette, bits
    assert (every == 0).flatten(1).all(dim=1).sum() >= 1  # transparent over black


def test_folder_size_crops_the_centre(tmp_path):
    _write_folder(tmp_path, 4, shape=(6, 6, 3))
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255  # a white square between black
    _save(tmp_path / "cat" / "wide.png", wide)
    with pytest.raises(ValueError, match=r"6 x 6.*wide.png is 30 x 10.*folder:DIR\?size=32"):
        load(f"folder:{tmp_path}")
    data = load(f"folder:{tmp_path}?size=5")
    assert data.input_shape == (3, 5, 5)
    every = torch.cat([data.train_x, data.test_x])
    assert (every > 0.85).flatten(1).all(dim=1).sum() == 1  # the resize reads a little of its surroundings
    assert load(f"folder:{tmp_path}?size=4x8").input_shape == (3, 4, 8)
    assert load(f"folder:{tmp_path}", size=(4, 8)).input_shape == (3, 4, 8)
    for bad in ("big", "0", "4x", "1x2x3"):
        with pytest.raises(ValueError, match="size must be a number of pixels"):
            load(f"folder:{tmp_path}?size={bad}")


def test_folder_turns_by_exif(tmp_path):
    _write_folder(tmp_path, 3, shape=(4, 8, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    _save(tmp_path / "dog" / "side.jpg", np.zeros((8, 4, 3), np.uint8), exif=exif)
    assert load(f"folder:{tmp_path}").input_shape == (3, 4, 8)


def test_folder_errors_name_the_file(tmp_path):
    with pytest.raises(ValueError, match="names no path; write it like folder:DIR"):
        load("folder:")
    with pytest.raises(ValueError, match="at least 2 classes, found: none"):
        load(f"folder:{tmp_path}")
    _write_folder(tmp_path, 3)
    bad = tmp_path / "dog" / "broken.png"
    whole = (tmp_path / "dog" / "0.png").read_bytes()
    for raw in (b"", b"hello", whole[: len(whole) // 2], whole[:40]):
        bad.write_bytes(raw)
        with pytest.raises(ValueError, match=r"cannot read .*broken.png as an image"):
            load(f"folder:{tmp_path}")
    bad.unlink()
    with pytest.raises(ValueError, match=r"unknown option colour for folder: data; known: channels, size"):
        load(f"folder:{tmp_path}?colour=1")
    with pytest.raises(ValueError, match="channels must be 1 or 3"):
        load(f"folder:{tmp_path}?channels=2")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no files"):
        load(f"folder:{tmp_path}")
    (tmp_path / "empty").rmdir()
    _write_folder(tmp_path / "other", 3, sub="train")
    with pytest.raises(ValueError, match="has train/ but no counterpart"):
        load(f"folder:{tmp_path / 'other'}")
    _write_folder(tmp_path / "other", 2, sub="test")
    (tmp_path / "other" / "test" / "dog").rename(tmp_path / "other" / "test" / "cow")
    with pytest.raises(ValueError, match=r"only in the first: dog; only in the second: cow"):
        load(f"folder:{tmp_path / 'other'}")


# --------------------------------------------------------------------------------------------------------- tables


def _frame(n: int = 40) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "age": rng.normal(40, 10, n),
            "city": rng.choice(["Oslo", "Rome", "Lima"], n),
            "member": rng.random(n) < 0.5,
            "label": np.where(np.arange(n) % 2, "yes", "no"),
        }
    )
    frame.loc[::7, "age"] = np.nan
    frame.loc[3::9, "city"] = None
    return frame


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".tsv", ".parquet"])
def test_table_encodes_and_imputes(tmp_path, suffix):
    file = tmp_path / f"t{suffix}"
    frame = _frame()
    if suffix == ".parquet":
        frame.to_parquet(file)
    else:
        frame.to_csv(file, index=False, sep="\t" if suffix == ".tsv" else ",")
    data = load(f"csv:{file}:label", seed=2)
    _check(data)
    assert data.class_names == ("no", "yes")
    assert data.feature_names == (
        "age", "age missing", "city=Lima", "city=Oslo", "city=Rome", "city missing", "member=False", "member=True",
    )  # fmt: skip
    raw = (torch.cat([data.train_x, data.test_x]) * data.std + data.mean).double()
    column = dict(zip(data.feature_names, raw.T, strict=True))
    gone = column["age missing"] > 0.5
    assert gone.sum() == frame["age"].isna().sum()
    train = column["age"][: len(data.train_x)]
    seen = train[~gone[: len(data.train_x)]]
    assert torch.allclose(column["age"][gone], seen.mean(), atol=1e-4)  # of the training split alone
    known = np.sort(frame["age"].dropna().to_numpy())
    assert np.allclose(np.sort(column["age"][~gone].numpy()), known, atol=1e-4)
    one = column["city=Lima"] + column["city=Oslo"] + column["city=Rome"] + column["city missing"]
    assert torch.allclose(one, torch.ones_like(one), atol=1e-4)
    assert column["city=Rome"].sum().item() == pytest.approx((frame["city"] == "Rome").sum(), abs=1e-3)


def test_table_unseen_category_is_zeros(tmp_path):
    n = 40
    frame = pd.DataFrame({"code": ["a", "b"] * (n // 2), "label": [0, 0, 1, 1] * (n // 4)})
    frame.to_csv(tmp_path / "t.csv", index=False)
    data = load(f"csv:{tmp_path / 't.csv'}:label")
    test_row = data.test_x[:1] * data.std + data.mean
    place = next(i for i, row in frame.iterrows() if row["code"] == ("a" if test_row[0, 0] > 0.5 else "b"))
    assert place in (0, 1)
    for i in range(n):  # the row that is in the test split gets a category of its own
        changed = frame.copy()
        changed.loc[i, "code"] = "rare"
        changed.to_csv(tmp_path / "u.csv", index=False)
        out = load(f"csv:{tmp_path / 'u.csv'}:label")
        if "code=rare" not in out.feature_names:
            row = out.test_x * out.std + out.mean
            assert (row.abs() < 1e-5).all(dim=1).sum() == 1
            return
    pytest.fail("no row of the table came into the test split")


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([10, 2, 10, 2], ("2", "10")),
        ([1.0, 0.0, 1.0, 0.0], ("0", "1")),
        ([True, False, True, False], ("False", "True")),
        ([" b", "a", "b", "a"], ("a", "b")),
        ([0.5, 1.5, 0.5, 1.5], ("0.5", "1.5")),
    ],
)
def test_table_target_of_any_type(tmp_path, values, names):
    pd.DataFrame({"x": range(40), "y": values * 10}).to_csv(tmp_path / "t.csv", index=False)
    assert load(f"csv:{tmp_path / 't.csv'}:y").class_names == names


def test_table_dates_question_marks_and_drop(tmp_path):
    frame = pd.DataFrame(
        {
            "when": pd.date_range("2020-01-01", periods=40),
            "zoned": pd.date_range("2020-01-01", periods=40, tz="Europe/Oslo"),
            "level": pd.Categorical(["low", "high"] * 20),
            "count": pd.array([1, None] * 20, dtype="Int64"),
            "id": [f"row {i}" for i in range(40)],
            "y": [0, 0, 1, 1] * 10,
        }
    )
    frame.to_parquet(tmp_path / "t.parquet")
    data = load(f"csv:{tmp_path / 't.parquet'}:y?drop=id,zoned")
    assert data.feature_names == ("when", "level=high", "level=low", "count", "count missing")
    when = torch.cat([data.train_x, data.test_x])[:, 0].double() * data.std[0] + data.mean[0]
    assert (when.max() - when.min()).item() == pytest.approx(39, abs=0.1)  # days
    assert load(f"csv:{tmp_path / 't.parquet'}:y", drop=["id"]).feature_names[1] == "zoned"
    (tmp_path / "t.csv").write_text("a, b, y\n" + "1, ?, u\n2, x, v\n3, x, u\n" * 10)
    data = load(f"csv:{tmp_path / 't.csv'}:y")
    assert data.feature_names == ("a", "b=x", "b missing")


def test_table_errors(tmp_path):
    file = tmp_path / "t.csv"
    frame = _frame()
    frame.to_csv(file, index=False)
    spec = f"csv:{file}"
    with pytest.raises(ValueError, match=r"must be csv:FILE:TARGET"):
        load("csv:table.csv")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(f"csv:{tmp_path / 'no.csv'}:y")
    with pytest.raises(ValueError, match=r"no target 'labels'; its columns are: age, city, member, label"):
        load(f"{spec}:labels")
    with pytest.raises(ValueError, match=r"no column to drop 'b'"):
        load(f"{spec}:label?drop=b")
    with pytest.raises(ValueError, match="cannot be dropped"):
        load(f"{spec}:label?drop=label")
    with pytest.raises(ValueError, match=r"no column besides the target"):
        load(f"{spec}:label?drop=age,city,member")
    with pytest.raises(ValueError, match=r"'age' is missing in 6 of 40 rows"):
        load(f"{spec}:age")
    for changed, message in (
        ({"label": 1}, r"only one value, 1"),
        ({"label": np.arange(40) / 7}, r"at least 2 samples.*and 20 more.*is no class"),
        ({"age": np.inf}, r"'age' of .* holds infinite values"),
        ({"age": np.nan}, r"'age' of .* has no value in the training split; leave it out: \?drop=age"),
    ):
        frame.assign(**changed).to_csv(file, index=False)
        with pytest.raises(ValueError, match=message):
            load(f"{spec}:label")
    for text, message in (
        ('a,b\n1,"2\n', "cannot read .*t.csv"),
        ("", "cannot read .*t.csv"),
        ("a,b\n", "has no rows"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            load(f"{spec}:b")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"cannot read .*t.parquet"):
        load(f"csv:{tmp_path / 't.parquet'}:b")
    many = pd.DataFrame({"name": [f"n{i}" for i in range(2000)], "x": range(2000), "y": [0, 1] * 1000})
    many.to_csv(file, index=False)
    with pytest.raises(ValueError, match=r"more than 500 categories.*name \(1600\); leave them out: \?drop=name"):
        load(f"{spec}:y")


def test_table_repeated_columns(tmp_path):
    (tmp_path / "t.csv").write_text("a,a,y\n" + "1,2,0\n3,4,1\n5,6,0\n" * 10)
    assert load(f"csv:{tmp_path / 't.csv'}:y").feature_names == ("a", "a.1")
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_arrays(
        [pa.array([1, 2] * 10), pa.array([3, 4] * 10), pa.array([0, 1] * 10)], names=["a", "a", "y"]
    )
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="several columns are named a; rename them"):
        load(f"csv:{tmp_path / 't.parquet'}:y")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    _frame().to_parquet(tmp_path / "t.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"pip install evenly\[parquet\]"):
        load(f"csv:{tmp_path / 't.parquet'}:label")


def test_spec_errors():
    with pytest.raises(ValueError, match=r"unknown data 'cifar'; known: digits, breast_cancer, wine, mnist:DIR"):
        load("cifar")
    with pytest.raises(TypeError, match="must be a string"):
        load(3)
    with pytest.raises(ValueError, match="takes no path"):
        load("digits:x")
    with pytest.raises(ValueError, match="no options"):
        load("digits", size=3)
    for fraction in (0, 1, -1, float("nan")):
        with pytest.raises(ValueError, match="test_fraction must be between 0 and 1"):
            load("digits", test_fraction=fraction)
    with pytest.raises(ValueError, match=r"cannot hold all 10 classes"):
        load("digits", test_fraction=0.001)


# ------------------------------------------------------------------------------------------------- match_classes


def test_match_images(tmp_path):
    _write_folder(tmp_path / "a", 5, shape=(8, 8))
    _write_folder(tmp_path / "b", 4, shape=(12, 16, 3))
    a, b = load(f"folder:{tmp_path / 'a'}"), load(f"folder:{tmp_path / 'b'}")
    out = match_classes(a, b)
    _check(out)
    assert out.input_shape == (1, 8, 8)
    assert torch.equal(out.train_x, a.train_x)
    assert torch.equal(out.mean, a.mean)
    assert len(out.test_y) == 8
    back = match_classes(b, a)
    assert back.input_shape == (3, 12, 16)
    assert torch.equal(back.test_x[:, 0], back.test_x[:, 2])
    same = match_classes(a, a)
    assert torch.equal(same.test_x, torch.cat([a.train_x, a.test_x]))


def test_match_reorders_labels():
    a = load("wine")
    names = a.class_names
    turned = dataclasses.replace(a, class_names=names[::-1], train_y=2 - a.train_y, test_y=2 - a.test_y)
    out = match_classes(a, turned)
    assert torch.equal(out.test_y, torch.cat([a.train_y, a.test_y]))
    assert torch.allclose(out.test_x, torch.cat([a.train_x, a.test_x]), atol=1e-4)


def test_match_tables_uses_the_statistics_of_the_training_table(tmp_path):
    _frame(60).to_csv(tmp_path / "a.csv", index=False)
    other = _frame(80)
    other["age"] = other["age"] + 100
    other["city"] = other["city"].replace({"Lima": "Cairo"})
    other = other[["city", "member", "age", "label"]]
    other.to_csv(tmp_path / "b.csv", index=False)
    a, b = load(f"csv:{tmp_path / 'a.csv'}:label"), load(f"csv:{tmp_path / 'b.csv'}:label")
    out = match_classes(a, b)
    _check(out)
    raw = dict(zip(a.feature_names, (out.test_x * a.std + a.mean).T, strict=True))
    gone = raw["age missing"] > 0.5
    assert torch.allclose(raw["age"][gone], a.mean[0], atol=1e-3)
    assert np.allclose(np.sort(raw["age"][~gone].numpy()), np.sort(other["age"].dropna()), atol=1e-3)
    assert raw["city=Lima"].abs().max() < 1e-4
    assert raw["city=Rome"].sum().item() == pytest.approx((other["city"] == "Rome").sum(), abs=1e-2)


def test_match_errors(tmp_path):
    with pytest.raises(ValueError, match="is image data and wine is tabular data"):
        match_classes(load("digits"), load("wine"))
    with pytest.raises(ValueError, match=r"only in wine: class_0, class_1, class_2; only in breast_cancer: benign"):
        match_classes(load("wine"), load("breast_cancer"))
    _frame().to_csv(tmp_path / "a.csv", index=False)
    _frame().rename(columns={"age": "years"}).to_csv(tmp_path / "b.csv", index=False)
    _frame().assign(age=["x", "y"] * 20).to_csv(tmp_path / "c.csv", index=False)
    a, b, c = (load(f"csv:{tmp_path / f'{n}.csv'}:label") for n in "abc")
    with pytest.raises(ValueError, match=r"only in .*a.csv:label: age; only in .*b.csv:label: years"):
        match_classes(a, b)
    with pytest.raises(ValueError, match=r"'age' is a number in"):
        match_classes(a, c)


# ------------------------------------------------------------------------------------------------------ real files


def test_real_mnist(shared_data):
    data = load(f"mnist:{shared_data / 'mnist10k'}")
    _check(data)
    assert (len(data.train_y), len(data.test_y)) == (8000, 2000)
    assert data.input_shape == (1, 28, 28)
    assert data.mean.item() == pytest.approx(0.1325, abs=2e-3)
    assert data.std.item() == pytest.approx(0.3105, abs=3e-3)
    digits = match_classes(data, load("digits"))
    assert digits.test_x.shape == (1797, 1, 28, 28)


def test_real_adult(shared_data):
    data = load(f"csv:{shared_data / 'adult' / 'adult.data.gz'}:classification")
    _check(data)
    assert len(data.train_y) + len(data.test_y) == 32561
    assert data.class_names == ("<=50K", ">50K")
    assert {"age", "sex=Female", "workclass missing", "native-country missing"} <= set(data.feature_names)
    held_out = load(f"csv:{shared_data / 'adult' / 'adult.test.gz'}:classification")
    assert len(match_classes(data, held_out).test_y) == 16281
