"""Less memory in training: what is cheap to compute is computed again in the backward pass, not kept.

A network keeps for its backward pass what its layers saw. Between two expensive layers stands a normalization, and
its output is kept for the second one although its input, which is kept too, gives it back in one pass over memory:

.. math::
    x_1 = W_1 y_0, \\quad y_1 = \\phi(\\mathrm{norm}(x_1) + r), \\quad x_2 = W_2 y_1: \\qquad
    \\text{keep } x_1, x_2, \\dots; \\quad y_1, y_2, \\dots \\text{ again when } W_2, \\dots \\text{ need them.}

:class:`low_memory` does that for everything that :func:`evenly.normalize` computes, fused residual and activation
included, and for what is called through :func:`recomputed`. Matrix products and convolutions never run twice.

How: a layer tells which storage it has just filled and how (a recipe: a function and its inputs). Inside the context
a hook of autograd sees every tensor that is saved; one that lies in such a storage, unchanged since, is replaced by
the recipe. This was chosen over ``torch.utils.checkpoint`` around a segment because it needs no segments (any network
that contains the layers gains), never repeats an expensive layer, a draw of random numbers or a measurement of
statistics, and works out the very numbers that were there: gradients are the same bit for bit. Recipes may build
on recipes, as those of residual networks do; every eighth tensor of such a chain is kept, so that a chain needs
little memory while it is worked out, and no value is computed twice.

References:
    Chen, Xu, Zhang & Guestrin, *Training Deep Nets with Sublinear Memory Cost*, 2016, arXiv 1604.06174, section 3
    ("drop the results of low cost operations").
    Pleiss et al., *Memory-Efficient Implementation of DenseNets*, 2017, arXiv 1707.06990: batch normalization
    recomputed, convolutions not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["MEMORY", "announce", "check_memory", "is_announced", "low_memory", "recomputed", "saving", "watching"]

MEMORY = ("normal", "low")

_LONGEST = 7  # recipes that build on one another, before a tensor is kept
_PLAIN = (Tensor, torch.nn.Parameter)

#: How many contexts are entered, in all threads; whether one is in force here is asked only where there is one.
_entered = 0


class low_memory(ContextDecorator):
    """Run a forward pass that keeps less for its backward pass; also a decorator.

    Outputs of :func:`evenly.normalize`, and so of the layers of :mod:`evenly.nn` with their fused residual and
    activation, are not kept: the backward pass computes them again, once each, from what is kept anyway. Values,
    gradients and running statistics are the same bit for bit, and random numbers are drawn as without it. It costs
    one more pass over memory for each such output. A bottleneck block of a residual network keeps about half of what
    the same block of ``torch.nn`` keeps.

    Only the forward pass needs to be inside. Nothing changes without gradient. Where something else decides what is
    saved it is left to that: under ``torch.utils.checkpoint`` or other hooks on saved tensors, inside transforms of
    ``torch.func``, and in what ``torch.compile`` compiles (the compiler recomputes by its own plan).

    A tensor that was changed in place between the passes raises the error that autograd would raise.

    >>> import torch
    >>> from evenly import nn
    >>> first, last = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 1, 3)
    >>> net = torch.nn.Sequential(first, nn.BatchNorm(8, activation="relu"), last)
    >>> with nn.low_memory():
    ...     loss = net(torch.randn(2, 3, 8, 8)).square().mean()
    >>> loss.backward()
    """

    def __init__(self) -> None:
        self._hooks: list[saved_tensors_hooks | None] = []

    def _recreate_cm(self) -> low_memory:
        return low_memory()

    def __enter__(self) -> None:
        global _entered
        hooks = None
        if not torch.compiler.is_compiling() and _free():
            hooks = saved_tensors_hooks(_pack, _unpack)
            hooks.__enter__()
            _entered += 1
        self._hooks.append(hooks)

    def __exit__(self, *reason: object) -> None:
        global _entered
        hooks = self._hooks.pop()
        if hooks is not None:
            _entered -= 1
            hooks.__exit__(*reason)


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)``, whose output is computed again rather than kept inside :class:`low_memory`.

    For a cheap function between expensive layers, such as an activation: ``recomputed(gelu, x)``. It pays where the
    backward pass of ``function`` itself needs its inputs only; whatever else it saves is kept. Outside the context,
    and without gradient, this is a plain call.

    Args:
        function: from tensors to a tensor. A function that draws random numbers (on the device of its output), or
            that works in place, is noticed, and its output kept.
        *inputs: its arguments; other settings belong into the function (``functools.partial``).

    Returns:
        What the function returns.

    Raises:
        TypeError: inside the context, an output that is not a tensor.

    >>> import torch
    >>> x = torch.tensor([-1.0, 2.0], requires_grad=True)
    >>> with low_memory():
    ...     y = recomputed(torch.relu, x).square().sum()
    >>> torch.autograd.grad(y, x)
    (tensor([0., 4.]),)
    """
    if not watching() or not torch.is_grad_enabled():
        return function(*inputs)
    device = next((t.device for t in inputs if isinstance(t, Tensor)), torch.device("cpu"))
    before = _draws(device)
    y = function(*inputs)
    if not isinstance(y, Tensor):
        raise TypeError(f"recomputed expects a function whose output is a tensor, got {type(y).__name__}.")
    if y.requires_grad and _same(before, _draws(device)):
        announce(y, _as_called(function, device.type), inputs)
    return y


def check_memory(memory: str) -> None:
    """Refuse an unknown setting of ``memory=``."""
    if memory not in MEMORY:
        raise ValueError(f"memory is {memory!r}, expected one of {', '.join(map(repr, MEMORY))}.")


def saving(memory: str) -> low_memory | nullcontext[None]:
    """The context of a setting of ``memory=``."""
    return low_memory() if memory == "low" else nullcontext()


def watching() -> bool:
    """Whether a context is in force: its hooks are the ones that are asked here and now."""
    if not _entered or torch.compiler.is_compiling():
        return False
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return top is not None and top[0] is _pack


def announce(
    y: Tensor,
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    spare: Tensor | None = None,
) -> None:
    """Say that ``function(*inputs)`` gives ``y`` again, bit for bit, without gradient.

    Args:
        y: just computed.
        function: must not hold tensors that change.
        inputs: its arguments.
        spare: the one of them that is kept for nothing else. Where no other saved tensor has its memory, to keep it
            instead of ``y`` gains nothing, and there is no recipe.
    """
    if type(y) not in _PLAIN:
        return
    storage = y.untyped_storage()
    if storage.nbytes() != y.numel() * y.element_size() or y.numel() == 0:
        return  # a part of something else
    if storage._cdata in _held or (spare is not None and not _is_held(spare)):
        return  # its own function keeps it, or something as large would have to be kept in its place
    sources: list[_Again | _Kept | None] = []
    depth = 0
    for t in inputs:
        if t is None:
            sources.append(None)
            continue
        if type(t) not in _PLAIN or t.untyped_storage()._cdata == storage._cdata:
            return
        found = _lookup(t)
        depth = max(depth, 0 if found is None else found.recipe.depth)
        sources.append(_Kept(t) if found is None else found)
    if depth >= _LONGEST:
        return
    recipe = _Recipe(y, function, sources, depth + 1)
    _recipes[storage._cdata] = recipe
    _alive[y] = recipe  # as long as somebody may still save y


def is_announced(y: Tensor) -> bool:
    """Whether there is a recipe for a tensor."""
    return _lookup(y) is not None


# ---- recipes --------------------------------------------------------------------------------------------------------


class _Recipe:
    """How to compute a tensor again.

    ``wanted`` counts the saved tensors that it stands for and that were not asked for yet: a value is kept from the
    first to the last of them, so that one that others build on is computed once.
    """

    __slots__ = (
        "__weakref__",
        "depth",
        "dtype",
        "function",
        "sources",
        "storage",
        "strides",
        "value",
        "version",
        "wanted",
    )

    def __init__(
        self, y: Tensor, function: Callable[..., Tensor], sources: list[_Again | _Kept | None], depth: int
    ) -> None:
        self.function = function
        self.sources = sources
        self.depth = depth
        self.storage = StorageWeakRef(y.untyped_storage())  # while it is held, no other storage has the same identity
        self.version = y._version
        self.dtype = y.dtype
        self.strides = (y.shape, y.stride())
        self.wanted = 0
        self.value: Tensor | None = None

    def compute(self) -> Tensor:
        if self.value is not None:
            return self.value
        with torch.no_grad():
            y = self.function(*[None if source is None else source.tensor() for source in self.sources])
        if (y.shape, y.stride()) != self.strides or y.dtype != self.dtype:
            raise RuntimeError(
                f"what is to be computed again had shape {tuple(self.strides[0])}, strides {self.strides[1]} and dtype "
                f"{self.dtype}, and now has shape {tuple(y.shape)}, strides {y.stride()} and dtype {y.dtype}: the "
                "function given to recomputed must do the same each time."
            )
        if self.wanted > 0:
            self.value = y
        return y


class _Again:
    """A tensor that is computed again: a recipe and the view of its output."""

    __slots__ = ("recipe", "view")

    def __init__(self, recipe: _Recipe, t: Tensor) -> None:
        self.recipe = recipe
        self.view = (t.shape, t.stride(), t.storage_offset())

    def tensor(self) -> Tensor:
        y = self.recipe.compute()
        return y if self.view == (*self.recipe.strides, 0) else y.as_strided(*self.view)

    def taken(self) -> Tensor:
        y = self.tensor()
        self.recipe.wanted -= 1
        if self.recipe.wanted <= 0:
            self.recipe.value = None
        return y


class _Kept:
    """A tensor that is kept, and what autograd checks of it."""

    __slots__ = ("__weakref__", "kept", "version")

    def __init__(self, t: Tensor) -> None:
        self.kept = t.detach()  # shares memory and version
        self.version = t._version

    def tensor(self) -> Tensor:
        if self.kept._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{self.kept.dtype} {list(self.kept.shape)}] is at version {self.kept._version}; expected version "
                f"{self.version} instead."
            )
        return self.kept

    taken = tensor


_recipes: weakref.WeakValueDictionary[int, _Recipe] = weakref.WeakValueDictionary()
_held: weakref.WeakValueDictionary[int, _Kept] = weakref.WeakValueDictionary()
_alive = WeakIdKeyDictionary()


def _lookup(t: Tensor) -> _Again | None:
    """The recipe of the memory of a tensor, if that has not changed since."""
    if type(t) not in _PLAIN:
        return None
    recipe = _recipes.get(t.untyped_storage()._cdata)
    if recipe is None or recipe.version != t._version or recipe.dtype != t.dtype or t.is_neg() or t.is_conj():
        return None
    return _Again(recipe, t)


def _is_held(t: Tensor) -> bool:
    """Whether the memory of a tensor is kept for something else, or need not be kept."""
    return type(t) in _PLAIN and (t.untyped_storage()._cdata in _held or _lookup(t) is not None)


def _pack(t: Tensor) -> Any:
    if type(t) not in _PLAIN or t.layout != torch.strided:
        return t
    again = _lookup(t)
    if again is not None:
        again.recipe.wanted += 1
        return again
    kept = _Kept(t)
    _held[t.untyped_storage()._cdata] = kept
    return kept


def _unpack(saved: Any) -> Tensor:
    return saved.taken() if isinstance(saved, (_Again, _Kept)) else saved


def _free() -> bool:
    """Nobody else decides what is saved here."""
    autograd: Any = torch._C._autograd  # its stub lacks one of them
    if torch._C._are_functorch_transforms_active() or not autograd._saved_tensors_hooks_is_enabled():
        return False
    return autograd._top_saved_tensors_default_hooks(True) is None


def _draws(device: torch.device) -> Any:
    """What tells whether random numbers were drawn."""
    if device.type == "cpu":
        return torch.default_generator.get_state()
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
        return (generator.initial_seed(), generator.get_offset())
    module = getattr(torch, device.type, None)
    return module.get_rng_state() if module is not None and hasattr(module, "get_rng_state") else None


def _same(before: Any, after: Any) -> bool:
    return torch.equal(before, after) if isinstance(before, Tensor) else before == after


def _as_called(function: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    """The function under the autocast of this moment."""
    if not torch.is_autocast_enabled(device):
        return function
    dtype = torch.get_autocast_dtype(device)

    def called(*inputs: Tensor) -> Tensor:
        with torch.autocast(device, dtype=dtype, cache_enabled=False):
            return function(*inputs)

    return called
