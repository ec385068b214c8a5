"""The report: what it holds, and what a browser makes of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from html.parser import HTMLParser

import pytest

from evenly.workbench import charts
from workbench.chromium import Page
from workbench.conftest import Finished


@pytest.fixture(scope="module")
def html(finished: Finished) -> str:
    return finished.comparison.report.read_text(encoding="utf-8")


def test_it_is_one_small_file(html: str) -> None:
    assert len(html.encode()) < 3_000_000
    assert not re.search(r"""(src|href)\s*=|url\(|@import|<link""", html)
    assert "http" not in re.sub(r'http-equiv="Content-Security-Policy"', "", html)


def test_it_holds_everything(html: str, finished: Finished) -> None:
    assert escape(finished.comparison.finding, quote=True).replace("&#x27;", "&#39;") in html
    assert "evenly compare --norms batch,layer &lt;&amp;&gt;" in html
    for heading in ("Ranking", "Corruption by corruption", "Accuracy by batch size", "Learning curves", "Cost"):
        assert f"<h2>{heading}</h2>" in html
    for name in ("gaussian noise", "glass blur", "jpeg compression", "fog", "shifted domains", "inverted"):
        assert name in html
    assert "RuntimeError: no layer for 16 features" in html
    assert "torch" in html
    batch = next(arm for arm in finished.comparison.arms if arm.norm == "batch")
    assert f"{100 * batch.mean('mpc'):.1f}" in html
    # 15 corruptions and the domains, for the two normalizations that have results.
    cells = re.findall(r'<td data-mean="([0-9.]+)" data-each="([^"]*)"', html)
    assert len(cells) == 2 * (15 + len(batch.cells[0].domains))
    means = [float(mean) for mean, _ in cells]
    assert f"{batch.mean('mpc'):.3f}" == f"{sum(means[finished.comparison.arms.index(batch) : 30 : 2]) / 15:.3f}"


def test_it_is_well_formed(html: str) -> None:
    void = {"meta", "br"}

    class Checker(HTMLParser):
        open: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attributes: object) -> None:
            if tag not in void:
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

        def handle_startendtag(self, tag: str, attributes: object) -> None:
            pass

    checker = Checker()
    checker.feed(html)
    assert checker.open == []


def test_ticks_cover_the_range() -> None:
    assert charts.ticks(43, 97) == [40, 60, 80, 100]
    for low, high in ((0.1, 0.2), (3, 3), (-5, 1000), (99.1, 99.9)):
        marks = charts.ticks(low, high)
        assert marks[0] <= low
        assert marks[-1] >= high
        assert marks == sorted(set(marks))


@pytest.fixture(scope="module")
def page(finished: Finished) -> Iterator[Page]:
    with Page(finished.comparison.report.resolve().as_uri()) as opened:
        yield opened


FIRST = "[...document.querySelectorAll('#ranking tbody tr')].map(row => row.cells[{column}].dataset.value)"


@pytest.mark.browser
class TestInChromium:
    def test_quiet_and_offline(self, page: Page, finished: Finished) -> None:
        assert page.evaluate("document.title").startswith("evenly compare")
        assert page.messages == []
        assert page.requests == [finished.comparison.report.resolve().as_uri()]

    def test_sorting_by_click_and_by_keyboard(self, page: Page) -> None:
        names = page.evaluate("[...document.querySelectorAll('#ranking th')].map(th => th.innerText.trim())")
        column = next(i for i, name in enumerate(names) if name.startswith("Clean"))
        button = f"document.querySelectorAll('#ranking th')[{column}].querySelector('button')"
        values = FIRST.format(column=column)
        state = f"document.querySelectorAll('#ranking th')[{column}].getAttribute('aria-sort')"
        page.evaluate(f"{button}.click()")
        found = [float(value) for value in page.evaluate(values)]
        assert found == sorted(found, reverse=True)
        assert page.evaluate(state) == "descending"
        page.evaluate(f"{button}.focus()")
        page.press("Enter", 13, "\r")
        found = [float(value) for value in page.evaluate(values)]
        assert found == sorted(found)
        assert page.evaluate(state) == "ascending"
        # By name, with the tabulator key from the one heading to the other.
        page.evaluate("document.querySelectorAll('#ranking th button')[0].focus()")
        page.press("Tab", 9)
        page.press(" ", 32, " ")
        found = page.evaluate(FIRST.format(column=1))
        assert found == sorted(found)
        assert page.evaluate("document.querySelectorAll('#ranking th[aria-sort]').length") == 1
        assert page.messages == []

    def test_severities_can_be_chosen(self, page: Page) -> None:
        read = "[...document.querySelectorAll('#heat tbody td')].map(td => td.textContent)"
        expected = "[...document.querySelectorAll('#heat tbody td')].map(td => td.dataset.each.split(' ')[2])"
        page.evaluate("document.querySelector('[data-severity=\"2\"]').click()")
        shown, each = page.evaluate(read), page.evaluate(expected)
        pairs = [(a, b) for a, b in zip(shown, each, strict=True) if b is not None]
        assert len(pairs) >= 30
        assert all(int(a) == int(100 * float(b) + 0.5) for a, b in pairs)
        assert page.evaluate("document.querySelectorAll('[data-severity][aria-pressed=true]').length") == 1

    def test_nothing_is_wider_than_the_page(self, page: Page) -> None:
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")

    def test_dark_scheme(self, finished: Finished) -> None:
        with Page(finished.comparison.report.resolve().as_uri(), scheme="dark") as dark:
            colour = dark.evaluate("getComputedStyle(document.body).backgroundColor")
            assert max(map(int, re.findall(r"\d+", colour))) < 60
            assert dark.messages == []
