"""GET /models and GET /samplers, as Starlette routes because BentoML's own take only POST."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

if TYPE_CHECKING:
    from sdbento.app import App, ListedModel


async def list_models(request: Request) -> JSONResponse:
    app: App = request.app.state.app
    models = await run_in_threadpool(app.list_models)
    return JSONResponse({"models": [_to_json(model) for model in models]})


async def list_samplers(request: Request) -> JSONResponse:
    app: App = request.app.state.app
    return JSONResponse({"samplers": [asdict(sampler) for sampler in app.list_samplers()]})


def _to_json(model: ListedModel) -> dict[str, Any]:
    spec = model.spec
    return {
        "name": spec.name,
        "family": spec.family,
        "width": spec.width,
        "height": spec.height,
        "num_inference_steps": spec.num_inference_steps,
        "guidance_scale": spec.guidance_scale,
        "scheduler": spec.sampler,
        "memory_gb": spec.memory_gb,
        "inpaints": spec.inpaints,
        "refines": spec.refines,
        "loaded": model.attention is not None,
        "attention": model.attention,
        "default": model.is_default,
    }


ROUTES = [Route("/models", list_models), Route("/samplers", list_samplers)]
