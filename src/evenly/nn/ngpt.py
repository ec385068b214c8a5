"""The parts of nGPT: matrices whose vectors have length 1, and scales with a learning rate of their own.

In a normalized Transformer every vector along the model's axis has unit length: hidden states, embeddings, and the
rows or columns of all matrices. After each optimizer step,

.. math::  w \\leftarrow w / \\lVert w \\rVert_2 \\quad \\text{for every vector } w \\text{ along } d_{model},

with no gradient through it, and what lengths would say is said by learned scales, stored as :math:`\\hat s` and used
as :math:`s = \\hat s\\, s_{init} / s_{scale}` with :math:`\\hat s = s_{scale}` at first, so that Adam's step on
:math:`s` is its learning rate times :math:`s_{init} / s_{scale}`.

Use the parts for matrices of your own; the whole network is :class:`evenly.models.NGPT`.

Reference:
    Ilya Loshchilov, Cheng-Ping Hsieh, Simeng Sun & Boris Ginsburg, *nGPT: Normalized Transformer with Representation
    Learning on the Hypersphere*, ICLR 2025, arXiv 2410.01131, sections 2.1 to 2.6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evenly.core import normalize
from evenly.core.kernels.reference import accumulate_dtype
from evenly.nn.norm import check_positive

__all__ = ["NormalizedEmbedding", "NormalizedLinear", "ProjectedOptimizer", "ScaledParameter", "project_"]

_EPS = 1e-12  # the least length to divide by: a vector of zeros stays zero


class NormalizedLinear(nn.Linear):
    """A linear layer whose weight vectors along one axis have length 1.

    Directions are drawn uniformly on the sphere. :meth:`project_` restores the lengths after a step of an optimizer
    (see :class:`ProjectedOptimizer`); a state dict that is loaded is projected too.

    Args:
        in_features, out_features: sizes.
        bias: learn a bias, which is not projected.
        norm_dim: the axis of ``weight`` (out_features, in_features) along which vectors have length 1, always that
            of the model's features: 1 (rows) for matrices that read the hidden state, 0 (columns) for those that
            write it.
        device, dtype: of the parameters.

    Raises:
        ValueError: ``norm_dim`` is not 0 or 1; a size is not positive.

    >>> layer = NormalizedLinear(8, 32)
    >>> torch.allclose(layer.weight.norm(dim=1), torch.ones(32))
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        norm_dim: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(type(self).__name__, in_features=in_features, out_features=out_features)
        if norm_dim not in (0, 1):
            raise ValueError(f"norm_dim={norm_dim}, expected 1 (rows have length 1) or 0 (columns have).")
        self.norm_dim = norm_dim
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw new directions; the bias becomes 0."""
        nn.init.normal_(self.weight)
        self.project_()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def project_(self) -> NormalizedLinear:
        """Scale every vector to length 1, in float32; returns the layer."""
        _project(self.weight, self.norm_dim)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        _project_loaded(self.weight, self.norm_dim)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, norm_dim={self.norm_dim}"


class NormalizedEmbedding(nn.Embedding):
    """An embedding whose vectors have length 1; :meth:`project_` restores that, as in :class:`NormalizedLinear`.

    Args:
        num_embeddings, embedding_dim: sizes.
        device, dtype: of the weight.

    Raises:
        ValueError: a size is not positive.

    >>> vectors = NormalizedEmbedding(10, 4)(torch.tensor([3, 7]))
    >>> torch.allclose(vectors.norm(dim=-1), torch.ones(2))
    True
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(type(self).__name__, num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw new directions."""
        nn.init.normal_(self.weight)
        self.project_()

    def project_(self) -> NormalizedEmbedding:
        """Scale every vector to length 1, in float32; returns the layer."""
        _project(self.weight, 1)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        _project_loaded(self.weight, 1)


class ScaledParameter(nn.Module):
    """A learned scale that an optimizer moves faster or slower than its other parameters.

    ``weight`` is stored as ``scale`` and used as ``weight * (init / scale)``: initially ``init``. Adam with learning
    rate lr then moves the effective value by about ``lr * init / scale`` a step.

    Args:
        shape: of the parameter.
        init: initial effective value.
        scale: initial stored value.
        device, dtype: of the parameter.

    Raises:
        ValueError: ``init`` or ``scale`` is not finite, or ``scale`` is 0.

    >>> ScaledParameter(3, init=0.05, scale=0.5)()
    tensor([0.0500, 0.0500, 0.0500], grad_fn=<MulBackward0>)
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        init: float = 1.0,
        scale: float = 1.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not math.isfinite(init):
            raise ValueError(f"init={init} is not finite.")
        if not math.isfinite(scale) or scale == 0:
            raise ValueError(f"scale={scale}, expected a finite number other than 0.")
        self.init = init
        self.scale = scale
        size = (shape,) if isinstance(shape, int) else tuple(shape)
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the effective value to ``init``."""
        nn.init.constant_(self.weight, self.scale)

    def forward(self) -> Tensor:
        """The effective value, of the shape of the parameter."""
        return self.weight * (self.init / self.scale)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, init={self.init:g}, scale={self.scale:g}"


def project_(model: nn.Module) -> nn.Module:
    """Project every :class:`NormalizedLinear` and :class:`NormalizedEmbedding` of a model; returns the model.

    Raises:
        ValueError: the model has none.

    >>> layer = NormalizedLinear(8, 4)
    >>> _ = layer.weight.data.mul_(3)
    >>> torch.allclose(project_(nn.Sequential(layer))[0].weight.norm(dim=1), torch.ones(4))
    True
    """
    for layer in _projected(model):
        layer.project_()
    return model


class ProjectedOptimizer(torch.optim.Optimizer):
    """Any optimizer, followed by the projection of the model's matrices after each step.

    It shares parameter groups and state with the optimizer that it wraps, so learning-rate schedulers, ``state_dict``
    and ``zero_grad`` work on it, and state dicts are those of the wrapped one. Adam's moments are not projected.
    Gradients are clipped before the step, as with any optimizer.

    Args:
        optimizer: what makes the steps. The paper's: ``AdamW`` with ``betas=(0.9, 0.95)`` and no weight decay; a
            decay of vectors that are rescaled to length 1 would only change the effective learning rate.
        model: what is projected: all its :class:`NormalizedLinear` and :class:`NormalizedEmbedding` layers.

    Raises:
        TypeError: ``optimizer`` is no ``torch.optim.Optimizer``.
        ValueError: the model has no such layer.

    >>> layer = NormalizedLinear(8, 4)
    >>> optimizer = ProjectedOptimizer(torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.0), layer)
    >>> layer(torch.randn(3, 8)).square().sum().backward()
    >>> optimizer.step()
    >>> torch.allclose(layer.weight.norm(dim=1), torch.ones(4))
    True
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer.")
        _projected(model)
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer = optimizer
        self.model = model
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of the wrapped optimizer, then the projection; returns what the closure returned."""
        loss = self.optimizer.step(closure)
        project_(self.model)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer."""
        if "optimizer" not in self.__dict__:  # called by the constructor of torch's class
            super().add_param_group(param_group)
            return
        self.optimizer.add_param_group(param_group)
        self._share()

    def state_dict(self) -> dict[str, Any]:
        """That of the wrapped optimizer."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of the wrapped optimizer, from its own state dict or from that of a projected one."""
        self.optimizer.load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        self.param_groups = self.optimizer.param_groups
        self.state = self.optimizer.state
        self.defaults = self.optimizer.defaults

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._share()
        super().__setstate__({})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"


def _projected(model: nn.Module) -> list[NormalizedLinear | NormalizedEmbedding]:
    layers = [m for m in model.modules() if isinstance(m, (NormalizedLinear, NormalizedEmbedding))]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no NormalizedLinear or NormalizedEmbedding, so there is nothing to project."
        )
    return layers


def _unit(weight: Tensor, dim: int) -> Tensor:
    return normalize(weight, "o i -> o" if dim == 1 else "o i -> i", center=False, scale="l2", eps=_EPS)


@torch.no_grad()
def _project(weight: Tensor, dim: int) -> None:
    if weight.device.type != "meta":
        weight.copy_(_unit(weight, dim))


@torch.no_grad()
def _project_loaded(weight: Tensor, dim: int) -> None:
    # Vectors of length 1 up to rounding stay as they are: what was saved after a projection is loaded bit for bit.
    # The values may be those of the state dict itself (assign=True), so they are replaced and not overwritten.
    if weight.device.type == "meta":
        return
    length = torch.linalg.vector_norm(weight, dim=dim, keepdim=True, dtype=torch.float64)
    rounding = 0.5 * torch.finfo(weight.dtype).eps + 4 * torch.finfo(accumulate_dtype(weight.dtype)).eps
    off = (length - 1).abs() > rounding
    if off.any():
        weight.data = torch.where(off, _unit(weight, dim), weight)
