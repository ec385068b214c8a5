"""The policy-gradient loss that goes with advantages: the clipped surrogate of PPO, and how tokens are averaged.

With the ratio :math:`\\rho = \\exp(\\log \\pi - \\log \\pi_{\\rm old})` of the probabilities of a token under the
policy and under the one that sampled it, the loss of a token is

.. math::
    \\ell = \\max\\big(-A \\rho, -A \\,{\\rm clip}(\\rho, 1 - \\epsilon_{\\rm low}, 1 + \\epsilon_{\\rm high})\\big),

and where A < 0 it is at most :math:`-c A` (dual clip), which bounds the loss of a token whose ratio is large. On the
samples' own policy the ratio is 1 and the gradient is that of :math:`-A \\log \\pi`.

Use it in a training loop of your own; trainers bring theirs.

References:
    Schulman et al., *Proximal Policy Optimization Algorithms*, 2017, arXiv 1707.06347, equation 7. Ye et al.,
    *Mastering Complex Control in MOBA Games with Deep Reinforcement Learning*, AAAI 2020, arXiv 1912.09729 (dual
    clip). The defaults are those of the run script of Xiao et al., *BNPO*, 2025, arXiv 2506.02864.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from evenly.policy._common import positive

__all__ = ["Aggregation", "PolicyLoss", "policy_loss"]

Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]

_AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def policy_loss(
    log_probs: Tensor,
    advantages: Tensor,
    *,
    old_log_probs: Tensor | None = None,
    mask: Tensor | None = None,
    clip: tuple[float, float] | None = (0.2, 0.28),
    dual_clip: float | None = 10.0,
    aggregation: Aggregation = "seq-mean-token-sum",
    length: int | None = None,
) -> Tensor:
    """Clipped surrogate loss of a batch of rollouts.

    Args:
        log_probs: (B, T) log probabilities of the sampled tokens, or (B,) of the sampled actions; with gradient.
        advantages: (B,) or the shape of ``log_probs``. No gradient flows through them.
        old_log_probs: those of the policy that sampled, same shape; default: ``log_probs`` itself (ratio 1).
        mask: boolean (or 0/1) of the same shape: which tokens are the policy's. What stands at the others, NaN
            included, has no effect.
        clip: how far the ratio may be below and above 1; default (0.2, 0.28). ``None``: no clipping at all.
        dual_clip: bound of the ratio where the advantage is negative, above 1; default 10. ``None``: none.
        aggregation: ``"seq-mean-token-sum"`` (default): sum over the tokens of a rollout, mean over rollouts;
            ``"token-mean"``: mean over all tokens; ``"seq-mean-token-mean"``: mean over the tokens of a rollout, then
            over rollouts; ``"seq-mean-token-sum-norm"``: sum over all tokens, divided by rollouts times ``length``
            (Dr. GRPO's, as in TRL; verl, whose names these are, leaves out the number of rollouts here).
        length: the constant number of tokens of ``"seq-mean-token-sum-norm"``; default T.

    Returns:
        A scalar to minimize; 0 for an empty batch. Rollouts without a token count as 0.

    Raises:
        ValueError: shapes do not match, or a setting is out of range.

    >>> log_probs = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    >>> policy_loss(log_probs, torch.tensor([1.0, -1.0])).backward()
    >>> log_probs.grad
    tensor([[-0.5000, -0.5000],
            [ 0.5000,  0.5000]])
    """
    _check(clip, dual_clip, aggregation, length)
    if log_probs.ndim not in (1, 2):
        raise ValueError(f"log_probs has shape {tuple(log_probs.shape)}, expected (rollouts, tokens) or (rollouts,).")
    if advantages.shape != log_probs.shape and advantages.shape != log_probs.shape[:1]:
        raise ValueError(
            f"advantages has shape {tuple(advantages.shape)}, expected ({log_probs.shape[0]},), one for each rollout, "
            f"or that of log_probs, {tuple(log_probs.shape)}."
        )
    for name, other in (("old_log_probs", old_log_probs), ("mask", mask)):
        if other is not None and other.shape != log_probs.shape:
            raise ValueError(
                f"{name} has shape {tuple(other.shape)}, expected that of log_probs, {tuple(log_probs.shape)}."
            )
    advantages = advantages.detach()
    if advantages.ndim < log_probs.ndim:
        advantages = advantages.unsqueeze(1)
    counts = torch.ones_like(log_probs, dtype=torch.bool) if mask is None else mask.bool()
    old = log_probs.detach() if old_log_probs is None else old_log_probs.detach()
    # Masked before the exponential: what stands at masked tokens must not reach the gradient either.
    ratio = torch.where(counts, log_probs - old, log_probs.new_zeros(())).exp()
    advantages = torch.where(counts, advantages, advantages.new_zeros(()))
    loss = -advantages * ratio
    if clip is not None:
        loss = torch.maximum(loss, -advantages * ratio.clamp(1 - clip[0], 1 + clip[1]))
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    if loss.ndim == 1:
        loss, counts = loss.unsqueeze(1), counts.unsqueeze(1)
    return _aggregated(loss, counts, aggregation, length)


class PolicyLoss(nn.Module):
    """:func:`policy_loss` as a module; the arguments are those of the function.

    >>> PolicyLoss(aggregation="token-mean")(torch.tensor([[-1.0, -2.0]]), torch.tensor([2.0]))
    tensor(-2.)
    """

    def __init__(
        self,
        *,
        clip: tuple[float, float] | None = (0.2, 0.28),
        dual_clip: float | None = 10.0,
        aggregation: Aggregation = "seq-mean-token-sum",
        length: int | None = None,
    ) -> None:
        super().__init__()
        _check(clip, dual_clip, aggregation, length)
        self.clip, self.dual_clip, self.length = clip, dual_clip, length
        self.aggregation: Aggregation = aggregation

    def forward(
        self, log_probs: Tensor, advantages: Tensor, old_log_probs: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The loss; see :func:`policy_loss`."""
        return policy_loss(
            log_probs,
            advantages,
            old_log_probs=old_log_probs,
            mask=mask,
            clip=self.clip,
            dual_clip=self.dual_clip,
            aggregation=self.aggregation,
            length=self.length,
        )

    def extra_repr(self) -> str:
        """The settings."""
        text = f"clip={self.clip}, dual_clip={self.dual_clip}, aggregation={self.aggregation!r}"
        return text + (f", length={self.length}" if self.length is not None else "")


def _check(clip: tuple[float, float] | None, dual_clip: float | None, aggregation: str, length: int | None) -> None:
    if clip is not None:
        if not isinstance(clip, tuple | list) or len(clip) != 2:
            raise ValueError(f"clip={clip!r}, expected two numbers, how far the ratio may be below and above 1.")
        positive("clip[0]", clip[0], below=1)
        positive("clip[1]", clip[1])
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip={dual_clip}, expected a number above 1, or None.")
    if aggregation not in _AGGREGATIONS:
        raise ValueError(f"aggregation={aggregation!r}, expected one of {', '.join(map(repr, _AGGREGATIONS))}.")
    if length is not None and (aggregation != "seq-mean-token-sum-norm" or length < 1):
        raise ValueError(
            f"length={length} with aggregation={aggregation!r}, expected a whole number of at least 1, and only with "
            f"'seq-mean-token-sum-norm'."
        )


def _aggregated(loss: Tensor, counts: Tensor, aggregation: str, length: int | None) -> Tensor:
    # Tokens that do not count are 0 in the loss already.
    rollouts = max(loss.shape[0], 1)
    if aggregation == "token-mean":
        return loss.sum() / counts.sum().clamp(min=1)
    if aggregation == "seq-mean-token-sum":
        return loss.sum() / rollouts
    if aggregation == "seq-mean-token-mean":
        return (loss.sum(1) / counts.sum(1).clamp(min=1)).sum() / rollouts
    return loss.sum() / (rollouts * max(loss.shape[1] if length is None else length, 1))
