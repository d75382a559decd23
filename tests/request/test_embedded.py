"""What a file says of the request that made it, and what it keeps to itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import sdbento
from sdbento.images import infotext
from sdbento.images.codec import MEDIA_TYPES
from sdbento.images.metadata import read_metadata
from sdbento.request.embedded import infotext_of, public
from sdbento.request.result import Result
from sdbento.request.schema import OutputFormat, Timings
from sdbento.request.settle import SettledRequest


def settled(**fields: Any) -> SettledRequest:
    decided: dict[str, Any] = {
        "prompt": "a cat",
        "model": "org/model",
        "width": 512,
        "height": 768,
        "num_inference_steps": 20,
        "guidance_scale": 7.0,
        "seed": 42,
    }
    return SettledRequest(**decided | fields)


def written(sampler: str = "DPM++ 2M Karras", **fields: Any) -> dict[str, str]:
    return infotext.read(infotext_of(settled(**fields), sampler, seed=43))


def test_text_to_image() -> None:
    assert infotext_of(settled(negative_prompt="blurry"), "DPM++ 2M Karras", seed=43) == (
        "a cat\n"
        "Negative prompt: blurry\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 43, "
        f"Size: 512x768, Model: org/model, Version: sdbento {sdbento.__version__}"
    )


def test_prompts_are_told_as_they_were_unless_they_have_urls() -> None:
    prompt = "a cat &style=anime, what?x=y, #a=1 dog"
    negative = f"{prompt} https://u:hush@h.example/a?token=hush"
    request = settled(prompt=prompt, negative_prompt=negative)
    lines = infotext_of(request, "Euler", seed=43).splitlines()
    assert lines[:2] == [prompt, f"Negative prompt: {prompt} https://h.example/a"]
    timings = Timings(queued=0, denoising=0, decoding=0, total=0)
    result = Result(request, "Euler", [Image.new("RGB", (8, 8))], timings, ())
    assert result.parameters()["prompt"] == prompt
    assert result.parameters()["negative_prompt"] == f"{prompt} https://h.example/a"


def test_a_sampler_has_the_name_that_people_know() -> None:
    read = written("EulerAncestralDiscreteScheduler")
    assert (read["Sampler"], read["Schedule type"]) == ("Euler a", "Automatic")
    assert written("DPM++ 2M", sigmas="exponential")["Schedule type"] == "Exponential"


def test_image_to_image_and_what_is_counted_differently() -> None:
    read = written(image="aGk=", strength=0.5, clip_skip=1, mask_image="aGk=", mask_blur=4)
    assert read["Denoising strength"] == "0.5"
    assert read["Clip skip"] == "2"
    assert read["Mask blur"] == "4"


def test_later_passes() -> None:
    read = written(hires={"scale": 1.5, "steps": 10, "strength": 0.7, "upscaler": "latent"})
    assert read["Denoising strength"] == "0.7"
    assert read["Hires upscale"] == "1.5"
    assert read["Hires steps"] == "7"
    assert read["Hires upscaler"] == "Latent"
    read = written(refiner={"model": "org/refiner", "switch_at": 0.8})
    assert (read["Refiner"], read["Refiner switch at"]) == ("org/refiner", "0.8")


def test_loras_and_controlnets() -> None:
    read = written(
        lora=[
            {"model_id": "sketch", "weight": 0.8},
            {"model_id": "ink", "weight": 1, "text_encoder_weight": 0.5},
        ],
        controlnet={"type": "canny", "image": "aGk=", "preprocess": True},
    )
    assert read["Prompt"] == "a cat <lora:sketch:0.8> <lora:ink:0.5:1>"
    assert read["ControlNet 0"].startswith("Module: canny, Model: canny, Weight: 1, Guidance St")


SIGNED = "https://user:hunter2@host.example/a.png?X-Amz-Signature=cafe"


@pytest.mark.parametrize(
    "model", ["/srv/models/x.safetensors", "./x.safetensors", "~/x.safetensors", "customer/x"]
)
def test_no_folder_of_this_machine_is_told(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "customer" / "x.safetensors").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    model = model if model.endswith(".safetensors") else f"{model}.safetensors"
    lora = {"model_id": "/srv/loras/ink.safetensors"}
    assert written(model=model)["Model"] == "x.safetensors"
    assert written(lora=lora)["Prompt"] == "a cat <lora:ink.safetensors:1>"
    told = public({"model": model, "lora": [lora], "refiner": {"model": model}})
    assert told == {
        "model": "x.safetensors",
        "lora": [{"model_id": "ink.safetensors"}],
        "refiner": {"model": "x.safetensors"},
    }


def test_no_credentials_and_no_signature_are_told() -> None:
    clean = "https://host.example/a.png"
    prompt = f"a cat, {SIGNED}, by the sea"
    told = public({"prompt": prompt, "image": SIGNED, "controlnet": [{"image": SIGNED}], "seed": 1})
    assert told == {
        "prompt": f"a cat, {clean}, by the sea",
        "image": clean,
        "controlnet": [{"image": clean}],
        "seed": 1,
    }
    read = written(prompt=prompt, negative_prompt=SIGNED, lora={"model_id": SIGNED})
    assert "hunter2" not in str(read)
    assert "cafe" not in str(read)


@pytest.mark.parametrize("output_format", MEDIA_TYPES)
def test_no_file_holds_a_secret(output_format: OutputFormat) -> None:
    request = settled(
        model="/srv/secret/x.safetensors",
        prompt=f"a cat, {SIGNED}, <lora:/srv/secret/ink:1>",
        negative_prompt=SIGNED,
        prompt_2=SIGNED,
        image=SIGNED,
        lora=[{"model_id": SIGNED}, {"model_id": "/srv/secret/ink.safetensors"}],
        controlnet={"type": "/srv/secret/canny", "image": SIGNED},
        refiner={"model": "/srv/secret/refiner"},
        output_format=output_format,
    )
    timings = Timings(queued=0, denoising=0, decoding=0, total=0)
    result = Result(request, "Euler", [Image.new("RGB", (8, 8))], timings, ())
    metadata = read_metadata(result.encode())
    assert metadata.infotext is not None
    assert metadata.parameters is not None
    for secret in ("hunter2", "cafe", "/srv", "secret"):
        assert secret not in str(metadata)
        assert secret.encode() not in result.encode()
        assert secret.encode("utf-16-be") not in result.encode()


def test_what_is_public_already_stays_as_it_is() -> None:
    parameters = {"model": "stabilityai/sdxl", "prompt": "what? me@home", "strength": 0.5}
    assert public(parameters) == parameters
