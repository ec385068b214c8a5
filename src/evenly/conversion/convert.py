"""``evenly.convert``: put another normalization in the place of a trained network's own.

Swapping batch normalization for a normalization within samples destroys a trained network: the new layer measures
other statistics, which vary from sample to sample. Three things bring it back, the first two in closed form and
without labels:

1. each new layer's scale and shift are solved against the original layer's output;
2. so are the weights of the convolutions and linear layers around them, in the order in which they run, from what
   the converted network now feeds them (:mod:`evenly.conversion.calibration`);
3. if asked for, a few steps of self-distillation (:mod:`evenly.conversion.refinement`).

Two conversions are exact and need no data: a layer with running statistics into another that keeps them
(``"frozen"``, ``"batch"``, ``"sync"``, ``"none"``, ``"folded"``), and layer normalization into RMS normalization on
a residual stream that only linear layers write to, whose outputs are centred instead (Brody, Alon & Yahav, 2023,
arXiv 2305.02582, show that centring is a projection).
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evenly import nn as enn
from evenly.conversion.affine import ChannelAffine
from evenly.conversion.batches import Batches, device_of
from evenly.conversion.calibration import Calibration, Site
from evenly.conversion.calibration import calibrate as run_calibration
from evenly.conversion.centring import centred_norms
from evenly.conversion.linear import LINEAR, blocked, scale_outputs
from evenly.conversion.refinement import Refinement
from evenly.conversion.refinement import refine as run_refinement
from evenly.conversion.report import Report, Row, measure_agreement
from evenly.conversion.sources import Source, Target, describe, norm_layers
from evenly.conversion.trace import Flow, run_flow, symbolic_flow
from evenly.nn.create import default_groups

__all__ = ["convert"]

Only = str | type | Sequence["str | type"] | Callable[[str, nn.Module], bool]

_GROUP_VALUES = 64
_CONSTANT = ("batch", "sync", "frozen", "none", "folded")
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def convert(
    model: nn.Module,
    to: Target,
    *,
    calibrate: Any = None,
    refine: int | Refinement | None = None,
    only: Only | None = None,
    groups: int | Callable[[int], int] | None = None,
    inplace: bool = False,
) -> tuple[nn.Module, Report]:
    """Change the normalization layers of a trained network.

    Args:
        model: any module. Layers of ``torch.nn`` and of ``evenly.nn`` are recognised, and by their attributes the
            ``FrozenBatchNorm2d`` of torchvision and the ``...RMSNorm`` layers of transformers.
        to: ``"batch"``, ``"sync"``, ``"frozen"``, ``"layer"``, ``"group"``, ``"instance"``, ``"rms"``, any other
            name of :func:`evenly.nn.available`; ``"none"`` (a scale and shift a channel, folded into the layer
            before it where that is possible); ``"folded"`` (batch normalization folded into the layer before it,
            layers that cannot be are kept); or a callable ``(num_features, source_layer) -> Module``.
        calibrate: unlabelled batches: an iterable of tensors, of tuples whose first item is the input, or of dicts
            of keyword arguments; or a :class:`~evenly.conversion.Calibration`. The first 1,000 samples are used.
            Without it parameters are only carried over.
        refine: steps of self-distillation on the same batches, or a :class:`~evenly.conversion.Refinement`.
        only: which layers: a name, the name of a module above it, a pattern such as ``"layer4.*"``, a type, a
            sequence of these, or a predicate ``(name, layer) -> bool``. Default all.
        groups: of ``to="group"``: a number or ``num_features -> number``. Default
            :func:`evenly.nn.create`'s, and fewer where a group would hold fewer than 64 values of a sample.
        inplace: change ``model`` itself. Otherwise a copy is changed and ``model`` stays as it is, its buffers too.

    Returns:
        The converted network and a :class:`~evenly.conversion.Report`, which prints as a table.

    Hooks, dtype, device, training mode, ``requires_grad`` and the sharing of modules survive. Parameters of the
    converted layers are new objects: make the optimizer after converting.

    Time: two forward passes of both networks up to each solved layer. Memory: a copy of the network and, for the
    widest layer solved, two Gram matrices of (inputs an output + 1)² float64; constant in the number of batches.

    Raises:
        ValueError: no normalization layer is there or matches ``only``; ``groups`` does not divide the channels;
            ``refine`` without data; an unknown name.
        TypeError: the model is wrapped, compiled or scripted.

    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
    >>> converted, report = convert(net, "group", groups=2, calibrate=[torch.randn(16, 3, 8, 8)])
    >>> converted[1]
    GroupNorm(2, 8, eps=1e-05, affine=True)
    >>> report.rows[0].name, report.rows[0].source, report.rows[0].statistics
    ('1', 'BatchNorm2d', 'lost')
    """
    _check_model(model)
    settings, steps = _settings(calibrate, refine)
    if groups is not None and to != "group":
        raise ValueError(f"groups={groups!r} is for to='group'; to is {to!r}.")
    if isinstance(to, str) and to != "folded" and to not in enn.available():
        enn.create(to, 1)  # raises, naming what there is
    elif not isinstance(to, str) and not callable(to):
        raise TypeError(f"to={to!r} is a {type(to).__name__}, expected a name or a callable.")
    chosen_names = {s.name for s in _choose(model, only)}
    if inplace and "" in chosen_names:
        raise ValueError("The model is itself a normalization layer and cannot be changed in place: use inplace=False.")

    device = device_of(model)
    batches = None if settings is None else Batches(settings.batches, settings.samples, device)
    more = None
    if steps is not None:
        more = batches if steps.batches is None else Batches(steps.batches, steps.samples, device)
        assert more is not None
    taught = batches is not None or more is not None
    work = model if inplace else _copy(model)
    original = _copy(model) if taught else work
    modes = {m: m.training for m in work.modules()}
    label = to if isinstance(to, str) else getattr(to, "__name__", type(to).__name__)
    report = Report(label)
    job = _Job(original, work, to, groups, batches, settings, report, device)
    with _progress() as progress:
        try:
            work.eval()
            original.eval()
            result = job.run(chosen_names, more, steps, progress)
        finally:
            for module, mode in modes.items():
                module.training = mode
            for layer, old in job.made.items():
                layer.train(modes[old])
    return result, report


class _Job:
    """One conversion: ``model`` is changed, ``original`` is only run."""

    def __init__(
        self,
        original: nn.Module,
        model: nn.Module,
        to: Target,
        groups: int | Callable[[int], int] | None,
        batches: Batches | None,
        settings: Calibration | None,
        report: Report,
        device: torch.device,
    ) -> None:
        self.original, self.model, self.to, self.groups = original, model, to, groups
        self.batches, self.settings, self.report = batches, settings, report
        self.device = device
        self.flow: Flow | None = None
        self.made: dict[nn.Module, nn.Module] = {}  # new layer: the old one
        self.owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
        self.names: dict[nn.Module, str] = {}
        for name, module in model.named_modules():
            self.names.setdefault(module, name)
        self.twins = dict(zip(model.modules(), original.modules(), strict=True))

    def run(self, chosen: set[str], more: Batches | None, steps: Refinement | None, progress: Any) -> nn.Module:
        sources = [s for s in norm_layers(self.model) if s.name in chosen]
        flow, why = self._flow()
        rows: dict[nn.Module, Row] = {}
        for s in sources:
            rows[s.module] = Row(s.name, describe(s.module), describe(s.module), None, "kept")
            self.report.rows.append(rows[s.module])
        self.flow = flow
        todo = [s for s in sources if not self._keep(s, rows[s.module])]
        links = self._links(todo, flow)
        exact = self._centre(todo, flow)
        new: dict[nn.Module, nn.Module] = {}
        for s in todo:
            row = rows[s.module]
            if self.to == "folded":
                replacement = self._fold(s, flow, why, row)
                if replacement is None:
                    continue
                exact.add(s.module)
            else:
                replacement, is_exact = self._build(s, row, s.module in exact)
                if is_exact:
                    exact.add(s.module)
            self._inherit(s, replacement)
            new[s.module] = replacement
            if row.statistics == "kept":
                row.statistics = "carried" if s.module in exact else "lost"
            if s.module in exact:
                row.r2 = 1.0
        model = self._replace(new)
        pending = [s for s in todo if s.module in new and s.module not in exact]
        if self.batches is not None and self.settings is not None and pending and flow is not None:
            sites = self._sites(pending, new, flow, links, rows)
            with progress(f"calibrate to {self.report.target}", len(sites)) as advance:
                self.report.solved = run_calibration(self.original, model, sites, self.batches, self.settings, advance)
        if steps is not None and more is not None:
            pairs = [(self.twins[s.module], new[s.module]) for s in todo if s.module in new]
            with progress("refine", steps.steps) as advance:
                self.report.loss = run_refinement(self.original, model, pairs, more, steps, advance)
            self.report.refined_steps = steps.steps
        if self.to == "none":
            model = self._fold_affine(model, todo, new, flow, why, rows)
        measured = self.batches if self.batches is not None else more
        if measured is not None:
            self.report.agreement = measure_agreement(self.original, model, measured)
        return model

    def _flow(self) -> tuple[Flow | None, str]:
        leaves: dict[nn.Module, str] = {
            m: name
            for m, name in self.names.items()
            if isinstance(m, (*LINEAR, nn.Embedding)) and not list(m.children())
        }
        # A parametrized layer has children (its parametrizations) and is a leaf all the same.
        leaves |= {m: name for m, name in self.names.items() if isinstance(m, LINEAR)}
        leaves |= {s.module: s.name for s in norm_layers(self.model)}
        if self.batches is not None:
            return run_flow(self.model, leaves, *self.batches.probe()), ""
        return symbolic_flow(self.model, leaves)

    def _keep(self, source: Source, row: Row) -> bool:
        """Whether the layer is already what is asked for, or has to stay for another reason."""
        if self.to == "folded":
            return False
        if source.num_features == 0:
            row.note = "a pattern without one weight a channel"
            return True
        if self.to == source.kind:
            same = self.to != "group" or self.groups is None or self._groups(source) == source.groups
            if same:
                row.note = f"is {source.kind} already"
            return same
        return False

    def _groups(self, source: Source) -> int | None:
        """The number of groups: as given, else :func:`evenly.nn.create`'s, less where a group would be too small.

        A mean and a variance of a dozen values are noise: where the calibration data show that a group of an image
        would hold fewer than 64, groups are made larger, down to two.
        """
        if self.groups is not None:
            return self.groups(source.num_features) if callable(self.groups) else self.groups
        calls = self.flow.calls(source.module) if self.flow is not None else []
        if not calls or not calls[0].shape or source.channel_dim != 1:
            return None
        count, positions = source.num_features, math.prod(calls[0].shape[2:])
        default = default_groups(count)
        divisors = [g for g in range(default, 0, -1) if count % g == 0]
        fitting = [g for g in divisors if count // g * positions >= _GROUP_VALUES or g <= 2]
        return fitting[0]

    def _build(self, source: Source, row: Row, centred: bool) -> tuple[nn.Module, bool]:
        """The layer that takes the place of ``source``, with what can be carried, and whether it is exact."""
        to = self.to
        options = layer_options(source, self.model)
        exact = source.stats is not None and to in _CONSTANT
        if isinstance(to, str):
            layer: Any = new_layer(source, to, self._groups(source) if to == "group" else None, options)
            shifts = source.bias is not None or source.stats is not None
            if shifts and add_missing_bias(layer, source.num_features):
                row.note = "with a bias"
        else:
            layer = to(source.num_features, source.module)
            if not isinstance(layer, nn.Module):
                raise TypeError(f"to={to!r} returned {type(layer).__name__} for {source.name!r}, expected a Module.")
            if source.activation is not None and getattr(layer, "activation", None) != source.activation:
                raise ValueError(
                    f"{source.name!r} has {source.activation!r} fused; to= must return a layer with "
                    f"activation={source.activation!r}."
                )
        row.target = describe(layer)
        weight, bias = source.weight, source.bias
        if to == "none" and source.stats is not None:
            weight, bias = source.constant_affine()
        _carry(layer, "weight", weight, source.num_features)
        _carry(layer, "bias", bias, source.num_features)
        if source.stats is not None and isinstance(getattr(layer, "running_mean", None), Tensor):
            layer.running_mean.copy_(source.stats[0])
            if isinstance(layer.running_var, Tensor):  # a mean-only layer has none
                layer.running_var.copy_(source.stats[1])
            counted = getattr(source.module, "num_batches_tracked", None)
            if isinstance(counted, Tensor) and isinstance(getattr(layer, "num_batches_tracked", None), Tensor):
                layer.num_batches_tracked.copy_(counted)
        if centred:
            row.note = "exact: the layers before it are centred" + (", with a bias" if row.note else "")
        elif not exact and source.kind in ("layer", "group", "instance") and isinstance(layer, enn.Norm):
            exact = _same_function(source, layer)
        return layer, exact or centred

    def _links(self, todo: Sequence[Source], flow: Flow | None) -> dict[nn.Module, Source]:
        """Linear maps that only feed a layer whose running statistics are lost: they are standardized."""
        if flow is None or self.settings is None or self.settings.weights == "none" or self.to in _CONSTANT:
            return {}
        links: dict[nn.Module, Source] = {}
        for s in todo:
            if s.stats is None:
                continue
            feeder, _ = flow.feeder(s.module)
            if feeder is not None and feeder.module is not None and not self._blocked(feeder.module, flow):
                links[feeder.module] = s
        return links

    def _blocked(self, module: nn.Module, flow: Flow) -> str:
        read = {id(p) for name, p in self.model.named_parameters() if name in set(flow.parameters.values())}
        return blocked(module, self.owners, read)

    def _centre(self, todo: Sequence[Source], flow: Flow | None) -> set[nn.Module]:
        if self.to != "rms" or flow is None:
            return set()
        norms = {s.module for s in todo if s.kind == "layer" and s.channel_dim == -1}
        return centred_norms(self.model, flow, norms, lambda m: self._blocked(m, flow))

    def _fold(self, source: Source, flow: Flow | None, why: str, row: Row) -> nn.Module | None:
        if source.stats is None:
            row.note = "it has no running statistics: its output depends on more than one value"
            return None
        feeder = self._feeder(source, flow, why, row)
        if feeder is None:
            return None
        scale_outputs(feeder, *source.constant_affine())
        row.statistics = "folded"
        row.note = f"into {self.names[feeder]}"
        layer = nothing(source)
        row.target = describe(layer)
        return layer

    def _feeder(self, source: Source, flow: Flow | None, why: str, row: Row) -> nn.Module | None:
        if flow is None:
            row.note = f"not folded: {why}; give calibrate= one batch"
            return None
        node, reason = flow.feeder(source.module)
        if node is not None and node.module is not None:
            problem = self._blocked(node.module, flow)
            if not problem:
                return node.module
            reason = f"{node.name}: {problem}"
        row.note = f"not folded: {reason}"
        return None

    def _fold_affine(
        self,
        model: nn.Module,
        todo: Sequence[Source],
        new: dict[nn.Module, nn.Module],
        flow: Flow | None,
        why: str,
        rows: dict[nn.Module, Row],
    ) -> nn.Module:
        """Fold what is left of each layer into the linear map before it."""
        replaced: dict[nn.Module, nn.Module] = {}
        for s in todo:
            affine: Any = new.get(s.module)
            row = rows[s.module]
            feeder = self._feeder(s, flow, why, row)
            if feeder is None or affine is None:
                continue
            scale_outputs(feeder, affine.weight.detach(), affine.bias.detach())
            layer = nothing(s)
            self._inherit(s, layer)
            replaced[affine] = layer
            row.target, row.note = describe(layer), f"into {self.names[feeder]}"
            row.statistics = "folded" if s.stats is not None else "lost"
        return swap(model, replaced)

    def _inherit(self, source: Source, layer: nn.Module) -> None:
        """Hooks and ``requires_grad`` of the layer that is replaced; its mode follows when the work is done."""
        old = source.module
        layer.eval()
        self.made[layer] = old
        for key in _HOOKS:
            if getattr(old, key, None):
                setattr(layer, key, getattr(old, key))
        if getattr(old, "_backward_hooks", None) and hasattr(old, "_is_full_backward_hook"):
            layer._is_full_backward_hook = old._is_full_backward_hook
        own, every = list(old.parameters()), list(self.model.parameters())
        if own:
            wanted = any(p.requires_grad for p in own)
        elif source.frozen:
            wanted = False
        else:
            wanted = not every or any(p.requires_grad for p in every)
        for p in layer.parameters():
            p.requires_grad_(wanted)

    def _replace(self, new: dict[nn.Module, nn.Module]) -> nn.Module:
        for module in self.model.modules():
            if isinstance(module, nn.TransformerEncoderLayer) and (module.norm1 in new or module.norm2 in new):
                # Its fast path in evaluation computes LayerNorm from norm1's parameters, whatever norm1 is.
                module.activation_relu_or_gelu = 0
        return swap(self.model, new)

    def _sites(
        self,
        pending: Sequence[Source],
        new: dict[nn.Module, nn.Module],
        flow: Flow,
        links: dict[nn.Module, Source],
        rows: dict[nn.Module, Row],
    ) -> list[Site]:
        assert self.settings is not None
        by_module = {s.module: s for s in pending}
        linear = [m for m in flow.order() if isinstance(m, LINEAR)]
        last = linear[-1] if linear else None
        sites: list[Site] = []
        started = False
        for module in flow.order():
            calls, twin, name = len(flow.calls(module)), self.twins[module], self.names[module]
            if module in by_module:
                source = by_module[module]
                started = True
                sites.append(Site(new[module], twin, calls, source, rows[module], None, name))
                continue
            if not isinstance(module, LINEAR) or self.settings.weights == "none":
                continue
            link = links.get(module)
            link = link if link is not None and link.module in by_module else None
            after = started and (self.settings.weights == "all" or module is last)
            if link is None and not (after and not self._blocked(module, flow)):
                continue
            standard = None
            if link is not None:
                assert link.stats is not None
                mean, var = (t.detach().double() for t in link.stats)
                standard = (mean, (var + link.eps).rsqrt())
            sites.append(Site(module, twin, calls, None, None, standard, name))
        for s in pending:
            if not flow.calls(s.module):
                rows[s.module].note = "not called on the calibration data: parameters carried only"
        return sites


def layer_options(source: Source, model: nn.Module) -> dict[str, Any]:
    """Device, dtype and fused activation of the layer that takes the place of ``source``."""
    tensor = next((t for t in source.tensors() if t.is_floating_point()), None)
    if tensor is None:
        tensor = next((t for t in model.parameters() if t.is_floating_point()), torch.zeros(()))
    options: dict[str, Any] = {"device": tensor.device, "dtype": tensor.dtype}
    if source.activation is not None:
        options["activation"] = source.activation
    return options


def new_layer(source: Source, to: str, groups: int | None, options: dict[str, Any]) -> nn.Module:
    """A fresh layer of the kind ``to`` for the input of ``source``, with its eps."""
    if to == "none":
        return ChannelAffine(source.num_features, source.channel_dim, **options)
    if to != "scale" and source.kind != "scale":
        options = options | {"eps": source.eps}
    try:
        return enn.create(to, source.num_features, channel_dim=source.channel_dim, num_groups=groups, **options)
    except ValueError as error:
        raise ValueError(f"{source.name!r}: {error}") from error


def add_missing_bias(layer: nn.Module, count: int) -> bool:
    """Give an evenly layer without a bias one: what it replaces had a shift. Whether it needed one."""
    if not isinstance(layer, enn.Norm) or layer.bias is not None or layer.features != (count,):
        return False
    assert layer.weight is not None
    layer.bias = nn.Parameter(torch.zeros_like(layer.weight))
    return True


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module.")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "The model is a ScriptModule, whose layers cannot be replaced: convert the Python model, then script it."
        )
    if hasattr(model, "_orig_mod"):
        raise TypeError("The model is compiled: convert model._orig_mod, then call torch.compile on the result.")
    if isinstance(model, torch.fx.GraphModule) and "ExportedProgram" in type(model).__name__:
        raise TypeError("The model is exported: convert the Python model, then export it.")
    wrappers = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")
    if type(model).__name__ in wrappers or isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(
            f"The model is wrapped in {type(model).__name__}: convert model.module, then wrap the result again (it "
            f"has new parameters)."
        )
    for name, module in model.named_modules():
        if module is not model and (
            hasattr(module, "_orig_mod") or isinstance(module, nn.parallel.DistributedDataParallel)
        ):
            raise TypeError(f"{name!r} is compiled or wrapped ({type(module).__name__}): convert before that.")
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{name!r} is a ScriptModule, whose layers cannot be replaced: convert before scripting.")


def _settings(calibrate: Any, refine: Any) -> tuple[Calibration | None, Refinement | None]:
    settings = calibrate if isinstance(calibrate, Calibration) or calibrate is None else Calibration(calibrate)
    if refine is None or isinstance(refine, Refinement):
        steps = refine
    elif isinstance(refine, bool):
        steps = Refinement() if refine else None
    elif isinstance(refine, int):
        steps = Refinement(steps=refine)
    else:
        raise TypeError(f"refine={refine!r} is a {type(refine).__name__}, expected a number of steps or a Refinement.")
    if steps is not None and settings is None and steps.batches is None:
        raise ValueError("refine= needs data: give calibrate= batches, or Refinement(batches=...).")
    return settings, steps


def _choose(model: nn.Module, only: Only | None) -> list[Source]:
    found = norm_layers(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no normalization layer that evenly.convert knows.")
    if only is None:
        return found
    aliases: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(module, []).append(name)
    if callable(only) and not isinstance(only, type):
        chosen = [s for s in found if only(s.name, s.module)]
    else:
        items = [only] if isinstance(only, (str, type)) else list(only)
        chosen = []
        used = set()
        for s in found:
            matches = [i for i, item in enumerate(items) if _matches(item, s, aliases[s.module])]
            used.update(matches)
            if matches:
                chosen.append(s)
        unused = [item for i, item in enumerate(items) if i not in used]
        if chosen and unused:
            raise ValueError(f"only= names {unused}, which match no normalization layer. {_listing(found)}")
    if not chosen:
        raise ValueError(f"only={only!r} matches no normalization layer. {_listing(found)}")
    return chosen


def _matches(item: Any, source: Source, names: Sequence[str]) -> bool:
    if isinstance(item, type):
        return isinstance(source.module, item)
    if not isinstance(item, str):
        raise TypeError(f"only= holds a {type(item).__name__}, expected names, types or a predicate.")
    return any(n == item or n.startswith(item + ".") or fnmatch.fnmatchcase(n, item) for n in names)


def _listing(found: Sequence[Source]) -> str:
    names = [f"{s.name} ({type(s.module).__name__})" for s in found]
    shown = ", ".join(names[:40]) + (f" and {len(names) - 40} more" if len(names) > 40 else "")
    return f"The normalization layers are: {shown}."


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise TypeError(
            f"The model cannot be copied ({type(error).__name__}: {error}). Detach the tensors that it keeps as "
            f"attributes, or build it again and load its state dict."
        ) from error


def nothing(source: Source) -> nn.Module:
    """What stays where a layer is folded away: its activation and residual, if it has those."""
    if isinstance(source.module, (enn.Norm, enn.FrozenBatchNorm)):
        return enn.NoNorm(activation=source.activation)  # type: ignore[arg-type]
    return nn.Identity()


@torch.no_grad()
def _carry(layer: Any, key: str, value: Tensor | None, count: int) -> None:
    own = getattr(layer, key, None)
    if value is None or not isinstance(own, Tensor):
        return
    if own.numel() == count and value.numel() == count:
        own.data.copy_(value.detach().reshape(own.shape))
    elif own.numel() == 1 and key == "weight":  # one scale for all channels
        own.data.mul_(value.detach().double().mean().to(own.dtype))


def _same_function(source: Source, layer: enn.Norm) -> bool:
    """Whether the new layer computes what the old one did: the same values share a statistic."""
    groups = layer.num_groups if isinstance(layer, enn.GroupNorm) else None
    if source.channel_dim != 1 or source.stats is not None:
        return False
    if isinstance(source.module, (nn.LayerNorm, enn.LayerNorm)):
        return False
    if isinstance(layer, enn.InstanceNorm):
        return source.kind == "instance" and not layer.track_running_stats
    if groups is None:
        return False
    own = {"layer": 1, "instance": source.num_features}.get(source.kind, source.groups)
    return own == groups


def swap(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put new modules in the place of old ones, wherever they are registered."""
    if model in new:
        return new[model]
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[key] = new[child]
    return model


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """A progress bar on a terminal, nothing elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:

        @contextlib.contextmanager
        def silent(title: str, total: int) -> Iterator[Callable[[str], None]]:
            yield lambda text: None

        yield silent
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:

        @contextlib.contextmanager
        def shown(title: str, total: int) -> Iterator[Callable[[str], None]]:
            task = bars.add_task(title, total=total)

            def advance(text: str) -> None:
                bars.update(task, advance=1, description=f"{title}: {text}"[:60])

            yield advance
            bars.remove_task(task)

        yield shown
