"""What ``evenly list`` and ``evenly show`` print: the rows of the register, and one method in full.

:func:`listing` chooses rows; :func:`card` gathers all that is known of one method: the paper, its objects with
their signatures, what its claim found, and how to run it. Both return plain data; the command line prints it.
"""

from __future__ import annotations

import inspect
from typing import Any

from evenly import catalog
from evenly.catalog import CatalogError, Method

__all__ = ["card", "listing", "render"]


def listing(area: str | None = None, state: str | None = None) -> tuple[Method, ...]:
    """Return the rows of one area, or of one state, or of both; all rows when neither is given.

    Raises:
        CatalogError: an unknown area or state.

    >>> from evenly.cards import listing
    >>> [row.id for row in listing(area="manifolds")]
    ['gyrobn', 'liebn']
    """
    for name, value, known in (("area", area, tuple(catalog.AREAS)), ("state", state, catalog.STATES)):
        if value is not None and value not in known:
            raise CatalogError(f"{name} is {value!r}; expected one of {', '.join(known)}")
    return tuple(row for row in catalog.methods() if area in (None, row.area) and state in (None, row.state))


def card(id: str) -> dict[str, Any]:
    """Return everything known of one method as plain data, ready for JSON.

    The keys are ``id``, ``title``, ``link``, ``area``, ``kind``, ``state``, ``stage``, ``objects`` (each with
    ``name``, ``signature`` and ``summary``), ``claim`` (the stored full-budget result without its trials, or None),
    and ``run`` (the command that checks the claim, or None where the method has no claim yet).

    Raises:
        CatalogError: an unknown id, or a listed object that does not import.
    """
    from evenly import claims

    row = catalog.method(id)
    result = claims.stored(row.id)
    if result is not None:
        result = {key: value for key, value in result.items() if key != "trials"}
    return {
        "id": row.id,
        "title": row.title,
        "link": row.link,
        "area": row.area,
        "kind": row.kind,
        "state": row.state,
        "stage": row.stage,
        "objects": [_object(name) for name in row.objects],
        "claim": result,
        "run": f"evenly claim {row.id}" if row.id in claims.available() else None,
    }


def render(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Lay out a :func:`card` as (label, text) pairs in reading order; a text may have several lines."""
    from evenly import claims

    pairs = [
        ("title", facts["title"]),
        ("paper", facts["link"]),
        ("area", f"{facts['area']} ({catalog.AREAS[facts['area']]})"),
        ("kind", facts["kind"]),
        ("state", facts["stage"]),
    ]
    for entry in facts["objects"]:
        pairs.append(("object", f"{entry['name']}{entry['signature']}\n{entry['summary']}"))
    if not facts["objects"]:
        pairs.append(("object", "none yet"))
    if facts["claim"] is not None:
        pairs.append(("claim", claims.summary(facts["claim"])))
    elif facts["run"] is not None:
        pairs.append(("claim", "not run at full budget yet"))
    else:
        pairs.append(("claim", "none yet"))
    if facts["run"] is not None:
        pairs.append(("run it", facts["run"]))
    return pairs


def _object(name: str) -> dict[str, str]:
    found = catalog.resolve(name)
    module, _, attribute = name.partition(":")
    try:
        signature = _signature(found)
    except (TypeError, ValueError):  # not a callable, or one written in C without a signature
        signature = ""
    summary = (inspect.getdoc(found) or "").strip().split("\n\n")[0]
    return {
        "name": f"{module}.{attribute}",
        "signature": signature.removesuffix(" -> None"),
        "summary": " ".join(summary.split()),
    }


class _Bare(str):
    """An annotation that prints without the quotes of a string."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _signature(found: Any) -> str:
    def bare(annotation: Any) -> Any:
        return _Bare(annotation) if isinstance(annotation, str) else annotation

    there = inspect.signature(found)
    parameters = [one.replace(annotation=bare(one.annotation)) for one in there.parameters.values()]
    return str(there.replace(parameters=parameters, return_annotation=bare(there.return_annotation)))
