"""The pages of the site that are made from what is there already.

A page a method from its module's docstring, the register, the stored result of its claim and the stored rows of the
benchmarks; the list of methods; the claims; the reference of every public package; the command line; the README as
the first page. Nothing is written twice, and nothing that is generated is kept in the repository.
"""

from __future__ import annotations

import html
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "src"))
sys.path.insert(0, str(Path(__file__).parent))

from docstrings import to_markdown  # noqa: E402

from evenly import catalog, claims  # noqa: E402
from evenly.catalog import AREAS, Method  # noqa: E402
from evenly.cli import app  # noqa: E402

_CSS = """
.equation { overflow: auto hidden; margin: 1em 0; padding: .4em 0; }
math { font-size: 1.1em; }
mtd[columnalign="right"] { text-align: right; padding-right: 0; }
mtd[columnalign="left"] { text-align: left; padding-left: 0; }
.claim-picture img { background: #fff; border-radius: 4px; padding: 4px; }
.verdict { border-radius: 4px; padding: .1em .5em; font-weight: 600; color: #fff; background: #8a5a00; }
.verdict.reproduced { background: #1f6f4a; }
"""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Navigation: areas that have a method, the packages, the rest."""
    areas = [
        {area: [{row.id: f"methods/{row.id}.md"} for row in rows]}
        for area in AREAS
        if (rows := [row for row in catalog.methods() if row.area == area and row.objects])
    ]
    config.nav = [
        {"Home": "index.md"},
        {"Methods": ["methods/index.md", *areas]},
        {"Claims": "claims.md"},
        {"Reference": [{name: f"reference/{name}.md"} for name in _packages()]},
        {"Command line": "commands.md"},
        {"Contributing": "contributing.md"},
        {"Changes": "changes.md"},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for path, content in _pages():
        files.append(File.generated(config, path, content=content))
    return files


def _pages() -> Iterator[tuple[str, str]]:
    yield "generated/site.css", _CSS
    yield "index.md", _readme()
    yield "contributing.md", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    yield "changes.md", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    yield "methods/index.md", _methods()
    yield "claims.md", _claims()
    yield "commands.md", _commands()
    for row in catalog.methods():
        if row.objects:
            yield f"methods/{row.id}.md", method_page(row)
    for name in _packages():
        yield f"reference/{name}.md", _package(name)


def _packages() -> list[str]:
    """The public packages: the primitive first, then the areas that exist, then the rest."""
    there = [area for area in AREAS if (ROOT / "src" / "evenly" / area / "__init__.py").exists()]
    return ["evenly.core", *(f"evenly.{area}" for area in there), "evenly.conversion", "evenly.models", "evenly.data"]


# ---- a method -------------------------------------------------------------------------------------------------------


def method_page(row: Method) -> str:
    """The page of one method as Markdown."""
    objects = [(name, catalog.resolve(name)) for name in row.objects]
    parts = [f"# {row.title}"]
    state = "done" if row.done else "built, not finished by the library's own definition"
    parts.append(f"`{row.id}` · {row.kind} · area `{row.area}` · {state} · [paper]({row.link})")
    seen = set()
    for _, found in objects:
        module = importlib.import_module(found.__module__)
        text = inspect.getdoc(module)
        if module.__name__ not in seen and text and module.__name__ != "evenly.core":
            seen.add(module.__name__)
            parts.append(_as_prose(to_markdown(text)))
    parts.append("## What it gives you")
    for name in row.objects:
        home = _homes()[name]
        dotted = _dotted(name)
        parts.append(f"::: {dotted}" if home == row.id else f"[`{dotted}`][{dotted}] is described with `{home}`.")
    parts.extend(_claim(row))
    parts.extend(_benchmarks(row))
    return "\n\n".join(parts) + "\n"


def _homes() -> dict[str, str]:
    """For each object of a method, the one page that describes it."""
    homes: dict[str, str] = {}
    for row in catalog.methods():
        for name in row.objects:
            homes.setdefault(name, row.id)
    return homes


def _dotted(name: str) -> str:
    """The identifier of an object; one that shares its name with its module has the longer one."""
    dotted = name.replace(":", ".")
    return f"{dotted}.{dotted.rsplit('.', 1)[1]}" if dotted in sys.modules else dotted


def _as_prose(text: str) -> str:
    """A module's docstring: its first line is a heading's subtitle, ``Reference:`` a section."""
    first, _, rest = text.partition("\n")
    rest = re.sub(
        r"^(References?):\n((?:    .*\n?|\n)+)",
        lambda found: f"**{found[1]}.** " + re.sub(r"^    ", "", found[2], flags=re.M).strip() + "\n",
        rest,
        flags=re.M,
    )
    return f"**{first.strip()}**\n{rest}"


def _claim(row: Method) -> Iterator[str]:
    if row.id not in claims.available():
        return
    claim = claims.get(row.id)
    yield "## The claim"
    yield f"> {_text(claim.statement)}"
    yield f"Criterion, fixed before the run: {_text(claim.criterion)}"
    result = claims.stored(row.id)
    if result is None:
        yield f"Not run at full budget yet: `evenly claim {row.id}`."
        return
    verdict = result["verdict"]
    name = "verdict reproduced" if verdict == "reproduced" else "verdict"
    said = claims.summary(result).splitlines()[0]
    yield f'<span class="{name}">{verdict}</span> {_text(said.removeprefix(verdict))}'
    if result["why"]:
        yield _text(result["why"])
    lines = ["| metric | baseline | per seed | method | per seed |", "|---|---|---|---|---|"]
    for metric in result["metrics"]:
        cells = [metric["name"]]
        for side in ("baseline", "method"):
            cells += [metric[side]["name"], ", ".join(_number(value) for value in metric[side]["per_seed"])]
        lines.append("| " + " | ".join(_text(cell) for cell in cells) + " |")
    yield "\n".join(lines)
    lines = ["| part of the criterion | measured | wanted | |", "|---|---|---|---|"]
    for check in result["checks"]:
        wanted = f"{check['relation']} {_number(check['threshold'])}"
        outcome = "holds" if check["passed"] else "**fails**"
        cells = [_text(cell) for cell in (check["name"], _number(check["value"]), wanted)]
        lines.append("| " + " | ".join([*cells, outcome]) + " |")
    yield "\n".join(lines)
    if (ROOT / "docs" / "claims" / f"{row.id}.svg").exists():
        yield f'<div class="claim-picture" markdown>![What the claim measured](../claims/{row.id}.svg)</div>'
    yield (
        f"Data: {_text(result['data'])}. Run it: `evenly claim {row.id}`. "
        f"All numbers: [{row.id}.json](../claims/{row.id}.json)."
    )


def _benchmarks(row: Method) -> Iterator[str]:
    names = {name.rsplit(":", 1)[1] for name in row.objects}
    found = []
    for path in sorted((ROOT / "docs" / "benchmarks").glob("*.json")):
        rows = [one for one in _flat(json.loads(path.read_text(encoding="utf-8"))) if _is_of(one, row.id, names)]
        if rows:
            columns = list(dict.fromkeys(key for one in rows for key, value in one.items() if value is not None))
            titles = [_text(column.replace("_", " ")) for column in columns]
            lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(columns)]
            for one in rows:
                lines.append("| " + " | ".join(_text(_number(one.get(column))) for column in columns) + " |")
            source = f"`python benchmarks/{path.stem}.py`, [{path.name}](../benchmarks/{path.name})"
            found.append(f"{source}\n\n" + "\n".join(lines))
    if found:
        yield "## What it costs"
        yield from found


def _flat(tree: Any, where: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """Every mapping of plain values in a benchmark's file; the keys above it become its first columns."""
    if isinstance(tree, list):
        for one in tree:
            yield from _flat(one, where)
    elif isinstance(tree, dict):
        plain = {key: value for key, value in tree.items() if not isinstance(value, (dict, list))}
        if plain and any(isinstance(value, str) for value in plain.values()):
            yield ({"input": where[-1]} if where else {}) | plain
        for key, value in tree.items():
            yield from _flat(value, (*where, key) if isinstance(tree[key], (dict, list)) and key != "rows" else where)


def _is_of(row: dict[str, Any], id: str, names: set[str]) -> bool:
    if row.get("method") == id:
        return True
    texts = [value for value in row.values() if isinstance(value, str)]
    return any(re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", text) for name in names for text in texts)


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _text(value: Any) -> str:
    """Plain text inside Markdown."""
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False))


# ---- the other pages ------------------------------------------------------------------------------------------------


def _readme() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = text.replace("(docs/", "(").replace("[CONTRIBUTING](CONTRIBUTING.md)", "[CONTRIBUTING](contributing.md)")
    for row in catalog.methods():
        if row.objects:
            text = text.replace(f"[`{row.id}`](claims/{row.id}.json)", f"[`{row.id}`](methods/{row.id}.md)")
    return text


def _methods() -> str:
    done = sum(row.done for row in catalog.methods())
    parts = ["# Methods", f"{len(catalog.methods())} papers define the scope; {done} are done."]
    for area, what in AREAS.items():
        parts.append(f"## {area}\n\n{what[0].upper()}{what[1:]}.")
        lines = ["| method | paper | state |", "|---|---|---|"]
        for row in catalog.methods():
            if row.area == area:
                name = f"[`{row.id}`]({row.id}.md)" if row.objects else f"`{row.id}`"
                state = "**done**" if row.done else row.stage
                lines.append(f"| {name} | [{_text(row.title)}]({row.link}) | {state} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _claims() -> str:
    stored = {id: result for id in claims.available() if (result := claims.stored(id)) is not None}
    held = sum(result["verdict"] == "reproduced" for result in stored.values())
    lines = ["| method | verdict | what was measured |", "|---|---|---|"]
    for id, result in stored.items():
        effect = claims.summary(result).splitlines()
        headline = next((line for line in effect if line.startswith("effect")), effect[0])
        name = "verdict reproduced" if result["verdict"] == "reproduced" else "verdict"
        lines.append(
            f'| [`{id}`](methods/{id}.md) | <span class="{name}">{result["verdict"]}</span> | {_text(headline)} |'
        )
    return (
        "# Claims\n\nOne small experiment a paper that could have failed. The criterion stands in the file before the "
        f"run. {len(stored)} ran at full budget, {held} held.\n\n" + "\n".join(lines) + "\n"
    )


def _package(name: str) -> str:
    module = importlib.import_module(name)
    parts = [f"# {name}", _as_prose(to_markdown(inspect.getdoc(module) or ""))]
    homes = _homes()
    for member in module.__all__:
        found = getattr(module, member)
        home, dotted = homes.get(f"{name}:{member}"), _dotted(f"{name}:{member}")
        if home is not None:
            parts.append(f"## {member}\n\n[`{name}.{member}`][{dotted}], with the method `{home}`.")
        elif inspect.isclass(found) or inspect.isfunction(found):
            parts.append(f"::: {dotted}\n    options:\n      heading_level: 2\n      show_root_full_path: false")
    return "\n\n".join(parts) + "\n"


def _commands() -> str:
    group = typer.main.get_command(app)
    parts = ["# Command line", "Every command prints its help with `--help`."]
    for name, command in sorted(group.commands.items()):  # type: ignore[attr-defined]
        parts.append(f"## evenly {name}\n\n{_text(inspect.cleandoc(command.help or ''))}")
        lines = ["| option | default | what |", "|---|---|---|"]
        for one in command.params:
            label = ", ".join(f"`{text}`" for text in one.opts) if one.opts[0].startswith("-") else f"`{one.name}`"
            default = "" if one.default in (None, False) or callable(one.default) else f"`{one.default}`"
            lines.append(f"| {label} | {default} | {_text(getattr(one, 'help', '') or '')} |")
        if command.params:
            parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
