"""Random patterns, shapes, dtypes and memory layouts for hypothesis."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

NAMES = ["n", "c", "h", "w", "batch", "g2", "d", "tokens", "k_1", "Q", "z", "y"]
SIZES = [1, 2, 3, 4, 5, 7]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    pattern: str
    shape: tuple[int, ...]
    sizes: dict[str, int] = field(default_factory=dict)
    leading_reduced: bool = False


@st.composite
def cases(draw, *, zero: bool = False, leading_reduced: bool = False) -> Case:
    """1 to 5 axes of x: plain, composed, anonymous 1, and at most one ellipsis for 0 to 2 axes."""
    names = iter(draw(st.permutations(NAMES)))
    left, shape, sizes, elementary = [], [], {}, []
    ndim = draw(st.integers(1, 5))
    has_ellipsis = False
    leading = None
    for position in range(ndim):
        kinds = ["plain"] * 4 + ["composed", "one"]
        if not has_ellipsis and not (leading_reduced and position == 0):
            kinds.append("ellipsis")
        if leading_reduced and position == 0:
            kinds = ["plain"]
        kind = draw(st.sampled_from(kinds))
        if kind == "plain":
            name = next(names)
            size = draw(st.sampled_from([0, 2] if zero and draw(st.booleans()) else SIZES))
            left.append(name)
            shape.append(size)
            elementary.append(name)
            if position == 0:
                leading = name
            if draw(st.booleans()) and draw(st.booleans()):
                sizes[name] = size
        elif kind == "one":
            left.append(draw(st.sampled_from(["1", "()"])))
            shape.append(1)
        elif kind == "ellipsis":
            has_ellipsis = True
            left.append("...")
            shape.extend(draw(st.lists(st.sampled_from([1, 2, 3]), max_size=2)))
        else:
            parts = [next(names) for _ in range(draw(st.integers(2, 3)))]
            lengths = [draw(st.sampled_from([1, 2, 3])) for _ in parts]
            free = draw(st.sampled_from([*parts, None]))
            sizes.update({p: n for p, n in zip(parts, lengths, strict=True) if p != free})
            left.append("(" + " ".join(parts) + ")")
            shape.append(math.prod(lengths))
            elementary.extend(parts)
    kept = [n for n in elementary if draw(st.booleans())]
    if leading_reduced:
        kept = [n for n in kept if n != leading]
    if has_ellipsis and draw(st.booleans()):
        kept.append("...")
    kept = draw(st.permutations(kept)) if kept else []
    right: list[str] = []
    i = 0
    while i < len(kept):
        if draw(st.integers(0, 5)) == 0:
            right.append("1")
        if i + 1 < len(kept) and draw(st.integers(0, 3)) == 0:
            right.append(f"({kept[i]} {kept[i + 1]})")
            i += 2
        else:
            right.append(kept[i])
            i += 1
    pattern = f"{' '.join(left)} -> {' '.join(right)}"
    return Case(pattern, tuple(shape), sizes)


LAYOUTS = ["plain", "transposed", "channels_last", "expanded", "sliced", "every_other"]


def lay_out(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same values in another memory layout (``expanded`` makes the values of the first axis equal)."""
    if x.dim() == 0 or how == "plain":
        return x
    if how == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "channels_last":
        if x.dim() == 4:
            return x.contiguous(memory_format=torch.channels_last)
        if x.dim() == 5:
            return x.contiguous(memory_format=torch.channels_last_3d)
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 1 else x
    if how == "expanded":
        return x[:1].expand_as(x) if x.shape[0] else x
    if how == "sliced":
        room = x.new_full([n + 3 for n in x.shape], 77.0)
        inner = tuple(slice(1, n + 1) for n in x.shape)
        room[inner] = x
        return room[inner]
    if how == "every_other":
        room = x.new_full([2 * n + 1 for n in x.shape], 77.0)
        inner = tuple(slice(1, None, 2) for _ in x.shape)
        room[inner] = x
        return room[inner]
    raise ValueError(how)
