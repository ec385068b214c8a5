"""``normalize`` and ``moments``: measure what values share, and take it out.

.. math::
    y = \\phi\\Big( \\frac{x - m}{s} \\cdot w + b + r \\Big)

where the mean :math:`m` and the scale :math:`s` are shared by the values that a pattern puts together. With
the right pattern this is batch, layer, group, instance or RMS normalization, weight standardization, or the
group-relative advantage of a reward.

References:
    The family as one operator over axes: Wu & He, *Group Normalization*, 2018, arXiv 1803.08494, section 3.1.
    The notation: Rogozhnikov, *Einops*, ICLR 2022.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from evenly.core import kernels, recompute
from evenly.core.kernels import operator, reference
from evenly.core.kernels.launch import MEASURED
from evenly.core.kernels.reference import Call, Groups
from evenly.core.patterns import PatternError, Plan, affine_groups, bind

__all__ = ["Activation", "Moments", "Scale", "moments", "normalize"]

Scale = Literal["std", "rms", "l2", "l1", "max"]
Activation = Literal["relu", "silu", "gelu"]

_EPS = {"std": 1e-5, "rms": 1e-5, "l2": 1e-12, "l1": 1e-12, "max": 1e-12}
_ACTIVATIONS = ("relu", "silu", "gelu")


class Moments(NamedTuple):
    """What the values of each group share.

    Attributes:
        mean: the mean, in the axes of the right-hand side of the pattern.
        var: the mean square about the centre (the variance, unless ``center=False, scale="rms"``).
        count: how many values share the statistic, as a floating-point tensor of the same shape.
    """

    mean: Tensor
    var: Tensor
    count: Tensor  # type: ignore[assignment]


@overload
def normalize(
    x: Tensor,
    pattern: str | None = None,
    *,
    by: Tensor | None = None,
    center: bool = True,
    scale: Scale | None = "std",
    eps: float | None = None,
    correction: float = 0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    affine: str | None = None,
    residual: Tensor | None = None,
    activation: Activation | None = None,
    mask: Tensor | None = None,
    stats: tuple[Tensor | None, Tensor | None] | Moments | None = None,
    return_stats: Literal[False] = False,
    num_groups: int | None = None,
    **sizes: int,
) -> Tensor: ...


@overload
def normalize(
    x: Tensor,
    pattern: str | None = None,
    *,
    by: Tensor | None = None,
    center: bool = True,
    scale: Scale | None = "std",
    eps: float | None = None,
    correction: float = 0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    affine: str | None = None,
    residual: Tensor | None = None,
    activation: Activation | None = None,
    mask: Tensor | None = None,
    stats: tuple[Tensor | None, Tensor | None] | Moments | None = None,
    return_stats: Literal[True],
    num_groups: int | None = None,
    **sizes: int,
) -> tuple[Tensor, Moments]: ...


def normalize(
    x: Tensor,
    pattern: str | None = None,
    *,
    by: Tensor | None = None,
    center: bool = True,
    scale: Scale | None = "std",
    eps: float | None = None,
    correction: float = 0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    affine: str | None = None,
    residual: Tensor | None = None,
    activation: Activation | None = None,
    mask: Tensor | None = None,
    stats: tuple[Tensor | None, Tensor | None] | Moments | None = None,
    return_stats: bool = False,
    num_groups: int | None = None,
    **sizes: int,
) -> Tensor | tuple[Tensor, Moments]:
    """Subtract the mean and divide by the scale that values share.

    ``y = activation((x - mean) / scale * weight + bias + residual)``

    Args:
        x: a floating-point tensor of any shape.
        pattern: the einops-reduce pattern of the statistic, such as ``"n c h w -> c"``. With ``by`` it
            defaults to ``"n ... -> ..."``: every other axis keeps a statistic of its own.
        by: integer labels, one for each element of the leading axis. Values share a statistic only if their
            labels are equal. The pattern must reduce the leading axis.
        center: subtract the mean.
        scale: what to divide by. ``"std"``: ``sqrt(var + eps)``; ``"rms"``: ``sqrt(mean square + eps)``;
            ``"l2"``, ``"l1"``, ``"max"``: the norm, but at least ``eps``; ``None``: nothing. The mean square
            and the norms are those of the centred values where ``center`` is set.
        eps: default 1e-5 for ``"std"`` and ``"rms"``, 1e-12 for the norms.
        correction: the variance divides by ``count - correction`` (0: biased, as every layer does; 1:
            Bessel's).
        weight, bias: a scalar, or a tensor that carries the axes named by ``affine``.
        affine: axes that weight and bias carry: ``"c"``, ``"(g c)"``, ``"c h w"``. Default: the axis that the
            pattern keeps if it keeps one; the axes that it reduces if it is ``"... d -> ..."``.
        residual: added before the activation; the shape of ``x``.
        activation: ``None``, ``"relu"``, ``"silu"`` or ``"gelu"`` (the exact one).
        mask: boolean, broadcastable to ``x``. Where it is false a value does not count, the output is exactly
            0 and no gradient flows: whatever stands there, NaN included, has no effect.
        stats: use these ``(mean, var)`` instead of measuring; their shape is that of :func:`moments`.
        return_stats: also return the :class:`Moments` that were used (``scale`` ``"std"``, ``"rms"``, ``None``).
        num_groups: with ``by``, labels are in ``[0, num_groups)``. Without it they are whatever integers occur,
            which needs a sort and a host synchronization.
        **sizes: sizes of axes by name, such as ``g=32``.

    Returns:
        A tensor of the shape and dtype of ``x``; with ``return_stats`` also its moments. Statistics are
        float32, or float64 for float64 input.

    Raises:
        PatternError: the pattern cannot be read or does not fit. It says what was given and expected.
        TypeError: ``x`` is not floating-point (complex and integer tensors are refused).

    >>> x = torch.tensor([[1.0, 3.0], [2.0, 6.0]])
    >>> normalize(x, "n d -> n", eps=0.0)
    tensor([[-1.,  1.],
            [-1.,  1.]])
    >>> normalize(x, "n d -> d", scale=None)
    tensor([[-0.5000, -1.5000],
            [ 0.5000,  1.5000]])
    >>> rewards, prompt = torch.tensor([1.0, 0.0, 4.0, 8.0]), torch.tensor([7, 7, 3, 3])
    >>> normalize(rewards, by=prompt, eps=0.0)
    tensor([ 1., -1., -1.,  1.])
    """
    key: tuple[Any, ...] | None = None
    if by is None and mask is None and not torch.compiler.is_compiling():
        measured = stats is None
        key = quick_key(x, pattern, center, scale, eps, correction, affine, activation, residual, measured, sizes)
        entry = None if return_stats else operator.recall(key, x)
        if entry is not None:
            mean, var = MEASURED if stats is None else stats[:2]
            done = operator.again(entry, x, weight, bias, residual, mean, var)
            if done is not None:
                return done
    _check_input(x, "normalize")
    plan, groups = _plan(x, pattern, by, num_groups, sizes)
    check_scale(scale)
    check_activation(activation)
    if eps is None:
        eps = _EPS[scale] if scale is not None else 0.0
    elif not eps >= 0:
        raise ValueError(f"eps={eps}, expected a number of at least 0.")
    if not correction >= 0:
        raise ValueError(f"correction={correction}, expected a number of at least 0.")
    groups_affine = plan.resolved.affine
    if affine is not None:
        groups_affine = affine_groups(affine, plan.resolved.text, x.ndim, tuple(sizes))
    if residual is not None and residual.shape != x.shape:
        raise PatternError(f"residual has shape {tuple(residual.shape)}, expected the shape of x, {tuple(x.shape)}.")
    mean = var = None
    if stats is not None:
        mean, var = stats[0], stats[1]
        if scale not in ("std", "rms", None):
            raise ValueError(f"stats= goes with scale 'std', 'rms' or None, got scale={scale!r}.")
        if (center and mean is None) or (scale is not None and var is None):
            raise ValueError(
                f"stats={'(None, …)' if mean is None else '(…, None)'} lacks what center={center} and "
                f"scale={scale!r} need."
            )
    if return_stats and scale not in ("std", "rms", None):
        raise ValueError(f"return_stats=True goes with scale 'std', 'rms' or None, got scale={scale!r}.")
    call = Call(
        center=center,
        scale=scale,
        eps=eps,
        correction=correction,
        weight=weight,
        bias=bias,
        affine=groups_affine,
        residual=residual,
        activation=activation,
        mask=_checked_mask(mask, x),
        groups=groups,
        mean=mean,
        var=var,
        want_stats=return_stats,
    )
    if key is not None:
        operator.remember(key, x, plan, call)
    result = kernels.run(x, plan, call)
    if result.y.requires_grad and recompute.watching() and not recompute.is_announced(result.y):
        rest = replace(call, weight=None, bias=None, residual=None, mean=None, var=None, want_stats=False)
        given = (call.weight, call.bias, call.residual, call.mean, call.var)
        recompute.announce(result.y, partial(_again, plan, rest), (x, *given), call.residual)
    if not return_stats:
        return result.y
    assert result.mean is not None and result.var is not None and result.count is not None
    return result.y, Moments(result.mean, result.var, result.count)


def moments(
    x: Tensor,
    pattern: str | None = None,
    *,
    by: Tensor | None = None,
    mask: Tensor | None = None,
    correction: float = 0,
    num_groups: int | None = None,
    **sizes: int,
) -> Moments:
    """Mean, variance and count of the values that share a statistic.

    The arguments are those of :func:`normalize`. The result has the axes of the right-hand side, in its order,
    as in ``einops.reduce``. With ``by`` a leading axis of groups comes first: the sorted distinct labels
    (``torch.unique(by)``), or ``range(num_groups)``. A group without values has mean 0, variance 0, count 0.

    >>> m = moments(torch.tensor([[1.0, 3.0], [2.0, 6.0]]), "n d -> d")
    >>> m.mean, m.var, m.count
    (tensor([1.5000, 4.5000]), tensor([0.2500, 2.2500]), tensor([2., 2.]))
    """
    _check_input(x, "moments")
    plan, groups = _plan(x, pattern, by, num_groups, sizes)
    mask = _checked_mask(mask, x)
    # with a mask the same computation whether there is a gradient or not
    if mask is None and groups is None and not torch.compiler.is_compiling():
        measured = operator.measure(x, plan, correction)
        if measured is not None:
            return Moments(*measured)
    return Moments(*reference.measure(x, plan, mask=mask, groups=groups, correction=correction))


def check_scale(scale: str | None) -> None:
    """Refuse an unknown scale."""
    if scale is not None and scale not in _EPS:
        raise ValueError(f"scale={scale!r} is unknown, expected one of {', '.join(map(repr, _EPS))} or None.")


def check_activation(activation: str | None) -> None:
    """Refuse an unknown activation."""
    if activation is not None and activation not in _ACTIVATIONS:
        known = ", ".join(map(repr, _ACTIVATIONS))
        raise ValueError(f"activation={activation!r} is unknown, expected one of {known} or None.")


def quick_key(
    x: Tensor,
    pattern: str | None,
    center: bool,
    scale: str | None,
    eps: float | None,
    correction: float,
    affine: str | None,
    activation: str | None,
    residual: Tensor | None,
    measured: bool,
    sizes: dict[str, int],
) -> tuple[Any, ...]:
    """What tells one remembered call from another."""
    return (
        pattern,
        getattr(x, "shape", None),
        getattr(x, "dtype", None),
        center,
        scale,
        eps,
        correction,
        affine,
        activation,
        residual is None,
        measured,
        *sizes.items(),
    )


def _again(plan: Plan, call: Call, x: Tensor, *given: Tensor | None) -> Tensor:
    weight, bias, residual, mean, var = given
    call = replace(call, weight=weight, bias=bias, residual=residual, mean=mean, var=var)
    return kernels.run(x, plan, call).y


def _check_input(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} expects a tensor, got {type(x).__name__}. Convert with torch.as_tensor(x).")
    if not x.is_floating_point():
        what = "complex" if x.is_complex() else "integer or boolean"
        fix = "Normalize torch.view_as_real(x), or its modulus." if x.is_complex() else "Convert with x.float()."
        raise TypeError(f"{name} expects a floating-point tensor, got {x.dtype} ({what}). {fix}")


def _plan(
    x: Tensor, pattern: str | None, by: Tensor | None, num_groups: int | None, sizes: dict[str, int]
) -> tuple[Plan, Groups | None]:
    if by is None:
        if pattern is None:
            raise TypeError("normalize and moments need a pattern such as 'n c h w -> c', or labels as by=.")
        if num_groups is not None:
            raise TypeError(
                f"num_groups={num_groups} goes with by=. For the pattern {pattern!r} give sizes by "
                f"the names of its axes."
            )
        return bind(pattern, x.shape, sizes), None
    if x.ndim == 0:
        raise PatternError("by= labels the leading axis, and the input has none.")
    plan = bind("n ... -> ..." if pattern is None else pattern, x.shape, sizes)
    return plan, _labels(x, plan, by, num_groups)


def _labels(x: Tensor, plan: Plan, by: Tensor, num_groups: int | None) -> Groups:
    leading = plan.resolved.inputs[0]
    if len(leading) != 1 or leading[0] not in plan.reduced:
        raise PatternError(
            f"by= splits the leading axis by label, so that {plan.resolved.text!r} must reduce over it and not "
            f"split it: write it on the left only, as in 'n d -> d'."
        )
    if not isinstance(by, Tensor):
        raise TypeError(f"by= expects a tensor of integers, got {type(by).__name__}.")
    if by.is_floating_point() or by.is_complex() or by.dtype == torch.bool:
        raise TypeError(f"by= expects integer labels, got {by.dtype}. Convert with by.long().")
    if tuple(by.shape) != (x.shape[0],):
        raise PatternError(
            f"by= has shape {tuple(by.shape)}, expected ({x.shape[0]},): one label for each element of the leading "
            f"axis of the input of shape {tuple(x.shape)}."
        )
    if num_groups is None:
        values, index = torch.unique(by, return_inverse=True)
        return Groups(index, values.shape[0])
    if num_groups < 1:
        raise ValueError(f"num_groups={num_groups} is not positive.")
    if not torch.compiler.is_compiling() and by.device.type == "cpu" and by.numel() and not _functional(by):
        low, high = int(by.min()), int(by.max())
        if low < 0 or high >= num_groups:
            raise ValueError(f"by= has labels from {low} to {high}, expected 0 to {num_groups - 1} (num_groups).")
    return Groups(by.long(), num_groups)


def _functional(x: Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def _checked_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask expects a boolean tensor (true: the value counts), got {given}.")
    if mask.ndim > x.ndim or any(a != 1 and a != b for a, b in zip(mask.shape[::-1], x.shape[::-1], strict=False)):
        raise PatternError(
            f"mask has shape {tuple(mask.shape)}, expected a shape that broadcasts to x, {tuple(x.shape)}."
        )
    return mask
