"""What is asked for in a soak, through which door, and the images in each door's answer."""

from __future__ import annotations

import json
from base64 import b64decode
from dataclasses import dataclass
from random import Random
from typing import Any

import httpx

from sdbento.samplers.names import list_samplers
from tests.support.images import base64, gradient, half_mask

OTHER_MODEL = "tiny-sdxl"
SIZE = 128
SAMPLERS = [sampler.name for sampler in list_samplers() if "EDM" not in sampler.name]
COLOURS, SHAPES = ["red", "green", "blue", "yellow", "white"], ["circle", "square", "triangle"]
LORAS = ["shapes-outline", "shapes-checker"]


@dataclass(frozen=True)
class Call:
    path: str
    body: dict[str, Any]

    @property
    def model(self) -> str | None:
        name: str | None = self.body.get("model")
        return name


def fixed_calls() -> list[Call]:
    """Through every door and of every kind; made alone first, they can be asked again and again."""
    basics = {"prompt": "a red circle on a blue background", "num_inference_steps": 6, "seed": 7}
    small = basics | {"width": SIZE, "height": SIZE}
    image = {"image": base64(gradient(SIZE, SIZE)), "strength": 0.7}
    kinds: list[dict[str, Any]] = [
        *({"scheduler": name} for name in SAMPLERS),
        {"num_images": 3, "width": 96, "height": 160},
        {"guidance_scale": 1.0, "num_inference_steps": 12},
        {"prompt": "(a green circle:1.2) BREAK [red:blue:0.5] square", "clip_skip": 1},
        image,
        image | {"mask_image": base64(half_mask(SIZE, SIZE)), "scheduler": "Euler a"},
        {"controlnet": {"type": "canny", "image": base64(gradient(SIZE, SIZE))}},
        *({"lora": [{"model_id": name, "weight": 0.8}]} for name in LORAS),
        {"hires": {"scale": 1.5, "strength": 0.6}, "width": 64, "height": 64},
        {"deep_cache_interval": 2, "token_merging_ratio": 0.5},
        {"model": OTHER_MODEL, "width": 64, "height": 64},
        {"model": OTHER_MODEL, "width": 64, "height": 64} | image,
    ]
    calls = [Call("/generate", small | kind | {"seed": i}) for i, kind in enumerate(kinds)]
    for path in ("/txt2img", "/generate_stream"):
        calls += [Call(path, small | {"seed": seed}) for seed in (1, 2)]
    calls.append(Call("/runsync?wait=300000", {"input": small}))
    calls.append(Call("/v1/images/generations", basics | {"size": f"{SIZE}x{SIZE}", "n": 2}))
    web_ui = {"prompt": "a blue square", "steps": 6, "width": SIZE, "height": SIZE, "seed": 3}
    return [*calls, Call("/sdapi/v1/txt2img", web_ui)]


def new_call(chance: Random) -> Call:
    """One that nobody has asked before: caches of texts, sizes and samplers see something new."""
    body: dict[str, Any] = {
        "prompt": f"a {chance.choice(COLOURS)} {chance.choice(SHAPES)} {chance.getrandbits(40)}",
        "negative_prompt": chance.choice([None, f"blurry {chance.getrandbits(40)}"]),
        "seed": chance.getrandbits(32),
        "num_inference_steps": chance.randint(4, 16),
        "guidance_scale": round(chance.uniform(1.0, 9.0), 2),
        "scheduler": chance.choice(SAMPLERS),
        "width": chance.randrange(64, 200, 8),
        "height": chance.randrange(64, 200, 8),
        "output_format": "png",
    }
    if chance.random() < 0.25:
        body["prompt"] += f" <lora:{chance.choice(LORAS)}:{chance.uniform(0.1, 1.5):.3f}>"
    if chance.random() < 0.25:
        image = gradient(chance.randrange(64, 200), chance.randrange(64, 200))
        body |= {"image": base64(image), "strength": round(chance.uniform(0.4, 1.0), 3)}
    return Call("/generate", body)


def images_of(call: Call, answer: httpx.Response) -> list[bytes]:
    """The files in a 200; raises if there are none."""
    if call.path == "/txt2img":
        return [answer.content]
    if call.path == "/generate_stream":
        *_, last = (line[5:] for line in answer.text.splitlines() if line.startswith("data:"))
        found = json.loads(last)["response"]["images"]
    elif call.path.startswith("/runsync"):
        found = answer.json()["output"]
    elif call.path.startswith("/v1/"):
        found = [image["b64_json"] for image in answer.json()["data"]]
    else:
        found = answer.json()["images"]
    return [b64decode(text) for text in found]
