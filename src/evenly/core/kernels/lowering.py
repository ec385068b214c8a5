"""Lowering: a pattern and a memory layout become one of a few loops.

Axes of the same kind that lie next to each other in memory are one axis to a kernel. What is left is a block

.. math:: (K_0, R_0, K_1, R_1)

in row-major order, ``K`` kept (a statistic of its own for each index), ``R`` reduced; unused ones have size 1.
Layer normalization, instance normalization and weight standardization are ``(rows, 1, 1, length)``, batch
normalization is ``(1, N, C, HW)``, the same in channels-last memory ``(1, N·HW, C, 1)``, group normalization in
channels-last memory ``(N, HW, G, C/G)``. Patterns that alternate more often are left to PyTorch.

The weight of the element at offset ``o`` is ``weight[(o // wdiv) % wsize]``; its flag in a mask is
``mask[(o // outer) * size + (o // div) % size]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from evenly.core.patterns import Plan

__all__ = ["Block", "block", "dense_order", "laid_mask", "mask_index", "weight_index"]


class Block(NamedTuple):
    """Sizes of the canonical block, and the kept elementary axes in the order in which memory has them."""

    sizes: tuple[int, int, int, int]
    kept: tuple[int, ...]


def dense_order(x: Tensor) -> tuple[int, ...] | None:
    """The axes of a tensor from the slowest to the fastest in memory, or None if memory has gaps or overlaps.

    >>> import torch
    >>> dense_order(torch.empty(2, 3, 4, 5, memory_format=torch.channels_last))
    (0, 2, 3, 1)
    >>> dense_order(torch.empty(4, 6)[:, ::2]) is None
    True
    """
    if x.is_contiguous():
        return tuple(range(x.ndim))
    shape, stride = x.shape, x.stride()
    axes = sorted(range(x.ndim), key=lambda axis: (-stride[axis], axis))
    expected = 1
    for axis in reversed(axes):
        if shape[axis] != 1:
            if stride[axis] != expected:
                return None
            expected = expected * shape[axis]
    return tuple(axes)


def _memory_axes(plan: Plan, order: Sequence[int]) -> list[int]:
    """The elementary axes in the order of memory, those of size 1 left out."""
    return [axis for position in order for axis in plan.resolved.inputs[position] if plan.sizes[axis] != 1]


def block(plan: Plan, order: Sequence[int]) -> Block | None:
    """The canonical block of a pattern whose tensor's axes lie in memory in this order; None if there is none.

    >>> from evenly.core.patterns import bind
    >>> block(bind("n c h w -> c", (8, 16, 5, 5)), (0, 1, 2, 3)).sizes
    (1, 8, 16, 25)
    >>> block(bind("n c h w -> c", (8, 16, 5, 5)), (0, 2, 3, 1)).sizes
    (1, 200, 16, 1)
    """
    axes = _memory_axes(plan, order)
    sizes: list[Any] = [1, 1, 1, 1]
    slot = -1
    for axis in axes:
        reduced = axis in plan.reduced
        if slot < 0 or (slot % 2 == 1) != reduced:
            slot = slot + 1 if slot >= 0 or not reduced else 1
            if slot > 3:
                return None
        sizes[slot] = sizes[slot] * plan.sizes[axis]
    if slot == 1:  # K R: the reduced values are the contiguous ones
        sizes = [sizes[0], 1, 1, sizes[1]]
    kept = tuple(axis for axis in axes if axis not in plan.reduced)
    return Block((sizes[0], sizes[1], sizes[2], sizes[3]), kept)


def weight_index(plan: Plan, order: Sequence[int], groups: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    """``(wdiv, wsize)`` of a weight that carries these axes; None if they are not together and in order in memory."""
    carried = [axis for group in groups for axis in group if plan.sizes[axis] != 1]
    if not carried:
        return 1, 1
    axes = _memory_axes(plan, order)
    start = axes.index(carried[0])
    if axes[start : start + len(carried)] != carried:
        return None
    wsize, wdiv = 1, 1
    for axis in carried:
        wsize = wsize * plan.sizes[axis]
    for axis in axes[start + len(carried) :]:
        wdiv = wdiv * plan.sizes[axis]
    return wdiv, wsize


def mask_index(shape: Sequence[int], order: Sequence[int], mask_shape: Sequence[int]) -> tuple[int, int, int]:
    """``(outer, div, size)`` of a mask that broadcasts to ``shape``, whose axes lie in memory in this order.

    A mask of the outermost axes, of axes that are neighbours, or of both is not expanded; another one is, to a flag
    for each value.

    >>> mask_index((2, 3, 4, 5), (0, 1, 2, 3), (2, 1, 4, 5))  # images: a flag a pixel
    (60, 1, 20)
    >>> mask_index((2, 3, 4), (0, 1, 2), (2, 3, 1))  # tokens
    (24, 4, 6)
    """
    carried = _carried(shape, order, mask_shape)
    sizes = [shape[axis] for axis in order if shape[axis] != 1]
    total = math.prod(sizes)
    spans = _spans(carried)
    if spans is None:
        return total, 1, total
    outermost, (start, end) = spans
    div = math.prod(sizes[end:])
    return math.prod(sizes[outermost:]), div, math.prod(sizes[start:end])


def laid_mask(shape: Sequence[int], order: Sequence[int], mask: Tensor) -> Tensor:
    """A mask in the order of memory, expanded where :func:`mask_index` says so."""
    mask = mask.reshape([1] * (len(shape) - mask.ndim) + list(mask.shape))
    if _spans(_carried(shape, order, mask.shape)) is None:
        mask = mask.expand(list(shape))
    return mask.permute(list(order)).contiguous()


def _carried(shape: Sequence[int], order: Sequence[int], mask_shape: Sequence[int]) -> list[bool]:
    """Of each axis in the order of memory that is not 1: does the mask vary along it."""
    wide = [1] * (len(shape) - len(mask_shape)) + list(mask_shape)
    return [wide[axis] != 1 for axis in order if shape[axis] != 1]


def _spans(carried: list[bool]) -> tuple[int, tuple[int, int]] | None:
    """How many outermost axes are carried before a gap, and the neighbours carried after it; None if there are more."""
    changes = [i for i in range(1, len(carried)) if carried[i] != carried[i - 1]]
    starts = ([0] if carried and carried[0] else []) + [i for i in changes if carried[i]]
    ends = [i for i in changes if not carried[i]] + ([len(carried)] if carried and carried[-1] else [])
    if not starts:
        return 0, (len(carried), len(carried))
    if len(starts) == 1:
        return 0, (starts[0], ends[0])
    if len(starts) == 2 and starts[0] == 0:
        return ends[0], (starts[1], ends[1])
    return None
