"""The objective of PHI-S: a student learns the standardized features of several teachers.

For teachers t with fixed standardizers :math:`S_t`, weights :math:`w_t` and the student's heads :math:`h_t`,

.. math::  L = \\sum_t w_t \\; \\mathrm{mean}\\; \\ell\\big(h_t(x), S_t(z_t(x))\\big).

Each teacher's targets have the same variance, so that none is learnt at the cost of another only because its numbers
are large. The heads live in the standardized space; fold the inverse into their last layer when training is done
(:meth:`evenly.stats.Standardize.fold_inverse_`).

Reference:
    M. Ranzinger et al., *PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation*, ICLR 2025,
    arXiv 2410.01680, section 3 (mean squared error on patch tokens, cosine on summary tokens) and the compared losses
    (smooth L1, cosine, and 0.9 cosine + 0.1 smooth L1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from evenly.stats.phi_s import PHIStandardizer
from evenly.stats.standardize import Standardize

__all__ = ["MultiTeacherLoss"]

Kind = Literal["mse", "smooth_l1", "cosine", "hybrid"]
_KINDS = ("mse", "smooth_l1", "cosine", "hybrid")


class MultiTeacherLoss(nn.Module):
    """The weighted sum over teachers of the loss between a student's heads and standardized targets.

    Args:
        standardizers: by teacher, a fitted :class:`PHIStandardizer` or a :class:`Standardize`. Fixed.
        weights: by teacher, at least 0. Default: 1 each.
        kind: of all, or by teacher: ``"mse"``, mean over channels of the squared error; ``"smooth_l1"``, Huber's with
            transition ``beta``, divided by it (as ``torch.nn.SmoothL1Loss``); ``"cosine"``, 1 - cosine; ``"hybrid"``,
            ``cosine_weight`` · cosine + (1 - ``cosine_weight``) · smooth L1.
        beta: where smooth L1 turns from square to linear, in standard deviations.
        cosine_weight: in [0, 1].

    Shape:
        outputs and targets: mappings from each teacher's name to a tensor of one shape, with the features where the
        standardizer has them. Result: a scalar.

    Raises:
        ValueError: no teacher, a bad setting, names or shapes that do not match.

    Reference:
        arXiv 2410.01680, section 3.

    >>> teachers = {"small": torch.randn(50, 4) * 0.01, "large": torch.randn(50, 8) * 100}
    >>> loss = MultiTeacherLoss({name: PHIStandardizer().fit(z) for name, z in teachers.items()})
    >>> outputs = {name: torch.zeros_like(z) for name, z in teachers.items()}
    >>> {name: round(each.mean().item(), 2) for name, each in loss.each(outputs, teachers).items()}
    {'small': 0.98, 'large': 0.98}
    """

    def __init__(
        self,
        standardizers: Mapping[str, PHIStandardizer | Standardize],
        weights: Mapping[str, float] | None = None,
        kind: Kind | Mapping[str, Kind] = "mse",
        *,
        beta: float = 1.0,
        cosine_weight: float = 0.9,
    ) -> None:
        super().__init__()
        if not standardizers:
            raise ValueError("standardizers is empty, expected one for each teacher.")
        names = list(standardizers)
        bad = [name for name in names if not name or "." in name]
        if bad:
            raise ValueError(f"{bad[0]!r} is no name of a submodule: expected text without a full stop.")
        self.standardizers = nn.ModuleDict(
            {n: s.to_layer() if isinstance(s, PHIStandardizer) else s for n, s in standardizers.items()}
        )
        self.weights = dict.fromkeys(names, 1.0) if weights is None else _by_teacher("weights", weights, names)
        self.kind = dict.fromkeys(names, kind) if isinstance(kind, str) else _by_teacher("kind", kind, names)
        for name in names:
            if not 0 <= self.weights[name] < float("inf"):
                raise ValueError(f"weights[{name!r}]={self.weights[name]}, expected a finite number of at least 0.")
            if self.kind[name] not in _KINDS:
                raise ValueError(
                    f"kind={self.kind[name]!r} is unknown, expected one of {', '.join(map(repr, _KINDS))}."
                )
        if not beta > 0:
            raise ValueError(f"beta={beta}, expected a number above 0.")
        if not 0 <= cosine_weight <= 1:
            raise ValueError(f"cosine_weight={cosine_weight} is outside [0, 1].")
        self.beta = beta
        self.cosine_weight = cosine_weight

    def forward(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
        """The loss. ``targets`` are the teachers' raw features; no gradient flows to them."""
        each = self.each(outputs, targets)
        return torch.stack([self.weights[name] * value.mean() for name, value in each.items()]).sum()

    def each(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By teacher, the loss at each position (the shape of its features without their axis), not weighted."""
        for what, given in (("outputs", outputs), ("targets", targets)):
            if set(given) != set(self.standardizers):
                raise ValueError(f"{what} has teachers {sorted(given)}, expected {sorted(self.standardizers)}.")
        losses = {}
        for name, module in self.standardizers.items():
            assert isinstance(module, Standardize)
            y, z = outputs[name], targets[name]
            if y.shape != z.shape:
                raise ValueError(f"{name!r}: outputs have shape {tuple(y.shape)} and targets {tuple(z.shape)}.")
            with torch.no_grad():
                z = module(z)
            losses[name] = self._loss(self.kind[name], y, z.to(y.dtype), module.channel_dim)
        return losses

    def extra_repr(self) -> str:
        return f"kind={self.kind}, weights={self.weights}"

    def _loss(self, kind: str, y: Tensor, z: Tensor, axis: int) -> Tensor:
        if kind == "mse":
            return (y - z).square().mean(axis)
        cosine = (
            1 - nn.functional.cosine_similarity(y, z, dim=axis) if kind in ("cosine", "hybrid") else y.new_zeros(())
        )
        if kind == "cosine":
            return cosine
        smooth = nn.functional.smooth_l1_loss(y, z, beta=self.beta, reduction="none").mean(axis)
        return smooth if kind == "smooth_l1" else self.cosine_weight * cosine + (1 - self.cosine_weight) * smooth


def _by_teacher(what: str, given: Mapping, names: list[str]) -> dict:
    if set(given) != set(names):
        raise ValueError(f"{what} is for teachers {sorted(given)}, expected {sorted(names)}.")
    return dict(given)
