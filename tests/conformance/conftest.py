"""After a run of this folder: a table of methods and the checks that they passed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

_SIGN = {"passed": "✓", "failed": "✗", "error": "✗", "skipped": "–"}


@pytest.fixture(autouse=True)
def _note_the_method(request, record_property):
    """Tells the summary (also across processes) which row and which check a test belongs to."""
    case = request.node.callspec.params.get("case") if hasattr(request.node, "callspec") else None
    if case is not None:
        record_property("conformance", f"{request.path.stem}|{case}|{request.node.originalname}")


def pytest_terminal_summary(terminalreporter):
    tables: dict[str, dict[str, dict[str, str]]] = {}
    for outcome, sign in _SIGN.items():
        for report in terminalreporter.stats.get(outcome, []):
            for key, value in getattr(report, "user_properties", []):
                if key != "conformance":
                    continue
                suite, method, check = value.split("|")
                row = tables.setdefault(suite, {}).setdefault(method, {})
                check = check.removeprefix("test_")
                worse = [s for s in ("✗", "✓", "–") if s in (row.get(check), sign)]
                row[check] = worse[0]
    for suite, rows in sorted(tables.items()):
        source = (Path(__file__).parent / f"{suite}.py").read_text(encoding="utf-8")
        ran = {c for row in rows.values() for c in row}
        checks = [c for c in re.findall(r"^def test_(\w+)", source, re.MULTILINE) if c in ran]
        width = max(map(len, rows)) + 2
        terminalreporter.section(f"{suite.removeprefix('test_')}: method x check")
        for i, check in enumerate(checks):
            terminalreporter.write_line(f"{'':{width}}{'│ ' * i}{check}")
        for method, row in rows.items():
            terminalreporter.write_line(f"{method:{width}}" + " ".join(row.get(c, " ") for c in checks))
        terminalreporter.write_line("✓ passed   – does not apply   ✗ failed")
