"""The data of a comparison: the training set, and the test sets that every trial is tested on.

The corrupted and shifted copies of the test set depend only on the data and one seed. They are made once and
shared: by all trials of a process in memory, and by all processes through a file, where a folder for it is given.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from evenly.workbench.language import is_text, load_words

if TYPE_CHECKING:
    from evenly.data import Dataset
    from evenly.workbench.trial import TrialSettings

__all__ = ["EvaluationSets", "data_hash", "load_data", "evaluation_sets"]

SPLIT_SEED = 0
"""Seeds the split into training and test set, the same for every trial."""


@dataclass(frozen=True)
class EvaluationSets:
    """What a network is tested on.

    Attributes:
        clean_x, clean_y: the test set.
        shifts: one ``(name, severity)`` a set in ``shifted_x``: a corruption and its severity 1..5, or a shifted
            domain and 0.
        shifted_x: (sets, samples, ...) the same test samples, changed.
        shifted_y: (sets, samples) their labels.
        ood_x, ood_y: the second data set, if there is one.
    """

    clean_x: Tensor
    clean_y: Tensor
    shifts: tuple[tuple[str, int], ...]
    shifted_x: Tensor
    shifted_y: Tensor
    ood_x: Tensor | None = None
    ood_y: Tensor | None = None


@functools.lru_cache(maxsize=4)
def load_data(spec: str) -> Dataset:
    """The data set of a ``--data`` option, loaded once a process; see :func:`evenly.data.load`.

    >>> load_data("digits").train_x.shape[1:]
    torch.Size([1, 8, 8])
    """
    from evenly.data import load

    return load(spec, seed=SPLIT_SEED)


@functools.lru_cache(maxsize=4)
def data_hash(spec: str, ood: str | None = None) -> str:
    """A digest of the values and labels of one or two data sets.

    >>> data_hash("digits") == data_hash("digits", "digits")
    False
    """
    digest = hashlib.sha256()
    for each in [spec] if ood is None else [spec, ood]:
        if is_text(each):
            text = load_words(each)
            digest.update(text.train.numpy().tobytes() + text.val.numpy().tobytes())
            continue
        data = load_data(each)
        for array in (data.train_x, data.train_y, data.test_x, data.test_y):
            digest.update(array.contiguous().numpy().tobytes())
        digest.update(json.dumps(list(map(str, data.class_names))).encode())
    return digest.hexdigest()[:16]


def evaluation_sets(settings: TrialSettings, cache: str | Path | None = None) -> EvaluationSets:
    """The test sets of a trial.

    Args:
        settings: of any trial of the comparison; the sets depend on the data, the severities, the corruption seed
            and the number of samples only.
        cache: a folder for the corrupted sets; ``None`` for memory only.

    Raises:
        ValueError: the second data set shares no class with the first, or has another shape.
    """
    return _sets(
        settings.data,
        settings.ood,
        settings.severities,
        settings.corruption_seed,
        settings.test_samples,
        _code(),
        None if cache is None else str(cache),
    )


def _code() -> str:
    from evenly.workbench.trial import code_version

    return code_version()


@functools.lru_cache(maxsize=2)
def _sets(
    spec: str, ood: str | None, severities: tuple[int, ...], seed: int, samples: int, code: str, cache: str | None
) -> EvaluationSets:
    from evenly.data import match_classes

    data = load_data(spec)
    chosen = torch.randperm(len(data.test_x), generator=torch.Generator().manual_seed(seed))[:samples]
    shifts = _shifts(data, severities)
    base, labels = data.test_x[chosen], data.test_y[chosen]
    name = hashlib.sha256(json.dumps([data_hash(spec), severities, seed, samples, code]).encode()).hexdigest()[:16]
    path = None if cache is None else Path(cache) / f"sets-{name}.npz"
    if path is not None and path.is_file():
        with np.load(path) as kept:
            shifted_x, shifted_y = torch.from_numpy(kept["x"]), torch.from_numpy(kept["y"])
    else:
        shifted_x, shifted_y = _make(data, base, labels, shifts, seed)
        if path is not None:
            _write(path, x=shifted_x.numpy(), y=shifted_y.numpy())
    second = None if ood is None else match_classes(data, load_data(ood))
    return EvaluationSets(
        data.test_x,
        data.test_y,
        shifts,
        shifted_x,
        shifted_y,
        None if second is None else second.test_x,
        None if second is None else second.test_y,
    )


def _shifts(data: Dataset, severities: tuple[int, ...]) -> tuple[tuple[str, int], ...]:
    from evenly.data import corruption_suite, domains_for

    corruptions = [(name, severity) for name in corruption_suite(data) for severity in severities]
    return (*corruptions, *((name, 0) for name in domains_for(data)))


def _make(data: Dataset, x: Tensor, y: Tensor, shifts: tuple[tuple[str, int], ...], seed: int) -> tuple[Tensor, Tensor]:
    from evenly.data import corruption_suite, domains_for

    suite, domains = corruption_suite(data), domains_for(data)
    out_x = torch.empty((len(shifts), *x.shape), dtype=torch.float32)
    out_y = y.repeat(len(shifts), 1)
    for index, (name, severity) in enumerate(shifts):
        if severity:
            out_x[index] = suite[name](x, severity, seed)
        else:
            out_x[index], out_y[index] = domains[name](x, y, seed)
    return out_x, out_y


def _write(path: Path, **arrays: np.ndarray) -> None:
    # Under another name first: a reader sees a whole file or none.
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.stem}-{os.getpid()}.part")
    with draft.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    os.replace(draft, path)
