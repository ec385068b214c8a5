"""Group distributionally robust optimization: minimize the loss of the worst group, not of the average.

.. math::
    \\min_\\theta \\max_g L_g(\\theta) = \\min_\\theta \\max_{q \\in \\Delta_m} \\sum_g q_g L_g(\\theta)

Online, with one step of exponentiated gradient ascent on :math:`q` before each step on :math:`\\theta`:

.. math::
    A_g = L_g + \\frac{C_g}{\\sqrt{n_g}}, \\qquad
    q_g \\leftarrow \\frac{q_g\\, e^{\\eta A_g}}{\\sum_h q_h\\, e^{\\eta A_h}}, \\qquad
    \\text{loss} = \\sum_g q_g L_g

:math:`L_g` is the mean loss of the batch's members of group :math:`g` (0 where it has none) and :math:`q` is a constant
for the gradient. The generalization adjustment :math:`C_g / \\sqrt{n_g}` asks more of small groups, whose training loss
says less about their test loss.

Use it when training data come with groups (label x spurious attribute, population, source) and the worst one matters.
It is paired with a group-balanced sampler, :class:`evenly.robust.GroupBalancedSampler`, and with strong regularization
(a large weight decay, or early stopping by the worst group's validation accuracy): a network that fits every training
sample has no loss left to balance. The weights follow the training loss: where the few samples of a small group are
learned by heart its weight falls, and the adjustment, or resampling alone, may serve better (the claim shows a case).

:class:`GroupCVaRLoss` is the greedy variant of the authors' code: the mean loss of the worst share
:math:`\\alpha` of the data, made of whole groups.

References:
    Shiori Sagawa, Pang Wei Koh, Tatsunori B. Hashimoto & Percy Liang, *Distributionally Robust Neural Networks for
    Group Shifts: On the Importance of Regularization for Worst-Case Generalization*, ICLR 2020, arXiv 1911.08731:
    equation 4, algorithm 1, section 3.3 (adjustment); the batch form is that of the authors' code. Two slips of that
    code are not followed: it adds the adjustment to the returned value as well (its gradient is the same), and it drops
    the whole adjustment where one entry of it is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evenly.robust.group_loss import GroupLoss, SampleLoss, check_number

__all__ = ["GroupCVaRLoss", "GroupDROLoss"]


class GroupDROLoss(GroupLoss):
    """The loss of the worst group, by weights that follow the groups' losses.

    Args:
        n_groups: number of groups m.
        group_counts: training samples in each group, (m,) integers; needed by ``adjustment``.
        step_size: :math:`\\eta` of the weights. An attribute, so that a schedule may change it.
        adjustment: :math:`C`, one number or one a group, at least 0; the paper searches 0 to 5.
        normalize_loss: divide the adjusted losses by their sum before the step on the weights, so that it does not
            depend on the scale of the loss; for losses that are not negative. Where all are 0 the weights stay.
        loss: ``"cross_entropy"``, ``"binary_cross_entropy"`` or a function, see :class:`evenly.robust.GroupLoss`.
        gamma, sync, process_group, device, dtype: see :class:`evenly.robust.GroupLoss`.

    Attributes:
        log_q: logarithm of the group weights (m,), kept in the state dict with ``ema`` and ``seen``: weights neither
            underflow nor overflow whatever ``step_size`` is.

    Shape:
        logits (B, C), targets (B,), groups (B,), weights (B,) or None; returns a scalar.

    In training mode each call takes one step on the weights; in eval mode the loss is taken with the weights as they
    are. A step that would leave a weight that is not a number is not taken (the returned loss shows why).

    Raises:
        ValueError: an adjustment without ``group_counts``, negative, or positive for a group of 0 samples; a negative
            step size; else as :class:`evenly.robust.GroupLoss`.
        TypeError: group ids that are not integers.

    >>> loss = GroupDROLoss(2, step_size=1.0)
    >>> losses, groups = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0, 0, 1])
    >>> loss.reduce(losses, groups), loss.q  # q = (e, 1) / (e + 1)
    (tensor(0.7311), tensor([0.7311, 0.2689]))
    >>> logits = torch.randn(3, 5, requires_grad=True)
    >>> loss(logits, torch.tensor([4, 0, 2]), groups).backward()
    """

    log_q: Tensor
    margin: Tensor

    def __init__(
        self,
        n_groups: int,
        group_counts: Sequence[int] | Tensor | None = None,
        step_size: float = 0.01,
        adjustment: float | Sequence[float] | Tensor = 0.0,
        normalize_loss: bool = False,
        loss: str | SampleLoss = "cross_entropy",
        **options: Any,
    ) -> None:
        super().__init__(n_groups, group_counts, loss=loss, **options)
        check_number("step_size", step_size, 0)
        self.step_size = step_size
        self.adjustment = adjustment
        self.normalize_loss = normalize_loss
        self.register_buffer("log_q", torch.full_like(self.ema, -math.log(n_groups)))
        self.register_buffer("margin", _margin(adjustment, self), persistent=False)

    @property
    def q(self) -> Tensor:
        """The group weights (m,): positive, with sum 1."""
        return self.log_q.exp()

    def group_weights(self, mean: Tensor, mass: Tensor) -> Tensor:
        """In training mode one step on the weights; then the weights."""
        if self.training:
            adjusted = mean.to(self.log_q.dtype) + self.margin
            if self.normalize_loss:
                total = adjusted.sum()
                adjusted = adjusted / torch.where(total != 0, total, torch.ones_like(total))
            moved = torch.log_softmax(self.log_q + self.step_size * adjusted, dim=0)
            sound = moved.isfinite().all() & (mass.sum() > 0)
            self.log_q.copy_(torch.where(sound, moved, self.log_q))
        return self.q

    def reset(self) -> None:
        """Forget all state: equal weights."""
        super().reset()
        self.log_q.fill_(-math.log(self.n_groups))

    def extra_repr(self) -> str:
        adjustment = self.adjustment.tolist() if isinstance(self.adjustment, Tensor) else self.adjustment
        return (
            f"{super().extra_repr()}, step_size={self.step_size}, adjustment={adjustment}, "
            f"normalize_loss={self.normalize_loss}"
        )


class GroupCVaRLoss(GroupLoss):
    """The loss of the worst share of the data, made of whole groups (the greedy variant, ``btl`` in the authors' code).

    Groups are ordered by :math:`\\text{ema}_g + C_g / \\sqrt{n_g}`, the worst first, and get the weight
    :math:`(n_g / n) / \\alpha` until the weights add up to 1; the last one gets what is left. With
    ``min_var_weight`` = v the weights become :math:`v\\, n_g / n + (1 - v)\\, w_g`.

    Args:
        n_groups: number of groups m.
        group_counts: training samples in each group, (m,) integers.
        alpha: the share of the data, in (0, 1]; 1 is the mean.
        adjustment: :math:`C`, see :class:`GroupDROLoss`.
        min_var_weight: the least part of its share that a group keeps, in [0, 1].
        loss: see :class:`evenly.robust.GroupLoss`.
        gamma, sync, process_group, device, dtype: see :class:`evenly.robust.GroupLoss`.

    A group that is chosen and absent from the batch contributes 0, so that batches should hold every group:
    :class:`evenly.robust.GroupBalancedSampler` with ``stratified=True``. Groups that were not seen yet count with
    a loss of 0. The authors' code fails at ``alpha=1``; this does not.

    Raises:
        ValueError: settings out of range; else as :class:`GroupDROLoss`.

    >>> loss = GroupCVaRLoss(3, [60, 30, 10], alpha=0.2)
    >>> losses, groups = torch.tensor([0.1, 0.5, 2.0]), torch.tensor([0, 1, 2])
    >>> round(loss.reduce(losses, groups).item(), 4)  # (10 of group 2 and 10 of group 1) / 20
    1.25
    """

    margin: Tensor
    fraction: Tensor

    def __init__(
        self,
        n_groups: int,
        group_counts: Sequence[int] | Tensor,
        alpha: float = 0.2,
        adjustment: float | Sequence[float] | Tensor = 0.0,
        min_var_weight: float = 0.0,
        loss: str | SampleLoss = "cross_entropy",
        **options: Any,
    ) -> None:
        super().__init__(n_groups, group_counts, loss=loss, **options)
        if self.group_counts is None:
            raise ValueError("GroupCVaRLoss needs group_counts, the training samples in each group.")
        check_number("alpha", alpha, 0, 1, least_excluded=True)
        check_number("min_var_weight", min_var_weight, 0, 1)
        self.alpha = alpha
        self.adjustment = adjustment
        self.min_var_weight = min_var_weight
        self.register_buffer("margin", _margin(adjustment, self), persistent=False)
        counts = self.group_counts.to(self.ema.dtype)
        self.register_buffer("fraction", counts / counts.sum(), persistent=False)

    def group_weights(self, mean: Tensor, mass: Tensor) -> Tensor:
        """Fill the share ``alpha`` with groups, the worst first."""
        order = torch.argsort(self.ema + self.margin, descending=True, stable=True)
        fraction = self.fraction[order]
        before = fraction.cumsum(0) - fraction
        filled = torch.minimum(fraction, (self.alpha - before).clamp(min=0)) / self.alpha
        greedy = torch.zeros_like(filled).scatter(0, order, filled)
        return self.min_var_weight * self.fraction + (1 - self.min_var_weight) * greedy

    def extra_repr(self) -> str:
        adjustment = self.adjustment.tolist() if isinstance(self.adjustment, Tensor) else self.adjustment
        return (
            f"{super().extra_repr()}, alpha={self.alpha}, adjustment={adjustment}, min_var_weight={self.min_var_weight}"
        )


def _margin(adjustment: float | Sequence[float] | Tensor, loss: GroupLoss) -> Tensor:
    """C_g / sqrt(n_g), (m,)."""
    c = torch.as_tensor(adjustment, dtype=loss.ema.dtype, device=loss.ema.device).detach()
    if c.ndim > 1 or (c.ndim == 1 and len(c) != loss.n_groups):
        raise ValueError(f"adjustment has shape {tuple(c.shape)}, expected one number or ({loss.n_groups},).")
    if not bool(((c >= 0) & c.isfinite()).all()):
        raise ValueError(f"adjustment={c.tolist()}, expected finite numbers of at least 0.")
    c = c.expand(loss.n_groups)
    if not bool((c > 0).any()):
        return torch.zeros_like(loss.ema)
    if loss.group_counts is None:
        raise ValueError("adjustment needs group_counts, the training samples in each group: C / sqrt(n_g).")
    empty = ((loss.group_counts == 0) & (c > 0)).nonzero()
    if len(empty):
        raise ValueError(f"group_counts[{int(empty[0])}] is 0 and its adjustment is positive: C / sqrt(0). Give it 0.")
    return torch.where(c > 0, c / loss.group_counts.clamp(min=1).to(c.dtype).sqrt(), torch.zeros_like(c))
