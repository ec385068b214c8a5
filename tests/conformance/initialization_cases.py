"""The table of initializations: one row a method on a network, held to the suite in test_initializations.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from evenly.models import gpt, mlp, resnet
from evenly.nn import MeanOnlyBatchNorm, NoNorm
from evenly.weights import data_dependent_init_, fixup_, fixup_init_, weight_normalize_


@dataclass(frozen=True)
class InitializationCase:
    """An initialization: ``run(model, batch)`` changes ``make()`` in place."""

    name: str
    object: str  # "module:Name", as in the catalog
    make: Callable[[], nn.Module]
    run: Callable[[nn.Module, torch.Tensor], object]
    batch: Callable[[], torch.Tensor]
    catalog: str
    holds: Callable[[nn.Module, torch.Tensor], None]  # asserts what the method promises
    uses_values: bool = False  # the values of the batch matter
    adds: bool = False  # adds parameters
    twice: str | None = None  # a part of the message when it is applied twice; None: it can be

    def __str__(self) -> str:
        return self.name


def images(seed: int = 1) -> torch.Tensor:
    return torch.randn(32, 2, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def features(seed: int = 1) -> torch.Tensor:
    return torch.randn(64, 6, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randint(16, (2, 6), generator=torch.Generator().manual_seed(seed))


def _plain() -> nn.Module:
    return resnet(2, 3, norm=lambda channels: NoNorm(), widths=(8, 16), blocks=2)


def _normalized(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = make()
        weight_normalize_(model)
        return model

    return build


def _by_hand(model: nn.Module, batch: torch.Tensor) -> None:
    fixup_init_([[block.conv1, block.conv2] for block in model.blocks])


def _outputs_are_0(model: nn.Module, batch: torch.Tensor) -> None:
    y = model(batch)
    y = y[0] if isinstance(y, tuple) else y
    assert not y.any()


def _branches_are_0(model: nn.Module, batch: torch.Tensor) -> None:
    x = model.stem(batch).relu()
    assert torch.equal(model.blocks[:2](x), x)
    std = (2 / (8 * 9)) ** 0.5 * 4**-0.5
    measured = torch.cat([block.conv1.weight.detach().flatten() for block in model.blocks[:2]]).std()
    assert abs(float(measured) / std - 1) < 0.1


def _unit_outputs(model: nn.Module, batch: torch.Tensor) -> None:
    y = model(batch)
    assert y.mean(0).abs().max() < 1e-5
    assert (y.var(0, correction=0) - 1).abs().max() < 1e-4


INITIALIZATIONS = (
    InitializationCase(
        "data-dependent (perceptron)",
        "evenly.weights:data_dependent_init_",
        _normalized(lambda: mlp(6, 3, norm="none", widths=(16, 16))),
        data_dependent_init_,
        features,
        "weight-normalization",
        _unit_outputs,
        uses_values=True,
    ),
    InitializationCase(
        "data-dependent (ResNet)",
        "evenly.weights:data_dependent_init_",
        _normalized(lambda: resnet(2, 3, norm="none", widths=(8, 16))),
        data_dependent_init_,
        images,
        "weight-normalization",
        _unit_outputs,
        uses_values=True,
    ),
    InitializationCase(
        "data-dependent (3 batches)",
        "evenly.weights:data_dependent_init_",
        _normalized(lambda: resnet(2, 3, norm=MeanOnlyBatchNorm, widths=(8, 16)).eval()),
        lambda model, batch: data_dependent_init_(model, list(batch.split(12))),
        images,
        "weight-normalization",
        _unit_outputs,
        uses_values=True,
    ),
    InitializationCase(
        "Fixup (ResNet)",
        "evenly.weights:fixup_",
        lambda: resnet(2, 3, norm="batch", widths=(8, 16), blocks=2),
        fixup_,
        images,
        "fixup",
        _outputs_are_0,
        adds=True,
        twice="applied to this model already",
    ),
    InitializationCase(
        "Fixup (pre-activation)",
        "evenly.weights:fixup_",
        lambda: resnet(2, 3, norm="group", widths=(8, 16), preactivation=True),
        lambda model, batch: fixup_(model, batch, init="fan_in"),
        images,
        "fixup",
        _outputs_are_0,
        adds=True,
        twice="applied to this model already",
    ),
    InitializationCase(
        "Fixup (GPT)",
        "evenly.weights:fixup_",
        lambda: gpt(16, dim=8, depth=2, num_heads=2, block_size=6),
        fixup_,
        tokens,
        "fixup",
        _outputs_are_0,
        adds=True,
        twice="applied to this model already",
    ),
    InitializationCase(
        "Fixup (by hand)",
        "evenly.weights:fixup_init_",
        _plain,
        _by_hand,
        images,
        "fixup",
        _branches_are_0,
    ),
)
