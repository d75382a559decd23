"""Inputs that are calls of AUTOMATIC1111's API: which call is meant.

Those of RunPod's worker-a1111 are a body of txt2img; those of ashleykleynhans/runpod-worker-a1111
name the route beside the body. The output is the whole answer. Knows nothing of how calls are
answered: the door of that API does.
"""

from __future__ import annotations

import random
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sdbento.errors import InvalidParameter
from sdbento.jobs.delivery.deliver import Result
from sdbento.jobs.delivery.s3_config import S3Config
from sdbento.jobs.formats import worker_sdxl
from sdbento.jobs.formats.native import FLAG_NAMES
from sdbento.request.schema import GenerateRequest

TXT2IMG, IMG2IMG = "/sdapi/v1/txt2img", "/sdapi/v1/img2img"
_PATH = re.compile(r"/?((?:sdapi/v1|controlnet)/[a-z0-9_-]+)/?")
# Fields of a body that no request of ours has. One is enough to tell whose it is.
TELLING = {
    "alwayson_scripts",
    "batch_size",
    "cfg_scale",
    "denoising_strength",
    "enable_hr",
    "init_images",
    "n_iter",
    "override_settings",
    "sampler_index",
    "sampler_name",
    "steps",
}
SHARED = {"prompt", "negative_prompt", "width", "height", "seed", "scheduler", "eta", "clip_skip"}
SHARED |= {"model", "mask_blur", "resize_mode"}
OURS = (GenerateRequest.model_fields.keys() - SHARED) | FLAG_NAMES | worker_sdxl.NAMES


@dataclass(frozen=True)
class Call:
    """One call of the API: a method, a path, and the body as JSON has it."""

    method: str
    path: str
    payload: dict[str, Any]
    s3_config: S3Config | None = None  # the bucket that the job brings along

    def result(self, answer: Any) -> Result:
        """`answer`: JSON, as the API answers this call. Its `images` or its `image` are PNGs."""
        match answer:
            case {"images": [*images]}:
                return Result(
                    images, lambda made, _: answer | {"images": made}, s3_config=self.s3_config
                )
            case {"image": str(image)}:
                return Result(
                    [image], lambda made, _: answer | {"image": made[0]}, s3_config=self.s3_config
                )
            case _:
                return Result([], lambda *_: answer)


AnswerCall = Callable[[Call], Awaitable[Any]]  # raises SDBentoError


def call_of(given: Mapping[str, Any], s3_config: S3Config | None = None) -> Call | None:
    """The call that an input means; None if it is a request of ours. Raises InvalidParameter.

    An input with fields of both is one of ours, which is then refused with the names to use. Beside
    `api`, fields of ours are refused here.
    """
    if "api" in given:
        for name in sorted(given.keys() & OURS):
            raise InvalidParameter(f"{name} does not go together with api", param=name)
        return Call(*_named(given), s3_config)
    if not given.keys() & TELLING or given.keys() & OURS:
        return None
    return Call("POST", IMG2IMG if given.get("init_images") else TXT2IMG, dict(given), s3_config)


def with_seed(given: dict[str, Any], call: Call) -> dict[str, Any]:
    """The input that means `call`, with a seed if it makes images and leaves that open."""
    if call.path not in (TXT2IMG, IMG2IMG) or not _is_open(call.payload.get("seed")):
        return given
    seeded = call.payload | {"seed": random.SystemRandom().randrange(2**32)}
    return {**given, "payload": seeded} if "api" in given else seeded


def _is_open(seed: Any) -> bool:
    """Whether the API would draw a seed: clients send nothing, "", -1 or "-1"."""
    return seed in (None, "") or str(seed).startswith("-")


def _named(given: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
    api, payload = given["api"], given.get("payload")
    if not isinstance(api, dict):
        raise InvalidParameter("api must be an object", param="api")
    if payload is not None and not isinstance(payload, dict):
        raise InvalidParameter("payload must be an object", param="payload")
    method, endpoint = api.get("method"), api.get("endpoint")
    if method not in ("GET", "POST"):
        raise InvalidParameter("api.method must be GET or POST", param="api.method")
    if not isinstance(endpoint, str) or not (match := _PATH.fullmatch(endpoint)):
        raise InvalidParameter(
            f"api.endpoint must be a route of AUTOMATIC1111's API, as {TXT2IMG}; given: "
            f"{str(endpoint)[:80]!r}",
            param="api.endpoint",
        )
    return method, f"/{match[1]}", payload or {}
