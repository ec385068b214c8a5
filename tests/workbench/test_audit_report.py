"""The report of an audit: what it holds, and what a browser makes of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from evenly.workbench import Audit, audit, charts
from workbench.chromium import Page


def example(kind: str) -> Audit:
    rng = np.random.default_rng(0)
    n = 400
    groups = {
        "sex": rng.choice(["f", "m"], n),
        "<b>place</b>": np.where(np.arange(n) < 6, "tiny & odd", rng.choice(["north", "south"], n)),
    }
    if kind == "regression":
        y = rng.normal(size=n)
        return audit(y, y + rng.normal(0, 0.5, n), groups=groups, resamples=100)
    if kind == "multiclass":
        p = rng.dirichlet(np.ones(3), n)
        return audit(rng.choice(list("abc"), n), y_score=p, groups=groups, resamples=100)
    score = rng.random(n)
    y = (rng.random(n) < np.where(groups["sex"] == "f", score, 0.2)).astype(int)
    return audit(y, y_score=score, groups=groups, resamples=100, name="a toy")


@pytest.fixture(scope="module", params=["binary", "multiclass", "regression"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Audit, Path]:
    found = example(request.param)
    path = tmp_path_factory.mktemp("audit") / "audit.html"
    return found, found.to_html(path, command="evenly audit --data 'x <&> y.csv'")


def test_it_is_one_small_file_that_holds_everything(report: tuple[Audit, Path]) -> None:
    found, path = report
    html = path.read_text(encoding="utf-8")
    assert len(html.encode()) < 1_000_000
    assert not re.search(r"""(src|href)\s*=|url\(|@import|<link""", html)
    assert "http" not in re.sub(r'http-equiv="Content-Security-Policy"', "", html)
    assert escape(found.finding, quote=False).replace(" %", "\N{NO-BREAK SPACE}%") in html
    assert "evenly audit --data &#39;x &lt;&amp;&gt; y.csv&#39;" in html
    assert "<b>place</b>" not in html
    assert "&lt;b&gt;place&lt;/b&gt;=tiny &amp; odd" in html
    assert "small group" in html
    for measure in found.measures:
        assert f'data-measure="{measure.name}"' in html
        assert escape(measure.about, quote=False) in html.replace("&#39;", "'")
    # A row for each group in each chart and each table.
    groups = len(found.by_group) + len(found.by_intersection)
    defined = found.table[found.table["level"] > 0]["value"].notna().sum()
    assert html.count('<circle class="point') >= defined + len(found.measures) * 2
    assert len(re.findall(r'<td class="left name" data-value="\d+">', html)) == groups + 1
    body = re.sub(r"<(style|script)>.*?</\1>", "", html, flags=re.S)
    assert not re.search(r"\bnan\b", body, flags=re.I)


def test_it_is_well_formed(report: tuple[Audit, Path]) -> None:
    void = {"meta", "br"}
    opened: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attributes: object) -> None:
            if tag not in void:
                opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

        def handle_startendtag(self, tag: str, attributes: object) -> None:
            pass

    Checker().feed(report[1].read_text(encoding="utf-8"))
    assert opened == []


def test_small_groups_do_not_stretch_the_axis() -> None:
    rows = [charts.Interval("a", 0.8, 0.78, 0.82, "80"), charts.Interval("b", 0.81, 0.1, 1.0, "81", "small")]
    drawn = charts.intervals("t", rows)
    marks = [float(value) for value in re.findall(r'class="tick"[^>]*>([\d.]+)<', drawn)]
    assert min(marks) >= 0.75
    ends = [
        float(v)
        for line in re.findall(r'<line class="ci small"[^>]*>', drawn)
        for v in re.findall(r'x[12]="([\d.]+)"', line)
    ]
    assert min(ends) >= 290
    assert charts.intervals("t", [charts.Interval("a", float("nan"), float("nan"), float("nan"), "–")])


@pytest.fixture(scope="module")
def page(report: tuple[Audit, Path]) -> Iterator[Page]:
    with Page(report[1].resolve().as_uri()) as opened:
        yield opened


@pytest.mark.browser
class TestInChromium:
    def test_quiet_offline_and_no_wider_than_the_page(self, page: Page, report: tuple[Audit, Path]) -> None:
        assert page.evaluate("document.title").startswith("evenly audit")
        assert page.messages == []
        assert page.requests == [report[1].resolve().as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")

    def test_a_measure_can_be_chosen(self, page: Page, report: tuple[Audit, Path]) -> None:
        last = report[0].measures[-1].name
        shown = "[...document.querySelectorAll('.chart')].filter(c => c.offsetHeight > 0).map(c => c.dataset.shows)"
        assert page.evaluate(shown) == [report[0].rank_by] * 2
        page.evaluate(f"document.querySelector('[data-measure=\"{last}\"]').click()")
        assert page.evaluate(shown) == [last] * 2
        assert page.evaluate("document.querySelectorAll('[data-measure][aria-pressed=true]').length") == 1

    def test_tables_sort_by_click_and_by_keyboard(self, page: Page) -> None:
        values = (
            "[...document.querySelectorAll('#table-crossed tbody tr')].map(row => Number(row.cells[1].dataset.value))"
        )
        button = "document.querySelectorAll('#table-crossed th')[1].querySelector('button')"
        page.evaluate(f"{button}.click()")
        found = page.evaluate(values)
        assert found == sorted(found)
        page.evaluate(f"{button}.focus()")
        page.press("Enter", 13, "\r")
        assert page.evaluate(values) == sorted(found, reverse=True)
        assert page.messages == []

    def test_dark_and_narrow(self, report: tuple[Audit, Path]) -> None:
        with Page(report[1].resolve().as_uri(), scheme="dark", width=420) as dark:
            colour = dark.evaluate("getComputedStyle(document.body).backgroundColor")
            assert max(map(int, re.findall(r"\d+", colour))) < 60
            assert dark.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            assert dark.messages == []
