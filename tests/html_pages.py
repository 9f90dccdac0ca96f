"""Helpers for tests of HTML reports."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text outside of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._last_tag = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._last_tag = tag

    def handle_data(self, data: str) -> None:
        if self._last_tag not in ("script", "style"):
            self.text += data


def assert_self_contained(html: str) -> None:
    """Assert that a page has an image, and contains everything that it shows."""
    sources = []
    for _, attributes in Page(html).elements:
        sources += [value for name, value in attributes.items() if name in ("src", "href")]
    assert sources
    assert all(source and source.startswith("data:image/") for source in sources)
    assert not re.search(r"url\(|@import|https?://", html)
    assert "default-src 'none'" in html
