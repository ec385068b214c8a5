"""What the optimizers share: checks of parameters and settings, pieces that fit the cache, and shards.

An optimizer of this area derives from :class:`Base` and writes :meth:`Base._check`, which refuses bad settings of
a parameter group, and :meth:`Base._update`, which updates the parameters of one group.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = [
    "Base",
    "Piece",
    "Shards",
    "at_least",
    "check_betas",
    "jobs",
    "local",
    "local_gradient",
    "number",
    "one_of",
    "shards",
]

#: Elements of one tensor that are worked on at once on a CPU: with its gradient and state they stay in the cache.
PIECE = 1 << 18


class Base(Optimizer):
    """A ``torch.optim.Optimizer`` that refuses what it cannot optimize when it is given, not at the first step."""

    def _check(self, group: dict[str, Any]) -> None:
        """Raise ``ValueError`` or ``TypeError`` for a setting or a parameter that the method does not take."""
        raise TypeError("write _check in the subclass")

    def _begin(self) -> None:
        """Called once a step, before the groups are updated."""

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Update the parameters of a group that have a gradient; there is at least one."""
        raise TypeError("write _update in the subclass")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters. See :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            TypeError: a parameter is complex.
            ValueError: a setting of the group is out of range.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for place, param in enumerate(group["params"]):
                if param.is_complex():
                    raise TypeError(
                        f"{type(self).__name__} optimizes real parameters; {name_of(group, place)} is {param.dtype}. "
                        f"Keep it as a real tensor and use torch.view_as_complex(parameter) in the model."
                    )
            number("lr", group["lr"])
            self._check(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned; ``None`` without one.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._begin()
        for group in self.param_groups:
            params, grads = [], []
            for place, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                if param.grad.layout is not torch.strided:
                    raise RuntimeError(
                        f"{type(self).__name__} does not take sparse gradients; {name_of(group, place)} of shape "
                        f"{tuple(param.shape)} has one. Use nn.Embedding(..., sparse=False), or give this parameter "
                        f"to torch.optim.SparseAdam."
                    )
                params.append(param)
                grads.append(param.grad)
            if params:
                self._run(group, params, grads)
        return loss

    @torch._disable_dynamo  # as torch's own: a compiled training step takes this part as it is
    def _run(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        self._update(group, params, grads)


def name_of(group: dict[str, Any], place: int) -> str:
    """How a message calls a parameter: by its name where the group has names."""
    names = group.get("param_names")
    return f"parameter {names[place]!r}" if names else f"parameter {place} of its group"


def number(what: str, value: float | Tensor) -> float:
    """A finite number of at least 0, out of a number or a tensor of one element."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{what} is a tensor of shape {tuple(value.shape)}, expected one element.")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{what}={value!r}, expected a number.")
    if not 0 <= value < math.inf:
        raise ValueError(f"{what}={value}, expected a finite number of at least 0.")
    return float(value)


def at_least(what: str, value: float, lowest: float, below: float = math.inf) -> None:
    """Refuse a value outside [lowest, below)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{what}={value!r}, expected a number.")
    if not lowest <= value < below:
        end = "" if below == math.inf else f" and below {below:g}"
        raise ValueError(f"{what}={value}, expected a number of at least {lowest:g}{end}.")


def check_betas(betas: object) -> None:
    """Refuse what is not a pair of numbers in [0, 1)."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas={betas!r}, expected two numbers.")
    for place, beta in enumerate(betas):
        at_least(f"betas[{place}]", beta, 0, below=1)


def one_of(what: str, value: object, values: Sequence[object]) -> None:
    """Refuse a value that is not in the list."""
    if not any(value is known or value == known for known in values):
        raise ValueError(f"{what}={value!r}, expected one of {', '.join(map(repr, values))}.")


class Piece(NamedTuple):
    """Rows of tensor number ``place``; ``rows`` is None for all of them."""

    place: int
    rows: slice | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The piece of a tensor, as a view."""
        return tensor if self.rows is None else tensor[self.rows]


def jobs(
    tensors: Sequence[Tensor], places: Iterable[int], foreach: bool, most: int | None = None
) -> Iterator[list[list[Piece]]]:
    """Cut the work of a step: a job is a list of buckets, a bucket a list of pieces that are worked on at once.

    All pieces of a tensor are in one job, so what depends on a whole tensor is settled between two passes over the
    job's buckets. With ``foreach`` a job on a CPU is as many small tensors as fit the cache together, or the rows of
    one large tensor bucket after bucket; on another device it is all tensors of one type at once. Without
    ``foreach`` every tensor is a job by itself. ``most`` is the number of elements of a bucket, default ``PIECE``.
    """
    most = PIECE if most is None else most
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Piece], list[int]]] = {}
    for place in places:
        tensor = tensors[place]
        size = tensor.numel()
        if not size:
            continue
        if not foreach:
            yield [[Piece(place)]]
            continue
        small, total = groups.setdefault((tensor.device, tensor.dtype), ([], [0]))
        if tensor.device.type == "cpu":
            if size > most:
                rows = tensor.shape[0]
                step = max(1, most * rows // size)
                yield [[Piece(place, slice(start, start + step))] for start in range(0, rows, step)]
                continue
            if total[0] + size > most:
                yield [small.copy()]
                small.clear()
                total[0] = 0
        small.append(Piece(place))
        total[0] += size
    for small, _ in groups.values():
        if small:
            yield [small]


class Shards(NamedTuple):
    """How a local tensor lies in the whole one: its shape, and a process group for each axis that is split."""

    shape: tuple[int, ...]
    splits: tuple[tuple[int, Any], ...] = ()

    def split(self, *axes: int) -> bool:
        """Whether one of the axes is split over processes; without axes: whether any is."""
        return any(not axes or axis in axes for axis, _ in self.splits)

    def sum_(self, values: Tensor, axes: Iterable[int] | None = None) -> Tensor:
        """Add up, in place, what each process has of a sum over ``axes`` (default: all)."""
        return self._reduce(values, axes, "SUM")

    def max_(self, values: Tensor, axes: Iterable[int] | None = None) -> Tensor:
        """The largest, in place, of what each process has of a maximum over ``axes`` (default: all)."""
        return self._reduce(values, axes, "MAX")

    def _reduce(self, values: Tensor, axes: Iterable[int] | None, how: str) -> Tensor:
        chosen = None if axes is None else set(axes)
        for axis, group in self.splits:
            if chosen is None or axis in chosen:
                import torch.distributed as dist

                dist.all_reduce(values, getattr(dist.ReduceOp, how), group=group)
        return values


def shards(param: Tensor) -> Shards:
    """How the local part of a parameter lies in it.

    Raises:
        TypeError: the parameter is a DTensor that is neither replicated nor sharded.
    """
    if not _is_dtensor(param):
        return Shards(tuple(param.shape))
    splits = []
    mesh = param.device_mesh  # type: ignore[attr-defined]
    for axis, placement in enumerate(param.placements):  # type: ignore[attr-defined]
        if placement.is_partial():
            raise TypeError(f"A parameter has the placement {placement}; expected Shard or Replicate.")
        if not placement.is_replicate():
            splits.append((placement.dim, mesh.get_group(axis)))
    return Shards(tuple(param.shape), tuple(splits))


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is on this process: of a DTensor its shard, else the tensor itself."""
    return tensor.to_local() if _is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def local_gradient(param: Tensor, grad: Tensor) -> Tensor:
    """The local part of a gradient, laid out as its parameter is."""
    if not _is_dtensor(param):
        return local(grad)
    if tuple(grad.placements) != tuple(param.placements):  # type: ignore[attr-defined]
        grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return local(grad)


def _is_dtensor(tensor: Tensor) -> bool:
    # Whoever has a DTensor has imported its module; everyone else is spared half a second.
    kind = type(tensor)
    if kind is Tensor or kind is torch.nn.Parameter:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
