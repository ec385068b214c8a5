"""How docstrings become pages: each mark in the form that the site reads, everything else untouched."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("griffe")
pytest.importorskip("latex2mathml")

_PATH = Path(__file__).resolve().parents[2] / "docs" / "generate" / "docstrings.py"
_spec = importlib.util.spec_from_file_location("site_docstrings", _PATH)
assert _spec is not None
assert _spec.loader is not None
site = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(site)


def test_inline_math_is_one_inline_element():
    made = site.to_markdown(":math:`x_1` is\nthe first.")
    assert made.startswith("<span><math")
    assert made.endswith("</math></span> is\nthe first.")
    assert "_" not in made.removesuffix(" is\nthe first.")  # nothing that Markdown reads as emphasis


def test_an_equation_of_several_lines_is_one_block():
    made = site.to_markdown("Before.\n\n.. math::\n    y = \\frac{x}{s}\n    + b\n\nAfter.\n")
    assert made.count('<div class="equation">') == 1
    assert 'display="block"' in made
    assert made.startswith("Before.\n\n")
    assert made.endswith("\n\nAfter.\n")


def test_an_equation_of_several_rows_is_aligned():
    made = site.to_markdown(".. math::\n    y &= x, \\\\\n    z &= \\arg\\max y.\n")
    assert made.count("<mtr>") == 2
    assert ">&<" not in made
    assert "&#92;" not in made  # a command that was not understood


def test_references_become_links_only_to_the_library_itself():
    made = site.to_markdown(":class:`~evenly.nn.Norm` and :func:`torch.nn.functional.relu`")
    assert 'identifier="evenly.nn.Norm"><code>Norm</code>' in made
    assert made.endswith(" and `torch.nn.functional.relu`")


def test_an_example_keeps_its_output_and_its_indent():
    text = "Use it.\n\n    >>> for i in range(2):\n    ...     print(i)\n    0\n    1\n\n    >>> 2\n    2\n\nMore."
    assert site.to_markdown(text) == (
        "Use it.\n\n    ```pycon\n    >>> for i in range(2):\n    ...     print(i)\n    0\n    1\n    ```\n\n"
        "    ```pycon\n    >>> 2\n    2\n    ```\n\nMore."
    )


def test_arguments_described_together_are_listed_one_by_one():
    text = "Do.\n\nArgs:\n    x: the input.\n    weight, bias: what is\n        learned.\n\nIn the end, not: this.\n"
    assert site.to_markdown(text) == (
        "Do.\n\nArgs:\n    x: the input.\n"
        "    weight: what is\n        learned.\n    bias: what is\n        learned.\n\n"
        "In the end, not: this.\n"
    )


def test_plain_text_is_left_alone():
    text = "``normalize`` takes *this* and `that`, and a: b.\n\n    indented, code: 1\n"
    assert site.to_markdown(text) == text
