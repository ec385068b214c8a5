"""LayerNorm is RMSNorm of centred values: centre them where they are written, and the mean need not be taken.

A residual stream is a sum. Where everything that is added to it is the output of a linear or embedding layer (or a
parameter), and everything that reads it is a layer normalization, taking the feature mean out of each summand
takes it out of the sum and changes nothing else. Then RMSNorm with the same weight, bias and eps gives exactly what
LayerNorm gave.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from evenly.conversion.linear import centre_outputs
from evenly.conversion.trace import Flow, Node

__all__ = ["centred_norms"]

_ADD = ("aten.add.Tensor", "aten.add_.Tensor", "add", "iadd", "add_", "__add__", "__iadd__", "__radd__")
_SAME = ("aten.clone.default", "aten.detach.default", "aten.alias.default", "clone", "contiguous", "detach")
_SAME_MODULES = (nn.Dropout, nn.Identity)


def centred_norms(
    model: nn.Module, flow: Flow, norms: set[nn.Module], blocked: Callable[[nn.Module], str]
) -> set[nn.Module]:
    """Centre what can be centred, in place; the norms of ``norms`` whose input then has mean 0."""
    links = [n for n in flow.nodes if _passes(n)]
    parent: dict[int, int] = {}

    def root(key: int) -> int:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for node in links:
        for key in node.inputs:
            for out in node.outputs:
                parent[root(key)] = root(out)
    members: dict[int, set[int]] = {}
    for node in flow.nodes:
        for key in (*node.inputs, *node.outputs):
            members.setdefault(root(key), set()).add(key)
    parameters = dict(model.named_parameters())
    good: dict[int, list[Any]] = {}
    for norm in norms:
        for call in flow.calls(norm):
            stream = root(call.inputs[0])
            if stream not in good:
                width = norm.normalized_shape[-1]  # type: ignore[index]
                writers = _writers(flow, members[stream], norms, parameters, int(width), blocked)
                if writers is not None:
                    good[stream] = writers
    # A norm that also reads a stream that cannot be centred stays as it is, and then so do its other streams.
    while True:
        centred = {n for n in norms if (c := flow.calls(n)) and all(root(k.inputs[0]) in good for k in c)}
        bad = {
            s
            for s in good
            for key in members[s]
            for reader in flow.readers.get(key, ())
            if reader.module in norms and reader.module not in centred
        }
        if not bad:
            break
        for s in bad:
            del good[s]
    done: set[int] = set()
    for writers in good.values():
        for writer in writers:
            if id(writer) in done:
                continue
            done.add(id(writer))
            if isinstance(writer, nn.Module):
                centre_outputs(writer)
            else:
                with torch.no_grad():
                    writer.data.sub_(writer.data.double().mean(-1, keepdim=True).to(writer.dtype))
    return centred


def _passes(node: Node) -> bool:
    if node.module is not None:
        return isinstance(node.module, _SAME_MODULES)
    return node.name in _ADD or node.name in _SAME


def _writers(
    flow: Flow,
    keys: set[int],
    norms: set[nn.Module],
    parameters: dict[str, nn.Parameter],
    width: int,
    blocked: Callable[[nn.Module], str],
) -> list[Any] | None:
    """The layers and parameters that write a stream, or ``None`` where one of them cannot be centred."""
    if keys & flow.results:
        return None
    writers: list[Any] = []
    for key in keys:
        for reader in flow.readers.get(key, ()):
            if _passes(reader):
                continue
            if reader.module not in norms or key in reader.inputs[1:]:
                return None
        sources = [n for n in flow.writers.get(key, ()) if not _passes(n)]
        if not sources and not flow.writers.get(key):
            p = parameters.get(flow.parameters.get(key, ""))
            if p is None or p.ndim == 0 or p.shape[-1] != width:
                return None
            writers.append(p)
        for node in sources:
            m: Any = node.module
            if isinstance(m, nn.Embedding):
                hooked = m._forward_hooks or m._forward_pre_hooks
                own = type(m).forward is nn.Embedding.forward and m.max_norm is None and not hooked
                if not own or m.embedding_dim != width or not isinstance(m._parameters.get("weight"), torch.Tensor):
                    return None
            elif not isinstance(m, nn.Linear) or m.out_features != width or blocked(m):
                return None
            if any(out not in keys for call in flow.calls(m) for out in call.outputs):
                return None
            writers.append(m)
    return writers
