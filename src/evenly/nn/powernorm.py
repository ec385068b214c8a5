r"""Power normalization: divide by a running quadratic mean, and let a second running state correct the gradient.

Batch normalization does poorly in transformers for text, where the mean and variance of a batch jump from batch
to batch. Power normalization keeps what is good about it (in evaluation it is a constant scale a channel, which
:func:`fold_into_linear` folds into the next layer, as layer normalization cannot be) and changes three things: no
mean is subtracted, the forward pass divides by a *running* quadratic mean :math:`ψ^2`, and the backward pass uses
a running average :math:`ν` in the place of the batch's term. Per channel, with :math:`g = γ\,∂L/∂y`:

.. math::
    ψ_B^2 &= \frac1m \sum x^2, \qquad
    \hat x = \frac{x}{\sqrt{ψ_{t-1}^2 + ε}}, \qquad y = γ \hat x + β, \qquad
    ψ_t^2 = α_f ψ_{t-1}^2 + (1 - α_f) ψ_B^2, \\
    \frac{∂L}{∂x} &= \frac{g - ν_{t-1} \hat x}{\sqrt{ψ_{t-1}^2 + ε}}, \qquad
    ν_t = ν_{t-1} \big(1 - (1 - α_b)\, \overline{\hat x^2}\big) + (1 - α_b)\, \overline{g \hat x}.

For the first ``warmup_iters`` steps the forward pass divides by :math:`ψ_B` of the batch. Before it, the layer of
the paper's experiments scales the channels of each token, in groups, to a mean square of 1 (:class:`GroupScaling`).

Reference:
    Sheng Shen, Zhewei Yao, Amir Gholami, Michael W. Mahoney & Kurt Keutzer, *PowerNorm: Rethinking Batch
    Normalization in Transformers*, ICML 2020, arXiv 2003.07845, section 4 and algorithms 1 (PN-V) and 2 (PN).

Where the paper and its released code differ:
    The code divides the gradient by the quadratic mean of the *batch* also after warm-up; the paper by the running
    one, which divided in the forward pass. The default is the paper; ``backward_scale="batch"`` is the code.
    The code stores :math:`ν / (1 - α_b)`, and so does ``ema_gz`` here.
    Warm-up is described by the code alone, and followed: at step :math:`t <` ``warmup_iters`` the running value is
    first replaced by the plain average of all batches, and the exponential average is applied on top of it.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from evenly.core import PatternError, normalize
from evenly.core.kernels import pieces
from evenly.core.kernels.reference import accumulate_dtype
from evenly.nn.norm import check_axis, recomputing, refuse_second_derivative, sum_of_products

__all__ = ["GroupScaling", "PowerNorm", "PowerNormV", "fold_into_linear"]


class GroupScaling(nn.Module):
    """Divide the channels of every token, in groups, by the root of their mean square. Nothing is learned.

    Args:
        group_num: into how many groups the channels are split (attention heads in the paper); 1: one scale a token.
        eps: added to the mean square.
        channel_dim: -1 for (..., C), 1 for (N, C, ...).

    Raises:
        ValueError: ``group_num`` below 1; channels that it does not divide; wrong axes.

    >>> y = GroupScaling(2)(torch.tensor([[3.0, 3.0, 0.1, -0.1]]))
    >>> torch.allclose(y, torch.tensor([[1.0, 1.0, 1.0, -1.0]]), atol=1e-3)
    True
    """

    def __init__(self, group_num: int = 1, eps: float = 1e-5, channel_dim: int = -1) -> None:
        super().__init__()
        if group_num < 1:
            raise ValueError(f"group_num={group_num} must be at least 1.")
        self.group_num = group_num
        self.eps = _checked_eps(eps)
        self.channel_dim = _checked_channel_dim(channel_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Scale ``x`` of shape (..., C), or (N, C, ...) with ``channel_dim=1``."""
        if x.ndim <= self.channel_dim or x.ndim == 0 or x.shape[self.channel_dim] % self.group_num:
            raise PatternError(
                f"GroupScaling splits axis {self.channel_dim} into {self.group_num} groups, which does not fit the "
                f"input of shape {tuple(x.shape)}."
            )
        pattern = "... (g c) -> ... g" if self.channel_dim == -1 else "n (g c) ... -> n g ..."
        return normalize(x, pattern, center=False, scale="rms", eps=self.eps, g=self.group_num)

    def extra_repr(self) -> str:
        return f"group_num={self.group_num}, eps={self.eps:g}"


class PowerNormV(nn.Module):
    """PN-V: the quadratic mean of the batch in training, the running one in evaluation, the exact gradient.

    The intermediate form of the paper (algorithm 1): batch normalization without its mean.

    Args:
        num_features: C.
        eps: added to the quadratic mean, inside the root.
        alpha_fwd: decay of the running quadratic mean, inside (0, 1); the weight of the *old* value.
        affine: learn weight and bias, one a channel.
        channel_dim: -1 for (..., C), 1 for (N, C, ...).
        sync: in training, share sums with all processes of ``process_group`` (default all).
        process_group: the processes to share with.
        device, dtype: of parameters and buffers.

    Shape:
        Input and output (..., C), or (N, C, ...). ``pad_mask`` has the shape of the input without its channels.

    Raises:
        ValueError: alpha outside (0, 1), negative eps, a wrong number of channels, a mask of another shape.

    Buffers: ``running_phi`` (C,), the running mean square, initially 1; ``iters``, training steps so far.

    >>> layer = PowerNormV(4)
    >>> y = layer(torch.randn(8, 16, 4) * 3)
    >>> torch.allclose(y.square().mean((0, 1)), torch.ones(4), atol=1e-4)
    True
    """

    running_phi: Tensor
    iters: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        alpha_fwd: float = 0.9,
        affine: bool = True,
        *,
        channel_dim: int = -1,
        sync: bool = False,
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features={num_features} must be positive.")
        self.num_features = num_features
        self.eps = _checked_eps(eps)
        self.alpha_fwd = _checked_alpha(alpha_fwd, "alpha_fwd")
        self.affine = affine
        self.channel_dim = _checked_channel_dim(channel_dim)
        self.sync = sync
        self.process_group = process_group
        self.pattern = "... c -> c" if channel_dim == -1 else "n c ... -> c"
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(num_features, **options)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features, **options)) if affine else None
        self.register_buffer("running_phi", torch.ones(num_features, **options))
        self.register_buffer("iters", torch.zeros((), dtype=torch.long, device=device))

    def reset_running_stats(self) -> None:
        """Forget the running state."""
        self.running_phi.fill_(1)
        self.iters.zero_()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, running state forgotten."""
        self.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """Normalize ``x``; tokens where ``pad_mask`` is true are scaled too, and do not count."""
        keep = self._check(x, pad_mask)
        if not self.training:
            return self._scale_by(x, self.running_phi)
        whole = self._pass(x, keep)
        if whole is not None:
            return _PowerPass.apply(x, self.weight, self.bias, whole)
        square, count = self._mean_square(x, keep)
        with torch.no_grad():
            if not recomputing():
                self.iters.add_(count > 0)
                new = self.running_phi + (1 - self.alpha_fwd) * (square - self.running_phi)
                self.running_phi.copy_(torch.where(count > 0, new, self.running_phi))
        return self._scale_by(x, square)

    def _pass(self, x: Tensor, keep: Tensor | None) -> pieces.Power | None:
        """The kernel that is the whole layer, where nothing is padded or shared and channels are last."""
        if keep is not None or self.sync or self.channel_dim != -1:
            return None
        buffers = self._buffers  # attributes of a module are slow to look up
        running, steps = buffers["running_phi"], buffers["iters"]
        before, state = buffers.get("phi_before"), buffers.get("ema_gz")
        assert running is not None and steps is not None
        if not pieces.fits(x, self.weight, self.bias, running, before, state):
            return None
        return pieces.Power(*self._pass_settings(), running, steps, before, state)

    def _pass_settings(self) -> tuple[int, float, bool, int, tuple[float, float], bool]:
        return 0, self.eps, True, 0, (self.alpha_fwd, 1.0), False

    def _check(self, x: Tensor, pad_mask: Tensor | None) -> Tensor | None:
        """The tokens that count, broadcastable to ``x``, or None for all."""
        check_axis(x, self.channel_dim, self.num_features, type(self).__name__, 1 if self.channel_dim == -1 else 2)
        if not x.is_floating_point():
            raise TypeError(f"{type(self).__name__} expects a floating-point tensor, got {x.dtype}.")
        if pad_mask is None:
            return None
        tokens = x.shape[:-1] if self.channel_dim == -1 else (x.shape[0], *x.shape[2:])
        if not isinstance(pad_mask, Tensor) or pad_mask.dtype != torch.bool:
            given = pad_mask.dtype if isinstance(pad_mask, Tensor) else type(pad_mask).__name__
            raise TypeError(f"pad_mask expects a boolean tensor (true: padding), got {given}.")
        if pad_mask.shape != tokens:
            raise ValueError(
                f"pad_mask has shape {tuple(pad_mask.shape)}, expected {tuple(tokens)}: the input's shape "
                f"{tuple(x.shape)} without its channels."
            )
        return ~pad_mask.unsqueeze(self.channel_dim)

    def _mean_square(self, x: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """The mean square of each channel (0 of nothing) and the number of tokens, over all processes with sync."""
        if keep is None and not torch.is_grad_enabled():
            total = pieces.sums_of_squares(x, [self.channel_dim])
            count = total.new_tensor(float(x.numel() // self.num_features))
        else:
            v = x.to(accumulate_dtype(x.dtype))
            if keep is None:
                count = v.new_tensor(float(x.numel() // self.num_features))
            else:
                count = keep.sum().to(v.dtype)
                v = torch.where(keep, v, v.new_zeros(()))
            total = sum_of_products(v, v, _all_but(self.channel_dim, x.ndim))
        if self.sync:
            total, count = _AllReduce.apply(total, count, self.process_group)
        return total / count.clamp(min=1), count

    def _scale_by(self, x: Tensor, square: Tensor) -> Tensor:
        return normalize(
            x,
            self.pattern,
            center=False,
            scale="rms",
            eps=self.eps,
            stats=(None, square),
            weight=self.weight,
            bias=self.bias,
            affine="c",
        )

    def extra_repr(self) -> str:
        parts = [f"{self.num_features}, eps={self.eps:g}, alpha_fwd={self.alpha_fwd}, affine={self.affine}"]
        if self.channel_dim != -1:
            parts.append(f"channel_dim={self.channel_dim}")
        if self.sync:
            parts.append("sync=True")
        return ", ".join(parts)


class PowerNorm(PowerNormV):
    """Power normalization, preceded by group scaling: the layer of the paper's experiments.

    Args:
        num_features: C.
        eps: added to the quadratic means, inside the roots.
        alpha_fwd: decay of the running quadratic mean, inside (0, 1); the weight of the *old* value.
        alpha_bkw: decay of the running gradient term, inside (0, 1).
        warmup_iters: training steps in which the forward pass uses the batch (the paper: as many as the
            learning rate warms up). 0: none; the running mean square then starts at 1, which fits inputs that
            group scaling has scaled.
        group_num: groups of :class:`GroupScaling`; divides ``num_features``.
        affine: learn weight and bias, one a channel.
        channel_dim: -1 for (..., C), 1 for (N, C, ...).
        backward_scale: ``"running"`` (the paper) or ``"batch"`` (the released code).
        group_scaling: scale each token first.
        sync: in training, share the sums of both passes with all processes of ``process_group`` (default all);
            the released code keeps the state of each process apart.
        process_group: the processes to share with.
        device, dtype: of parameters and buffers.

    Shape:
        Input and output (..., C), or (N, C, ...). ``pad_mask`` has the shape of the input without its channels and
        is true at padding: padding does not count in the quadratic mean; it is scaled like the rest, and the means
        of the backward pass run over it, as in the released code.

    Raises:
        ValueError: alpha outside (0, 1); negative eps or ``warmup_iters``; ``group_num`` that does not divide
            ``num_features``; an unknown ``backward_scale``; a wrong number of channels; a mask of another shape.
        RuntimeError: a second derivative, which this backward pass does not have.

    Buffers: ``running_phi`` (C,), :math:`ψ^2`; ``ema_gz`` (C,), :math:`ν / (1 - α_b)`; ``iters``, training steps.

    The state lives in both passes. Each backward pass moves ``ema_gz`` once: two passes through one graph move it
    twice, a forward pass without one not at all. A pass that activation checkpointing recomputes uses the state
    of the forward pass before it, and moves ``running_phi`` once.

    Cost: on a CPU, with channels last, no mask and no ``sync``, one pass over the input forward (two during warm-up)
    and one over input and gradient backward, group scaling included; of the input nothing more is kept. Otherwise
    forward one reduction and one scaling, backward one reduction and one combination of the gradient and the input,
    and group scaling is a pass of its own each way.

    >>> layer = PowerNorm(8, warmup_iters=0, group_num=2)
    >>> x = torch.randn(4, 10, 8, requires_grad=True)
    >>> layer(x).square().sum().backward()
    >>> layer.iters.item(), bool((layer.ema_gz != 0).all())
    (1, True)
    """

    ema_gz: Tensor
    phi_before: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        alpha_fwd: float = 0.9,
        alpha_bkw: float = 0.9,
        warmup_iters: int = 4000,
        group_num: int = 1,
        affine: bool = True,
        *,
        channel_dim: int = -1,
        backward_scale: Literal["running", "batch"] = "running",
        group_scaling: bool = True,
        sync: bool = False,
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            alpha_fwd,
            affine,
            channel_dim=channel_dim,
            sync=sync,
            process_group=process_group,
            device=device,
            dtype=dtype,
        )
        self.alpha_bkw = _checked_alpha(alpha_bkw, "alpha_bkw")
        if warmup_iters < 0:
            raise ValueError(f"warmup_iters={warmup_iters} must be at least 0.")
        if group_num < 1 or num_features % group_num:
            divisors = [g for g in range(1, num_features + 1) if num_features % g == 0]
            raise ValueError(
                f"group_num={group_num} does not divide num_features={num_features}; its divisors are {divisors}."
            )
        if backward_scale not in ("running", "batch"):
            raise ValueError(f"backward_scale={backward_scale!r} is unknown, expected 'running' or 'batch'.")
        self.warmup_iters = warmup_iters
        self.group_num = group_num
        self.backward_scale = backward_scale
        self.scaling = GroupScaling(group_num, eps, channel_dim) if group_scaling else None
        self.register_buffer("ema_gz", torch.zeros_like(self.running_phi))
        self.register_buffer("phi_before", self.running_phi.clone(), persistent=False)

    def reset_running_stats(self) -> None:
        """Forget the running state."""
        super().reset_running_stats()
        self.ema_gz.zero_()

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """Normalize ``x``; tokens where ``pad_mask`` is true are scaled too, and do not count."""
        keep = self._check(x, pad_mask)
        whole = self._pass(x, keep) if self.training else None
        if whole is not None:
            return _PowerPass.apply(x, self.weight, self.bias, whole)
        if self.scaling is not None:
            x = self.scaling(x)
        if not self.training:
            return self._scale_by(x, self.running_phi)
        with torch.no_grad():
            square, count = self._mean_square(x, keep)
            # The backward pass counts padding, whose mean square differs from that of the tokens.
            total, positions = (square, count) if keep is None else self._mean_square(x, None)
            if not recomputing():
                self.iters.add_(count > 0)
                self.phi_before.copy_(self.running_phi)
                self._advance(square, count)
            warm = (self.iters <= self.warmup_iters) & (count > 0)
            phi = torch.where(warm, square, self.phi_before.to(square.dtype))
            phi_back = None if self.backward_scale == "running" else torch.where(count > 0, square, phi)
        call = _Settings(
            self.channel_dim,
            self.eps,
            1 - self.alpha_bkw,
            self.sync,
            self.process_group,
        )
        return _PowerFunction.apply(x, self.weight, self.bias, phi, phi_back, total, positions, self.ema_gz, call)

    def _pass_settings(self) -> tuple[int, float, bool, int, tuple[float, float], bool]:
        group = 0 if self.scaling is None else self.num_features // self.group_num
        decays = (self.alpha_fwd, self.alpha_bkw)
        return group, self.eps, False, self.warmup_iters, decays, self.backward_scale == "batch"

    def _advance(self, square: Tensor, count: Tensor) -> None:
        old = self.running_phi.to(square.dtype)
        average = old + (square - old) / self.iters.clamp(min=1)  # (old (t - 1) + square) / t
        new = torch.where(self.iters < self.warmup_iters, average, old)
        new = new + (1 - self.alpha_fwd) * (square - new)
        self.running_phi.copy_(torch.where(count > 0, new, old))

    def extra_repr(self) -> str:
        parts = [f"{self.num_features}, eps={self.eps:g}, alpha_fwd={self.alpha_fwd}, alpha_bkw={self.alpha_bkw}"]
        parts.append(f"warmup_iters={self.warmup_iters}, group_num={self.group_num}, affine={self.affine}")
        if self.channel_dim != -1:
            parts.append(f"channel_dim={self.channel_dim}")
        if self.backward_scale != "running":
            parts.append(f"backward_scale={self.backward_scale!r}")
        if self.scaling is None:
            parts.append("group_scaling=False")
        if self.sync:
            parts.append("sync=True")
        return ", ".join(parts)


@torch.no_grad()
def fold_into_linear(norm: PowerNormV, linear: nn.Linear) -> nn.Linear:
    """The linear layer that does what ``norm`` in evaluation and then ``linear`` do.

    Group scaling depends on the token and cannot be folded: with it the new layer follows ``norm.scaling``.

    Args:
        norm: :class:`PowerNorm` or :class:`PowerNormV` with channels last.
        linear: the layer after it, with C inputs.

    Raises:
        ValueError: another number of features; ``channel_dim=1``.

    >>> norm, linear = PowerNorm(4, group_scaling=False).eval(), nn.Linear(4, 3)
    >>> x = torch.randn(2, 4)
    >>> torch.allclose(fold_into_linear(norm, linear)(x), linear(norm(x)), atol=1e-6)
    True
    """
    if norm.channel_dim != -1:
        raise ValueError(f"fold_into_linear folds a layer whose channels are last, got channel_dim={norm.channel_dim}.")
    if linear.in_features != norm.num_features:
        raise ValueError(f"The linear layer has {linear.in_features} inputs, expected {norm.num_features}.")
    accumulate = torch.float64 if linear.weight.device.type != "mps" else torch.float32
    scale = (norm.running_phi.to(accumulate) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    weight = linear.weight.to(accumulate)
    bias = weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.to(accumulate)
    if norm.bias is not None:
        bias = bias + weight @ norm.bias.to(accumulate)
    folded = nn.Linear(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None or norm.bias is not None,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
    )
    folded.weight.copy_(weight * scale)
    if folded.bias is not None:
        folded.bias.copy_(bias)
    return folded.train(linear.training)


class _Settings(NamedTuple):
    """What the two passes need to know besides tensors."""

    channel_dim: int
    eps: float
    rate: float  # 1 - alpha_bkw
    sync: bool
    process_group: Any


class _PowerFunction(torch.autograd.Function):
    """Scale by a given quadratic mean; backward, correct the gradient by the running term and move it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        phi: Tensor,
        phi_back: Tensor | None,
        total: Tensor,
        positions: Tensor,
        state: Tensor,
        call: _Settings,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, phi, phi_back, total, positions)
        ctx.has_bias = bias is not None
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.state = state  # not saved: it moves between the passes
        ctx.call = call
        scale = (phi + call.eps).rsqrt()
        if weight is not None:
            scale = scale * weight.to(phi.dtype)
        return pieces.scale(x, [call.channel_dim], scale, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("PowerNorm")
        x, weight, phi, phi_back, total, positions = ctx.saved_tensors
        call, state = ctx.call, ctx.state
        channels = [call.channel_dim]
        inverse = (phi + call.eps).rsqrt()
        total_g, total_gx = pieces.sums_of_pairs(grad, x, channels)
        dots = total_gx.to(phi.dtype) * inverse  # sum of dy x̂
        gz = dots if weight is None else dots * weight.to(phi.dtype)
        if call.sync:
            gz = gz.clone()
            _all_reduce(gz, call.process_group)
        count = positions.clamp(min=1)
        old = state.to(phi.dtype)
        nu = call.rate * old
        dx = None
        if ctx.needs_input_grad[0]:
            back = inverse if phi_back is None else (phi_back + call.eps).rsqrt()
            gain = back if weight is None else back * weight.to(phi.dtype)
            # g * gain - x * nu * inverse * back
            dx = pieces.combine(grad, x, channels, gain, -nu * inverse * back)
        state.copy_(torch.where(positions > 0, old + gz / count - nu * total * inverse.square(), old))
        dweight = dots.to(weight.dtype) if weight is not None and ctx.needs_input_grad[1] else None
        dbias = None
        if ctx.has_bias and ctx.needs_input_grad[2]:
            dbias = total_g.to(ctx.bias_dtype)
        return dx, dweight, dbias, None, None, None, None, None, None


class _PowerPass(torch.autograd.Function):
    """Group scaling and :class:`_PowerFunction` in one, with all that moves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, whole: pieces.Power) -> Tensor:
        y, kept = whole.forward(x, weight, bias, again=recomputing())
        ctx.save_for_backward(x, weight, bias, kept)
        ctx.whole = whole
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, kept = ctx.saved_tensors
        whole, wanted = ctx.whole, ctx.needs_input_grad
        if whole.exact and torch.is_grad_enabled():
            return *_exact_gradient(grad, x, weight, bias, whole.eps, wanted), None
        refuse_second_derivative("PowerNorm")
        return *whole.backward(grad, x, weight, bias is not None, kept, wanted=wanted[0]), None


def _exact_gradient(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradient of PN-V as a function that has one itself."""
    y = normalize(x, "... c -> c", center=False, scale="rms", eps=eps, weight=weight, bias=bias, affine="c")
    inputs = [t if needs else None for t, needs in zip((x, weight, bias), needed, strict=False)]
    wanted = [t for t in inputs if t is not None]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return [None if t is None else next(found) for t in inputs]


class _AllReduce(torch.autograd.Function):
    """Sums over all processes; the gradient is that of the sum of all processes' losses."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, count: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        ctx.group = group
        joined = torch.cat([total, count.reshape(1)])
        _all_reduce(joined, group)
        total, count = joined[:-1].clone(), joined[-1].clone()
        ctx.mark_non_differentiable(count)
        return total, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.clone()
        _all_reduce(grad, ctx.group)
        return grad, None, None


def _all_reduce(values: Tensor, group: Any) -> None:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values, group=group if group is not None else dist.group.WORLD)


def _all_but(channel_dim: int, ndim: int) -> list[int]:
    return [axis for axis in range(ndim) if axis != channel_dim % ndim]


def _checked_eps(eps: float) -> float:
    if not eps >= 0:
        raise ValueError(f"eps={eps}, expected a number of at least 0.")
    return eps


def _checked_alpha(alpha: float, name: str) -> float:
    if not 0 < alpha < 1:
        raise ValueError(f"{name}={alpha} is outside (0, 1); it is the weight of the old value, such as 0.9.")
    return alpha


def _checked_channel_dim(channel_dim: int) -> int:
    if channel_dim not in (1, -1):
        raise ValueError(f"channel_dim={channel_dim}, expected 1 for (N, C, ...) or -1 for (..., C).")
    return channel_dim
