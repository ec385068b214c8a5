"""The tables of the conformance suites: one row an object, one table a kind.

A new method adds one row, and is then held to everything that the suite of its kind asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

import evenly.nn as en
from evenly.stats import Standardize
from evenly.weights import WeightNorm, WeightStandardization

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LayerCase:
    """A layer: ``make(device=, dtype=)`` builds it; ``shapes[0]`` is its typical input."""

    name: str
    object: str  # "module:Name", as in the catalog
    make: Callable[..., nn.Module]
    shapes: tuple[Shape, ...]
    catalog: str | None = None  # id of the paper whose method it is
    torch: Callable[..., nn.Module] | None = None  # the layer of torch.nn that it replaces
    one_sample: Shape | None = None  # a legal training input of batch 1
    zero_size: tuple[Shape, ...] = ()
    wrong: tuple[Shape, ...] = ()  # inputs that it must refuse
    batch_statistics: bool = False  # in training, samples of a batch share a statistic
    running_state: bool = False
    parameters: bool = True
    channel_dim: int = 1
    shared_channels: int = 1  # with batch statistics: channels (the first, ...) that one bad value spoils
    keeps_format: bool = True  # channels-last in, channels-last out
    mask: bool = True
    residual: bool = True
    exact_gradient: bool = True  # False: in training, the backward pass is not the derivative of the forward pass
    stream: bool = False  # in training, a sample changes what comes after it in the batch
    measures: bool = True  # False: a fixed affine map, which follows the scale of its input
    roundings: int = 1  # to the type of a half input, on the way to the result
    accuracy: float = 1e-6  # relative to float64, in float32, on badly scaled input, where torch has no such layer
    exempt: dict[str, str] = field(default_factory=dict)  # kind of extreme scale: why it is not asked for
    shows: tuple[str, ...] = field(default=("eps=",))  # what its repr must print

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class ParametrizationCase:
    """A parametrization of a convolution's weight: ``make()`` builds it."""

    name: str
    object: str
    make: Callable[..., nn.Module]
    layers: tuple[Callable[..., nn.Module], ...]
    catalog: str | None = None
    scale_invariant: bool = True  # a positive factor of the weight changes nothing
    lengths: bool = False  # takes the length of each unit beside the weight, and registers what keeps the function
    shows: tuple[str, ...] = ("eps=",)

    def __str__(self) -> str:
        return self.name


_IMAGES = {
    "shapes": ((5, 4, 6, 3), (5, 4), (5, 4, 7), (3, 4, 2, 3, 2)),
    "one_sample": (1, 4, 6, 3),
    "zero_size": ((0, 4, 6, 3), (0, 4), (2, 4, 0)),
    "wrong": ((5, 3, 6, 3), (4,), ()),
}
_TOKENS = {
    "shapes": ((5, 7, 8), (5, 8), (8,), (2, 3, 4, 8)),
    "one_sample": (1, 8),
    "zero_size": ((0, 7, 8), (0, 8), (2, 0, 8)),
    "wrong": ((5, 7), (5, 8, 1), ()),
}

_SQUARES = {"1e20": "the squares of values of 1e20 are above the largest float32"}

LAYERS = (
    LayerCase(
        "BatchNorm",
        "evenly.nn:BatchNorm",
        lambda **kw: en.BatchNorm(4, **kw),
        **_IMAGES,
        catalog="batch-normalization",
        torch=lambda **kw: nn.BatchNorm2d(4, **kw),
        batch_statistics=True,
        running_state=True,
        shows=("4", "eps=", "momentum="),
    ),
    LayerCase(
        "BatchNorm (no state)",
        "evenly.nn:BatchNorm",
        lambda **kw: en.BatchNorm(4, affine=False, track_running_stats=False, **kw),
        **_IMAGES,
        torch=lambda **kw: nn.BatchNorm2d(4, affine=False, track_running_stats=False, **kw),
        batch_statistics=True,
        parameters=False,
    ),
    LayerCase(
        "BatchNorm (sync)",
        "evenly.nn:BatchNorm",
        lambda **kw: en.BatchNorm(4, momentum=None, sync=True, **kw),
        **_IMAGES,
        torch=lambda **kw: nn.BatchNorm2d(4, momentum=None, **kw),
        batch_statistics=True,
        running_state=True,
        shows=("4", "momentum=None", "sync=True"),
    ),
    LayerCase(
        "FrozenBatchNorm",
        "evenly.nn:FrozenBatchNorm",
        lambda **kw: en.FrozenBatchNorm(4, **kw),
        **_IMAGES,
        parameters=False,
        measures=False,
        shows=("4", "eps="),
    ),
    LayerCase(
        "MeanOnlyBatchNorm",
        "evenly.nn:MeanOnlyBatchNorm",
        lambda **kw: en.MeanOnlyBatchNorm(4, **kw),
        **_IMAGES,
        catalog="weight-normalization",
        batch_statistics=True,
        running_state=True,
        measures=False,  # the scale of the input stays
        shows=("4", "momentum=", "bias=True"),
    ),
    LayerCase(
        "InstanceNorm",
        "evenly.nn:InstanceNorm",
        lambda **kw: en.InstanceNorm(4, affine=True, **kw),
        **{**_IMAGES, "shapes": ((5, 4, 6, 3), (5, 4, 7), (3, 4, 2, 3, 2)), "zero_size": ((0, 4, 6, 3),)},
        torch=lambda **kw: nn.InstanceNorm2d(4, affine=True, **kw),
        shows=("4", "eps="),
    ),
    LayerCase(
        "InstanceNorm (running)",
        "evenly.nn:InstanceNorm",
        lambda **kw: en.InstanceNorm(4, track_running_stats=True, **kw),
        **{**_IMAGES, "shapes": ((5, 4, 6, 3), (5, 4, 7), (3, 4, 2, 3, 2)), "zero_size": ((0, 4, 6, 3),)},
        torch=lambda **kw: nn.InstanceNorm2d(4, track_running_stats=True, **kw),
        running_state=True,
        parameters=False,
    ),
    LayerCase(
        "GroupNorm",
        "evenly.nn:GroupNorm",
        lambda **kw: en.GroupNorm(2, 4, **kw),
        **_IMAGES,
        torch=lambda **kw: nn.GroupNorm(2, 4, **kw),
        shows=("2", "4", "eps="),
    ),
    LayerCase(
        "LayerNorm",
        "evenly.nn:LayerNorm",
        lambda **kw: en.LayerNorm(8, **kw),
        **_TOKENS,
        catalog="layer-normalization",
        torch=lambda **kw: nn.LayerNorm(8, **kw),
        shows=("8", "eps="),
    ),
    LayerCase(
        "LayerNorm (3 axes)",
        "evenly.nn:LayerNorm",
        lambda **kw: en.LayerNorm((4, 3, 2), bias=False, **kw),
        shapes=((5, 4, 3, 2), (4, 3, 2), (2, 3, 4, 3, 2)),
        one_sample=(1, 4, 3, 2),
        zero_size=((0, 4, 3, 2),),
        wrong=((5, 4, 3), (4, 3, 3), ()),
        torch=lambda **kw: nn.LayerNorm((4, 3, 2), bias=False, **kw),
        shows=("(4, 3, 2)", "eps="),
    ),
    LayerCase(
        "RMSNorm",
        "evenly.nn:RMSNorm",
        lambda **kw: en.RMSNorm(8, **kw),
        **_TOKENS,
        torch=lambda **kw: nn.RMSNorm(8, **kw),
        shows=("8", "eps="),
    ),
    LayerCase(
        "ScaleNorm",
        "evenly.nn:ScaleNorm",
        lambda **kw: en.ScaleNorm(8, **kw),
        **_TOKENS,
        catalog="scalenorm",
        shows=("8", "eps="),
    ),
    LayerCase(
        "Whiten",
        "evenly.nn:Whiten",
        lambda **kw: en.Whiten(4, group_size=2, method="zca", eps=1e-3, **kw),
        **{**_IMAGES, "shapes": ((5, 4, 6, 3), (20, 4), (5, 4, 7)), "zero_size": ()},
        batch_statistics=True,
        running_state=True,
        shared_channels=2,
        keeps_format=False,
        roundings=4,  # whitened, then scaled and shifted
        mask=False,
        residual=False,
        accuracy=2e-3,
        exempt={"1e20": "a covariance of values of 1e20 is above the largest float32"},
        shows=("4", "group_size=2", "zca", "eps="),
    ),
    LayerCase(
        "Norm (l1)",
        "evenly.nn:Norm",
        lambda **kw: en.Norm("n (g c) h -> n g", 4, affine="(g c)", scale="l1", g=2, **kw),
        shapes=((5, 4, 6), (2, 4, 3)),
        one_sample=(1, 4, 6),
        zero_size=((0, 4, 6), (2, 4, 0)),
        wrong=((5, 3, 6), (5, 4), (5, 4, 6, 1)),
        accuracy=1e-3,  # x - mean in float32 at a mean of 1e4
        shows=("n (g c) h -> n g", "g=2", "l1"),
    ),
    LayerCase(
        "Norm (running)",
        "evenly.nn:Norm",
        lambda **kw: en.Norm("n c ... -> c", 4, running="n c ... -> c", momentum=0.3, **kw),
        **_IMAGES,
        torch=lambda **kw: nn.BatchNorm2d(4, momentum=0.3, **kw),
        batch_statistics=True,
        running_state=True,
        shows=("'n c ... -> c'", "running='n c ... -> c'", "momentum=0.3"),
    ),
    LayerCase(
        "PowerNorm",
        "evenly.nn:PowerNorm",
        lambda **kw: en.PowerNorm(8, warmup_iters=1, group_num=2, **kw),
        **_TOKENS,
        catalog="powernorm",
        batch_statistics=True,
        running_state=True,
        channel_dim=-1,
        shared_channels=4,  # group scaling spreads a bad value over its group
        exact_gradient=False,
        mask=False,
        residual=False,
        roundings=2,
        exempt=_SQUARES,
        shows=("8", "eps=", "alpha_fwd=", "alpha_bkw=", "warmup_iters=1", "group_num=2"),
    ),
    LayerCase(
        "PowerNorm (images)",
        "evenly.nn:PowerNorm",
        lambda **kw: en.PowerNorm(
            4, warmup_iters=1, channel_dim=1, group_scaling=False, backward_scale="batch", affine=False, **kw
        ),
        **_IMAGES,
        catalog="powernorm",
        batch_statistics=True,
        running_state=True,
        parameters=False,
        exact_gradient=False,
        mask=False,
        residual=False,
        exempt=_SQUARES,
        shows=("4", "channel_dim=1", "group_scaling=False", "backward_scale='batch'"),
    ),
    LayerCase(
        "PowerNormV",
        "evenly.nn:PowerNormV",
        lambda **kw: en.PowerNormV(8, **kw),
        **_TOKENS,
        catalog="powernorm",
        batch_statistics=True,
        running_state=True,
        channel_dim=-1,
        mask=False,
        residual=False,
        exempt=_SQUARES,
        shows=("8", "eps=", "alpha_fwd="),
    ),
    LayerCase(
        "GroupScaling",
        "evenly.nn:GroupScaling",
        lambda device=None, dtype=None: en.GroupScaling(2),
        **{**_TOKENS, "wrong": ((5, 7), ())},
        catalog="powernorm",
        parameters=False,
        mask=False,
        residual=False,
        exempt=_SQUARES,
        shows=("group_num=2", "eps="),
    ),
    *(
        LayerCase(
            name,
            f"evenly.nn:{kind.__name__}",
            lambda kind=kind, options=options, **kw: kind(4, 0.9, 0.9, **options, **kw),
            **{**_IMAGES, "shapes": shapes, "one_sample": (1, *shapes[0][1:]), "zero_size": ((0, *shapes[0][1:]),)},
            catalog="online-normalization",
            running_state=True,
            exact_gradient=False,
            stream=True,
            measures=False,
            mask=False,
            residual=False,
            exempt=_SQUARES,
            shows=("4", "alpha_fwd=", "alpha_bkw=", "eps=", "guard="),
        )
        for name, kind, options, shapes in (
            ("OnlineNorm", en.OnlineNorm, {}, _IMAGES["shapes"]),
            ("OnlineNorm (clamping)", en.OnlineNorm, {"guard": "activation_clamping"}, _IMAGES["shapes"]),
            ("OnlineNorm1d", en.OnlineNorm1d, {"group_size": 2}, ((5, 4), (5, 4, 7))),
            ("OnlineNorm2d", en.OnlineNorm2d, {}, ((5, 4, 6, 3),)),
            ("OnlineNorm3d", en.OnlineNorm3d, {"guard": "none"}, ((5, 4, 2, 3, 2),)),
        )
    ),
    LayerCase(
        "BCNorm",
        "evenly.nn:BCNorm",
        lambda **kw: en.BCNorm(4, 2, **kw),
        **_IMAGES,
        catalog="bcn-ws",
        batch_statistics=True,
        running_state=True,
        shared_channels=2,
        roundings=2,
        exempt=_SQUARES,
        shows=("4", "2", "eps=", "estimate=False"),
    ),
    LayerCase(
        "BCNorm (estimated)",
        "evenly.nn:BCNorm",
        lambda **kw: en.BCNorm(4, 2, estimate=True, channel_affine="channel", **kw),
        **_IMAGES,
        catalog="bcn-ws",
        batch_statistics=True,
        running_state=True,
        shared_channels=2,
        exact_gradient=False,
        measures=False,  # the estimates are still near where they started
        roundings=2,
        exempt=_SQUARES,
        shows=("4", "2", "eps=", "estimate=True", "channel_affine='channel'"),
    ),
    LayerCase(
        "EstBatchNorm",
        "evenly.nn:EstBatchNorm",
        lambda **kw: en.EstBatchNorm(4, **kw),
        **_IMAGES,
        catalog="bcn-ws",
        batch_statistics=True,
        running_state=True,
        exact_gradient=False,
        measures=False,
        exempt=_SQUARES,
        shows=("4", "eps=", "moving_speed="),
    ),
)

_CONVOLUTIONS = (
    lambda **kw: nn.Conv1d(4, 6, 3, **kw),
    lambda **kw: nn.Conv2d(4, 6, 3, groups=2, **kw),
    lambda **kw: nn.Conv3d(2, 3, 2, **kw),
)

PARAMETRIZATIONS = (
    ParametrizationCase(
        "WeightStandardization",
        "evenly.weights:WeightStandardization",
        lambda **kw: WeightStandardization(**kw),
        _CONVOLUTIONS,
        catalog="bcn-ws",
    ),
    ParametrizationCase(
        "WeightNorm",
        "evenly.weights:WeightNorm",
        lambda **kw: WeightNorm(**kw),
        _CONVOLUTIONS,
        catalog="weight-normalization",
        lengths=True,
        shows=("dim=0", "gain='linear'"),
    ),
    ParametrizationCase(
        "WeightNorm (exp)",
        "evenly.weights:WeightNorm",
        lambda **kw: WeightNorm(gain="exp", **kw),
        _CONVOLUTIONS,
        catalog="weight-normalization",
        lengths=True,
        shows=("dim=0", "gain='exp'"),
    ),
)


def _standardize(name: str, shapes: dict, **more) -> LayerCase:
    return LayerCase(
        f"Standardize{name}",
        "evenly.stats:Standardize",
        lambda **kw: Standardize(8 if more.get("channel_dim", -1) == -1 else 4, **more, **kw),
        **shapes,
        catalog="phi-s",
        parameters=False,
        mask=False,
        residual=False,
        measures=False,
        channel_dim=more.get("channel_dim", -1),
        shows=("channel_dim=", "diagonal="),
    )


STANDARDIZERS = (
    _standardize("", _TOKENS),
    _standardize(" (images)", _IMAGES, channel_dim=1),
    _standardize(" (images, diagonal)", _IMAGES, channel_dim=1, diagonal=True),
)
LAYERS = (*LAYERS, *STANDARDIZERS)


def covered_objects() -> set[str]:
    """Every object that a suite holds, as the catalog writes it: ``"evenly.nn:BatchNorm"``."""
    return {case.object for table in (LAYERS, PARAMETRIZATIONS) for case in table}


def devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def build(case: LayerCase, *, device="cpu", dtype=torch.float32) -> nn.Module:
    """The layer with random parameters and running statistics (a fresh layer hides mistakes in them)."""
    layer = case.make(device=device, dtype=dtype)
    randomize(layer)
    return layer


@torch.no_grad()
def randomize(layer: nn.Module) -> None:
    gen = torch.Generator().manual_seed(3)
    for name, t in [*layer.named_parameters(), *layer.named_buffers()]:
        if t.is_floating_point():
            random = torch.rand(t.shape, generator=gen, dtype=torch.float64)
            if "cov" in name:  # a covariance is symmetric and positive definite
                random = random @ random.mT + torch.eye(t.shape[-1], dtype=torch.float64)
            t.copy_(random + 0.5 if "var" in name or "weight" in name else random)
