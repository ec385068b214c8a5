"""Where results are kept: ``docs/claims/ID.json`` in a checkout, and a copy inside an installed package."""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

__all__ = [
    "checkout_dir",
    "dumps",
    "number",
    "results_dir",
    "rows",
    "spread",
    "stored",
    "summary",
    "verdict",
    "write_atomically",
]


def results_dir() -> Path:
    """Return the folder of stored results: ``docs/claims`` of the checkout, else the copy in the package."""
    return checkout_dir() or Path(__file__).resolve().parent / "results" / "claims"


def checkout_dir() -> Path | None:
    """Return ``docs/claims`` where the library runs from its own checkout, else None."""
    package = Path(__file__).resolve().parent
    root = package.parents[2]
    if (root / "pyproject.toml").is_file() and package == root / "src" / "evenly" / "claims":
        return root / "docs" / "claims"
    return None


def stored(id: str, directory: Path | None = None) -> dict[str, Any] | None:
    """Return the stored full-budget result of a claim, or None where there is none."""
    path = (directory or results_dir()) / f"{id}.json"
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def summary(result: dict[str, Any]) -> str:
    """Say a stored result in a few lines: the verdict, the metrics, each check beside its threshold, the criterion."""
    lines = [f"{text}" if label == "verdict" else f"{label}: {text}" for label, text in verdict(result)]
    metrics = [f"{name}: {base} -> {method}" for _, name, base, method in rows(result)]
    return "\n".join([*lines[:1], *metrics, *lines[1:]])


def rows(result: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return a row a metric: the claim's id, the metric, and baseline and method as median and range over seeds."""
    return [
        (
            result["id"],
            metric["name"],
            *(f"{side['name']}: {spread(side['per_seed'])}" for side in (metric["baseline"], metric["method"])),
        )
        for metric in result["metrics"]
    ]


def verdict(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (label, text) pairs: the verdict, why, the effect, each check and the criterion."""
    effect = result["effect"]
    pairs = [("verdict", f"{result['verdict']} ({result['budget']} budget, seeds {_seeds(result['seeds'])})")]
    if result["why"]:
        pairs.append(("why", result["why"]))
    pairs.append(
        (
            "effect",
            f"{number(effect['value'])} [{number(effect['low'])}, {number(effect['high'])}] {effect['name']}",
        )
    )
    for check in result["checks"]:
        said = f"{check['name']} is {number(check['value'])}, wanted {check['relation']} {number(check['threshold'])}"
        pairs.append(("pass" if check["passed"] else "fail", said))
    pairs.append(("criterion", result["criterion"]))
    pairs.append(("data", result["data"]))
    took = f"{result['duration_s']:.0f} s with {result['workers']} workers"
    if "cpu_s" in result:
        took += f", {result['cpu_s']:.0f} s of processor time"
    pairs.append(("took", took))
    return pairs


def _seeds(seeds: list[int]) -> str:
    run = list(range(seeds[0], seeds[-1] + 1))
    return f"{seeds[0]} to {seeds[-1]}" if seeds == run and len(seeds) > 1 else ", ".join(map(str, seeds))


def number(value: float | None) -> str:
    """Write a number with four digits; None stands for a number that is not finite."""
    if value is None or not math.isfinite(value):
        return "none"
    return f"{value:.4g}"


def spread(values: list[float | None]) -> str:
    """Write per-seed values as their median and range."""
    known = [math.inf if value is None else value for value in values]
    middle = statistics.median(known)
    return f"{number(middle)} [{number(min(known))}, {number(max(known))}]"


def dumps(value: Any, indent: int = 0) -> str:
    """Write JSON for people: a line a key, and lists of plain numbers or words on one line.

    Numbers that are not finite become null.
    """
    pad = " " * (indent + 1)
    if isinstance(value, dict) and value:
        if indent > 3 and not any(isinstance(entry, dict | list | tuple) for entry in value.values()):
            return "{" + ", ".join(f"{json.dumps(key)}: {dumps(entry)}" for key, entry in value.items()) + "}"
        body = ",\n".join(f"{pad}{json.dumps(key)}: {dumps(entry, indent + 1)}" for key, entry in value.items())
        return "{\n" + body + "\n" + " " * indent + "}"
    if isinstance(value, list | tuple):
        if not any(isinstance(entry, dict | list | tuple) for entry in value):
            return "[" + ", ".join(dumps(entry) for entry in value) + "]"
        body = ",\n".join(pad + dumps(entry, indent + 1) for entry in value)
        return "[\n" + body + "\n" + " " * indent + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return "null"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a kill at any moment, finds the old text or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
