"""The words that docs/troubleshooting.md tells people to look for are those of the server."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdbento.errors import InvalidParameter
from sdbento.request.parse import parse

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
GAP = "\0"  # where a message has a value of its own
# What an example puts there (names, numbers, addresses, "…" for anything), and what one message may
# end with and the next begin.
VALUE = re.compile(r"…|'[^']*'|https?://\S+|[\w-]+/[\w.-]+|\b[\d.]+\b|GB in float32|[;:()]")


def quoted() -> Iterator[str]:
    """Every message on the page: those in blocks begin with their status."""
    text = PAGE.read_text(encoding="utf-8")
    for block in re.findall(r"```text\n(.*?)```", text, re.DOTALL):
        for message in re.split(r"\n(?=\d{3} )", block):
            yield " ".join(message.removeprefix("5").split()[1:])
    for row in re.findall(r"^\| `([^`\n]+(?:`[^|\n]*)?)` \|", text, re.MULTILINE):
        if not row.startswith("SDBENTO_COMPILE"):
            yield row


def pieces(message: str) -> list[str]:
    """The parts of a message that are the same in every such message."""
    parts = [part.strip(" ,") for part in VALUE.split(message)]
    return [part for part in parts if len(part.split()) > 1]


def of_the_code() -> str:
    """All text in the code; f-strings with a gap for each value."""
    found = [(ROOT / "Makefile").read_text(encoding="utf-8")]
    for path in [ROOT / "service.py", *(ROOT / "sdbento").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(v.value) if isinstance(v, ast.Constant) else GAP for v in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    with pytest.raises(InvalidParameter) as raised:  # pydantic's words
        parse(b'{"prompt": "a", "width": 513}')
    return "\n".join([*found, str(raised.value)])


def test_every_message_on_the_page_is_one_of_the_server() -> None:
    code = of_the_code()
    assert [piece for message in quoted() for piece in pieces(message) if piece not in code] == []


def test_the_page_has_messages() -> None:
    assert len([piece for message in quoted() for piece in pieces(message)]) > 40


def test_a_message_that_no_code_has_is_noticed() -> None:
    assert pieces("503 the moon is full; 12 wolves howl") == ["the moon is full", "wolves howl"]
    assert "the moon is full" not in of_the_code()
