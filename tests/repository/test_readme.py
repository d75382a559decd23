"""The documents: their tables match the code, and links and paths in them exist."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.repository.test_architecture import FLOOR, FLOORS

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tools.readme import PACKAGES, TABLES, written  # noqa: E402

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "charts" / "sdbento" / "README.md",
    ROOT / "training" / "emoji" / "README.md",
    ROOT / "training" / "shapes" / "README.md",
]
# Where a document's paths may begin: `engine/loop.py` is sdbento/engine/loop.py.
BASES = [ROOT, ROOT / "sdbento", ROOT / "training" / "shapes"]
DIAGRAMS = {"flowchart", "sequenceDiagram", "stateDiagram-v2"}  # those that we use


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_the_tables_of_the_documents_are_those_of_the_code(path: Path) -> None:
    assert written(path) == path.read_text(encoding="utf-8"), "run `python -m tools.readme`"


def test_the_layout_names_every_module_and_no_other() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\]\((sdbento/[\w/]+\.py)\): \S", text))
    modules = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "sdbento").rglob("*.py")
        if path.name != "__init__.py"
    }
    assert named == modules


def test_the_layout_lists_packages_in_the_order_of_their_imports() -> None:
    floors = [FLOOR[package] for package in PACKAGES]
    assert floors == sorted(floors)


def test_the_floors_in_the_document_are_those_that_are_checked() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.partition("| package | why it stands there |\n| --- | --- |\n")[2]
    rows = [row.split("|")[1] for row in table.partition("\n\n")[0].splitlines()]
    floors = [set(re.findall(r"`(\w+)(?:/|\.py)`", row)) for row in rows]
    assert floors == list(FLOORS)


def test_every_target_of_make_is_explained() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    words = set(re.findall(r"^([a-z-]+):.* ## ", makefile, re.MULTILINE)) - {"help"}
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert words == set(re.findall(r"`make ([a-z-]+)`", text))


@pytest.mark.parametrize("name", ["README.md", "docs/comparison.md"])
def test_the_speed_that_is_told_is_that_of_the_benchmark(name: str) -> None:
    told = re.findall(r"(\d\.\d\d) times", (ROOT / name).read_text(encoding="utf-8"))
    measured = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    table = measured.partition("<!-- bench:begin")[2].partition("<!-- bench:end")[0]
    assert told and set(told) <= set(re.findall(r"\| (\d\.\d\d) \|", table))


def without_code(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """What a link may have after its #: GitHub derives it from each heading."""
    text = without_code(path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def broken_links(document: Path, text: str) -> Iterator[str]:
    """Links within the repository that lead nowhere."""
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"https?:", link):
            continue
        file, _, fragment = link.partition("#")
        target = document.parent / file if file else document
        if not target.exists() or (fragment and fragment not in anchors(target)):
            yield link


def broken_paths(document: Path, text: str) -> Iterator[str]:
    """Files in code font that do not exist, such as `engine/lop.py`."""
    for path in re.findall(r"`([\w./-]+\.(?:py|md|yaml|toml|lock))`", without_code(text)):
        if not any((base / path).exists() for base in [document.parent, *BASES]):
            yield path


def broken_diagrams(_: Path, text: str) -> Iterator[str]:
    """Mermaid blocks that GitHub could not draw, as far as their first word tells."""
    for first in re.findall(r"^```mermaid\n\s*(\S*)", text, re.MULTILINE):
        if first not in DIAGRAMS:
            yield first


# Each rule with a text that breaks it.
RULES: list[tuple[Callable[[Path, str], Iterator[str]], str]] = [
    (broken_links, "see [nothing](docs/nothing.md)"),
    (broken_links, "see [settings](README.md#no-such-heading)"),
    (broken_links, "see [below](#no-such-heading)"),
    (broken_paths, "the file `engine/no_such_file.py`"),
    (broken_diagrams, "```mermaid\nflowchat TD\n```"),
]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
@pytest.mark.parametrize("rule", dict.fromkeys(rule for rule, _ in RULES), ids=lambda r: r.__name__)
def test_rule(rule: Callable[[Path, str], Iterator[str]], path: Path) -> None:
    assert list(rule(path, path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(("rule", "text"), RULES)
def test_the_rule_finds_what_is_broken(
    rule: Callable[[Path, str], Iterator[str]], text: str
) -> None:
    assert list(rule(ROOT / "README.md", text))
