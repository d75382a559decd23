"""Write the README's tables of settings and request fields from the classes that define them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdbento.schemas import GenerateRequest
from sdbento.settings import Settings

README = Path(__file__).parent.parent / "README.md"


def settings_table() -> str:
    rows = [f"| `{name}` | {text} | `{default}` |" for name, default, text in Settings.variables()]
    return "\n".join(["| variable | meaning | default |", "| --- | --- | --- |", *rows])


def fields_table() -> str:
    schema = GenerateRequest.model_json_schema()["properties"]
    rows = [
        f"| `{name}` | {_bounds(spec)} | {spec.get('description', '')} |"
        for name, spec in schema.items()
    ]
    return "\n".join(["| field | values | meaning |", "| --- | --- | --- |", *rows])


def _bounds(spec: dict[str, Any]) -> str:
    """What a field may be, out of its JSON schema."""
    spec = next((s for s in spec.get("anyOf", [spec]) if s.get("type") != "null"), spec)
    if "enum" in spec:
        return ", ".join(spec["enum"])
    if spec.get("type") == "array":
        return "[height, width]"
    return ", ".join(_limits(spec)) or str(spec.get("type"))


def _limits(spec: dict[str, Any]) -> Iterator[str]:
    low, high = spec.get("minimum"), spec.get("maximum")
    if high is not None:
        low = f"above {spec['exclusiveMinimum']}" if low is None else low
        yield f"{low} to {high}"
    if "multipleOf" in spec:
        yield f"multiple of {spec['multipleOf']}"
    if "maxLength" in spec:
        yield f"text, at most {spec['maxLength']} characters"


def written(text: str) -> str:
    """`text` with the tables between their markers made anew."""
    for name, table in (("settings", settings_table()), ("fields", fields_table())):
        start = re.search(rf"<!-- {name}:begin[^\n]*-->\n", text)
        assert start is not None, f"the README has lost its {name} marker"
        end = text.index(f"<!-- {name}:end -->")
        text = f"{text[: start.end()]}{table}\n{text[end:]}"
    return text


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
    sys.exit(0)
