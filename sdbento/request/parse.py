"""Parses JSON into a request, or says in one sentence what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from sdbento.errors import InvalidParameter, MalformedRequest, SDBentoError, nearest_names
from sdbento.request.schema import PARTS, GenerateRequest

# What other servers and libraries call our fields, for the error that says so.
ELSEWHERE = {
    "steps": "num_inference_steps",
    "cfg": "guidance_scale",
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
    return explain_first(dict(error.errors(include_url=False)[0]), what)


def explain_first(problem: Mapping[str, Any], what: str = "the body") -> SDBentoError:
    """The same for one of the problems that pydantic lists."""
    if problem["type"] == "json_invalid":
        return MalformedRequest(f"{what} is not JSON: {problem['ctx']['error']}")
    if not problem["loc"]:
        return MalformedRequest(f"{what} must be a JSON object")
    field = _shorten(".".join(str(part) for part in problem["loc"]))
    match problem["type"]:
        case "missing":
            return InvalidParameter(f"{field} is required", param=field)
        case "extra_forbidden":
            known = list(PARTS.get(str(problem["loc"][0]), GenerateRequest).model_fields)
            message = f"{field} is not a known field; {_meant(problem['loc'][-1], known)}"
            return InvalidParameter(message, param=field)
    text = problem["msg"].removeprefix("Input ")
    text = text[:1].lower() + text[1:]
    return InvalidParameter(
        f"{field} {text}; given: {_shorten(repr(problem['input']))}", param=field
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
