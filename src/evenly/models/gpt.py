"""A small decoder-only language model, with the normalization in every place where it can stand.

    h_0 = E[token];  h_l = block_l(h_{l-1});  logits = W norm(h_L)

Blocks are those of :mod:`evenly.models.attention`. With post-normalization the last norm is left out, since h_L is
normalized already. Positions are rotary. Use it to compare normalizations on text.

References: Radford et al. 2019 (GPT-2) for the network and its initialization; rotary positions:
arXiv:2104.09864.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from evenly.core.recompute import check_memory, saving
from evenly.models._language import LanguageModel
from evenly.models.attention import Cache, TransformerBlock, make_layer
from evenly.models.recipes import Recipe, recipe
from evenly.nn import available, qknorm_init_scale

__all__ = ["GPT", "gpt"]


class GPT(LanguageModel):
    """The network that :func:`gpt` builds.

    Args:
        blocks: the blocks, in order.
        vocab_size, block_size, dim: sizes.
        final_norm: before the output; ``None`` for none.
        tie: whether the output shares the embedding's weight.
        dropout: of the embeddings, in training.
        memory: ``"normal"`` or ``"low"``; see :func:`gpt`.
    """

    def __init__(
        self,
        blocks: list[TransformerBlock],
        *,
        vocab_size: int,
        block_size: int,
        dim: int,
        final_norm: nn.Module | None,
        tie: bool,
        dropout: float,
        memory: str = "normal",
    ) -> None:
        super().__init__()
        check_memory(memory)
        self.memory = memory
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.embedding = nn.Embedding(vocab_size, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = final_norm
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self.apply(_initialize)
        for block in blocks:
            for branch in (block.attention.branch, block.mlp.branch):
                nn.init.normal_(cast(nn.Linear, branch.out).weight, std=0.02 / math.sqrt(2 * len(blocks)))
        if tie:
            self.head.weight = self.embedding.weight

    def hidden_states(
        self, idx: Tensor, mask: Tensor | None, caches: list[Cache | None] | None
    ) -> tuple[Tensor, list[Cache | None]]:
        kept: list[Cache | None] = []
        with saving(self.memory):
            h = self.dropout(self.embedding(idx))
            for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
                h, cache = cast(TransformerBlock, block).step(h, mask, cache)
                kept.append(cache)
            return h if self.final_norm is None else self.final_norm(h), kept

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)


def gpt(
    vocab_size: int,
    *,
    norm: str | Recipe | Callable[[int], nn.Module] = "layer",
    qk_norm: str | Callable[[int], nn.Module] | None = None,
    placement: str = "pre",
    dim: int = 128,
    depth: int = 4,
    num_heads: int = 4,
    kv_groups: int | None = None,
    block_size: int = 128,
    mlp_ratio: float = 4.0,
    activation: str = "gelu",
    dropout: float = 0.0,
    bias: bool = False,
    tie: bool = False,
    rope_base: float = 10000.0,
    memory: str = "normal",
) -> GPT:
    """A decoder-only language model.

    Args:
        vocab_size: number of token ids.
        norm: the layer of every block and before the output: a name in :func:`evenly.nn.available`, a recipe, or a
            callable from the number of features to a module. Statistics over positions (``"batch"``, ``"instance"``)
            let a position see those after it while training.
        qk_norm: of queries and keys: ``None``, ``"l2"`` (the paper's, arXiv:2010.04245), ``"rms"``, ``"layer"`` or a
            callable; see :class:`evenly.models.Attention`. The scale of ``"l2"`` starts at log2(L² - L) with L the
            block size.
        placement: ``"pre"``, ``"post"`` or ``"sandwich"``; see :mod:`evenly.models.attention`.
        dim: features.
        depth: blocks.
        num_heads: heads of queries.
        kv_groups: heads of keys and values; ``None``: as many as queries.
        block_size: longest sequence.
        mlp_ratio: hidden features of the perceptrons, as a multiple of ``dim``.
        activation: of the perceptrons: ``"gelu"``, ``"relu"`` or ``"swiglu"``.
        dropout: of embeddings, attention weights and branches, in training.
        bias: whether linear layers have biases.
        tie: share the weights of embedding and output.
        rope_base: base of the rotary positions.
        memory: ``"normal"``, or ``"low"`` to keep less for the backward pass, with the same gradients: outputs of
            normalizations, activations and rotary positions are computed again; see
            :class:`evenly.nn.low_memory`.

    Returns:
        A module from token ids (B, T) to ``(logits, loss)``; see :meth:`GPT.forward` and :meth:`GPT.generate`.
        Weights start as in GPT-2: normal with standard deviation 0.02, divided by sqrt(2 depth) where a branch ends.

    Raises:
        ValueError: sizes that do not fit, an unknown ``norm``, ``qk_norm``, ``placement`` ``activation`` or ``memory``.

    >>> import torch
    >>> model = gpt(256, norm="rms", qk_norm="l2", dim=32, depth=2, block_size=16)
    >>> logits, loss = model(torch.randint(256, (2, 16)), targets=torch.randint(256, (2, 16)))
    >>> logits.shape, loss.shape
    (torch.Size([2, 16, 256]), torch.Size([]))
    """
    if min(vocab_size, depth, block_size) < 1:
        raise ValueError(f"vocab_size={vocab_size}, depth={depth} and block_size={block_size} must all be positive")
    blocks = [
        TransformerBlock(
            dim,
            num_heads,
            norm=norm,
            placement=placement,
            mlp_ratio=mlp_ratio,
            activation=activation,
            dropout=dropout,
            bias=bias,
            kv_groups=kv_groups,
            qk_norm=qk_norm,
            qk_scale=qknorm_init_scale([max(block_size, 2)]) if qk_norm == "l2" else None,
            rope_base=rope_base,
        )
        for _ in range(depth)
    ]
    model = GPT(
        blocks,
        vocab_size=vocab_size,
        block_size=block_size,
        dim=dim,
        final_norm=None if placement == "post" else make_layer(norm, dim),
        tie=tie,
        dropout=dropout,
        memory=memory,
    )
    if isinstance(norm, str) and norm in available():
        return model
    return cast(GPT, recipe(norm).finish(model, torch.zeros(2, min(2, block_size), dtype=torch.long)))


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
