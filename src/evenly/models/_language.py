"""What the language models share: the checks of token ids, the loss, and sampling with a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from evenly.models.attention import Cache

__all__ = ["LanguageModel"]


class LanguageModel(nn.Module):
    """A network from token ids to logits, position by position.

    Subclasses set ``vocab_size`` and ``block_size`` and write ``hidden_states`` and ``logits``.
    """

    vocab_size: int
    block_size: int

    def hidden_states(
        self, idx: Tensor, mask: Tensor | None, caches: list[Cache | None] | None
    ) -> tuple[Tensor, list[Cache | None]]:
        """The last hidden states of the new positions, and the caches with them."""
        raise TypeError(f"{type(self).__name__} does not say how it computes hidden states")

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states."""
        raise TypeError(f"{type(self).__name__} does not say how it computes logits")

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of the next token at every position, and the mean cross-entropy in nats.

        Args:
            idx: token ids (B, T), T at most ``block_size``.
            targets: the next tokens (B, T); -100 where none is asked for. ``None``: the loss is ``None``.
            mask: (B, T), boolean, false at padding, which no position attends to.

        Raises:
            ValueError: the sequence is longer than ``block_size``; a token id is outside the vocabulary (checked
                where that needs no synchronization: on the CPU, and not while compiling).
        """
        self._check(idx)
        if idx.shape[1] > self.block_size:
            raise ValueError(f"the sequence has {idx.shape[1]} tokens, more than block_size={self.block_size}")
        logits = self.logits(self.hidden_states(idx, mask, None)[0])
        if targets is None:
            return logits, None
        if targets.shape != idx.shape:
            raise ValueError(f"targets have shape {tuple(targets.shape)}, expected that of idx, {tuple(idx.shape)}")
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits, functional.cross_entropy(wide.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue sequences, token by token, in evaluation mode.

        Keys and values of earlier positions are kept, so that a new token costs one position. Past ``block_size`` the
        network sees the last ``block_size`` tokens, which are then computed anew for each token.

        Args:
            idx: token ids to start from (B, T), T at least 1.
            max_new_tokens: how many to add.
            temperature: logits are divided by it; 0 takes the most likely token.
            top_k: draw among so many most likely tokens; ``None`` for all.
            generator: of the random draws.

        Returns:
            Token ids (B, T + max_new_tokens).

        Raises:
            ValueError: an empty start, a negative temperature or number of tokens, ``top_k`` below 1.
        """
        self._check(idx)
        if idx.shape[1] < 1:
            raise ValueError("there is nothing to continue: idx has no tokens")
        if max_new_tokens < 0 or temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(
                f"max_new_tokens={max_new_tokens}, temperature={temperature}, top_k={top_k}: expected numbers of at "
                "least 0, 0 and 1"
            )
        training = self.training
        self.eval()
        try:
            caches: list[Any] | None = None
            for _ in range(max_new_tokens):
                length = idx.shape[1]
                if caches is not None and length <= self.block_size:
                    hidden, caches = self.hidden_states(idx[:, -1:], None, caches)
                else:
                    hidden, caches = self.hidden_states(idx[:, -self.block_size :], None, None)
                logits = self.logits(hidden[:, -1]).float()
                idx = torch.cat((idx, _draw(logits, temperature, top_k, generator)), 1)
        finally:
            self.train(training)
        return idx

    def _check(self, idx: Tensor) -> None:
        if idx.ndim != 2 or idx.is_floating_point():
            raise ValueError(f"idx is {idx.dtype} of shape {tuple(idx.shape)}, expected token ids (batch, length)")
        if idx.device.type == "cpu" and idx.numel() and not torch.compiler.is_compiling():
            low, high = int(idx.min()), int(idx.max())
            if low < 0 or high >= self.vocab_size:
                raise ValueError(f"token ids go from {low} to {high}, expected 0 to {self.vocab_size - 1}")


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
