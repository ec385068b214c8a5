"""The kernels, in Triton.

The input is a contiguous block (K0, R0, K1, R1), see :mod:`evenly.core.kernels.lowering`. Two families of loops
cover it:

- *runs*: a group is ``A`` runs of ``seg`` contiguous values, a run is what has one weight (or one period of weights);
- *cols*: R1 is short (channels-last): rows of ``L = K1·R1`` values are added up column by column.

A group of a few thousand values is one tile, read once: :func:`fused_forward`, :func:`fused_backward`. Larger groups
are split: :func:`partial_runs` or :func:`partial_cols`, then :func:`combine`, then :func:`apply`; and backward
:func:`back_reduce`, :func:`back_combine`, :func:`back_apply`. Gradients of weights are sums of partial sums in a fixed
order, :func:`weights`; there are no atomics.

Statistics: the mean of a tile, then the moments about it (two passes over registers); tiles are merged about a common
pivot, and splits in double precision (Chan, Golub & LeVeque, "Algorithms for computing the sample variance", The
American Statistician 37, 1983). A mean is kept as two numbers, ``m + low``, of which the second is what rounding took
from it. Where a sum of squares leaves the range of float32 it is taken again in double precision.

MASKED: only values whose flag is set count, and the others are zero in the output and have no gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "apply",
    "back_apply",
    "back_combine",
    "back_reduce",
    "back_weights",
    "combine",
    "fused_backward",
    "fused_forward",
    "partial_cols",
    "partial_runs",
    "weights",
]

_RELU = tl.constexpr(1)
_SILU = tl.constexpr(2)
_NONE = tl.constexpr(0)
_STD = tl.constexpr(1)
_RMS = tl.constexpr(2)
_L2 = tl.constexpr(3)
_LARGEST = tl.constexpr(1e38)  # a sum of squares outside of these is taken again in double precision
_SMALLEST = tl.constexpr(1e-25)
# A norm of zero, where eps is zero too, divides by this: the root of the smallest normal number.
_ZERO32 = tl.constexpr(1.0842021724855044e-19)
_ZERO64 = tl.constexpr(1.4916681462400413e-154)


@triton.jit
def _activate(v, ACT: tl.constexpr):
    if ACT == _RELU:
        return tl.where(v < 0, 0.0, v)
    elif ACT == _SILU:
        return v / (1 + tl.exp(-v))
    elif ACT == 3:
        return 0.5 * v * (1 + tl.erf(v * 0.7071067811865476))
    else:
        return v


@triton.jit
def _activate_backward(g, v, ACT: tl.constexpr):
    if ACT == _RELU:
        return tl.where(v <= 0, 0.0, g)
    elif ACT == _SILU:
        s = 1 / (1 + tl.exp(-v))
        return g * (s * (1 + v * (1 - s)))
    elif ACT == 3:
        density = 0.3989422804014327 * tl.exp(-0.5 * v * v)
        return g * (0.5 * (1 + tl.erf(v * 0.7071067811865476)) + v * density)
    else:
        return g


@triton.jit
def _cast(v, KIND: tl.constexpr):
    """To another type; between double precision and the halves by way of float32."""
    if KIND == tl.float64 or v.dtype != tl.float64:
        return v.to(KIND)
    else:
        return v.to(tl.float32).to(KIND)


@triton.jit
def _finite(v):
    return v - v == 0


@triton.jit
def _divide(a, b):
    # correctly rounded; Triton's own division of float32 is not
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def _root(v):
    if v.dtype == tl.float32:
        return tl.sqrt_rn(v)
    else:
        return tl.sqrt(v)


@triton.jit
def _scale(ss, n, EPS: tl.constexpr, CORRECTION: tl.constexpr, SCALE: tl.constexpr, DOUBLE: tl.constexpr):
    """The variance and the reciprocal of the scale, from a sum of squares; DOUBLE: whether the input is."""
    left = n - CORRECTION
    var = tl.where(left > 0, _divide(ss, tl.where(left > 0, left, 1.0).to(ss.dtype) + tl.zeros_like(ss)), float("nan"))
    var = tl.where(n > 0, var, 0.0)
    one = tl.zeros_like(ss) + 1.0
    if SCALE == _STD or SCALE == _RMS:
        r = _divide(one, _root(var + EPS))
    elif SCALE == _L2:
        norm = _root(ss)
        if EPS == 0:
            norm = tl.where(norm == 0, _ZERO64 if DOUBLE else _ZERO32, norm)
        else:
            norm = tl.where(norm < EPS, EPS, norm)
        r = _divide(one, norm)
    else:
        r = one
    return var.to(ss.dtype), r.to(ss.dtype)


@triton.jit
def _shift(m, r, low, CENTER: tl.constexpr, SCALE: tl.constexpr, GIVEN: tl.constexpr):
    """(c, shift): the normalized value is (x - m) * r + c, and shift more where the mean is not taken out."""
    c = -low * r
    if CENTER or SCALE != _STD or GIVEN:
        shift = tl.zeros_like(c)
    else:
        shift = (m + low) * r
    return c, shift


@triton.jit
def _back(
    s1, sv, r, c, n, dmean, dvar, k, inside,
    EPS: tl.constexpr, CORRECTION: tl.constexpr, CENTER: tl.constexpr, SCALE: tl.constexpr, GIVEN: tl.constexpr,
    DMEAN: tl.constexpr, DVAR: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """dx = r*g*w + ((x - m)*r)*b + c, from the sums of g*w and of g*w times the normalized value."""
    b = tl.zeros_like(s1)
    e = tl.zeros_like(s1)
    if not GIVEN:
        left = n - CORRECTION
        if SCALE == _STD or SCALE == _RMS:
            b = -r * sv / left
        elif SCALE == _L2:
            # a norm at its floor is a constant: no gradient flows through it
            if EPS == 0:
                floor = 1.0 / (_ZERO64 if DOUBLE else _ZERO32)
            else:
                floor = 1.0 / EPS
            if DOUBLE:
                b = tl.where(r >= floor, 0.0, -r * sv)
            else:
                b = tl.where(r.to(tl.float32) >= floor, 0.0, -r * sv)
        if CENTER:
            e = -r * s1 / n
        if DVAR:
            b += tl.load(dvar + k, mask=inside, other=0).to(s1.dtype) * 2 / (left * r)
        if DMEAN:
            e += tl.load(dmean + k, mask=inside, other=0).to(s1.dtype) / n
    return b, e + c * b


@triton.jit
def _finish(
    mean, low, var, r, m2, n, k, inside, stats, mean_out, var_out, running_mean, running_var, momentum, K,
    CENTER: tl.constexpr, SCALE: tl.constexpr, SAVE: tl.constexpr, MOMENTS: tl.constexpr, RUNNING: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Store what was measured."""
    if SAVE:
        kind = stats.dtype.element_ty
        tl.store(stats + k, mean.to(kind), mask=inside)
        tl.store(stats + K + k, r.to(kind), mask=inside)
        tl.store(stats + 2 * K + k, low.to(kind), mask=inside)
        if MASKED:
            tl.store(stats + 3 * K + k, n.to(kind), mask=inside)
    if MOMENTS:
        tl.store(mean_out + k, (mean + low).to(mean_out.dtype.element_ty), mask=inside)
        tl.store(var_out + k, var.to(var_out.dtype.element_ty), mask=inside)
    if RUNNING:
        # double precision, and the bits of a double: a number among the arguments would be rounded to float32
        share = momentum.to(tl.int64).to(tl.float64, bitcast=True)
        old_mean = tl.load(running_mean + k, mask=inside, other=0).to(tl.float64)
        old_var = tl.load(running_var + k, mask=inside, other=0).to(tl.float64)
        new_mean = (1 - share) * old_mean + share * (mean.to(tl.float64) + low.to(tl.float64))
        new_var = (1 - share) * old_var + share * (m2.to(tl.float64) / (n - 1))
        tl.store(running_mean + k, new_mean.to(running_mean.dtype.element_ty), mask=inside)
        tl.store(running_var + k, new_var.to(running_var.dtype.element_ty), mask=inside)


@triton.jit
def _chosen(flags, at, inside, mouter, mdiv, msize, MASKED: tl.constexpr):
    """What of a tile counts; see :func:`evenly.core.kernels.lowering.mask_index`."""
    if MASKED:
        flag = tl.load(flags + (at // mouter) * msize + (at // mdiv) % msize, mask=inside, other=0)
        return inside & (flag != 0)
    else:
        return inside


@triton.jit
def _shown(v, chosen, MASKED: tl.constexpr):
    """Zero where a value does not count."""
    if MASKED:
        return tl.where(chosen, v, 0.0)
    else:
        return v


@triton.jit
def _some(n):
    """A count to divide by: of nothing, the sum is zero."""
    return tl.where(n > 0, n, n * 0 + 1)


# ---- a group in one tile --------------------------------------------------------------------------------------------


@triton.jit
def _begin(k, R0L, K1, R1):
    """Where a group begins."""
    return (k // K1) * R0L + (k % K1) * R1


@triton.jit
def _step(a, seg, nseg, L, SPREAD: tl.constexpr):
    """How far from there run ``a`` begins. SPREAD 0: runs follow each other; 1: a row apart; 2: both."""
    wide = a.to(tl.int64)
    if SPREAD == 0:
        return wide * seg
    elif SPREAD == 1:
        return wide * L
    else:
        return (wide // nseg) * L + (wide % nseg) * seg


@triton.jit
def _starts(k, a, seg, nseg, L, R0L, K1, R1, SPREAD: tl.constexpr):
    """Where runs begin, (groups, A)."""
    return _begin(k, R0L, K1, R1)[:, None] + _step(a, seg, nseg, L, SPREAD)[None, :]


@triton.jit
def _parameter(p, start, j, run, column, wdiv, wsize, MODE: tl.constexpr, PHASE: tl.constexpr):
    """Weights of a tile (groups, A, B). MODE 1: one a run; 2: one a value of a run, PHASE: not from the first."""
    if MODE == 1:
        return tl.load(p + (start // wdiv) % wsize, mask=run, other=0)[:, :, None]
    elif PHASE:
        index = ((start // wdiv) % wsize)[:, :, None] + (j // wdiv)[None, None, :]
        return tl.load(p + index, mask=run[:, :, None] & column[None, None, :], other=0)
    else:
        return tl.load(p + j // wdiv, mask=column, other=0)[None, None, :]


@triton.jit(do_not_specialize=["n", "momentum"])
def fused_forward(
    x, residual, weight, bias, y, stats, bits, flags, mean_out, var_out, running_mean, running_var,
    K, A, seg, nseg, L, R0L, K1, R1, wdiv, wsize, mouter, mdiv, msize, row_bytes, n, momentum,
    EPS: tl.constexpr, CORRECTION: tl.constexpr, CENTER: tl.constexpr, SCALE: tl.constexpr, ACT: tl.constexpr,
    MODE: tl.constexpr, PHASE: tl.constexpr, SPREAD: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, BITS: tl.constexpr, STORE: tl.constexpr, SAVE: tl.constexpr, MOMENTS: tl.constexpr,
    RUNNING: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, AP: tl.constexpr,
    BP: tl.constexpr,
):  # fmt: skip
    """ROWS groups a program, each read once."""
    k = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    a = tl.arange(0, AP)
    j = tl.arange(0, BP)
    here = k < K
    run = here[:, None] & (a < A)[None, :]
    column = j < seg
    inside = run[:, :, None] & column[None, None, :]
    start = _starts(k, a, seg, nseg, L, R0L, K1, R1, SPREAD)
    at = start[:, :, None] + j[None, None, :]
    chosen = _chosen(flags, at, inside, mouter, mdiv, msize, MASKED)
    v = tl.load(x + at, mask=chosen, other=0).to(ACC)

    if MASKED:
        number = tl.sum(tl.sum(chosen.to(tl.int32), axis=2), axis=1).to(ACC)
    else:
        number = n.to(ACC)
    wide_number = number.to(tl.float64)
    if CENTER or SCALE == _STD:
        mean = tl.sum(tl.sum(v, axis=2), axis=1) / _some(number)
        d = tl.where(chosen, v - mean[:, None, None], 0.0)
        low = tl.sum(tl.sum(d, axis=2), axis=1) / _some(number)
        low = tl.where(_finite(low), low, 0.0)
        ss = tl.sum(tl.sum(d * d, axis=2), axis=1) - low * low * number
        ss = tl.where(ss < 0, 0.0, ss)
    else:
        mean = tl.zeros((ROWS,), ACC)
        low = mean
        d = v
        ss = tl.sum(tl.sum(d * d, axis=2), axis=1)
    DOUBLE: tl.constexpr = ACC == tl.float64
    var, r = _scale(ss, number, EPS, CORRECTION, SCALE, DOUBLE)
    m2 = ss.to(tl.float64)
    if not DOUBLE:
        odd = here & (~(ss < _LARGEST) | (ss < _SMALLEST))
        if tl.max(odd.to(tl.int32), axis=0) > 0:
            wide = tl.where(chosen, d.to(tl.float64) - low.to(tl.float64)[:, None, None], 0.0)
            m2 = tl.sum(tl.sum(wide * wide, axis=2), axis=1)
            var64, r64 = _scale(m2, wide_number, EPS, CORRECTION, SCALE, DOUBLE)
            var = var64.to(ACC)
            r = r64.to(ACC)
    _finish(
        mean, low, var, r, m2, wide_number, k, here, stats, mean_out, var_out, running_mean, running_var,
        momentum, K, CENTER, SCALE, SAVE, MOMENTS, RUNNING, MASKED,
    )  # fmt: skip
    if STORE:
        c, shift = _shift(mean, r, low, CENTER, SCALE, False)
        if CENTER:
            out = d * r[:, None, None] + c[:, None, None]
        else:
            out = v * r[:, None, None]
        if WEIGHT:
            out *= _parameter(weight, start, j, run, column, wdiv, wsize, MODE, PHASE).to(ACC)
        if BIAS:
            out += _parameter(bias, start, j, run, column, wdiv, wsize, MODE, PHASE).to(ACC)
        if RESIDUAL:
            out += tl.load(residual + at, mask=inside, other=0).to(ACC)
        if BITS:
            packed = _pack(out, ROWS * AP, BP)
            byte = tl.arange(0, BP // 8)
            where = tl.reshape(start // seg, (ROWS * AP,))[:, None] * row_bytes + byte[None, :]
            holds = tl.reshape(run, (ROWS * AP,))[:, None] & (byte < row_bytes)[None, :]
            tl.store(bits + where, packed, mask=holds)
        out = _shown(_activate(out, ACT), chosen, MASKED)
        tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _pack(v, M: tl.constexpr, N: tl.constexpr):
    """Sign bits, eight to a byte: not (v <= 0)."""
    positive = tl.reshape((~(v <= 0)).to(tl.int32), (M, N // 8, 8))
    return tl.sum(positive << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)


@triton.jit(do_not_specialize=["n"])
def fused_backward(
    dy, x, residual, weight, bias, stats, bits, flags, dx, dresidual, part, dmean, dvar,
    K, A, seg, nseg, L, R0L, K1, R1, wdiv, wsize, mouter, mdiv, msize, row_bytes, n, tiles, runs,
    EPS: tl.constexpr, CORRECTION: tl.constexpr, CENTER: tl.constexpr, SCALE: tl.constexpr, ACT: tl.constexpr,
    GIVEN: tl.constexpr, MODE: tl.constexpr, PHASE: tl.constexpr, SPREAD: tl.constexpr, WEIGHT: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BITS: tl.constexpr, STORE: tl.constexpr, THROUGH: tl.constexpr,
    SUMS: tl.constexpr, DMEAN: tl.constexpr, DVAR: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, AP: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Each program takes every num_programs-th tile; SUMS: what the gradients of weights are made of goes to part."""
    pid = tl.program_id(0)
    a = tl.arange(0, AP)
    j = tl.arange(0, BP)
    column = j < seg
    DOUBLE: tl.constexpr = ACC == tl.float64
    number = n.to(ACC)
    sum_g = tl.zeros((AP, BP), ACC)
    sum_gv = tl.zeros((AP, BP), ACC)
    for tile in range(pid, tiles, tl.num_programs(0)):
        k = (tl.zeros((ROWS,), tl.int64) + tile) * ROWS + tl.arange(0, ROWS)
        here = k < K
        run = here[:, None] & (a < A)[None, :]
        inside = run[:, :, None] & column[None, None, :]
        start = _starts(k, a, seg, nseg, L, R0L, K1, R1, SPREAD)
        at = start[:, :, None] + j[None, None, :]
        chosen = _chosen(flags, at, inside, mouter, mdiv, msize, MASKED)
        mean = tl.load(stats + k, mask=here, other=0)
        r = tl.load(stats + K + k, mask=here, other=0)
        low = tl.load(stats + 2 * K + k, mask=here, other=0)
        c, shift = _shift(mean, r, low, CENTER, SCALE, GIVEN)
        v = tl.load(x + at, mask=chosen, other=0).to(ACC)
        g = tl.load(dy + at, mask=chosen, other=0).to(ACC)
        u = (v - mean[:, None, None]) * r[:, None, None]
        v = tl.where(chosen, u + (c + shift)[:, None, None], 0.0)
        if WEIGHT:
            w = _parameter(weight, start, j, run, column, wdiv, wsize, MODE, PHASE).to(ACC)
        if BITS:
            byte = tl.load(
                bits + (start // seg)[:, :, None] * row_bytes + (j // 8)[None, None, :], mask=inside, other=0
            )
            g = tl.where(((byte.to(tl.int32) >> (j % 8)[None, None, :]) & 1) != 0, g, 0.0)
        elif ACT != 0:
            out = v
            if WEIGHT:
                out = out * w
            if BIAS:
                out += _parameter(bias, start, j, run, column, wdiv, wsize, MODE, PHASE).to(ACC)
            if RESIDUAL:
                out += tl.load(residual + at, mask=inside, other=0).to(ACC)
            g = tl.where(chosen, _activate_backward(g, out, ACT), 0.0)
        if THROUGH:
            tl.store(dresidual + at, g.to(dresidual.dtype.element_ty), mask=inside)
        gv = g * v
        if SUMS:
            if MODE == 1:
                tl.store(part + start // seg, tl.sum(g, axis=2), mask=run)
                tl.store(part + runs + start // seg, tl.sum(gv, axis=2), mask=run)
            else:
                sum_g += tl.sum(g, axis=0)
                sum_gv += tl.sum(gv, axis=0)
        if STORE:
            if WEIGHT:
                g = g * w
                gv = gv * w
            s1 = tl.sum(tl.sum(g, axis=2), axis=1)
            sv = tl.sum(tl.sum(gv, axis=2), axis=1)
            if MASKED and not GIVEN:
                count = tl.load(stats + 3 * K + k, mask=here, other=1)
            else:
                count = number
            b, e = _back(
                s1, sv, r, c, count, dmean, dvar, k, here, EPS, CORRECTION, CENTER, SCALE, GIVEN, DMEAN, DVAR, DOUBLE
            )
            out = g * r[:, None, None] + (u * b[:, None, None] + e[:, None, None])
            out = _shown(out, chosen, MASKED)
            tl.store(dx + at, out.to(dx.dtype.element_ty), mask=inside)
    if SUMS and MODE == 2:
        where = pid.to(tl.int64) * (A * seg) + a[:, None] * seg + j[None, :]
        all_of = tl.num_programs(0).to(tl.int64) * (A * seg)
        inside = (a < A)[:, None] & column[None, :]
        tl.store(part + where, sum_g, mask=inside)
        tl.store(part + all_of + where, sum_gv, mask=inside)


# ---- large groups: statistics ---------------------------------------------------------------------------------------


@triton.jit
def _pivot(total, number):
    pivot = total / number
    return tl.where(_finite(pivot), pivot, 0.0)


@triton.jit
def _merge(n, off, ss, bn, boff, bss):
    """Chan's formula, on offsets from a common pivot; sums of squares in double precision."""
    total = n + bn
    share = bn / tl.where(total > 0, total, 1.0)
    delta = boff - off
    # an infinite value makes the mean infinite, as a plain sum would
    off = tl.where(_finite(delta), off + delta * share, off + boff)
    wide = delta.to(tl.float64)
    return total, off, ss + (bss + wide * wide * (n * share).to(tl.float64))


@triton.jit
def partial_runs(
    x, flags, part, A, seg, nseg, L, R0L, K1, R1, mouter, mdiv, msize, splits, tiles, across, every, many,
    RAW: tl.constexpr, SPREAD: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """A program: ``every`` of the tiles of one group; ``across`` tiles cover a run. part: n, mean, m2 in double."""
    pid = tl.program_id(0)
    k = (pid // splits).to(tl.int64)
    split = pid % splits
    DOUBLE: tl.constexpr = ACC == tl.float64
    n = (pid * 0).to(ACC)
    off = n
    pivot = n
    ss = (pid * 0).to(tl.float64)
    counted = (pid * 0).to(tl.int64)
    first = split * every
    for tile in range(first, tl.minimum(first + every, tiles)):
        a = (tile // across) * BR + tl.arange(0, BR)
        j = (tile % across) * BC + tl.arange(0, BC)
        inside = (a < A)[:, None] & (j < seg)[None, :]
        start = _begin(k, R0L, K1, R1) + _step(a, seg, nseg, L, SPREAD)
        at = start[:, None] + j[None, :]
        chosen = _chosen(flags, at, inside, mouter, mdiv, msize, MASKED)
        v = tl.load(x + at, mask=chosen, other=0).to(ACC)
        if MASKED:
            values = tl.sum(tl.sum(chosen.to(tl.int32), axis=1), axis=0)
        else:
            rows = tl.minimum(A - (tile // across) * BR, BR)
            columns = tl.minimum(seg - (tile % across) * BC, BC)
            values = rows * columns
        counted += values
        bn = values.to(ACC)
        if RAW:
            d = v
            boff = n * 0
            square = tl.sum(d * d)
        else:
            if n == 0:  # nothing has been merged
                pivot = _pivot(tl.sum(v), _some(bn))
            d = tl.where(chosen, v - pivot, 0.0)
            boff = tl.sum(d) / _some(bn)
            d = tl.where(chosen, d - boff, 0.0)
            left = tl.sum(d) / _some(bn)
            left = tl.where(_finite(left), left, 0.0)
            boff += left
            square = tl.sum(d * d) - left * left * bn
            square = tl.where(square < 0, 0.0, square)
        bss = square.to(tl.float64)
        if not DOUBLE:
            if (square < _SMALLEST) | ~(square < _LARGEST):
                wide = d.to(tl.float64)
                bss = tl.sum(wide * wide)
        n, off, ss = _merge(n, off, ss, bn, boff, bss)
    where = ((k // K1) * splits + split) * K1 + k % K1
    tl.store(part + where, counted.to(tl.float64))
    tl.store(part + many + where, pivot.to(tl.float64) + off.to(tl.float64))
    tl.store(part + 2 * many + where, ss)


@triton.jit
def partial_cols(
    x, flags, part, R0, L, mouter, mdiv, msize, splits, blocks, every, many,
    RAW: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A program: BC columns of ``every`` tiles of BR rows. part: n, mean, m2 of each column, in double."""
    pid = tl.program_id(0)
    block = pid % blocks
    split = (pid // blocks) % splits
    k0 = (pid // (blocks * splits)).to(tl.int64)
    DOUBLE: tl.constexpr = ACC == tl.float64
    j = block * BC + tl.arange(0, BC)
    column = j < L
    n = tl.zeros((BC,), ACC)
    off = tl.zeros((BC,), ACC)
    ss = tl.zeros((BC,), tl.float64)
    counted = tl.zeros((BC,), tl.int64)
    pivot = tl.zeros((BC,), ACC)
    first = split * every * BR
    for begin in range(first, tl.minimum(first + every * BR, R0), BR):
        row = begin + tl.arange(0, BR)
        inside = (row < R0)[:, None] & column[None, :]
        at = (k0 * R0 + row)[:, None] * L + j[None, :]
        chosen = _chosen(flags, at, inside, mouter, mdiv, msize, MASKED)
        v = tl.load(x + at, mask=chosen, other=0).to(ACC)
        if MASKED:
            values = tl.sum(chosen.to(tl.int32), axis=0)
        else:
            values = tl.zeros((BC,), tl.int32) + tl.minimum(R0 - begin, BR)
        counted += values
        bn = values.to(ACC)
        if RAW:
            d = v
            boff = tl.zeros((BC,), ACC)
            square = tl.sum(d * d, axis=0)
        else:
            if MASKED:  # of a column of which nothing has been merged
                pivot = tl.where(n > 0, pivot, _pivot(tl.sum(v, axis=0), _some(bn)))
            elif begin == first:
                pivot = _pivot(tl.sum(v, axis=0), bn)
            d = tl.where(chosen, v - pivot[None, :], 0.0)
            boff = tl.sum(d, axis=0) / _some(bn)
            d = tl.where(chosen, d - boff[None, :], 0.0)
            left = tl.sum(d, axis=0) / _some(bn)
            left = tl.where(_finite(left), left, 0.0)
            boff += left
            square = tl.sum(d * d, axis=0) - left * left * bn
            square = tl.where(square < 0, 0.0, square)
        bss = square.to(tl.float64)
        if not DOUBLE:
            odd = column & (~(square < _LARGEST) | (square < _SMALLEST))
            if tl.max(odd.to(tl.int32), axis=0) > 0:
                wide = d.to(tl.float64)
                bss = tl.sum(wide * wide, axis=0)
        n, off, ss = _merge(n, off, ss, bn, boff, bss)
    where = (k0 * splits + split) * L + j
    tl.store(part + where, counted.to(tl.float64), mask=column)
    tl.store(part + many + where, pivot.to(tl.float64) + off.to(tl.float64), mask=column)
    tl.store(part + 2 * many + where, ss, mask=column)


@triton.jit(do_not_specialize=["n", "momentum"])
def combine(
    part, stats, mean_out, var_out, running_mean, running_var, K, K1, J, splits, many, n, momentum,
    EPS: tl.constexpr, CORRECTION: tl.constexpr, CENTER: tl.constexpr, SCALE: tl.constexpr, SAVE: tl.constexpr,
    MOMENTS: tl.constexpr, RUNNING: tl.constexpr, MASKED: tl.constexpr, DOUBLE: tl.constexpr, ROWS: tl.constexpr,
    Q: tl.constexpr,
):  # fmt: skip
    """The statistics of ROWS groups from partial ones, (K0, splits, K1, J), in double precision and a fixed order."""
    k = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = k < K
    base = (k // K1) * splits * K1 * J + (k % K1) * J
    count = splits * J
    total = tl.zeros((ROWS,), tl.float64)
    pivot = tl.load(part + many + base, mask=here, other=0)
    pivot = tl.where(_finite(pivot), pivot, 0.0)
    number = total + n.to(tl.float64)
    counted = tl.zeros((ROWS, Q), tl.float64)
    for begin in range(0, count, Q):
        q = begin + tl.arange(0, Q)
        inside = here[:, None] & (q < count)[None, :]
        at = base[:, None] + ((q // J) * (K1 * J) + q % J)[None, :]
        bn = tl.load(part + at, mask=inside, other=0)
        mean = tl.load(part + many + at, mask=inside, other=0)
        if MASKED:
            counted += bn
        total += tl.sum(tl.where(bn > 0, bn * (mean - pivot[:, None]), 0.0), axis=1)
    if MASKED:
        number = tl.sum(counted, axis=1)
    shifted = total / _some(number)
    m2 = tl.zeros((ROWS,), tl.float64)
    for begin in range(0, count, Q):
        q = begin + tl.arange(0, Q)
        inside = here[:, None] & (q < count)[None, :]
        at = base[:, None] + ((q // J) * (K1 * J) + q % J)[None, :]
        bn = tl.load(part + at, mask=inside, other=0)
        d = tl.load(part + many + at, mask=inside, other=0) - pivot[:, None] - shifted[:, None]
        m2 += tl.sum(tl.where(bn > 0, tl.load(part + 2 * many + at, mask=inside, other=0) + bn * d * d, 0.0), axis=1)
    var, r = _scale(m2, number, EPS, CORRECTION, SCALE, DOUBLE)
    mean = pivot + shifted
    if DOUBLE:
        high = mean
        low = tl.zeros_like(mean)
    else:
        high = mean.to(tl.float32).to(tl.float64)
        low = mean - high
        low = tl.where(_finite(low), low, 0.0)
    _finish(
        high, low, var, r, m2, number, k, here, stats, mean_out, var_out, running_mean, running_var, momentum, K,
        CENTER, SCALE, SAVE, MOMENTS, RUNNING, MASKED,
    )  # fmt: skip


# ---- large groups: what is done to each value -----------------------------------------------------------------------


@triton.jit
def _tile(
    pid, A, seg, nseg, L, R0L, K1, R1, R0, tiles, across,
    SPREAD: tl.constexpr, COLS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A tile: its groups (one, or one a column), rows (where runs begin), columns, and what of it is inside."""
    tile = pid % tiles
    j = (tile % across) * BC + tl.arange(0, BC)
    i = (tile // across) * BR + tl.arange(0, BR)
    outer = (pid // tiles).to(tl.int64)
    if COLS:  # outer: k0; rows of L values
        start = (outer * R0 + i) * L
        k = outer * K1 + j // R1
        row = i < R0
        column = j < L
    else:  # outer: the group
        k = tl.zeros((1,), tl.int64) + outer
        start = _begin(outer.to(tl.int64), R0L, K1, R1) + _step(i, seg, nseg, L, SPREAD)
        row = i < A
        column = j < seg
    return k, start, j, row, column


@triton.jit
def _values(p, start, j, row, column, wdiv, wsize, MODE: tl.constexpr, PHASE: tl.constexpr):
    """Weights of a tile (rows, columns)."""
    if MODE == 1:
        return tl.load(p + (start // wdiv) % wsize, mask=row, other=0)[:, None]
    elif PHASE:
        index = ((start // wdiv) % wsize)[:, None] + (j // wdiv)[None, :]
        return tl.load(p + index, mask=row[:, None] & column[None, :], other=0)
    else:
        return tl.load(p + (j // wdiv) % wsize, mask=column, other=0)[None, :]


@triton.jit
def _given(mean_in, var_in, k, known, EPS: tl.constexpr, CENTER: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr):
    """Statistics that the caller gave."""
    mean = (k * 0).to(ACC)
    r = mean + 1.0
    if CENTER:
        mean = tl.load(mean_in + k, mask=known, other=0)
    if SCALE != _NONE:
        r = _divide(r, _root(tl.load(var_in + k, mask=known, other=1) + EPS))
    return mean, r


@triton.jit
def apply(
    x, residual, weight, bias, y, stats, bits, flags, mean_in, var_in,
    K, A, seg, nseg, L, R0L, K1, R1, R0, wdiv, wsize, mouter, mdiv, msize, row_bytes, tiles, across,
    EPS: tl.constexpr, CENTER: tl.constexpr, SCALE: tl.constexpr, ACT: tl.constexpr, GIVEN: tl.constexpr,
    MODE: tl.constexpr, PHASE: tl.constexpr, SPREAD: tl.constexpr, COLS: tl.constexpr, WEIGHT: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BITS: tl.constexpr, SAVE: tl.constexpr, MASKED: tl.constexpr,
    ACC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y of one tile."""
    pid = tl.program_id(0)
    k, start, j, row, column = _tile(pid, A, seg, nseg, L, R0L, K1, R1, R0, tiles, across, SPREAD, COLS, BR, BC)
    known = k < K
    if COLS:
        known = known & column
    inside = row[:, None] & column[None, :]
    at = start[:, None] + j[None, :]
    chosen = _chosen(flags, at, inside, mouter, mdiv, msize, MASKED)
    v = tl.load(x + at, mask=chosen, other=0).to(ACC)
    if GIVEN:
        mean, r = _given(mean_in, var_in, k, known, EPS, CENTER, SCALE, ACC)
        low = tl.zeros_like(mean)
        if SAVE:
            tl.store(stats + k, mean, mask=known)
            tl.store(stats + K + k, r, mask=known)
            tl.store(stats + 2 * K + k, low, mask=known)
    else:
        mean = tl.load(stats + k, mask=known, other=0)
        r = tl.load(stats + K + k, mask=known, other=0)
        low = tl.load(stats + 2 * K + k, mask=known, other=0)
    if CENTER:
        c, shift = _shift(mean, r, low, CENTER, SCALE, GIVEN)
        out = (v - mean[None, :]) * r[None, :] + c[None, :]
    else:
        out = v * r[None, :]
    if WEIGHT:
        out *= _values(weight, start, j, row, column, wdiv, wsize, MODE, PHASE).to(ACC)
    if BIAS:
        out += _values(bias, start, j, row, column, wdiv, wsize, MODE, PHASE).to(ACC)
    if RESIDUAL:
        out += tl.load(residual + at, mask=inside, other=0).to(ACC)
    if BITS:
        byte = j // 8  # of each value; of eight the first stands for all
        packed = _pack(out, BR, BC)
        first = tl.min(byte, axis=0) + tl.arange(0, BC // 8)
        where = (start // (L if COLS else seg))[:, None] * row_bytes + first[None, :]
        tl.store(bits + where, packed, mask=row[:, None] & (first < row_bytes)[None, :])
    out = _shown(_activate(out, ACT), chosen, MASKED)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gradient(
    dy, x, residual, weight, bias, stats, bits, flags, k, start, j, row, column, K, L, seg, wdiv, wsize, mouter, mdiv,
    msize, row_bytes,
    CENTER: tl.constexpr, SCALE: tl.constexpr, ACT: tl.constexpr, GIVEN: tl.constexpr, MODE: tl.constexpr,
    PHASE: tl.constexpr, COLS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    BITS: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of a tile: the gradient before the activation, the normalized value, (x - m)*r, weights and r; where it lies,
    what of it is inside and what counts."""
    known = k < K
    if COLS:
        known = known & column
    inside = row[:, None] & column[None, :]
    at = start[:, None] + j[None, :]
    chosen = _chosen(flags, at, inside, mouter, mdiv, msize, MASKED)
    mean = tl.load(stats + k, mask=known, other=0)
    r = tl.load(stats + K + k, mask=known, other=0)
    low = tl.load(stats + 2 * K + k, mask=known, other=0)
    c, shift = _shift(mean, r, low, CENTER, SCALE, GIVEN)
    u = (tl.load(x + at, mask=chosen, other=0).to(ACC) - mean[None, :]) * r[None, :]
    v = tl.where(chosen, u + (c + shift)[None, :], 0.0)
    g = tl.load(dy + at, mask=chosen, other=0).to(ACC)
    if WEIGHT:
        w = _values(weight, start, j, row, column, wdiv, wsize, MODE, PHASE).to(ACC)
    else:
        w = tl.zeros((1, 1), ACC) + 1.0
    if BITS:
        where = (start // (L if COLS else seg))[:, None] * row_bytes + (j // 8)[None, :]
        byte = tl.load(bits + where, mask=inside, other=0).to(tl.int32)
        g = tl.where(((byte >> (j % 8)[None, :]) & 1) != 0, g, 0.0)
    elif ACT != 0:
        out = v
        if WEIGHT:
            out = out * w
        if BIAS:
            out += _values(bias, start, j, row, column, wdiv, wsize, MODE, PHASE).to(ACC)
        if RESIDUAL:
            out += tl.load(residual + at, mask=inside, other=0).to(ACC)
        g = tl.where(chosen, _activate_backward(g, out, ACT), 0.0)
    return g, v, u, w, r, at, inside, chosen


@triton.jit
def back_reduce(
    dy, x, residual, weight, bias, stats, bits, flags, part,
    K, A, seg, nseg, L, R0L, K1, R1, R0, wdiv, wsize, mouter, mdiv, msize, row_bytes, splits, heights, every, many,
    CENTER: tl.constexpr, SCALE: tl.constexpr, ACT: tl.constexpr, GIVEN: tl.constexpr, MODE: tl.constexpr,
    PHASE: tl.constexpr, SPREAD: tl.constexpr, COLS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, BITS: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Sums of g and of g times the normalized value: of ``every`` tiles of a run, or of a column.

    Runs whose weights differ from value to value (MODE 2) are summed with their weights.
    """
    pid = tl.program_id(0)
    split = pid % splits
    block = (pid // splits) % heights
    outer = pid // (splits * heights)
    sum_g = tl.zeros((BR, BC), ACC)
    sum_gv = tl.zeros((BR, BC), ACC)
    # tiles of an outer index: along a run (splits * every to a run), or down the columns
    for step in range(0, every):
        along = split * every + step
        if COLS:
            i = along * BR + tl.arange(0, BR)
            j = block * BC + tl.arange(0, BC)
            wide = outer.to(tl.int64)
            start = (wide * R0 + i) * L
            k = wide * K1 + j // R1
            row = i < R0
            column = j < L
        else:
            i = block * BR + tl.arange(0, BR)
            j = along * BC + tl.arange(0, BC)
            k = tl.zeros((1,), tl.int64) + outer
            start = _begin(outer.to(tl.int64), R0L, K1, R1) + _step(i, seg, nseg, L, SPREAD)
            row = i < A
            column = j < seg
        g, v, _, w, _, _, _, _ = _gradient(
            dy, x, residual, weight, bias, stats, bits, flags, k, start, j, row, column, K, L, seg, wdiv, wsize, mouter,
            mdiv, msize, row_bytes,
            CENTER, SCALE, ACT, GIVEN, MODE, PHASE, COLS, WEIGHT, BIAS, RESIDUAL, BITS, MASKED, ACC,
        )  # fmt: skip
        if WEIGHT and MODE == 2 and not COLS:
            g = g * w
        sum_g += g
        sum_gv += g * v
    if COLS:
        j = block * BC + tl.arange(0, BC)
        where = (outer.to(tl.int64) * splits + split) * L + j
        tl.store(part + where, tl.sum(sum_g, axis=0), mask=j < L)
        tl.store(part + many + where, tl.sum(sum_gv, axis=0), mask=j < L)
    else:
        i = block * BR + tl.arange(0, BR)
        k = tl.zeros((1,), tl.int64) + outer
        start = _begin(outer.to(tl.int64), R0L, K1, R1) + _step(i, seg, nseg, L, SPREAD)
        where = (start // seg) * splits + split
        tl.store(part + where, tl.sum(sum_g, axis=1), mask=i < A)
        tl.store(part + many + where, tl.sum(sum_gv, axis=1), mask=i < A)


@triton.jit(do_not_specialize=["n"])
def back_combine(
    part, weight, stats, coefficients, dmean, dvar,
    K, A, seg, nseg, L, R0L, K1, R1, wdiv, wsize, splits, many, n,
    EPS: tl.constexpr, CORRECTION: tl.constexpr, CENTER: tl.constexpr, SCALE: tl.constexpr, GIVEN: tl.constexpr,
    MODE: tl.constexpr, SPREAD: tl.constexpr, COLS: tl.constexpr, WEIGHT: tl.constexpr, DMEAN: tl.constexpr,
    DVAR: tl.constexpr, MASKED: tl.constexpr, DOUBLE: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
    Q: tl.constexpr,
):  # fmt: skip
    """The two numbers that the gradient of x needs of each of ROWS groups, in double precision and a fixed order."""
    k = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = k < K
    s1 = tl.zeros((ROWS,), tl.float64)
    sv = tl.zeros((ROWS,), tl.float64)
    count = splits * (R1 if COLS else A)
    for begin in range(0, count, Q):
        q = begin + tl.arange(0, Q)
        inside = here[:, None] & (q < count)[None, :]
        if COLS:
            j = (k % K1)[:, None] * R1 + (q % R1)[None, :]
            at = ((k // K1)[:, None] * splits + (q // R1)[None, :]) * L + j
            which = (j // wdiv) % wsize
        else:
            start = _starts(k, q // splits, seg, nseg, L, R0L, K1, R1, SPREAD)
            at = (start // seg) * splits + (q % splits)[None, :]
            which = (start // wdiv) % wsize
        g = tl.load(part + at, mask=inside, other=0).to(tl.float64)
        gv = tl.load(part + many + at, mask=inside, other=0).to(tl.float64)
        if WEIGHT and (MODE == 1 or COLS):
            w = tl.load(weight + which, mask=inside, other=0).to(ACC).to(tl.float64)
            g *= w
            gv *= w
        s1 += tl.sum(g, axis=1)
        sv += tl.sum(gv, axis=1)
    mean = tl.load(stats + k, mask=here, other=0).to(tl.float64)
    r = tl.load(stats + K + k, mask=here, other=1).to(tl.float64)
    low = tl.load(stats + 2 * K + k, mask=here, other=0).to(tl.float64)
    c, shift = _shift(mean, r, low, CENTER, SCALE, GIVEN)
    number = s1 * 0 + n.to(tl.float64)
    if MASKED:
        number = tl.load(stats + 3 * K + k, mask=here, other=1).to(tl.float64)
    b, e = _back(s1, sv, r, c, number, dmean, dvar, k, here, EPS, CORRECTION, CENTER, SCALE, GIVEN, DMEAN, DVAR, DOUBLE)
    kind = coefficients.dtype.element_ty
    tl.store(coefficients + k, b.to(kind), mask=here)
    tl.store(coefficients + K + k, e.to(kind), mask=here)


@triton.jit
def back_apply(
    dy, x, residual, weight, bias, stats, bits, flags, coefficients, dx, dresidual,
    K, A, seg, nseg, L, R0L, K1, R1, R0, wdiv, wsize, mouter, mdiv, msize, row_bytes, tiles, across,
    CENTER: tl.constexpr, SCALE: tl.constexpr, ACT: tl.constexpr, GIVEN: tl.constexpr, MODE: tl.constexpr,
    PHASE: tl.constexpr, SPREAD: tl.constexpr, COLS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, BITS: tl.constexpr, STORE: tl.constexpr, THROUGH: tl.constexpr, MASKED: tl.constexpr,
    ACC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradients of x and of the residual of one tile."""
    pid = tl.program_id(0)
    k, start, j, row, column = _tile(pid, A, seg, nseg, L, R0L, K1, R1, R0, tiles, across, SPREAD, COLS, BR, BC)
    g, _, u, w, r, at, inside, chosen = _gradient(
        dy, x, residual, weight, bias, stats, bits, flags, k, start, j, row, column, K, L, seg, wdiv, wsize, mouter,
        mdiv, msize, row_bytes, CENTER, SCALE, ACT, GIVEN, MODE, PHASE, COLS, WEIGHT, BIAS, RESIDUAL, BITS, MASKED, ACC,
    )  # fmt: skip
    if THROUGH:
        tl.store(dresidual + at, g.to(dresidual.dtype.element_ty), mask=inside)
    if STORE:
        out = (g * w) * r[None, :]
        if not GIVEN:
            known = k < K
            if COLS:
                known = known & column
            b = tl.load(coefficients + k, mask=known, other=0)
            e = tl.load(coefficients + K + k, mask=known, other=0)
            out += u * b[None, :] + e[None, :]
        out = _shown(out, chosen, MASKED)
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=inside)


# ---- gradients of weights -------------------------------------------------------------------------------------------


@triton.jit
def weights(part, dweight, dbias, P, wsize, inner, many, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
            BJ: tl.constexpr, BQ: tl.constexpr):  # fmt: skip
    """Partial sums (P, wsize, inner), added up over the first and the last axis in double precision."""
    j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    here = j < wsize
    db = tl.zeros((BJ,), tl.float64)
    dw = tl.zeros((BJ,), tl.float64)
    count = P * inner
    for begin in range(0, count, BQ):
        q = begin + tl.arange(0, BQ)
        inside = here[:, None] & (q < count)[None, :]
        at = ((q // inner).to(tl.int64)[None, :] * wsize + j[:, None]) * inner + (q % inner)[None, :]
        if BIAS:
            db += tl.sum(tl.load(part + at, mask=inside, other=0).to(tl.float64), axis=1)
        if WEIGHT:
            dw += tl.sum(tl.load(part + many + at, mask=inside, other=0).to(tl.float64), axis=1)
    if WEIGHT:
        tl.store(dweight + j, _cast(dw, dweight.dtype.element_ty), mask=here)
    if BIAS:
        tl.store(dbias + j, _cast(db, dbias.dtype.element_ty), mask=here)


@triton.jit
def back_weights(
    dy, x, residual, weight, bias, stats, bits, flags, part,
    K, seg, L, R0L, K1, R1, wdiv, wsize, mouter, mdiv, msize, row_bytes, rows, period, splits, blocks, every, many,
    CENTER: tl.constexpr, SCALE: tl.constexpr, ACT: tl.constexpr, GIVEN: tl.constexpr, WEIGHT: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BITS: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sums of g and of g times the normalized value down the columns of (rows, period): for weights that differ from
    value to value and were not summed on the way. Each value looks up the statistics of its group."""
    pid = tl.program_id(0)
    split = pid // blocks
    j = (pid % blocks) * BC + tl.arange(0, BC)
    column = j < period
    sum_g = tl.zeros((BR, BC), ACC)
    sum_gv = tl.zeros((BR, BC), ACC)
    which = (j // wdiv) % wsize
    for step in range(0, every):
        i = (split * every + step) * BR + tl.arange(0, BR)
        inside = (i < rows)[:, None] & column[None, :]
        at = i.to(tl.int64)[:, None] * period + j[None, :]
        chosen = _chosen(flags, at, inside, mouter, mdiv, msize, MASKED)
        k = (at // R0L) * K1 + (at // R1) % K1
        mean = tl.load(stats + k, mask=inside, other=0)
        r = tl.load(stats + K + k, mask=inside, other=0)
        low = tl.load(stats + 2 * K + k, mask=inside, other=0)
        c, shift = _shift(mean, r, low, CENTER, SCALE, GIVEN)
        v = tl.load(x + at, mask=chosen, other=0).to(ACC)
        v = tl.where(chosen, (v - mean) * r + (c + shift), 0.0)
        g = tl.load(dy + at, mask=chosen, other=0).to(ACC)
        if BITS:
            byte = tl.load(bits + (at // seg) * row_bytes + (at % seg) // 8, mask=inside, other=0).to(tl.int32)
            g = tl.where(((byte >> (at % seg % 8).to(tl.int32)) & 1) != 0, g, 0.0)
        elif ACT != 0:
            out = v
            if WEIGHT:
                out = out * tl.load(weight + which, mask=column, other=0).to(ACC)[None, :]
            if BIAS:
                out += tl.load(bias + which, mask=column, other=0).to(ACC)[None, :]
            if RESIDUAL:
                out += tl.load(residual + at, mask=inside, other=0).to(ACC)
            g = tl.where(chosen, _activate_backward(g, out, ACT), 0.0)
        sum_g += g
        sum_gv += g * v
    where = split.to(tl.int64) * period + j
    tl.store(part + where, tl.sum(sum_g, axis=0), mask=column)
    tl.store(part + many + where, tl.sum(sum_gv, axis=0), mask=column)
