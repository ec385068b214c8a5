"""Unlabelled batches: what ``calibrate=`` takes, walked once a pass, at most ``samples`` of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map

__all__ = ["Batches", "Inputs", "first_output", "move"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
_CHUNK = 64


class Batches:
    """An iterable of batches that can be walked several times.

    A batch is a tensor, a sequence whose first item is the input (labels are never looked at), or a mapping of
    keyword arguments. A tensor in place of the iterable is cut into batches of 64. An iterator that can be walked
    only once is kept in memory up to ``samples``.
    """

    def __init__(self, source: Any, samples: int | None, device: torch.device) -> None:
        if samples is not None and samples < 1:
            raise ValueError(f"samples={samples} must be at least 1, or None for all.")
        if isinstance(source, Tensor):
            source = list(source.split(_CHUNK))
        if isinstance(source, (str, bytes, Mapping)) or not isinstance(source, Iterable):
            raise TypeError(
                f"calibrate={type(source).__name__} is not an iterable of batches. Give a DataLoader, a list of "
                f"tensors, or [batch] for one batch."
            )
        self.samples = samples
        self.device = device
        if isinstance(source, Iterator):
            if samples is None:
                raise ValueError(
                    "An iterator can be walked only once, and calibration needs a pass a layer. Give a DataLoader or "
                    "a list, or a number of samples to keep."
                )
            self.source: Iterable[Any] = list(_limited(source, samples))
        else:
            self.source = source
        if next(iter(self), None) is None:
            raise ValueError("calibrate= has no batches.")

    def __iter__(self) -> Iterator[Inputs]:
        for batch in _limited(self.source, self.samples):
            yield move(arguments(batch), self.device)

    def probe(self) -> Inputs:
        """Two samples, to look at the data flow."""
        args, kwargs = next(iter(self))
        return _head((args, kwargs), 2)


def arguments(batch: Any) -> Inputs:
    """How the model is called on a batch."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)) and batch:
        return arguments(batch[0])
    raise TypeError(
        f"A batch is a {type(batch).__name__}, expected a tensor, a tuple whose first item is the input, or a dict of "
        f"keyword arguments."
    )


def move(inputs: Inputs, device: torch.device) -> Inputs:
    return tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, inputs)


def size(inputs: Inputs) -> int:
    """Samples of a batch: the leading axis of its first tensor."""
    for t in tree_iter(inputs):
        if isinstance(t, Tensor) and t.ndim:
            return len(t)
    return 1


def _head(inputs: Inputs, count: int) -> Inputs:
    total = size(inputs)
    return tree_map(lambda t: t[:count] if isinstance(t, Tensor) and t.ndim and len(t) == total else t, inputs)


def _limited(source: Iterable[Any], samples: int | None) -> Iterator[Any]:
    left = samples
    for batch in source:
        if left is None:
            yield batch
            continue
        inputs = arguments(batch)
        count = size(inputs)
        if count > left:
            args, kwargs = _head(inputs, left)
            yield args[0] if args else kwargs
            return
        yield batch
        left -= count
        if left == 0:
            return


def first_output(out: Any) -> Tensor:
    """The tensor of a model's result that is compared: ``logits`` where it has them, else the first."""
    logits = getattr(out, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(out, Mapping):
        if isinstance(out.get("logits"), Tensor):
            return out["logits"]
        out = list(out.values())
    for t in tree_iter(out):
        if isinstance(t, Tensor) and t.is_floating_point():
            return t
    raise TypeError(f"The model returned {type(out).__name__} without a floating-point tensor; nothing to compare.")


def device_of(model: nn.Module) -> torch.device:
    for t in [*model.parameters(), *model.buffers()]:
        return t.device
    return torch.device("cpu")
