r"""Fixup: residual networks without normalization, by initialization alone.

Without normalization the variance of a residual network doubles with every block. Fixup starts it so that one step of
gradient descent changes its function by as much at any depth. For L residual branches of m weight layers each:

1. The last layer of each branch and the classification layer start at 0.
2. The other layers start as usual (He et al.); those inside branches are multiplied by

   .. math::  L^{-1/(2m - 2)} .

3. Scalars are added: a multiplier (1) for each branch, a bias (0) before each convolution, linear layer and
   elementwise activation.

:func:`fixup_` does this to a network that you already have. It runs the network, sees where a tensor and a function of
it are added, and says in a table what it found, what it changed, and what it did not recognize.
:func:`evenly.models.fixup_resnet_cifar` and its relatives build the paper's networks. For the scalars' learning rate
see :func:`fixup_param_groups`.

Branches start at 0 and the classifier too: the first step moves the classifier only, and the loss starts at log(number
of classes). The paper's networks need stronger regularization than batch-normalized ones (Mixup, cutout, dropout) to
be as accurate.

Reference:
    Hongyi Zhang, Yann N. Dauphin & Tengyu Ma, *Fixup Initialization: Residual Learning Without Normalization*, ICLR
    2019, arXiv 1901.09321, section 3 (the rules and equation 5, the multiplier).

Where the paper and its released code differ:
    In the code the stem keeps torch's own initialization (paper: He), all parameters are decayed, the bias of the
    classifier learns at a tenth of the rate as the scalars do, and the encoder-decoder attention of the Transformer
    is scaled as if there were 12 branches. The paper is followed here. A shift is subtracted in the code's Transformer
    and added in its ResNets, which is the same but for its sign; here it is added.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from evenly.nn import NoNorm

__all__ = ["FixupBranch", "FixupReport", "fixup_", "fixup_init_", "fixup_param_groups", "fixup_scale"]

Mode = Literal["fan_in", "fan_out"]


def fixup_scale(L: int, m: int) -> float:
    """The factor for the layers inside a residual branch, L^(-1/(2m - 2)).

    Args:
        L: number of residual branches of the network; a layer of a Transformer has two or three.
        m: weight layers of the branch. Attention counts as 4: queries, keys, values and output.

    Raises:
        ValueError: no branch, or a branch of less than two weight layers, whose last (only) layer is 0.

    >>> [round(fixup_scale(L, m), 5) for L, m in ((54, 2), (16, 3), (30, 4))]
    [0.13608, 0.5, 0.5673]
    """
    if L < 1:
        raise ValueError(f"L={L}, expected the number of residual branches, at least 1.")
    if m < 2:
        raise ValueError(f"m={m}: a branch needs at least two weight layers, the last of which is 0.")
    return float(L ** (-1 / (2 * m - 2)))


@torch.no_grad()
def fixup_init_(
    branches: Iterable[nn.Module | Sequence[nn.Module]],
    L: int | None = None,
    mode: Mode = "fan_out",
    last: int | Literal["auto"] = "auto",
) -> None:
    """Initialize residual branches that you name: rules 1 and 2, in place.

    Args:
        branches: each a sequence of its weight layers in order, or a module, whose linear layers and convolutions are
            taken in the order in which they are registered.
        L: number of residual branches; default: as many as there are in ``branches``.
        mode: of the He initialization; the released code takes ``"fan_out"``.
        last: which layer is the last; ``"auto"``: the last of the sequence.

    Raises:
        ValueError: a branch with less than two weight layers, or one that is no linear layer or convolution.

    >>> block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    >>> fixup_init_([block], L=16)
    >>> block[2].weight.abs().max().item()
    0.0
    """
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"mode={mode!r} is unknown, expected 'fan_in' or 'fan_out'.")
    found = [_layers_of(branch) for branch in branches]
    count = len(found) if L is None else L
    scales = [fixup_scale(count, len(layers)) for layers in found]
    for layers, scale in zip(found, scales, strict=True):
        end = len(layers) - 1 if last == "auto" else range(len(layers))[last]
        for index, layer in enumerate(layers):
            weight = layer.weight
            assert isinstance(weight, Tensor)
            if index == end:
                nn.init.zeros_(weight)
            else:
                nn.init.kaiming_normal_(weight, mode=mode, nonlinearity="relu")
                weight.mul_(scale)
            if isinstance(layer.bias, Tensor):
                nn.init.zeros_(layer.bias)


def fixup_param_groups(
    model: nn.Module,
    lr: float,
    scalar_lr_ratio: float = 0.1,
    weight_decay: float = 0.0,
    decay_scalars: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: scalars learn at a tenth of the rate, without weight decay.

    Args:
        model: any; its scalars are the parameters with one value.
        lr: learning rate of the others.
        scalar_lr_ratio: of the scalars, as a part of ``lr``.
        weight_decay: of the others.
        decay_scalars: decay the scalars too, as the released code does; it hurts in deep networks.

    Raises:
        ValueError: a rate or decay below 0; no parameter that is learned.

    >>> groups = fixup_param_groups(nn.Linear(4, 1), lr=0.1, weight_decay=1e-4)
    >>> [(len(g["params"]), round(g["lr"], 6), g["weight_decay"]) for g in groups]
    [(1, 0.1, 0.0001), (1, 0.01, 0.0)]
    """
    if min(lr, scalar_lr_ratio, weight_decay) < 0:
        raise ValueError(
            f"lr={lr}, scalar_lr_ratio={scalar_lr_ratio} and weight_decay={weight_decay} must not be negative."
        )
    learned = [p for p in model.parameters() if p.requires_grad]
    if not learned:
        raise ValueError("The model has no parameter that is learned.")
    groups = [
        {"params": [p for p in learned if p.numel() != 1], "lr": lr, "weight_decay": weight_decay},
        {
            "params": [p for p in learned if p.numel() == 1],
            "lr": lr * scalar_lr_ratio,
            "weight_decay": weight_decay if decay_scalars else 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


@dataclass(frozen=True)
class FixupBranch:
    """One residual branch that was found.

    Attributes:
        name: the innermost module that holds all its layers.
        layers: its weights in the order of their use, by the names of the parameters.
        last: those that start at 0.
        m: the number of weight layers that counts; fused queries, keys and values count as three.
        scale: the factor of the layers before the last.
        shortcut: what the branch is added to: ``"identity"``, or the weights on its way.
        note: what is special about it.
    """

    name: str
    layers: tuple[str, ...]
    last: tuple[str, ...]
    m: int
    scale: float
    shortcut: str = "identity"
    note: str = ""


@dataclass(frozen=True)
class FixupReport:
    """What :func:`fixup_` found and did; ``print(report)`` shows it as a table.

    Attributes:
        branches: the residual branches, in the order of the additions.
        num_branches: L.
        classifier: the weights of the classification layers, which start at 0.
        removed: names of the normalization layers that were taken out.
        multipliers, biases: how many scalars were added.
        not_recognized: what was not understood or could not be done, and why, in sentences.
    """

    branches: tuple[FixupBranch, ...]
    num_branches: int
    classifier: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    multipliers: int = 0
    biases: int = 0
    not_recognized: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        rows = [("branch", "m", "factor", "starts at 0", "added to", "")]
        for one in self.branches:
            last = ", ".join(_short(name, one.name) for name in one.last)
            rows.append((one.name or "(model)", str(one.m), f"{one.scale:.4g}", last, one.shortcut, one.note))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"Fixup: {len(self.branches)} residual branches, L = {self.num_branches}"]
        lines += ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append(f"classifier at 0: {', '.join(self.classifier) or 'none'}")
        lines.append(f"scalars added: {self.multipliers} multipliers, {self.biases} biases")
        if self.removed:
            lines.append(f"normalizations removed: {len(self.removed)} ({_some(self.removed)})")
        lines += ["not recognized:" if self.not_recognized else "not recognized: nothing"]
        lines += [f"  - {text}" for text in self.not_recognized]
        return "\n".join(lines)


def fixup_(
    model: nn.Module,
    inputs: Any,
    *,
    normalization: Literal["remove", "keep", "refuse"] = "remove",
    init: Literal["keep", "fan_in", "fan_out"] = "keep",
    rescale: bool = True,
    scalars: bool = True,
    classifier: bool = True,
    num_branches: int | None = None,
    is_norm: Callable[[nn.Module], bool] | None = None,
) -> FixupReport:
    """Apply Fixup to a network that you have, in place; return what was found and done.

    The network runs once in evaluation mode. A residual connection is an addition of two tensors of one shape, one of
    which has no weights on its way from where the two part (or one layer, a projection, against two or more); the other
    is the branch. Additions inside a branch whose parts all end in one residual connection are parallel branches.

    Args:
        model: any module made of linear layers, convolutions, attention (``nn.MultiheadAttention`` or projections) and
            elementwise operations: torchvision-, timm- or Transformers-style, or your own.
        inputs: one input that it accepts: a tensor, a tuple of arguments, or a dict of keyword arguments. Values of
            floating-point tensors do not matter; they are drawn anew.
        normalization: ``"remove"`` replaces normalization layers by what is left of them (an activation inside of
            them, or nothing); ``"refuse"`` is an error where there are any; ``"keep"`` leaves them in, for which the
            rules were not made.
        init: ``"keep"`` multiplies the weights there are; ``"fan_in"`` and ``"fan_out"`` first draw all weights of
            linear layers and convolutions after He et al. (and set their biases to 0), which torch's own layers
            need: they start smaller.
        rescale: rule 2.
        scalars: rule 3: parameters ``fixup_bias``, ``fixup_bias_out`` and ``fixup_scale``, of one value each, on the
            modules that hold the weights.
        classifier: set layers whose output reaches the model's output without further weights to 0.
        num_branches: L, where the model is a part of a larger one; default: the branches found.
        is_norm: which modules are normalizations; default: those of torch and of :mod:`evenly.nn`, and any class
            whose name ends in Norm (with a dimension or an activation behind it).

    Returns:
        The report; print it.

    Raises:
        ValueError: no residual branch was found; Fixup was applied already; normalizations with ``"refuse"``.

    The model keeps the names of its parameters, and its copies and pickles keep the scalars. To load a state dict of
    it, apply ``fixup_`` to a new one first.

    Cost: one forward pass, and another for each branch whose last layer is not simply the last (gates).

    >>> block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    >>> report = fixup_(block, torch.randn(2, 5, 16))
    >>> [(branch.m, branch.last) for branch in report.branches]
    [(4, ('self_attn.out_proj.weight',)), (2, ('linear2.weight',))]
    """
    if normalization not in ("remove", "keep", "refuse"):
        raise ValueError(f"normalization={normalization!r} is unknown, expected 'remove', 'keep' or 'refuse'.")
    if init not in ("keep", "fan_in", "fan_out"):
        raise ValueError(f"init={init!r} is unknown, expected 'keep', 'fan_in' or 'fan_out'.")
    if num_branches is not None and num_branches < 1:
        raise ValueError(f"num_branches={num_branches}, expected at least 1.")
    if any(name.rpartition(".")[2].startswith("fixup_") for name, _ in model.named_parameters()):
        raise ValueError("Fixup was applied to this model already; it has the scalars.")
    norms = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and "parametrizations." not in name and (is_norm or _is_norm)(module)
    }
    norms = {name: m for name, m in norms.items() if not any(name.startswith(f"{other}.") for other in norms)}
    if norms and normalization == "refuse":
        raise ValueError(
            f"The model has {len(norms)} normalizations ({_some(norms)}), for which Fixup is not made. Take them out, "
            f"or give normalization='remove'."
        )
    arguments = _arguments(inputs)
    _replace(model, {name: _without(norm) for name, norm in norms.items()})
    try:
        trace = _trace(model, arguments)
        found = _find(trace)
        if not found.branches:
            problems = "".join(f"\n  - {text}" for text in found.problems)
            raise ValueError(
                f"No residual branch was found in {type(model).__name__}: nowhere is a tensor added to a function of "
                f"it that has weights.{problems}"
            )
        _choose_last(model, arguments, trace, found)
    except BaseException:
        _replace(model, norms)
        raise
    if normalization == "keep":
        _replace(model, norms)
    return _apply(
        model,
        found,
        trace,
        removed=tuple(norms) if normalization == "remove" else (),
        L=num_branches or len(found.branches),
        init=init,
        rescale=rescale,
        scalars=scalars,
        classifier=classifier,
    )


# ---- scalars: hooks, so that modules keep their classes and parameters their names -----------------------------------


def _shift_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Add the bias to the first input, and to those that are the same tensor (the keys of self-attention)."""
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    if not tensors:
        return args, kwargs
    first = tensors[0]
    shifted = first + module.get_parameter("fixup_bias")

    def swap(t: Any) -> Any:
        return shifted if t is first else t

    return tuple(map(swap, args)), {key: swap(t) for key, t in kwargs.items()}


def _scale_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Multiply the output (of a tuple: the first) and add the bias after it, those that there are."""
    y = output[0] if isinstance(output, tuple) else output
    scale, bias = getattr(module, "fixup_scale", None), getattr(module, "fixup_bias_out", None)
    if scale is not None:
        y = y * scale
    if bias is not None:
        y = y + bias
    return (y, *output[1:]) if isinstance(output, tuple) else y


class _Removed(nn.Identity):
    """In place of a normalization. torch's fast path for whole layers, which would normalize by itself, compares the
    two eps of a layer and must find them different."""

    eps = math.nan


# ---- normalization layers --------------------------------------------------------------------------------------------

_TORCH_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []),
)


def _is_norm(module: nn.Module) -> bool:
    if isinstance(module, (NoNorm, _Removed)):
        return False
    return isinstance(module, _TORCH_NORMS) or bool(
        re.search(r"Norm(V|\dd|Act\w*|ND|2dAct)?$", type(module).__name__)
        and not any(isinstance(child, (nn.Linear, nn.Conv2d)) for child in module.modules())
    )


def _without(norm: nn.Module) -> nn.Module:
    """What is left of a normalization: its activation, and what it does with a residual."""
    if type(norm).__module__.startswith("evenly.nn"):
        return NoNorm(activation=getattr(norm, "activation", None))
    parts = [part for name, part in norm.named_children() if name in ("drop", "act", "activation")]
    return nn.Sequential(*parts) if parts else _Removed()


def _replace(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.train(model.training))


# ---- the data flow ---------------------------------------------------------------------------------------------------

_LINEAR = re.compile(r"^aten::(_?convolution|addmm|mm|bmm|baddbmm|addbmm|addmv|mv|linear|mkldnn_\w+|.*linear.*)$")
_ACTIVATIONS = re.compile(
    r"^aten::(relu6?|gelu|silu|sigmoid|tanh|leaky_relu|elu|selu|celu|hardswish|hardsigmoid|hardtanh|mish|softplus|"
    r"_?prelu(_kernel)?|rrelu\w*|clamp(_min)?|threshold|softsign|log_sigmoid\w*)_?$"
)
_NORMALIZES = re.compile(r"(native_(layer|group|batch)_norm|_batch_norm|rms_norm|evenly::)")
_ACTIVATION_NAMES = re.compile(r"(relu|gelu|silu|swish|mish|sigmoid|tanh|elu)", re.IGNORECASE)


@dataclass(eq=False)
class _Node:
    """One operation that wrote new values."""

    index: int
    name: str
    parents: tuple[int, ...]
    ancestors: int  # a bit a node, its own included
    moving: bool  # whether it depends on the inputs
    floating: bool
    shape: tuple[int, ...]
    params: frozenset[str]  # parameters that reach it through operations on parameters only
    weights: tuple[str, ...] = ()  # of a weight layer: its parameters of two axes or more
    stack: tuple[tuple[str, int], ...] = ()  # modules that were running, outermost first, with the number of the call
    operands: tuple[int, ...] = ()  # of an addition: the nodes of its two terms


@dataclass
class _Trace:
    nodes: list[_Node]
    outputs: set[int]
    readers: dict[int, list[int]]
    calls: Counter[str]
    classes: dict[str, str]  # of modules
    zero: dict[int, bool]  # whether the terms of an addition are 0; the key is twice the node, plus the place


class _Recorder(TorchDispatchMode):
    """Every operation below autograd, by the memory that it reads and writes, so that views are seen through."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.nodes: list[_Node] = []
        self.writer: dict[int, int] = {}  # storage to the node that wrote it last
        self.owned: dict[int, set[str]] = {}
        self.keep: list[Any] = []
        self.stack: list[tuple[str, int]] = []
        self.calls: Counter[str] = Counter()
        self.zero: dict[int, bool] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.owned.setdefault(_storage(parameter), set()).add(name)
        self.dims = {name: parameter.ndim for name, parameter in model.named_parameters(remove_duplicate=False)}
        self.fixed = set(self.owned) | {_storage(buffer) for buffer in model.buffers()}

    def begin(self, inputs: Iterable[Tensor]) -> None:
        for t in inputs:
            self.keep.append(t)
            self._add("input", (), t, moving=True)

    def _add(self, name: str, parents: tuple[int, ...], out: Tensor, *, moving: bool, **more: Any) -> _Node:
        index = len(self.nodes)
        bits = 1 << index
        for parent in parents:
            bits |= self.nodes[parent].ancestors
        more.setdefault("params", frozenset())
        node = _Node(index, name, parents, bits, moving, out.is_floating_point(), tuple(out.shape), **more)
        self.nodes.append(node)
        self.writer[_storage(out)] = index
        return node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reads = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        out = func(*args, **kwargs)
        writes = [t for t in tree_iter(out) if isinstance(t, Tensor)]
        self.keep += [reads, writes]
        in_place = func._schema.is_mutable
        sources = {_storage(t) for t in reads}
        fresh = [t for t in writes if in_place or _storage(t) not in sources]
        if not fresh:
            return out  # a view
        parents: list[int] = []
        params: set[str] = set()
        for t in reads:
            key = _storage(t)
            if key in self.writer:
                parents.append(self.writer[key])
                if not self.nodes[self.writer[key]].moving:
                    params |= self.nodes[self.writer[key]].params
            params |= self.owned.get(key, set())
        moving = any(self.nodes[parent].moving for parent in parents)
        name = func._schema.name
        weights: tuple[str, ...] = ()
        if moving and _LINEAR.match(name):
            weights = tuple(sorted(p for p in params if self.dims[p] >= 2))
        operands: tuple[int, ...] = ()
        if moving and name in ("aten::add", "aten::add_") and len(reads) == 2 and reads[0].shape == reads[1].shape:
            operands = tuple(self.writer.get(_storage(t), -1) for t in reads)
        for position, t in enumerate(fresh):
            node = self._add(
                name,
                tuple(dict.fromkeys(parents)),
                t,
                moving=moving,
                params=frozenset() if moving else frozenset(params),
                weights=weights if position == 0 else (),
                stack=tuple(self.stack),
                operands=operands,
            )
            if operands and not in_place:
                for place, term in enumerate(reads):
                    self.zero[2 * node.index + place] = not bool(term.detach().any())
            elif operands:
                self.zero[2 * node.index + 1] = not bool(reads[1].detach().any())
                # The first term is overwritten: it was 0 if nothing is left without the second.
                self.zero[2 * node.index] = not bool((out.detach() - reads[1].detach()).any())
        return out


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Tensor):
        args = (inputs,)
    elif isinstance(inputs, Mapping):
        kwargs = dict(inputs)
    elif isinstance(inputs, (tuple, list)) and inputs:
        args = tuple(inputs)
    else:
        raise ValueError(
            f"inputs is a {type(inputs).__name__}, expected a tensor, a tuple of arguments or a dict of keyword "
            f"arguments that the model accepts."
        )
    generator = torch.Generator().manual_seed(0)

    def lively(t: Any) -> Any:
        # Other values, since an input of zeros would hide what is 0 by itself.
        if not isinstance(t, Tensor):
            return t
        if not t.is_floating_point():
            return t.clone()
        return torch.randn(t.shape, generator=generator).to(t.device, t.dtype)

    return tree_map(lively, args), tree_map(lively, kwargs)


def _trace(model: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> _Trace:
    args, kwargs = arguments
    recorder = _Recorder(model)
    handles = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            recorder.calls[name] += 1
            recorder.stack.append((name, recorder.calls[name]))

        return hook

    def leave(*_: Any) -> None:
        recorder.stack.pop()

    modes = {module: module.training for module in model.modules()}
    wants = [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave))
    try:
        # With gradients, so that torch takes no fused path for whole layers.
        for parameter, _ in wants:
            parameter.requires_grad_(parameter.is_floating_point())
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            recorder.begin(t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor))
            with recorder:
                out = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wanted in wants:
            parameter.requires_grad_(wanted)
        for module, mode in modes.items():
            module.training = mode
    leaves = [t for t in tree_iter(_plain(out)) if isinstance(t, Tensor)]
    outputs = {recorder.writer[_storage(t)] for t in leaves if _storage(t) in recorder.writer}
    readers: dict[int, list[int]] = {}
    for node in recorder.nodes:
        for parent in node.parents:
            readers.setdefault(parent, []).append(node.index)
    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    return _Trace(recorder.nodes, outputs, readers, recorder.calls, classes, recorder.zero)


def _plain(out: Any) -> Any:
    if isinstance(out, Mapping):
        return [_plain(value) for value in out.values()]
    if hasattr(out, "__dataclass_fields__"):
        return [_plain(getattr(out, name)) for name in out.__dataclass_fields__]
    return out


# ---- finding branches ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Branch:
    addition: int  # node
    place: int  # which operand it is
    nodes: int  # bits: from where it parts from the shortcut to the addition
    layers: list[int]  # nodes of weight layers, in order
    shortcut: list[int]
    last: list[int] = field(default_factory=list)
    note: str = ""


@dataclass
class _Found:
    branches: list[_Branch]
    problems: list[str]


def _find(trace: _Trace) -> _Found:
    nodes = trace.nodes
    is_layer = 0
    for node in nodes:
        if node.weights:
            is_layer |= 1 << node.index
    branches: list[_Branch] = []
    problems: list[str] = []
    claimed = 0  # layers of branches found so far
    additions = 0  # residual ones
    pending: dict[int, str] = {}  # additions of two terms with weights, which may be parts of a branch
    for node in nodes:
        if len(node.operands) != 2 or min(node.operands) < 0 or not node.floating:
            continue
        a, b = (nodes[operand] for operand in node.operands)
        if not (a.moving and b.moving) or node.operands[0] == node.operands[1]:
            continue
        common = a.ancestors & b.ancestors
        if not any(nodes[i].floating and nodes[i].moving for i in _bits(common)):
            continue
        regions = tuple(_between(nodes, term.ancestors & ~common, common, is_layer) for term in (a, b))
        layers = [_bits(region & is_layer & ~claimed) for region in regions]
        counts = [len(_names(nodes, found)) for found in layers]
        if counts == [0, 0]:
            continue
        where = _place(node)
        # The branch is the side with weights; a projection of one layer may stand on the other.
        if min(counts) == 0 or (min(counts) == 1 and max(counts) > 1):
            side = 0 if counts[0] > counts[1] else 1
        else:
            pending[node.index] = (
                f"{where}: an addition of two terms with {counts[0]} and {counts[1]} weight layers, neither of which "
                f"is a shortcut"
            )
            continue
        inner = [i for i in _bits(regions[side]) if additions >> i & 1]
        if inner:
            problems.append(
                f"{where}: a residual connection around {len(inner)} others "
                f"({_some(_place(nodes[i]) for i in inner)}); the ones inside were taken"
            )
            continue
        parts = _parallel(trace, node.operands[side], common, pending, is_layer)
        made = [
            _Branch(node.index, side, region, _bits(region & is_layer & ~claimed), layers[1 - side])
            for region in [part & regions[side] for part in parts] or [regions[side]]
        ]
        if parts:
            for branch in made:
                branch.note = "parallel"
        branches += made
        additions |= 1 << node.index
        for branch in made:
            for layer in branch.layers:
                claimed |= 1 << layer
        for layer in layers[1 - side]:
            claimed |= 1 << layer  # the projection
    taken = 0
    for branch in branches:
        taken |= branch.nodes
    problems += [text for index, text in pending.items() if not taken >> index & 1]
    for node in nodes:
        if node.moving and _NORMALIZES.search(node.name) and taken >> node.index & 1:
            problems.append(
                f"{_place(node)}: {node.name.split('::')[1]} inside a branch is a normalization, and was kept"
            )
    return _Found(branches, problems)


def _parallel(trace: _Trace, end: int, common: int, pending: Mapping[int, str], is_layer: int) -> list[int]:
    """The regions of branches that were added to each other before they met the shortcut; none if there is one."""
    nodes = trace.nodes
    node = nodes[end]
    while len(node.operands) != 2 and not node.weights:  # through dropout and gains
        before = [p for p in node.parents if not common >> p & 1 and nodes[p].moving]
        if len(before) != 1:
            return []
        node = nodes[before[0]]
    if node.index not in pending:
        return []
    terms = [nodes[operand].ancestors & ~common for operand in node.operands]
    if terms[0] & terms[1] & is_layer:
        return []  # they share layers: one branch
    parts = [
        _parallel(trace, operand, common, pending, is_layer) or [term]
        for operand, term in zip(node.operands, terms, strict=True)
    ]
    parts[0][0] |= 1 << node.index
    return parts[0] + parts[1]


def _between(nodes: list[_Node], region: int, common: int, is_layer: int) -> int:
    """The nodes of a region that depend on where its branch begins, and layers of the same modules (the keys and values
    of an attention to something else)."""
    inside = 0
    for index in _bits(region):
        if nodes[index].ancestors & common:
            inside |= 1 << index
    modules = {_owner(name).rpartition(".")[0] for index in _bits(inside & is_layer) for name in nodes[index].weights}
    for index in _bits(region & ~inside & is_layer):
        if {_owner(name).rpartition(".")[0] for name in nodes[index].weights} & (modules - {""}):
            inside |= 1 << index
    return inside


def _bits(value: int) -> list[int]:
    found = []
    while value:
        low = value & -value
        found.append(low.bit_length() - 1)
        value ^= low
    return found


def _choose_last(model: nn.Module, arguments: Any, trace: _Trace, found: _Found) -> None:
    """The layers of each branch that, at 0, make it 0: its ends, or further back where an end is a gate."""
    for branch in found.branches:
        branch.last = [
            layer
            for layer in branch.layers
            if not any(other != layer and trace.nodes[other].ancestors >> layer & 1 for other in branch.layers)
        ]
    check = _with_zero(model, arguments, trace, [layer for branch in found.branches for layer in branch.last])
    for branch in found.branches:
        if check.zero.get(2 * branch.addition + branch.place) or branch.note == "parallel":
            continue
        for layer in reversed(branch.layers):
            one = _with_zero(model, arguments, trace, [layer])
            if one.zero.get(2 * branch.addition + branch.place):
                branch.last = [layer]
                beside = [other for other in branch.layers if not trace.nodes[layer].ancestors >> other & 1]
                if beside:
                    branch.note = f"{len(_names(trace.nodes, beside))} layers of a gate left as they are"
                    branch.layers = [other for other in branch.layers if other not in beside]
                break
        else:
            branch.note = "not 0 at the start"
            found.problems.append(
                f"{_place(trace.nodes[branch.addition])}: no layer of the branch makes it 0; its last layers were set "
                f"to 0 all the same"
            )


def _with_zero(model: nn.Module, arguments: Any, trace: _Trace, layers: Iterable[int]) -> _Trace:
    """The trace with some layers at 0."""
    names = {name for layer in layers for name in _zeroed(model, trace.nodes[layer])}
    tensors = [model.get_parameter(name) for name in names]
    kept = [t.detach().clone() for t in tensors]
    try:
        with torch.no_grad():
            for t in tensors:
                t.zero_()
        return _trace(model, arguments)
    finally:
        with torch.no_grad():
            for t, value in zip(tensors, kept, strict=True):
                t.copy_(value)


def _zeroed(model: nn.Module, node: _Node) -> list[str]:
    """The parameters to set to 0 for a layer to give 0: its weight and bias, or, weight-normalized, its length."""
    found = []
    for name in node.weights:
        owner, _, leaf = name.rpartition(".")
        if leaf == "original1" and _has(model, f"{owner}.original0"):
            found.append(f"{owner}.original0")
        else:
            found.append(name)
        at, _, which = owner.partition(".parametrizations.") if ".parametrizations." in name else (owner, "", leaf)
        if name.startswith("parametrizations."):
            at, which = "", owner.partition("parametrizations.")[2]
        bias = which.replace("weight", "bias")
        full = f"{at}.{bias}" if at else bias
        if bias != which and _has(model, full):
            found.append(full)
    return list(dict.fromkeys(found))


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_parameter(name)
    except AttributeError:
        return False
    return True


def _owner(name: str) -> str:
    """The module of a parameter, for a parametrized one that of the weight."""
    at = re.split(r"(?:^|\.)parametrizations\.", name)
    return at[0] if len(at) > 1 else name.rpartition(".")[0]


def _names(nodes: list[_Node], layers: Iterable[int]) -> list[tuple[str, ...]]:
    """The weights of layers, each once, in order."""
    return list(dict.fromkeys(nodes[layer].weights for layer in layers))


def _place(node: _Node) -> str:
    return (node.stack[-1][0] if node.stack else "") or "(model)"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f", ... {len(names) - 4} more" if len(names) > 4 else "")


def _short(name: str, prefix: str) -> str:
    short = name.removeprefix(f"{prefix}.") if prefix else name
    short = re.sub(r"(^|\.)parametrizations\.(\w+)\.original\d?$", r"\1\2", short)
    return short if short == "weight" else short.removesuffix(".weight")


# ---- applying the rules ----------------------------------------------------------------------------------------------


@torch.no_grad()
def _apply(
    model: nn.Module,
    found: _Found,
    trace: _Trace,
    *,
    removed: tuple[str, ...],
    L: int,
    init: Literal["keep", "fan_in", "fan_out"],
    rescale: bool,
    scalars: bool,
    classifier: bool,
) -> FixupReport:
    nodes = trace.nodes
    problems = list(found.problems)
    if init != "keep":
        _he(model, init)
    branches = []
    last = {layer for branch in found.branches for layer in branch.last}
    ends = {name for layer in last for name in nodes[layer].weights}
    done: set[str] = set()
    for branch in found.branches:
        names = _names(nodes, branch.layers)
        m = len(names)
        if m < 4 and any(re.search("softmax|scaled_dot_product", nodes[i].name) for i in _bits(branch.nodes)):
            m = max(m, 4) if m > 1 else m  # fused queries, keys and values
        scale = fixup_scale(L, m) if rescale and m > 1 else 1.0
        for weights in names:
            for name in weights[:1]:
                if name in ends or scale == 1.0:
                    continue
                if name in done:
                    problems.append(f"{name} serves in more than one branch and was scaled once")
                    continue
                done.add(name)
                _multiply(model, name, scale, problems)
        own = [name for weights in names for name in weights[:1]]
        prefix = _prefix([_owner(name) for name in own])
        note = branch.note if m > 1 else ", ".join(filter(None, [branch.note, "one layer, at 0"]))
        branches.append(
            FixupBranch(
                prefix,
                tuple(own),
                tuple(weights[0] for weights in _names(nodes, branch.last)),
                m,
                scale,
                ", ".join(weights[0] for weights in _names(nodes, branch.shortcut)) or "identity",
                note,
            )
        )
    for layer in last:
        _set_zero(model, nodes[layer])
    heads = _heads(trace, found) if classifier else []
    for layer in list(heads):
        if len(nodes[layer].weights) > 1:
            problems.append(f"{' and '.join(nodes[layer].weights)} are tied, and were not set to 0")
            heads.remove(layer)
        else:
            _set_zero(model, nodes[layer])
    multipliers = biases = 0
    if scalars:
        multipliers, biases = _add_scalars(model, trace, found, problems)
    return FixupReport(
        tuple(branches),
        L,
        tuple(nodes[layer].weights[0] for layer in heads),
        removed,
        multipliers,
        biases,
        tuple(dict.fromkeys(problems)),
    )


def _heads(trace: _Trace, found: _Found) -> list[int]:
    """Layers outside branches whose output reaches the model's without another layer."""
    inside = 0
    for branch in found.branches:
        for layer in (*branch.layers, *branch.shortcut, *branch.last):
            inside |= 1 << layer
        inside |= branch.nodes
    layers = [node.index for node in trace.nodes if node.weights]
    reach = 0
    for output in trace.outputs:
        reach |= trace.nodes[output].ancestors
    return [
        one
        for one in layers
        if reach >> one & 1
        and not inside >> one & 1
        and not any(other != one and trace.nodes[other].ancestors >> one & 1 for other in layers)
    ]


def _he(model: nn.Module, mode: Mode) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            weight = torch.empty_like(module.weight)
            nn.init.kaiming_normal_(weight, mode=mode, nonlinearity="relu")
            if "weight" in module._parameters:
                module.weight.copy_(weight)
            else:
                module.weight = weight  # a parametrization takes it apart
            if isinstance(module.bias, Tensor):
                nn.init.zeros_(module.bias)


def _multiply(model: nn.Module, name: str, factor: float, problems: list[str]) -> None:
    """Scale a weight; a normalized one by its length."""
    if "parametrizations." not in name:
        model.get_parameter(name).mul_(factor)
        return
    owner = name.rpartition(".")[0]
    step = model.get_submodule(owner)[0]  # type: ignore[index]
    if not _has(model, f"{owner}.original0"):
        problems.append(f"{name} is parametrized by {type(step).__name__}, and was not scaled")
    elif getattr(step, "gain", "linear") == "exp":
        model.get_parameter(f"{owner}.original0").add_(math.log(factor))
    else:
        model.get_parameter(f"{owner}.original0").mul_(factor)


def _set_zero(model: nn.Module, node: _Node) -> None:
    for name in _zeroed(model, node):
        owner = name.rpartition(".")[0]
        if name.endswith(".original0") and getattr(model.get_submodule(owner)[0], "gain", "") == "exp":  # type: ignore[index]
            raise ValueError(f"{name} is a logarithm and cannot start at 0; normalize the weight with gain='linear'.")
        model.get_parameter(name).zero_()


def _add_scalars(model: nn.Module, trace: _Trace, found: _Found, problems: list[str]) -> tuple[int, int]:
    nodes = trace.nodes
    last = {layer: branch for branch in found.branches for layer in branch.last}
    inside = {layer for branch in found.branches for layer in (*branch.layers, *branch.shortcut)}
    # An activation that reads the sum gets its bias from the branch.
    active = {branch.addition for branch in found.branches if _activated(trace, branch.addition)}
    before: set[str] = set()
    scales: set[str] = set()
    after: set[str] = set()
    covered: set[int] = {index for addition in active for index in _onwards(trace, addition)}
    homeless = []
    for node in nodes:
        if not node.weights:
            continue
        running = [name for name, _ in node.stack]
        owners = [_owner(name) for name in node.weights]
        owner = next((one for one in owners if one in running), owners[0])
        direct = owner in running
        home = owner if direct else (running[-1] if running else "")
        raw = node.index not in inside and all(nodes[p].name == "input" for p in node.parents if nodes[p].moving)
        if not raw:
            if direct and (home not in before or trace.calls[home] > 1):
                before.add(home)
            elif not (direct and home in before):
                homeless.append(f"before {_short(node.weights[0], '')}")
        if node.index in last:
            scales.add(home)
            if last[node.index].addition in active:
                after.add(home)
        elif _activated(trace, node.index):
            covered |= set(_onwards(trace, node.index))
            if direct:
                after.add(home)
            else:
                homeless.append(f"after {_short(node.weights[0], '')}")
    for node in nodes:
        if node.moving and _ACTIVATIONS.match(node.name):
            parents = [p for p in node.parents if nodes[p].moving]
            inner = any(nodes[p].stack == node.stack for p in parents) and _ACTIVATION_NAMES.search(
                trace.classes.get(_place(node), "")
            )
            if not set(parents) & (covered | set(last)) and not inner:
                homeless.append(f"before {node.name.split('::')[1].rstrip('_')} in {_place(node)}")
    shared = sorted(home for home in before | scales | after if trace.calls[home] > 1)
    if shared:
        problems.append(f"{_some(shared)} run more than once, with the same scalars each time")
    if homeless:
        problems.append(f"{len(homeless)} scalar biases have no place: {_some(homeless)}")
    for home in before:
        _register(model.get_submodule(home), "fixup_bias", 0.0)
    for home in before:
        model.get_submodule(home).register_forward_pre_hook(_shift_inputs, with_kwargs=True)
    for home in scales:
        _register(model.get_submodule(home), "fixup_scale", 1.0)
    for home in after:
        _register(model.get_submodule(home), "fixup_bias_out", 0.0)
    for home in scales | after:
        model.get_submodule(home).register_forward_hook(_scale_output)
    return len(scales), len(before) + len(after)


def _onwards(trace: _Trace, index: int) -> list[int]:
    """A node and those that only add parameters to it or copy it, such as the bias of a linear layer."""
    found = [index]
    for one in found:
        for reader in trace.readers.get(one, []):
            node = trace.nodes[reader]
            alone = sum(trace.nodes[p].moving for p in node.parents) == 1
            if alone and re.match(r"^aten::(add_?|clone|_to_copy|_unsafe_view|copy_)$", node.name):
                found.append(reader)
    return found


def _activated(trace: _Trace, index: int) -> bool:
    """Whether an elementwise activation, or a module that is one, reads a node."""
    for one in _onwards(trace, index):
        for reader in trace.readers.get(one, []):
            node = trace.nodes[reader]
            kind = trace.classes.get(node.stack[-1][0], "") if node.stack else ""
            if _ACTIVATIONS.match(node.name) or _ACTIVATION_NAMES.search(kind):
                return True
    return False


def _register(module: nn.Module, name: str, value: float) -> None:
    like = next(module.parameters())
    module.register_parameter(name, nn.Parameter(torch.full((1,), value, device=like.device, dtype=like.dtype)))


def _prefix(modules: Sequence[str]) -> str:
    """The innermost module around all of these."""
    parts = [name.split(".") for name in modules]
    common = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def _layers_of(branch: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    if isinstance(branch, nn.Module) and not isinstance(branch, kinds):
        return [module for module in branch.modules() if isinstance(module, kinds)]
    layers: list[nn.Module] = [branch] if isinstance(branch, nn.Module) else list(branch)
    wrong = [type(layer).__name__ for layer in layers if not isinstance(layer, kinds)]
    if wrong:
        raise ValueError(f"A branch holds {_some(wrong)}, expected linear layers and convolutions.")
    return layers
