r"""Online normalization: statistics over a stream of samples, one sample at a time, at any batch size.

The mean and variance of batch normalization are tracked by exponential averages over *samples*; the gradient that
would flow through them is replaced by two controllers that drive the time averages of :math:`⟨x', 1⟩` and
:math:`⟨\tilde y', y⟩` to zero, the two projections that the gradient of a true normalizer lacks. Use it where the
batch is one sample (large volumes, streams, recurrent nets) and layer or group normalization loses accuracy.

Per channel, for samples :math:`t = 1, 2, …` in the order of the batch, with :math:`m_t, s_t` the mean and biased
variance over the positions of sample :math:`t`:

.. math::
    y_t &= \frac{x_t - μ_{t-1}}{\sqrt{σ_{t-1}^2 + ε}}, \\
    σ_t^2 &= α_f σ_{t-1}^2 + (1 - α_f) s_t + α_f (1 - α_f) (m_t - μ_{t-1})^2, \\
    μ_t &= α_f μ_{t-1} + (1 - α_f) m_t, \\
    \tilde y'_t &= y'_t - (1 - α_b) v_{t-1} y_t, \qquad v_t = v_{t-1} + \overline{\tilde y'_t y_t}, \\
    x'_t &= \frac{\tilde y'_t}{\sqrt{σ_{t-1}^2 + ε}} - (1 - α_b) u_{t-1}, \qquad u_t = u_{t-1} + \overline{x'_t}.

After it come weight and bias, and a guard against activations that run away while the averages lag behind:
:math:`z / \sqrt{\overline{z^2} + ε}` over all features of the sample ("layer scaling"), or a clamp.

All four recursions are linear: :math:`μ, σ^2, u` with a constant coefficient, :math:`v` with the coefficient
:math:`1 - (1 - α_b) \overline{y_t^2}`. They need only the moments of each sample and channel, so that a batch of N
samples costs what batch normalization costs (one reduction and one map each way; layer scaling is part of both)
plus the recursions over (N, C) numbers, which are exact: loops in C++ on a CPU, scans elsewhere
(:func:`evenly.core.kernels.pieces.scan`). On (N, C) inputs, without positions, the recursions are all of the cost: on
a CPU there is one loop over the samples each way, vectorized over the channels. The backward pass goes through the
statistics again instead of keeping them.

Reference:
    Vitaliy Chiley, Ilya Sharapov, Atli Kosson, Urs Köster, Ryan Reece, Sofía Samaniego de la Fuente, Vishal Subbiah
    & Michael James, *Online Normalization for Training Neural Networks*, NeurIPS 2019, arXiv 1905.05894,
    equations 8 (statistics), 10 to 13 (control) and 14 (layer scaling).

Where the paper and its released code differ:
    The guard of the paper's experiments is layer scaling, that of the released layer is clamping by default; the
    default here is the paper's. The released "batched" layer, which its authors deprecated, is not followed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from evenly.core import PatternError, moments, normalize
from evenly.core.kernels import pieces
from evenly.core.kernels.pieces import scan as _scan
from evenly.core.kernels.reference import accumulate_dtype
from evenly.core.patterns import product
from evenly.nn.norm import check_axis, recomputing, refuse_second_derivative

__all__ = ["OnlineNorm", "OnlineNorm1d", "OnlineNorm2d", "OnlineNorm3d"]

Guard = Literal["layer_scaling", "activation_clamping", "none"]
_STATE = ("running_mean", "running_var", "mean_before", "var_before", "ctrl_u", "ctrl_v")
_GUARDS = ("layer_scaling", "activation_clamping", "none")


class OnlineNorm(nn.Module):
    """Online normalization of inputs (N, C, ...) of any rank from 2 on.

    Args:
        num_features: C.
        alpha_fwd: decay of the statistics in samples, inside (0, 1). ``1 - 2**-10`` to ``1 - 2**-14`` in the paper.
        alpha_bkw: decay of the controllers in samples, inside (0, 1). ``1 - 2**-4`` to ``1 - 2**-7`` in the paper.
        eps: added to the variance.
        affine: learn weight and bias, one a channel.
        guard: ``"layer_scaling"``, ``"activation_clamping"`` or ``"none"``, applied last.
        guard_eps: added to the mean square of layer scaling.
        clamp_value: activations are clamped to [-clamp_value, clamp_value], with gradient 0 outside.
        group_size: channels that layer scaling scales together; -1: all.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device, dtype: of parameters and buffers.

    Shape:
        Input and output (N, C, ...). N is time: the samples of a batch are taken one after the other.

    Raises:
        ValueError: alpha outside (0, 1); negative eps; ``clamp_value`` not positive; an unknown guard; a
            ``group_size`` that does not divide C; a wrong number of axes or channels.
        RuntimeError: a second derivative, which this backward pass does not have.

    Buffers: ``running_mean`` (0), ``running_var`` (1), and the controllers ``ctrl_u``, ``ctrl_v`` (0), each (C,).

    In training the forward pass moves the statistics, also under ``no_grad`` (use ``eval()`` to evaluate), and each
    backward pass moves the controllers. A pass that activation checkpointing recomputes uses the statistics of the
    forward pass before it and does not move them. Until about ``1 / (1 - alpha_fwd)`` samples have passed the
    statistics are near 0 and 1, and only the guard bounds the output. Statistics are never shared between processes:
    each has a stream of its own.

    >>> torch.manual_seed(0)
    <torch._C.Generator object at ...>
    >>> whole, parts = OnlineNorm(3), OnlineNorm(3)
    >>> x = torch.randn(8, 3, 4, 4) * 5 + 2
    >>> y = torch.cat([parts(sample[None]) for sample in x])  # a batch of 8 is 8 batches of 1
    >>> torch.allclose(whole(x), y, atol=1e-5)
    True
    """

    running_mean: Tensor
    running_var: Tensor
    ctrl_u: Tensor
    ctrl_v: Tensor
    mean_before: Tensor
    var_before: Tensor

    _ranks: tuple[int, ...] | None = None

    def __init__(
        self,
        num_features: int,
        alpha_fwd: float = 0.999,
        alpha_bkw: float = 0.99,
        eps: float = 1e-5,
        affine: bool = True,
        guard: Guard = "layer_scaling",
        guard_eps: float = 1e-5,
        clamp_value: float = 5.0,
        group_size: int = -1,
        *,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features={num_features} must be positive.")
        for name, alpha in (("alpha_fwd", alpha_fwd), ("alpha_bkw", alpha_bkw)):
            if not 0 < alpha < 1:
                raise ValueError(f"{name}={alpha} is outside (0, 1); it is the weight of the past, such as 0.99.")
        for name, value in (("eps", eps), ("guard_eps", guard_eps)):
            if not value >= 0:
                raise ValueError(f"{name}={value}, expected a number of at least 0.")
        if guard not in _GUARDS:
            raise ValueError(f"guard={guard!r} is unknown, expected one of {', '.join(map(repr, _GUARDS))}.")
        if not clamp_value > 0:
            raise ValueError(f"clamp_value={clamp_value}, expected a positive number.")
        if group_size != -1 and (group_size < 1 or num_features % group_size):
            divisors = [g for g in range(1, num_features + 1) if num_features % g == 0]
            raise ValueError(f"group_size={group_size} does not divide {num_features} channels; choose of {divisors}.")
        if channel_dim not in (1, -1):
            raise ValueError(f"channel_dim={channel_dim}, expected 1 for (N, C, ...) or -1 for (N, ..., C).")
        self.num_features = num_features
        self.alpha_fwd = alpha_fwd
        self.alpha_bkw = alpha_bkw
        self.eps = eps
        self.affine = affine
        self.guard: Guard = guard
        self.guard_eps = guard_eps
        self.clamp_value = clamp_value
        self.group_size = group_size
        self.channel_dim = channel_dim
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(num_features, **options)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features, **options)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features, **options))
        self.register_buffer("running_var", torch.ones(num_features, **options))
        self.register_buffer("ctrl_u", torch.zeros(num_features, **options))
        self.register_buffer("ctrl_v", torch.zeros(num_features, **options))
        self.register_buffer("mean_before", self.running_mean.clone(), persistent=False)
        self.register_buffer("var_before", self.running_var.clone(), persistent=False)

    def reset_running_stats(self) -> None:
        """Forget the stream: mean 0, variance 1, controllers 0."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.ctrl_u.zero_()
        self.ctrl_v.zero_()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, the stream forgotten."""
        self.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``, and in training move the statistics past its samples."""
        name = type(self).__name__
        if self._ranks is not None and x.ndim not in self._ranks:
            expected = " or ".join(map(str, self._ranks))
            raise PatternError(f"{name} expects an input of {expected} axes, got {x.ndim}: shape {tuple(x.shape)}.")
        check_axis(x, self.channel_dim, self.num_features, name)
        if not x.is_floating_point():
            raise TypeError(f"{name} expects a floating-point tensor, got {x.dtype}.")
        if not self.training:
            return self._guard(self._evaluate(x))
        if x.numel() == 0:
            return self._evaluate(x)
        weight, bias = self.weight, self.bias
        whole = self._pass(x, weight, bias)
        if whole is not None:
            if x.numel() == x.shape[0] * self.num_features:
                return _OnlinePass.apply(x, weight, bias, whole)
            return _OnlineMaps.apply(x, weight, bias, whole, _Layout.of(x.shape, self.channel_dim))
        scaling, clamping = self.guard == "layer_scaling", self.guard == "activation_clamping"
        call = _Settings(
            _Layout.of(x.shape, self.channel_dim),
            self.alpha_fwd,
            self.alpha_bkw,
            self.eps,
            self.guard_eps if scaling else None,
            self.num_features if self.group_size == -1 else self.group_size,
            self.clamp_value if clamping else None,
        )
        again = recomputing()
        if not again:
            with torch.no_grad():
                self.mean_before.copy_(self.running_mean)
                self.var_before.copy_(self.running_var)
        y, mean, var = _OnlineFunction.apply(
            x, weight, bias, self.mean_before, self.var_before, self.ctrl_u, self.ctrl_v, call
        )
        if not again:
            with torch.no_grad():
                self.running_mean.copy_(mean)
                self.running_var.copy_(var)
        return y

    def _pass(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> pieces.Online | None:
        """The kernels of the layer, where they can compute."""
        buffers = self._buffers  # attributes of a module are slow to look up
        state = [buffers[name] for name in _STATE]
        if not pieces.fits(x, weight, bias, *state):
            return None
        group = 0
        if self.guard == "layer_scaling":
            group = self.num_features if self.group_size == -1 else self.group_size
        limit = self.clamp_value if self.guard == "activation_clamping" else 0.0
        decays = (self.alpha_fwd, self.alpha_bkw)
        return pieces.Online(decays, self.eps, group, self.guard_eps, limit, *state)  # type: ignore[arg-type]

    def _evaluate(self, x: Tensor) -> Tensor:
        return normalize(
            x,
            "n c ... -> c" if self.channel_dim == 1 else "n ... c -> c",
            eps=self.eps,
            stats=(self.running_mean, self.running_var),
            weight=self.weight,
            bias=self.bias,
            affine="c",
        )

    def _guard(self, z: Tensor) -> Tensor:
        if self.guard == "none":
            return z
        if self.guard == "activation_clamping":
            return z.clamp(-self.clamp_value, self.clamp_value)
        size = self.num_features if self.group_size == -1 else self.group_size
        pattern = "n (g c) ... -> n g" if self.channel_dim == 1 else "n ... (g c) -> n g"
        return normalize(z, pattern, center=False, scale="rms", eps=self.guard_eps, c=size)

    def extra_repr(self) -> str:
        parts = [f"{self.num_features}, alpha_fwd={self.alpha_fwd:.6g}, alpha_bkw={self.alpha_bkw:.6g}"]
        parts.append(f"eps={self.eps:g}, affine={self.affine}, guard={self.guard!r}")
        if self.group_size != -1:
            parts.append(f"group_size={self.group_size}")
        if self.channel_dim != 1:
            parts.append(f"channel_dim={self.channel_dim}")
        return ", ".join(parts)


class OnlineNorm1d(OnlineNorm):
    """:class:`OnlineNorm` for inputs (N, C) and (N, C, L).

    >>> OnlineNorm1d(4)(torch.randn(2, 4)).shape
    torch.Size([2, 4])
    """

    _ranks = (2, 3)


class OnlineNorm2d(OnlineNorm):
    """:class:`OnlineNorm` for inputs (N, C, H, W).

    >>> OnlineNorm2d(4)(torch.randn(2, 4, 3, 3)).shape
    torch.Size([2, 4, 3, 3])
    """

    _ranks = (4,)


class OnlineNorm3d(OnlineNorm):
    """:class:`OnlineNorm` for inputs (N, C, D, H, W).

    >>> OnlineNorm3d(4)(torch.randn(2, 4, 3, 3, 3)).shape
    torch.Size([2, 4, 3, 3, 3])
    """

    _ranks = (5,)


class _Layout(NamedTuple):
    """Where samples, channels and positions are."""

    kept: tuple[int, int]  # the axes of samples and channels
    positions: int
    pattern: str  # of the moments of each sample and channel

    @classmethod
    def of(cls, shape: Sequence[int], channel_dim: int) -> _Layout:
        channel = channel_dim % len(shape)
        positions = product([size for axis, size in enumerate(shape) if axis not in (0, channel)])
        return cls((0, channel), positions, "n c ... -> n c" if channel_dim == 1 else "n ... c -> n c")


class _Settings(NamedTuple):
    """What the two passes need to know besides tensors."""

    layout: _Layout
    alpha_fwd: float
    alpha_bkw: float
    eps: float
    guard_eps: float | None  # None: no layer scaling
    group_size: int
    clamp: float | None  # None: no clamp


class _OnlineFunction(torch.autograd.Function):
    """Normalization, affine map and layer scaling in one; backward, the control process.

    Everything but the input and the incoming gradient is a number a sample and channel. With d = x - m the output
    is ``gain * d + offset``, and the gradient is ``gain * dy - a * d - b``: each pass reduces once and maps once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        ctrl_u: Tensor,
        ctrl_v: Tensor,
        call: _Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        small = _small_dtype(x, call.layout)
        rate, layout = 1 - call.alpha_fwd, call.layout
        if layout.positions == 1:
            m = x.reshape(x.shape[0], -1).to(small)
            s = torch.zeros_like(m)
        else:
            m, s, _ = moments(x, layout.pattern)
            m, s = m.to(small), s.to(small)
        means, mean_after = _scan(call.alpha_fwd, rate * m, mean.to(small))
        lag = m - means
        variances, var_after = _scan(call.alpha_fwd, rate * s + (call.alpha_fwd * rate) * lag.square(), var.to(small))
        inverse = (variances + call.eps).rsqrt()
        offset = lag * inverse  # the mean of y over positions
        gain = inverse if weight is None else inverse * weight.to(small)
        shift = offset if weight is None else offset * weight.to(small)
        if bias is not None:
            shift = shift + bias.to(small)
        unguard = None
        if call.guard_eps is not None:
            square = _in_groups(gain.square() * s + shift.square(), call.group_size)
            unguard = (square + call.guard_eps).rsqrt()
            gain, shift = gain * unguard, shift * unguard
        ctx.save_for_backward(x, weight, m, s, inverse, offset, gain, shift, unguard)
        ctx.dtypes = (None if bias is None else bias.dtype,)
        ctx.controllers = (ctrl_u, ctrl_v)  # not saved: they move between the passes
        ctx.call = call
        ctx.mark_non_differentiable(mean_after, var_after)
        if layout.positions == 1:
            y = shift if call.clamp is None else shift.clamp(-call.clamp, call.clamp)
            y = y.view(x.shape).to(x.dtype)
        elif call.clamp is not None:
            y = pieces.clip(x, layout.kept, call.clamp, gain, shift, m)
        else:
            y = pieces.scale(x, layout.kept, gain, shift, m)
        return y, mean_after, var_after

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("OnlineNorm")
        x, weight, m, s, inverse, offset, gain, shift, unguard = ctx.saved_tensors
        (bias_dtype,), (ctrl_u, ctrl_v), call = ctx.dtypes, ctx.controllers, ctx.call
        layout, small, rate = call.layout, m.dtype, 1 - call.alpha_bkw
        if call.clamp is not None:
            if layout.positions == 1:
                inside = (shift >= -call.clamp) & (shift <= call.clamp)
                grad = torch.where(inside.view(grad.shape), grad, torch.zeros_like(grad))
            else:
                grad = pieces.clip(x, layout.kept, call.clamp, gain, shift, m, grad=grad)
        if layout.positions == 1:
            mean_g, mean_gd = grad.reshape(m.shape).to(small), torch.zeros_like(m)
        else:
            total_g, total_gd = pieces.sums_of_pairs(grad, x, layout.kept, m)
            mean_g, mean_gd = (total_g / layout.positions).to(small), (total_gd / layout.positions).to(small)
        # y = inverse * d + offset, so that the mean of y' y is that of g d and g
        mean_gy = inverse * mean_gd + offset * mean_g
        along = None
        if unguard is not None:
            # layer scaling: z' = (g - out * mean(g out)) / root, with out = gain * d + shift
            along = _in_groups(gain * mean_gd + shift * mean_g, call.group_size)
            mean_g = (mean_g - along * shift) * unguard
            mean_gy = (mean_gy - along * (gain * inverse * s + shift * offset)) * unguard
        dweight = dbias = None
        if weight is not None and ctx.needs_input_grad[1]:
            dweight = (layout.positions * mean_gy.sum(0)).to(weight.dtype)
        if bias_dtype is not None and ctx.needs_input_grad[2]:
            dbias = (layout.positions * mean_g.sum(0)).to(bias_dtype)
        if weight is not None:
            mean_g, mean_gy = mean_g * weight.to(small), mean_gy * weight.to(small)
        square = inverse.square() * s + offset.square()  # the mean of y²
        v, v_after = _scan(1 - rate * square, mean_gy, ctrl_v.to(small))
        u, u_after = _scan(call.alpha_bkw, (mean_g - rate * v * offset) * inverse, ctrl_u.to(small))
        ctrl_v.copy_(v_after)
        ctrl_u.copy_(u_after)
        dx = None
        if ctx.needs_input_grad[0]:
            along_d = rate * v * inverse.square()
            constant = rate * (v * offset * inverse + u)
            if along is not None:
                along_d = along_d + gain * along * gain
                constant = constant + gain * along * shift
            if layout.positions == 1:
                dx = (grad.reshape(m.shape).to(small) * gain - constant).view(x.shape).to(x.dtype)
            else:
                dx = pieces.combine(grad, x, layout.kept, gain, -along_d, -constant, m)
        return dx, dweight, dbias, None, None, None, None, None


class _OnlinePass(torch.autograd.Function):
    """:class:`_OnlineFunction` for one position a sample, with all that moves; it keeps nothing but the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, whole: pieces.Online) -> Tensor:
        y, kept = whole.forward(x if x.ndim == 2 else x.flatten(1), weight, bias, again=recomputing())
        ctx.save_for_backward(x, weight, bias, kept)
        ctx.whole = whole
        return y if x.ndim == 2 else y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("OnlineNorm")
        x, weight, bias, kept = ctx.saved_tensors
        shape, wanted = x.shape, ctx.needs_input_grad[0]
        if x.ndim > 2:
            x, grad = x.flatten(1), grad.flatten(1)
        dx, dweight, dbias = ctx.whole.backward(grad, x, weight, bias, kept, wanted=wanted)
        return dx if dx is None or x.ndim == len(shape) else dx.view(shape), dweight, dbias, None


class _OnlineMaps(torch.autograd.Function):
    """:class:`_OnlineFunction` with all that moves, and with its numbers from two loops instead of many operations."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, whole: pieces.Online, layout: _Layout
    ) -> Tensor:
        m, s, _ = moments(x, layout.pattern)
        m, s = m.double().contiguous(), s.double().contiguous()
        numbers, kept = whole.numbers(m, s, weight, bias, again=recomputing())
        ctx.save_for_backward(x, weight, bias, m, s, kept)
        ctx.whole, ctx.layout = whole, layout
        gain, shift = numbers[2], numbers[3]
        if whole.limit:
            return pieces.clip(x, layout.kept, whole.limit, gain, shift, m)
        return pieces.scale(x, layout.kept, gain, shift, m)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("OnlineNorm")
        x, weight, bias, m, s, kept = ctx.saved_tensors
        whole, layout = ctx.whole, ctx.layout
        numbers, _ = whole.numbers(m, s, weight, bias, kept=kept)
        slope, _, gain, shift, _ = numbers
        if whole.limit:
            grad = pieces.clip(x, layout.kept, whole.limit, gain, shift, m, grad=grad)
        total_g, total_gd = pieces.sums_of_pairs(grad, x, layout.kept, m)
        dweight, dbias = whole.control(numbers, total_g, total_gd, m, s, weight, bias, layout.positions)
        dx = pieces.combine(grad, x, layout.kept, gain, slope, shift, m) if ctx.needs_input_grad[0] else None
        return dx, dweight, dbias, None, None


def _in_groups(values: Tensor, size: int) -> Tensor:
    """The mean of (N, C) numbers over groups of channels, at every channel."""
    n, c = values.shape
    return values.view(n, c // size, size).mean(2, keepdim=True).expand(n, c // size, size).reshape(n, c)


def _small_dtype(x: Tensor, layout: _Layout) -> torch.dtype:
    """The dtype of numbers of which there is one a sample and channel: float64 where they are few."""
    if layout.positions == 1 or x.device.type == "mps":
        return accumulate_dtype(x.dtype)
    return torch.float64
