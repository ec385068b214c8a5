"""The house: which part may import which, that every module says what it is, and that the import is quick."""

from __future__ import annotations

import ast
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from evenly.catalog import AREAS

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "evenly"
FILES = sorted(PACKAGE.rglob("*.py"))

_AREAS = set(AREAS)
_LOW = {"core", "nn"}
_TOOLS = {"core", "conversion", "models", "data", "catalog", "terminal", "evenly"} | _AREAS

#: For each part of the package, the other parts that it may import. "evenly" is the package itself.
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "catalog": set(),
    "terminal": set(),
    **dict.fromkeys(_AREAS, _LOW),
    "data": {"core"},
    "models": {"core"} | _AREAS,
    "conversion": {"core", "models"} | _AREAS,
    "workbench": _TOOLS,
    "claims": _TOOLS,
    "cards": {"catalog", "claims"},
    "doctor": {"core", "catalog", "evenly"},
    "evenly": {"core"},  # `import evenly` brings the primitive; the rest comes when it is first used
    "__main__": {"cli"},
}


def part(path: Path) -> str:
    """The part that a file belongs to: its folder or its own name right below the package."""
    first = path.relative_to(PACKAGE).parts[0]
    return "evenly" if first == "__init__.py" else first.removesuffix(".py")


def imports(path: Path) -> list[tuple[int, str]]:
    """The parts of the package that a file imports anywhere, except for type checkers only."""
    package = ["evenly", *path.relative_to(PACKAGE).with_suffix("").parts[:-1]]
    found: list[tuple[int, str]] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            names = [f"{base}.{alias.name}" if base == "evenly" else base for alias in node.names]
        for name in names:
            pieces = name.split(".")
            if pieces[0] == "evenly":
                known = len(pieces) > 1 and ((PACKAGE / pieces[1]).is_dir() or (PACKAGE / f"{pieces[1]}.py").is_file())
                found.append((getattr(node, "lineno", 0), pieces[1] if known else "evenly"))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def test_every_part_has_a_place():
    unknown = {part(path) for path in FILES} - set(ALLOWED) - {"cli"}
    assert not unknown, f"say in ALLOWED what {sorted(unknown)} may import"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = part(path)
    if own == "cli":
        return
    wrong = [f"line {line}: {name}" for line, name in imports(path) if name != own and name not in ALLOWED[own]]
    assert not wrong, f"{own} may import {sorted(ALLOWED[own]) or 'nothing of ours'}, but {path.name} imports {wrong}"


def test_the_check_sees_imports(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    for folder in ("nn", "fair", "core"):
        (tmp_path / folder).mkdir()
    file = tmp_path / "nn" / "layer.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nimport torch\nif TYPE_CHECKING:\n    import evenly.core\ndef "
        "f():\n    from evenly import fair, normalize\n    from ..core.kernels import run\n    import "
        "evenly.fair.audit\n"
    )
    assert [name for _, name in imports(file)] == ["fair", "evenly", "core", "fair"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_has_a_docstring(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, f"{path.relative_to(PACKAGE)} has no docstring"


def run_python(code: str) -> str:
    # A child that sees this source tree, wherever the library is installed.
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_import_loads_nothing_heavy():
    loaded = json.loads(run_python("import json, evenly; print(json.dumps(sorted(sys.modules)))"))
    heavy = {"sklearn", "pandas", "matplotlib", "rich", "typer", "scipy", "jinja2", "PIL", "safetensors", "ray"}
    heavy.add("geoopt")
    assert not heavy & set(loaded)
    # Parts other than the primitive come when they are first used.
    ours = {name.split(".")[1] for name in loaded if name.startswith("evenly.")}
    assert ours == {"core"}


def test_import_takes_at_most_1_3_times_torch():
    # Both in one process, so that a busy machine slows both: time of torch, then what evenly adds to it.
    code = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import evenly; "
        "c = time.perf_counter(); print((c - a) / (b - a))"
    )
    ratios = [float(run_python(code)) for _ in range(3)]
    assert statistics.median(ratios) <= 1.3, ratios
