"""Parses JSON into a request, or says in one sentence what is wrong with it."""

from __future__ import annotations

from pydantic import ValidationError

from sdbento.errors import InvalidParameter, MalformedRequest, SDBentoError, nearest_names
from sdbento.request.schema import PARTS, GenerateRequest

# What other servers and libraries call our fields, for the error that says so.
ELSEWHERE = {
    "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "sampler": "scheduler",
    "sampler_name": "scheduler",
    "n": "num_images",
    "batch_size": "num_images",
    "num_outputs": "num_images",
    "init_image": "image",
    "init_images": "image",
    "mask": "mask_image",
    "denoising_strength": "strength",
    "checkpoint": "model",
}


def parse(
    text: bytes | str, model: type[GenerateRequest] = GenerateRequest, what: str = "the body"
) -> GenerateRequest:
    """A request from JSON text, called `what`. Raises MalformedRequest or InvalidParameter."""
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise explain(error, what) from None


def explain(error: ValidationError, what: str = "the body") -> SDBentoError:
    """The first problem as one sentence that names field, limit and what was given."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return MalformedRequest(f"{what} is not JSON: {first['ctx']['error']}")
    if not first["loc"]:
        return MalformedRequest(f"{what} must be a JSON object")
    field = _shorten(".".join(str(part) for part in first["loc"]))
    match first["type"]:
        case "missing":
            return InvalidParameter(f"{field} is required", param=field)
        case "extra_forbidden":
            known = list(PARTS.get(str(first["loc"][0]), GenerateRequest).model_fields)
            message = f"{field} is not a known field; {_meant(first['loc'][-1], known)}"
            return InvalidParameter(message, param=field)
    problem = first["msg"].removeprefix("Input ")
    problem = problem[:1].lower() + problem[1:]
    return InvalidParameter(
        f"{field} {problem}; given: {_shorten(repr(first['input']))}", param=field
    )


def _meant(name: int | str, known: list[str]) -> str:
    """The field that was meant, where that can be guessed, and all that there are."""
    name, listed = _shorten(str(name)), ", ".join(known)
    if (elsewhere := ELSEWHERE.get(name)) in known:
        return f"it is called {elsewhere} here. Known: {listed}"
    close = nearest_names(name, known, count=1, cutoff=0.6)
    return f"did you mean {close[0]}? Known: {listed}" if close else f"known: {listed}"


def _shorten(text: str, limit: int = 80) -> str:
    if len(text) <= limit:
        return text
    return f"{text[: limit - 20]}... ({len(text)} characters)"
