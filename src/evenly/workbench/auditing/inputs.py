"""What an audit reads: a table or a folder of images, and a model. No file is unpickled unless that is asked for.

:func:`read_data` reads ``FILE.csv``, ``FILE.parquet``, ``adult:DIR``, ``compas:DIR`` or ``folder:DIR``;
:func:`load_model` gives what ``module:factory`` returns, or a scikit-learn estimator from a ``.skops`` file;
:func:`audit_table` puts them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import numpy as np

from evenly.workbench.auditing.audit import Audit, audit, infer_task
from evenly.workbench.auditing.groups import Bins, parse_groups, text_of

if TYPE_CHECKING:
    from evenly.conversion import InputFiles

__all__ = ["AuditData", "audit_table", "labels_like", "load_model", "read_data"]

Array = np.ndarray[Any, Any]

OUTPUTS = ("logits", "probabilities")
_PICKLES = {".pkl", ".pickle", ".joblib"}
_BATCH = 1024


@dataclass(frozen=True)
class AuditData:
    """What :func:`read_data` read.

    Attributes:
        frame: a :class:`pandas.DataFrame`, one row a sample.
        name: its spec.
        target: the column of targets, where the data say it.
        images: the images of the rows, in their order, for ``folder:`` data.
    """

    frame: Any
    name: str
    target: str | None = None
    images: InputFiles | None = None


def read_data(spec: str) -> AuditData:
    """Read the data of an audit.

    - ``FILE``: CSV, TSV or Parquet, by :func:`evenly.data.read_frame`. A cell that is empty, ``?`` or one of pandas'
      words for it (``NA``, ``None``) is missing.
    - ``adult:DIR``, ``compas:DIR``: the tables of :mod:`evenly.data.tables`, target ``target``. Of Adult the test
      part; ``adult:DIR?split=train`` or ``all`` reads another.
    - ``folder:DIR``: images at any depth and ``DIR/groups.csv``, whose column ``file`` holds their paths below DIR and
      whose other columns are groups (or the target). The column ``class`` is the name of the first sub-folder, where
      the file has no such column. Options: ``groups=FILE``, ``size=HEIGHTxWIDTH``, ``gray=1``, ``mean=``, ``std=``
      (numbers with commas; pixels in [0, 1] are standardized by them): ``folder:DIR?size=32x32&mean=0.5&std=0.2``.

    Raises:
        ValueError: an unknown option, rows and images that do not match, or what the readers raise.
        FileNotFoundError: there is no such file or folder.
    """
    kind, colon, rest = spec.partition(":")
    if not colon or kind not in ("adult", "compas", "folder"):
        from evenly.data import read_frame

        frame = read_frame(spec)
        frame.columns = [str(column) for column in frame.columns]
        return AuditData(frame, Path(spec).name)
    path, _, query = rest.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    known = {"adult": {"split"}, "compas": set(), "folder": {"groups", "size", "gray", "mean", "std"}}[kind]
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(
            f"unknown option {', '.join(unknown)} for {kind}: data; known: {', '.join(sorted(known)) or '-'}"
        )
    if kind == "folder":
        return _folder(spec, path, options)
    from evenly.data import load_adult, load_compas

    if kind == "compas":
        return AuditData(load_compas(path or None), "COMPAS", "target")
    split = options.get("split", "test")
    return AuditData(load_adult(path or None, split=split), f"Adult, {split} part", "target")


def load_model(
    spec: str, weights: str | Path | None = None, *, trust: Sequence[str] = (), trust_pickle: bool = False
) -> Any:
    """The model of an audit.

    Args:
        spec: ``module:factory``, called without arguments, which gives a fitted estimator or a
            :class:`torch.nn.Module`; or a file: ``.skops`` (``pip install evenly[audit]``), or with ``trust_pickle``
            a pickle or joblib file.
        weights: a state dict for a module: ``.safetensors``, or a torch file of tensors only. A file written by
            ``evenly convert`` is understood.
        trust: types that a ``.skops`` file may hold besides those of scikit-learn, numpy and Python.
        trust_pickle: unpickle. A pickle runs what code it likes: do so only with files you made.

    Raises:
        ValueError: a file that would have to be trusted, another kind of file, weights that do not fit.
        FileNotFoundError: there is no such file.
        ImportError: ``skops`` is missing.
    """
    file = Path(spec)
    if file.suffix in _PICKLES | {".skops"}:
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}")
        if weights is not None:
            raise ValueError(f"--weights goes with --model module:factory; {file} holds its own")
        return _skops(file, trust) if file.suffix == ".skops" else _pickle(file, trust_pickle)
    if ":" not in spec:
        raise ValueError(
            f"--model {spec!r} is neither module:factory nor a .skops file. A PyTorch model is given as module:factory "
            "with --weights FILE.safetensors"
        )
    from evenly.conversion import call_factory

    model = call_factory(spec)
    return model if weights is None else _with_weights(model, spec, Path(weights))


def audit_table(
    data: Any,
    *,
    target: str | None = None,
    groups: str | Mapping[str, Bins],
    model: Any = None,
    prediction: str | None = None,
    score: str | None = None,
    features: Sequence[str] | None = None,
    outputs: str = "logits",
    task: str | None = None,
    classes: Sequence[Any] | None = None,
    name: str = "",
    **settings: Any,
) -> Audit:
    """Audit a model, or predictions that are there already, on a table.

    Args:
        data: a DataFrame, or what :func:`read_data` read.
        target: the column of targets.
        groups: the group columns: ``"sex,race,age:25,45,65"`` as for :func:`parse_groups`, or a mapping from names to
            bins or None.
        model: a fitted scikit-learn estimator (or anything with ``predict`` and, for probabilities,
            ``predict_proba`` and ``classes_``), or a :class:`torch.nn.Module` from a float32 batch (N, features) or
            (N, C, H, W) to (N,), (N, 1) or (N, K).
        prediction: the column of predictions, instead of a model.
        score: the column of scores of the positive class, instead of or beside ``prediction``.
        features: the columns that the model reads; default: the estimator's ``feature_names_in_``, else all but the
            target.
        outputs: of a module: ``"logits"`` or ``"probabilities"``; of no meaning for a regression.
        task, classes, name: as in :func:`audit`; the outputs of a module are of ``classes`` in their order (default:
            the sorted targets).
        **settings: the others of :func:`audit`.

    Raises:
        ValueError: unknown columns, neither or both of model and columns, and what :func:`audit` raises.

    >>> import pandas as pd
    >>> table = pd.DataFrame({"y": [1, 0, 1, 0], "p": [0.9, 0.2, 0.4, 0.1], "sex": list("ffmm")})
    >>> audit_table(table, target="y", score="p", groups="sex", min_group=1).by_group["accuracy"].to_dict()
    {'sex=m': 0.5, 'sex=f': 1.0}
    """
    read = data if isinstance(data, AuditData) else AuditData(data, "")
    frame = read.frame
    target = read.target if target is None else target
    if target is None:
        raise ValueError("say which column holds the targets: --target COL")
    bins = parse_groups(groups) if isinstance(groups, str) else dict(groups)
    wanted = [("target", target), *(("group column", column) for column in bins)]
    wanted += [(what, column) for what, column in (("prediction", prediction), ("score", score)) if column is not None]
    wanted += [("feature", column) for column in features or ()]
    for what, column in wanted:
        if column not in frame.columns:
            raise ValueError(
                f"the data have no {what} {column!r}; their columns are: {', '.join(map(str, frame.columns))}"
            )
    given = prediction is not None or score is not None
    if given == (model is not None):
        raise ValueError("give a model, or columns of predictions or scores (--prediction, --score), and not both")
    truth = frame[target]
    if model is None:
        y_pred = None if prediction is None else frame[prediction]
        y_score = None if score is None else frame[score]
    else:
        if truth.isna().any():
            raise ValueError(
                f"the target {target!r} is missing in {int(truth.isna().sum())} rows; leave them out first"
            )
        y_pred, y_score, task, classes = _run(
            model, read, target, features, outputs, task, classes, settings.get("threshold")
        )
    return audit(
        truth,
        y_pred,
        y_score=y_score,
        groups=frame[list(bins)],
        bins={column: each for column, each in bins.items() if each is not None},
        task=task,
        classes=classes,
        name=name or read.name,
        **settings,
    )


def labels_like(data: AuditData, target: str | None, names: Sequence[str]) -> list[Any]:
    """Classes that were written as text, as the values of the target that print alike.

    >>> import pandas as pd
    >>> labels_like(AuditData(pd.DataFrame({"y": [2, 1]}), ""), "y", ["2", "1", "x"]) == [2, 1, "x"]
    True
    """
    column = data.target if target is None else target
    known = {text_of(value): value for value in data.frame[column].unique()} if column in data.frame.columns else {}
    return [known.get(name, name) for name in names]


# ------------------------------------------------------------------------------------------------------- models


def _skops(file: Path, trust: Sequence[str]) -> Any:
    try:
        import skops.io
    except ImportError as error:
        raise ImportError(f"reading {file} needs skops: pip install evenly[audit]") from error
    unknown = sorted(set(skops.io.get_untrusted_types(file=file)) - set(trust))
    if unknown:
        raise ValueError(
            f"{file} holds types that are not known to be safe: {', '.join(unknown)}. If you trust them, say so: "
            + " ".join(f"--trust {each}" for each in unknown)
        )
    return skops.io.load(file, trusted=list(trust))


def _pickle(file: Path, trusted: bool) -> Any:
    if not trusted:
        raise ValueError(
            f"{file} is a pickle, which can run any code when it is loaded, and was not opened. Save the estimator "
            "with skops (skops.io.dump), give module:factory, or, if the file is your own, add --trust-pickle"
        )
    import joblib

    return joblib.load(file)


def _with_weights(model: Any, spec: str, file: Path) -> Any:
    from torch import nn

    from evenly.conversion import load_converted, load_weights

    if not isinstance(model, nn.Module):
        raise ValueError(f"--weights goes with a torch.nn.Module; {spec} gave a {type(model).__name__}")
    state = load_weights(file)
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(str(file), framework="pt") as stream:
            converted = "evenly" in (stream.metadata() or {})
        if converted:
            return load_converted(model, file)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # keys or shapes that do not fit, which it lists
        raise ValueError(f"{file} does not fit {spec}: {error}") from error
    return model


def _run(
    model: Any,
    data: AuditData,
    target: str,
    features: Sequence[str] | None,
    outputs: str,
    task: str | None,
    classes: Sequence[Any] | None,
    threshold: float | None,
) -> tuple[Any, Any, str | None, Sequence[Any] | None]:
    # Predictions and probabilities of a model, with the task and the order of the classes.
    from torch import nn

    if isinstance(model, nn.Module):
        return _run_module(model, data, target, features, outputs, task, classes)
    if data.images is not None:
        raise ValueError(f"images are for a torch.nn.Module, and the model is a {type(model).__name__}")
    if not hasattr(model, "predict"):
        raise ValueError(f"the model is a {type(model).__name__}, expected a torch.nn.Module or something with predict")
    if features is None:
        features = list(getattr(model, "feature_names_in_", [c for c in data.frame.columns if c != target]))
        lacking = [column for column in features if column not in data.frame.columns]
        if lacking:
            raise ValueError(f"the model was fitted on columns that the data lack: {', '.join(map(str, lacking))}")
    x = data.frame[list(features)]
    if not hasattr(model, "predict_proba"):
        return np.asarray(model.predict(x)), None, task, classes
    probabilities = np.asarray(model.predict_proba(x))
    order = list(model.classes_)
    predicted = None if threshold is not None else np.asarray(model.predict(x))
    return predicted, probabilities, task, order if classes is None else classes


def _run_module(
    model: Any,
    data: AuditData,
    target: str,
    features: Sequence[str] | None,
    outputs: str,
    task: str | None,
    classes: Sequence[Any] | None,
) -> tuple[Any, Any, str | None, Sequence[Any] | None]:
    import torch

    if outputs not in OUTPUTS:
        raise ValueError(f"outputs={outputs!r} is unknown, expected one of {', '.join(OUTPUTS)}")
    batches = data.images if data.images is not None else _batches(data.frame, target, features)
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found = []
    with torch.no_grad():
        for batch in batches:
            found.append(model(batch.to(device)).double().cpu())
    values = torch.cat(found)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim > 2 or len(values) != len(data.frame):
        raise ValueError(
            f"the network gave {tuple(values.shape)} for {len(data.frame)} rows, expected one number or one score a "
            "class for each row"
        )
    wide = values.ndim == 2
    if task is None:
        task = infer_task(data.frame[target], classes, values.numpy() if wide else None)
    if task == "regression":
        return values.numpy(), None, task, None
    if outputs == "logits":
        values = values.softmax(1) if wide else values.sigmoid()
    if classes is None and wide:
        classes = sorted(data.frame[target].unique())
        if len(classes) != values.shape[1]:
            raise ValueError(
                f"the network has {values.shape[1]} outputs and the target {target!r} has {len(classes)} values; give "
                "the classes in the order of the outputs: --classes a,b,c"
            )
    return None, values.numpy(), task, classes


def _batches(frame: Any, target: str, features: Sequence[str] | None) -> Any:
    import pandas as pd
    import torch

    names = [column for column in frame.columns if column != target] if features is None else list(features)
    text = [column for column in names if not pd.api.types.is_numeric_dtype(frame[column])]
    if text:
        raise ValueError(
            f"a network reads numbers, and these columns hold none: {', '.join(text)}; name the columns that it reads "
            "(--features), or give an estimator that encodes them"
        )
    x = torch.from_numpy(frame[names].to_numpy(np.float32, na_value=np.nan))
    return x.split(_BATCH)


# ------------------------------------------------------------------------------------------------------- images


def _folder(spec: str, path: str, options: dict[str, str]) -> AuditData:
    import pandas as pd

    from evenly.conversion import InputFiles
    from evenly.data import read_frame

    root = Path(path).expanduser()
    size = None
    if "size" in options:
        pixels = _numbers("size", options["size"].replace("x", ","))
        if len(pixels) != 2:
            raise ValueError(f"size={options['size']} is not HEIGHTxWIDTH")
        size = (int(pixels[0]), int(pixels[1]))
    images = InputFiles(
        root,
        batch_size=64,
        size=size,
        mean=_numbers("mean", options.get("mean", "0")),
        std=_numbers("std", options.get("std", "1")),
        gray=options.get("gray", "0") not in ("0", ""),
    )
    if not images.images:
        raise ValueError(f"{root} holds no images")
    names = [file.relative_to(root).as_posix() for file in images.images]
    given = Path(options["groups"]).expanduser() if "groups" in options else root / "groups.csv"
    table = read_frame(given)
    if "file" not in table.columns:
        raise ValueError(f"{given} has no column 'file' with the paths of the images; it has {list(table.columns)}")
    table["file"] = table["file"].astype(str)
    twice = table["file"][table["file"].duplicated()]
    if len(twice):
        raise ValueError(f"{given} names {twice.iloc[0]!r} twice")
    gone = sorted(set(table["file"]) - set(names))
    if gone:
        raise ValueError(f"{given} names {len(gone)} images that are not in {root}, such as {gone[0]!r}")
    frame = table.set_index("file").reindex(names).reset_index()  # an image without a row has missing groups
    if "class" not in frame.columns and all("/" in name for name in names):
        frame["class"] = pd.Series([name.split("/")[0] for name in names])
    return AuditData(frame, text_of(root.name), "class" if "class" in frame.columns else None, images)


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{name}={text} are not numbers with commas between") from error
