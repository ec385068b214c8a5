"""What this machine and this installation offer: versions, devices, who computes what, and what an extra would add.

:func:`report` gathers it as plain data and :func:`render` lays it out; ``evenly doctor`` prints it. Use it first
where something is slow or missing, and put its output into a bug report.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

__all__ = ["EXTRAS", "render", "report"]

#: The operators that are looked up: name, pattern, shape of the input, options of ``normalize``.
_OPERATORS: tuple[tuple[str, str, tuple[int, ...], dict[str, Any]], ...] = (
    ("batch norm", "n c h w -> c", (8, 16, 8, 8), {}),
    ("layer norm", "... d -> ...", (32, 64), {}),
    ("RMS norm", "... d -> ...", (32, 64), {"center": False, "scale": "rms"}),
    ("group norm", "n (g c) h w -> n g", (8, 16, 8, 8), {"g": 4}),
    ("instance norm", "n c h w -> n c", (8, 16, 8, 8), {}),
    ("weight standardization", "o i kh kw -> o", (16, 8, 3, 3), {}),
    ("group-relative advantage", "prompt sample -> prompt", (16, 8), {}),
)

#: What each extra adds, and the packages that it installs.
EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ray": ("run `evenly compare` on a Ray cluster (--engine ray)", ("ray",)),
    "docs": ("build the pages", ("mkdocs-material", "mkdocstrings", "latex2mathml")),
    "audit": ("read .skops files (evenly audit --model FILE.skops)", ("skops",)),
    "cuda": ("fused kernels on NVIDIA GPUs", ("triton",)),
    "parquet": ("read Parquet files", ("pyarrow",)),
    "fair": ("run the claim of bias scoring beside fairlearn's methods", ("fairlearn",)),
    "manifolds": ("parameters on manifolds, trained by Riemannian optimizers", ("geoopt",)),
    "trl": ("reward normalizers in TRL's trainers, and rewards of mathematics", ("trl", "transformers", "math-verify")),
    "test": ("run the tests", ("pytest", "pytest-xdist", "hypothesis", "polars", "ruff", "mypy")),
}


def report() -> dict[str, Any]:
    """Gather everything as plain data, ready for JSON.

    The keys are ``versions`` (of evenly, python, torch and the other dependencies; None: not installed),
    ``system``, ``cpu`` (``cores``, ``threads``, ``capability``), ``devices`` (name and memory of each
    accelerator), ``kernels`` (one line each for those of ``cpu`` and ``cuda``: what they use, or why they are not
    used), ``operators`` (a row an operator, device
    and dtype: the backend that serves it), ``backends`` and ``extras`` (for each: what it adds,
    what is missing, the pip command).

    >>> from evenly import doctor
    >>> sorted(doctor.report())
    ['backends', 'cpu', 'devices', 'extras', 'kernels', 'operators', 'system', 'versions']
    """
    import torch

    from evenly.core import kernels
    from evenly.core.kernels import cpu, cuda

    devices = _devices()
    return {
        "versions": _versions(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cpu": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "devices": devices,
        "kernels": {"cpu": cpu.describe(), "cuda": cuda.describe()},
        "operators": [
            {"operator": name, "device": device, "dtype": str(dtype).removeprefix("torch."), "backend": backend}
            for device in ["cpu", *dict.fromkeys(entry["type"] for entry in devices)]
            for dtype in (torch.float32, torch.bfloat16)
            for name, backend in _serving(device, dtype)
        ],
        "backends": [{"name": backend.name, "describe": backend.describe} for backend in kernels.backends()],
        "extras": _extras(),
    }


def render(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Lay out a :func:`report` as (label, text) pairs."""
    pairs = [(name, version or "not installed") for name, version in facts["versions"].items()]
    cpu = facts["cpu"]
    pairs.append(("system", facts["system"]))
    pairs.append(("cpu", f"{cpu['cores']} cores, {cpu['threads']} threads in use, {cpu['capability']}"))
    for device in facts["devices"]:
        memory = f", {device['memory_gib']:.0f} GiB" if device["memory_gib"] is not None else ""
        pairs.append(("device", f"{device['type']}: {device['name']}{memory}"))
    if not facts["devices"]:
        pairs.append(("device", "cpu only"))
    by_cuda = [r["operator"] for r in facts["operators"] if r["device"] == "cuda" and r["backend"] == "cuda"]
    serve = f"; they serve {', '.join(dict.fromkeys(by_cuda))}" if by_cuda else ""
    pairs.append(("CPU kernels", facts["kernels"]["cpu"]))
    pairs.append(("CUDA kernels", facts["kernels"]["cuda"] + serve))
    for backend in facts["backends"]:
        pairs.append(("backend", f"{backend['name']}: {backend['describe']}"))
    served: dict[tuple[str, str], list[str]] = {}
    for row in facts["operators"]:
        served.setdefault((row["operator"], row["device"]), []).append(f"{row['dtype']} by {row['backend']}")
    pairs.extend(("operator", f"{name} on {device}: {', '.join(by)}") for (name, device), by in served.items())
    for extra in facts["extras"]:
        state = f"missing {', '.join(extra['missing'])}; {extra['command']}" if extra["missing"] else "installed"
        pairs.append((f"extra {extra['name']}", f"{extra['adds']} ({state})"))
    return pairs


def _serving(device: str, dtype: Any) -> list[tuple[str, str]]:
    # Ask the backends in their order, with the call that `normalize` would make; nothing is computed.
    import torch

    from evenly.core import kernels
    from evenly.core.patterns import bind

    rows = []
    for name, pattern, shape, options in _OPERATORS:
        settings = {key: value for key, value in options.items() if key in ("center", "scale")}
        sizes = {key: value for key, value in options.items() if key not in settings}
        x = torch.empty(shape, device=device, dtype=dtype)
        call = kernels.Call(**settings)
        plan = bind(pattern, x.shape, sizes)
        rows.append((name, next(backend.name for backend in kernels.backends() if backend.supports(x, plan, call))))
    return rows


def _devices() -> list[dict[str, Any]]:
    import torch

    found: list[dict[str, Any]] = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found.append({"type": "cuda", "name": properties.name, "memory_gib": properties.total_memory / 2**30})
    if torch.backends.mps.is_available():
        found.append({"type": "mps", "name": "Apple GPU", "memory_gib": None})
    return found


def _versions() -> dict[str, str | None]:
    import evenly

    versions: dict[str, str | None] = {"evenly": evenly.__version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "einops", "scikit-learn", "scipy", "pandas", "matplotlib", "rich", "typer"):
        versions[name] = _version(name)
    return versions


def _extras() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "adds": adds,
            "packages": list(packages),
            "missing": [package for package in packages if _version(package) is None],
            "command": f"pip install 'evenly[{name}]'",
        }
        for name, (adds, packages) in EXTRAS.items()
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
