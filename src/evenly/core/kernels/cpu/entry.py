"""Launching the CPU kernels: raw pointers, sizes and strides cross the border to C++."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from evenly.core.kernels import cpu
from evenly.core.kernels.lowering import Block
from evenly.core.kernels.operator import ACTIVATIONS, DTYPES, MEASURED, SCALES, Entry, Unsupported
from evenly.core.patterns import Plan

__all__ = ["CpuEntry", "load"]

_SMALL = 1 << 15
_NO_MEMORY = "The CPU kernels could not allocate their working memory."


class CpuEntry(Entry):
    """A call for the C++ kernels."""

    converts = True

    __slots__ = ("layout",)

    def __init__(
        self,
        plan: Plan,
        order: tuple[int, ...],
        lowered: Block,
        index: tuple[int, int],
        x: Tensor,
        weight: Tensor | None,
        options: dict[str, Any],
        *,
        signs: bool,
        given: bool,
        mask: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__(plan, order, lowered, index, x, weight, options, signs=signs, given=given, mask=mask)
        module = cpu.extension()
        assert module is not None
        self.layout = module.Layout(
            *lowered.sizes,
            *index,
            DTYPES[x.dtype],
            DTYPES[self.weight_dtype or x.dtype],
            ACTIVATIONS[self.activation],
            SCALES[options["scale"]],
            bool(options["center"]),
            given,
            signs,
            float(options["eps"]),
            float(options["correction"]),
        )
        bits = self.layout.bits_bytes
        if bits < 0:
            raise Unsupported
        self.signs = bits if signs else 0
        # A small input is in the cache: to measure it again costs less than a tensor of statistics.
        self.keeps = given or signs or mask is not None or math.prod(self.shape) > _SMALL

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        stats: Tensor | None = None,
        bits: Tensor | None = None,
        given: tuple[Tensor | None, Tensor | None] = MEASURED,
        moments: tuple[Tensor, Tensor] | None = None,
        running: tuple[Tensor, Tensor, float] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The output; ``stats``, ``bits`` and ``moments`` are filled, ``running`` moves towards what was measured."""
        y = torch.empty_like(x)
        mean, var = given
        one = running[0] if running is not None else var if var is not None else mean
        layout = self.layout if mask is None else self._masked(mask)
        status = layout.forward(
            x.data_ptr(),
            y.data_ptr(),
            0 if stats is None else stats.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            0 if bits is None else bits.data_ptr(),
            0 if mean is None else mean.data_ptr(),
            0 if var is None else var.data_ptr(),
            0 if moments is None else moments[0].data_ptr(),
            0 if moments is None else moments[1].data_ptr(),
            0 if running is None else running[0].data_ptr(),
            0 if running is None else running[1].data_ptr(),
            0.0 if running is None else running[2],
            0 if one is None else DTYPES[one.dtype],
        )
        if status:
            raise MemoryError(_NO_MEMORY)
        return y

    def again(
        self,
        given: tuple[Tensor | None, Tensor | None],
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        stats: Tensor | None,
    ) -> Tensor:
        """The output once more, bit for bit; ``stats`` are what the forward pass kept."""
        if stats is None:
            return super().again(given, x, weight, bias, residual, stats)
        residual = None if residual is None else self.like(residual, x)
        y = torch.empty_like(x)
        status = self.layout.again(
            x.data_ptr(),
            y.data_ptr(),
            stats.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr(),
        )
        if status:
            raise MemoryError(_NO_MEMORY)
        return y

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, flat."""
        mean, var = self.empty_moments()
        if self.layout.forward(x.data_ptr(), 0, 0, 0, 0, 0, 0, 0, 0, mean.data_ptr(), var.data_ptr(), 0, 0, 0.0, 0):
            raise MemoryError(_NO_MEMORY)
        return mean, var

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        stats: Tensor | None,
        bits: Tensor | None,
        needs: tuple[bool, ...],
        dmean: Tensor | None = None,
        dvar: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, weight, bias and residual, those that are needed; without ``stats`` they are measured."""
        dx = torch.empty_like(x) if needs[0] else None
        dweight = torch.empty_like(weight) if weight is not None and needs[1] else None
        dbias = torch.empty_like(bias) if bias is not None and needs[2] else None
        dresidual = None
        if needs[3]:
            # without an activation the gradient passes unchanged
            dresidual = dy if self.activation is None and mask is None else torch.empty_like(x)
        layout = self.layout if mask is None else self._masked(mask)
        status = layout.backward(
            dy.data_ptr(),
            x.data_ptr(),
            0 if stats is None else stats.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            0 if bits is None else bits.data_ptr(),
            0 if dx is None else dx.data_ptr(),
            0 if dweight is None else dweight.data_ptr(),
            0 if dbias is None else dbias.data_ptr(),
            0 if dresidual is None or dresidual is dy else dresidual.data_ptr(),
            0 if dmean is None else dmean.data_ptr(),
            0 if dvar is None else dvar.data_ptr(),
        )
        if status:
            raise MemoryError(_NO_MEMORY)
        return dx, dweight, dbias, dresidual

    def _masked(self, mask: Tensor) -> Any:
        assert self.mask is not None
        return self.layout.masked(mask.data_ptr(), *self.mask)

    def positive(self, bits: Tensor, x: Tensor) -> Tensor:
        """The sign bits as a boolean tensor of the shape of ``x``."""
        row = self.layout.bits_row
        rows = bits.view(-1, (row + 7) // 8)
        each = (rows.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
        k0, r0, k1, r1 = self.block.sizes
        flat = each.flatten(1)[:, :row].reshape(k0, -1)[:, : r0 * k1 * r1].bool()
        laid = flat.reshape([x.shape[axis] for axis in self.order])
        return laid.permute([self.order.index(axis) for axis in range(x.ndim)])


def load() -> type[Entry] | None:
    """The class of the entries; None, with one warning, where the kernels are not compiled."""
    return None if cpu.extension() is None else CpuEntry
