"""Every test and every docstring example starts from the same random numbers."""

import pytest


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)
