"""The CUDA kernels where there is no GPU: run by Triton's interpreter, and compiled down to machine code.

Both need a process of their own: Triton looks for ``TRITON_INTERPRET`` when it is first imported, and the tests let
the CUDA kernels serve tensors of the CPU. The tests proper are in ``kernels_interpreted.py`` and
``kernels_compiled.py``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import evenly
from evenly.core.kernels import cuda, launch

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1" if interpret else "0"}
    paths = [str(Path(evenly.__file__).parents[1]), str(HERE.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=900, check=False,
        cwd=HERE.parents[1],
    )  # fmt: skip


@needs_triton
def test_under_the_interpreter():
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "kernels_interpreted.py"), interpret=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"\d{3} passed", done.stdout), done.stdout[-2000:]


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton brings its assembler for Linux")
def test_kernels_compile_for_a_device(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = run(str(HERE / "kernels_compiled.py"), "--quick")
    assert done.returncode == 0, done.stderr[-8000:]
    assert "never launched: back_weights" in done.stdout, done.stdout


def test_nothing_is_imported_without_a_device():
    script = """
        import sys
        import torch, evenly
        evenly.normalize(torch.randn(3, 4), "n d -> n")
        from evenly import doctor
        lines = [text for label, text in doctor.render(doctor.report()) if label == "CUDA kernels"]
        assert len(lines) == 1, lines
        assert torch.cuda.is_available() or "triton" not in sys.modules
        assert not any(name.endswith("cuda.entry") for name in sys.modules)
    """
    done = run("-c", textwrap.dedent(script))
    assert done.returncode == 0, done.stderr


def test_what_doctor_says_of_missing_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cuda._load.cache_clear()
    try:
        assert "pip install 'evenly[cuda]'" in cuda.describe()
        assert cuda.load() is None
        assert not launch.served("cuda")
    finally:
        cuda._load.cache_clear()
