r"""Pieces of layers whose gradient is not autograd's.

Such a layer measures a number a statistic, works with few numbers, and maps every value by them; its backward pass
does the same with the gradient. These are the passes over values, each one reading of memory on a CPU:

- :func:`sums_of_squares`, :math:`\sum x^2`, and :func:`sums_of_pairs`, :math:`\sum g` and :math:`\sum g (x - m)`;
- :func:`row_products`, :math:`\sum gx`, :math:`\sum g^2` and :math:`\sum x^2` of rows, and :func:`advance_rows`,
  which moves rows in place: those of an optimizer;
- :func:`combine`, :math:`g\,a + (x - m)\,b + c`, and :func:`scale`, the same without :math:`g`;
- :func:`scan`, the recursion :math:`s_t = a_t s_{t-1} + v_t` along the first axis;
- :func:`clip`, the clamp of a scaled value, and its gradient.

The numbers of a statistic are float64 (float32 on devices without it). The axes that keep a statistic of their own
are given, in rising order, and have the shape of the statistic. PyTorch computes the same on other devices, while
compiling, under transforms and without the compiled kernels.

Two layers are one pass each way, state included: :class:`Power` (power normalization of tokens, group scaling
included) and :class:`Online` (online normalization of one value a sample and channel). These are only there where
:func:`fits` says so; the layers are written with the pieces otherwise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evenly.core.kernels import cpu
from evenly.core.kernels.launch import DTYPES, PLAIN, ordinary
from evenly.core.kernels.lowering import block, dense_order
from evenly.core.kernels.reference import accumulate_dtype
from evenly.core.patterns import bind

__all__ = [
    "Online",
    "Power",
    "advance_rows",
    "available",
    "clip",
    "combine",
    "fits",
    "in_rows",
    "row_products",
    "scale",
    "scan",
    "statistic_dtype",
    "sums_of_pairs",
    "sums_of_squares",
]


def statistic_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the numbers of a statistic."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def available(x: Tensor) -> bool:
    """Whether the kernels compute on this tensor."""
    if type(x) not in PLAIN or not x.is_cpu or x.dtype not in DTYPES or torch.compiler.is_compiling():
        return False
    return x.layout is torch.strided and x.numel() > 0 and ordinary() and cpu.extension() is not None


# ---- sums -----------------------------------------------------------------------------------------------------------


def sums_of_squares(x: Tensor, kept: Sequence[int]) -> Tensor:
    """The sum of squares of the values that share a statistic.

    >>> sums_of_squares(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [0])
    tensor([ 5., 25.], dtype=torch.float64)
    """
    x = _dense(x)
    sizes = _block(x, kept)
    if sizes is None:
        v = x.to(accumulate_dtype(x.dtype))
        return _sum(v * v, kept).to(statistic_dtype(x))
    total = _empty(x, kept)
    _kernels().sums(DTYPES[x.dtype], *sizes, x, None, None, total, None)
    return total


def sums_of_pairs(g: Tensor, x: Tensor, kept: Sequence[int], mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sums of ``g`` and of ``g * (x - mean)`` over the values that share a statistic.

    >>> g, x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 1.0], [2.0, 0.0]])
    >>> sums_of_pairs(g, x, [0], mean=torch.tensor([0.0, 1.0]))
    (tensor([3., 7.], dtype=torch.float64), tensor([ 3., -1.], dtype=torch.float64))
    """
    x = _dense(x)
    sizes = _block(x, kept) if available(g) else None
    if sizes is None:
        v, u = x.to(accumulate_dtype(x.dtype)), g.to(accumulate_dtype(x.dtype))
        if mean is not None:
            v = v - _spread(mean, x, kept)
        return _sum(u, kept).to(statistic_dtype(x)), _sum(u * v, kept).to(statistic_dtype(x))
    g = _laid_like(g, x)
    first, second = _empty(x, kept), _empty(x, kept)
    mean = _numbers(mean)
    _kernels().sums(DTYPES[x.dtype], *sizes, x, g, mean, first, second)
    return first, second


def row_products(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Of each row of each pair (g, x), the sums of ``g * x``, ``g²`` and ``x²`` over all axes but the first: (3, rows).

    The rows of all pairs one after the other, in float64 on a CPU.

    >>> row_products([(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])), (torch.ones(2, 1), torch.zeros(2, 1))])
    tensor([[11.,  0.,  0.],
            [ 5.,  1.,  1.],
            [25.,  0.,  0.]], dtype=torch.float64)
    """
    if not all(in_rows(g, x) for g, x in pairs):
        return torch.cat([_row_products(g, x) for g, x in pairs], 1)
    lengths = [x.shape[0] for _, x in pairs]
    total = sum(lengths)
    out = torch.empty(3, total, dtype=torch.float64)
    first = 0
    for (g, x), rows in zip(pairs, lengths, strict=True):
        _kernels().products(DTYPES[x.dtype], rows, x.numel() // rows, g, x, out, first, total)
        first += rows
    return out


def _row_products(g: Tensor, x: Tensor) -> Tensor:
    if x.is_cpu and x.numel() > 1 << 18 and len(x) > 1 and not torch.compiler.is_compiling():
        rows = max(1, (len(x) << 18) // x.numel())  # temporary values that stay in the cache
        return torch.cat([_row_products(*part) for part in zip(g.split(rows), x.split(rows), strict=True)], 1)
    u, v = g.to(accumulate_dtype(g.dtype)), x.to(accumulate_dtype(x.dtype))
    axes = list(range(1, x.ndim))
    return torch.stack([(u * v).sum(axes), u.square().sum(axes), v.square().sum(axes)]).to(statistic_dtype(x))


def in_rows(g: Tensor, x: Tensor) -> bool:
    """Whether the kernels read both as the same rows."""
    return available(x) and available(g) and g.dtype is x.dtype and x.is_contiguous() and g.is_contiguous()


def advance_rows(x: Tensor, g: Tensor, gain: float, slope: Tensor) -> None:
    """``x += g * gain + x * slope`` in place, with a slope for each row (axis 0), for tensors :func:`in_rows` allows.

    >>> x = torch.ones(2, 2)
    >>> advance_rows(x, torch.ones(2, 2), -0.5, torch.tensor([0.0, 1.0], dtype=torch.float64))
    >>> x
    tensor([[0.5000, 0.5000],
            [1.5000, 1.5000]])
    """
    rows = x.shape[0]
    if not in_rows(g, x):
        wide = slope.to(accumulate_dtype(x.dtype)).view(-1, *[1] * (x.ndim - 1))
        x.add_(g * gain + x * wide)
        return
    slope = slope.contiguous()
    _kernels().advance(DTYPES[x.dtype], rows, x.numel() // rows, g, gain, slope, x)


# ---- maps -----------------------------------------------------------------------------------------------------------


def scale(
    x: Tensor, kept: Sequence[int], slope: Tensor, shift: Tensor | None = None, mean: Tensor | None = None
) -> Tensor:
    """``(x - mean) * slope + shift`` with a number of each for a statistic, in the dtype of ``x``.

    >>> scale(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [0], torch.tensor([1.0, 10.0]), mean=torch.tensor([1.0, 3.0]))
    tensor([[ 0.,  1.],
            [ 0., 10.]])
    """
    return _mapped(None, x, kept, None, slope, shift, mean)


def combine(
    g: Tensor,
    x: Tensor,
    kept: Sequence[int],
    gain: Tensor,
    slope: Tensor,
    shift: Tensor | None = None,
    mean: Tensor | None = None,
) -> Tensor:
    """``g * gain + (x - mean) * slope + shift`` with a number of each for a statistic, in the dtype of ``x``.

    >>> one = torch.ones(1, 2)
    >>> combine(3 * one, 2 * one, [0], torch.tensor([10.0]), torch.tensor([-1.0]))
    tensor([[28., 28.]])
    """
    return _mapped(g, x, kept, gain, slope, shift, mean)


def clip(
    x: Tensor,
    kept: Sequence[int],
    limit: float,
    slope: Tensor,
    shift: Tensor | None = None,
    mean: Tensor | None = None,
    *,
    grad: Tensor | None = None,
) -> Tensor:
    """``z = (x - mean) * slope + shift`` clamped to ±``limit``; of ``grad``, what passes where z is inside.

    >>> x = torch.tensor([[1.0, 2.0, 3.0]])
    >>> clip(x, [0], 25.0, torch.tensor([10.0]))
    tensor([[10., 20., 25.]])
    >>> clip(x, [0], 25.0, torch.tensor([10.0]), grad=torch.ones_like(x))
    tensor([[1., 1., 0.]])
    """
    x = _dense(x)
    sizes = _block(x, kept) if grad is None or available(grad) else None
    if sizes is None:
        v = x.to(accumulate_dtype(x.dtype))
        z = _scaled(v, x, kept, slope, shift, mean)
        if grad is None:
            return z.clamp(-limit, limit).to(x.dtype)
        return torch.where((z >= -limit) & (z <= limit), grad, torch.zeros_like(grad))
    if grad is not None:
        grad = _laid_like(grad, x)
    mean, shift, factor = _numbers(mean), _numbers(shift), _numbers(slope)
    out = torch.empty_like(x)
    _kernels().clip(
        DTYPES[x.dtype],
        *sizes,
        x,
        grad,
        mean,
        factor,
        shift,
        limit,
        out,
    )
    return out


def _scaled(
    v: Tensor, x: Tensor, kept: Sequence[int], slope: Tensor, shift: Tensor | None, mean: Tensor | None
) -> Tensor:
    if mean is not None:
        v = v - _spread(mean, x, kept)
    v = v * _spread(slope, x, kept)
    return v if shift is None else v + _spread(shift, x, kept)


def _mapped(
    g: Tensor | None,
    x: Tensor,
    kept: Sequence[int],
    gain: Tensor | None,
    slope: Tensor,
    shift: Tensor | None,
    mean: Tensor | None,
) -> Tensor:
    x = _dense(x)
    sizes = _block(x, kept) if g is None or available(g) else None
    if sizes is None:
        v = _scaled(x.to(accumulate_dtype(x.dtype)), x, kept, slope, shift, mean)
        if g is not None and gain is not None:
            v = v + g.to(v.dtype) * _spread(gain, x, kept)
        return v.to(x.dtype)
    if g is not None:
        g = _laid_like(g, x)
    gain, mean, shift = _numbers(gain), _numbers(mean), _numbers(shift)
    factor = _numbers(slope)
    y = torch.empty_like(x)
    _kernels().combine(DTYPES[x.dtype], *sizes, x, g, gain, mean, factor, shift, y)
    return y


# ---- a linear recursion ---------------------------------------------------------------------------------------------


def scan(a: Tensor | float, v: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The recursion ``s_t = a_t s_{t-1} + v_t`` along the first axis: the states before each step, and the last.

    Args:
        a: the coefficient: a number, or (T, C).
        v: what is added, (T, C), float32 or float64.
        start: the first state, (C,).

    One step after the other on a CPU. Where PyTorch computes, blocks of rows advance side by side, each from 0 and
    each with the product of its coefficients; then the state at the start of each block is carried from block to
    block, and added in: O(T C) work in O(√T) steps. With a constant coefficient a block is one product with the
    lower-triangular matrix of its powers: O(64 T C) work in O(T/64) steps. Nothing is divided by a product.

    >>> scan(0.5, torch.tensor([[1.0], [1.0], [1.0]]), torch.tensor([0.0]))
    (tensor([[0.0000],
            [1.0000],
            [1.5000]]), tensor([1.7500]))
    """
    if not available(v) or v.dtype not in (torch.float32, torch.float64):
        return _scan_in_blocks(a, v, start)
    v, start = v.contiguous(), start.to(v.dtype).contiguous()
    factors = a.to(v.dtype).contiguous() if isinstance(a, Tensor) else None
    before, last = torch.empty_like(v), torch.empty_like(start)
    _kernels().scan(
        DTYPES[v.dtype],
        *v.shape,
        factors,
        0.0 if isinstance(a, Tensor) else a,
        v,
        start,
        before,
        last,
    )
    return before, last


def _scan_in_blocks(a: Tensor | float, b: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    steps, width = b.shape
    length = max(1, math.isqrt((steps + 1) // 2)) if isinstance(a, Tensor) else min(steps, 64)
    blocks = -(-steps // length)
    short = blocks * length - steps
    rows = torch.nn.functional.pad(b, (0, 0, 0, short)) if short else b
    if isinstance(a, Tensor):
        rows = rows if short else rows.clone()
        factors = torch.nn.functional.pad(a, (0, 0, 0, short), value=1.0) if short else a.clone()
        sums, products = rows.view(blocks, length, width), factors.view(blocks, length, width)
        for row in range(1, length):
            sums[:, row].addcmul_(products[:, row], sums[:, row - 1])
            products[:, row].mul_(products[:, row - 1])
    else:
        # float64 where there is: no device rounds its products to fewer digits, and autocast leaves it alone
        dtype = statistic_dtype(b)
        powers = (_fresh_powers if torch.compiler.is_compiling() else _powers)(a, length, dtype, b.device)
        sums = (powers @ rows.to(dtype).view(blocks, length, width)).to(b.dtype)
        products = (a * powers[:, :1]).to(b.dtype).expand(blocks, length, 1)
    if blocks == 1:
        states = torch.addcmul(sums[0], products[0], start)
    else:
        carried = [start]
        for number in range(blocks - 1):
            carried.append(torch.addcmul(sums[number, -1], products[number, -1], carried[-1]))
        states = sums.addcmul_(products, torch.stack(carried).unsqueeze(1)).view(blocks * length, width)
    return torch.cat([start.unsqueeze(0), states[: steps - 1]]), states[steps - 1]


def _fresh_powers(a: float, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``a ** (i - j)`` at row i and column j <= i, else 0."""
    at = torch.arange(length, dtype=dtype, device=device)
    exponents = at.unsqueeze(1) - at
    return torch.pow(a, exponents.clamp(min=0)).tril()


_powers = functools.lru_cache(maxsize=256)(_fresh_powers)


# ---- layers in one pass ---------------------------------------------------------------------------------------------


def fits(x: Tensor, *numbers: Tensor | None) -> bool:
    """Whether a layer's parameters and buffers can be read and moved by the kernels, beside an input."""
    if not available(x):
        return False
    dtype = None
    for t in numbers:
        if t is not None:
            dtype = dtype or t.dtype
            if t.dtype is not dtype or type(t) not in PLAIN or not t.is_cpu or not t.is_contiguous():
                return False
    return dtype in DTYPES


class Power(NamedTuple):
    """Power normalization of (..., C) in one pass each way, on tensors that :func:`fits` allows.

    With ``z = x / sqrt(mean of x² over the group + eps)``, or ``z = x`` where ``group`` is 0, and the running mean
    square ``phi`` of ``z``: :meth:`forward` gives ``z / sqrt(phi + eps) * weight + bias`` and moves ``running`` and
    ``steps``; :meth:`backward` gives the gradients and moves ``state``.

    Attributes:
        group: channels of a row that are scaled together; 0: none are.
        eps: added to mean squares.
        exact: divide by the mean square of the batch always, with the exact gradient of that; of the rest, only
            ``decays[0]``, ``running`` and ``steps`` are then used.
        warmup: steps that divide by the mean square of the batch.
        decays: of the running mean square and of the running gradient term.
        batch: whether the backward pass divides by the mean square of the batch.
        running: the running mean square.
        steps: how many there were, int64.
        before: the running mean square before the last pass.
        state: the running gradient term, over 1 - its decay.
    """

    group: int
    eps: float
    exact: bool
    warmup: int
    decays: tuple[float, float]
    batch: bool
    running: Tensor
    steps: Tensor
    before: Tensor | None = None
    state: Tensor | None = None

    def _settings(self, x: Tensor) -> tuple[int, int, int, int, int, float, bool]:
        kinds = DTYPES[x.dtype], DTYPES[self.running.dtype]
        return *kinds, x.numel() // x.shape[-1], x.shape[-1], self.group, self.eps, self.exact

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *, again: bool) -> tuple[Tensor, Tensor]:
        """The output, and what the backward pass needs; ``again``: a pass is recomputed, and moves nothing."""
        x = x.contiguous()
        y, kept = torch.empty_like(x), torch.empty(2, x.shape[-1], dtype=torch.float64)
        _kernels().power_forward(
            *self._settings(x),
            x,
            y,
            weight,
            kept,
            bias,
            None if again else self.running,
            self.before,
            self.steps,
            self.warmup,
            self.decays[0],
        )
        return y, kept

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor | None, bias: bool, kept: Tensor, *, wanted: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of input, weight and bias; ``wanted``: that of the input is needed."""
        x = x.contiguous()
        grad = _laid_like(grad, x)
        dx = torch.empty_like(x) if wanted else None
        dweight = None if weight is None else torch.empty_like(weight)
        dbias = torch.empty_like(self.running) if bias else None
        _kernels().power_backward(
            *self._settings(x),
            x,
            dx,
            weight,
            kept,
            grad,
            self.state,
            1 - self.decays[1],
            self.batch,
            dweight,
            dbias,
        )
        return dx, dweight, dbias


class Online(NamedTuple):
    """Online normalization with its guard, on tensors that :func:`fits` allows.

    Of (N, C), :meth:`forward` and :meth:`backward` are one loop over the samples each way: the first moves ``mean``
    and ``var``, the second the controllers ``u`` and ``v``; it goes through the statistics again, in the same order.
    Of inputs with several values a sample and channel, :meth:`numbers` and :meth:`control` work on (N, C) numbers:
    what :func:`scale` and :func:`combine` then need.

    Attributes:
        decays: of the statistics and of the controllers.
        eps: added to the variance.
        group: channels that layer scaling scales together; 0: no layer scaling.
        guard_eps: added to the mean square of layer scaling.
        limit: the output is clamped to ±``limit``; 0: it is not. Not together with layer scaling.
        mean, var: the statistics.
        mean_before, var_before: what they were before the last pass.
        u, v: the controllers.
    """

    decays: tuple[float, float]
    eps: float
    group: int
    guard_eps: float
    limit: float
    mean: Tensor
    var: Tensor
    mean_before: Tensor
    var_before: Tensor
    u: Tensor
    v: Tensor

    def _settings(self) -> tuple[int, float, float, float, float]:
        return self.group, *self.decays, self.eps, self.guard_eps

    def _statistics(self, again: bool) -> tuple[Tensor | None, ...]:
        moved = (None, None) if again else (self.mean, self.var)
        return *moved, self.mean_before, self.var_before

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *, again: bool) -> tuple[Tensor, Tensor]:
        """The output, and what the backward pass needs; ``again``: a pass is recomputed, and moves nothing."""
        x = x.contiguous()
        y, kept = torch.empty_like(x), torch.empty(2, x.shape[1], dtype=torch.float64)
        _kernels().online_forward(
            DTYPES[x.dtype],
            DTYPES[self.mean.dtype],
            *x.shape,
            *self._settings(),
            self.limit,
            x,
            y,
            weight,
            bias,
            kept,
            *self._statistics(again),
        )
        return y, kept

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, kept: Tensor, *, wanted: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of input, weight and bias; ``wanted``: that of the input is needed."""
        x = x.contiguous()
        grad = _laid_like(grad, x)
        dx = torch.empty_like(x) if wanted else None
        dweight = None if weight is None else torch.empty_like(weight)
        dbias = None if bias is None else torch.empty_like(bias)
        _kernels().online_backward(
            DTYPES[x.dtype],
            DTYPES[self.mean.dtype],
            *x.shape,
            *self._settings(),
            self.limit,
            x,
            dx,
            weight,
            bias,
            kept,
            grad,
            self.u,
            self.v,
            dweight,
            dbias,
        )
        return dx, dweight, dbias

    def numbers(
        self,
        m: Tensor,
        s: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        again: bool = False,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the output is made with, (5, N, C) with gain and shift at 2 and 3, and what the backward pass needs.

        Args:
            m, s: mean and variance of each sample and channel, (N, C), contiguous, float64.
            weight, bias: parameters.
            again: a pass is recomputed, and moves nothing.
            kept: what the forward pass returned: go through it again, in the backward pass.
        """
        out = m.new_empty(5, *m.shape)
        statistics = self._statistics(again) if kept is None else (None, None, None, None)
        kept = m.new_empty(2, m.shape[1]) if kept is None else kept
        _kernels().online_numbers(
            DTYPES[self.mean.dtype],
            *m.shape,
            1,
            *self._settings(),
            m,
            s,
            weight,
            bias,
            out,
            kept,
            *statistics,
        )
        return out, kept

    def control(
        self,
        numbers: Tensor,
        total_g: Tensor,
        total_gd: Tensor,
        m: Tensor,
        s: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        positions: int,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of weight and bias; ``numbers`` becomes slope, -, gain and shift of the input's gradient.

        ``total_g`` and ``total_gd`` are the sums of the gradient and of it times x - m over the ``positions``.
        """
        dweight = None if weight is None else torch.empty_like(weight)
        dbias = None if bias is None else torch.empty_like(bias)
        _kernels().online_control(
            DTYPES[self.mean.dtype],
            *m.shape,
            positions,
            *self._settings(),
            m,
            s,
            weight,
            bias,
            numbers,
            total_g,
            total_gd,
            self.u,
            self.v,
            dweight,
            dbias,
        )
        return dweight, dbias


# ---- helpers --------------------------------------------------------------------------------------------------------


def _kernels() -> Any:
    return cpu.extension()


def _dense(x: Tensor) -> Tensor:
    """A tensor whose memory has no gaps, for the kernels."""
    return x.contiguous() if available(x) and dense_order(x) is None else x


def _block(x: Tensor, kept: Sequence[int]) -> tuple[int, int, int, int] | None:
    """The canonical block, or None where PyTorch computes."""
    if not available(x):
        return None
    order = dense_order(x)
    return None if order is None else _lowered(x.shape, tuple(kept), order)


@functools.lru_cache(maxsize=1024)
def _lowered(shape: torch.Size, kept: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, int, int, int] | None:
    names = [f"a{axis}" for axis in range(len(shape))]
    to = [names[axis] for axis in kept]
    found = block(bind(f"{' '.join(names)} -> {' '.join(to)}", shape), order)
    return None if found is None or list(found.kept) != sorted(found.kept) else found.sizes


def _laid_like(g: Tensor, x: Tensor) -> Tensor:
    """``g`` with the dtype and the memory order of ``x``."""
    if g.dtype == x.dtype and g.stride() == x.stride():
        return g
    return torch.empty_like(x).copy_(g)


def _empty(x: Tensor, kept: Sequence[int]) -> Tensor:
    return torch.empty([x.shape[axis] for axis in kept], dtype=torch.float64)


def _numbers(t: Tensor | None) -> Tensor | None:
    """Numbers of a statistic, as the kernels read them."""
    return None if t is None else t.to(torch.float64, memory_format=torch.contiguous_format)


def _spread(number: Tensor, x: Tensor, kept: Sequence[int]) -> Tensor:
    """Numbers of a statistic, broadcastable to ``x``."""
    axes = [axis % x.ndim for axis in kept]
    shape = [x.shape[axis] if axis in axes else 1 for axis in range(x.ndim)]
    return number.to(accumulate_dtype(x.dtype)).reshape(shape)


def _sum(v: Tensor, kept: Sequence[int]) -> Tensor:
    axes = [axis % v.ndim for axis in kept]
    reduced = [axis for axis in range(v.ndim) if axis not in axes]
    return v.sum(reduced) if reduced else v
