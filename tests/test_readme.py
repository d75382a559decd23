from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tools.readme import README, written  # noqa: E402


def test_the_tables_of_the_readme_are_those_of_the_classes() -> None:
    assert written(README.read_text()) == README.read_text(), "run `python -m tools.readme`"


def test_the_readme_names_every_module_that_there_is() -> None:
    text = README.read_text()
    modules = [path.name for path in (ROOT / "sdbento").glob("*.py") if path.name[0] != "_"]
    assert [name for name in modules if name not in text] == []
