"""Writes what the documents repeat of the code: tables of settings, fields and memory, the layout.

The tables come from the classes that define the fields and from the catalogue, the layout from the
first line of every module's docstring.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdbento.catalog.specs import catalogued
from sdbento.metrics.definitions import METRICS
from sdbento.metrics.instruments import Label
from sdbento.request.schema import MAX_SIDE, PARTS, GenerateRequest
from sdbento.settings import Settings
from tools.marked import replaced

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sdbento"
# As the layout lists them: a package imports only those that stand after it.
PACKAGES = (
    "doors",
    "client",
    "jobs",
    "backend",
    "live",
    "request",
    "runner",
    "engine",
    "prompts",
    "images",
    "lora",
    "models",
    "catalog",
    "samplers",
    "outbound",
    "access",
    "metrics",
    "telemetry",
    "process",
)


# Those that most people need: all that README.md shows.
FEW_SETTINGS = {
    "SD_MODEL",
    "PRECISION",
    "SDBENTO_MODELS_DIR",
    "SDBENTO_LORA_DIR",
    "MAX_QUEUE_SIZE",
    "MAX_BATCH_SIZE",
    "PORT",
    "SDBENTO_API_KEY",
}
# Each group of settings with the first of it; the others follow as the class has them.
SETTINGS_GROUPS = {
    "Models and how they compute": "SD_MODEL",
    "LoRAs and textual inversions": "SDBENTO_LORA_DIR",
    "Limits of requests": "MAX_QUEUE_SIZE",
    "The server": "PORT",
    "Who may ask": "SDBENTO_API_KEY",
    "Jobs": "SDBENTO_STATE_DIR",
    "Where results of jobs go": "SDBENTO_UPLOAD",
    "RunPod": "SDBENTO_RUNPOD_VOLUME",
}
# Memory that GPUs and machines commonly have, in GB.
USUAL_GPUS = (4, 6, 8, 12, 16, 24, 48, 80)
USUAL_MACHINES = (4, 8, 16, 32, 64)


def few_settings_table() -> str:
    return _settings_table([row for row in Settings.variables() if row[0] in FEW_SETTINGS])


def settings_tables() -> str:
    """All settings, a heading and a table for each group."""
    titles = {first: title for title, first in SETTINGS_GROUPS.items()}
    groups: dict[str, list[tuple[str, str, str]]] = {}
    for row in Settings.variables():
        title = titles.get(row[0]) or [*groups][-1]
        groups.setdefault(title, []).append(row)
    parts = [f"## {title}\n\n{_settings_table(rows)}" for title, rows in groups.items()]
    return "\n\n".join(["", *parts, ""])


def _settings_table(rows: list[tuple[str, str, str]]) -> str:
    lines = [f"| `{name}` | {text} | {_code(default)} |" for name, default, text in rows]
    return "\n".join(["| variable | meaning | default |", "| --- | --- | --- |", *lines])


def _code(default: str) -> str:
    return "unset" if default in ("", "unset") else f"`{default}`"


def sizing_table() -> str:
    """What each model of the catalogue needs, in fp16 on a GPU and in fp32 on a CPU."""
    from sdbento.models.device import CPU_SHARE, GPU_SHARE  # imports torch

    lines = [
        "| model | fp16 | a GPU with | fp32 | a machine with |",
        "| --- | --- | --- | --- | --- |",
    ]
    for spec in catalogued():
        half, full = spec.memory_gb, 2 * spec.memory_gb
        name = f"`{spec.aliases[0] if spec.aliases else spec.name}`"
        gpu, machine = (
            _first(USUAL_GPUS, half / GPU_SHARE),
            _first(USUAL_MACHINES, full / CPU_SHARE),
        )
        lines.append(f"| {name} | {half:g} GB | {gpu} GB | {full:g} GB | {machine} GB |")
    return "\n".join(lines)


def _first(sizes: tuple[int, ...], least: float) -> int:
    return next(size for size in sizes if size >= least)


def fields_table() -> str:
    schema = GenerateRequest.model_json_schema()["properties"]
    return _table("field", [(name, spec) for name, spec in schema.items()])


def parts_table() -> str:
    return _table(
        "part",
        [
            (f"{name}.{part}", spec)
            for name, model in PARTS.items()
            for part, spec in model.model_json_schema()["properties"].items()
        ],
    )


def _table(kind: str, entries: list[tuple[str, dict[str, Any]]]) -> str:
    rows = [
        f"| `{name}` | {_bounds(spec)} | {_default(spec)} | {spec.get('description', '')} |"
        for name, spec in entries
    ]
    heading = [f"| {kind} | values | default | meaning |", "| --- | --- | --- | --- |"]
    return "\n".join([*heading, *rows])


def _default(spec: dict[str, Any]) -> str:
    """The value of a field that is absent, if its JSON schema has one."""
    value = spec.get("default")
    return "" if value is None else f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _bounds(spec: dict[str, Any]) -> str:
    """The values that a field takes, from its JSON schema."""
    options = [s for s in spec.get("anyOf", [spec]) if s.get("type") != "null"]
    if any("$ref" in option for option in options):
        return "an object or a list" if len(options) > 1 else "an object"
    spec = options[0]
    if "enum" in spec:
        return ", ".join(spec["enum"])
    if spec.get("type") == "array":
        return f"two numbers, 0 to {MAX_SIDE}"
    return ", ".join(_limits(spec)) or "true or false"


def _limits(spec: dict[str, Any]) -> Iterator[str]:
    low, high = spec.get("minimum"), spec.get("maximum", spec.get("exclusiveMaximum"))
    if high is not None:
        low = f"above {spec['exclusiveMinimum']}" if low is None else low
        yield f"{low} to {'below ' if 'maximum' not in spec else ''}{high}"
    if "multipleOf" in spec:
        yield f"multiple of {spec['multipleOf']}"
    if "maxLength" in spec:
        yield f"text, at most {spec['maxLength']} characters"


def metrics_table() -> str:
    lines = ["| metric | kind | labels | what it says |", "| --- | --- | --- | --- |"]
    for one in METRICS.values():
        labels = "; ".join(map(_label, one.labels))
        lines.append(f"| `{one.name}` | {one.kind} | {labels} | {one.text} |")
    return "\n".join(lines)


def _label(label: Label) -> str:
    """Its name, and the values that it has on any server."""
    return f"`{label.name}`" + (f": {', '.join(label.known)}" if label.known else "")


def layout() -> str:
    """Every module with a link and a phrase, by folders; the modules of no package come first."""
    folders = [PACKAGE, *(folder for name in PACKAGES for folder in _folders(PACKAGE / name))]
    return "\n\n".join(map(_folder_list, folders))


def _folders(package: Path) -> list[Path]:
    """A package and the packages in it, however deep, as far as they have modules."""
    folders = sorted(path.parent for path in package.rglob("__init__.py"))
    return [folder for folder in folders if _modules(folder)]


def _folder_list(folder: Path) -> str:
    modules = [
        f"- [`{module.relative_to(PACKAGE)}`]({module.relative_to(ROOT)}): {_phrase(module)}"
        for module in _modules(folder)
    ]
    title = f"**`{folder.relative_to(ROOT)}/`** {_phrase(folder / '__init__.py')}"
    return "\n".join([title, "", *modules])


def _modules(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]


def _phrase(module: Path) -> str:
    """The first line of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8")))
    assert docstring, f"{module.relative_to(ROOT)} has no docstring"
    return docstring.splitlines()[0]


TABLES = {
    ROOT / "CONTRIBUTING.md": {"layout": layout},
    ROOT / "README.md": {"settings": few_settings_table},
    ROOT / "docs" / "install.md": {"sizing": sizing_table},
    ROOT / "docs" / "operations.md": {"metrics": metrics_table},
    ROOT / "docs" / "settings.md": {"settings": settings_tables},
    ROOT / "docs" / "requests.md": {"fields": fields_table, "parts": parts_table},
}


def written(path: Path) -> str:
    """The text of `path` with new tables between the markers."""
    text = path.read_text(encoding="utf-8")
    for name, table in TABLES[path].items():
        text = replaced(text, name, table())
    return text


if __name__ == "__main__":
    for path in TABLES:
        path.write_text(written(path), encoding="utf-8")
