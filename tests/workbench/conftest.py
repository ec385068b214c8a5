"""One small comparison on real images, shared by the tests of the command and of the report."""

from __future__ import annotations

import io
from dataclasses import dataclass

import pytest
from rich.console import Console

from evenly.workbench import Comparison, compare


@dataclass(frozen=True)
class Finished:
    comparison: Comparison
    printed: str


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    out = io.StringIO()
    comparison = compare(
        ["batch", "layer", "workbench.factories:raising"],
        data="digits",
        ood="digits",
        model="resnet",
        batch_sizes=[32, 64],
        seeds=2,
        epochs=1,
        tune=True,
        quick=True,
        workers=1,
        out=tmp_path_factory.mktemp("compare"),
        console=Console(file=out, width=200),
        command="evenly compare --norms batch,layer <&>",
    )
    return Finished(comparison, out.getvalue())
