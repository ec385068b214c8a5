"""nGPT: a Transformer whose vectors all lie on the unit sphere.

With :math:`N(z) = z / \\lVert z \\rVert_2` along the last axis, d features, H heads of :math:`d_k`, and unit rows in
the embedding E:

.. math::
    h &\\leftarrow E[\\text{token}] \\\\
    q, k, v &= W_q h, W_k h, W_v h; \\quad
        q \\leftarrow s_{qk} \\odot N(\\mathrm{rope}(q)), \\; k \\leftarrow s_{qk} \\odot N(\\mathrm{rope}(k))
        \\text{ in each head} \\\\
    h_A &= N\\big( W_o \\, \\mathrm{softmax}(\\sqrt{d_k}\\, q k^\\top) v \\big), \\quad
        h \\leftarrow N\\big( h + |\\alpha_A| \\odot (h_A - h) \\big) \\\\
    u, \\nu &= s_u \\odot W_u h, \\; s_\\nu \\sqrt{d} \\odot W_\\nu h; \\quad
        h_M = N\\big( W_{down} (u \\odot \\mathrm{SiLU}(\\nu)) \\big), \\quad
        h \\leftarrow N\\big( h + |\\alpha_M| \\odot (h_M - h) \\big) \\\\
    z &= s_z \\odot (E_{out} h)

After initialization and after every optimizer step each vector of length d in the matrices is scaled to length 1
(:class:`evenly.nn.ProjectedOptimizer`). There is no other normalization, no weight decay and no warm-up. A step
:math:`h \\leftarrow N(h + \\alpha(h_A - h))` is, to first order, one along the sphere from h towards :math:`h_A`; the
learned :math:`\\alpha` are its rates, coordinate by coordinate.

Choose it for fewer training steps to a given loss, at a higher cost a step.

Reference:
    Ilya Loshchilov, Cheng-Ping Hsieh, Simeng Sun & Boris Ginsburg, *nGPT: Normalized Transformer with Representation
    Learning on the Hypersphere*, ICLR 2025, arXiv 2410.01131, sections 2.1 to 2.6 (equations 6 to 21).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from evenly.core import normalize
from evenly.models._language import LanguageModel
from evenly.models.attention import Cache, attention_mask
from evenly.models.rotary import KINDS, Rotary
from evenly.nn import NormalizedEmbedding, NormalizedLinear, ScaledParameter, project_

__all__ = ["NGPT", "NGPTConfig"]


@dataclass(frozen=True)
class NGPTConfig:
    """The sizes and settings of :class:`NGPT` (arXiv 2410.01131).

    Args:
        vocab_size: number of token ids.
        n_layer: blocks.
        n_head: attention heads; must divide ``n_embd`` into an even head dimension.
        n_embd: d, features of the hidden state.
        block_size: longest sequence.
        mlp_ratio: hidden features of the perceptron, as a multiple of ``n_embd``.
        base_scale: the stored value at which the scales alpha, s_qk and s_z start; ``None``: 1 / sqrt(n_embd).
        alpha_init: initial step on the sphere, about 1 / n_layer.
        rope_base: base of the rotary positions.
        rope: ``"true"``, or ``"released"`` for the table of the released code (:class:`evenly.models.Rotary`), which
            its checkpoints need.

    Raises:
        ValueError: sizes that are not positive or do not divide, an odd head dimension, an unknown ``rope``.

    >>> NGPTConfig(256, n_layer=2, n_head=4, n_embd=64, block_size=128).head_dim
    16
    """

    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    mlp_ratio: float = 4.0
    base_scale: float | None = None
    alpha_init: float = 0.05
    rope_base: float = 10000.0
    rope: str = "true"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_layer", "n_head", "n_embd", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        if self.head_dim % 2:
            raise ValueError(f"n_embd / n_head = {self.head_dim} is odd; rotary positions take features in pairs")
        if self.hidden < 1:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} leaves no hidden feature of n_embd={self.n_embd}")
        if self.base_scale is not None and not (self.base_scale > 0 and math.isfinite(self.base_scale)):
            raise ValueError(f"base_scale={self.base_scale} must be positive and finite")
        if self.rope not in KINDS:
            raise ValueError(f"rope is {self.rope!r}, expected one of {', '.join(KINDS)}")

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.n_embd // self.n_head

    @property
    def hidden(self) -> int:
        """Hidden features of the perceptron."""
        return round(self.mlp_ratio * self.n_embd)

    @property
    def scale(self) -> float:
        """``base_scale``, or its default."""
        return 1 / math.sqrt(self.n_embd) if self.base_scale is None else self.base_scale


class NGPT(LanguageModel):
    """The normalized Transformer.

    Train it with :class:`evenly.nn.ProjectedOptimizer` around AdamW (``weight_decay=0``, ``betas=(0.9, 0.95)``),
    gradients clipped to norm 1, the learning rate falling along a cosine from its highest value at once. State dicts
    are projected when loaded.

    Args:
        config: sizes and settings.

    ``forward(idx, targets=None, mask=None)`` returns ``(logits, loss)`` (:meth:`LanguageModel.forward`), ``generate``
    samples, ``project_`` restores the lengths.

    Raises:
        ValueError: in forward, a sequence longer than ``block_size``, token ids outside the vocabulary.

    Where paper and released code differ, the paper is followed: the factor sqrt(d) is on v alone (the code has it on
    u too, where the N after W_down cancels it); h is not normalized again before a step (it is of unit length; the
    gradient of the embedding along its own vectors is the one thing that this changes); weights are kept in float32;
    rotary positions are rotations. :meth:`load_released_` reads the code's checkpoints.

    >>> model = NGPT(NGPTConfig(256, n_layer=2, n_head=4, n_embd=32, block_size=16))
    >>> logits, loss = model(torch.randint(256, (2, 16)), targets=torch.randint(256, (2, 16)))
    >>> bool((logits.abs() <= 1.00001).all())
    True
    """

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.block_size = config.block_size
        self.embedding = NormalizedEmbedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.n_layer))
        self.head = NormalizedLinear(config.n_embd, config.vocab_size)
        self.s_z = ScaledParameter(config.vocab_size, 1.0, config.scale)

    def hidden_states(
        self, idx: Tensor, mask: Tensor | None, caches: list[Cache | None] | None
    ) -> tuple[Tensor, list[Cache | None]]:
        h = self.embedding(idx)
        kept: list[Cache | None] = []
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            h, cache = cast(_Block, block)(h, mask, cache)
            kept.append(cache)
        return h, kept

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden) * self.s_z()

    def project_(self) -> NGPT:
        """Scale every vector along the model's axis to length 1; returns the model."""
        project_(self)
        return self

    def load_released_(self, state_dict: Mapping[str, Tensor]) -> NGPT:
        """Load a state dict of the released code, and project it.

        Args:
            state_dict: its ``model`` entry; the prefix that ``torch.compile`` puts before names is dropped. Its
                checkpoints were trained with ``rope="released"``.

        Raises:
            RuntimeError: names or shapes do not fit the config.
        """
        renamed = {_released_name(name): value for name, value in state_dict.items()}
        self.load_state_dict(renamed)
        return self


class _Block(nn.Module):
    def __init__(self, config: NGPTConfig) -> None:
        super().__init__()
        d, hidden, scale = config.n_embd, config.hidden, config.scale
        self.heads, self.head_dim = config.n_head, config.head_dim
        self.query = NormalizedLinear(d, d)
        self.key = NormalizedLinear(d, d)
        self.value = NormalizedLinear(d, d)
        self.attention_out = NormalizedLinear(d, d, norm_dim=0)
        self.up = NormalizedLinear(d, 2 * hidden)
        self.down = NormalizedLinear(hidden, d, norm_dim=0)
        self.alpha_attention = ScaledParameter(d, config.alpha_init, scale)
        self.alpha_mlp = ScaledParameter(d, config.alpha_init, scale)
        self.s_qk = ScaledParameter(d, 1.0, scale)
        self.s_uv = ScaledParameter(2 * hidden, 1.0, 1.0)
        self.rotary = Rotary(config.head_dim, config.rope_base, config.rope)

    def forward(self, h: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        attended, cache = self.attend(h, mask, cache)
        h = _move(h, attended, self.alpha_attention())
        return _move(h, self.mlp(h), self.alpha_mlp()), cache

    def attend(self, h: Tensor, mask: Tensor | None, cache: Cache | None) -> tuple[Tensor, Cache]:
        before = 0 if cache is None else cache.k.shape[-2]
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        gain = self.s_qk().view(self.heads, self.head_dim)
        q, k = (
            normalize(
                self.rotary(x, before),
                "b head t d -> b head t",
                center=False,
                scale="l2",
                weight=gain,
                affine="head d",
            )
            for x in (q, k)
        )
        if cache is not None:
            k, v = torch.cat((cache.k, k), -2), torch.cat((cache.v, v), -2)
        allowed, causal = attention_mask(h, mask, before, causal=True)
        y = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, is_causal=causal, scale=math.sqrt(self.head_dim)
        )
        return self.attention_out(y.transpose(1, 2).flatten(2)), Cache(k, v)

    def mlp(self, h: Tensor) -> Tensor:
        s_u, s_v = self.s_uv().chunk(2)
        u, v = self.up(h).chunk(2, -1)
        return self.down(u * s_u * functional.silu(v * (s_v * math.sqrt(h.shape[-1]))))


def _move(h: Tensor, branch: Tensor, alpha: Tensor) -> Tensor:
    # N(h + |alpha| (N(branch) - h))
    target = normalize(branch, "... d -> ...", center=False, scale="l2")
    return normalize(h + alpha.abs() * (target - h), "... d -> ...", center=False, scale="l2")


_RELEASED = {
    "transformer.wte.weight": "embedding.weight",
    "lm_head.weight": "head.weight",
    "sz": "s_z.weight",
    "query.weight": "query.weight",
    "key.weight": "key.weight",
    "value.weight": "value.weight",
    "att_c_proj.weight": "attention_out.weight",
    "c_fc.weight": "up.weight",
    "mlp_c_proj.weight": "down.weight",
    "attn_alpha": "alpha_attention.weight",
    "mlp_alpha": "alpha_mlp.weight",
    "sqk": "s_qk.weight",
    "suv": "s_uv.weight",
}


def _released_name(name: str) -> str:
    name = name.removeprefix("_orig_mod.")
    block = ""
    if name.startswith("transformer.h."):
        number, name = name.removeprefix("transformer.h.").split(".", 1)
        block = f"blocks.{number}."
    return block + _RELEASED.get(name, name)
