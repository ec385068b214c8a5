"""Launching the CUDA kernels: how a call becomes tiles, splits and programs.

What has one weight, or one period of weights, is a run; a group is ``A`` runs. A group that fits in a tile is read
once. Larger ones are split into enough programs to fill the device. The choice depends on shapes and on the number of
multiprocessors only, so that results are the same from run to run.
"""

from __future__ import annotations

import functools
import struct
from typing import Any

import torch
from torch import Tensor

from evenly.core.kernels.cuda import interpreted, kernels
from evenly.core.kernels.launch import ACTIVATIONS, MEASURED, SCALES, Entry, Unsupported
from evenly.core.kernels.lowering import Block
from evenly.core.patterns import Plan

__all__ = ["CudaEntry", "Limits", "limits"]

_SHORT_RUN = 32  # shorter runs are treated as columns


class Limits:
    """Sizes that launches are chosen by.

    Attributes:
        fused: values of the largest group that is one tile (float32; half as many in float64).
        tile: values of a tile otherwise.
        columns: widest tile over columns.
        programs: programs a multiprocessor, where work is split.
        gradient: partial sums of a weight that one program adds up.
    """

    fused = 16384
    tile = 4096
    columns = 128
    programs = 4
    gradient = 32768


limits = Limits()


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def _warps(values: int) -> int:
    return min(16, max(1, _power(values) // 512))


@functools.lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # the interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


class CudaEntry(Entry):
    """A call for the Triton kernels."""

    __slots__ = (
        "A",
        "acc",
        "cols",
        "common",
        "flags_at",
        "fused",
        "given",
        "groups",
        "int_shape",
        "mode",
        "nseg",
        "number",
        "phase",
        "processors",
        "row_bytes",
        "seg",
        "spread",
        "tile",
        "wdiv",
        "wsize",
    )

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
        scale = options["scale"]
        if scale in ("l1", "max") or (scale == "l2" and x.dtype == torch.float64):
            raise Unsupported
        super().__init__(plan, order, lowered, index, x, weight, options, signs=signs, given=given, mask=mask)
        k0, r0, k1, r1 = lowered.sizes
        self.given = given
        self.number = x.numel()
        self.groups = k0 * k1
        self.processors = _multiprocessors(x.device)
        self._runs(*index)
        length = self.row_length
        self.row_bytes = _ceil(length, 8)
        if signs:
            self.signs = self.number // length * self.row_bytes
        double = self.stats_dtype == torch.float64
        self.acc = kernels.tl.float64 if double else kernels.tl.float32
        self.tile = limits.tile // 2 if double else limits.tile
        whole = _power(self.A) * max(8, _power(self.seg))
        self.fused = not self.cols and whole <= (limits.fused // 2 if double else limits.fused)
        self.flags_at = dict(zip(("mouter", "mdiv", "msize"), mask or (1, 1, 1), strict=True))
        self.common = {
            "CENTER": bool(options["center"]),
            "SCALE": SCALES[options["scale"]],
            "ACT": ACTIVATIONS[self.activation],
            "MASKED": mask is not None,
            "ACC": self.acc,
            **self.flags_at,
        }
        self.int_shape = {
            "K": self.groups,
            "A": self.A,
            "seg": self.seg,
            "nseg": self.nseg,
            "L": k1 * r1,
            "R0L": r0 * k1 * r1,
            "K1": k1,
            "R1": r1,
            "wdiv": self.wdiv,
            "wsize": max(1, self.wsize),
        }

    def _runs(self, wdiv: int, wsize: int) -> None:
        """Choose runs, and how weights vary along them."""
        _, r0, k1, r1 = self.block.sizes
        period = wdiv * wsize
        self.mode, self.phase = 0, False
        self.seg, self.nseg = r1, 1
        self.cols = r0 > 1 and r1 < _SHORT_RUN and (wsize == 0 or k1 * r1 % period == 0)
        if self.cols:
            self.mode = 2 if wsize else 0
        elif wsize == 1:
            self.mode, wdiv = 1, self.number
        elif wsize:
            if wdiv % r1 == 0:
                self.mode = 1
            elif wdiv >= 16 and r1 % wdiv == 0:
                self.mode, self.seg = 1, wdiv
            elif r1 % period == 0:
                self.mode, self.seg = 2, period
            elif period % r1 == 0 and r1 % wdiv == 0:
                self.mode, self.phase = 2, True
            else:
                raise Unsupported
            self.nseg = r1 // self.seg
        self.wdiv, self.wsize = wdiv, wsize
        self.A = r0 * self.nseg
        self.spread = 0 if r0 == 1 else 1 if self.nseg == 1 else 2

    @property
    def row_length(self) -> int:
        """Values after which sign bits start a new byte."""
        return self.block.sizes[2] * self.block.sizes[3] if self.cols else self.seg

    # ---- forward ----------------------------------------------------------------------------------------------------

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
        y = torch.empty_like(x)
        with _on(x):
            self._forward(x, weight, bias, residual, y, stats, bits, given, moments, running, _flags(mask))
        return y

    def moments(self, x: Tensor, stats: Tensor | None = None) -> tuple[Tensor, Tensor]:
        found = self.empty_moments()
        with _on(x):
            self._forward(x, None, None, None, None, stats, None, MEASURED, found, None, None)
        return found

    def _forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        y: Tensor | None,
        stats: Tensor | None,
        bits: Tensor | None,
        given: tuple[Tensor | None, Tensor | None],
        moments: tuple[Tensor, Tensor] | None,
        running: tuple[Tensor, Tensor, float] | None,
        flags: Tensor | None,
    ) -> None:
        mean_out, var_out = moments or (None, None)
        mean, var, momentum = running or (None, None, 0.0)
        measured = {
            "EPS": float(self.options["eps"]),
            "CORRECTION": float(self.options["correction"]),
            "MOMENTS": moments is not None,
            "RUNNING": running is not None,
        }
        bytes_of = struct.unpack("q", struct.pack("d", float(momentum)))[0]
        affine = self._affine(weight, bias, residual, bits)
        if self.fused and not self.given:
            rows, high, wide = self._fused_tile()
            kernels.fused_forward[(_ceil(self.groups, rows),)](
                x, residual, weight, bias, y, stats, bits, flags, mean_out, var_out, mean, var,
                **self.int_shape, row_bytes=self.row_bytes, n=self.plan.count, momentum=bytes_of,
                **measured, **self.common, **affine, SPREAD=self.spread, STORE=y is not None,
                SAVE=stats is not None, ROWS=rows, AP=high, BP=wide, num_warps=_warps(rows * high * wide),
            )  # fmt: skip
            return
        save = stats is not None
        if not self.given:
            if stats is None and y is not None:
                stats = torch.empty_like(self.stats_like)
            self._measure(x, flags, stats, mean_out, var_out, mean, var, bytes_of, measured)
        if y is None:
            return
        height, width, across, tiles, outer = self._apply_tiles()
        kernels.apply[(outer * tiles,)](
            x, residual, weight, bias, y, stats, bits, flags, *given,
            **self.int_shape, R0=self.block.sizes[1], row_bytes=self.row_bytes, tiles=tiles, across=across,
            EPS=measured["EPS"], **self.common, **affine, GIVEN=self.given, SPREAD=self.spread, COLS=self.cols,
            SAVE=save, BR=height, BC=width, num_warps=_warps(height * width),
        )  # fmt: skip

    def _measure(
        self,
        x: Tensor,
        flags: Tensor | None,
        stats: Tensor | None,
        mean_out: Tensor | None,
        var_out: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: int,
        options: dict[str, Any],
    ) -> None:
        k0, r0, k1, r1 = self.block.sizes
        shape = self.int_shape
        if self.cols:
            length = k1 * r1
            height, width = self._column_tile()
            blocks = _ceil(length, width)
            splits, every = self._split(k0 * blocks, _ceil(r0, height))
            many = k0 * splits * length
            part = torch.empty((3, many), dtype=torch.float64, device=x.device)
            kernels.partial_cols[(k0 * splits * blocks,)](
                x, flags, part, r0, length, **self.flags_at, splits=splits, blocks=blocks, every=every, many=many,
                RAW=not self.means, MASKED=self.mask is not None, ACC=self.acc, BR=height, BC=width,
                num_warps=_warps(height * width),
            )  # fmt: skip
            inner = r1
        else:
            height, width = self._run_tile()
            across = _ceil(self.seg, width)
            tiles = _ceil(self.A, height) * across
            splits, every = self._split(self.groups, tiles)
            many = self.groups * splits
            part = torch.empty((3, many), dtype=torch.float64, device=x.device)
            kernels.partial_runs[(self.groups * splits,)](
                x, flags, part, self.A, self.seg, self.nseg, shape["L"], shape["R0L"], k1, r1, **self.flags_at,
                splits=splits, tiles=tiles, across=across, every=every, many=many, RAW=not self.means,
                SPREAD=self.spread, MASKED=self.mask is not None, ACC=self.acc, BR=height, BC=width,
                num_warps=_warps(height * width),
            )  # fmt: skip
            inner = 1
        rows, q = _combining(splits * inner)
        kernels.combine[(_ceil(self.groups, rows),)](
            part, stats, mean_out, var_out, running_mean, running_var, self.groups, k1, inner, splits, many,
            n=self.plan.count, momentum=momentum, **options, CENTER=self.common["CENTER"], SCALE=self.common["SCALE"],
            SAVE=stats is not None, MASKED=self.mask is not None, DOUBLE=self.stats_dtype == torch.float64, ROWS=rows,
            Q=q, num_warps=4,
        )  # fmt: skip

    # ---- backward ---------------------------------------------------------------------------------------------------

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
        assert stats is not None  # keeps is True
        dx = torch.empty_like(x) if needs[0] else None
        dweight = torch.empty_like(weight) if weight is not None and needs[1] else None
        dbias = torch.empty_like(bias) if bias is not None and needs[2] else None
        dresidual = through = None
        if needs[3]:
            # without an activation and a mask the gradient passes unchanged
            unchanged = self.activation is None and mask is None
            dresidual = dy if unchanged else torch.empty_like(x)
            through = None if unchanged else dresidual
        if self.given:
            dmean = dvar = None
        with _on(x):
            inputs = (dy, x, residual, weight, bias, stats, bits, _flags(mask))
            self._backward(inputs, dx, dweight, dbias, through, dmean, dvar)
        return dx, dweight, dbias, dresidual

    def _backward(
        self,
        inputs: tuple[Tensor | None, ...],
        dx: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
        through: Tensor | None,
        dmean: Tensor | None,
        dvar: Tensor | None,
    ) -> None:
        x, residual, weight, bias, stats, bits = inputs[1:7]
        assert x is not None and stats is not None
        shape = self.int_shape
        affine = self._affine(weight, bias, residual, bits)
        how = {**self.common, **affine, "GIVEN": self.given}
        sums = dweight is not None or dbias is not None
        ends = {
            "EPS": float(self.options["eps"]),
            "CORRECTION": float(self.options["correction"]),
            "DMEAN": dmean is not None,
            "DVAR": dvar is not None,
        }
        runs = self.number // self.seg
        if self.fused:
            within = sums and not self.phase
            if dx is not None or through is not None or within:
                rows, high, wide = self._fused_tile()
                tiles = _ceil(self.groups, rows)
                warps = _warps(rows * high * wide)
                programs, many, part = tiles, runs, None
                if within:
                    if self.mode == 2:
                        programs = min(tiles, self.processors * max(1, limits.programs * 4 // warps))
                        many = programs * self.A * self.seg
                    part = torch.empty((2, many), dtype=self.stats_dtype, device=x.device)
                kernels.fused_backward[(programs,)](
                    *inputs, dx, through, part, dmean, dvar,
                    **shape, row_bytes=self.row_bytes, n=self.plan.count, tiles=tiles, runs=runs, **ends, **how,
                    SPREAD=self.spread, STORE=dx is not None, THROUGH=through is not None, SUMS=within, ROWS=rows,
                    AP=high, BP=wide, num_warps=warps,
                )  # fmt: skip
                if part is not None:
                    self._weights(part, many, dweight, dbias)
            if sums and self.phase:
                self._back_weights(inputs, how, dweight, dbias)
            return
        k0, r0, k1, r1 = self.block.sizes
        coefficients = None
        varying = self.mode == 2 and not self.cols  # its sums are taken with weights, and are of no use for them
        if (dx is not None and not self.given) or (sums and not varying):
            if self.cols:
                height, width = self._column_tile()
                heights = _ceil(k1 * r1, width)
                splits, every = self._split(k0 * heights, _ceil(r0, height))
                outer, many = k0, k0 * splits * k1 * r1
            else:
                height, width = self._run_tile()
                heights = _ceil(self.A, height)
                splits, every = self._split(self.groups * heights, _ceil(self.seg, width))
                outer, many = self.groups, runs * splits
            part = torch.empty((2, many), dtype=self.stats_dtype, device=x.device)
            kernels.back_reduce[(outer * splits * heights,)](
                *inputs, part, **shape, R0=r0, row_bytes=self.row_bytes, splits=splits, heights=heights, every=every,
                many=many, **how, SPREAD=self.spread, COLS=self.cols, BR=height, BC=width,
                num_warps=_warps(height * width),
            )  # fmt: skip
            if dx is not None and not self.given:
                coefficients = torch.empty((2, self.groups), dtype=self.stats_dtype, device=x.device)
                rows, q = _combining(splits * (r1 if self.cols else self.A))
                kernels.back_combine[(_ceil(self.groups, rows),)](
                    part, weight, stats, coefficients, dmean, dvar, **shape, splits=splits, many=many,
                    n=self.plan.count, **ends, CENTER=how["CENTER"], SCALE=how["SCALE"], GIVEN=self.given,
                    MASKED=how["MASKED"],
                    MODE=self.mode, SPREAD=self.spread, COLS=self.cols, WEIGHT=weight is not None,
                    ACC=self.acc, DOUBLE=self.stats_dtype == torch.float64, ROWS=rows, Q=q, num_warps=4,
                )  # fmt: skip
            if sums and not varying:
                self._weights(part, many, dweight, dbias)
        if sums and varying:
            self._back_weights(inputs, how, dweight, dbias)
        if dx is not None or through is not None:
            height, width, across, tiles, outer = self._apply_tiles()
            kernels.back_apply[(outer * tiles,)](
                *inputs, coefficients, dx, through, **shape, R0=r0, row_bytes=self.row_bytes, tiles=tiles,
                across=across, **how, SPREAD=self.spread, COLS=self.cols, STORE=dx is not None,
                THROUGH=through is not None, BR=height, BC=width, num_warps=_warps(height * width),
            )  # fmt: skip

    def _back_weights(
        self, inputs: tuple[Tensor | None, ...], how: dict[str, Any], dweight: Tensor | None, dbias: Tensor | None
    ) -> None:
        period = self.wdiv * self.wsize
        rows = self.number // period
        width = min(_power(period), limits.columns)
        height = max(1, min(_power(rows), self.tile // width))
        blocks = _ceil(period, width)
        splits, every = self._split(blocks, _ceil(rows, height))
        many = splits * period
        part = torch.empty((2, many), dtype=self.stats_dtype, device=self.device)
        how = {name: value for name, value in how.items() if name not in ("MODE", "PHASE")}
        shape = {name: self.int_shape[name] for name in ("K", "seg", "L", "R0L", "K1", "R1", "wdiv", "wsize")}
        kernels.back_weights[(splits * blocks,)](
            *inputs, part, **shape, row_bytes=self.row_bytes, rows=rows, period=period, splits=splits, blocks=blocks,
            every=every, many=many, **how, BR=height, BC=width, num_warps=_warps(height * width),
        )  # fmt: skip
        self._weights(part, many, dweight, dbias, inner=self.wdiv)

    def _weights(
        self, part: Tensor, many: int, dweight: Tensor | None, dbias: Tensor | None, inner: int | None = None
    ) -> None:
        """Gradients of weights from partial sums: ``many`` of them, (…, wsize, inner)."""
        if inner is None:  # as many to a weight as it has runs together
            inner = self.wdiv if self.mode == 2 else many // (self.number // self.wdiv)
        outer = many // (self.wsize * inner)
        if outer * inner > limits.gradient:
            total = part.view(2, outer, self.wsize, inner).sum((1, 3), dtype=torch.float64)
            for target, found in ((dbias, total[0]), (dweight, total[1])):
                if target is not None:
                    target.copy_(found.view(target.shape))
            return
        block = min(32, _power(self.wsize))
        q = min(_power(outer * inner), max(32, 1024 // block))
        kernels.weights[(_ceil(self.wsize, block),)](
            part, dweight, dbias, outer, self.wsize, inner, many, WEIGHT=dweight is not None, BIAS=dbias is not None,
            BJ=block, BQ=q, num_warps=4,
        )  # fmt: skip

    # ---- tiles ------------------------------------------------------------------------------------------------------

    def _affine(
        self, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, bits: Tensor | None
    ) -> dict[str, Any]:
        return {
            "MODE": self.mode,
            "PHASE": self.phase,
            "WEIGHT": weight is not None,
            "BIAS": bias is not None,
            "RESIDUAL": residual is not None,
            "BITS": bits is not None,
        }

    def _fused_tile(self) -> tuple[int, int, int]:
        """Groups a program, and the padded sizes of one."""
        high, wide = _power(self.A), max(8, _power(self.seg))
        fill = _ceil(self.groups, self.processors * limits.programs)
        return min(_power(fill), max(1, self.tile // (high * wide))), high, wide

    def _run_tile(self) -> tuple[int, int]:
        width = min(max(8, _power(self.seg)), max(8, self.tile // 2))
        return max(1, min(_power(self.A), self.tile // width)), width

    def _column_tile(self) -> tuple[int, int]:
        _, r0, k1, r1 = self.block.sizes
        width = min(max(8, _power(k1 * r1)), limits.columns)
        return max(1, min(_power(r0), self.tile // width)), width

    def _apply_tiles(self) -> tuple[int, int, int, int, int]:
        """Height and width of a tile, tiles across, tiles of an outer index, outer indices."""
        k0, r0, k1, r1 = self.block.sizes
        height, width = self._column_tile() if self.cols else self._run_tile()
        rows, columns, outer = (r0, k1 * r1, k0) if self.cols else (self.A, self.seg, self.groups)
        across = _ceil(columns, width)
        return height, width, across, across * _ceil(rows, height), outer

    def _split(self, apart: int, tiles: int) -> tuple[int, int]:
        """Into how many programs to split what ``apart`` programs would do, and how many tiles each then has."""
        wanted = _ceil(self.processors * limits.programs, max(1, apart))
        every = _ceil(tiles, max(1, min(wanted, tiles)))
        return _ceil(tiles, every), every

    def positive(self, bits: Tensor, x: Tensor) -> Tensor:
        rows = bits.view(-1, self.row_bytes)
        each = (rows.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
        laid = each.flatten(1)[:, : self.row_length].bool().reshape([x.shape[axis] for axis in self.order])
        return laid.permute([self.order.index(axis) for axis in range(x.ndim)])


def _flags(mask: Tensor | None) -> Tensor | None:
    """A mask as bytes."""
    return None if mask is None else mask.view(torch.uint8)


def _combining(count: int) -> tuple[int, int]:
    """Groups a program and partial sums at a time."""
    q = min(_power(count), 256)
    return max(1, 256 // q), q


class _Here:
    """No change of device."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


_here = _Here()


def _on(x: Tensor) -> Any:
    """Launches go to the current device: make it that of a tensor."""
    if interpreted() or x.device.index == torch.cuda.current_device():
        return _here
    return torch.cuda.device(x.device)
