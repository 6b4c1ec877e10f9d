"""Pages in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")

BEYOND = """() => {
  const page = document.documentElement.clientWidth;
  const right = (element) => element.getBoundingClientRect().right;
  const clips = (element, ...ways) => ways.includes(getComputedStyle(element).overflowX);
  const scrolls = (element) => element && (clips(element, "auto", "scroll") || scrolls(element.parentElement));
  const wide = (element) => right(element) > page + 0.5 && !scrolls(element.parentElement);
  const cut = (element) => clips(element, "hidden", "clip") && element.scrollWidth > element.clientWidth;
  const elements = [...document.body.querySelectorAll("*:not(svg *)")].filter((each) => wide(each) || cut(each));
  const labels = [...document.querySelectorAll("svg text")];
  const words = labels.filter((each) => right(each) > right(each.closest("svg")) + 1);
  return [...elements, ...words].map((each) => `${each.tagName}: ${each.textContent.trim().slice(0, 60)}`);
}"""
"""Elements that end beyond the page, unless they scroll by themselves; text that its element or its plot cuts."""

WIDTHS = (1280, 390)
"""Pixels of a screen and of a phone."""


def beyond_the_page(browser: Any, page: Path) -> dict[int, list[str]]:
    """What is cut or wider than the page, by each of WIDTHS."""
    wide = dict[int, list[str]]()
    for width in WIDTHS:
        view = browser.new_page(viewport={"width": width, "height": 900})
        view.goto(page.as_uri())
        wide[width] = view.evaluate(BEYOND)
        if view.evaluate("document.documentElement.scrollWidth") > width:
            wide[width].append("the page itself")
        view.close()
    return wide


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()
