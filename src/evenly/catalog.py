"""The register: one row a paper, what it is called here and how far it is.

``catalog.toml`` beside this file is the single list of the papers that define the scope of the library.
:func:`methods` reads it once, checks every row and returns them in the order of the file;
:func:`method` finds one by its id; :func:`resolve` turns ``"evenly.nn:BatchNorm"`` into the object.

Use it to ask what the library has, from Python or with ``evenly list`` and ``evenly show ID``. The tests use
it too: a row may say ``state = "done"`` only when its objects import, its claim has a stored result and its
conformance suite names it.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["AREAS", "CatalogError", "Method", "method", "methods", "read", "resolve"]

#: The areas of the library and what each holds, in the order in which they are listed.
AREAS: dict[str, str] = {
    "nn": "layers: activation and attention normalization",
    "weights": "parametrizations, penalties, initializations",
    "optim": "optimizers and gradient normalization",
    "manifolds": "normalization on Riemannian manifolds",
    "symmetry": "group equivariance, canonicalization, orbits",
    "flows": "normalizing flows",
    "robust": "groups of samples: training, sampling, test-time adaptation, audits",
    "fair": "groups of people: audits, post- and in-processing",
    "federated": "normalization across clients",
    "policy": "groups of rollouts and preferences",
    "text": "groups of spellings: text and entity normalization",
    "vision": "groups of pixels and points",
    "graphs": "groups of nodes and edges",
    "stats": "groups of variables, tasks and neighbours",
    "diagnostics": "what normalization does inside a network",
}

#: What a row may say about itself.
STATES = ("planned", "done")

_PATH = Path(__file__).with_name("catalog.toml")
_REQUIRED = ("id", "title", "area", "kind", "objects", "state")
_OPTIONAL = ("arxiv", "reference")
_ID = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_ARXIV = re.compile(r"\d{4}\.\d{4,5}")
_OBJECT = re.compile(r"evenly(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


class CatalogError(ValueError):
    """The register is malformed, or does not hold what was asked for."""


@dataclass(frozen=True)
class Method:
    """One row of the register.

    Attributes:
        id: short name used in commands and file names, such as ``"batch-normalization"``.
        title: the paper's title.
        area: the folder of ``evenly`` that holds the method, a key of :data:`AREAS`.
        kind: what the method is (``"layer"``, ``"optimizer (AdamP, SGDP)"``, ...).
        objects: public objects as ``"module:name"``; empty while there are none.
        state: ``"planned"`` or ``"done"``.
        arxiv: arXiv number, or None where the paper has none.
        reference: a link to the paper where it has no arXiv number, else None.
    """

    id: str
    title: str
    area: str
    kind: str
    objects: tuple[str, ...]
    state: str
    arxiv: str | None = None
    reference: str | None = None

    @property
    def link(self) -> str:
        """Where to read the paper: a URL."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else str(self.reference)

    @property
    def done(self) -> bool:
        """Whether the method is finished by the library's own definition."""
        return self.state == "done"

    @property
    def stage(self) -> str:
        """``"done"``, ``"built"`` (there are objects, and something of the library's definition of done is missing) or
        ``"planned"``.
        """
        return "done" if self.done else "built" if self.objects else "planned"

    @property
    def module(self) -> str:
        """The id as a Python name: the file of the claim is ``claims/<module>.py``."""
        return self.id.replace("-", "_")


@functools.lru_cache(maxsize=1)
def methods() -> tuple[Method, ...]:
    """Return every row of the register, in its order (by area, then by id). Read and checked once.

    Raises:
        CatalogError: a row is malformed (see :func:`read`).

    >>> from evenly import catalog
    >>> len(catalog.methods())
    119
    """
    return read(_PATH)


def method(id: str) -> Method:
    """Return the row named ``id``.

    Raises:
        CatalogError: there is no such row; the message names the closest ids.

    >>> from evenly import catalog
    >>> catalog.method("layer-normalization").link
    'https://arxiv.org/abs/1607.06450'
    """
    rows = {row.id: row for row in methods()}
    if id in rows:
        return rows[id]
    near = _close(id, rows)
    hint = f"did you mean {_or(near)}?" if near else "`evenly list` shows every id."
    raise CatalogError(f"no method has the id {id!r}; {hint}")


def resolve(object: str) -> Any:
    """Import the object that ``"module:name"`` names.

    Raises:
        CatalogError: the text has another form, the module does not import, or it lacks the name.

    >>> from evenly import catalog
    >>> catalog.resolve("evenly.catalog:Method").__name__
    'Method'
    """
    if not _OBJECT.fullmatch(object):
        raise CatalogError(f"{object!r} is not of the form 'evenly.module:name'")
    module, _, name = object.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise CatalogError(f"{object!r}: the module {module!r} does not import: {error}") from error
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise CatalogError(f"{object!r}: {module!r} has no {name!r}") from error
    return found


def read(path: str | os.PathLike[str]) -> tuple[Method, ...]:
    """Read and check a register file.

    Args:
        path: a TOML file of ``[[method]]`` tables with the keys of :class:`Method`; ``arxiv`` or ``reference``
            is required, not both.

    Raises:
        CatalogError: the file is not TOML, or a row has an unknown, missing or wrong entry; the message names
            the file, the row, what was found and what was expected.
    """
    path = Path(path)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise CatalogError(f"{path.name} is not valid TOML: {error}") from error
    extra = sorted(set(document) - {"method"})
    if extra:
        raise CatalogError(f"{path.name}: unknown top-level key {_or(extra)}; expected [[method]] tables only")
    rows: list[Method] = []
    seen: dict[str, int] = {}
    for number, table in enumerate(document.get("method", ()), start=1):
        row = _row(f"{path.name}, method {number}", table)
        if row.id in seen:
            raise CatalogError(f"{path.name}: the id {row.id!r} is used twice, by methods {seen[row.id]} and {number}")
        seen[row.id] = number
        rows.append(row)
    return tuple(rows)


def _row(where: str, table: Mapping[str, Any]) -> Method:
    if "id" in table:
        where = f"{where} ({table['id']!r})"
    for key in table:
        if key not in _REQUIRED + _OPTIONAL:
            near = _close(key, _REQUIRED + _OPTIONAL)
            hint = f"did you mean {_or(near)}?" if near else f"expected {_or(_REQUIRED + _OPTIONAL)}"
            raise CatalogError(f"{where}: unknown key {key!r}; {hint}")
    missing = [key for key in _REQUIRED if key not in table]
    if missing:
        raise CatalogError(f"{where}: missing {', '.join(map(repr, missing))}")
    for key in (*_REQUIRED, *_OPTIONAL):
        if key != "objects" and key in table and not (isinstance(table[key], str) and table[key].strip()):
            raise CatalogError(f"{where}: {key} is {table[key]!r}; expected text")
    if not _ID.fullmatch(table["id"]):
        raise CatalogError(f"{where}: the id must be lower-case words joined by dashes")
    if table["area"] not in AREAS:
        raise CatalogError(f"{where}: area is {table['area']!r}; expected {_or(AREAS)}")
    if table["state"] not in STATES:
        raise CatalogError(f"{where}: state is {table['state']!r}; expected {_or(STATES)}")
    if ("arxiv" in table) == ("reference" in table):
        found = "both" if "arxiv" in table else "neither"
        raise CatalogError(f"{where}: has {found} of 'arxiv' and 'reference'; expected exactly one")
    if "arxiv" in table and not _ARXIV.fullmatch(table["arxiv"]):
        raise CatalogError(f"{where}: arxiv is {table['arxiv']!r}; expected a number such as '1502.03167'")
    if "reference" in table and not table["reference"].startswith("https://"):
        raise CatalogError(f"{where}: reference is {table['reference']!r}; expected a link that begins with https://")
    objects = table["objects"]
    if not isinstance(objects, list):
        raise CatalogError(f"{where}: objects is {objects!r}; expected a list such as ['evenly.nn:BatchNorm']")
    for entry in objects:
        if not (isinstance(entry, str) and _OBJECT.fullmatch(entry)):
            raise CatalogError(f"{where}: objects has {entry!r}; expected 'evenly.module:name'")
    if len(set(objects)) != len(objects):
        raise CatalogError(f"{where}: objects names an object twice: {objects}")
    if table["state"] == "done" and not objects:
        raise CatalogError(f"{where}: state is 'done' but objects is empty")
    return Method(**{**table, "objects": tuple(objects)})


def _close(word: str, known: Any) -> list[str]:
    # Whole-word similarity first, then ids that contain what was typed ("batchnorm" finds nothing by itself).
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    parts = [part for part in re.split(r"[^a-z0-9]+", word.lower()) if len(part) > 2]
    holding = [name for name in known if parts and all(part in name for part in parts)]
    return list(dict.fromkeys([*near, *holding]))[:3]


def _or(names: Any) -> str:
    quoted = [repr(name) for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"
