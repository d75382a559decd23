"""Schemas in an OpenAPI document: each has one place and a name, and is referred to from there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

COMPONENTS = "#/components/schemas/"

Schema = dict[str, Any]


def operations(document: Schema) -> Iterator[tuple[str, str, Schema]]:
    """Path, method and operation of everything that a document describes."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def name_schemas(document: Schema) -> None:
    """Give the schemas of all bodies, of the answers that FastAPI does not describe, and what
    pydantic has defined within them, their names."""
    schemas = document["components"]["schemas"]
    document["components"]["schemas"] = {_short(name): schemas[name] for name in schemas}
    for name in filter(_is_of_several, schemas):
        schemas[name]["title"] = _short(name)  # by which generators name their classes
    for _, _, operation in operations(document):
        for media in operation.get("requestBody", {}).get("content", {}).values():
            media["schema"] = _named(media.get("schema", {}), document)
        for answer in operation["responses"].values():
            for media in answer.get("content", {}).values():
                if "$defs" in media.get("schema", {}):
                    media["schema"] = _named(media["schema"], document)
    _refer_to_components(document)


def reference(name: str, schema: Schema, document: Schema) -> Schema:
    """What refers to `schema`, which is `name` in the document from now on."""
    document["components"]["schemas"].setdefault(name, schema)
    return {"$ref": COMPONENTS + name}


def _named(schema: Schema, document: Schema) -> Schema:
    for name, definition in schema.pop("$defs", {}).items():
        reference(name, definition, document)
    is_model = schema.get("type") == "object" and "title" in schema
    return reference(schema["title"], schema, document) if is_model else schema


def _short(name: str) -> str:
    """FastAPI names classes of one name by their modules: `sdbento__doors__openai__models__Model`.
    Here that is `Model_openai`."""
    parts = name.split("__")
    return f"{parts[-1]}_{parts[2]}" if _is_of_several(name) else name


def _is_of_several(name: str) -> bool:
    """Whether there are several classes of that name."""
    return name.startswith("sdbento__doors__")


def _refer_to_components(node: Any) -> None:
    """Correct the references to definitions that have moved or been renamed, in place."""
    if isinstance(node, dict):
        if isinstance(target := node.get("$ref"), str):
            node["$ref"] = COMPONENTS + _short(target.rpartition("/")[2])
        for child in node.values():
            _refer_to_components(child)
    elif isinstance(node, list):
        for child in node:
            _refer_to_components(child)
