"""The routes that BentoML answers itself, described as FastAPI describes those of the doors."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from sdbento.doors.bentoml.arguments import REQUEST_MODELS
from sdbento.doors.docs.bodies import BINARY, json_or_form_body
from sdbento.images.codec import MEDIA_TYPES
from sdbento.request.schema import GenerateResponse

IMAGE = {
    "description": "The image, in the format that `output_format` asks for",
    "content": {media_type: {"schema": BINARY} for media_type in MEDIA_TYPES.values()},
    "headers": {"X-Seed": {"description": "Its seed", "schema": {"type": "integer"}}},
}
EVENT = {"event": "step", "image": 0, "step": 5, "num_steps": 20, "eta": 0.402}
EVENTS = {
    "description": "Server-sent events: queued, step, preview, and done or error",
    "content": {"text/event-stream": {"example": f"event: step\ndata: {json.dumps(EVENT)}\n\n"}},
}
IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "/generate": (
        "Make images, answered as JSON with their seeds and parameters",
        {"model": GenerateResponse},
    ),
    "/generate_stream": ("Make images and tell of each step", EVENTS),
    "/txt2img": ("Make one image, answered as a file", IMAGE),
    "/img2img": ("Make one image from another, answered as a file", IMAGE),
    "/inpaint": ("Repaint what a mask marks in an image, answered as a file", IMAGE),
}
TEXT = {"content": {"text/plain": {"schema": {"type": "string"}}}}
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "/livez": ("Health", "Whether the server works; 503: only a new process can", TEXT),
    "/healthz": ("Health", "As /livez", TEXT),
    "/readyz": (
        "Health",
        "Whether the default model is loaded; 503: send nothing yet",
        TEXT,
    ),
    "/metrics": ("Health", "Metrics for Prometheus", TEXT),
    "/schema.json": (
        "Documents",
        "The typed endpoints, for BentoML's clients",
        {"content": {"application/json": {"schema": {"type": "object"}}}},
    ),
}


async def _answered_by_bentoml() -> Response:
    raise NotImplementedError  # the route is there to be described, and not mounted


def described() -> APIRouter:
    """A router for the document only."""
    router = APIRouter(default_response_class=Response)
    for path, (summary, answer) in IMAGES.items():
        router.add_api_route(
            path,
            _answered_by_bentoml,
            methods=["POST"],
            tags=["Images"],
            summary=summary,
            responses={200: answer},
            openapi_extra={"requestBody": json_or_form_body(REQUEST_MODELS[path])},
        )
    for path, (tag, summary, answer) in OTHERS.items():
        router.add_api_route(
            path, _answered_by_bentoml, tags=[tag], summary=summary, responses={200: answer}
        )
    return router
