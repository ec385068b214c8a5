"""Patterns: which axes keep a statistic of their own, and which are reduced over.

A pattern is the pattern of ``einops.reduce`` for the statistic. The left side names every axis of the input,
the right side names the axes that keep a statistic of their own; all others share one::

    "n c h w -> c"            one statistic a channel                 (batch normalization)
    "n (g c) h w -> n g"      one statistic a sample and group        (group normalization)
    "... d -> ..."            one statistic for all but the last axis (layer normalization)

The notation is parsed by einops itself. A pattern is resolved once for a number of axes and bound once to a
shape; both steps are cached, and the second is plain integer arithmetic, so that it can be traced with
symbolic sizes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from einops import EinopsError
from einops.parsing import AnonymousAxis, ParsedExpression

__all__ = ["PatternError", "Plan", "Resolved", "bind", "resolve"]

_ELLIPSIS = "…"
_F = TypeVar("_F")


class PatternError(ValueError):
    """A pattern that cannot be read, or that does not fit the tensor it was given."""


@dataclass(frozen=True)
class Resolved:
    """A pattern for a fixed number of axes, before sizes are known.

    ``axes`` are the elementary axes from left to right (``…0``, ``…1`` stand for the axes of an ellipsis,
    numbers for anonymous axes); ``inputs[i]`` are the elementary axes that make up axis ``i`` of the tensor.
    """

    text: str
    axes: tuple[str, ...]
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    reduced: tuple[int, ...]
    kept: tuple[int, ...]
    fixed: tuple[tuple[int, int], ...]  # (elementary axis, size) of anonymous axes
    affine: tuple[tuple[int, ...], ...] | None  # the axes that a weight carries unless told otherwise
    unknown: tuple[int, ...]  # for each tensor axis the elementary axis to infer, or -1

    def names(self, group: Sequence[int]) -> str:
        """The notation of one axis: ``c`` or ``(g c)``."""
        inside = " ".join(self.axes[i] for i in group)
        return inside if len(group) == 1 else f"({inside})"


@dataclass(frozen=True)
class Plan:
    """A pattern bound to a shape: everything that a kernel needs to know.

    ``sizes`` is the shape over elementary axes; ``reduced`` the positions in it that are reduced over;
    ``stat_shape`` the shape of a statistic with reduced axes kept as 1; ``count`` the number of values that
    share one statistic.
    """

    resolved: Resolved
    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    reduced: tuple[int, ...]
    stat_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    count: int
    split: bool = field(default=False)  # whether the elementary shape differs from the tensor's
    given: tuple[str, ...] = ()  # the axes whose size was given by keyword
    cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # what backends worked out

    def named_sizes(self) -> tuple[list[str], list[int]]:
        """The sizes that were given by keyword, as names and numbers."""
        return list(self.given), [self.sizes[self.resolved.axes.index(name)] for name in self.given]

    def statistic_out(self, stat: torch.Tensor) -> torch.Tensor:
        """A statistic of shape ``stat_shape`` in the order and grouping of the right-hand side."""
        resolved = self.resolved
        order = [axis for group in resolved.outputs for axis in group]
        if order != sorted(order):
            stat = stat.permute(*order, *self.reduced)
        return stat.reshape(self.out_shape)

    def statistic_in(self, stat: torch.Tensor, name: str) -> torch.Tensor:
        """The inverse of :meth:`statistic_out`: a statistic that the caller supplies."""
        if tuple(stat.shape) != self.out_shape:
            raise PatternError(
                f"{name} has shape {tuple(stat.shape)}, expected {self.out_shape}: the axes on the right of "
                f"{self.resolved.text!r} for an input of shape {self.shape}."
            )
        order = [axis for group in self.resolved.outputs for axis in group]
        if order != sorted(order):
            stat = stat.reshape([self.sizes[axis] for axis in order])
            stat = stat.permute([order.index(axis) for axis in sorted(order)])
        return stat.reshape(self.stat_shape)

    def affine_shape(self, groups: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """The shape of a weight that carries these axes."""
        return tuple([product([self.sizes[axis] for axis in group]) for group in groups])

    def affine_in(self, value: torch.Tensor, groups: Sequence[Sequence[int]] | None, name: str) -> torch.Tensor:
        """A weight or bias, shaped to broadcast over the elementary axes."""
        if value.ndim == 0:
            return value
        if groups is None:
            raise PatternError(
                f"{name} has shape {tuple(value.shape)}, and {self.resolved.text!r} does not say which axes it "
                f'carries. Name them, for example affine="c" or affine="(g c)".'
            )
        expected = self.affine_shape(groups)
        if tuple(value.shape) != expected:
            carried = " ".join(self.resolved.names(group) for group in groups)
            raise PatternError(
                f"{name} has shape {tuple(value.shape)}, expected {expected}: it carries the axes {carried!r} of "
                f"{self.resolved.text!r}, and the input has shape {self.shape}."
            )
        order = [axis for group in groups for axis in group]
        if order != sorted(order):
            value = value.reshape([self.sizes[axis] for axis in order])
            value = value.permute([order.index(axis) for axis in sorted(order)])
        return value.reshape([size if axis in order else 1 for axis, size in enumerate(self.sizes)])


def product(sizes: Sequence[int]) -> int:
    """The product of sizes, which may be symbolic."""
    result = 1
    for size in sizes:
        result = result * size
    return result


def _parse(text: str, what: str) -> ParsedExpression:
    """One side of a pattern, or ``affine``; ``what`` is how an error names the whole."""
    try:
        return ParsedExpression(text)
    except EinopsError as error:
        reason = " ".join(str(error).split()).rstrip(".").replace("should should", "should")
        if "duplicate dimension" in reason:
            reason = f"the axis {reason.split(chr(34))[1]!r} is named twice in {text.strip()!r}"
        raise PatternError(f"Cannot read {what}: {reason}.") from None


def _expand(expression: ParsedExpression, ellipsis_axes: list[str]) -> list[list[object]]:
    groups: list[list[object]] = []
    for group in expression.composition:
        if isinstance(group, str):
            groups.extend([axis] for axis in ellipsis_axes)
        else:
            flat: list[object] = []
            for axis in group:
                flat.extend(ellipsis_axes if axis == _ELLIPSIS else [axis])
            groups.append(flat)
    return groups


def _axis_list(names: Iterable[object]) -> str:
    return ", ".join(sorted("'...'" if name == _ELLIPSIS else repr(str(name)) for name in names))


@functools.lru_cache(maxsize=1024)
def _resolve(pattern: str, ndim: int, size_names: tuple[str, ...]) -> Resolved:
    if pattern.count("->") != 1:
        raise PatternError(
            f"Cannot read the pattern {pattern!r}: expected one '->', with all axes on its left and the axes "
            f"that keep a statistic of their own on its right, as in 'n c h w -> c'."
        )
    left_text, right_text = pattern.split("->")
    left, right = _parse(left_text, f"the pattern {pattern!r}"), _parse(right_text, f"the pattern {pattern!r}")
    if left.has_ellipsis and left.has_ellipsis_parenthesized:
        raise PatternError(
            f"Cannot read the pattern {pattern!r}: '...' stands inside parentheses on the left, where it names axes of "
            f"the input; write it without, as in '... d -> ...'."
        )
    missing = right.identifiers - left.identifiers
    if missing:
        extra = ""
        if any(isinstance(axis, AnonymousAxis) for axis in missing):
            extra = " A number on the right is not an axis of the input: give the axis a name and its size by keyword."
        raise PatternError(
            f"The pattern {pattern!r} keeps {_axis_list(missing)}, which its left side does not name.{extra}"
        )

    explicit = len(left.composition) - (1 if left.has_ellipsis else 0)
    if (ndim < explicit) if left.has_ellipsis else (ndim != explicit):
        atleast = "at least " if left.has_ellipsis else ""
        raise PatternError(f"The pattern {pattern!r} names {atleast}{explicit} axes, and the input has {ndim}.")
    ellipsis_axes = [f"{_ELLIPSIS}{i}" for i in range(ndim - explicit)] if left.has_ellipsis else []
    left_groups = _expand(left, ellipsis_axes)
    right_groups = _expand(right, ellipsis_axes)

    flat = list(itertools.chain.from_iterable(left_groups))
    position = {axis: i for i, axis in enumerate(flat)}
    axes = tuple(str(axis.value) if isinstance(axis, AnonymousAxis) else str(axis) for axis in flat)
    fixed = tuple((i, axis.value) for i, axis in enumerate(flat) if isinstance(axis, AnonymousAxis))
    inputs = tuple(tuple(position[axis] for axis in group) for group in left_groups)
    outputs = tuple(tuple(position[axis] for axis in group) for group in right_groups)
    kept = tuple(sorted(axis for group in outputs for axis in group))
    reduced = tuple(i for i in range(len(flat)) if i not in kept)

    named = {axis for axis in axes if axis.isidentifier()}
    for name in size_names:
        if name not in named:
            raise PatternError(
                f"Got a size for the axis {name!r}, which {pattern!r} does not name. Its axes are "
                f"{', '.join(sorted(named)) or 'unnamed'}."
            )
    known = {axes.index(name) for name in size_names} | {i for i, _ in fixed}
    unknown = []
    for group in inputs:
        free = [axis for axis in group if axis not in known]
        if len(free) > 1:
            names = " and ".join(axes[axis] for axis in free)
            raise PatternError(
                f"Cannot infer the sizes of {names} in {pattern!r}: give all but one by keyword, "
                f"for example {axes[free[0]]}=8."
            )
        unknown.append(free[0] if free else -1)

    affine: tuple[tuple[int, ...], ...] | None = None
    if len(kept) == 1 and not axes[kept[0]].startswith(_ELLIPSIS):
        affine = (kept,)
    elif right.composition == [_ELLIPSIS] and left.composition[0] == _ELLIPSIS:
        affine = tuple(group for group in inputs if group and group[0] in reduced)
    return Resolved(pattern, axes, inputs, outputs, reduced, kept, fixed, affine, tuple(unknown))


def _constant(function: _F) -> _F:
    # What torch.compiler.assume_constant_result does. Calling it would import the whole compiler, which doubles
    # the time of `import evenly`.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def resolve(pattern: str, ndim: int, size_names: tuple[str, ...] = ()) -> Resolved:
    """Parse a pattern for a tensor of ``ndim`` axes; ``size_names`` are the axes whose size is given.

    >>> resolve("n (g c) h w -> n g", 4, ("g",)).axes
    ('n', 'g', 'c', 'h', 'w')
    """
    return _resolve(pattern, ndim, size_names)


@_constant
def affine_groups(affine: str, pattern: str, ndim: int, size_names: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """The elementary axes that ``affine`` (``"c"``, ``"(g c)"``, ``"c h w"``) names in a pattern."""
    return _affine_groups(affine, pattern, ndim, size_names)


@functools.lru_cache(maxsize=1024)
def _affine_groups(affine: str, pattern: str, ndim: int, size_names: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    resolved = _resolve(pattern, ndim, size_names)
    expression = _parse(affine, f"affine={affine!r}")
    unknown = expression.identifiers - set(resolved.axes)
    if unknown:
        raise PatternError(
            f"affine={affine!r} names {_axis_list(unknown)}, which the left side of {pattern!r} does not."
        )
    groups = tuple(tuple(resolved.axes.index(axis) for axis in group) for group in expression.composition)
    return tuple(group for group in groups if group)


def validate(pattern: str, size_names: Iterable[str] = (), affine: str | None = None) -> None:
    """Check what can be checked of a pattern before there is a tensor.

    Raises:
        PatternError: the pattern cannot be read, or names axes that are not there.
    """
    names = tuple(size_names)
    left = _parse(pattern.split("->")[0], f"the pattern {pattern!r}")
    ndim = len(left.composition) - (1 if left.has_ellipsis else 0)
    _resolve(pattern, ndim, names)
    if affine is not None:
        _affine_groups(affine, pattern, ndim, names)


def _build(resolved: Resolved, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Plan:
    lengths: list[int] = [1] * len(resolved.axes)
    for axis, size in resolved.fixed:
        lengths[axis] = size
    for name, size in sizes.items():
        lengths[resolved.axes.index(name)] = size
    split = False
    for position, (group, free) in enumerate(zip(resolved.inputs, resolved.unknown, strict=True)):
        length = shape[position]
        if len(group) == 1 and free >= 0:
            lengths[free] = length
            continue
        split = split or len(group) != 1
        known = 1
        for axis in group:
            if axis != free:
                known = known * lengths[axis]
        if free < 0:
            if length != known:
                what = f"axis {resolved.names(group)}" if group else "an axis written 1"
                raise PatternError(
                    f"{resolved.text!r} ({_sizes_text(sizes)}) expects size {known} for {what}, and axis "
                    f"{position} of the input of shape {tuple(shape)} has {length}."
                )
        else:
            if known == 0 or length % known != 0:
                raise PatternError(
                    f"{resolved.text!r} ({_sizes_text(sizes)}) splits axis {position} of the input of shape "
                    f"{tuple(shape)} into {resolved.names(group)}, and {length} is not divisible by {known}."
                )
            lengths[free] = length // known
    count = product([lengths[axis] for axis in resolved.reduced])
    out_shape = [product([lengths[axis] for axis in group]) for group in resolved.outputs]
    stat_shape = [1 if axis in resolved.reduced else lengths[axis] for axis in range(len(lengths))]
    return Plan(
        resolved,
        shape,
        tuple(lengths),
        resolved.reduced,
        tuple(stat_shape),
        tuple(out_shape),
        count,
        split,
        tuple(sizes),
    )


def _sizes_text(sizes: Mapping[str, int]) -> str:
    return "sizes given: " + ", ".join(f"{name}={size}" for name, size in sizes.items()) if sizes else "no sizes given"


_plans: dict[tuple[object, ...], Plan] = {}


def bind(pattern: str, shape: torch.Size | tuple[int, ...], sizes: Mapping[str, int] | None = None) -> Plan:
    """Bind a pattern to a shape.

    Args:
        pattern: for example ``"n (g c) h w -> n g"``.
        shape: the shape of the tensor.
        sizes: sizes of axes by name, for example ``{"g": 32}``.

    Raises:
        PatternError: if the pattern cannot be read or does not fit the shape.

    >>> bind("n (g c) h w -> n g", (2, 6, 4, 4), {"g": 3}).sizes
    (2, 3, 2, 4, 4)
    """
    sizes = sizes or {}
    if torch.compiler.is_compiling():
        return _build(resolve(pattern, len(shape), tuple(sizes)), tuple(shape), sizes)
    key = (pattern, shape, *sizes.items())
    try:
        plan = _plans.get(key)
    except TypeError:  # symbolic sizes, or a pattern that is no string
        plan = None
    if plan is not None:
        return plan
    if not isinstance(pattern, str):
        raise TypeError(f"A pattern is a string such as 'n c h w -> c', got {type(pattern).__name__}.")
    try:
        resolved = _resolve(pattern, len(shape), tuple(sizes))
    except PatternError as error:
        raise PatternError(f"{error} Input shape: {tuple(shape)}; {_sizes_text(sizes)}.") from None
    plan = _build(resolved, tuple(shape), _checked(pattern, shape, sizes))
    if all(isinstance(size, int) for size in plan.sizes):
        if len(_plans) >= 8192:
            _plans.clear()
        _plans[key] = plan
    return plan


def _checked(pattern: str, shape: Sequence[int], sizes: Mapping[str, int]) -> Mapping[str, int]:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
            raise TypeError(f"The size {name}={size!r} of {pattern!r} is a {type(size).__name__}, expected an integer.")
        if size < 0:
            raise PatternError(
                f"The size {name}={size} of {pattern!r} is negative, expected at least 0. Input shape: {tuple(shape)}."
            )
    return sizes
