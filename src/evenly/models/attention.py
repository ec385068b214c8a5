"""Attention and its residual block, with the normalization in every place where it can stand.

    pre:       y = x + f(norm(x))
    post:      y = norm(x + f(x))
    sandwich:  y = x + norm(f(norm(x)))

``f`` is attention (:class:`Attention`) or a multilayer perceptron (:class:`FeedForward`); the block around either is
:class:`Residual`. :class:`AttentionBlock` is the first with its residual, :class:`TransformerBlock` both.

Attention has causal and padding masks, rotary positions, fewer key-value heads than query heads
(grouped-query attention), and a normalization of queries and keys.

References: pre and post normalization: Xiong et al. 2020, arXiv:2002.04745; sandwich: Ding et al. 2021,
arXiv:2105.13290; query-key normalization: Henry et al. 2020, arXiv:2010.04245; grouped-query attention: Ainslie et
al. 2023, arXiv:2305.13245.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import evenly.nn
from evenly.core import normalize
from evenly.core.recompute import check_memory, recomputed, saving
from evenly.models._normed import NormedActivation
from evenly.models.recipes import Recipe, recipe
from evenly.models.rotary import Rotary

__all__ = ["PLACEMENTS", "Attention", "AttentionBlock", "Cache", "FeedForward", "Residual", "TransformerBlock"]

PLACEMENTS = ("pre", "post", "sandwich")

Normalization = str | Recipe | Callable[[int], nn.Module]
"""A name for :func:`evenly.nn.create`, a recipe, or a callable from the number of features to a module."""


class Cache(NamedTuple):
    """Keys and values of the positions so far, normalized and turned: (B, kv_groups, T, head_dim) each."""

    k: Tensor
    v: Tensor


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        dim: features of input and output.
        num_heads: heads of queries; must divide ``dim``.
        kv_groups: heads of keys and values; each serves ``num_heads / kv_groups`` heads of queries. ``None``: as
            many as queries. 1 is multi-query attention.
        qk_norm: of queries and keys in each head. ``None``: none, and logits are divided by sqrt(head_dim).
            ``"l2"``: the paper's, cosines times one learned scale (as :class:`evenly.nn.QKNormAttention`).
            ``"rms"``, ``"layer"`` or a callable from head_dim to a module: a layer with gains of its own for queries
            and for keys, shared by the heads; logits are divided by sqrt(head_dim).
        qk_scale: the initial scale of ``"l2"``, which needs it: see :func:`evenly.nn.qknorm_init_scale`.
        causal: a position attends to itself and those before it.
        rope_base: base of the rotary positions; ``None`` for none.
        dropout: of attention weights, in training.
        bias: of the projections.

    Shape:
        (B, T, dim) to the same. ``mask`` is (B, T), boolean, false at padding: it is attended to by none.

    Raises:
        ValueError: sizes that do not divide, an unknown ``qk_norm``, ``"l2"`` without ``qk_scale``, an odd head
            dimension with rotary positions; in forward, an input or mask of another shape.

    >>> attention = Attention(32, 4, kv_groups=2, qk_norm="rms")
    >>> attention(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kv_groups: int | None = None,
        qk_norm: str | Callable[[int], nn.Module] | None = None,
        qk_scale: float | None = None,
        causal: bool = True,
        rope_base: float | None = 10000.0,
        dropout: float = 0.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        kv_groups = num_heads if kv_groups is None else kv_groups
        if min(dim, num_heads, kv_groups) < 1:
            raise ValueError(f"dim={dim}, num_heads={num_heads} and kv_groups={kv_groups} must all be positive")
        if dim % num_heads:
            raise ValueError(f"dim={dim} is not a multiple of num_heads={num_heads}")
        if num_heads % kv_groups:
            raise ValueError(f"num_heads={num_heads} is not a multiple of kv_groups={kv_groups}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} is outside [0, 1)")
        self.dim = dim
        self.num_heads = num_heads
        self.kv_groups = kv_groups
        self.head_dim = dim // num_heads
        self.causal = causal
        self.dropout = dropout
        self.qk_norm = qk_norm if qk_norm is None or isinstance(qk_norm, str) else "own"
        self.qkv = nn.Linear(dim, dim + 2 * kv_groups * self.head_dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.rotary = None if rope_base is None else Rotary(self.head_dim, rope_base)
        self.scale: nn.Parameter | None = None
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if qk_norm == "l2":
            if qk_scale is None:
                raise ValueError(
                    "qk_norm='l2' has a learned scale that needs a start: give qk_scale, for example "
                    "evenly.nn.qknorm_init_scale([length]) for sequences of one length"
                )
            if not (qk_scale > 0 and math.isfinite(qk_scale)):
                raise ValueError(f"qk_scale={qk_scale} must be positive and finite")
            self.scale = nn.Parameter(torch.tensor(float(qk_scale)))
        elif qk_norm is not None:
            if isinstance(qk_norm, str) and qk_norm not in ("rms", "layer"):
                raise ValueError(f"qk_norm is {qk_norm!r}, expected None, 'l2', 'rms', 'layer' or a callable")
            self.q_norm, self.k_norm = (make_layer(qk_norm, self.head_dim) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within ``x``; see the class for the shape of ``mask``."""
        return self.attend(x, mask)[0]

    def attend(self, x: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Attend to ``x`` and to the positions of a cache before it; return the output and the cache with both.

        Args:
            x: (B, T, dim), the positions after those of the cache.
            mask: (B, all positions), those of the cache included.
            cache: what an earlier call returned.
        """
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"attention expects (batch, length, {self.dim}), got an input of shape {tuple(x.shape)}")
        before = 0 if cache is None else cache.k.shape[-2]
        q, k, v = self.project(x, before)
        if cache is not None:
            k, v = torch.cat((cache.k, k), -2), torch.cat((cache.v, v), -2)
        allowed, causal = attention_mask(x, mask, before, self.causal)
        y = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=allowed,
            is_causal=causal,
            dropout_p=self.dropout if self.training else 0.0,
            scale=1.0 if self.scale is not None else None,
            enable_gqa=self.kv_groups != self.num_heads,
        )
        return self.out(y.transpose(1, 2).flatten(2)), Cache(k, v)

    def project(self, x: Tensor, offset: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the heads, normalized and turned.

        The logits are the products of queries and keys: as they are with ``qk_norm="l2"`` (the learned scale is on
        the queries), divided by sqrt(head_dim) otherwise.

        Args:
            x: (B, T, dim).
            offset: the position of the first.
        """
        heads, groups, size = self.num_heads, self.kv_groups, self.head_dim
        parts = self.qkv(x).unflatten(-1, (heads + 2 * groups, size)).transpose(1, 2)
        q, k, v = parts.split([heads, groups, groups], 1)
        if self.scale is not None:
            q = normalize(q, "... d -> ...", center=False, scale="l2", weight=self.scale)
            k = normalize(k, "... d -> ...", center=False, scale="l2")
        elif self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            turned = partial(self.rotary, offset=offset)
            q, k = recomputed(turned, q), recomputed(turned, k)
        return q, k, v

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, num_heads={self.num_heads}, kv_groups={self.kv_groups}, qk_norm={self.qk_norm!r}, "
            f"causal={self.causal}, dropout={self.dropout}"
        )


class FeedForward(nn.Module):
    """Two linear layers with a nonlinearity between them.

    Args:
        dim: features of input and output.
        hidden: features between.
        activation: ``"gelu"``, ``"relu"``, or ``"swiglu"``: ``W_down (u * silu(v))`` with ``u, v = W_up x``.
        bias: of the linear layers.

    Raises:
        ValueError: an unknown activation.

    >>> FeedForward(8, 32)(torch.zeros(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, dim: int, hidden: int, *, activation: str = "gelu", bias: bool = False) -> None:
        super().__init__()
        if activation not in ("gelu", "relu", "swiglu"):
            raise ValueError(f"activation is {activation!r}, expected 'gelu', 'relu' or 'swiglu'")
        self.activation = activation
        self.up = nn.Linear(dim, 2 * hidden if activation == "swiglu" else hidden, bias=bias)
        self.out = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.activation == "swiglu":
            u, v = x.chunk(2, -1)
            return self.out(recomputed(operator.mul, u, recomputed(functional.silu, v)))
        return self.out(recomputed(functional.gelu if self.activation == "gelu" else functional.relu, x))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class Residual(nn.Module):
    """A branch with its residual connection and normalization.

    Args:
        branch: a module from (B, T, dim) to the same.
        dim: features.
        norm: the layer, for channels last: a name in :func:`evenly.nn.available`, a recipe, or a callable.
        placement: ``"pre"``, ``"post"`` or ``"sandwich"``.
        dropout: of the branch's output, in training.

    The addition is fused into the normalization where the layer can do it and the placement has it there
    (``"sandwich"``). Layers of :mod:`evenly.nn` get the padding mask, so that padding does not count in a
    statistic over positions.

    >>> Residual(nn.Identity(), 8, "none")(torch.ones(1, 1, 8)).sum().item()
    16.0
    """

    def __init__(
        self,
        branch: nn.Module,
        dim: int,
        norm: Normalization = "layer",
        placement: str = "pre",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if placement not in PLACEMENTS:
            raise ValueError(f"placement is {placement!r}, expected one of {', '.join(PLACEMENTS)}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} is outside [0, 1)")
        self.branch = branch
        self.placement = placement
        self.dropout = dropout
        self.norm = _Masked(make_layer(norm, dim))
        self.norm_out = _Masked(make_layer(norm, dim)) if placement == "sandwich" else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Shapes as in :class:`Attention`; the mask reaches the layers, and the branch if it is attention."""
        if isinstance(self.branch, Attention):
            return self.step(x, mask)[0]
        return self.around(x, self.branch, mask)

    def step(self, x: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Around attention, with a cache of earlier positions; see :meth:`Attention.attend`."""
        attention = self.branch
        if not isinstance(attention, Attention):
            raise TypeError(f"the branch is {type(attention).__name__}; only attention has a cache")
        kept: list[Cache] = []

        def attend(z: Tensor) -> Tensor:
            y, cache_ = attention.attend(z, mask, cache)
            kept.append(cache_)
            return y

        new = None if mask is None else mask[:, mask.shape[1] - x.shape[1] :]
        return self.around(x, attend, new), kept[0]

    def around(self, x: Tensor, branch: Callable[[Tensor], Tensor], mask: Tensor | None) -> Tensor:
        """The residual connection around any function of ``x``."""
        y = branch(x if self.placement == "post" else self.norm(x, None, mask))
        y = functional.dropout(y, self.dropout, self.training)
        if self.placement == "post":
            return self.norm(x + y, None, mask)
        return x + y if self.norm_out is None else self.norm_out(y, x, mask)

    def extra_repr(self) -> str:
        return f"placement={self.placement!r}"


class AttentionBlock(Residual):
    """Attention with its residual connection and normalization.

    Args:
        dim, num_heads: as in :class:`Attention`.
        norm, placement, dropout: as in :class:`Residual`; the dropout is also that of the attention weights.
        **attention: ``kv_groups``, ``qk_norm``, ``qk_scale``, ``causal``, ``rope_base``, ``bias`` of
            :class:`Attention`.

    >>> block = AttentionBlock(32, 4, norm="rms", placement="sandwich", qk_norm="l2", qk_scale=10.0)
    >>> block(torch.randn(2, 10, 32), torch.ones(2, 10, dtype=torch.bool)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        norm: Normalization = "layer",
        placement: str = "pre",
        dropout: float = 0.0,
        **attention: object,
    ) -> None:
        branch = Attention(dim, num_heads, dropout=dropout, **attention)  # type: ignore[arg-type]
        super().__init__(branch, dim, norm, placement, dropout)


class TransformerBlock(nn.Module):
    """Attention, then a multilayer perceptron, each with residual connection and normalization.

    Args:
        dim, num_heads, norm, placement, dropout, **attention: as in :class:`AttentionBlock`.
        mlp_ratio: hidden features of the perceptron, as a multiple of ``dim``.
        activation: of the perceptron; see :class:`FeedForward`.
        memory: ``"normal"``, or ``"low"`` to keep less for the backward pass, with the same gradients: outputs of
            normalizations, activations and rotary positions are computed again; see
            :class:`evenly.nn.low_memory`.

    >>> TransformerBlock(32, 4, placement="post")(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        norm: Normalization = "layer",
        placement: str = "pre",
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        dropout: float = 0.0,
        bias: bool = False,
        memory: str = "normal",
        **attention: object,
    ) -> None:
        super().__init__()
        check_memory(memory)
        self.memory = memory
        hidden = round(mlp_ratio * dim)
        if hidden < 1:
            raise ValueError(f"mlp_ratio={mlp_ratio} leaves no hidden feature of dim={dim}")
        self.attention = AttentionBlock(
            dim, num_heads, norm=norm, placement=placement, dropout=dropout, bias=bias, **attention
        )
        mlp = FeedForward(dim, hidden, activation=activation, bias=bias)
        self.mlp = Residual(mlp, dim, norm, placement, dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        with saving(self.memory):
            return self.mlp(self.attention(x, mask), mask)

    def step(self, x: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """With a cache of earlier positions; see :meth:`Attention.attend`."""
        with saving(self.memory):
            x, cache = self.attention.step(x, mask, cache)
            new = None if mask is None else mask[:, mask.shape[1] - x.shape[1] :]
            return self.mlp(x, new), cache


def attention_mask(x: Tensor, mask: Tensor | None, before: int, causal: bool) -> tuple[Tensor | None, bool]:
    """What ``scaled_dot_product_attention`` takes as ``attn_mask`` and ``is_causal``.

    Args:
        x: the new positions (B, T, ...).
        mask: (B, before + T), false at padding.
        before: how many positions there are before them.
        causal: whether a position attends only to itself and those before it.
    """
    length = before + x.shape[1]
    if mask is not None:
        if mask.dtype != torch.bool or tuple(mask.shape) != (len(x), length):
            raise ValueError(
                f"the mask is {mask.dtype} of shape {tuple(mask.shape)}, expected bool of shape "
                f"{(len(x), length)}: true at real positions, false at padding"
            )
        mask = mask[:, None, None, :]
    if not causal or x.shape[1] == 1:  # the newest position attends to all
        return mask, False
    if mask is None and before == 0:
        return None, True
    order = torch.ones(x.shape[1], length, dtype=torch.bool, device=x.device).tril(before)
    return order if mask is None else mask & order, False


class _Masked(NormedActivation):
    """A normalization that gets the residual and the padding mask, where it takes them."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(norm)
        self.takes_mask = "mask" in inspect.signature(norm.forward).parameters

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if mask is None or not self.takes_mask:
            return super().forward(x, residual)
        # Not with the residual: masked positions come out as 0, and the residual must pass.
        y = self.norm(x, mask=mask[..., None])
        return y if residual is None else y + residual


def make_layer(norm: Normalization, dim: int) -> nn.Module:
    if isinstance(norm, str) and norm in evenly.nn.available():
        return evenly.nn.create(norm, dim, channel_dim=-1)
    row = recipe(norm)
    return evenly.nn.create(row.layer, dim, channel_dim=-1) if isinstance(row.layer, str) else row.layer(dim)
