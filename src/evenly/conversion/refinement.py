"""Refinement: a few steps of self-distillation, without labels.

The converted network learns to give what the original gives on the same inputs:

.. math::
    \\mathcal L = T^2\\, \\mathrm{KL}\\big(p_T^{\\text{orig}} \\| p_T\\big)
        + \\frac{\\lVert y - y^{\\text{orig}} \\rVert^2}{\\lVert y^{\\text{orig}} - \\bar y^{\\text{orig}} \\rVert^2}
        + \\frac{\\phi}{L} \\sum_l \\frac{\\lVert h_l - h_l^{\\text{orig}} \\rVert^2}
                                      {\\lVert h_l^{\\text{orig}} - \\bar h_l^{\\text{orig}} \\rVert^2},

with the outputs :math:`y` and the outputs :math:`h_l` of the converted layers. Both networks run in evaluation
mode. Inputs are mixed in pairs (Zhang et al., *mixup*, ICLR 2018, arXiv 1710.09412), which the original network
labels as well as any others: without it a thousand images are soon learned by heart, and the network gets worse.

Reference:
    Geoffrey Hinton, Oriol Vinyals & Jeff Dean, *Distilling the Knowledge in a Neural Network*, 2015,
    arXiv 1503.02531; the layer terms follow Romero et al., *FitNets*, ICLR 2015, arXiv 1412.6550.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evenly.conversion.batches import Batches, Inputs, first_output

__all__ = ["Refinement"]


@dataclass
class Refinement:
    """Settings of ``refine=``; an integer there means that many steps with these defaults.

    Attributes:
        steps: optimizer steps, each on one batch.
        lr: peak learning rate of Adam; falls to 0 along a cosine after a short warm-up. Instance
            normalization, which has the furthest to go, takes 1e-2.
        parameters: ``"all"``, ``"norm"`` (those of the converted layers), or names of parameters (patterns such as
            ``"layer4.*"`` too). Parameters that do not require gradients are refined too, and stay so marked.
        features: weight of the layer-wise term; 0 for outputs alone.
        temperature: of the softmax in the KL term, which is used where the output is (N, classes).
        mixup: mix floating-point inputs in pairs.
        batches: other data than those of ``calibrate=``.
        samples: at most this many samples of ``batches``.
        seed: of the mixing.
    """

    steps: int = 200
    lr: float = 3e-3
    parameters: Literal["all", "norm"] | Sequence[str] = "all"
    features: float = 0.3
    temperature: float = 2.0
    mixup: bool = True
    batches: Any = None
    samples: int | None = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1.")
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr} must be positive.")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive.")
        if self.features < 0:
            raise ValueError(f"features={self.features} must not be negative.")


def chosen_parameters(
    model: nn.Module, layers: Sequence[nn.Module], which: Literal["all", "norm"] | Sequence[str]
) -> list[nn.Parameter]:
    """The parameters that are refined; an error that lists the names where none matches."""
    named = dict(model.named_parameters())
    if which == "all":
        chosen = list(named.values())
    elif which == "norm":
        chosen = list({id(p): p for layer in layers for p in layer.parameters()}.values())
    else:
        patterns = [which] if isinstance(which, str) else list(which)
        chosen = []
        for name, p in named.items():
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                chosen.append(p)
        if not chosen:
            raise ValueError(
                f"Refinement: no parameter matches {patterns}; the parameters are {', '.join(list(named)[:40])}."
            )
    chosen = [p for p in chosen if p.is_floating_point()]
    if not chosen:
        raise ValueError(f"Refinement: parameters={which!r} leaves nothing to train.")
    return chosen


@torch.enable_grad()
def refine(
    original: nn.Module,
    model: nn.Module,
    pairs: Sequence[tuple[nn.Module, nn.Module]],
    batches: Batches,
    settings: Refinement,
    advance: Callable[[str], None],
) -> tuple[float, float]:
    """Train ``model`` towards ``original``; the loss of the first and of the last steps.

    ``pairs`` are the (original, converted) layers of the layer-wise term.
    """
    chosen = chosen_parameters(model, [new for _, new in pairs], settings.parameters)
    flags = {p: p.requires_grad for p in model.parameters()}
    mine = {id(p) for p in chosen}
    for p in flags:
        p.requires_grad_(id(p) in mine)
    optimizer = torch.optim.Adam(chosen, lr=settings.lr)
    warmup = max(1, settings.steps // 20)

    def schedule(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    generator = torch.Generator().manual_seed(settings.seed)
    losses: list[float] = []
    try:
        for step, inputs in enumerate(_forever(batches)):
            if step == settings.steps:
                break
            if settings.mixup:
                inputs = _mix(inputs, generator)
            loss = _loss(original, model, pairs, inputs, settings)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(chosen, 5.0)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"Refinement: the loss is {value} at step {step}; lower lr (now {settings.lr})."
                )
            optimizer.step()
            scheduler.step()
            losses.append(value)
            advance(f"refine, loss {value:.4f}")
    finally:
        for p, flag in flags.items():
            p.grad = None
            p.requires_grad_(flag)
    tail = losses[-max(1, len(losses) // 10) :]
    return losses[0], sum(tail) / len(tail)


def _loss(
    original: nn.Module,
    model: nn.Module,
    pairs: Sequence[tuple[nn.Module, nn.Module]],
    inputs: Inputs,
    settings: Refinement,
) -> Tensor:
    use = pairs if settings.features > 0 else ()
    with torch.no_grad():
        wanted, outer = _run(original, [a for a, _ in use], inputs)
    given, inner = _run(model, [b for _, b in use], inputs)
    loss = _relative(given, wanted)
    if wanted.ndim == 2 and wanted.shape[1] > 1:
        t = settings.temperature
        divergence = F.kl_div(
            F.log_softmax(given.float() / t, -1),
            F.log_softmax(wanted.float() / t, -1),
            reduction="batchmean",
            log_target=True,
        )
        loss = loss + t * t * divergence
    if inner:
        terms = [_relative(b, a) for a, b in zip(outer, inner, strict=True)]
        loss = loss + settings.features * torch.stack(terms).mean()
    return loss


def _relative(given: Tensor, wanted: Tensor) -> Tensor:
    given, wanted = given.float(), wanted.float()
    spread = (wanted - wanted.mean(0, keepdim=True)).square().mean()
    return (given - wanted).square().mean() / spread.clamp(min=1e-12)


def _run(model: nn.Module, layers: Sequence[nn.Module], inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        seen.append(out.clone())

    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        out = first_output(model(*inputs[0], **inputs[1]))
    finally:
        for handle in handles:
            handle.remove()
    return out, seen


def _forever(batches: Batches) -> Iterator[Inputs]:
    while True:
        yield from batches


def _mix(inputs: Inputs, generator: torch.Generator) -> Inputs:
    """Mix a lone floating-point input with itself in another order; anything else is left alone."""
    args, kwargs = inputs
    if kwargs or len(args) != 1 or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
        return inputs
    x = args[0]
    if x.ndim == 0 or len(x) < 2:
        return inputs
    order = torch.randperm(len(x), generator=generator).to(x.device)
    share = torch.rand(len(x), generator=generator).to(x).view(-1, *([1] * (x.ndim - 1)))
    # Half of the samples stay as they are.
    share = torch.where(share < 0.5, torch.ones_like(share), share)
    return (share * x + (1 - share) * x[order],), kwargs
