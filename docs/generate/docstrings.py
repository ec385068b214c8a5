"""Docstrings as Markdown: the marks of reStructuredText that Sphinx and editors read, in the form that the site reads.

- ``:math:`x``` and ``.. math::`` become MathML, which browsers draw without a script;
- ``:class:`evenly.nn.Norm``` and its kin become links;
- examples with ``>>>`` become code blocks;
- ``weight, bias: ...`` under ``Args:`` becomes an entry for each, with its own type and default.
"""

from __future__ import annotations

import html
import re
import textwrap
from typing import Any

import griffe
from latex2mathml.converter import convert

__all__ = ["SiteDocstrings", "to_markdown"]

_INLINE = re.compile(r":math:`([^`]+)`")
_BLOCK = re.compile(r"^(?P<indent> *)\.\. math::(?P<first>[^\n]*)\n(?P<body>(?:(?P=indent) +[^\n]*\n?|[ ]*\n)*)", re.M)
_ROLE = re.compile(r":(?:py:)?(?:class|func|meth|mod|data|attr):`(~?)([^`]+)`")
_SECTION = re.compile(r"^(?P<indent> *)(?:Args|Attributes):\n(?:(?P=indent) +\S.*\n?|[ ]*\n)+", re.M)
_SEVERAL = re.compile(
    r"^(?P<indent> +)(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)+):(?P<text>.*\n?(?:(?P=indent) +.*\n?)*)", re.M
)
_PROMPT = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?P=indent)(?!$)\S.*|\n(?P=indent) +\S.*)*", re.M)


def to_markdown(text: str) -> str:
    """A docstring with its marks rewritten; other text is left as it is."""
    text = _SECTION.sub(lambda section: _SEVERAL.sub(_each, section.group()), text)
    text = _BLOCK.sub(_equation, text)
    text = _INLINE.sub(lambda found: _math(found.group(1), "inline"), text)
    text = _ROLE.sub(_link, text)
    return _PROMPT.sub(_example, text)


def _math(latex: str, display: str) -> str:
    latex = " ".join(latex.split()).replace(r"\arg", r"\operatorname{arg}")  # which the converter does not know
    if "&" in latex or r"\\" in latex:  # several rows, as Sphinx reads them
        latex = rf"\begin{{align*}} {latex} \end{{align*}}"
    # An asterisk or an underscore inside the element would be read as emphasis.
    made = convert(latex, display=display)
    made = re.sub(r"[*_\\`]", lambda mark: f"&#{ord(mark.group())};", made)
    # A line that begins with <math> would be read as a block of HTML; one that begins with <span> is text.
    return f"<span>{made}</span>" if display == "inline" else made


def _each(found: re.Match[str]) -> str:
    return "".join(f"{found['indent']}{name}:{found['text'].rstrip()}\n" for name in found["names"].split(", "))


def _equation(found: re.Match[str]) -> str:
    body = textwrap.dedent(found["body"]).strip()
    paragraphs = [part for part in re.split(r"\n\s*\n", "\n\n".join([found["first"].strip(), body])) if part.strip()]
    indent = found["indent"]
    return "".join(f'{indent}<div class="equation">{_math(part, "block")}</div>\n\n' for part in paragraphs)


def _link(found: re.Match[str]) -> str:
    short, target = found.groups()
    text = target
    explicit = re.fullmatch(r"(.+?)\s*<([^>]+)>", target)
    if explicit:
        text, target = explicit.groups()
    elif short:
        text = target.rsplit(".", 1)[-1]
    if not target.startswith("evenly."):
        return f"`{text}`"
    return f'<autoref optional identifier="{html.escape(target)}"><code>{html.escape(text)}</code></autoref>'


def _example(found: re.Match[str]) -> str:
    indent = found["indent"]
    return f"{indent}```pycon\n{found.group()}\n{indent}```"


class SiteDocstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
