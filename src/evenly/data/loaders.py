"""Data sets by name: what ``evenly compare --data`` accepts, as one :class:`Dataset` of tensors.

Use :func:`load` for the sets that ship with scikit-learn (``digits``, ``breast_cancer``, ``wine``) and for a user's
own data: ``mnist:DIR`` (IDX files), ``folder:DIR`` (a folder of images a class), ``csv:FILE:TARGET`` (a table).
Everything is held in memory. Splits are stratified by class and depend on the seed alone.

Options follow a question mark: ``folder:photos?size=32&channels=1``, ``csv:table.csv:label?drop=id,name``.
"""

from __future__ import annotations

import dataclasses
import gzip
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
import torch.nn.functional as F

__all__ = ["Dataset", "load", "match_classes", "read_frame", "read_idx"]

Array = np.ndarray[Any, Any]

_SPECS = "digits, breast_cancer, wine, mnist:DIR, folder:DIR, csv:FILE:TARGET"
_MAX_CATEGORIES = 500
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_IGNORED_FILES = {"thumbs.db", "desktop.ini"}


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """A classification data set, split into training and test.

    Attributes:
        name: the spec it was loaded from.
        kind: ``"image"`` or ``"tabular"``.
        train_x, test_x: float32; images (N, C, H, W) in [0, 1], tabular (N, D) standardised with ``mean``, ``std``.
        train_y, test_y: int64 (N,), indices into ``class_names``.
        class_names: one string a class.
        mean, std: statistics of the training split: (C,) float32 for images, (D,) float64 in the table's own
            units for tabular data. A constant channel or feature has std 1, so that it becomes 0.
        feature_names: one string a column of tabular data, empty for images.

    Example:
        >>> data = load("digits")
        >>> data
        Dataset('digits', image 1x8x8, 10 classes, 1437 train, 360 test)
        >>> data.normalize(data.train_x).mean().abs().item() < 1e-5
        True
    """

    name: str
    kind: str
    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    class_names: tuple[str, ...]
    mean: torch.Tensor
    std: torch.Tensor
    feature_names: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample: (C, H, W) or (D,)."""
        return tuple(self.train_x.shape[1:])

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """What the model reads: images minus the training mean over the training std, per channel.

        Tabular data is standardised already and is returned as it is. Corrupt first, then normalize.
        """
        if self.kind == "tabular":
            return x
        mean, std = (s.to(x).view(-1, 1, 1) for s in (self.mean, self.std))
        return (x - mean) / std

    def subset(self, *, train: int | None = None, test: int | None = None, seed: int = 0) -> Dataset:
        """A stratified part with at most ``train`` and ``test`` samples; None keeps a split as it is.

        Example:
            >>> load("digits").subset(train=200, test=100)
            Dataset('digits', image 1x8x8, 10 classes, 200 train, 100 test)
        """
        changes: dict[str, Any] = {}
        for split, count in (("train", train), ("test", test)):
            x, y = getattr(self, f"{split}_x"), getattr(self, f"{split}_y")
            if count is None or count >= len(y):
                continue
            if count < self.num_classes:
                raise ValueError(f"a subset of {count} {split} samples cannot hold all {self.num_classes} classes")
            keep = _proportional(y, count, seed)
            changes[f"{split}_x"], changes[f"{split}_y"] = x[keep], y[keep]
        return dataclasses.replace(self, **changes) if changes else self

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.input_shape)) if self.kind == "image" else f"{self.input_shape[0]} features"
        counts = f"{len(self.train_y)} train, {len(self.test_y)} test"
        return f"Dataset({self.name!r}, {self.kind} {shape}, {self.num_classes} classes, {counts})"


def load(spec: str, *, seed: int = 0, test_fraction: float = 0.2, **options: Any) -> Dataset:
    """Load a data set by its spec.

    - ``digits`` (images, 1 x 8 x 8), ``breast_cancer``, ``wine`` (tabular): from scikit-learn.
    - ``mnist:DIR``: IDX files with the standard names (``train-images-idx3-ubyte`` and so on, ``-`` or ``.`` before
      ``idx``, raw or ``.gz``, in DIR, DIR/raw or DIR/MNIST/raw). With both train and t10k files the split is theirs;
      with one of them it is made here.
    - ``folder:DIR``: one sub-folder of images a class, in DIR, or in DIR/train and DIR/test (or val, valid,
      validation: the first of these that is there, the others are not read). Options: ``size`` (pixels, or ``HxW``:
      the centre is cropped to that shape and resized; without it all images must have one size), ``channels``
      (1 or 3; default: 1 if every image is gray). Transparent parts are laid on black, EXIF rotation is applied.
      Hidden files are passed over, anything else must be an image.
    - ``csv:FILE:TARGET``: CSV, TSV (raw or ``.gz``, ``.bz2``, ``.xz``, ``.zip``) or Parquet, by pandas. Empty cells
      and ``?`` are missing. Text and boolean columns become one column a category of the training split (an unseen
      category is all zeros); numbers are filled with the training mean; each column with missing values gets an
      indicator ``NAME missing``. Dates become days. Repeated names in a CSV become ``name.1``. Option: ``drop``
      (columns to leave out, separated by commas).

    Args:
        spec: one of the above, with options after ``?`` (``folder:DIR?size=32``).
        seed: of the split.
        test_fraction: share of the test split where the split is made here, in (0, 1).
        **options: the options as keywords.

    Raises:
        ValueError: for an unknown spec or option, unusable content (which file or column is said).
        FileNotFoundError: if there is no such file or folder.
        ImportError: for Parquet without pyarrow (``pip install evenly[parquet]``).

    Example:
        >>> load("wine", test_fraction=0.25).train_x.shape
        torch.Size([133, 13])
    """
    if not isinstance(spec, str):
        raise TypeError(f"the data spec must be a string, one of {_SPECS}; got {type(spec).__name__}")
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must be between 0 and 1, both excluded; got {test_fraction}")
    kind, _, rest = spec.partition(":")
    if kind in _BUNDLED:
        if rest or options:
            raise ValueError(f"{kind!r} takes no path and no options, got {spec!r} {options or ''}".rstrip())
        return _BUNDLED[kind](kind, seed, test_fraction)
    if kind not in _READERS:
        raise ValueError(f"unknown data {spec!r}; known: {_SPECS}")
    path, _, query = rest.partition("?")
    if not path:
        pattern = next(s for s in _SPECS.split(", ") if s.startswith(kind))
        raise ValueError(f"{spec!r} names no path; write it like {pattern}")
    reader, known = _READERS[kind]
    given: dict[str, Any] = {**dict(parse_qsl(query, keep_blank_values=True)), **options}
    unknown = sorted(set(given) - known)
    if unknown:
        options_known = ", ".join(sorted(known)) or "none"
        raise ValueError(f"unknown option {', '.join(unknown)} for {kind}: data; known: {options_known}")
    return reader(spec, path, seed, test_fraction, **given)


def match_classes(train: Dataset, ood: Dataset) -> Dataset:
    """Train on one data set, test on another of the same classes.

    Images of ``ood`` are resized (bilinear, antialiased) to the size of ``train`` and converted to its channels
    (gray is 0.299 R + 0.587 G + 0.114 B). Tabular columns are matched by name and standardised with the
    statistics of ``train``: its missing values get the mean of ``train``, categories that one side lacks are zeros.

    Returns:
        A data set with the training split and statistics of ``train`` and, as its test split, every sample of
        ``ood`` (none of them is trained on).

    Raises:
        ValueError: if the kinds, the classes or the columns differ; the message lists the difference.

    Example:
        >>> a, b = load("digits"), load("digits", seed=1)
        >>> match_classes(a, b).test_x.shape
        torch.Size([1797, 1, 8, 8])
    """
    if train.kind != ood.kind:
        raise ValueError(f"{train.name} is {train.kind} data and {ood.name} is {ood.kind} data; both must be the same")
    mine, theirs = set(train.class_names), set(ood.class_names)
    if mine != theirs:
        raise ValueError(
            f"{train.name} and {ood.name} must have the same classes; "
            f"only in {train.name}: {_some(mine - theirs)}; only in {ood.name}: {_some(theirs - mine)}"
        )
    x, y = torch.cat([ood.train_x, ood.test_x]), torch.cat([ood.train_y, ood.test_y])
    order = torch.tensor([train.class_names.index(name) for name in ood.class_names])
    x = _match_images(x, train.input_shape) if train.kind == "image" else _match_columns(train, ood, x)
    return dataclasses.replace(train, name=f"{train.name} -> {ood.name}", test_x=x, test_y=order[y])


def read_idx(path: str | Path) -> Array:
    """Read one IDX file (the format of MNIST), raw or gzip.

    Raises:
        ValueError: if it is no IDX file, or is shorter or longer than its header says.
    """
    path = Path(path)
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is a damaged gzip file: {error}") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _IDX_TYPES:
        found = raw[:4].hex(" ") or "nothing"
        raise ValueError(f"{path} is no IDX file: it begins with {found}, expected 00 00 TYPE DIMS")
    dtype, ndim = np.dtype(_IDX_TYPES[raw[2]]), raw[3]
    start = 4 + 4 * ndim
    if len(raw) < start:
        raise ValueError(f"{path} ends inside its header")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", ndim, 4))
    expected = start + math.prod(shape) * dtype.itemsize
    if len(raw) != expected:
        raise ValueError(
            f"{path} says {shape} of {dtype.name}, {expected} bytes, but has {len(raw)}; get the file again"
        )
    return np.frombuffer(raw, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


# ---------------------------------------------------------------------------------------------- putting together


def _some(names: Any, limit: int = 20) -> str:
    names = sorted(map(str, names))
    shown = ", ".join(names[:limit]) or "none"
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _proportional(y: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Indices of ``count`` samples with the class shares of y: every class's first, then its next by its share."""
    order = np.random.default_rng(seed).permutation(len(y))
    labels = y.numpy()[order]
    sizes = np.bincount(labels)
    rank = np.empty(len(labels))
    for k, size in enumerate(sizes):
        rank[labels == k] = np.arange(size) / max(1, size)
    return torch.from_numpy(order[np.argsort(rank, kind="stable")[:count]])


def _stratified(y: Array, test: float, seed: int, class_names: Sequence[str]) -> tuple[Array, Array]:
    from sklearn.model_selection import train_test_split

    counts = np.bincount(y, minlength=len(class_names))
    few = {class_names[k]: int(n) for k, n in enumerate(counts) if n < 2}
    if few:
        listed = _some(f"{name!r} ({n})" for name, n in few.items())
        hint = " A number with many values is no class: this loader is for classification." if len(few) > 20 else ""
        raise ValueError(f"each class needs at least 2 samples for a stratified split; too few in: {listed}.{hint}")
    tested = math.ceil(test * len(y))
    if tested < len(counts) or len(y) - tested < len(counts):
        raise ValueError(
            f"{len(y)} samples split into {len(y) - tested} train and {tested} test cannot hold all {len(counts)} "
            "classes on both sides; change test_fraction or add data"
        )
    return tuple(train_test_split(np.arange(len(y)), test_size=test, stratify=y, random_state=seed))


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    axes = [a for a in range(x.ndim) if a != 1]
    wide = x.double()
    mean, std = wide.mean(dim=axes), wide.std(dim=axes, correction=0)
    # rounding leaves a constant column a std of about 1e-16 times its value
    constant = std <= 1e-12 * mean.abs()
    return mean, torch.where(constant, torch.ones_like(std), std)


def _images(name: str, train: tuple[Array, Array], test: tuple[Array, Array], class_names: Sequence[str]) -> Dataset:
    tensors = [torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)) for x in (train[0], test[0])]
    labels = [torch.from_numpy(np.ascontiguousarray(y, dtype=np.int64)) for y in (train[1], test[1])]
    mean, std = _moments(tensors[0])
    return Dataset(
        name, "image", tensors[0], labels[0], tensors[1], labels[1], tuple(class_names), mean.float(), std.float()
    )


def _table(
    name: str,
    train: tuple[Array, Array],
    test: tuple[Array, Array],
    class_names: Sequence[str],
    feature_names: Sequence[str],
) -> Dataset:
    raw = [torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64)) for x in (train[0], test[0])]
    labels = [torch.from_numpy(np.ascontiguousarray(y, dtype=np.int64)) for y in (train[1], test[1])]
    mean, std = _moments(raw[0])
    x = [((r - mean) / std).float() for r in raw]
    return Dataset(
        name, "tabular", x[0], labels[0], x[1], labels[1], tuple(class_names), mean, std, tuple(feature_names)
    )


# ----------------------------------------------------------------------------------------------- scikit-learn


def _digits(name: str, seed: int, test_fraction: float) -> Dataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = bunch.images[:, None] / 16.0, bunch.target
    names = [str(t) for t in bunch.target_names]
    a, b = _stratified(y, test_fraction, seed, names)
    return _images(name, (x[a], y[a]), (x[b], y[b]), names)


def _sklearn_table(name: str, seed: int, test_fraction: float) -> Dataset:
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name}")()
    x, y, names = bunch.data, bunch.target, [str(t) for t in bunch.target_names]
    a, b = _stratified(y, test_fraction, seed, names)
    return _table(name, (x[a], y[a]), (x[b], y[b]), names, [str(f) for f in bunch.feature_names])


_BUNDLED: dict[str, Callable[[str, int, float], Dataset]] = {
    "digits": _digits,
    "breast_cancer": _sklearn_table,
    "wine": _sklearn_table,
}


# --------------------------------------------------------------------------------------------------------- IDX


def _mnist(spec: str, path: str, seed: int, test_fraction: float) -> Dataset:
    root = _folder(path)
    parts: dict[str, tuple[Array, Array]] = {}
    for split in ("train", "t10k"):
        images, labels = _idx_file(root, split, "images"), _idx_file(root, split, "labels")
        if images is None and labels is None:
            continue
        if images is None or labels is None:
            there, gone = ("images", "labels") if labels is None else ("labels", "images")
            raise FileNotFoundError(f"{root} has the {split} {there} but not the {split} {gone}")
        x, y = read_idx(images), read_idx(labels)
        if x.ndim not in (3, 4) or y.ndim != 1 or len(x) != len(y):
            raise ValueError(
                f"{images} holds {x.shape} and {labels} holds {y.shape}; expected (N, H, W) images and (N,) labels"
            )
        if x.dtype != np.uint8 or not np.issubdtype(y.dtype, np.integer):
            raise ValueError(f"{images} must hold uint8 and {labels} integers, got {x.dtype} and {y.dtype}")
        x = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
        if x.shape[1] not in (1, 3):
            raise ValueError(f"{images} holds images of {x.shape[1]} channels; expected 1 or 3")
        parts[split] = (x.astype(np.float32) / 255, y)
    if not parts:
        raise FileNotFoundError(
            f"no IDX files in {root} (nor its raw or MNIST/raw folder); expected train-images-idx3-ubyte and "
            "train-labels-idx1-ubyte, or the same with t10k, raw or .gz; "
            f"it holds: {_some(p.name for p in root.iterdir())}"
        )
    values = np.unique(np.concatenate([y for _, y in parts.values()]))
    names = [str(v) for v in values]
    coded = {split: (x, np.searchsorted(values, y)) for split, (x, y) in parts.items()}
    if len(coded) == 2:
        absent = set(range(len(values))) - set(coded["train"][1].tolist())
        if absent:
            lacking = _some(names[k] for k in absent)
            raise ValueError(f"the training labels in {root} lack the classes {lacking} of the test labels")
        if coded["train"][0].shape[1:] != coded["t10k"][0].shape[1:]:
            raise ValueError(f"train and t10k images in {root} differ in shape")
        return _images(spec, coded["train"], coded["t10k"], names)
    ((x, y),) = coded.values()
    a, b = _stratified(y, test_fraction, seed, names)
    return _images(spec, (x[a], y[a]), (x[b], y[b]), names)


def _idx_file(root: Path, split: str, what: str) -> Path | None:
    dims = {"images": ("3", "4"), "labels": ("1",)}[what]
    for folder in (root, root / "raw", root / "MNIST" / "raw"):
        for mark in "-.":
            for d in dims:
                for suffix in ("", ".gz"):
                    file = folder / f"{split}-{what}{mark}idx{d}-ubyte{suffix}"
                    if file.is_file():
                        return file
    return None


def _folder(path: str) -> Path:
    root = Path(path).expanduser()
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise FileNotFoundError(f"the folder {path} {what}")
    return root


# ----------------------------------------------------------------------------------------------- image folders


def _image_folder(
    spec: str, path: str, seed: int, test_fraction: float, size: Any = None, channels: Any = None
) -> Dataset:
    root = _folder(path)
    shape = _size_option(size)
    if channels is not None and str(channels) not in ("1", "3"):
        raise ValueError(f"channels must be 1 or 3, got {channels!r}")
    train = next((p for p in (root / "train", root / "training") if p.is_dir()), None)
    test = next((root / n for n in ("test", "val", "valid", "validation") if (root / n).is_dir()), None)
    if (train is None) != (test is None):
        raise ValueError(
            f"{root} has {'train' if test is None else test.name}/ but no counterpart; have train/ and test/ "
            "(or val/), or put the class folders into the folder itself"
        )
    sources = [root] if train is None or test is None else [train, test]
    listed = [_class_files(source) for source in sources]
    names = list(listed[0])
    if len(listed) == 2 and set(listed[1]) != set(names):
        raise ValueError(
            f"{sources[0]} and {sources[1]} must have the same class folders; only in the first: "
            f"{_some(set(names) - set(listed[1]))}; only in the second: {_some(set(listed[1]) - set(names))}"
        )
    files = [[(f, names.index(c)) for c in names for f in part[c]] for part in listed]
    arrays = [[_read_image(f, shape) for f, _ in part] for part in files]
    _one_size([f for part in files for f, _ in part], [a for images in arrays for a in images])
    count = (
        int(channels)
        if channels is not None
        else (1 if all(a.shape[2] == 1 or _is_gray(a) for part in arrays for a in part) else 3)
    )
    data = [
        (np.stack([_channels(a, count) for a in images]).transpose(0, 3, 1, 2), np.array([k for _, k in part]))
        for part, images in zip(files, arrays, strict=True)
    ]
    if len(data) == 2:
        return _images(spec, data[0], data[1], names)
    x, y = data[0]
    a, b = _stratified(y, test_fraction, seed, names)
    return _images(spec, (x[a], y[a]), (x[b], y[b]), names)


def _size_option(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    try:
        parts = [int(p) for p in (size.lower().split("x") if isinstance(size, str) else np.atleast_1d(size))]
    except ValueError:
        parts = []
    if len(parts) not in (1, 2) or min(parts, default=0) < 1:
        raise ValueError(f"size must be a number of pixels such as 32, or HEIGHTxWIDTH such as 32x48; got {size!r}")
    return parts[0], parts[-1]


def _class_files(source: Path) -> dict[str, list[Path]]:
    classes: dict[str, list[Path]] = {}
    for folder in sorted(p for p in source.iterdir() if p.is_dir() and not p.name.startswith(".")):
        files = sorted(
            p
            for p in folder.rglob("*")
            if p.is_file() and not p.name.startswith(".") and p.name.lower() not in _IGNORED_FILES
        )
        if not files:
            raise ValueError(f"the class folder {folder} holds no files; remove it or fill it")
        classes[folder.name] = files
    if len(classes) < 2:
        raise ValueError(f"{source} must have a sub-folder for each of at least 2 classes, found: {_some(classes)}")
    return classes


def _read_image(file: Path, shape: tuple[int, int] | None) -> Array:
    """(H, W, 1 or 3) float32 in [0, 1]."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read {file} as an image ({error}); remove it or replace it") from error
    deep = image.mode.startswith(("I", "F"))
    if deep:
        values: Array = np.asarray(image, dtype=np.float32)
        top = 65535.0 if image.mode.startswith("I") else 1.0
        if not (values.min() >= 0 and values.max() <= top):
            raise ValueError(f"{file} has values from {values.min():g} to {values.max():g}; expected 0 to {top:g}")
        image = Image.fromarray(values / top)
    elif image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        gray = image.mode in ("LA", "La", "L", "1")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
        image = image.convert("L" if gray else "RGB")
    elif image.mode in ("1", "L"):
        image = image.convert("L")
    else:
        image = image.convert("RGB")
    if shape is not None:
        image = ImageOps.fit(image, (shape[1], shape[0]), Image.Resampling.BILINEAR)
    values = np.asarray(image, dtype=np.float32)
    if not deep:
        values = values / 255
    return np.clip(values[..., None] if values.ndim == 2 else values, 0, 1)


def _one_size(files: list[Path], images: list[Array]) -> None:
    first_file, first = files[0], images[0]
    for file, image in zip(files, images, strict=True):
        if image.shape[:2] != first.shape[:2]:
            sizes = [f"{a.shape[1]} x {a.shape[0]}" for a in (first, image)]
            raise ValueError(
                f"the images differ in size ({first_file} is {sizes[0]}, {file} is {sizes[1]}); "
                "give one to crop and resize to, for example folder:DIR?size=32"
            )


def _is_gray(image: Array) -> bool:
    return bool((image[..., 0] == image[..., 1]).all() and (image[..., 0] == image[..., 2]).all())


def _channels(image: Array, count: int) -> Array:
    if image.shape[2] == count:
        return image
    if count == 3:
        return np.repeat(image, 3, axis=2)
    return image[..., :1] if _is_gray(image) else (image @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]


# ------------------------------------------------------------------------------------------------------ tables


def _csv(spec: str, path: str, seed: int, test_fraction: float, drop: Any = None) -> Dataset:
    import pandas as pd

    file, colon, target = path.rpartition(":")
    if not colon or not file or not target:
        raise ValueError(f"{spec!r} must be csv:FILE:TARGET, the column to predict after the last colon")
    frame = read_frame(file)
    repeated = sorted({str(c) for c in frame.columns[frame.columns.duplicated()]})
    if repeated:
        raise ValueError(f"{file} has several columns named {_some(repeated)}; rename them")
    frame.columns = [str(c) for c in frame.columns]
    dropped = [c for c in drop.split(",") if c] if isinstance(drop, str) else list(drop or ())
    for column, role in [(target, "target"), *((c, "column to drop") for c in dropped)]:
        if column not in frame.columns:
            raise ValueError(f"{file} has no {role} {column!r}; its columns are: {', '.join(frame.columns)}")
    if target in dropped:
        raise ValueError(f"the target {target!r} cannot be dropped")
    labels, features = frame[target], frame.drop(columns=[target, *dropped])
    if features.shape[1] == 0:
        raise ValueError(f"{file} has no column besides the target {target!r}")
    missing = int(labels.isna().sum())
    if missing:
        raise ValueError(
            f"the target {target!r} is missing in {missing} of {len(labels)} rows of {file}; remove those rows"
        )
    values = sorted(labels.unique().tolist(), key=lambda v: (0, v, "") if _is_number(v) else (1, 0, str(v)))
    names = [str(int(v)) if isinstance(v, float) and v.is_integer() else str(v) for v in values]
    if len(values) < 2:
        raise ValueError(f"the target {target!r} has only one value, {_some(names)}; at least 2 classes are needed")
    y = labels.map({v: k for k, v in enumerate(values)}).to_numpy(dtype=np.int64)
    a, b = _stratified(y, test_fraction, seed, names)
    encoded: list[Array] = []
    columns: list[str] = []
    wide: list[str] = []
    for name in features.columns:
        column = features[name]
        gone = column.isna().to_numpy()
        if _is_numeric(column) or pd.api.types.is_datetime64_any_dtype(column):
            number = _numbers(column, file)
            if gone[a].all():
                raise ValueError(
                    f"the column {name!r} of {file} has no value in the training split; leave it out: ?drop={name}"
                )
            number[gone] = number[a][~gone[a]].mean()
            encoded.append(number)
            columns.append(name)
        else:
            text = column.astype(object).where(~gone, None).map(lambda v: None if v is None else str(v))
            categories = sorted(set(text.iloc[a].dropna()))
            if len(categories) > _MAX_CATEGORIES:
                wide.append(f"{name} ({len(categories)})")
                continue
            for category in categories:
                encoded.append((text == category).to_numpy(dtype=np.float64))
                columns.append(f"{name}={category}")
        if gone.any():
            encoded.append(gone.astype(np.float64))
            columns.append(f"{name} missing")
    if wide:
        raise ValueError(
            f"text columns of {file} with more than {_MAX_CATEGORIES} categories cannot be one-hot coded: "
            f"{', '.join(wide)}; leave them out: ?drop={','.join(w.rsplit(' ', 1)[0] for w in wide)}"
        )
    if not columns:
        raise ValueError(f"no usable column is left in {file}")
    x = np.stack(encoded, axis=1)
    return _table(spec, (x[a], y[a]), (x[b], y[b]), names, columns)


def read_frame(path: str | Path) -> Any:
    """A table from CSV, TSV (raw or ``.gz``, ``.bz2``, ``.xz``, ``.zip``) or Parquet, as a :class:`pandas.DataFrame`.

    Empty cells and ``?`` are missing. Repeated names in a CSV become ``name.1``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, has no rows, or (Parquet) has a column name twice.
        ImportError: for Parquet without pyarrow (``pip install evenly[parquet]``).
    """
    import pandas as pd

    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"the file {file} does not exist")
    name = file.name.lower()
    try:
        if name.endswith((".parquet", ".pq")):
            try:
                import pyarrow.parquet
            except ImportError as error:
                raise ImportError(f"reading {file.name} needs pyarrow: pip install evenly[parquet]") from error
            repeated = list(pyarrow.parquet.read_schema(file).names)
            twice = sorted({c for c in repeated if repeated.count(c) > 1})
            if twice:
                raise ValueError(f"several columns are named {_some(twice)}; rename them")
            frame = pd.read_parquet(file).reset_index(drop=True)
        else:
            separator = "\t" if ".tsv" in name else ","
            frame = pd.read_csv(file, sep=separator, skipinitialspace=True, na_values=["?"], low_memory=False)
    except (ValueError, OSError, EOFError, zlib.error) as error:  # pandas' and arrow's errors are ValueErrors
        raise ValueError(f"cannot read {file}: {error}") from error
    if not len(frame):
        raise ValueError(f"{file} has no rows")
    return frame


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, (bool, np.bool_))


def _is_numeric(column: Any) -> bool:
    import pandas as pd

    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _numbers(column: Any, file: str) -> Array:
    import pandas as pd

    if pd.api.types.is_datetime64_any_dtype(column):
        zone = getattr(column.dt, "tz", None)
        origin = pd.Timestamp(0, tz=zone) if zone is not None else pd.Timestamp(0)
        return ((column - origin) / pd.Timedelta(days=1)).to_numpy(dtype=np.float64).copy()
    values = column.to_numpy(dtype=np.float64, na_value=np.nan).copy()
    if np.isinf(values).any():
        raise ValueError(f"the column {column.name!r} of {file} holds infinite values; replace or drop them")
    return values


# -------------------------------------------------------------------------------------- matching two data sets


def _match_images(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    channels, height, width = shape
    if x.shape[1] == 3 and channels == 1:
        x = (x * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    elif x.shape[1] == 1 and channels == 3:
        x = x.expand(-1, 3, -1, -1)
    if x.shape[2:] != (height, width):
        x = F.interpolate(x, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    return x.clamp(0, 1).contiguous()  # rounding of the filter's weights


def _match_columns(train: Dataset, ood: Dataset, x: torch.Tensor) -> torch.Tensor:
    def base(name: str) -> str:
        return name.partition("=")[0].removesuffix(" missing")

    mine, theirs = {base(n) for n in train.feature_names}, {base(n) for n in ood.feature_names}
    if mine != theirs:
        raise ValueError(
            f"{train.name} and {ood.name} must have the same columns; only in {train.name}: {_some(mine - theirs)}; "
            f"only in {ood.name}: {_some(theirs - mine)}"
        )
    raw = x.double() * ood.std + ood.mean
    place = {name: k for k, name in enumerate(ood.feature_names)}
    out = torch.zeros(len(x), len(train.feature_names), dtype=torch.float64)
    for k, name in enumerate(train.feature_names):
        if name in place:
            value = raw[:, place[name]]
            gone = place.get(f"{name} missing")
            out[:, k] = value if gone is None else torch.where(raw[:, gone] > 0.5, train.mean[k], value)
        elif "=" not in name and not name.endswith(" missing"):
            raise ValueError(f"the column {name!r} is a number in {train.name} and text in {ood.name}")
    return ((out - train.mean) / train.std).float()


_READERS: dict[str, tuple[Callable[..., Dataset], set[str]]] = {
    "mnist": (_mnist, set()),
    "folder": (_image_folder, {"size", "channels"}),
    "csv": (_csv, {"drop"}),
}
