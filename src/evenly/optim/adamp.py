"""AdamP and SGDP: momentum without the growth of weights whose scale does not matter.

A weight that a normalization layer follows is scale-invariant: only its direction matters, its gradient is
orthogonal to it, and its effective step is ``lr / ‖w‖²``. Each step lengthens it, and momentum lengthens it much
more, so that the effective step dies early. AdamP and SGDP take the radial part out of the update of every weight
that looks scale-invariant; elsewhere they are AdamW and SGD with decoupled weight decay. Use them for networks full
of normalization when weight decay should not have to be tuned against the growth of norms.

.. math::
    \\Pi_w(u) = u - (\\hat w \\cdot u)\\, \\hat w, \\qquad \\hat w = w / \\lVert w \\rVert, \\qquad
    w \\leftarrow (1 - \\eta \\lambda r)\\, w - \\eta\\, \\Pi_w(u)
    \\quad \\text{if } |\\cos(g, w)| < \\delta / \\sqrt{\\dim w},

first for each output channel, then for the whole tensor, with the raw gradient :math:`g`, the base optimizer's
update :math:`u` and :math:`r` = ``wd_ratio``; otherwise :math:`u` stays as it is and :math:`r = 1`.

Reference:
    Byeongho Heo, Sanghyuk Chun, Seong Joon Oh, Dongyoon Han, Sangdoo Yun, Gyuwan Kim, Youngjung Uh & Jung-Woo Ha,
    *AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights*, ICLR 2021,
    arXiv 2006.08217, algorithms 1 and 2, equations 10 to 12. Where the released code differs from the paper (SGDP
    without Nesterov projects its own momentum buffer), the paper is followed; ``buffer="code"`` gives the code's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from evenly.core.kernels import pieces
from evenly.optim._common import (
    Base,
    Piece,
    Shards,
    at_least,
    check_betas,
    jobs,
    local,
    local_gradient,
    number,
    one_of,
    shards,
)

__all__ = ["SGDP", "AdamP", "project_update"]

View = Literal["channel", "layer"]


class _Seen(NamedTuple):
    """What the test of the tensors found: the view that projects each, and the squared norms of its rows."""

    views: dict[int, View | None]
    sums: dict[int, Tensor]


class _Projecting(Base):
    """The step that AdamP and SGDP share; they differ in their state and in the update that it makes."""

    _counts: dict[str, int] = {}  # noqa: RUF012 (replaced at every step, never changed)
    _fused_dtypes: tuple[torch.dtype, ...] | None = None  # that the fused kernel takes; None: all

    def _check(self, group: dict[str, Any]) -> None:
        at_least("eps", group["eps"], 0)
        at_least("weight_decay", group["weight_decay"], 0)
        if group["delta"] != math.inf:
            at_least("delta", group["delta"], 0)
        at_least("wd_ratio", group["wd_ratio"], 0)
        one_of("foreach", group["foreach"], (None, True, False))

    @property
    def projected(self) -> dict[str, int]:
        """How many tensors the last step projected: by ``"channel"``, by ``"layer"``, and not at all (``"none"``)."""
        return {view: self._counts.get(view, 0) for view in ("channel", "layer", "none")}

    def _begin(self) -> None:
        self._counts = {}

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        states = [self._state(group, param) for param in params]
        w = [local(param) for param in params]
        g = [local_gradient(param, grad) for param, grad in zip(params, grads, strict=True)]
        layouts = [shards(param) for param in params]
        whole = []
        for place, layout in enumerate(layouts):
            if layout.splits:  # one at a time, in the same order on every process
                seen = self._test(group, [place], w, g, layouts)
                self._job(group, [[Piece(place)]], w, g, states, layouts, seen)
            else:
                whole.append(place)
        seen = self._test(group, whole, w, g, layouts)
        fused = self._in_one_pass(group, whole, w, g, states, layouts, seen)
        rest = [place for place in whole if place not in fused] if fused else whole
        for job in jobs(w, rest, group["foreach"] is not False):
            self._job(group, job, w, g, states, layouts, seen)

    def _test(
        self, group: dict[str, Any], places: list[int], w: list[Tensor], g: list[Tensor], layouts: list[Shards]
    ) -> _Seen:
        tested = [place for place in places if _testable(layouts[place].shape, group["delta"])]
        pairs = [(g[place], w[place]) for place in tested]
        counts = {place: len(w[place]) for place in tested}
        sums, views = _views(pairs, counts, layouts, group["delta"], group["eps"])
        for place in places:
            counted = views.get(place) or "none"
            self._counts[counted] = self._counts.get(counted, 0) + 1
        return _Seen(views, sums)

    def _job(
        self,
        group: dict[str, Any],
        job: list[list[Piece]],
        w: list[Tensor],
        g: list[Tensor],
        states: list[dict[str, Tensor]],
        layouts: list[Shards],
        seen: _Seen,
    ) -> None:
        views, sums = seen
        places = [piece.place for piece in job[0]]
        self._count([states[place] for place in places])
        for bucket in job:
            self._accumulate(group, bucket, self._gradients(group, bucket, g), states)
        # What a whole tensor's radial part depends on is found in a pass of its own if the tensor is in pieces.
        radial: dict[int, Tensor] = {}
        if len(job) > 1 and views.get(places[0]) == "layer":
            parts = []
            for bucket in job:
                (update,) = self._updates(group, bucket, self._gradients(group, bucket, g), states, True)
                parts.append(_along([update], [bucket[0].of(w[places[0]])]))
            radial[places[0]] = torch.cat(parts)
        for bucket in job:
            projected = any(views.get(piece.place) for piece in bucket)
            weights = [piece.of(w[piece.place]) for piece in bucket]
            gradients = self._gradients(group, bucket, g)
            if not projected:
                self._decay(group, weights, None)
                self._move(group, bucket, weights, gradients, states)
                continue
            updates = self._updates(group, bucket, gradients, states, True)
            for k, piece in enumerate(bucket):
                view = views.get(piece.place)
                if view:
                    along = radial[piece.place] if radial else _along([updates[k]], [weights[k]])
                    norms = sums[piece.place]
                    if view == "channel" and piece.rows is not None:
                        norms = norms[piece.rows]
                    updates[k] = _remove(updates[k], weights[k], along, norms, view, layouts[piece.place], group["eps"])
            self._decay(group, weights, [group["wd_ratio"] if views.get(piece.place) else 1.0 for piece in bucket])
            _subtract(weights, updates, self._sizes(group, bucket, states))

    def _gradients(self, group: dict[str, Any], bucket: list[Piece], g: list[Tensor]) -> list[Tensor]:
        gradients = [piece.of(g[piece.place]) for piece in bucket]
        return list(torch._foreach_neg(gradients)) if group["maximize"] else gradients

    def _decay(self, group: dict[str, Any], weights: list[Tensor], ratios: list[float] | None) -> None:
        if not group["weight_decay"]:
            return
        strength = self._strength(group)
        if ratios is None:
            torch._foreach_mul_(weights, 1 - strength)
        else:
            torch._foreach_mul_(weights, [1 - strength * ratio for ratio in ratios])

    def _state(self, group: dict[str, Any], param: Tensor) -> dict[str, Tensor]:
        """The state of a parameter, made where there is none; local tensors."""
        raise TypeError("write _state in the subclass")

    def _in_one_pass(
        self,
        group: dict[str, Any],
        places: list[int],
        w: list[Tensor],
        g: list[Tensor],
        states: list[dict[str, Tensor]],
        layouts: list[Shards],
        seen: _Seen,
    ) -> set[int]:
        """Take the whole step of those tensors that torch's fused kernel for CPUs can take; returns which.

        What is not projected is the base optimizer's step. For the others the kernel gets zeros for the weights and a
        learning rate of 1, and leaves the negative update there.
        """
        if group["foreach"] is False or not self._fusible(group):
            return set()
        places = [
            place
            for place in places
            if w[place].is_cpu
            and w[place].numel()
            and (self._fused_dtypes is None or w[place].dtype in self._fused_dtypes)
            and all(t.is_contiguous() for t in (w[place], g[place], *states[place].values()))
        ]
        views, sums = seen
        lr = number("lr", group["lr"])
        plain = [place for place in places if not views.get(place)]
        if plain:
            self._fused(group, [w[place] for place in plain], plain, g, states, lr)
        strength = group["wd_ratio"] * self._strength(group)
        for job in jobs(w, [place for place in places if views.get(place)], True):
            projected = [piece.place for piece in job[0]]
            weights = [w[place] for place in projected]
            updates = [torch.zeros_like(weight) for weight in weights]
            self._fused(group, updates, projected, g, states, 1.0, decay=False)
            lengths = [len(weight) for weight in weights]
            alongs, norms = _along(updates, weights).split(lengths), [sums[place] for place in projected]
            for k, place in enumerate(projected):
                if views[place] == "layer":
                    alongs[k].fill_(alongs[k].sum().item())
                    norms[k] = norms[k].sum().expand(lengths[k])
            slopes = _part(torch.cat(alongs), torch.cat(norms), group["eps"]).mul_(-lr).sub_(strength)
            for weight, update, slope in zip(weights, updates, slopes.split(lengths), strict=True):
                pieces.advance_rows(weight, update, lr, slope)
        return set(places)

    def _fusible(self, group: dict[str, Any]) -> bool:
        """Whether torch has a fused kernel for the base optimizer's step with these settings."""
        raise TypeError("write _fusible in the subclass")

    def _fused(
        self,
        group: dict[str, Any],
        targets: list[Tensor],
        places: list[int],
        g: list[Tensor],
        states: list[dict[str, Tensor]],
        lr: float,
        *,
        decay: bool = True,
    ) -> None:
        """The base optimizer's fused step, taken on ``targets``."""
        raise TypeError("write _fused in the subclass")

    def _strength(self, group: dict[str, Any]) -> float:
        """What weight decay takes from a weight, relative to it."""
        return number("lr", group["lr"]) * group["weight_decay"] / (1 - group.get("momentum", 0.0))

    def _count(self, states: list[dict[str, Tensor]]) -> None:
        """Count a step of these parameters."""

    def _accumulate(self, group: dict[str, Any], bucket: list[Piece], g: list[Tensor], states: list[Any]) -> None:
        """Bring the moments up to date."""
        raise TypeError("write _accumulate in the subclass")

    def _updates(
        self, group: dict[str, Any], bucket: list[Piece], g: list[Tensor], states: list[Any], own: bool
    ) -> list[Tensor]:
        """The updates in units of :meth:`_sizes`; with ``own`` tensors that may be changed."""
        raise TypeError("write _updates in the subclass")

    def _sizes(self, group: dict[str, Any], bucket: list[Piece], states: list[Any]) -> list[float]:
        """What the updates are multiplied by."""
        raise TypeError("write _sizes in the subclass")

    def _move(
        self, group: dict[str, Any], bucket: list[Piece], weights: list[Tensor], g: list[Tensor], states: list[Any]
    ) -> None:
        """The step of weights that are not projected."""
        updates = self._updates(group, bucket, g, states, False)
        _subtract(weights, updates, self._sizes(group, bucket, states))


class AdamP(_Projecting):
    """AdamW that takes the radial part out of the update of scale-invariant weights.

    With ``m``, ``v`` Adam's bias-corrected moments, the update is ``u = m / (sqrt(v) + eps)``, or with ``nesterov``
    ``(beta1 * m + (1 - beta1) * g) / (sqrt(v) + eps)``. Of a parameter of two or more axes ``u`` is tested and
    projected as :func:`project_update` says; vectors (biases, gains) never are. Weight decay is decoupled, and
    weaker by ``wd_ratio`` where the update was projected.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either, of any real dtype. Sharded and
            replicated DTensors are taken; each costs up to four small all-reduces a step.
        lr: learning rate, a number or a tensor of one element; 1e-3.
        betas: decay of the two moments, in [0, 1); (0.9, 0.999).
        eps: added to the root of the second moment and to norms; 1e-8.
        weight_decay: 0. The authors use 1e-2.
        delta: how near to orthogonal gradient and weight must be, in units of ``1 / sqrt(dim)``; 0.1. 0 never
            projects (AdamW), infinity always.
        wd_ratio: weight decay of projected weights relative to the others; 0.1.
        nesterov: use Nesterov's update; False.
        maximize: maximize the objective; False.
        foreach: work on many tensors, and on pieces of large ones that stay in the cache, at once. ``None``
            (default) means True; False takes one tensor after the other and gives the same up to rounding. On a
            CPU True means the fused kernel of ``torch.optim.AdamW``, except with ``nesterov``.

    Attributes:
        projected: how many tensors the last step projected by ``"channel"``, by ``"layer"``, and left (``"none"``).

    State: ``step``, ``exp_avg``, ``exp_avg_sq`` as in ``torch.optim.AdamW``, whose state dicts load. On an
    accelerator a step waits for the device once, to read which tensors are projected.

    Raises:
        ValueError: a setting out of range.
        TypeError: a complex parameter.
        RuntimeError: at the step, a sparse gradient.

    >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [4.0, -3.0]]))
    >>> optimizer = AdamP([w], lr=0.1)
    >>> (w / w.norm(dim=1, keepdim=True))[:, 0].sum().backward()  # a loss that ignores the length of the rows
    >>> optimizer.step()
    >>> optimizer.projected
    {'channel': 1, 'layer': 0, 'none': 0}
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        check_betas(group["betas"])

    def _state(self, group: dict[str, Any], param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        if type(param) is torch.nn.Parameter:
            return state  # no DTensor
        return {key: local(value) for key, value in state.items()}

    def _fusible(self, group: dict[str, Any]) -> bool:
        return not group["nesterov"]

    def _fused(
        self,
        group: dict[str, Any],
        targets: list[Tensor],
        places: list[int],
        g: list[Tensor],
        states: list[dict[str, Tensor]],
        lr: float,
        *,
        decay: bool = True,
    ) -> None:
        beta1, beta2 = group["betas"]
        adamw(
            targets,
            [g[place] for place in places],
            [states[place]["exp_avg"] for place in places],
            [states[place]["exp_avg_sq"] for place in places],
            [],
            [states[place]["step"] for place in places],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=group["weight_decay"] if decay else 0.0,
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def _count(self, states: list[dict[str, Tensor]]) -> None:
        torch._foreach_add_([state["step"] for state in states], 1.0)

    def _accumulate(self, group: dict[str, Any], bucket: list[Piece], g: list[Tensor], states: list[Any]) -> None:
        beta1, beta2 = group["betas"]
        second = [piece.of(states[piece.place]["exp_avg_sq"]) for piece in bucket]
        torch._foreach_lerp_([piece.of(states[piece.place]["exp_avg"]) for piece in bucket], g, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, g, g, 1 - beta2)

    def _updates(
        self, group: dict[str, Any], bucket: list[Piece], g: list[Tensor], states: list[Any], own: bool
    ) -> list[Tensor]:
        return list(torch._foreach_div(*self._fraction(group, bucket, g, states)))

    def _move(
        self, group: dict[str, Any], bucket: list[Piece], weights: list[Tensor], g: list[Tensor], states: list[Any]
    ) -> None:
        first, denominators = self._fraction(group, bucket, g, states)
        torch._foreach_addcdiv_(weights, first, denominators, [-size for size in self._sizes(group, bucket, states)])

    def _fraction(
        self, group: dict[str, Any], bucket: list[Piece], g: list[Tensor], states: list[Any]
    ) -> tuple[list[Tensor], list[Tensor]]:
        # The update over sqrt(1 - beta2^t), a factor that goes into the step size as the first moment's does.
        beta1, beta2 = group["betas"]
        first = [piece.of(states[piece.place]["exp_avg"]) for piece in bucket]
        if group["nesterov"]:
            first = list(torch._foreach_mul(first, beta1))
            torch._foreach_add_(first, g, alpha=1 - beta1)
        denominators = list(torch._foreach_sqrt([piece.of(states[piece.place]["exp_avg_sq"]) for piece in bucket]))
        roots = [math.sqrt(1 - beta2 ** states[piece.place]["step"].item()) for piece in bucket]
        torch._foreach_add_(denominators, [group["eps"] * root for root in roots])
        return first, denominators

    def _sizes(self, group: dict[str, Any], bucket: list[Piece], states: list[Any]) -> list[float]:
        lr = number("lr", group["lr"])
        beta1, beta2 = group["betas"]
        steps = [states[piece.place]["step"].item() for piece in bucket]
        return [lr * math.sqrt(1 - beta2**step) / (1 - beta1**step) for step in steps]


class SGDP(_Projecting):
    """SGD that takes the radial part out of the update of scale-invariant weights.

    ``b = momentum * b + (1 - dampening) * g`` from ``b = 0``; the update is ``b``, or ``g + momentum * b`` with
    ``nesterov``, tested and projected as in :class:`AdamP`. Weight decay is decoupled and divided by
    ``1 - momentum``, so that its strength is that of ``torch.optim.SGD``'s.

    Args:
        params: as in :class:`AdamP`.
        lr: learning rate, a number or a tensor of one element.
        momentum: in [0, 1); 0.
        dampening: 0.
        weight_decay: 0. The authors use 1e-5 with ``lr=0.1, momentum=0.9, nesterov=True``.
        nesterov: Nesterov's update, needs momentum; False.
        eps: added to norms; 1e-8.
        delta, wd_ratio, maximize: as in :class:`AdamP`.
        foreach: as in :class:`AdamP`; on a CPU float32 and float64 take the fused kernel of ``torch.optim.SGD``, if
            there is momentum.
        buffer: without Nesterov, ``"paper"`` (default) keeps the momentum as it is and projects a copy;
            ``"code"`` projects the momentum buffer itself, as the authors' released code does.

    Attributes:
        projected: as in :class:`AdamP`.

    State: ``momentum_buffer``; none with ``momentum=0``.

    Raises:
        ValueError: a setting out of range, or ``nesterov`` without momentum.
        TypeError: a complex parameter.
        RuntimeError: at the step, a sparse gradient.

    >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    >>> optimizer = SGDP([w], lr=0.1, momentum=0.9, delta=0.0)
    >>> w.sum().backward()
    >>> optimizer.step()
    >>> w.data
    tensor([[2.9000, 3.9000]])
    """

    # torch 2.13's fused kernel skips whole vectors of half parameters (pytorch issue 191763)
    _fused_dtypes = (torch.float32, torch.float64)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        buffer: Literal["paper", "code"] = "paper",
        *,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "eps": eps,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "buffer": buffer,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        at_least("momentum", group["momentum"], 0, below=1)
        at_least("dampening", group["dampening"], 0)
        one_of("buffer", group["buffer"], ("paper", "code"))
        if group["nesterov"] and group["momentum"] == 0:
            raise ValueError("nesterov=True with momentum=0; Nesterov's update needs a momentum above 0.")

    def _state(self, group: dict[str, Any], param: Tensor) -> dict[str, Tensor]:
        if group["momentum"] == 0:
            return {}
        state = self.state[param]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return {"momentum_buffer": local(state["momentum_buffer"])}

    def _accumulate(self, group: dict[str, Any], bucket: list[Piece], g: list[Tensor], states: list[Any]) -> None:
        if group["momentum"]:
            buffers = [piece.of(states[piece.place]["momentum_buffer"]) for piece in bucket]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, g, alpha=1 - group["dampening"])

    def _updates(
        self, group: dict[str, Any], bucket: list[Piece], g: list[Tensor], states: list[Any], own: bool
    ) -> list[Tensor]:
        if not group["momentum"]:
            return list(torch._foreach_mul(g, 1 - group["dampening"])) if own or group["dampening"] else g
        buffers = [piece.of(states[piece.place]["momentum_buffer"]) for piece in bucket]
        if group["nesterov"]:
            return list(torch._foreach_add(g, buffers, alpha=group["momentum"]))
        return [buffer.clone() for buffer in buffers] if own and group["buffer"] == "paper" else buffers

    def _fusible(self, group: dict[str, Any]) -> bool:
        return group["momentum"] > 0 and (group["nesterov"] or group["buffer"] == "paper")

    def _fused(
        self,
        group: dict[str, Any],
        targets: list[Tensor],
        places: list[int],
        g: list[Tensor],
        states: list[dict[str, Tensor]],
        lr: float,
        *,
        decay: bool = True,
    ) -> None:
        gradients = [g[place] for place in places]
        buffers = [states[place]["momentum_buffer"] for place in places]
        # torch's step has no weight decay of this kind: pieces of large weights decay while they are in the cache
        for bucket in itertools.chain.from_iterable(jobs(targets, range(len(targets)), True)):
            weights = [piece.of(targets[piece.place]) for piece in bucket]
            if decay:
                self._decay(group, weights, None)
            sgd(
                weights,
                [piece.of(gradients[piece.place]) for piece in bucket],
                [piece.of(buffers[piece.place]) for piece in bucket],
                fused=True,
                weight_decay=0.0,
                momentum=group["momentum"],
                lr=lr,
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
            )

    def _sizes(self, group: dict[str, Any], bucket: list[Piece], states: list[Any]) -> list[float]:
        return [number("lr", group["lr"])] * len(bucket)


def project_update(
    w: Tensor, g: Tensor, u: Tensor, delta: float = 0.1, eps: float = 1e-8
) -> tuple[Tensor, View | None]:
    """Take the radial part out of an update if the weight looks scale-invariant (algorithms 1 and 2 of the paper).

    Two views of the tensors are tried in turn: one row an output channel, ``(w.shape[0], -1)``, and the whole tensor
    as one row. If ``|cos(g, w)|`` is below ``delta / sqrt(columns)`` in every row of a view, each row of ``u`` loses
    its part along that row of ``w``. All rows of a view are projected, or none.

    Args:
        w: weight, of two or more axes.
        g: the raw gradient of the loss, of the shape of ``w``.
        u: the update that an optimizer would take.
        delta: 0.1.
        eps: 1e-8, the least norm in the cosine, added to the norm of ``w`` in the projection.

    Returns:
        The update, a new tensor if it was projected, and which view did it: ``"channel"``, ``"layer"`` or ``None``.

    Raises:
        ValueError: the shapes differ, or ``w`` has fewer than two axes.

    >>> w, g = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> project_update(w, g, torch.ones(2, 2))
    (tensor([[0., 1.],
            [1., 0.]]), 'channel')
    """
    if w.dim() < 2:
        raise ValueError(f"w has shape {tuple(w.shape)}, expected two or more axes; vectors are never projected.")
    if not w.shape == g.shape == u.shape:
        raise ValueError(
            f"w, g and u have the shapes {tuple(w.shape)}, {tuple(g.shape)}, {tuple(u.shape)}; expected one shape."
        )
    if not _testable(w.shape, delta):
        return u, None
    layout = Shards(tuple(w.shape))
    sums, views = _views([(g, w)], {0: w.shape[0]}, [layout], delta, eps)
    view = views[0]
    if view is None:
        return u, None
    return _remove(u.clone(), w, _along([u], [w]), sums[0], view, layout, eps), view


def _testable(shape: Sequence[int], delta: float) -> bool:
    return len(shape) > 1 and delta > 0 and math.prod(shape) > 0


def _along(updates: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    # <u, w> of each row
    return pieces.row_products(list(zip(updates, weights, strict=True)))[0]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _views(
    pairs: Sequence[tuple[Tensor, Tensor]], counts: dict[int, int], layouts: Sequence[Shards], delta: float, eps: float
) -> tuple[dict[int, Tensor], dict[int, View | None]]:
    # The squared norm of each whole row of each tensor, and which view of the tensor passes the test. `pairs` are the
    # rows of gradients and weights in turn, `counts` says how many are whose. One transfer from the device for all.
    if not counts:
        return {}, {}
    lengths = list(counts.values())
    rows = pieces.row_products(pairs)
    layout = layouts[next(iter(counts))] if len(counts) == 1 else Shards(())
    layout.sum_(rows, range(1, len(layout.shape)))
    product, g, w = rows[0], rows[1].sqrt(), rows[2].sqrt()
    cosines = product.abs() / (g.clamp_min(eps) * w.clamp_min(eps))
    if len(counts) == 1:
        totals = rows.sum(1, keepdim=True)
        largest = cosines.amax(0, keepdim=True) if len(cosines) else cosines.new_zeros(1)
    else:
        owner = torch.repeat_interleave(torch.tensor(lengths)).to(rows.device)
        totals = rows.new_zeros(3, len(lengths)).index_add_(1, owner, rows)
        largest = rows.new_zeros(len(lengths)).scatter_reduce_(0, owner, cosines, "amax")
    layout.sum_(totals, (0,))
    layout.max_(largest, (0,))
    together = totals[0].abs() / (totals[1].sqrt().clamp_min(eps) * totals[2].sqrt().clamp_min(eps))
    views: dict[int, View | None] = {}
    for place, channel, layer in zip(counts, *torch.stack([largest, together]).tolist(), strict=True):
        shape = layouts[place].shape
        size = math.prod(shape)
        if channel < delta / math.sqrt(size // shape[0]):
            views[place] = "channel"
        elif layer < delta / math.sqrt(size):
            views[place] = "layer"
        else:
            views[place] = None
    return dict(zip(counts, rows[2].split(lengths), strict=True)), views


def _part(along: Tensor, norms: Tensor, eps: float) -> Tensor:
    # <w, u> / (|w| + eps)² of rows; `norms` are the squared norms.
    return along / (norms.sqrt() + eps).square_()


def _remove(u: Tensor, w: Tensor, along: Tensor, norms: Tensor, view: View, layout: Shards, eps: float) -> Tensor:
    # u - w <w, u> / (|w| + eps)², row by row; in place unless u is half. `norms` are the rows' squared norms.
    if view == "layer":
        along, norms = layout.sum_(along.sum(0, keepdim=True)), layout.sum_(norms.sum(0, keepdim=True), (0,))
    else:
        along = layout.sum_(along.clone(), range(1, len(layout.shape))) if layout.splits else along
    part = _part(along, norms, eps).to(_wide(u).dtype).view(-1, *[1] * (w.dim() - 1))
    if u.dtype == part.dtype == w.dtype:
        return u.addcmul_(w, part, value=-1)
    return u.copy_(u - w * part)


def _subtract(weights: list[Tensor], updates: list[Tensor], sizes: list[float]) -> None:
    if len(set(sizes)) == 1:
        torch._foreach_add_(weights, updates, alpha=-sizes[0])
    else:
        for weight, update, size in zip(weights, updates, sizes, strict=True):
            weight.add_(update, alpha=-size)
