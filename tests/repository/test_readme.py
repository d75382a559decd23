from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tools.readme import TABLES, written  # noqa: E402


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_the_tables_of_the_documents_are_those_of_the_classes(path: Path) -> None:
    assert written(path) == path.read_text(encoding="utf-8"), "run `python -m tools.readme`"


def test_the_readme_names_every_module_that_there_is() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    modules = [path.name for path in (ROOT / "sdbento").glob("*.py") if path.name[0] != "_"]
    assert [name for name in modules if name not in text] == []
