"""Launching the CPU kernels: memory, sizes and a few choices cross the border to C++."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from evenly.core.kernels import cpu
from evenly.core.kernels.derivatives import Normalize, announced, applied
from evenly.core.kernels.launch import ACTIVATIONS, DTYPES, MEASURED, SCALES, Entry, Unsupported
from evenly.core.kernels.lowering import Block
from evenly.core.patterns import Plan

__all__ = ["CpuEntry", "load"]

_SMALL = 1 << 15


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

    def prepare(self, function: Callable[..., Any]) -> None:
        """Make :attr:`ready`, if PyTorch has the interface that it needs."""
        module = cpu.extension()
        assert module is not None
        if module.looks():
            self.ready = module.Ready(
                self.layout,
                tuple(self.shape),
                self.order,
                self.weight_shape,
                self.plan.out_shape if self.natural else None,
                self.stats_like if self.keeps else None,
                function,
                _repeated(),
                self.spec,
            )

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
        mean_out, var_out = moments or MEASURED
        running_mean, running_var, momentum = running or (None, None, 0.0)
        one = running_mean if running is not None else var if var is not None else mean
        layout = self.layout if mask is None else self._masked(mask)
        layout.forward(
            x,
            y,
            stats,
            weight,
            bias,
            residual,
            bits,
            mean,
            var,
            mean_out,
            var_out,
            running_mean,
            running_var,
            momentum,
            0 if one is None else DTYPES[one.dtype],
        )
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
        self.layout.again(x, y, stats, weight, bias, residual)
        return y

    def moments(self, x: Tensor, stats: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and variance, flat; ``stats`` are filled."""
        mean, var = self.empty_moments()
        self.layout.forward(x, None, stats, *[None] * 6, mean, var, None, None, 0.0, 0)
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
        layout.backward(
            dy,
            x,
            stats,
            weight,
            bias,
            residual,
            bits,
            dx,
            dweight,
            dbias,
            None if dresidual is dy else dresidual,
            dmean,
            dvar,
        )
        return dx, dweight, dbias, dresidual

    def _masked(self, mask: Tensor) -> Any:
        assert self.mask is not None
        return self.layout.masked(mask, *self.mask)

    def positive(self, bits: Tensor, x: Tensor) -> Tensor:
        """The sign bits as a boolean tensor of the shape of ``x``."""
        row = self.layout.bits_row
        rows = bits.view(-1, (row + 7) // 8)
        each = (rows.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
        k0, r0, k1, r1 = self.block.sizes
        flat = each.flatten(1)[:, :row].reshape(k0, -1)[:, : r0 * k1 * r1].bool()
        laid = flat.reshape([x.shape[axis] for axis in self.order])
        return laid.permute([self.order.index(axis) for axis in range(x.ndim)])


@functools.cache
def _repeated() -> Callable[..., Tensor]:
    """As the autograd function of all calls, for those that are repeated: both passes stay in C++."""
    module = cpu.extension()
    assert module is not None
    forward, apply = module.passes(Normalize.backward, announced)
    kind: Any = type("Normalize", (Normalize,), {"forward": staticmethod(forward)})
    kind._backward_cls.apply = apply  # PyTorch's own asks first which of two functions is the backward pass
    return applied(kind)


def load() -> type[Entry] | None:
    """The class of the entries; None, with one warning, where the kernels are not compiled."""
    return None if cpu.extension() is None else CpuEntry
