"""Answers of txt2img and img2img.

Source: `Processed.js` in modules/processing.py and the models of modules/api/models.py.
"""

from __future__ import annotations

import json
import time
from typing import Any

import sdbento
from sdbento.catalog.specs import ModelSpec
from sdbento.doors.a1111.bodies import NEUTRAL, Img2Img, Txt2Img, without_images
from sdbento.doors.a1111.translation import Translated
from sdbento.images import infotext
from sdbento.images.redaction import public_name
from sdbento.request.schema import GenerateRequest, GenerateResponse
from sdbento.url_redaction import all_without_credentials, without_credentials

# What `info` has fields of its own for, of what an infotext says.
_IN_INFO = {"Prompt", "Negative prompt", "Steps", "Sampler", "CFG scale", "Seed", "Size", "Model"}
_IN_INFO |= {"Denoising strength", "Clip skip", "Version"}


def to_json(
    body: Txt2Img | Img2Img,
    translated: Translated,
    model: ModelSpec,
    responses: list[GenerateResponse],
) -> bytes:
    """The answer. `responses`: those that are finished, which are not all if it was interrupted."""
    images = [image for response in responses for image in response.images]
    answer = {
        "images": images if body.send_images else [],
        "parameters": _parameters(body),
        "info": json.dumps(_info(body, translated, model, responses)),
    }
    # In ASCII: a prompt may have a lone surrogate, which UTF-8 cannot encode.
    return json.dumps(answer).encode()


def _parameters(body: Txt2Img | Img2Img) -> dict[str, Any]:
    given = {name: value for name, value in body.undeclared.items() if name in NEUTRAL}
    echoed = body.model_dump(include=set(type(body).model_fields)) | given
    if isinstance(body, Img2Img) and body.include_init_images:
        images = {"init_images": body.init_images, "mask": body.mask}
    else:
        images = dict.fromkeys({"init_images", "mask"} & echoed.keys())
    return {**all_without_credentials(without_images(echoed)), **images}


def _info(
    body: Txt2Img | Img2Img,
    translated: Translated,
    model: ModelSpec,
    responses: list[GenerateResponse],
) -> dict[str, Any]:
    infotexts = [text for response in responses for text in response.infotexts]
    used = infotext.read(infotexts[0]) if infotexts else {}
    return {
        **_of_images(body, translated.request, responses),
        **_of_sampling(body, translated.request, used),
        **_of_model(model),
        "extra_generation_params": {
            **{name: value for name, value in used.items() if name not in _IN_INFO},
            **translated.notes.as_params(),
            **_ended_early(translated.num_images, len(infotexts)),
            **_warnings(responses),
        },
        "index_of_first_image": 0,
        "infotexts": infotexts,
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "version": f"sdbento {sdbento.__version__}",
    }


def _of_images(
    body: Txt2Img | Img2Img, request: GenerateRequest, responses: list[GenerateResponse]
) -> dict[str, Any]:
    """What an image was made of, and lists of it for those that are finished."""
    seeds = [seed for response in responses for seed in response.seeds]
    prompt, negative = map(without_credentials, (body.prompt, body.negative_prompt))
    return {
        "prompt": prompt,
        "all_prompts": [prompt] * len(seeds),
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * len(seeds),
        "seed": request.seed,
        "all_seeds": seeds,
        "subseed": body.subseed,
        "all_subseeds": [body.subseed] * len(seeds),
        "subseed_strength": 0,
        "styles": [],
    }


def _of_sampling(
    body: Txt2Img | Img2Img, request: GenerateRequest, used: dict[str, str]
) -> dict[str, Any]:
    """`used`: the parameters in the first image's infotext."""
    strength = request.strength if request.hires is None else request.hires.strength
    return {
        "width": request.width,
        "height": request.height,
        "sampler_name": used.get("Sampler", request.scheduler),
        "cfg_scale": request.guidance_scale,
        "steps": request.num_inference_steps,
        "batch_size": body.batch_size,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": strength,
        "clip_skip": 1 + (request.clip_skip or 0),
    }


def _of_model(model: ModelSpec) -> dict[str, Any]:
    return {
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": public_name(model.name),
        "sd_model_hash": None,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "is_using_inpainting_conditioning": model.inpaints,
    }


def _ended_early(num_images: int, num_finished: int) -> dict[str, str]:
    if num_finished == num_images:
        return {}
    return {"Interrupted": f"{num_finished} of {num_images} images were finished"}


def _warnings(responses: list[GenerateResponse]) -> dict[str, str]:
    warnings = dict.fromkeys(line for response in responses for line in response.warnings)
    return {"Warnings": "; ".join(warnings)} if warnings else {}
