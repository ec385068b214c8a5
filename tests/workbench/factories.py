"""Models and layers that the tests name by path, as a user would."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from torch import Tensor, nn


def make(in_features: int, num_classes: int, *, norm: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(in_features, 8), norm(8), nn.ReLU(), nn.Linear(8, num_classes))


def no_norm(in_features: int, num_classes: int) -> nn.Module:
    return nn.Linear(in_features, num_classes)


def no_module(in_features: int, num_classes: int, *, norm: Callable[[int], nn.Module]) -> object:
    return "a string"


class _Killer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return x


def killer(num_features: int) -> nn.Module:
    return _Killer()


class _Exploding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float("inf")


def exploding(num_features: int) -> nn.Module:
    return _Exploding()


def raising(num_features: int) -> nn.Module:
    raise RuntimeError(f"no layer for {num_features} features\nand a second line")
