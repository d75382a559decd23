"""How documents of the repository become pages of the site: their links, and their lists."""

from __future__ import annotations

import pytest

from tools.website import FOREIGN, in_site, with_lists_apart

REPOSITORY = "https://example.com/sdbento/blob/main"


@pytest.mark.parametrize(
    ("folder", "text", "expected"),
    [
        ("docs", "see [models](models.md#memory)", "see [models](models.md#memory)"),
        ("docs", "see [above](#memory)", "see [above](#memory)"),
        ("docs", "see [the Hub](https://hub.example)", "see [the Hub](https://hub.example)"),
        ("docs", "![a picture](images/x.png)", "![a picture](images/x.png)"),
        ("docs", "[contribute](../CONTRIBUTING.md#layout)", "[contribute](contributing.md#layout)"),
        ("docs", "[report](../SECURITY.md)", "[report](security-policy.md)"),
        ("docs", "[start](../README.md)", "[start](index.md)"),
        ("docs", "[`a.py`](../sdbento/a.py)", f"[`a.py`]({REPOSITORY}/sdbento/a.py)"),
        ("", "[keys](docs/keys.md#browsers)", "[keys](keys.md#browsers)"),
        ("", "[`a.py`](sdbento/a.py)", f"[`a.py`]({REPOSITORY}/sdbento/a.py)"),
    ],
)
def test_links_lead_to_pages_or_to_the_repository(folder: str, text: str, expected: str) -> None:
    assert in_site(text, folder, REPOSITORY) == expected


def test_without_a_repository_a_link_out_of_the_site_is_plain_text() -> None:
    assert in_site("see [`a.py`](../sdbento/a.py)", "docs", None) == "see `a.py`"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("it holds for\n- one\n- two", "it holds for\n\n- one\n- two"),
        ("two lines\nof text:\n1. one\n2. two", "two lines\nof text:\n\n1. one\n2. two"),
        ("- one\n  goes on\n- two", "- one\n  goes on\n- two"),
        ("before\n\n- one\n- two", "before\n\n- one\n- two"),
        ("| a |\n| --- |\n| - |", "| a |\n| --- |\n| - |"),
    ],
)
def test_a_list_is_apart_from_its_paragraph(text: str, expected: str) -> None:
    assert with_lists_apart(text) == expected


@pytest.mark.parametrize(
    ("html", "loads"),
    [
        ('<script src="https://cdn.example/x.js">', True),
        ('<link rel="stylesheet" href="//fonts.example/x.css">', True),
        ('<img alt="" src=https://example.com/x.png>', True),
        ('<script src="mermaid.min.js">', False),
        ('<a href="https://example.com">', False),
    ],
)
def test_what_a_page_would_load_from_another_host_is_found(html: str, loads: bool) -> None:
    assert bool(FOREIGN.search(html)) == loads
