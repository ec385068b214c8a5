"""Query-key normalization: attention whose logits are cosines times one learned number.

.. math::
    \\hat q = \\frac{q}{\\max(\\lVert q \\rVert_2, \\varepsilon)}, \\qquad
    \\hat k = \\frac{k}{\\max(\\lVert k \\rVert_2, \\varepsilon)}, \\qquad
    A = \\mathrm{softmax}\\big( g\\, \\hat q \\hat k^\\top \\big), \\qquad o = A v

The norms are those of the vectors of one head. The learned scale :math:`g` takes the place of the division by
:math:`\\sqrt{d_h}`: logits stay in :math:`[-g, g]`, so that no softmax saturates because vectors grew. Use it where
attention logits grow while training, with little data or with large learning rates. Where the norms of queries
carry information that a model needs, per-channel gains (``qk_norm="rms"`` of
:class:`evenly.models.Attention`) leave more freedom.

The scale starts at :math:`g_0 = \\log_2(L^2 - L)`, with :math:`L` the 97.5th percentile of the training lengths: a
scale near 1 would leave attention nearly uniform.

Reference:
    Alex Henry, Prudhvi Raj Dachapally, Shubham Pawar & Yuxuan Chen, *Query-Key Normalization for Transformers*,
    Findings of EMNLP 2020, arXiv 2010.04245, section 3 and equation 6.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from evenly.core import normalize
from evenly.nn.norm import check_positive

__all__ = ["QKNormAttention", "qknorm_attention", "qknorm_init_scale"]


class QKNormAttention(nn.Module):
    """Multi-head attention with normalized queries and keys.

    Parameters have the names of ``torch.nn.MultiheadAttention`` (``in_proj_weight``, ``in_proj_bias``,
    ``out_proj``), so its state dict loads with ``strict=False``; only ``scale`` is new. Projection weights start as
    in the authors' code, normal with variance 2 / (5 embed_dim), and biases at 0.

    Args:
        embed_dim: features of queries, keys, values and output.
        num_heads: heads; must divide ``embed_dim``.
        init_scale: initial :math:`g`. Give this or ``seq_len_p975``, not both.
        seq_len_p975: 97.5th percentile of the lengths of the training sequences, from which :math:`g` is computed
            as :math:`\\log_2(L^2 - L)`; see :func:`qknorm_init_scale` for the percentile of lengths at hand.
        per_head_scale: learn one :math:`g` a head; the paper has one for all heads.
        dropout: of the attention weights, in training only.
        bias: whether the four projections have biases.
        eps: the least norm to divide by (a clamp: zero vectors stay zero).
        device, dtype: of the parameters.

    Shape:
        query (B, Tq, embed_dim), key and value (B, Tk, embed_dim); output (B, Tq, embed_dim). The weights, where
        asked for, are (B, num_heads, Tq, Tk).

    Raises:
        ValueError: ``embed_dim`` is not a multiple of ``num_heads``; both or neither of ``init_scale`` and
            ``seq_len_p975``; ``init_scale`` not positive; ``seq_len_p975`` below 2; ``eps`` not positive; ``dropout``
            outside [0, 1). In forward: shapes that do not fit.

    The authors fill masked logits with -1e9; this masks them with minus infinity, which is the same wherever a query
    may attend to some key. A query that may attend to none gets 0 here and the mean of all values there. Their
    parameter is a 0-dimensional float64 tensor; ours has the dtype of the module.

    >>> attention = QKNormAttention(64, 4, seq_len_p975=72)
    >>> round(attention.scale.item(), 4)
    12.3197
    >>> x = torch.randn(2, 10, 64)
    >>> attention(x, is_causal=True).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        init_scale: float | None = None,
        seq_len_p975: float | None = None,
        per_head_scale: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        eps: float = 1e-12,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(type(self).__name__, embed_dim=embed_dim, num_heads=num_heads)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} is not a multiple of num_heads={num_heads}.")
        if (init_scale is None) == (seq_len_p975 is None):
            raise ValueError(
                f"Give exactly one of init_scale and seq_len_p975, got {init_scale} and {seq_len_p975}. "
                "qknorm_init_scale(lengths) computes the scale from the lengths of the training sequences."
            )
        if init_scale is None:
            assert seq_len_p975 is not None
            init_scale = _scale_of_length(seq_len_p975)
        if not (init_scale > 0 and math.isfinite(init_scale)):
            raise ValueError(f"init_scale={init_scale} must be positive and finite.")
        if not eps > 0:
            raise ValueError(f"eps={eps} must be positive.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} is outside [0, 1).")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.init_scale = init_scale
        self.per_head_scale = per_head_scale
        self.dropout = dropout
        self.eps = eps
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **options))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim, **options)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **options)
        self.scale = nn.Parameter(torch.empty((num_heads,) if per_head_scale else (), **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the projections anew, and set the scale to its initial value."""
        std = math.sqrt(2 / (5 * self.embed_dim))
        nn.init.normal_(self.in_proj_weight, std=std)
        nn.init.normal_(self.out_proj.weight, std=std)
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)
        nn.init.constant_(self.scale, self.init_scale)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend.

        Args:
            query: what asks.
            key: what is matched; default ``query``.
            value: what is averaged; default ``key``.
            attn_mask: broadcastable to (B, num_heads, Tq, Tk). Boolean, true where a query may attend to a key (as in
                ``scaled_dot_product_attention``; the opposite of ``torch.nn.MultiheadAttention``), or floating-point,
                added to the logits. For padded keys: ``real[:, None, None, :]``.
            is_causal: a query attends to keys at its own position and before.
            need_weights: also return the attention weights, as they were used (after dropout).
        """
        key = query if key is None else key
        value = key if value is None else value
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.ndim != 3 or x.shape[-1] != self.embed_dim:
                raise ValueError(
                    f"QKNormAttention expects {name} of shape (batch, length, {self.embed_dim}), got {tuple(x.shape)}."
                )
        q, k, v = (self._split(x) for x in self._project(query, key, value))
        out, weights = _attend(
            q,
            k,
            v,
            self.scale,
            attn_mask,
            is_causal=is_causal,
            dropout=self.dropout if self.training else 0.0,
            eps=self.eps,
            need_weights=need_weights,
        )
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        return out if weights is None else (out, weights)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        # One product for all inputs that are the same tensor.
        w, b, e = self.in_proj_weight, self.in_proj_bias, self.embed_dim

        def part(x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
            rows = slice(first * e, last * e)
            return functional.linear(x, w[rows], None if b is None else b[rows]).split(e, -1)

        if query is key and key is value:
            return part(query, 0, 3)
        if key is value:
            return (*part(query, 0, 1), *part(key, 1, 3))
        return (*part(query, 0, 1), *part(key, 1, 2), *part(value, 2, 3))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, init_scale={self.init_scale:.6g}, "
            f"per_head_scale={self.per_head_scale}, dropout={self.dropout}, eps={self.eps:g}"
        )


def qknorm_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | float,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    dropout: float = 0.0,
    eps: float = 1e-12,
) -> Tensor:
    """``softmax(scale * cos(q, k)) v``: attention on heads that are split already.

    Args:
        q: (..., H, Tq, dh).
        k, v: (..., H, Tk, dh) and (..., H, Tk, dv). With fewer heads, which must divide H, each serves a group of
            consecutive heads of ``q`` (grouped-query attention).
        scale: :math:`g`, a number, a scalar tensor, or one a head: (H,).
        mask: broadcastable to (..., H, Tq, Tk); boolean, true where a query may attend, or added to the logits.
        is_causal: a query attends to keys at its own position and before.
        dropout: of the attention weights; applied whenever it is not 0.
        eps: the least norm to divide by.

    Returns:
        (..., H, Tq, dv). A query that may attend to no key gets 0.

    Raises:
        ValueError: head dimensions of ``q`` and ``k`` differ, heads do not divide, the mask does not broadcast, the
            scale is neither a scalar nor one a head.

    Cost: two normalizations of rows besides the attention, which runs on
    ``torch.nn.functional.scaled_dot_product_attention``.

    >>> q = k = torch.eye(3)[None]
    >>> v = torch.tensor([[[1.0], [2.0], [3.0]]])
    >>> qknorm_attention(5 * q, k, v, 0.0).flatten()
    tensor([2., 2., 2.])
    >>> qknorm_attention(5 * q, k, v, 100.0).flatten()
    tensor([1., 2., 3.])
    """
    return _attend(q, k, v, scale, mask, is_causal=is_causal, dropout=dropout, eps=eps, need_weights=False)[0]


def qknorm_init_scale(lengths: Iterable[int] | Tensor, q: float = 0.975) -> float:
    """The initial scale for training sequences of these lengths: ``log2(L² - L)`` with L their q-quantile.

    Args:
        lengths: numbers of tokens of the training sequences (of translation: of source and target).
        q: the quantile.

    Raises:
        ValueError: no lengths, ``q`` outside [0, 1], a quantile below 2 (the logarithm of 0).

    >>> round(qknorm_init_scale([72] * 10), 4)
    12.3197
    """
    sizes = torch.as_tensor(lengths if isinstance(lengths, Tensor) else list(lengths), dtype=torch.float64).flatten()
    if not sizes.numel():
        raise ValueError("There are no lengths to take a quantile of.")
    if not 0 <= q <= 1:
        raise ValueError(f"q={q} is outside [0, 1].")
    # numpy's quantile has no limit on the number of values; torch's has.
    import numpy as np

    return _scale_of_length(float(np.quantile(sizes.cpu().numpy(), q)))


def _scale_of_length(length: float) -> float:
    if not (length >= 2 and math.isfinite(length)):
        raise ValueError(f"The 97.5th percentile of lengths is {length:g}, expected at least 2: log2(L² - L).")
    return math.log2(length**2 - length)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | float,
    mask: Tensor | None,
    *,
    is_causal: bool,
    dropout: float,
    eps: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    shapes = f"q, k, v of shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
    if min(q.ndim, k.ndim, v.ndim) < 3:
        raise ValueError(f"Attention expects (..., heads, length, features), got {shapes}.")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"Queries and keys must have the same head dimension, got {shapes}.")
    heads, kv_heads = q.shape[-3], k.shape[-3]
    if k.shape[:-1] != v.shape[:-1] or q.shape[:-3] != k.shape[:-3]:
        raise ValueError(f"Keys and values must agree in all but their last axis, and all in batch axes, got {shapes}.")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"The number of heads of k, {kv_heads}, must divide that of q, {heads}.")
    scale = torch.as_tensor(scale, dtype=q.dtype, device=q.device) if not isinstance(scale, Tensor) else scale
    if scale.ndim and tuple(scale.shape) != (heads,):
        raise ValueError(f"scale has shape {tuple(scale.shape)}, expected a scalar or one a head: ({heads},).")
    logits_shape = (*q.shape[:-1], k.shape[-2])
    if mask is not None:
        mask = _fitted_mask(mask, logits_shape, q)
    # g goes onto the queries: kernels take a number as scale, and so its gradient comes from the same pass.
    if scale.ndim:
        q = normalize(q, "... h t d -> ... h t", center=False, scale="l2", eps=eps, weight=scale, affine="h")
    else:
        q = normalize(q, "... d -> ...", center=False, scale="l2", eps=eps, weight=scale)
    k = normalize(k, "... d -> ...", center=False, scale="l2", eps=eps)
    if is_causal and mask is not None:
        mask, is_causal = _with_causal(mask, logits_shape), False
    if not need_weights:
        grouped = heads != kv_heads
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=1.0, enable_gqa=grouped
        )
        return out, None
    if heads != kv_heads:
        k, v = (x.repeat_interleave(heads // kv_heads, -3) for x in (k, v))
    logits = q @ k.mT
    if is_causal:
        mask = _causal(logits_shape, q.device)
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, -math.inf)
    elif mask is not None:
        logits = logits + mask
    weights = logits.softmax(-1)
    if mask is not None:
        weights = weights.masked_fill((logits == -math.inf).all(-1, keepdim=True), 0.0)
    weights = functional.dropout(weights, dropout)
    return weights @ v, weights


def _fitted_mask(mask: Tensor, shape: tuple[int, ...], q: Tensor) -> Tensor:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"The mask is {mask.dtype}, expected bool (true: may attend) or floating-point (added).")
    try:
        fits = torch.broadcast_shapes(mask.shape, shape) == torch.Size(shape)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"The mask of shape {tuple(mask.shape)} does not broadcast to the logits' shape {shape}.")
    mask = mask if mask.ndim > 1 else mask.expand(shape[-2:])
    return mask if mask.dtype == torch.bool else mask.to(q.dtype)


def _causal(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.ones(shape[-2:], dtype=torch.bool, device=device).tril()


def _with_causal(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    causal = _causal(shape, mask.device)
    return mask & causal if mask.dtype == torch.bool else mask.masked_fill(~causal, -math.inf)
