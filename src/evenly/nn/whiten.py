"""Whitening as a layer: batch normalization to second order.

.. math::  y = \\gamma \\odot W_g (x - \\mu_g) + \\beta, \\qquad W_g \\Sigma_g W_g^T = I,

where :math:`\\Sigma_g` is the covariance of the channels of group :math:`g` over the batch. Running averages
of mean and covariance serve evaluation. Group sizes of 16 to 64 are usual: the covariance of a group must be
estimated from the batch, and its root costs O(size³).

References:
    Lei Huang et al., *Decorrelated Batch Normalization*, CVPR 2018, arXiv 1804.08450.
    Lei Huang et al., *Iterative Normalization*, CVPR 2019, arXiv 1904.03441, algorithm 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from evenly.core import covariance, whiten
from evenly.core.whiten import Method, _check_method
from evenly.nn.norm import check_axis, check_positive

__all__ = ["Whiten"]


class Whiten(nn.Module):
    """Whiten channels of inputs (N, C, ...) within groups, over the batch.

    Args:
        num_features: C.
        group_size: channels that are decorrelated together; divides C. Default: all.
        method: ``"newton"`` (matrix products only), ``"zca"``, ``"cholesky"`` or ``"pca"``.
        iterations: Newton–Schulz steps.
        eps: added to the diagonal of the covariance.
        shrinkage: weight in [0, 1] of the isotropic covariance.
        momentum: weight of the new value in the running averages.
        affine: learn weight and bias, one a channel.
        device, dtype: of parameters and buffers.

    Raises:
        ValueError: ``group_size`` does not divide C; fewer than 2 values a channel in training; bad settings.

    >>> layer = Whiten(6, group_size=3, method="zca")
    >>> y = layer(torch.randn(64, 6, 4, 4)).movedim(1, -1).reshape(-1, 6)
    >>> torch.allclose(torch.cov(y[:, :3].T), torch.eye(3), atol=1e-2)
    True
    """

    running_mean: Tensor
    running_cov: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        group_size: int | None = None,
        method: Method = "newton",
        *,
        iterations: int = 5,
        eps: float = 1e-5,
        shrinkage: float = 0.0,
        momentum: float = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        size = num_features if group_size is None else group_size
        check_positive(type(self).__name__, num_features=num_features, group_size=size)
        if num_features % size:
            raise ValueError(f"group_size={size} does not divide num_features={num_features}.")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum} is outside [0, 1]; it is the weight of the new value.")
        _check_method(method, shrinkage, eps, iterations)
        self.num_features = num_features
        self.group_size = size
        self.method: Method = method
        self.iterations = iterations
        self.eps = eps
        self.shrinkage = shrinkage
        self.momentum = momentum
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(num_features, **options)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features, **options)) if affine else None
        groups = num_features // size
        self.register_buffer("running_mean", torch.zeros(groups, size, **options))
        self.register_buffer("running_cov", torch.eye(size, **options).repeat(groups, 1, 1))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Whiten ``x`` of shape (N, C, ...)."""
        check_axis(x, 1, self.num_features, "Whiten")
        pattern, groups = "n (g c) ... -> g c", self.num_features // self.group_size
        if self.training:
            if x.numel() <= self.num_features:
                raise ValueError(
                    f"Whiten needs more than 1 value per channel in training, got an input of shape {tuple(x.shape)}."
                )
            stats = covariance(x, pattern, g=groups)
            with torch.no_grad():
                unbiased = stats.cov * (stats.count / (stats.count - 1))[..., None, None]
                self.running_mean.lerp_(stats.mean.to(self.running_mean.dtype), self.momentum)
                self.running_cov.lerp_(unbiased.to(self.running_cov.dtype), self.momentum)
                self.num_batches_tracked.add_(1)
            given = (stats.mean, stats.cov)
        else:
            given = (self.running_mean, self.running_cov)
        return whiten(
            x,
            pattern,
            method=self.method,
            shrinkage=self.shrinkage,
            eps=self.eps,
            iterations=self.iterations,
            weight=self.weight,
            bias=self.bias,
            stats=given,
            g=groups,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, group_size={self.group_size}, method={self.method!r}, eps={self.eps:g}, "
            f"shrinkage={self.shrinkage:g}, momentum={self.momentum}"
        )
