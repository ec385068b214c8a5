"""The table of optimizers: one row an optimizer with its settings, held to the suite in test_optimizers.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from evenly import optim

Shape = tuple[int, ...]
ANY: tuple[Shape, ...] = ((6, 4), (5,), (4, 3, 2, 2), (), (1, 7))
MATRICES: tuple[Shape, ...] = ((6, 4), (4, 8), (6, 4), (1, 7), (5, 1))


@dataclass(frozen=True)
class OptimizerCase:
    """An optimizer: ``make(params, **more)`` builds it, with ``settings`` in the place of its defaults."""

    name: str
    object: str  # "module:Name", as in the catalog
    make: Callable[..., torch.optim.Optimizer]
    catalog: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    shapes: tuple[Shape, ...] = ANY  # of parameters that it takes
    state: tuple[str, ...] = ()  # what it keeps of each parameter
    refuses: tuple[tuple[dict[str, Any], str], ...] = ()  # settings and a part of the message
    scale_free: bool = False  # the step does not depend on the scale of the gradient
    lr: float = 0.05

    def __call__(self, params, **more) -> torch.optim.Optimizer:
        return self.make(params, **{"lr": self.lr, **self.settings, **more})

    def __str__(self) -> str:
        return self.name


_EVERY = (
    ({"lr": -1.0}, "lr=-1.0, expected a finite number of at least 0"),
    ({"lr": float("nan")}, "lr=nan"),
    ({"lr": torch.ones(2)}, "lr is a tensor of shape (2,), expected one element"),
    ({"weight_decay": -0.1}, "weight_decay=-0.1, expected a number of at least 0"),
    ({"foreach": "yes"}, "foreach='yes', expected one of None, True, False"),
)
_PROJECTING = (
    *_EVERY,
    ({"eps": -1e-8}, "eps=-1e-08"),
    ({"delta": -0.1}, "delta=-0.1"),
    ({"wd_ratio": -1.0}, "wd_ratio=-1.0"),
)
_ADAMP = (
    *_PROJECTING,
    ({"betas": (1.0, 0.9)}, "betas[0]=1.0, expected a number of at least 0 and below 1"),
    ({"betas": (0.9,)}, "betas=(0.9,), expected two numbers"),
)
_SGDP = (
    *_PROJECTING,
    ({"momentum": 1.0}, "momentum=1.0, expected a number of at least 0 and below 1"),
    ({"momentum": 0.0, "nesterov": True}, "Nesterov's update needs a momentum above 0"),
    ({"dampening": -1.0}, "dampening=-1.0"),
    ({"buffer": "mine"}, "buffer='mine', expected one of 'paper', 'code'"),
)
_MATRIX = (
    *_EVERY,
    ({"iters": 0}, "iters=0, expected a whole number of at least 1"),
    ({"momentum": -0.1}, "momentum=-0.1"),
    ({"betas": 0.9}, "betas=0.9, expected two numbers"),
)


def _grouped(params, **settings):
    # Every other parameter to Adam, as for_model does with what is not a hidden matrix.
    params = list(params)
    groups = [{"params": params[::2], "rule": "matrix"}, {"params": params[1::2], "rule": "adam"}]
    return optim.SinkGD([group for group in groups if group["params"]], **settings)


def _signs(params, **settings):
    return optim.MultiNormGD(params, [optim.project_row_rms, optim.project_sign], **settings)


_ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")

OPTIMIZERS = (
    OptimizerCase("AdamP", "evenly.optim:AdamP", optim.AdamP, "adamp", {}, ANY, _ADAM_STATE, _ADAMP),
    OptimizerCase(
        "AdamP (Nesterov, decay)",
        "evenly.optim:AdamP",
        optim.AdamP,
        "adamp",
        {"nesterov": True, "weight_decay": 0.1, "delta": 2.0},
        ANY,
        _ADAM_STATE,
    ),
    OptimizerCase("SGDP", "evenly.optim:SGDP", optim.SGDP, "adamp", {}, ANY, (), _SGDP, lr=0.3),
    OptimizerCase(
        "SGDP (Nesterov, decay)",
        "evenly.optim:SGDP",
        optim.SGDP,
        "adamp",
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "delta": 2.0},
        ANY,
        ("momentum_buffer",),
        lr=0.01,
    ),
    OptimizerCase(
        "SGDP (the code's buffer)",
        "evenly.optim:SGDP",
        optim.SGDP,
        "adamp",
        {"momentum": 0.9, "dampening": 0.1, "buffer": "code", "delta": 2.0},
        ANY,
        ("momentum_buffer",),
        lr=0.01,
    ),
    OptimizerCase(
        "SinkGD",
        "evenly.optim:SinkGD",
        optim.SinkGD,
        "multi-normalization-sinkgd",
        {},
        MATRICES,
        (),
        (*_MATRIX, ({"eps": -1.0}, "eps=-1.0")),
        scale_free=True,
    ),
    OptimizerCase(
        "SinkGD (momentum, decay)",
        "evenly.optim:SinkGD",
        optim.SinkGD,
        "multi-normalization-sinkgd",
        {"momentum": 0.9, "weight_decay": 0.1, "iters": 2},
        MATRICES,
        ("momentum_buffer",),
        scale_free=True,
        lr=0.02,
    ),
    OptimizerCase("SinkGD (and Adam)", "evenly.optim:SinkGD", _grouped, "multi-normalization-sinkgd", {}, MATRICES),
    OptimizerCase(
        "SWAN",
        "evenly.optim:SWAN",
        optim.SWAN,
        "multi-normalization-sinkgd",
        {},
        MATRICES,
        (),
        (*_MATRIX, ({"method": "qr"}, "method='qr'"), ({"newton_iters": 0}, "newton_iters=0")),
        scale_free=True,
    ),
    OptimizerCase(
        "MultiNormGD",
        "evenly.optim:MultiNormGD",
        _signs,
        "multi-normalization-sinkgd",
        {"skip_nonfinite": False},
        MATRICES,
        (),
        _MATRIX,
        scale_free=True,
    ),
)
