r"""Pieces of layers whose gradient is not autograd's.

Such a layer measures a number a statistic, works with few numbers, and maps every value by them; its backward pass
does the same with the gradient. These are the passes over values, each one reading of memory on a CPU:

- :func:`sums_of_squares`, :math:`\sum x^2`, and :func:`sums_of_pairs`, :math:`\sum g` and :math:`\sum g (x - m)`;
- :func:`combine`, :math:`g\,a + (x - m)\,b + c`, and :func:`scale`, the same without :math:`g`;
- :func:`scan`, the recursion :math:`s_t = a_t s_{t-1} + v_t` along the first axis.

The numbers of a statistic are float64 (float32 on devices without it). The axes that keep a statistic of their own
are given, in rising order, and have the shape of the statistic. PyTorch computes the same on other devices, while
compiling, under transforms and without the compiled kernels.

Two layers are one pass each way: :func:`power` (rows whose channels are scaled in groups and then by numbers a
channel, with the sums that power normalization needs) and :func:`online` (online normalization of one value a sample
and channel). These are only there where :func:`available` says so; the layers are written with the pieces otherwise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evenly.core.kernels import cpu
from evenly.core.kernels.lowering import block, dense_order
from evenly.core.kernels.operator import _PLAIN, DTYPES, _ordinary
from evenly.core.kernels.reference import accumulate_dtype
from evenly.core.patterns import bind

__all__ = [
    "available",
    "combine",
    "online",
    "power",
    "scale",
    "scan",
    "statistic_dtype",
    "sums_of_pairs",
    "sums_of_squares",
]

_NO_MEMORY = "The CPU kernels could not allocate their working memory."


def statistic_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the numbers of a statistic."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def available(x: Tensor) -> bool:
    """Whether the kernels compute on this tensor."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or type(x) not in _PLAIN or x.dtype not in DTYPES:
        return False
    return x.layout is torch.strided and x.numel() > 0 and _ordinary() and cpu.extension() is not None


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
    _checked(_kernels().sums(DTYPES[x.dtype], *sizes, x.data_ptr(), 0, 0, total.data_ptr(), 0))
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
    _checked(
        _kernels().sums(
            DTYPES[x.dtype], *sizes, x.data_ptr(), g.data_ptr(), _at(mean), first.data_ptr(), second.data_ptr()
        )
    )
    return first, second


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
        v = x.to(accumulate_dtype(x.dtype))
        if mean is not None:
            v = v - _spread(mean, x, kept)
        v = v * _spread(slope, x, kept)
        if shift is not None:
            v = v + _spread(shift, x, kept)
        if g is not None and gain is not None:
            v = v + g.to(v.dtype) * _spread(gain, x, kept)
        return v.to(x.dtype)
    if g is not None:
        g = _laid_like(g, x)
    gain, mean, shift = _numbers(gain), _numbers(mean), _numbers(shift)
    factor = _numbers(slope)
    y = torch.empty_like(x)
    _checked(
        _kernels().combine(
            DTYPES[x.dtype], *sizes, x.data_ptr(), _at(g), _at(gain), _at(mean), _at(factor), _at(shift), y.data_ptr()
        )
    )
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
    _checked(
        _kernels().scan(
            DTYPES[v.dtype],
            *v.shape,
            _at(factors),
            0.0 if isinstance(a, Tensor) else a,
            v.data_ptr(),
            start.data_ptr(),
            before.data_ptr(),
            last.data_ptr(),
        )
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


def power(
    x: Tensor,
    group: int,
    eps: float,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    grad: Tensor | None = None,
    wanted: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Rows of channels, scaled in groups, then by numbers a channel; or the gradient of that.

    With ``z = x / sqrt(mean of x² over the group + eps)``, or ``z = x`` where ``group`` is 0:

    - without ``grad``: ``z * gain + shift``, and the sum of ``z²`` for each channel;
    - with it: the gradient of the input, where that of ``z`` is ``grad * gain - z * shift``, and the sums of ``grad``
      and of ``grad * z`` for each channel.

    Args:
        x: (..., C), on which :func:`available` is true.
        group: channels that are scaled together; 0: none are.
        eps: added to the mean square of a group.
        gain, shift: (C,); none: 1 and 0.
        grad: the gradient of the output.
        wanted: false: only the sums.
    """
    channels = x.shape[-1]
    x = x if x.is_contiguous() else x.contiguous()
    first = torch.empty(channels, dtype=torch.float64)
    second = None
    if grad is not None:
        grad = _laid_like(grad, x)
        second = torch.empty_like(first)
    out = torch.empty_like(x) if wanted else None
    gain, shift = _numbers(gain), _numbers(shift)
    _checked(
        _kernels().power(
            DTYPES[x.dtype],
            x.numel() // channels,
            channels,
            group,
            eps,
            x.data_ptr(),
            _at(grad),
            _at(out),
            _at(gain),
            _at(shift),
            first.data_ptr(),
            _at(second),
        )
    )
    return out, first, second


def online(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    decays: tuple[float, float],
    eps: float,
    group: int,
    guard_eps: float,
    *,
    grad: Tensor | None = None,
    controllers: tuple[Tensor, Tensor] | None = None,
    wanted: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Online normalization of one value a sample and channel, with its layer scaling; or the gradient of that.

    Without ``grad``: the output, and mean and variance after the last sample. With it: the gradients of input, weight
    and bias; the controllers are moved.

    Args:
        x: (N, C), on which :func:`available` is true.
        weight, bias: (C,) or none.
        mean, var: (C,), before the first sample, also with ``grad``.
        decays: of the statistics and of the controllers.
        eps, guard_eps: added to the variance, and to the mean square of layer scaling.
        group: channels that layer scaling scales together; 0: no layer scaling.
        grad: the gradient of the output.
        controllers: u and v, float64, (C,).
        wanted: false: no gradient of the input.
    """
    x = x if x.is_contiguous() else x.contiguous()
    weight, bias = _numbers(weight), _numbers(bias)
    mean, var = (t.to(torch.float64, copy=True, memory_format=torch.contiguous_format) for t in (mean, var))
    out = torch.empty_like(x) if wanted else None
    first, second, u, v = None, None, None, None
    if grad is not None:
        assert controllers is not None
        grad = _laid_like(grad, x)
        first, second = torch.empty_like(mean), torch.empty_like(mean)
        u, v = controllers
    _checked(
        _kernels().online(
            DTYPES[x.dtype],
            *x.shape,
            group,
            *decays,
            eps,
            guard_eps,
            x.data_ptr(),
            _at(grad),
            _at(out),
            _at(weight),
            _at(bias),
            mean.data_ptr(),
            var.data_ptr(),
            _at(u),
            _at(v),
            _at(first),
            _at(second),
        )
    )
    if first is not None and second is not None:
        return out, first, second
    return out, mean, var


# ---- helpers --------------------------------------------------------------------------------------------------------


def _kernels() -> Any:
    return cpu.extension()


def _checked(status: int) -> None:
    if status:
        raise MemoryError(_NO_MEMORY)


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


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
