r"""LieBN: batch normalization of points of a Lie group, with control of the Fréchet mean and the Fréchet variance.

Features that are covariance matrices, rotations or correlation matrices live on a manifold: subtracting a mean entry
by entry leaves it. LieBN uses the group instead. For a batch :math:`P_i` of a Lie group with product :math:`\odot`,
neutral element E and an invariant metric, with a learned point B and a learned number s:

.. math::
    \bar P_i = M^{-1} \odot P_i, \qquad
    \hat P_i = \mathrm{Exp}_E\Big(\frac{s}{\sqrt{v^2 + ε}}\,\mathrm{Log}_E \bar P_i\Big), \qquad
    \tilde P_i = B \odot \hat P_i,

where M is the Fréchet mean of the batch and :math:`v^2 = \frac1N \sum d^2(\bar P_i, E)` its Fréchet variance. The
output has mean B and variance :math:`s^2 v^2/(v^2 + ε)`. Evaluation uses running statistics, which move along the
geodesic: :math:`M_r \leftarrow` the point at γ between :math:`M_r` and M, :math:`v_r^2 \leftarrow (1-γ) v_r^2 + γ v^2`.

Use :class:`LieBNSPD` between the layers of an SPDNet (:class:`evenly.manifolds.BiMap`), :class:`LieBNRotation` for
rotations, :class:`LieBNCorrelation` for correlation matrices, and :class:`DomainLieBN` where the data come from
sessions or subjects that are each shifted. The metric is the choice: LEM and LCM have their mean in closed form, LCM
needs no eigendecomposition, AIM does not change under :math:`X \mapsto A X A^\top`. The cost a matrix is
:math:`O(n^3)`: two eigendecompositions for LEM, one for each step of the Karcher flow and one for the centred batch
for AIM (the last step's is reused for it), two more with θ ≠ 1.

Reference:
    Ziheng Chen, Yue Song, Yunmei Liu & Nicu Sebe, *A Lie Group Approach to Riemannian Batch Normalization*,
    ICLR 2024, arXiv 2403.11261, algorithm 1, tables 1 and 2, appendix on domain-specific momentum.

Where the paper and its released code differ, or the code slips:
    The code starts the running mean of LEM and LCM at the identity *matrix*; the neutral element of their working
    space is 0, and that is used here. Its running statistics in the SPDNet layer are not in the state dict; here they
    are. For AIM it takes one step of the Karcher flow (in the later toolbox none where the mean tangent is shorter
    than 0.1), with which the output's mean is not quite B; the default here is to iterate to a tolerance with steps
    that converge, and ``karcher_steps=1`` is the code of the paper. The toolbox sends no gradient to s under AIM and
    CRIM; here it gets one. The code clamps eigenvalues at 1e-7 (1e-4 in float32); here a matrix that is not positive
    definite raises. Batch statistics are detached from the gradient as in the code (not for correlation matrices);
    ``detach_stats=False`` differentiates through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from evenly.manifolds import _extra
from evenly.manifolds.correlation import Correlation
from evenly.manifolds.geometry import Center, Geometry
from evenly.manifolds.matrix_functions import exp
from evenly.manifolds.rotation import SO3, so3_exp
from evenly.manifolds.spd import SPD
from evenly.nn.norm import recomputing

__all__ = ["DomainLieBN", "LieBNCorrelation", "LieBNRotation", "LieBNSPD", "momentum_schedule"]

Parametrization = Literal["manifold", "free"]


class _LieBN(nn.Module):
    """Batch normalization on any :class:`Geometry`; the public layers choose it and the form of the bias."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        geometry: Geometry,
        *,
        momentum: float | None,
        eps: float,
        batch_dims: Sequence[int],
        karcher_steps: int | None,
        karcher_tol: float | None,
        detach_stats: bool,
        bias: bool,
        parametrization: Parametrization,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.shape = _checked_shape(shape)
        n = self.shape[-1]
        geometry.check_size(n)
        self.geometry = geometry
        self.batch_dims = _checked_batch_dims(batch_dims, len(self.shape))
        self.momentum = None if momentum is None else _checked_momentum(momentum, "momentum")
        self.eps = _checked_eps(eps)
        self.karcher_steps, self.karcher_tol = _checked_karcher(karcher_steps, karcher_tol)
        self.detach_stats = detach_stats
        self.parametrization = _extra.check_parametrization(parametrization)
        dtype = _checked_dtype(dtype)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        channels = self.shape[:-2]
        self.weight = nn.Parameter(torch.ones(channels, **options))
        self.bias = self._new_bias(**options) if bias else None
        neutral = geometry.identity(n).to(**options).expand(self.shape).clone()
        self.register_buffer("running_mean", neutral)
        self.register_buffer("running_var", torch.ones(channels, **options))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=device))

    def reset_running_stats(self) -> None:
        """Running mean at the neutral element, running variance 1."""
        self.running_mean.copy_(self.geometry.identity(self.shape[-1]))
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Scale 1, bias at the neutral element, running statistics forgotten."""
        self.reset_running_stats()
        with torch.no_grad():
            self.weight.fill_(1)
            if self.bias is not None:
                self.bias.copy_(self._new_bias(device=self.bias.device, dtype=self.bias.dtype))

    def bias_point(self) -> Tensor | None:
        """The learned point B, of shape ``shape``; None without bias."""
        return None if self.bias is None else self._bias_point(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``, whose axes but ``batch_dims`` are ``shape``; the result has the same shape."""
        self._check(x)
        with torch.autocast(x.device.type, enabled=False):
            w = self.geometry.deform(x)
            if self.training:
                center, tangent, var = self._measure(w)
                self._update(center.value, var)
            else:
                center = Center(self._spread(self.running_mean))
                var = self._spread(self.running_var)
                tangent = self.geometry.log(w, center)
            factor = self._spread(self.weight) * (var + self.eps).rsqrt()
            w = self.geometry.exp(tangent.scaled(factor[..., None, None]))
            by = self._bias_in_working_space()
            if by is not None:
                w = self.geometry.translate(w, self._spread(by))
            return self.geometry.undeform(w)

    def _measure(self, w: Tensor) -> tuple[Center, Any, Tensor]:
        """Mean, centred tangents and variance of the batch; the reduced axes keep size 1."""
        if any(w.shape[d] == 0 for d in self.batch_dims):
            raise ValueError(
                f"Training needs at least one of the {self.geometry.points} to average, got an input of shape "
                f"{tuple(w.shape)} with batch_dims={self.batch_dims}."
            )
        center = self.geometry.mean(
            w.detach() if self.detach_stats else w, self.batch_dims, self.karcher_steps, self.karcher_tol
        )
        tangent = self.geometry.log(w, center)
        value = tangent.value.detach() if self.detach_stats else tangent.value
        return center, tangent, self.geometry.square_norm(value).mean(self.batch_dims, keepdim=True)

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor) -> None:
        if recomputing():
            return
        self.num_batches_tracked.add_(1)
        mean, var = mean.detach().squeeze(self.batch_dims), var.detach().squeeze(self.batch_dims)
        momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.copy_(self.geometry.between(self.running_mean, mean, momentum))
        self.running_var.lerp_(var, momentum)

    def _spread(self, statistic: Tensor) -> Tensor:
        """Give a statistic or parameter an axis of size 1 for each of the reduced ones."""
        for dim in self.batch_dims:
            statistic = statistic.unsqueeze(dim)
        return statistic

    def _check(self, x: Tensor) -> None:
        wanted = list(self.shape)
        for dim in self.batch_dims:
            wanted.insert(dim, -1)
        if x.ndim != len(wanted) or any(w not in (-1, s) for w, s in zip(wanted, x.shape, strict=True)):
            text = ", ".join("*" if w == -1 else str(w) for w in wanted)
            raise ValueError(
                f"{type(self).__name__} with shape={self.shape} and batch_dims={self.batch_dims} takes inputs of shape "
                f"({text}), got {tuple(x.shape)}."
            )
        if x.dtype != self.running_mean.dtype:
            raise TypeError(
                f"{type(self).__name__} holds {self.running_mean.dtype} and got {x.dtype}; convert one of them, such "
                "as by layer.double(). Matrices on a manifold need float32 or float64."
            )

    def _new_bias(self, **options: Any) -> nn.Parameter:
        """The bias at the neutral element."""
        if self.parametrization == "free":
            return nn.Parameter(torch.zeros(self.shape, **options))
        eye = torch.eye(self.shape[-1], **options).expand(self.shape).clone()
        return _extra.geoopt().ManifoldParameter(eye, manifold=self._manifold())

    def _manifold(self) -> Any:
        """geoopt's manifold of the bias."""
        raise AttributeError(f"{type(self).__name__} has no manifold parameter")

    def _bias_point(self, bias: Tensor) -> Tensor:
        raise AttributeError(f"{type(self).__name__} does not say what its bias is")

    def _bias_in_working_space(self) -> Tensor | None:
        return None if self.bias is None else self.geometry.deform(self._bias_point(self.bias))

    def extra_repr(self) -> str:
        parts = [f"{self.shape}, {self.geometry}, momentum={self.momentum}, eps={self.eps:g}"]
        if self.batch_dims != (0,):
            parts.append(f"batch_dims={self.batch_dims}")
        if self.karcher_steps is not None:
            parts.append(f"karcher_steps={self.karcher_steps}")
        parts.append(f"detach_stats={self.detach_stats}")
        parts.append(f"parametrization={self.parametrization!r}" if self.bias is not None else "bias=False")
        return ", ".join(parts)


class LieBNSPD(_LieBN):
    """LieBN for symmetric positive definite matrices.

    Args:
        shape: of the input without its batch axes: ``n`` or (n, n), or (channels, ..., n, n) for statistics, scale and
            bias of each channel.
        metric: ``"LEM"``, ``"LCM"``, ``"AIM"`` or ``"CRIM"``; see :class:`evenly.manifolds.SPD`.
        theta: power of the deformation, not 0; for AIM, CRIM and LCM. The paper uses 1, 1.5 and -0.5 for AIM and
            1, 0.5 and -0.5 for LCM.
        alpha, beta: weights of the inner product for AIM, CRIM and LEM; ``alpha > 0``, ``alpha + n beta > 0``.
        momentum: weight of the new batch in the running statistics; None: their average over all batches.
        eps: added to the variance.
        batch_dims: axes of the input over which statistics are taken, counted from 0.
        karcher_steps: steps of the Karcher flow for the mean of AIM and CRIM; None: to ``karcher_tol``, at most 50.
            The authors' code takes 1, after which the mean is approximate.
        karcher_tol: length of the mean tangent at which the flow stops. Default 1e-6, in float32 1e-5.
        detach_stats: send no gradient through the mean and the variance of the batch.
        bias: learn the point B.
        parametrization: of B. ``"manifold"``: a ``geoopt.ManifoldParameter``, to be trained with one of geoopt's
            Riemannian optimizers, as in the paper (needs ``evenly[manifolds]``). ``"free"``: B is the exponential of an
            unconstrained symmetric matrix, and any optimizer of torch trains it.
        device, dtype: of parameters and buffers; float32 or float64. The paper's experiments use float64.

    Shape:
        Input and output (batch, \\*shape), or with the batch axes where ``batch_dims`` says.

    Parameters and buffers: ``weight`` (\\*channels), the scale s, initially 1; ``bias`` (\\*shape); ``running_mean``
    (\\*shape), in the working space of the metric, initially its neutral element; ``running_var`` (\\*channels),
    initially 1; ``num_batches_tracked``.

    Raises:
        ValueError: a shape that is not square; an unknown metric or parametrization; theta of 0; weights without an
            inner product; momentum outside [0, 1]; negative eps; wrong batch axes. In the call: another shape; a
            matrix that is not symmetric, not positive definite or not finite (the message names it); nothing to
            average in training. Under ``torch.compile`` the values are not checked; what is not positive definite
            becomes NaN. The flow to a tolerance breaks the graph; with ``karcher_steps`` it does not.
        TypeError: an input of another type than the layer, or in half precision.
        ImportError: ``parametrization="manifold"`` without geoopt.

    A batch of one matrix has variance 0 and comes out as B.

    >>> layer = LieBNSPD(3, metric="AIM", parametrization="free", dtype=torch.float64)
    >>> a = torch.randn(32, 3, 5, dtype=torch.float64)
    >>> y = layer(a @ a.mT)
    >>> spd = layer.geometry
    >>> torch.allclose(spd.frechet_mean(y), torch.eye(3).double(), atol=1e-5)
    True
    >>> torch.allclose(spd.frechet_variance(y), torch.ones(()).double(), atol=1e-4)
    True
    """

    geometry: SPD

    def __init__(
        self,
        shape: int | Sequence[int],
        metric: str = "LEM",
        theta: float = 1.0,
        alpha: float = 1.0,
        beta: float = 0.0,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        batch_dims: Sequence[int] = (0,),
        karcher_steps: int | None = None,
        karcher_tol: float | None = None,
        detach_stats: bool = True,
        bias: bool = True,
        parametrization: Parametrization = "manifold",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            (shape, shape) if isinstance(shape, int) else shape,
            SPD(metric, theta, alpha, beta),
            momentum=momentum,
            eps=eps,
            batch_dims=batch_dims,
            karcher_steps=karcher_steps,
            karcher_tol=karcher_tol,
            detach_stats=detach_stats,
            bias=bias,
            parametrization=parametrization,
            device=device,
            dtype=dtype,
        )

    def _manifold(self) -> Any:
        return _extra.geoopt().SymmetricPositiveDefinite()

    def _bias_point(self, bias: Tensor) -> Tensor:
        return bias if self.parametrization == "manifold" else exp(0.5 * (bias + bias.mT))


class LieBNRotation(_LieBN):
    """LieBN for rotations of space under the bi-invariant metric.

    Args:
        shape: of the input without its batch axes: 3 or (3, 3), or (channels, ..., 3, 3).
        side: centre and bias from the ``"left"`` or the ``"right"``; see :class:`evenly.manifolds.SO3`.
        momentum, eps, batch_dims, karcher_tol, detach_stats, bias, device, dtype: as in :class:`LieBNSPD`.
        karcher_steps: None: the Karcher flow from the projected arithmetic mean to the tolerance; a number: so many
            steps from the first sample, as in the authors' code.
        parametrization: of B. ``"manifold"``: a ``geoopt.ManifoldParameter`` on the Stiefel manifold, whose steps keep
            the determinant 1 (needs ``evenly[manifolds]``). ``"free"``: the exponential of the skew-symmetric part of
            an unconstrained matrix.

    Shape:
        Input and output (batch, \\*shape).

    Raises:
        ValueError, TypeError, ImportError: as :class:`LieBNSPD`; in the call for what is not a rotation.

    >>> from evenly.manifolds import so3_exp
    >>> v = 0.3 * torch.randn(16, 3, 3)
    >>> layer = LieBNRotation(3, parametrization="free")
    >>> y = layer(so3_exp(v - v.mT))
    >>> torch.allclose(layer.geometry.frechet_variance(y), torch.ones(()), atol=1e-3)
    True
    """

    def __init__(
        self,
        shape: int | Sequence[int] = 3,
        side: Literal["left", "right"] = "left",
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        batch_dims: Sequence[int] = (0,),
        karcher_steps: int | None = None,
        karcher_tol: float | None = None,
        detach_stats: bool = True,
        bias: bool = True,
        parametrization: Parametrization = "manifold",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            (shape, shape) if isinstance(shape, int) else shape,
            SO3(side),
            momentum=momentum,
            eps=eps,
            batch_dims=batch_dims,
            karcher_steps=karcher_steps,
            karcher_tol=karcher_tol,
            detach_stats=detach_stats,
            bias=bias,
            parametrization=parametrization,
            device=device,
            dtype=dtype,
        )

    def _manifold(self) -> Any:
        return _extra.geoopt().Stiefel()

    def _bias_point(self, bias: Tensor) -> Tensor:
        return bias if self.parametrization == "manifold" else so3_exp(0.5 * (bias - bias.mT))


class LieBNCorrelation(_LieBN):
    """LieBN for correlation matrices under a flat metric.

    Args:
        shape: of the input without its batch axes: ``n`` or (n, n), or (channels, ..., n, n).
        metric: ``"ECM"``, ``"LECM"``, ``"OLM"`` or ``"LSM"``; see :class:`evenly.manifolds.Correlation`.
        momentum, eps, batch_dims, bias, device, dtype: as in :class:`LieBNSPD`.
        detach_stats: False by default here, as in the authors' toolbox.

    The bias is a point of the vector space that is the metric's chart (its projection onto it, so that every entry of
    the parameter is free); no Riemannian optimizer is needed.

    Shape:
        Input and output (batch, \\*shape).

    Raises:
        ValueError, TypeError: as :class:`LieBNSPD`; in the call for what is not a correlation matrix.
        RuntimeError: see :class:`evenly.manifolds.Correlation`.

    >>> from evenly.manifolds import correlation
    >>> a = torch.randn(16, 4, 9, dtype=torch.float64)
    >>> layer = LieBNCorrelation(4, metric="OLM", dtype=torch.float64)
    >>> y = layer(correlation(a @ a.mT))
    >>> torch.allclose(layer.geometry.frechet_mean(y), torch.eye(4).double())
    True
    """

    geometry: Correlation

    def __init__(
        self,
        shape: int | Sequence[int],
        metric: str = "ECM",
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        batch_dims: Sequence[int] = (0,),
        detach_stats: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            (shape, shape) if isinstance(shape, int) else shape,
            Correlation(metric),
            momentum=momentum,
            eps=eps,
            batch_dims=batch_dims,
            karcher_steps=None,
            karcher_tol=None,
            detach_stats=detach_stats,
            bias=bias,
            parametrization="free",
            device=device,
            dtype=dtype,
        )

    def _bias_point(self, bias: Tensor) -> Tensor:
        return self.geometry.undeform(self.geometry.project(bias))

    def _bias_in_working_space(self) -> Tensor | None:
        return None if self.bias is None else self.geometry.project(self.bias)


class DomainLieBN(nn.Module):
    """LieBN for SPD matrices with statistics of each domain (session, subject), a shared scale, and momentum.

    In training a domain's samples are normalized by that domain's *running* mean and variance after they moved
    towards the batch with weight ``momentum``; 1 is plain LieBN a domain. Evaluation uses a second set of running
    statistics, which move with ``momentum_test``. :func:`momentum_schedule` gives both for an epoch. A domain that
    was not trained on is fitted from unlabelled data with :meth:`refit`.

    Args:
        shape: ``n`` or (n, n), or (channels, ..., n, n).
        domains: the labels of all domains, integers.
        metric, theta, alpha, beta, eps, karcher_tol, device, dtype: as in :class:`LieBNSPD`.
        momentum: weight of the batch in the statistics that training normalizes with.
        momentum_test: weight of the batch in the statistics that evaluation normalizes with.
        karcher_steps: as in :class:`LieBNSPD`.
        bias: learn a point B that all domains share; off in the paper.
        parametrization: of B.

    Shape:
        Input ``x`` (N, \\*shape) and ``domains`` (N,), integers; output (N, \\*shape).

    Buffers: ``domains`` (D,); ``running_mean``, ``running_mean_test`` (D, \\*shape), in the working space;
    ``running_var``, ``running_var_test`` (D, \\*channels). The variance of a batch is taken about the running mean
    that has just moved.

    Raises:
        ValueError: no or repeated domains; a label that is not among them; a momentum outside [0, 1]; and what
            :class:`LieBNSPD` refuses.
        TypeError: labels that are not integers.

    Where the code differs from this: it applies 1 - ``momentum_test`` of the schedule where the method it builds on
    applies ``momentum_test``; set either with :meth:`set_momentum`.

    >>> layer = DomainLieBN(3, domains=[0, 1], dtype=torch.float64)
    >>> a = torch.randn(20, 3, 6, dtype=torch.float64)
    >>> session = torch.arange(20) % 2
    >>> y = layer((a @ a.mT) * (1 + 9 * session)[:, None, None], session)
    >>> torch.allclose(layer.geometry.frechet_mean(y[session == 1]), torch.eye(3).double())
    True
    """

    domains: Tensor
    running_mean: Tensor
    running_var: Tensor
    running_mean_test: Tensor
    running_var_test: Tensor

    def __init__(
        self,
        shape: int | Sequence[int],
        domains: Sequence[int],
        metric: str = "LEM",
        theta: float = 1.0,
        alpha: float = 1.0,
        beta: float = 0.0,
        momentum: float = 1.0,
        momentum_test: float = 0.1,
        eps: float = 1e-5,
        karcher_steps: int | None = None,
        karcher_tol: float | None = None,
        bias: bool = False,
        parametrization: Parametrization = "manifold",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        labels = [int(label) for label in domains]
        if not labels or len(set(labels)) < len(labels):
            raise ValueError(f"domains={labels}: expected the labels of one or more domains, each once.")
        # The shared part: scale, bias, geometry, and what it checks.
        self.norm = LieBNSPD(
            shape, metric, theta, alpha, beta, eps=eps, karcher_steps=karcher_steps, karcher_tol=karcher_tol, bias=bias,
            parametrization=parametrization, device=device, dtype=dtype,
        )  # fmt: skip
        self.set_momentum(momentum, momentum_test)
        self.register_buffer("domains", torch.tensor(labels, device=device))
        for suffix in ("", "_test"):
            mean, var = self.norm.running_mean, self.norm.running_var
            self.register_buffer(f"running_mean{suffix}", mean.expand(len(labels), *mean.shape).clone())
            self.register_buffer(f"running_var{suffix}", var.expand(len(labels), *var.shape).clone())
        del self.norm.running_mean, self.norm.running_var, self.norm.num_batches_tracked

    @property
    def geometry(self) -> SPD:
        """The metric."""
        return self.norm.geometry

    def set_momentum(self, momentum: float, momentum_test: float | None = None) -> None:
        """Set both weights of the batch; None leaves that of evaluation."""
        self.momentum = _checked_momentum(momentum, "momentum")
        if momentum_test is not None:
            self.momentum_test = _checked_momentum(momentum_test, "momentum_test")

    def forward(self, x: Tensor, domains: Tensor) -> Tensor:
        """Normalize each matrix with the statistics of its domain."""
        self._check(x, domains)
        y = torch.empty_like(x)
        parts = []
        with torch.autocast(x.device.type, enabled=False):
            w = self.geometry.deform(x)
            by = self.norm._bias_in_working_space()
            for row, label in enumerate(self.domains.tolist()):
                index = (domains == label).nonzero().squeeze(-1)
                if not len(index):
                    continue
                part = w[index]
                if self.training:
                    self._update(part.detach(), row, "", self.momentum)
                    self._update(part.detach(), row, "_test", self.momentum_test)
                suffix = "" if self.training else "_test"
                # Copies: the buffers move again before the backward pass.
                mean = getattr(self, f"running_mean{suffix}")[row].clone()
                var = getattr(self, f"running_var{suffix}")[row].clone()
                tangent = self.geometry.log(part, Center(mean.unsqueeze(0)))
                factor = (self.norm.weight * (var + self.norm.eps).rsqrt()).unsqueeze(0)[..., None, None]
                part = self.geometry.exp(tangent.scaled(factor))
                if by is not None:
                    part = self.geometry.translate(part, by.unsqueeze(0))
                parts.append((index, part))
            if not parts:
                return y
            order = torch.cat([index for index, _ in parts])
            normalized = torch.cat([part for _, part in parts])
            return self.geometry.undeform(normalized[order.argsort()])

    @torch.no_grad()
    def refit(self, x: Tensor, domain: int) -> None:
        """Set all statistics of a domain to those of ``x`` (N, \\*shape), with no labels of classes needed."""
        self._check(x, torch.full((len(x),), int(domain), device=x.device))
        if not len(x):
            raise ValueError("refit needs at least one matrix.")
        row = self.domains.tolist().index(int(domain))
        w = self.geometry.deform(x)
        self._update(w, row, "", 1.0)
        self._update(w, row, "_test", 1.0)

    @torch.no_grad()
    def _update(self, w: Tensor, row: int, suffix: str, momentum: float) -> None:
        if recomputing():
            return
        mean, var = getattr(self, f"running_mean{suffix}"), getattr(self, f"running_var{suffix}")
        batch = self.geometry.mean(w, (0,), self.norm.karcher_steps, self.norm.karcher_tol).value
        mean[row] = self.geometry.between(mean[row], batch[0], momentum) if momentum < 1 else batch[0]
        spread = self.geometry.square_norm(self.geometry.log(w, Center(mean[row].unsqueeze(0))).value).mean(0)
        var[row] = torch.lerp(var[row], spread, momentum)

    def _check(self, x: Tensor, domains: Tensor) -> None:
        shape = self.norm.shape
        if x.ndim != len(shape) + 1 or x.shape[1:] != shape:
            text = ", ".join(map(str, shape))
            raise ValueError(f"DomainLieBN with shape={shape} takes (N, {text}), got {tuple(x.shape)}.")
        if x.dtype != self.running_mean.dtype:
            raise TypeError(
                f"DomainLieBN holds {self.running_mean.dtype} and got {x.dtype}; convert one of them, such as by "
                "layer.double()."
            )
        if not isinstance(domains, Tensor) or domains.is_floating_point() or domains.is_complex():
            given = domains.dtype if isinstance(domains, Tensor) else type(domains).__name__
            raise TypeError(f"domains expects a tensor of integers, got {given}.")
        if domains.shape != x.shape[:1]:
            raise ValueError(f"domains has shape {tuple(domains.shape)}, expected ({len(x)},): one label a matrix.")
        unknown = sorted(set(domains.tolist()) - set(self.domains.tolist()))
        if unknown:
            raise ValueError(
                f"domains holds {unknown}, which are not among {self.domains.tolist()}: give every domain to the layer "
                "when it is made, and call refit for those that were not trained on."
            )

    def extra_repr(self) -> str:
        return f"domains={len(self.domains)}, momentum={self.momentum:g}, momentum_test={self.momentum_test:g}"


def momentum_schedule(
    epoch: int, epochs: int, batch_size: int = 32, reference_batch_size: int = 64, decay: float = 0.9
) -> tuple[float, float]:
    """The two weights of :class:`DomainLieBN` in an epoch: ``layer.set_momentum(*momentum_schedule(epoch, epochs))``.

    The first falls from 1 to ``1 - ρ^epochs`` with ``ρ = (batch_size / reference_batch_size)^(1/epochs)``, that is
    from plain batch statistics to running ones:
    ``1 - ρ^(epochs (epochs - epoch)/(epochs - 1)) + ρ^epochs``. The second is ``1 - decay^k``, where k goes from 1 to
    ``batch_size / reference_batch_size``.

    Args:
        epoch: 1 to ``epochs``.
        epochs: 2 or more.
        batch_size: samples of a domain in a batch, at most ``reference_batch_size``.
        reference_batch_size: the batch size whose statistics are trusted.
        decay: weight of the old test statistics with batches of the reference size.

    Raises:
        ValueError: an epoch out of range, a larger batch than the reference, a decay outside [0, 1).

    >>> [round(momentum_schedule(epoch, 3)[0], 3) for epoch in (1, 2, 3)]
    [1.0, 0.793, 0.5]
    """
    if epochs < 2 or not 1 <= epoch <= epochs:
        raise ValueError(f"epoch={epoch} of epochs={epochs}: expected 2 epochs or more and 1 <= epoch <= epochs.")
    if not 1 <= batch_size <= reference_batch_size:
        raise ValueError(f"batch_size={batch_size}, expected 1 to reference_batch_size={reference_batch_size}.")
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay}, expected a number of at least 0 and below 1.")
    ratio = batch_size / reference_batch_size
    left = (epochs - epoch) / (epochs - 1)
    return 1 - ratio**left + ratio, 1 - decay ** (left + ratio * (1 - left))


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    found = tuple(int(size) for size in shape)
    if len(found) < 2 or found[-1] != found[-2] or min(found) < 1:
        raise ValueError(f"shape={found}: expected n, (n, n) or (channels, ..., n, n), square and positive.")
    return found


def _checked_batch_dims(dims: Sequence[int], rank: int) -> tuple[int, ...]:
    found = tuple(sorted(int(dim) for dim in dims))
    last = rank + len(found) - 3  # the last axis before the matrices
    if not found or len(set(found)) < len(found) or found[0] < 0 or found[-1] > last:
        raise ValueError(
            f"batch_dims={tuple(dims)}: expected one or more different axes of the input, counted from 0 and before "
            "the last two, which are the matrices."
        )
    return found


def _checked_momentum(momentum: float, name: str) -> float:
    if not 0 <= momentum <= 1:
        raise ValueError(f"{name}={momentum}, expected a number from 0 to 1: the weight of the new batch.")
    return float(momentum)


def _checked_eps(eps: float) -> float:
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps={eps}, expected a finite number of at least 0.")
    return float(eps)


def _checked_karcher(steps: int | None, tol: float | None) -> tuple[int | None, float | None]:
    if steps is not None and steps < 1:
        raise ValueError(f"karcher_steps={steps}, expected at least 1, or None to iterate to a tolerance.")
    if tol is not None and not tol > 0:
        raise ValueError(f"karcher_tol={tol}, expected above 0.")
    return steps, tol


def _checked_dtype(dtype: torch.dtype | None) -> torch.dtype:
    found = dtype if dtype is not None else torch.get_default_dtype()
    if found not in (torch.float32, torch.float64):
        raise ValueError(f"dtype={found}, expected float32 or float64: matrices on a manifold need the digits.")
    return found
