"""The endpoints that BentoML types: what their bodies are, and how BentoML's client calls them.

`client.txt2img(prompt="a cat", seed=3)` takes the fields of the request by their names, and
`client.txt2img({...})` a whole request as its first argument, that is as its `prompt`: `forms`
unwraps it. So the client must not miss any other field in the second call; what is missing is
found here, with the error of every other door. BentoML itself would describe each endpoint either
by one argument or by its fields.
"""

from __future__ import annotations

from typing import Any

from sdbento.request.schema import GenerateRequest, ImageRequest, MaskedRequest

REQUEST_MODELS: dict[str, type[GenerateRequest]] = {
    "/generate": GenerateRequest,
    "/generate_stream": GenerateRequest,
    "/txt2img": GenerateRequest,
    "/img2img": ImageRequest,
    "/inpaint": MaskedRequest,
}
FILE = {"type": "file", "format": "image", "pil": True}
SCALARS = {"string", "integer", "number", "boolean"}


def arguments(model: type[GenerateRequest], **_: Any) -> dict[str, Any]:
    """The arguments of calls whose body is a `model`, as a JSON schema with BentoML's type "file".

    The client changes what it sends by the schema: an image that the request cannot do without is
    sent as a file, all else as JSON. It would drop what lies within objects and lists if the schema
    described that. It stands in for pydantic's `model_json_schema`, whose options it ignores.
    """
    schema = model.model_json_schema()
    images = [name for name in schema["required"] if name != "prompt"]
    properties = {name: _argument(field) for name, field in schema["properties"].items()}
    properties |= {name: properties[name] | FILE for name in images}
    return {"type": "object", "properties": properties, "required": ["prompt"]}


def _argument(field: dict[str, Any]) -> dict[str, Any]:
    first: dict[str, Any] = field.get("anyOf", [field])[0]
    kept: dict[str, Any] = {
        name: value for name, value in field.items() if name in ("description", "default")
    }
    return first | kept if first.get("type") in SCALARS else kept
