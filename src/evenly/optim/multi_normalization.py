"""Gradient multi-normalization: optimizers without state, SinkGD and SWAN among them.

Adam keeps two more copies of the weights. A multi-normalized step keeps none: it takes the gradient of a weight
matrix, makes it even by several norms at once, and follows it. SinkGD makes all rows and all columns of the
gradient equally long; it needs no matrix product. SWAN makes all rows equally long and then all singular values
equal. Use them where memory is short: pre-training and fine-tuning of Transformers.

For norms :math:`g_1, \\dots, g_K` with projections
:math:`P_k(X) = \\arg\\max_{g_k(Z) \\le 1} \\langle X, Z \\rangle`,

.. math::
    \\text{MultiNorm}(X) = (P_K \\circ \\dots \\circ P_1)^L (X), \\qquad
    W \\leftarrow W - \\eta\\, \\text{MultiNorm}(\\nabla_W),

and for SinkGD, :math:`X \\in \\mathbb{R}^{m \\times n}`, :math:`L = 5`:

.. math::
    X_{i,:} \\leftarrow \\sqrt{n}\\, X_{i,:} / \\lVert X_{i,:} \\rVert, \\qquad
    X_{:,j} \\leftarrow \\sqrt{m}\\, X_{:,j} / \\lVert X_{:,j} \\rVert.

Only hidden matrices are optimized so; embeddings, the output layer, norms and biases go to Adam:
:func:`evenly.optim.for_model` makes the groups.

Reference:
    Meyer Scetbon, Chao Ma, Wenbo Gong & Ted Meeds, *Gradient Multi-Normalization for Stateless and Scalable LLM
    Training*, NeurIPS 2025, arXiv 2502.06742, algorithms 1 to 4. There is no released code of the authors. The
    scaling is the paper's: entries of root mean square 1, whatever the shape; third-party packages that leave the
    factors √m and √n out need a learning rate √m times larger. SWAN is also Chao Ma, Wenbo Gong, Meyer Scetbon &
    Ted Meeds, 2024, arXiv 2412.13148, which centres rows too; here it is the instance of the scheme, which does not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from evenly.core import normalize
from evenly.optim._common import (
    Base,
    Shards,
    at_least,
    check_betas,
    jobs,
    local,
    local_gradient,
    name_of,
    number,
    one_of,
    shards,
)

__all__ = [
    "SWAN",
    "MultiNormGD",
    "SinkGD",
    "multi_normalize",
    "project_col_rms",
    "project_row_rms",
    "project_sign",
    "project_spectral",
    "sr_sinkhorn",
]

Projection = Callable[[Tensor], Tensor]
_LEAST = 1e-30

#: Elements of small matrices of one shape that are stacked on a CPU; larger stacks leave the cache.
STACK = 1 << 18


def project_row_rms(x: Tensor) -> Tensor:
    """Give every row of (..., m, n) the norm √n: the projection of the largest row norm. A zero row stays zero.

    >>> project_row_rms(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.8485, 1.1314],
            [0.0000, 0.0000]])
    """
    _matrices(x)
    return normalize(x, "... n -> ...", center=False, scale="l2", eps=_LEAST) * math.sqrt(x.shape[-1])


def project_col_rms(x: Tensor) -> Tensor:
    """Give every column of (..., m, n) the norm √m: the projection of the largest column norm. Zero stays zero."""
    _matrices(x)
    return normalize(x.mT, "... m -> ...", center=False, scale="l2", eps=_LEAST).mT * math.sqrt(x.shape[-2])


def project_sign(x: Tensor) -> Tensor:
    """The sign of every entry: the projection of the largest entry. With it alone, signed gradient descent."""
    return torch.where(x.isnan(), x, x.sign())


def project_spectral(x: Tensor, method: Literal["newton", "svd"] = "newton", iters: int = 5) -> Tensor:
    """Make all singular values of (..., m, n) equal: √max(m, n) U Vᵀ, the projection of the spectral norm.

    For m ≤ n this is √n (X Xᵀ)^(-1/2) X, whose product with its transpose is n I; its Frobenius norm is √(m n) as
    that of the other projections. Zero stays zero.

    Args:
        x: matrices; half types are computed in float32.
        method: ``"newton"`` applies ``iters`` odd polynomials of degree 5, each the best for the interval that the
            singular values lie in then (Newton-Schulz with minimax coefficients). ``"svd"`` is exact and slow.
        iters: 5 brings singular values above 1/390 of ``(Σ σ⁴)^(1/4)`` to 1 ± 0.01, 7 those above 1/7000; more
            than 8 bring those above 1e-4 nearer to 1. Smaller ones end between 0 and 1. Each iteration costs 3
            matrix products for square matrices, 4 small ones for long ones, where only the Gram matrix is iterated.

    Raises:
        ValueError: ``x`` has fewer than two axes, an unknown method, or ``iters`` below 1.

    >>> y = project_spectral(torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.5, 0.5]]), iters=7)
    >>> torch.allclose(y @ y.T, 3 * torch.eye(2), atol=0.1)
    True
    """
    _matrices(x)
    one_of("method", method, ("newton", "svd"))
    _iterations(iters)
    m, n = x.shape[-2:]
    if m > n:
        return project_spectral(x.mT, method, iters).mT
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    if not x.numel():
        return x.clone()
    wide = wide / wide.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
    if method == "svd":
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
        rank = s > s[..., :1] * (max(m, n) * torch.finfo(wide.dtype).eps)
        polar = (u * rank.unsqueeze(-2).to(u.dtype)) @ vh
    else:
        polar = _polar(wide, iters)
    return (polar * math.sqrt(n)).to(x.dtype)


def multi_normalize(x: Tensor, projections: Sequence[Projection], iters: int = 5) -> Tensor:
    """Apply projections in turn, ``iters`` times over (algorithm 1).

    If each projection maps onto one and the same Frobenius sphere, as those of this module do, what comes out after
    many rounds is even by each of the norms.

    Args:
        x: (..., m, n).
        projections: functions from (..., m, n) to (..., m, n), applied in this order.
        iters: rounds; 5.

    Raises:
        ValueError: no projection, or ``iters`` below 1.

    >>> x = multi_normalize(torch.randn(4, 6), [project_row_rms, project_col_rms], iters=50)
    >>> torch.allclose(x.norm(dim=1), torch.tensor(6.0).sqrt()), torch.allclose(x.norm(dim=0), torch.tensor(2.0))
    (True, True)
    """
    _iterations(iters)
    if not projections:
        raise ValueError("projections is empty, expected at least one function.")
    for _ in range(iters):
        for project in projections:
            x = project(x)
    return x


def sr_sinkhorn(x: Tensor, iters: int = 5, eps: float = _LEAST) -> Tensor:
    """Make all rows and all columns of matrices equally long: square-root Sinkhorn (algorithm 3).

    Each round gives the rows the norm √n, then the columns the norm √m. The squares of the entries follow Sinkhorn's
    classical iteration, so only the m + n factors are iterated, with two products of a matrix and a vector a round.
    After any number of rounds the columns are exact, the rows nearly so, and the signs those of ``x``.

    Args:
        x: (..., m, n); half types are computed in float32 and returned in their own type.
        iters: rounds L; 5.
        eps: rows whose norm is not above it count as zero, and zero rows and columns stay zero; 1e-30. Entries
            below about 1e-17 of the length of their row count as zero too, in float32.

    Raises:
        ValueError: ``x`` has fewer than two axes, or ``iters`` is below 1.

    >>> sr_sinkhorn(torch.tensor([[1.0, -2.0], [10.0, -20.0]])).round(decimals=5)  # of rank 1: its signs
    tensor([[ 1., -1.],
            [ 1., -1.]])
    """
    _matrices(x)
    _iterations(iters)
    if not x.numel():
        return x.clone()
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    flat = wide.reshape(-1, *x.shape[-2:])
    rows, columns, _ = _sinkhorn(flat, iters, eps, Shards(tuple(x.shape[-2:])))
    return (flat * rows * columns).reshape(x.shape).to(x.dtype)


class MultiNormGD(Base):
    """Gradient descent along the multi-normalized gradient, for any list of projections (algorithm 2).

    Args:
        params: matrices (two axes), ``(name, parameter)`` pairs, or groups, best those that
            :func:`evenly.optim.for_model` makes. Sharded and replicated DTensors are taken; for this class a
            gradient that is sharded is gathered first.
        projections: functions from (k, m, n) to (k, m, n), applied in turn.
        lr: learning rate, a number or a tensor of one element; 1e-3. The entries of a step have the root mean
            square ``lr`` whatever the gradient is, so a schedule that lowers it is what makes training converge.
        iters: rounds; 1.
        momentum: 0 as in the paper, which keeps no state. Above 0 the normalized matrix is
            ``b = momentum * b + gradient`` (third-party code has this; it costs one copy of the weights).
        weight_decay: decoupled, ``W *= 1 - lr * weight_decay``; 0 as in the paper.
        skip_nonfinite: leave a matrix as it is in a step where its gradient has an Inf or a NaN; False.
        betas, adam_eps: settings of groups with ``rule="adam"``; (0.9, 0.999), 1e-8.
        maximize: maximize the objective; False.
        foreach: work on small matrices of one shape together; ``None`` (default) means True.

    A group may also set ``rule``: ``"matrix"`` (default), or ``"adam"`` for AdamW on parameters of any shape;
    ``blocks``: matrices that are stacked along the first axis, such as 3 for a fused query, key and value;
    ``transpose``: True where the weight is stored (in, out) and not (out, in).

    Raises:
        ValueError: a setting out of range, or a parameter that is not a matrix in a group of ``rule="matrix"``.
        TypeError: a complex parameter.
        RuntimeError: at the step, a sparse gradient.

    >>> w = torch.nn.Parameter(torch.zeros(2, 2))
    >>> optimizer = MultiNormGD([w], [project_sign], lr=0.5)
    >>> (w * torch.tensor([[1.0, -2.0], [0.0, 5.0]])).sum().backward()
    >>> optimizer.step()
    >>> w.data
    tensor([[-0.5000,  0.5000],
            [ 0.0000, -0.5000]])
    """

    def __init__(
        self,
        params: ParamsT,
        projections: Sequence[Projection],
        lr: float | Tensor = 1e-3,
        iters: int = 1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        skip_nonfinite: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        maximize: bool = False,
        foreach: bool | None = None,
        **more: Any,
    ) -> None:
        self.projections = tuple(projections)
        if not self.projections or not all(map(callable, self.projections)):
            raise ValueError(f"projections={projections!r}, expected one function or more.")
        defaults = dict(
            lr=lr,
            iters=iters,
            momentum=momentum,
            weight_decay=weight_decay,
            skip_nonfinite=skip_nonfinite,
            betas=betas,
            adam_eps=adam_eps,
            maximize=maximize,
            foreach=foreach,
            rule="matrix",
            blocks=1,
            transpose=False,
            **more,
        )
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "projections": self.projections}

    def _check(self, group: dict[str, Any]) -> None:
        _iterations(group["iters"])
        at_least("momentum", group["momentum"], 0, below=1)
        at_least("weight_decay", group["weight_decay"], 0)
        check_betas(group["betas"])
        at_least("adam_eps", group["adam_eps"], 0)
        one_of("foreach", group["foreach"], (None, True, False))
        one_of("rule", group["rule"], ("matrix", "adam"))
        if isinstance(group["blocks"], bool) or not isinstance(group["blocks"], int) or group["blocks"] < 1:
            raise ValueError(f"blocks={group['blocks']!r}, expected a whole number of at least 1.")
        if group["rule"] == "adam":
            return
        for place, param in enumerate(group["params"]):
            shape = tuple(param.shape)
            if len(shape) != 2:
                raise ValueError(
                    f"{type(self).__name__} needs matrices; put {name_of(group, place)} of shape {shape} into a group "
                    f'with rule="adam" (evenly.optim.for_model makes the groups of a model).'
                )
            rows = shape[1] if group["transpose"] else shape[0]
            if rows % group["blocks"]:
                raise ValueError(
                    f"blocks={group['blocks']} does not divide the {rows} rows of {name_of(group, place)} of shape "
                    f"{shape}."
                )
            if group["blocks"] > 1 and shards(param).splits:
                raise ValueError(
                    f"{name_of(group, place)} of shape {shape} is sharded, and its group has "
                    f"blocks={group['blocks']}; keep its blocks as parameters of their own, or set blocks=1."
                )

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        if group["rule"] == "adam":
            self._adam(group, params, grads)
            return
        pairs = []
        for param, grad in zip(params, grads, strict=True):
            gradient = local_gradient(param, grad)
            layout = shards(param)
            if group["skip_nonfinite"]:
                broken = (~gradient.isfinite()).any().float()
                if layout.max_(broken).item():
                    continue
            if group["momentum"]:
                state = self.state[param]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                gradient = local(state["momentum_buffer"]).mul_(group["momentum"]).add_(gradient)
            pairs.append((param, gradient, layout))
        lr = number("lr", group["lr"])
        decay = 1 - lr * group["weight_decay"]
        size = lr if group["maximize"] else -lr
        for param, gradient, layout in pairs:
            if layout.splits:
                self._move(group, [local(param)], [gradient], layout, decay, size, param)
        whole = [(local(param), gradient) for param, gradient, layout in pairs if not layout.splits]
        by_shape: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        for weight, gradient in whole:
            by_shape.setdefault(weight.shape, []).append((weight, gradient))
        for shape, alike in by_shape.items():
            for job in jobs([weight for weight, _ in alike], range(len(alike)), group["foreach"] is not False, STACK):
                places = [piece.place for piece in job[0]]
                weights, gradients = ([alike[place][side] for place in places] for side in (0, 1))
                self._move(group, weights, gradients, Shards(tuple(shape)), decay, size)

    def _move(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        gradients: list[Tensor],
        layout: Shards,
        decay: float,
        size: float,
        param: Tensor | None = None,
    ) -> None:
        # One step of matrices of one shape; `param` is the DTensor where `weights` is its shard.
        if param is not None and not self._splits():
            whole = _gather(gradients[0], param)
            direction = self._direction(group, _stack([whole], group), Shards(tuple(whole.shape)))
            directions = [_shard(_unstack(direction, group)[0], param)]
        else:
            x = _stack(gradients, group)
            if group["blocks"] > 1 or group["transpose"]:
                layout = _seen(layout, group)
            directions = _unstack(self._direction(group, x, layout), group)
        if decay != 1:
            torch._foreach_mul_(weights, decay)
        torch._foreach_add_(weights, directions, alpha=size)

    def _splits(self) -> bool:
        """Whether :meth:`_direction` can work on shards."""
        return False

    def _direction(self, group: dict[str, Any], x: Tensor, layout: Shards) -> Tensor:
        """The normalized matrices of ``x`` (k, m, n), in float32 or better."""
        return multi_normalize(x, self.projections, group["iters"])

    def _adam(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        for param in params:
            if not self.state[param]:
                self.state[param].update(
                    step=torch.tensor(0.0),
                    exp_avg=torch.zeros_like(param, memory_format=torch.preserve_format),
                    exp_avg_sq=torch.zeros_like(param, memory_format=torch.preserve_format),
                )
        states = [self.state[param] for param in params]
        # The fused kernel for CPUs reads memory in its order, so all must be contiguous.
        fused = all(
            type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" and tensor.is_contiguous()
            for tensor in (*params, *grads)
        )
        beta1, beta2 = group["betas"]
        adamw(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=fused,
            foreach=None if group["foreach"] is None or fused else group["foreach"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=number("lr", group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["adam_eps"],
            maximize=group["maximize"],
        )


class SinkGD(MultiNormGD):
    """Gradient descent along gradients whose rows and columns are all equally long (algorithm 4): no state.

    The step of a matrix is ``-lr * sr_sinkhorn(gradient, iters)``. The paper's recipe for Transformers: a global
    learning rate of 0.02, 0.05 of it on matrices, Adam elsewhere, warm-up over the first tenth, cosine down to a
    tenth, no weight decay, no clipping; :func:`evenly.optim.for_model` makes these groups. Costs ``2 * iters``
    products of a matrix and a vector; a matrix whose rows or columns are sharded costs an all-reduce of n or m
    numbers a round.

    Args:
        params, lr, momentum, weight_decay, maximize, foreach: as in :class:`MultiNormGD`.
        iters: rounds of :func:`sr_sinkhorn`; 5.
        eps: rows whose norm is not above it count as zero; 1e-30.
        skip_nonfinite, betas, adam_eps: as in :class:`MultiNormGD`.

    Raises:
        ValueError, TypeError, RuntimeError: as :class:`MultiNormGD`.

    >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 9))
    >>> import evenly.optim
    >>> optimizer = SinkGD(evenly.optim.for_model(model, exclude=["2"]))
    >>> model(torch.arange(9)).pow(2).sum().backward()
    >>> optimizer.step()
    >>> model[1].weight in optimizer.state, model[0].weight in optimizer.state
    (False, True)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        iters: int = 5,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        eps: float = _LEAST,
        *,
        skip_nonfinite: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            (project_row_rms, project_col_rms),
            lr,
            iters,
            momentum,
            weight_decay,
            skip_nonfinite=skip_nonfinite,
            betas=betas,
            adam_eps=adam_eps,
            maximize=maximize,
            foreach=foreach,
            eps=eps,
        )

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        at_least("eps", group["eps"], 0)

    def _splits(self) -> bool:
        return True

    def _direction(self, group: dict[str, Any], x: Tensor, layout: Shards) -> Tensor:
        rows, columns, spare = _sinkhorn(x, group["iters"], group["eps"], layout)
        return torch.mul(x, rows, out=spare).mul_(columns)


class SWAN(MultiNormGD):
    """Gradient descent along gradients with equal rows, then equal singular values: no state.

    The step of a matrix is ``-lr * project_spectral(project_row_rms(gradient))``, repeated ``iters`` times.

    Args:
        params, lr, momentum, weight_decay, maximize, foreach: as in :class:`MultiNormGD`.
        iters: rounds of both projections; 1.
        method, newton_iters: how :func:`project_spectral` works; ``"newton"``, 4, which leaves random square
            matrices nearer to equal singular values than ten coupled Newton-Schulz iterations, the usual number.
        skip_nonfinite, betas, adam_eps: as in :class:`MultiNormGD`.

    Raises:
        ValueError, TypeError, RuntimeError: as :class:`MultiNormGD`.

    >>> w = torch.nn.Parameter(torch.zeros(2, 2))
    >>> optimizer = SWAN([w], lr=1.0)
    >>> (w * torch.tensor([[3.0, 0.0], [0.0, -2.0]])).sum().backward()
    >>> optimizer.step()
    >>> torch.allclose(w.data, -(2**0.5) * torch.tensor([[1.0, 0.0], [0.0, -1.0]]), atol=0.03)
    True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        iters: int = 1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        method: Literal["newton", "svd"] = "newton",
        newton_iters: int = 4,
        *,
        skip_nonfinite: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        one_of("method", method, ("newton", "svd"))
        _iterations(newton_iters, "newton_iters")
        super().__init__(
            params,
            (project_row_rms, functools.partial(project_spectral, method=method, iters=newton_iters)),
            lr,
            iters,
            momentum,
            weight_decay,
            skip_nonfinite=skip_nonfinite,
            betas=betas,
            adam_eps=adam_eps,
            maximize=maximize,
            foreach=foreach,
        )


def _matrices(x: Tensor) -> None:
    if x.dim() < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., m, n).")
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}, expected a floating-point type.")


def _iterations(iters: int, name: str = "iters") -> None:
    if isinstance(iters, bool) or not isinstance(iters, int) or iters < 1:
        raise ValueError(f"{name}={iters!r}, expected a whole number of at least 1.")


def _sinkhorn(x: Tensor, iters: int, eps: float, layout: Shards) -> tuple[Tensor, Tensor, Tensor]:
    # The factors (k, m, 1) of the rows and (k, 1, n) of the columns of x (k, m, n), and a spare tensor like x. With
    # Y the squares of rows of norm 1, the squared factors follow r = 1 / (Y c), c = 1 / (Yᵀ r) up to n and m, which
    # come in at the end. A zero row or column has a large finite factor, and stays zero.
    norms = _row_norms(x, layout)
    inverse = torch.where(norms > eps, norms.reciprocal(), 0.0).unsqueeze(-1)
    squares = x * inverse
    squares = squares * squares if squares.requires_grad else squares.mul_(squares)
    floor = torch.finfo(x.dtype).tiny * 16 * max(layout.shape)
    r = torch.ones_like(norms)
    c = r
    for done in range(iters):
        if done:
            r = layout.sum_(_row_times(c, squares.mT), (1,)).clamp_min(floor).reciprocal()
        c = layout.sum_(_row_times(r, squares), (0,)).clamp_min(floor).reciprocal()
    return inverse * r.sqrt().unsqueeze(-1), (c * layout.shape[0]).sqrt().unsqueeze(-2), squares


def _row_times(rows: Tensor, matrices: Tensor) -> Tensor:
    # (k, m) times (k, m, n). On a CPU a batched product is fast with the vector on this side, slow on the other.
    return torch.matmul(rows.unsqueeze(1), matrices).squeeze(1)


def _row_norms(x: Tensor, layout: Shards) -> Tensor:
    # The norms of rows of any scale. Where their squares are safe in this type, the plain norm is taken.
    if x.device.type == "cpu" and not layout.split(1):
        norms = torch.linalg.vector_norm(x, dim=-1)
        safe = torch.finfo(x.dtype).tiny ** 0.25
        if bool(((norms > safe) & (norms < 1 / safe)).all()):
            return norms
    largest = torch.maximum(x.amax(-1), -x.amin(-1)) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    largest = layout.max_(largest, (1,))
    unit = torch.where(largest > 0, largest, 1.0)
    squares = torch.linalg.vector_norm(x / unit.unsqueeze(-1), dim=-1).square()
    return layout.sum_(squares, (1,)).sqrt() * unit


def _polar(x: Tensor, iters: int) -> Tensor:
    # U Vᵀ of x (..., m, n), m <= n, largest entry 1. The Schatten-4 norm, at hand from the Gram matrix, bounds the
    # spectral one; below twice as long as wide the matrix is iterated, else only its Gram matrix.
    shape = x.shape
    x = x.reshape(-1, *shape[-2:])
    gram = x @ x.mT
    bound = torch.linalg.matrix_norm(gram, keepdim=True).sqrt() * 1.0001
    bound = torch.where(bound > 0, bound, 1.0)
    x, gram = x / bound, gram / bound.square()
    total = gram
    near_square = shape[-1] < 2 * shape[-2]
    for k, (a, b, c) in enumerate(_minimax(iters)):
        if k and near_square:
            gram = x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G G, and a on the diagonal
        if near_square:
            x = torch.baddbmm(x, factor, x, beta=a)
            continue
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        total = factor @ total if k else factor
        if k + 1 < iters:
            gram = factor @ (gram @ factor)
    return (x if near_square else total @ x).reshape(shape)


@functools.lru_cache(maxsize=16)
def _minimax(iters: int) -> tuple[tuple[float, float, float], ...]:
    # Odd polynomials a x + b x³ + c x⁵, each the best approximation of 1 on the interval that the one before it left
    # of [low, 1]. `low` is the least, of 1e-4 and more, for which `iters` of them end within 1 percent of 1.
    least, most = 1e-4, 0.5
    if _compose(least, iters)[1] <= 0.01:
        return _compose(least, iters)[0]
    for _ in range(40):
        low = math.sqrt(least * most)
        if _compose(low, iters)[1] > 0.01:
            least = low
        else:
            most = low
    return _compose(most, iters)[0]


def _compose(low: float, iters: int) -> tuple[tuple[tuple[float, float, float], ...], float]:
    chosen = []
    high = 1.0
    error = 1.0
    for _ in range(iters):
        if high - low < 1e-6:
            coefficients, error = (1.875, -1.25, 0.375), 0.0
        else:
            coefficients, error = _best_odd(low, high)
        chosen.append(coefficients)
        low, high = 1 - error, 1 + error
    return tuple(chosen), error


def _best_odd(low: float, high: float) -> tuple[tuple[float, float, float], float]:
    # Remez: the error alternates at the ends of [low, high] and at the two extrema of the polynomial between them.
    points = np.array([low, low + (high - low) / 4, low + 3 * (high - low) / 4, high])
    for _ in range(60):
        signs = np.array([1.0, -1.0, 1.0, -1.0])
        system = np.stack([points, points**3, points**5, signs], 1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        inner = np.sqrt(np.array([(-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)]))
        if np.allclose(points[1:3], inner, rtol=1e-12):
            break
        points[1:3] = inner
    return (float(a), float(b), float(c)), abs(float(error))


def _stack(gradients: Iterable[Tensor], group: dict[str, Any]) -> Tensor:
    # (k, m, n) of gradients of one shape: float32 or better, out first, blocks apart. May share their memory.
    if group["blocks"] == 1 and not group["transpose"]:
        gradients = list(gradients)
        x = gradients[0].unsqueeze(0) if len(gradients) == 1 else torch.stack(gradients)
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    seen = []
    for gradient in gradients:
        matrix = gradient.t() if group["transpose"] else gradient
        seen.append(matrix.reshape(group["blocks"], matrix.shape[0] // group["blocks"], matrix.shape[1]))
    x = seen[0] if len(seen) == 1 else torch.cat(seen)
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _unstack(x: Tensor, group: dict[str, Any]) -> list[Tensor]:
    if group["blocks"] == 1 and not group["transpose"]:
        return list(x.unbind())
    matrices = [part.flatten(0, 1) for part in x.split(group["blocks"])]
    return [matrix.t() for matrix in matrices] if group["transpose"] else matrices


def _seen(layout: Shards, group: dict[str, Any]) -> Shards:
    m, n = layout.shape
    splits = layout.splits
    if group["transpose"]:
        m, n = n, m
        splits = tuple((1 - axis, process_group) for axis, process_group in splits)
    return Shards((m // group["blocks"], n), splits)


def _gather(shard: Tensor, param: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    return DTensor.from_local(
        shard, mesh, placements, run_check=False, shape=param.shape, stride=param.stride()
    ).full_tensor()


def _shard(whole: Tensor, param: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(mesh, placements).to_local()
