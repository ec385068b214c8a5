"""Who reads whose output: the data flow of a network, by running it once or by ``torch.fx``.

Folding a normalization into the layer before it is only right where that layer's output goes nowhere else. A
probe batch answers that for any Python code: every operation below autograd is seen, with the identity of the
tensors that go in and come out. Without data, ``torch.fx`` answers it for networks that it can trace.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from evenly.conversion.linear import LINEAR

__all__ = ["Flow", "Node", "run_flow", "symbolic_flow"]


@dataclass
class Node:
    """One call: of a leaf module (``name`` is its name) or of an operation (``module`` is ``None``)."""

    name: str
    module: nn.Module | None
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    shape: tuple[int, ...] = ()  # of the first input, where it is known


@dataclass
class Flow:
    """The calls of one forward pass in the order in which they ended.

    Attributes:
        nodes: the calls.
        results: the tensors that the model returns.
        parameters: tensor identity to parameter name, of parameters that operations read outside leaf modules.
    """

    nodes: list[Node] = field(default_factory=list)
    results: set[int] = field(default_factory=set)
    parameters: dict[int, str] = field(default_factory=dict)
    readers: dict[int, list[Node]] = field(default_factory=lambda: defaultdict(list))
    writers: dict[int, list[Node]] = field(default_factory=lambda: defaultdict(list))
    keep: list[Any] = field(default_factory=list)

    def add(self, node: Node) -> None:
        self.nodes.append(node)
        for key in set(node.inputs):
            self.readers[key].append(node)
        for key in set(node.outputs):
            self.writers[key].append(node)

    def calls(self, module: nn.Module) -> list[Node]:
        return [node for node in self.nodes if node.module is module]

    def order(self) -> list[nn.Module]:
        """Leaf modules by their first call."""
        seen: dict[int, nn.Module] = {}
        for node in self.nodes:
            if node.module is not None:
                seen.setdefault(id(node.module), node.module)
        return list(seen.values())

    def feeder(self, norm: nn.Module) -> tuple[Node | None, str]:
        """The one layer whose output goes to ``norm`` and nowhere else, or ``None`` and the reason."""
        calls = self.calls(norm)
        if not calls:
            return None, "it is not called in a forward pass"
        found: Node | None = None
        for call in calls:
            key = call.inputs[0]
            writers = self.writers.get(key, [])
            if len(writers) != 1 or not isinstance(writers[0].module, LINEAR):
                last = writers[-1].name if writers else "the input of the model"
                return None, f"its input comes from {last}, not from a convolution or linear layer"
            writer = writers[0]
            if found is not None and writer.module is not found.module:
                return None, f"its input comes from two layers, {found.name} and {writer.name}"
            others = [n for n in self.readers[key] if n.module is not norm]
            if others:
                return None, f"the output of {writer.name} also goes to {others[0].name}"
            if key in call.inputs[1:] or key in self.results:
                return None, f"the output of {writer.name} is used elsewhere as well"
            found = writer
        assert found is not None and found.module is not None
        if len(self.calls(found.module)) != len(calls):
            return None, f"{found.name} is called {len(self.calls(found.module))} times, this layer {len(calls)} times"
        return found, ""


class _Recorder(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first call imports the whole compiler, for seconds

    def __init__(self, flow: Flow, parameters: Mapping[int, str]) -> None:
        super().__init__()
        self.flow = flow
        self.known = parameters
        self.depth = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.depth == 0:
            read = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
            written = [t for t in tree_iter(out) if isinstance(t, Tensor)]
            self.flow.keep.append((read, written))
            for t in read:
                if id(t) in self.known:
                    self.flow.parameters[id(t)] = self.known[id(t)]
            self.flow.add(Node(str(func), None, tuple(map(id, read)), tuple(map(id, written))))
        return out


def run_flow(model: nn.Module, leaves: Mapping[nn.Module, str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Flow:
    """The data flow of one forward pass. ``leaves`` are looked at as wholes. Memory: the activations of the batch."""
    flow = Flow()
    recorder = _Recorder(flow, {id(p): name for name, p in model.named_parameters(remove_duplicate=False)})

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        recorder.depth += 1

    def leave(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        recorder.depth -= 1
        if recorder.depth == 0:
            read = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
            written = [t for t in tree_iter(out) if isinstance(t, Tensor)]
            flow.keep.append((read, written))
            shape = tuple(read[0].shape) if read else ()
            flow.add(Node(leaves[module], module, tuple(map(id, read)), tuple(map(id, written)), shape))

    with contextlib.ExitStack() as stack:
        for module in leaves:
            for handle in (
                module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
                module.register_forward_hook(leave, with_kwargs=True),
            ):
                stack.callback(handle.remove)
        with torch.no_grad(), recorder:
            out = model(*args, **kwargs)
    flow.keep.append(out)
    flow.results = {id(t) for t in _tensors(out)}
    return flow


class _Tracer(fx.Tracer):
    def __init__(self, leaves: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m in self.leaves or not list(m.children()):
            return True
        return super().is_leaf_module(m, module_qualified_name)


def symbolic_flow(model: nn.Module, leaves: Mapping[nn.Module, str]) -> tuple[Flow | None, str]:
    """The data flow by ``torch.fx``, or ``None`` and why the model could not be traced."""
    try:
        graph = _Tracer(leaves).trace(model)
    except Exception as error:  # whatever the model's own code raises on a proxy
        return None, f"torch.fx cannot trace this model ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    flow = Flow()
    keys: dict[fx.Node, int] = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        inputs = tuple(keys[n] for n in _fx_inputs(node))
        if node.op == "output":
            flow.results = set(inputs)
        elif node.op == "get_attr":
            flow.parameters[keys[node]] = str(node.target)
        elif node.op == "call_module":
            module = model.get_submodule(str(node.target))
            flow.add(Node(leaves.get(module, str(node.target)), module, inputs, (keys[node],)))
        elif node.op in ("call_function", "call_method"):
            flow.add(Node(getattr(node.target, "__name__", str(node.target)), None, inputs, (keys[node],)))
    return flow, ""


def _fx_inputs(node: fx.Node) -> Iterator[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(n))
    yield from found


def _tensors(out: Any) -> Iterator[Tensor]:
    """Tensors of a nested result, dataclass-like outputs included."""
    if isinstance(out, Mapping):
        for value in out.values():
            yield from _tensors(value)
        return
    for item in tree_iter(out):
        if isinstance(item, Tensor):
            yield item
        elif item is not out and isinstance(item, Mapping):
            yield from _tensors(item)
