"""Parameter groups for optimizers that work on matrices: hidden weights one way, everything else by Adam.

SinkGD and SWAN are defined for the weight matrices of hidden linear layers only. :func:`for_model` finds them, and
puts embeddings, the output layer, normalization weights, biases and convolutions into a group for Adam.

Reference:
    Meyer Scetbon, Chao Ma, Wenbo Gong & Ted Meeds, *Gradient Multi-Normalization for Stateless and Scalable LLM
    Training*, NeurIPS 2025, arXiv 2502.06742, section 5 (the recipe: learning rate 0.02, 0.05 of it on matrices).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from evenly.optim._common import at_least, number

__all__ = ["for_model"]

#: Names of modules that are taken for an embedding or an output layer, as patterns for one part of a dotted name.
EXCLUDED = ("*embed*", "wte", "wpe", "lm_head", "head", "classifier")


def for_model(
    model: nn.Module,
    *,
    lr: float = 0.02,
    scale: float = 0.05,
    exclude: Iterable[str] | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Make the parameter groups of a model for :class:`SinkGD`, :class:`SWAN` or :class:`MultiNormGD`.

    Hidden matrices are the weights of ``nn.Linear``, of ``transformers``' ``Conv1D`` (stored transposed) and of
    ``nn.MultiheadAttention`` (its fused query, key and value as three matrices), except those in modules that
    ``exclude`` names, those shared with an ``nn.Embedding``, and the output layer of a ``transformers`` model. All
    other parameters, vectors and kernels among them, go to Adam. Frozen parameters are left out.

    Args:
        model: any module. Give it as it will be trained: after sharding, and after freezing.
        lr: the global learning rate, Adam's; 0.02.
        scale: learning rate of the matrices relative to ``lr``; 0.05.
        exclude: patterns (``*`` and ``?``) for one part of a dotted parameter name, such as ``"lm_head"`` or
            ``"*embed*"``. Default: ``*embed*``, ``wte``, ``wpe``, ``lm_head``, ``head``, ``classifier``. Name your
            output layer here if it is called otherwise.
        weight_decay: of all groups, decoupled; 0.

    Returns:
        Groups with ``params`` as (name, parameter) pairs, ``lr``, ``weight_decay`` and ``rule``; groups of fused or
        transposed matrices also with ``blocks`` or ``transpose``. Empty groups are left out.

    Raises:
        ValueError: a negative rate, a pattern of ``exclude`` that fits no parameter, or a model without a hidden
            matrix.

    >>> model = nn.Sequential()
    >>> model.embed, model.hidden, model.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)
    >>> for group in for_model(model):
    ...     print(group["rule"], group["lr"], [name for name, _ in group["params"]])
    matrix 0.001 ['hidden.weight']
    adam 0.02 ['embed.weight', 'hidden.bias', 'head.weight', 'head.bias']
    """
    number("lr", lr)
    at_least("scale", scale, 0)
    at_least("weight_decay", weight_decay, 0)
    if isinstance(exclude, str):
        raise TypeError(f"exclude={exclude!r}, expected a list of patterns: [{exclude!r}].")
    patterns = EXCLUDED if exclude is None else tuple(exclude)
    names = [name for name, _ in model.named_parameters()]
    if exclude is not None:
        for pattern in patterns:
            if not any(_fits(name, (pattern,)) for name in names):
                raise ValueError(f"exclude names {pattern!r}, which fits no parameter; there are {_some(names)}.")
    kinds = _matrices(model)
    rest: list[tuple[str, Tensor]] = []
    found: dict[tuple[int, bool], list[tuple[str, Tensor]]] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        kind = kinds.get(id(param))
        if kind is None or _fits(name, patterns):
            rest.append((name, param))
        else:
            found.setdefault(kind, []).append((name, param))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no hidden matrix outside {list(patterns)}; its parameters are {_some(names)}."
        )
    groups: list[dict[str, Any]] = []
    for (blocks, transpose), params in found.items():
        group: dict[str, Any] = {"params": params, "lr": lr * scale, "weight_decay": weight_decay, "rule": "matrix"}
        if blocks > 1:
            group["blocks"] = blocks
        if transpose:
            group["transpose"] = True
        groups.append(group)
    if rest:
        groups.append({"params": rest, "lr": lr, "weight_decay": weight_decay, "rule": "adam"})
    return groups


def _matrices(model: nn.Module) -> dict[int, tuple[int, bool]]:
    # The hidden matrices by identity: how many blocks each has, and whether it is stored transposed.
    kinds: dict[int, tuple[int, bool]] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear):
            kinds[id(weight)] = (1, False)
        elif isinstance(module, nn.MultiheadAttention):
            if module.in_proj_weight is not None:
                kinds[id(module.in_proj_weight)] = (3, False)
            for own in (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight):
                kinds[id(own)] = (1, False)
        elif type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2:
            fused = 3 if weight.shape[1] == 3 * weight.shape[0] else 1
            kinds[id(weight)] = (fused, True)
    find_output = getattr(model, "get_output_embeddings", None)
    output = find_output() if callable(find_output) else None
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) or module is output:
            kinds.pop(id(getattr(module, "weight", None)), None)
    return kinds


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(part, pattern) for part in name.split(".") for pattern in patterns)


def _some(names: list[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
