r"""Weight normalization: the length and the direction of each weight vector, trained apart.

.. math::
    w_k = g_k \frac{v_k}{\lVert v_k \rVert_2}, \qquad
    \frac{∂L}{∂g_k} = \frac{v_k}{\lVert v_k \rVert} \cdot \frac{∂L}{∂w_k}, \qquad
    \frac{∂L}{∂v_k} = \frac{g_k}{\lVert v_k \rVert} \Big( I - \frac{w_k w_k^⊤}{\lVert w_k \rVert^2} \Big)
        \frac{∂L}{∂w_k}

for the weights :math:`w_k` of output unit k. The gradient of a direction is orthogonal to it, so plain steps only ever
lengthen :math:`v`, and a step that was too large makes the next ones smaller. Nothing depends on the batch: use it
where batch normalization cannot be (recurrent networks, reinforcement learning, generative models, tiny batches).

:func:`weight_norm` keeps the function of a layer. :func:`data_dependent_init_` then starts a feed-forward network where
batch normalization would: with v drawn from N(0, 0.05²) and, over a batch of inputs, :math:`t = v·x / \lVert v \rVert`,

.. math::
    g ← 1 / σ[t], \qquad b ← -μ[t] / σ[t] ,

one layer after the other, so that every unit's output has mean 0 and variance 1. Combine it with
:class:`evenly.nn.MeanOnlyBatchNorm` for the paper's best result on images.

Weight decay on v changes nothing but its length, and so the size of later steps; decay on g does shrink the weights.
Give v (``original1``) no decay. Momentum and Adam make updates that are not orthogonal to v.

The weight is computed anew in every forward pass, at a cost of a pass over the weights;
``torch.nn.utils.parametrize.cached()`` and :func:`remove_weight_norm` save that where weights do not change.

Reference:
    Tim Salimans & Diederik P. Kingma, *Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep
    Neural Networks*, NIPS 2016, arXiv 1602.07868, equations 2 and 3 (the gradients), 5 and 6 (the initialization).

Where the paper and its released code differ:
    The code adds 1e-10 (convolutions: 1e-8) to the variance of the initialization; the paper does not, nor is it done
    here: a unit without variance is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from evenly.core import moments, normalize
from evenly.core.kernels.reference import accumulate_dtype

__all__ = [
    "WeightNorm",
    "data_dependent_init_",
    "from_torch_state_dict",
    "remove_weight_norm",
    "weight_norm",
    "weight_normalize_",
]

Gain = Literal["linear", "exp"]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_UNITS = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)


class WeightNorm(nn.Module):
    """The parametrization ``(g, v) ↦ g v / |v|``, a length an output unit.

    As ``torch.nn.utils.parametrizations.weight_norm``, g is stored as ``original0``, with ones in place of the reduced
    axes, and v as ``original1``: state dicts load both ways (with ``gain="linear"``).

    Args:
        dim: the axis of the output units, along which lengths are not shared: 0 for (out, in, ...), 1 for transposed
            convolutions. ``None``: one length for the whole weight, which is another method, as in torch.
        gain: ``"linear"``: g is stored; ``"exp"``: its logarithm is, and g stays positive. The authors found no
            benefit in the second.
        transposed_groups: the groups of a transposed convolution, whose weight is (in, out / groups, ...); g is then
            stored as (groups, out / groups, 1, ...). Goes with ``dim=1``.

    Raises:
        ValueError: an unknown ``gain``; when registered, a unit whose weights are all 0, which has no direction, or a
            ``dim`` that the weight does not have.
        TypeError: a weight that is not floating-point.

    >>> linear = nn.Linear(3, 2)
    >>> _ = parametrize.register_parametrization(linear, "weight", WeightNorm())
    >>> linear.parametrizations.weight.original0.shape
    torch.Size([2, 1])
    """

    def __init__(self, dim: int | None = 0, gain: Gain = "linear", transposed_groups: int | None = None) -> None:
        super().__init__()
        if gain not in ("linear", "exp"):
            raise ValueError(f"gain={gain!r} is unknown, expected 'linear' or 'exp'.")
        if dim is not None and dim < 0:
            raise ValueError(
                f"dim={dim} is negative; give the axis of the output units counted from the front, or None for one "
                f"length for the whole weight (which torch also writes as -1)."
            )
        if transposed_groups is not None and dim != 1:
            raise ValueError(f"transposed_groups={transposed_groups} goes with dim=1, got dim={dim}.")
        self.dim = dim
        self.gain: Gain = gain
        self.transposed_groups = transposed_groups

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """The weight, in the shape of ``v``."""
        # Not in half precision: a rounded logarithm is bad enough.
        length = g.to(accumulate_dtype(g.dtype)).exp() if self.gain == "exp" else g
        pattern, axes, shape, sizes = self._layout(v)
        gains = length.reshape(shape)
        return normalize(v, pattern, center=False, scale="l2", eps=0.0, weight=gains, affine=axes, **sizes)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """g (or its logarithm) and v of a weight: its lengths, and itself."""
        _, _, shape, _ = self._layout(weight)
        length = _lengths(weight, self.dim, self.transposed_groups)
        zero = (length.reshape(shape) == 0).nonzero().tolist() if not length.is_meta else []
        if zero:
            raise ValueError(
                f"zero norm: the weight of shape {tuple(weight.shape)} has {len(zero)} output units whose weights are "
                f"all 0 (the first is {zero[0]}), and these have no direction. Initialize them first."
            )
        return (length.log() if self.gain == "exp" else length), weight

    def _layout(self, v: Tensor) -> tuple[str, str | None, tuple[int, ...], dict[str, Any]]:
        """The pattern of the lengths, the axes of g, its shape without the ones, and sizes."""
        if not v.is_floating_point():
            raise TypeError(f"WeightNorm expects a floating-point weight, got {v.dtype}.")
        dim = self.dim
        if v.ndim < (1 if dim is None else 2) or (dim is not None and dim >= v.ndim):
            raise ValueError(
                f"WeightNorm(dim={dim}) expects a weight of at least {2 if dim is None else max(2, dim + 1)} axes, got "
                f"one of shape {tuple(v.shape)}."
            )
        groups = self.transposed_groups
        if groups is not None:
            if v.shape[0] % groups:
                raise ValueError(f"The {v.shape[0]} inputs of the weight do not divide into groups={groups}.")
            return "(g i) o ... -> g o", "g o", (groups, v.shape[1]), {"g": groups}
        names = [f"a{axis}" for axis in range(v.ndim)]
        if dim is None:
            return f"{' '.join(names)} ->", None, (), {}
        return f"{' '.join(names)} -> {names[dim]}", names[dim], (v.shape[dim],), {}

    def extra_repr(self) -> str:
        groups = "" if self.transposed_groups is None else f", transposed_groups={self.transposed_groups}"
        return f"dim={self.dim}, gain={self.gain!r}{groups}"


def weight_norm(
    module: nn.Module,
    name: str = "weight",
    dim: int | Literal["output"] | None = "output",
    gain: Gain = "linear",
) -> nn.Module:
    """Normalize one weight of a module, in the idiom of ``torch.nn.utils.parametrizations``; returns the module.

    The function of the module stays as it is: g starts as the length of each unit's weights.

    Args:
        module: such as a linear layer, a convolution, ``nn.LSTM`` (a weight at a time, such as ``"weight_hh_l0"``:
            each row of the stacked gates is a unit).
        name: the parameter.
        dim: the axis of the output units, or ``None`` for one length in all. ``"output"``: 0, and for transposed
            convolutions 1 (where torch's function takes 0, the inputs, unless told otherwise).
        gain: ``"linear"`` or ``"exp"``; see :class:`WeightNorm`.

    Raises:
        ValueError: no such parameter, one that is parametrized already, one shared with another module, a ``dim`` out
            of range, a unit of zeros.

    A state dict of the older ``torch.nn.utils.weight_norm`` (``weight_g``, ``weight_v``) loads too.

    >>> x, linear = torch.randn(4, 3), nn.Linear(3, 2)
    >>> before = linear(x)
    >>> torch.allclose(weight_norm(linear)(x), before, atol=1e-6)
    True
    """
    kind = type(module).__name__
    if parametrize.is_parametrized(module, name):
        raise ValueError(f"The {name} of {kind} is parametrized already, by {_steps(module, name)}.")
    own = dict(module.named_parameters(recurse=False))
    if name not in own:
        raise ValueError(f"{kind} has no parameter {name!r}; it has {', '.join(own) or 'none of its own'}.")
    parametrization = _checked(module, name, dim, gain)  # refuse before anything is changed
    # unsafe: the check would compute the weight once more; that it is the same is a property of the pair.
    parametrize.register_parametrization(module, name, parametrization, unsafe=True)
    module.register_load_state_dict_pre_hook(_OldNames(name))
    return module


def remove_weight_norm(module: nn.Module, name: str = "weight") -> nn.Module:
    """Fold g and v into one weight again, for use without training; the function stays. Returns the module.

    Raises:
        ValueError: that weight is not normalized.

    >>> linear = weight_norm(nn.Linear(3, 2))
    >>> type(remove_weight_norm(linear).weight).__name__
    'Parameter'
    """
    if _found(module, name) is None:
        raise ValueError(f"The {name} of {type(module).__name__} has no weight normalization to remove.")
    parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return module


def weight_normalize_(
    model: nn.Module,
    gain: Gain = "linear",
    only: Callable[[str, nn.Module], bool] | Iterable[str] | None = None,
) -> list[str]:
    """Normalize the weights of every linear, convolutional and recurrent layer of a model, in place.

    Args:
        model: any module; its function stays.
        gain: as in :class:`WeightNorm`.
        only: names of modules, or a predicate of name and module; default: all that can be.

    Returns:
        The names of the modules that were normalized; those that were before are left as they are.

    Raises:
        ValueError: a name in ``only`` that is no such layer or is normalized already; a weight that two modules
            share (then leave them out); a unit of zeros; nothing to normalize. Nothing is changed then.

    >>> weight_normalize_(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.LSTM(4, 2)))
    ['0', '2']
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (*_UNITS, nn.RNNBase, nn.RNNCellBase))
    }
    if only is None or callable(only):
        chosen = [name for name, module in layers.items() if only is None or only(name, module)]
        if not chosen:
            raise ValueError("The model has no linear, convolutional or recurrent layer to normalize.")
        chosen = [name for name in chosen if any(_found(layers[name], w) is None for w in _weights(layers[name]))]
    else:
        chosen = list(only)
        missing = [name for name in chosen if name not in layers]
        if missing:
            raise ValueError(f"No layer that can be normalized is named {missing}; there are {sorted(layers)}.")
    work = [(name, weight) for name in chosen for weight in _weights(layers[name])]
    _refuse_shared(model, {f"{name}.{weight}".lstrip(".") for name, weight in work})
    for name, weight in work:
        if parametrize.is_parametrized(layers[name], weight):
            raise ValueError(f"The {weight} of {name!r} is parametrized already, by {_steps(layers[name], weight)}.")
        try:
            _checked(layers[name], weight, "output", gain)
        except ValueError as error:
            raise ValueError(f"{name}.{weight}: {error}") from error
    for name, weight in work:
        weight_norm(layers[name], weight, gain=gain)
    return chosen


def from_torch_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate a state dict of the same network to this model's names and gains.

    Args:
        model: a network with weight normalization from this module.
        state: of the same network with ``torch.nn.utils.parametrizations.weight_norm`` (``original0``,
            ``original1``), with the older ``torch.nn.utils.weight_norm`` (``weight_g``, ``weight_v``), or with plain
            weights, layer by layer as it comes.

    Returns:
        A state dict that ``model.load_state_dict`` takes. With ``gain="exp"`` it has logarithms.

    Raises:
        ValueError: lengths that ``gain="exp"`` cannot express (0 or negative); lengths along another axis.

    >>> theirs = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    >>> ours = weight_norm(nn.Linear(3, 2), gain="exp")
    >>> ours.load_state_dict(from_torch_state_dict(ours, theirs.state_dict()))
    <All keys matched successfully>
    """
    result = dict(state)
    for prefix, module in model.named_modules():
        for name in list(getattr(module, "parametrizations", {})):
            step = _found(module, name)
            if not isinstance(step, WeightNorm):
                continue
            at = f"{prefix}." if prefix else ""
            new = f"{at}parametrizations.{name}.original"
            old = f"{at}{name}"
            if old in result:
                g, v = step.right_inverse(result.pop(old))
            elif f"{old}_g" in result or f"{new}0" in result:
                keys = (f"{old}_g", f"{old}_v") if f"{old}_g" in result else (f"{new}0", f"{new}1")
                g, v = (result.pop(key) for key in keys)
                want = getattr(module.parametrizations, name).original0.shape
                if g.shape != want:
                    raise ValueError(
                        f"{keys[0]} has shape {tuple(g.shape)}, expected {tuple(want)}: lengths along another axis. "
                        f"Give weight_norm the same dim."
                    )
                g = _stored(g, step.gain, keys[0])
            else:
                continue  # load_state_dict says what is missing
            result[f"{new}0"], result[f"{new}1"] = g, v
    return result


@torch.no_grad()
def data_dependent_init_(
    model: nn.Module,
    batches: Any,
    *,
    only: Iterable[str] | None = None,
    v_std: float | None = 0.05,
    dead: Literal["raise", "keep"] = "raise",
    generator: torch.Generator | None = None,
) -> list[str]:
    """Initialize a weight-normalized network from data: every unit's output gets mean 0 and variance 1.

    Layers are taken in the order in which a forward pass calls them, each with those before it initialized. One batch
    takes one forward pass in all; several take a pass over all of them for each layer, and need no more memory than
    one. The model runs in the mode that it is in; buffers, such as running means, are afterwards as they were.

    Args:
        model: any module whose linear layers and (transposed) convolutions are weight-normalized, by
            :func:`weight_normalize_` or by torch's ``parametrizations.weight_norm``.
        batches: one batch as a tensor, or an iterable of batches that can be walked again, such as a list or a
            ``DataLoader``. A batch is a tensor, passed as ``model(batch)``; a tuple or list, of which the first entry
            is; or a mapping of keyword arguments.
        only: names of the layers to initialize; default: all of these kinds that are weight-normalized. Recurrent
            layers are no feed-forward layers and keep their weights, as in the paper.
        v_std: directions are drawn anew from N(0, v_std²); ``None`` keeps those there are.
        dead: what to do with a unit whose output is constant over the data: ``"raise"``, or ``"keep"`` length 1 and
            bias 0.
        generator: of the random directions.

    Returns:
        The names of the layers, in the order of their initialization. One without a bias gets variance 1 only.

    Raises:
        ValueError: no such layers; one that a forward pass does not call, or calls more than once; an iterator that
            can be walked only once; no batches; a constant unit with ``dead="raise"``.
        RuntimeError: one value a unit, of which there is no variance.
        TypeError: a batch that is none of the above.

    Cost: with k layers and n > 1 batches, k n partial forward passes, each up to the layer in question.

    >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> _, x = weight_normalize_(model), torch.randn(100, 3)
    >>> data_dependent_init_(model, x)
    ['0', '2']
    >>> y = model(x)
    >>> bool(y.mean(0).abs().max() < 1e-5), bool((y.var(0, correction=0) - 1).abs().max() < 1e-4)
    (True, True)
    """
    if v_std is not None and not v_std > 0:
        raise ValueError(f"v_std={v_std}, expected a positive number, or None to keep the directions.")
    if dead not in ("raise", "keep"):
        raise ValueError(f"dead={dead!r} is unknown, expected 'raise' or 'keep'.")
    layers = _feed_forward(model, only)
    source = _Batches(batches, next(model.parameters()).device)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        order = _order(model, layers, source)
        for name in order:
            _start(layers[name], v_std, generator)
        single = len(source) == 1
        todo = [order] if single else [[name] for name in order]
        for names in todo:
            measured = {name: _Running() for name in names}
            done: set[str] = set()
            for args, kwargs in source:
                handles = [
                    layers[name].register_forward_hook(_measuring(name, measured[name], dead if single else None, done))
                    for name in names
                ]
                try:
                    model(*args, **kwargs)
                except _Enough:
                    pass
                finally:
                    _remove(handles)
            if not single:
                _scale(layers[names[0]], names[0], measured[names[0]], dead)
    finally:
        for name, buffer in model.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])
    return order


class _Enough(BaseException):
    """Ends a forward pass after the layer in question; models may catch Exception, and not this."""


class _Running:
    """Mean and mean square deviation of each unit over batches, merged as Chan, Golub & LeVeque do (1983)."""

    def __init__(self) -> None:
        self.count = 0.0
        self.mean: Tensor | float = 0.0
        self.square: Tensor | float = 0.0  # sum of squared deviations

    def add(self, values: Tensor, channel: int) -> None:
        flat = values.movedim(channel, -1).double()
        mean, var, count = moments(flat, "... c -> c")
        new = float(count[0]) if len(count) else 0.0
        total = self.count + new
        if new == 0:
            return
        step = mean - self.mean
        self.square = self.square + var * new + step.square() * (self.count * new / total)
        self.mean = self.mean + step * (new / total)
        self.count = total


class _Batches:
    """Batches that can be walked several times, as arguments of the model."""

    def __init__(self, source: Any, device: torch.device) -> None:
        if isinstance(source, Tensor):
            source = [source]
        if isinstance(source, (str, bytes, Mapping)) or not isinstance(source, Iterable):
            raise TypeError(
                f"batches is a {type(source).__name__}, expected a tensor or an iterable of batches; [batch] is one "
                f"batch of another kind."
            )
        if isinstance(source, Iterator):
            raise ValueError(
                "batches is an iterator, which can be walked only once, and the initialization needs a pass a layer. "
                "Give a list or a DataLoader, or one batch."
            )
        self.source, self.device = source, device
        first = iter(source)
        self.count = 0 if next(first, None) is None else 1
        if self.count and next(first, None) is not None:
            self.count = 2  # or more
        if not self.count:
            raise ValueError("batches is empty, expected at least one batch.")

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        for batch in self.source:
            yield self._arguments(batch)

    def _arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(batch, Tensor):
            return (batch.to(self.device),), {}
        if isinstance(batch, Mapping):
            place = {key: t.to(self.device) if isinstance(t, Tensor) else t for key, t in batch.items()}
            return (), place
        if isinstance(batch, (tuple, list)) and batch:
            return self._arguments(batch[0])
        raise TypeError(
            f"A batch is a {type(batch).__name__}, expected a tensor, a tuple whose first entry is the input, or a "
            f"dict of keyword arguments."
        )


class _OldNames:
    """Loads state dicts of the older ``torch.nn.utils.weight_norm``."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        old = f"{prefix}{self.name}"
        if f"{old}_g" in state and f"{old}_v" in state:
            g, v = state.pop(f"{old}_g"), state.pop(f"{old}_v")
            step = _found(module, self.name)
            new = f"{prefix}parametrizations.{self.name}.original"
            state[f"{new}0"] = _stored(g, step.gain, f"{old}_g") if isinstance(step, WeightNorm) else g
            state[f"{new}1"] = v


def _checked(module: nn.Module, name: str, dim: int | str | None, gain: Gain) -> WeightNorm:
    """The parametrization of a weight, which it can have."""
    groups = None
    if dim == "output":
        dim = 0
        if isinstance(module, _TRANSPOSED) and name == "weight":
            dim = 1
            groups = module.groups if module.groups != 1 else None
    elif isinstance(dim, str):
        raise ValueError(f"dim={dim!r}, expected an axis, 'output' or None.")
    found = WeightNorm(dim, gain, groups)
    with torch.no_grad():
        found.right_inverse(getattr(module, name))
    return found


def _stored(g: Tensor, gain: str, key: str) -> Tensor:
    if gain == "linear":
        return g
    if not bool((g > 0).all()):
        raise ValueError(f"{key} has lengths of 0 or below, which gain='exp' cannot express.")
    return g.log()


def _lengths(weight: Tensor, dim: int | None, groups: int | None) -> Tensor:
    """The length of each unit's weights, with ones in place of the reduced axes."""
    accumulate = torch.float64 if weight.device.type != "mps" else torch.float32
    w = weight.detach().to(accumulate)
    if groups is not None:
        split = w.reshape(groups, w.shape[0] // groups, *w.shape[1:])
        axes = [1, *range(3, split.ndim)]
        return torch.linalg.vector_norm(split, 2, axes, keepdim=True).squeeze(1).to(weight.dtype)
    if dim is None:
        return torch.linalg.vector_norm(w).to(weight.dtype)
    axes = [axis for axis in range(w.ndim) if axis != dim]
    return torch.linalg.vector_norm(w, 2, axes, keepdim=True).to(weight.dtype)


def _weights(module: nn.Module) -> list[str]:
    """The weights of a layer that normalize_ takes: of recurrent layers, those of input and state."""
    if isinstance(module, nn.RNNBase):
        names = [name for names in module._all_weights for name in names]
        return [name for name in names if name.startswith("weight")]
    return ["weight_ih", "weight_hh"] if isinstance(module, nn.RNNCellBase) else ["weight"]


def _found(module: nn.Module, name: str) -> nn.Module | None:
    """The weight normalization of a weight, ours or torch's."""
    if not parametrize.is_parametrized(module, name):
        return None
    steps = module.parametrizations[name]  # type: ignore[index]
    for step in steps:
        if isinstance(step, WeightNorm) or type(step).__name__ == "_WeightNorm":
            return step
    return None


def _steps(module: nn.Module, name: str) -> str:
    return ", ".join(type(step).__name__ for step in module.parametrizations[name])  # type: ignore[index]


def _refuse_shared(model: nn.Module, chosen: set[str]) -> None:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    modules: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            modules.setdefault(id(parameter), set()).add(id(module))
    for key, same in names.items():
        if len(modules[key]) > 1 and chosen & set(same):
            raise ValueError(
                f"{' and '.join(same)} are one parameter, which a parametrization would tear apart. Leave these "
                f"layers out (only=), or untie them first."
            )


def _feed_forward(model: nn.Module, only: Iterable[str] | None) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _UNITS) and _found(module, "weight") is not None
    }
    if only is not None:
        chosen = list(only)
        missing = [name for name in chosen if name not in layers]
        if missing:
            raise ValueError(f"No weight-normalized layer is named {missing}; there are {sorted(layers)}.")
        layers = {name: layers[name] for name in chosen}
    if not layers:
        raise ValueError(
            "The model has no weight-normalized linear layer or convolution; call weight_normalize_(model) first."
        )
    for name, layer in layers.items():
        step = _found(layer, "weight")
        axis = getattr(step, "dim", None)
        if axis != (1 if isinstance(layer, _TRANSPOSED) else 0) or (
            not isinstance(step, WeightNorm) and isinstance(layer, _TRANSPOSED) and layer.groups > 1
        ):
            raise ValueError(
                f"{name!r} has lengths along axis {axis} of its weight, and the initialization sets one for each "
                f"output unit. Give weight_norm dim='output', or leave the layer out (only=)."
            )
    return layers


def _order(model: nn.Module, layers: dict[str, nn.Module], source: _Batches) -> list[str]:
    """The layers in the order of the first batch, each called once."""
    calls: list[str] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: calls.append(name)) for name, layer in layers.items()
    ]
    try:
        args, kwargs = next(iter(source))
        model(*args, **kwargs)
    finally:
        _remove(handles)
    never = [name for name in layers if name not in calls]
    twice = [name for name in layers if calls.count(name) > 1]
    if never or twice:
        what = f"does not call {never}" if never else f"calls {twice} more than once"
        raise ValueError(f"A forward pass {what}; every layer to initialize must run once. Leave these out (only=).")
    return calls


def _start(layer: nn.Module, v_std: float | None, generator: torch.Generator | None) -> None:
    """v drawn, g = 1, b = 0."""
    weight = layer.parametrizations.weight  # type: ignore[union-attr]
    if v_std is not None:
        weight.original1.normal_(0, v_std, generator=generator)  # type: ignore[union-attr, operator]
    exp = getattr(_found(layer, "weight"), "gain", "linear") == "exp"
    weight.original0.fill_(0.0 if exp else 1.0)  # type: ignore[union-attr, operator]
    if isinstance(layer.bias, Tensor):
        layer.bias.zero_()


def _measuring(name: str, running: _Running, dead: str | None, done: set[str]) -> Callable[..., Tensor | None]:
    """A hook that measures a layer; with one batch it also sets the layer and returns the new output."""

    def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if name in done:  # the hook's own call
            return None
        running.add(output, _channel(layer, output))
        if dead is None:
            raise _Enough
        done.add(name)
        _scale(layer, name, running, dead)
        return layer(*inputs)

    return hook


def _channel(layer: nn.Module, output: Tensor) -> int:
    return -1 if isinstance(layer, nn.Linear) else output.ndim - 1 - len(layer.kernel_size)  # type: ignore[arg-type]


def _scale(layer: nn.Module, name: str, running: _Running, dead: str) -> None:
    """g = 1 / sigma, b = -mu / sigma."""
    if running.count < 2:
        raise RuntimeError(
            f"The data has {running.count:.0f} values for each unit of {name!r}, of which there is no variance. Give "
            f"more samples."
        )
    assert isinstance(running.mean, Tensor) and isinstance(running.square, Tensor)
    mean, std = running.mean, (running.square / running.count).sqrt()
    # Constant but for rounding: what is left of the variance is noise.
    constant = std <= 1e-6 * mean.abs()
    if bool(constant.any()):
        if dead == "raise":
            raise ValueError(
                f"Units {constant.nonzero().flatten().tolist()} of {name!r} are constant over the data, and their "
                f"length would be infinite. Give other data, or dead='keep'."
            )
        std = torch.where(constant, torch.ones_like(std), std)
        mean = torch.where(constant, torch.zeros_like(mean), mean)
    if not bool(std.isfinite().all()):
        raise ValueError(f"The outputs of {name!r} are not finite; are the inputs?")
    stored = layer.get_parameter("parametrizations.weight.original0")
    exp = getattr(_found(layer, "weight"), "gain", "linear") == "exp"
    stored.copy_((-std.log() if exp else 1 / std).reshape(stored.shape))
    if isinstance(layer.bias, Tensor):
        layer.bias.copy_(-mean / std)


def _remove(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
