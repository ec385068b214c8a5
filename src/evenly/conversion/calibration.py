"""Calibration: each new layer, and each linear map after it, against the original network at that place.

Layers are visited in the order in which they run. The input of each comes from the network converted so far, its
target from the original network on the same batch, so that an error made early is seen, and corrected, by every
later layer instead of piling up. At a normalization that follows a linear map, the map's weights are solved first
against the *standardized* original pre-activation: every channel then enters the new layer with mean 0 and
variance 1, whatever its scale was, and a statistic shared by channels is not ruled by the largest of them. Then
scale and shift of the new layer are solved channel by channel. The cost is two forward passes up to the layer, of
both networks, for each layer that is solved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from evenly.conversion.batches import Batches, Inputs
from evenly.conversion.linear import ChannelFit, WeightFit, patch_features, scale_outputs
from evenly.conversion.report import Row
from evenly.conversion.sources import Source, bare

__all__ = ["Calibration", "Site"]


@dataclass
class Calibration:
    """Settings of the calibration; plain batches in ``calibrate=`` mean these defaults.

    Attributes:
        batches: an iterable of unlabelled batches that can be walked several times (a ``DataLoader``, a list).
        samples: at most this many samples a pass; ``None`` for all.
        weights: which convolutions and linear layers are solved again: ``"all"`` from the first new layer on,
            ``"last"`` (the classifier), or ``"none"``, where only normalization layers change.
        max_features: a layer with more inputs an output than this has a scale and shift a channel solved in place
            of its weights; memory grows with the square.
    """

    batches: Any
    samples: int | None = 1000
    weights: Literal["all", "last", "none"] = "all"
    max_features: int = 4608

    def __post_init__(self) -> None:
        if self.weights not in ("all", "last", "none"):
            raise ValueError(f"weights={self.weights!r}, expected 'all', 'last' or 'none'.")
        if self.max_features < 0:
            raise ValueError(f"max_features={self.max_features} must not be negative.")


@dataclass
class Site:
    """A layer of the converted network, its counterpart in the original, and what is done there."""

    module: nn.Module
    original: nn.Module
    calls: int
    source: Source | None = None
    row: Row | None = None
    #: of a linear map whose only reader is a converted layer with constant statistics: (mean, scale)
    standard: tuple[Tensor, Tensor] | None = None
    name: str = ""


class _Stop(BaseException):
    """Ends a forward pass early."""


@dataclass
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Tensor

    @property
    def x(self) -> Tensor:
        return self.args[0] if self.args else next(iter(self.kwargs.values()))

    def extra(self, position: int, name: str) -> Tensor | None:
        value = self.args[position] if len(self.args) > position else self.kwargs.get(name)
        return value if isinstance(value, Tensor) else None


@torch.no_grad()
def _watch(model: nn.Module, module: nn.Module, expected: int, inputs: Inputs) -> list[_Call]:
    """The calls of one layer in a forward pass, which ends with the last of them."""
    calls: list[_Call] = []

    def hook(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if not isinstance(out, Tensor):
            raise TypeError(f"{type(module).__name__} returned {type(out).__name__}, expected a tensor.")
        # An in-place activation after the layer must not change what is kept here.
        calls.append(_Call(args, kwargs, out if len(calls) + 1 == expected else out.clone()))
        if len(calls) == expected:
            raise _Stop

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        model(*inputs[0], **inputs[1])
    except _Stop:
        pass
    finally:
        handle.remove()
    return calls


def _pairs(original: nn.Module, model: nn.Module, site: Site, batches: Batches) -> Iterator[tuple[_Call, _Call]]:
    for inputs in batches:
        wanted = _watch(original, site.original, site.calls, inputs)
        given = _watch(model, site.module, site.calls, inputs)
        if len(wanted) != len(given):
            raise RuntimeError(
                f"{site.name!r} ran {len(wanted)} times in the original network and {len(given)} times in the "
                f"converted one on the same batch; leave it out with only=."
            )
        yield from zip(wanted, given, strict=True)


def calibrate(
    original: nn.Module,
    model: nn.Module,
    sites: Iterable[Site],
    batches: Batches,
    settings: Calibration,
    advance: Callable[[str], None],
) -> list[str]:
    """Solve the sites in order; the names of the linear maps whose weights were changed."""
    solved = []
    for site in sites:
        advance(site.name)
        if site.source is not None:
            _fit_norm(original, model, site, batches)
        elif _fit_linear(original, model, site, batches, settings):
            solved.append(site.name)
    return solved


def _fit_linear(original: nn.Module, model: nn.Module, site: Site, batches: Batches, settings: Calibration) -> bool:
    module: Any = site.module
    dim = -1 if isinstance(module, nn.Linear) else -(len(module.kernel_size) + 1)
    if site.standard is not None:
        mean, scale = site.standard
        scale_outputs(module, scale, -mean * scale)
    features = patch_features(module)
    whole = features is not None and features <= settings.max_features
    weights = WeightFit(module) if whole else None
    channels = None if whole else ChannelFit(dim)
    for wanted, given in _pairs(original, model, site, batches):
        target = wanted.out
        if site.standard is not None:
            shape = [1] * target.ndim
            shape[dim] = -1
            wide = target.double() if target.dtype == torch.double else target.float()
            mean, scale = (s.to(wide.dtype).view(shape) for s in site.standard)
            target = (wide - mean) * scale
        if weights is not None:
            weights.update(given.x, target, given.out)
        elif channels is not None:
            channels.update(given.out, target)
    if weights is not None:
        return weights.solve() != float("inf") or site.standard is not None
    assert channels is not None
    ones = torch.ones_like(channels.means()[0])
    scale, shift = channels.solve(ones)
    scale_outputs(module, scale, shift)
    return True


def _fit_norm(original: nn.Module, model: nn.Module, site: Site, batches: Batches) -> None:
    module: Any = site.module
    source, row = site.source, site.row
    assert source is not None and row is not None
    if isinstance(getattr(module, "running_mean", None), Tensor) and module.running_mean.numel() == source.num_features:
        _estimate_statistics(original, model, site, batches)
        row.statistics = "estimated"
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    count = source.num_features
    fit_weight = isinstance(weight, Tensor) and weight.numel() in (1, count)
    fit_bias = isinstance(bias, Tensor) and bias.numel() == count
    carried = torch.ones((), dtype=torch.float64)
    if isinstance(weight, Tensor) and fit_weight:
        carried = weight.detach().double().reshape(-1) if weight.numel() == count else weight.detach().double()
        weight.data.fill_(1)
    if isinstance(bias, Tensor) and fit_bias:
        bias.data.zero_()
    fit = ChannelFit(source.channel_dim)
    try:
        for wanted, given in _pairs(original, model, site, batches):
            target = _plain(site.original, wanted)
            skip, kept = given.extra(1, "residual"), wanted.extra(1, "residual")
            if skip is not None and kept is not None:  # the layer can also mend what the residual path has wrong
                target = target + (kept - skip)
            fit.update(_plain(module, given), target)
    except BaseException:
        if isinstance(weight, Tensor) and fit_weight:
            weight.data.copy_(carried.reshape(weight.shape))
        raise
    ones = torch.ones(count, dtype=torch.float64, device=fit.means()[0].device)
    scale, shift = ones, torch.zeros_like(ones)
    if isinstance(weight, Tensor) and fit_weight:
        carried = carried.to(ones.device)
        scale, shift = fit.solve(carried, scalar=weight.numel() == 1 and count > 1, shift=fit_bias)
        weight.data.copy_(scale.reshape(weight.shape))
    elif fit_bias:
        shift = fit.means()[1] - fit.means()[0]
    if isinstance(bias, Tensor) and fit_bias:
        bias.data.copy_(shift.reshape(bias.shape))
    else:
        shift = torch.zeros_like(ones)
    row.r2 = fit.r_squared(scale, shift)


def _plain(module: nn.Module, call: _Call) -> Tensor:
    """The output of a layer before its fused residual and activation."""
    if getattr(module, "activation", None) is None and call.extra(1, "residual") is None:
        return call.out
    mask = call.extra(2, "mask")
    with torch.no_grad(), bare(module):
        forward: Any = module.forward
        return forward(call.x) if mask is None else forward(call.x, mask=mask)


def _estimate_statistics(original: nn.Module, model: nn.Module, site: Site, batches: Batches) -> None:
    module: Any = site.module
    assert site.source is not None
    stats = ChannelFit(site.source.channel_dim)
    for _, given in _pairs(original, model, site, batches):
        stats.update(given.x, given.x)
    module.running_mean.copy_(stats.means()[0])
    if isinstance(module.running_var, Tensor):
        module.running_var.copy_(stats.variance(correction=1))
