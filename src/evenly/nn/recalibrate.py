r"""Recalibration: replace running statistics by population statistics ("precise BN").

While a network trains, batch normalization keeps exponential averages of statistics of weights that still change.
The paper's own inference rule is another: freeze the weights, pass training batches through, and average,

.. math::
    E[x] = \frac1k \sum_b μ_b, \qquad \mathrm{Var}[x] = \frac1k \sum_b \frac{m_b}{m_b - 1} σ_b^2 .

Use it after training with a small batch or a large learning rate, after weights were averaged or changed by hand,
or to move a network to another domain. It needs inputs only, no labels, and no gradient.

References:
    S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
    Shift", ICML 2015, arXiv 1502.03167, algorithm 2 (lines 8 to 10).
    Y. Wu and J. Johnson, "Rethinking 'Batch' in BatchNorm", 2021, arXiv 2105.07576, section 3 (precise BN).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from evenly.nn.norm import Norm

__all__ = ["recalibrate_"]

_Module = TypeVar("_Module", bound=nn.Module)


def recalibrate_(model: _Module, batches: Iterable[Any], num_batches: int | None = None) -> _Module:
    """Set the running statistics of every batch norm to the plain average over batches, in place.

    Each layer gets the average over the batches of its input's mean and unbiased variance. The batch norms run in
    training mode, so that every layer sees inputs normalized by the statistics of their own batch, as in training;
    everything else runs in eval mode, so that dropout and the like do not distort what is measured. Afterwards
    momentum, mode and weights are as they were.

    Args:
        model: any module with :class:`evenly.nn.BatchNorm` or ``torch.nn.BatchNorm*d`` / ``SyncBatchNorm`` layers
            that track running statistics.
        batches: inputs. A tensor is passed as ``model(batch)``; of a tuple or list the first entry is, so that a
            labelled loader can be given; a mapping is passed as keyword arguments. Tensors go to the model's device.
        num_batches: use this many batches (default: all).

    Returns:
        The model.

    Raises:
        ValueError: the model has no batch norm that tracks statistics, or there are no batches, or fewer than
            ``num_batches``; and what the model raises, such as a batch with one value a channel. The running
            statistics are then as they were.

    >>> import torch
    >>> from torch import nn
    >>> from evenly.nn import BatchNorm, recalibrate_
    >>> model = nn.Sequential(BatchNorm(1))
    >>> model = recalibrate_(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [6.0]])])
    >>> model[0].running_mean, model[0].running_var
    (tensor([3.]), tensor([5.]))
    """
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"num_batches is {num_batches}; expected 1 or more, or None for all")
    layers: list[Any] = [layer for layer in model.modules() if _tracks_batches(layer)]
    if not layers:
        raise ValueError("the model has no batch norm that tracks running statistics; there is nothing to recalibrate")
    modes = {module: module.training for module in model.modules()}
    momenta = [layer.momentum for layer in layers]
    before = [{name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)} for layer in layers]
    used = 0
    finished = False
    try:
        model.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a cumulative average: each batch weighs the same
            layer.train()
        device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
        with torch.no_grad():
            for batch in batches:
                _call(model, batch, device)
                used += 1
                if used == num_batches:
                    break
        if used == 0 or (num_batches is not None and used < num_batches):
            raise ValueError(f"batches held {used}; expected {num_batches or 'at least 1'}")
        finished = True
    finally:
        for module, mode in modes.items():
            module.training = mode
        for layer, momentum, buffers in zip(layers, momenta, before, strict=True):
            layer.momentum = momentum
            if not finished:
                for name, buffer in buffers.items():
                    getattr(layer, name).copy_(buffer)
    return model


def _tracks_batches(layer: nn.Module) -> bool:
    # A batch norm of ours is a Norm whose training statistic is the one that it keeps; an instance norm is not.
    if isinstance(layer, Norm):
        return layer.running_mean is not None and layer.running == layer.pattern
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None


def _call(model: nn.Module, batch: Any, device: torch.device | None) -> None:
    def place(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    if isinstance(batch, torch.Tensor):
        model(place(batch))
    elif isinstance(batch, Mapping):
        model(**{key: place(value) for key, value in batch.items()})
    elif isinstance(batch, list | tuple) and batch:
        model(place(batch[0]))
    else:
        raise ValueError(f"expected a batch to be a tensor, a non-empty tuple or list, or a mapping; got {batch!r}")
