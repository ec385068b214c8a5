"""Weight standardization: filters of zero mean and unit variance.

.. math::
    \\hat W_o = \\frac{W_o - \\mu_o}{\\sqrt{\\sigma_o^2 + \\varepsilon}}, \\qquad
    \\mu_o, \\sigma_o^2 \\text{ over all weights of output filter } o.

It smooths the loss of convolutional networks with normalization that does not see the batch: use it with
:class:`~evenly.nn.GroupNorm` where batches are of 1 or 2 images. A normalization must follow, since the scale
of the weights is lost. Do not standardize the last classifier.

Reference:
    Siyuan Qiao, Huiyu Wang, Chenxi Liu, Wei Shen & Alan Yuille, *Micro-Batch Training with Batch-Channel
    Normalization and Weight Standardization*, 2019, arXiv 1903.10520, equation 5. Three forms of the scale are
    in circulation; the default is the paper's, the others are the authors' released code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.utils import parametrize

from evenly.core import normalize

__all__ = ["WSConv2d", "WeightStandardization", "weight_standardization", "weight_standardize_"]

Variant = Literal["paper", "unbiased_inside", "unbiased_outside"]
_VARIANTS = ("paper", "unbiased_inside", "unbiased_outside")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class WeightStandardization(nn.Module):
    """The parametrization ``W ↦ (W - mean) / std``, a mean and std an output filter.

    Args:
        eps: 1e-5.
        variant: ``"paper"``: ``sqrt(biased variance + eps)``; ``"unbiased_inside"``: ``sqrt(unbiased variance +
            eps)``; ``"unbiased_outside"``: ``unbiased std + eps``.
        transposed_groups: for a transposed convolution, whose weight is (in, out / groups, ...), its number of
            groups; ``None`` for weights (out, in, ...).

    Raises:
        ValueError: a filter of one weight, which would be standardized to 0.

    >>> conv = nn.Conv2d(3, 8, 3)
    >>> _ = parametrize.register_parametrization(conv, "weight", WeightStandardization())
    >>> conv.weight.mean(dim=(1, 2, 3)).abs().max().item() < 1e-6
    True
    """

    def __init__(self, eps: float = 1e-5, variant: Variant = "paper", transposed_groups: int | None = None) -> None:
        super().__init__()
        if not eps >= 0:
            raise ValueError(f"eps={eps}, expected a number of at least 0.")
        if variant not in _VARIANTS:
            raise ValueError(f"variant={variant!r} is unknown, expected one of {', '.join(map(repr, _VARIANTS))}.")
        self.eps = eps
        self.variant: Variant = variant
        self.transposed_groups = transposed_groups

    def check(self, weight: Tensor) -> None:
        """Refuse a weight that cannot be standardized."""
        if weight.ndim < 2:
            raise ValueError(f"WeightStandardization expects a weight (out, in, ...), got shape {tuple(weight.shape)}.")
        groups = self.transposed_groups
        filters = weight.shape[0] if groups is None else groups * weight.shape[1]
        if weight.numel() == filters:
            raise ValueError(
                f"A filter of the weight of shape {tuple(weight.shape)} has a single value, which weight "
                f"standardization would turn into 0. Leave this layer out (only=)."
            )

    def forward(self, weight: Tensor) -> Tensor:
        """Standardize a weight of shape (out, in, ...)."""
        self.check(weight)
        groups = self.transposed_groups
        sizes: dict[str, Any] = {} if groups is None else {"g": groups}
        pattern = "o ... -> o" if groups is None else "(g i) o ... -> g o"
        correction = 0 if self.variant == "paper" else 1
        if self.variant != "unbiased_outside":
            return normalize(weight, pattern, eps=self.eps, correction=correction, **sizes)
        centred, stats = normalize(weight, pattern, scale=None, correction=1, return_stats=True, **sizes)
        if groups is None:
            spread = stats.var.sqrt().reshape(-1, *[1] * (weight.ndim - 1))
        else:
            spread = stats.var.sqrt().repeat_interleave(weight.shape[0] // groups, 0)
            spread = spread.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
        return (centred / (spread + self.eps)).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The unconstrained weight for an assigned one: itself."""
        return weight

    def extra_repr(self) -> str:
        return f"eps={self.eps:g}, variant={self.variant!r}"


class WSConv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` with standardized weights; its state dict is that of the plain convolution.

    Args:
        in_channels, out_channels, kernel_size, **options: as ``torch.nn.Conv2d``.
        ws_eps, variant: as ``eps`` and ``variant`` of :class:`WeightStandardization`.

    Raises:
        ValueError: a filter of one weight (a depthwise 1x1 convolution).

    >>> import torch
    >>> conv = WSConv2d(3, 8, 3, padding=1, bias=False)
    >>> conv(torch.randn(2, 3, 6, 6)).shape
    torch.Size([2, 8, 6, 6])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        ws_eps: float = 1e-5,
        variant: Variant = "paper",
        **options: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **options)
        self.standardize = WeightStandardization(ws_eps, variant)
        self.standardize.check(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (N, C, H, W)."""
        return self._conv_forward(x, self.standardize(self.weight), self.bias)


def weight_standardization(
    module: nn.Module, name: str = "weight", eps: float = 1e-5, variant: Variant = "paper"
) -> nn.Module:
    """Standardize one weight of a module, in the idiom of ``torch.nn.utils.parametrizations``; returns the module.

    >>> weight_standardization(nn.Conv1d(4, 8, 3)).weight.shape
    torch.Size([8, 4, 3])
    """
    if _standardized(module, name):
        raise ValueError(f"The {name} of {type(module).__name__} is standardized already.")
    groups = module.groups if isinstance(module, _TRANSPOSED) else None
    parametrization = WeightStandardization(eps, variant, groups)
    parametrization.check(getattr(module, name))  # refuse before anything is changed
    parametrize.register_parametrization(module, name, parametrization)
    return module


def weight_standardize_(
    model: nn.Module,
    eps: float = 1e-5,
    variant: Variant = "paper",
    only: Callable[[str, nn.Module], bool] | Iterable[str] | None = None,
) -> list[str]:
    """Standardize the weights of every convolution of a model, in place.

    Args:
        model: any module.
        eps, variant: as in :class:`WeightStandardization`.
        only: names of modules, or a predicate of name and module; default every convolution whose filters have
            more than one weight.

    Returns:
        The names of the modules that were standardized; those that were before are left as they are.

    Raises:
        ValueError: a name in ``only`` is not a convolution of the model or is standardized already, or nothing was
            found.

    >>> weight_standardize_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    ['0']
    """
    convolutions = {
        name: module for name, module in model.named_modules() if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED))
    }
    if only is None:
        chosen = [name for name, module in convolutions.items() if _fan_in(module) > 1]
        if chosen and all(_standardized(convolutions[name], "weight") for name in chosen):
            return []
        chosen = [name for name in chosen if not _standardized(convolutions[name], "weight")]
    elif callable(only):
        chosen = [name for name, module in convolutions.items() if only(name, module)]
    else:
        chosen = list(only)
        missing = [name for name in chosen if name not in convolutions]
        if missing:
            raise ValueError(f"No convolution is named {missing}; there are {sorted(convolutions)}.")
    if not chosen:
        raise ValueError("The model has no convolution to standardize.")
    for name in chosen:
        weight_standardization(convolutions[name], eps=eps, variant=variant)
    return chosen


def _standardized(module: nn.Module, name: str) -> bool:
    if not parametrize.is_parametrized(module, name):
        return False
    steps = module.parametrizations[name]  # type: ignore[index]
    return any(isinstance(step, WeightStandardization) for step in steps)


def _fan_in(module: nn.Module) -> int:
    assert isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED))
    return module.weight.numel() // module.out_channels
