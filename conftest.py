"""Every test and every docstring example starts from the same random numbers."""

import os

import pytest

# Run by tests/core/test_cuda_kernels.py in processes of their own: they let other kernels serve tensors of the CPU.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else [
    "tests/core/kernels_compiled.py",
    "tests/core/kernels_interpreted.py",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)
