"""Bodies of the web UI's clients as requests of ours, and what is said of the differences."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from sdbento.doors.a1111.bodies import Img2Img, Txt2Img
from sdbento.doors.a1111.translation import Translated, translate
from sdbento.errors import InvalidParameter, NotFound, SDBentoError
from sdbento.images import codec
from sdbento.settings import Settings
from tests.support import images

SETTINGS = Settings()
PHOTO = images.base64(images.gradient())
MASK = images.base64(images.half_mask())


def txt2img(**body: Any) -> Translated:
    return translate(Txt2Img.model_validate(body))


def img2img(refiner: str | None = None, **body: Any) -> Translated:
    body = {"init_images": [PHOTO], **body}
    given = Img2Img.model_validate(body)
    mask = None if given.mask is None else codec.read(given.mask, SETTINGS, param="mask")
    return translate(given, refiner=refiner, mask=mask)


def said(translated: Translated) -> str:
    return str(translated.notes.as_params())


def asked(translated: Translated) -> dict[str, Any]:
    described = translated.request.model_dump(exclude_defaults=True)
    described.pop("seed")
    return described


def test_an_empty_body_has_the_web_uis_defaults() -> None:
    assert asked(txt2img()) == {
        "prompt": "",
        "width": 512,
        "height": 512,
        "num_inference_steps": 50,
        "guidance_scale": 7.0,
        "scheduler": "Euler",
    }
    assert said(txt2img()) == "{}"


def test_nulls_and_empty_texts_are_as_good_as_nothing() -> None:
    names = [*Txt2Img.model_fields, "styles", "restore_faces", "s_churn", "anything"]
    for absent in (None, ""):
        body = dict.fromkeys(names, absent)
        assert asked(txt2img(**body)) == asked(txt2img())
        assert said(txt2img(**body)) == "{}"


def test_numbers_may_be_texts_and_fractions() -> None:
    body = {"steps": "20", "cfg_scale": "7.5", "width": 512.0, "height": "256", "seed": "12"}
    request = txt2img(**body, batch_size="2", enable_hr="false").request
    assert (request.num_inference_steps, request.guidance_scale) == (20, 7.5)
    assert (request.width, request.height, request.seed) == (512, 256, 12)
    assert txt2img(width=682.67).request.width == 680


@pytest.mark.parametrize("seed", [-1, "-1", "", None, -5, "-1.0"])
def test_a_seed_that_is_none_is_drawn_once(seed: Any) -> None:
    drawn = [txt2img(seed=seed).request.seed for _ in range(2)]
    assert None not in drawn and drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("body", "field", "used", "change"),
    [
        ({"width": 500}, "width", 504, "width 500 -> 504"),
        ({"height": 3}, "height", 64, "height 3 -> 64"),
        ({"height": 4095}, "height", 4096, "height 4095 -> 4096"),
        ({"steps": 999}, "num_inference_steps", 150, "steps 999 -> 150"),
        ({"cfg_scale": 0.5}, "guidance_scale", 0.5, "cfg_scale 0.5 -> 1"),
    ],
)
def test_what_is_out_of_bounds_is_changed_and_that_is_said(
    body: dict[str, Any], field: str, used: object, change: str
) -> None:
    translated = txt2img(**body)
    assert getattr(translated.request, field) == used
    assert translated.notes.as_params() == {"Changed": change}


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ["a"]},
        {"prompt": {}},
        {"prompt": "x" * 10_001},
        {"width": "abc"},
        {"width": 0},
        {"width": 4097},
        {"width": float("nan")},
        {"width": float("inf")},
        {"width": 1e300},
        {"steps": 0},
        {"steps": "9" * 5000},
        {"steps": []},
        {"cfg_scale": float("nan")},
        {"cfg_scale": 51},
        {"cfg_scale": "NaN"},
        {"seed": 2**63},
        {"seed": "x"},
        {"seed": {}},
        {"denoising_strength": 2},
        {"n_iter": 0},
        {"batch_size": 65},
        {"override_settings": [1]},
        {"override_settings": {"CLIP_stop_at_last_layers": 99}},
        {"alwayson_scripts": {"controlnet": [1]}},
        {"alwayson_scripts": {"controlnet": {"args": "x"}}},
        {"enable_hr": "perhaps"},
    ],
)
def test_nonsense_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        txt2img(**body)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"batch_size": 9, "n_iter": 8}, "at most 64"),
        ({"script_name": "X/Y/Z plot"}, "Script 'X/Y/Z plot' not found"),
        ({"alwayson_scripts": {"controlnet": {"args": [True]}}}, "ControlNet unit 0"),
        ({"alwayson_scripts": {"controlnet": {"args": [{"weight": "x"}]}}}, "weight"),
        ({"alwayson_scripts": {"ControlNet": {"args": [{"module": "canny"}]}}}, "needs a model"),
    ],
)
def test_what_cannot_be_done_at_all_is_refused(body: dict[str, Any], words: str) -> None:
    with pytest.raises(SDBentoError, match=words):
        txt2img(**body)


def test_batches_become_images() -> None:
    translated = txt2img(batch_size=3, n_iter=5)
    assert translated.num_images == 15


def test_clip_skip_counts_the_layer_to_stop_at() -> None:
    assert txt2img(clip_skip=2).request.clip_skip == 1
    assert txt2img(override_settings={"CLIP_stop_at_last_layers": 3}).request.clip_skip == 2
    both = txt2img(clip_skip=2, override_settings={"CLIP_stop_at_last_layers": 3})
    assert both.request.clip_skip == 2
    for none in (-1, 0, 1):
        assert txt2img(clip_skip=none).request.clip_skip is None


def test_what_is_not_applied_is_listed() -> None:
    body = {
        "restore_faces": True,
        "tiling": True,
        "styles": ["anime"],
        "subseed_strength": 0.5,
        "s_churn": 0.1,
        "override_settings": {"sd_vae": "x.safetensors", "eta_noise_seed_delta": 31337},
        "alwayson_scripts": {"ADetailer": {"args": [True, {}]}},
    }
    listed = txt2img(**body).notes.not_applied
    assert set(listed) == {
        *("restore_faces", "tiling", "styles", "subseed_strength", "s_churn"),
        *("override_settings.sd_vae", "override_settings.eta_noise_seed_delta"),
        "script ADetailer",
    }


@pytest.mark.parametrize(
    ("prompt", "listed"),
    [
        ("a cat AND a dog", ["AND in a prompt"]),
        ("a [cat|dog] in the garden", ["[a|b] in a prompt"]),
        ("a <hypernet:style:1> cat", ["tags other than <lora:...>"]),
        ("sand, a <lora:outline:1> [cat:dog:0.5] (cat:1.2) a|b SAND <3", []),
    ],
)
def test_syntax_that_is_the_web_uis_alone_is_listed(prompt: str, listed: list[str]) -> None:
    assert txt2img(prompt=prompt).notes.not_applied == listed
    assert txt2img(negative_prompt=prompt).notes.not_applied == listed


def test_a_script_may_be_null() -> None:
    scripts = {"controlnet": None, "ADetailer": "", "ControlNet": {"args": [None]}}
    translated = txt2img(alwayson_scripts=scripts)
    assert translated.request.controlnet is None and said(translated) == "{}"


def test_what_is_off_anyhow_is_not_listed() -> None:
    body = {
        "restore_faces": False,
        "styles": [],
        "s_noise": 1.0,
        "seed_resize_from_h": -1,
        "subseed": 5,
        "do_not_save_grid": True,
        "override_settings": {"sd_vae": "Automatic", "samples_format": "png"},
        "alwayson_scripts": {"ADetailer": {"args": [False]}, "controlnet": {"args": []}},
        "hr_prompt": "only for the second pass",
        "unknown": 1,
    }
    assert said(txt2img(**body)) == "{}"


@pytest.mark.parametrize(
    ("sampler", "eta", "listed"),
    [
        ("DDIM", 1.0, True),
        ("DDIM", 0, False),
        ("Euler a", 1.0, False),
        ("Euler a", 0.5, True),
        ("Euler", 1.0, False),
    ],
)
def test_eta_changes_no_sampler(sampler: str, eta: float, listed: bool) -> None:
    translated = txt2img(sampler_name=sampler, eta=eta)
    assert translated.request.eta == 0.0
    assert translated.notes.not_applied == ([f"eta {eta:g}"] if listed else [])


# The second pass


def hires(**body: Any) -> dict[str, Any] | None:
    request = txt2img(enable_hr=True, **body).request
    return None if request.hires is None else request.hires.model_dump()


def test_the_second_pass_has_the_web_uis_defaults() -> None:
    usual = {"scale": 2.0, "steps": 67, "strength": 0.75, "upscaler": "latent"}
    assert hires() == usual
    body = {"hr_second_pass_steps": 10, "hr_upscaler": "None"}
    assert hires(**body) == usual | {"steps": 14, "upscaler": "lanczos"}


@pytest.mark.parametrize(
    ("first", "body", "second"),
    [
        ((512, 384), {}, (1024, 768)),
        ((512, 384), {"hr_scale": 1.5}, (768, 576)),
        ((512, 384), {"hr_resize_x": 1024, "hr_resize_y": 768}, (1024, 768)),
        ((0, 0), {}, (2048, 1536)),
        ((512, 0), {"hr_scale": 2}, (1024, 1536)),
    ],
)
def test_the_first_pass_may_have_a_size_of_its_own(
    first: tuple[int, int], body: dict[str, Any], second: tuple[int, int]
) -> None:
    sizes = {"firstphase_width": first[0], "firstphase_height": first[1]}
    request = txt2img(width=1024, height=768, enable_hr=True, **sizes, **body).request
    assert (request.width, request.height) == (first[0] or 1024, first[1] or 768)
    assert request.hires is not None
    width, height = request.width or 0, request.height or 0
    assert (int(request.hires.scale * width), int(request.hires.scale * height)) == second


@pytest.mark.parametrize(
    ("upscaler", "ours", "change"),
    [
        ("Lanczos", "lanczos", None),
        ("Nearest", "nearest", None),
        ("Latent", "latent", None),
        ("Latent (bicubic)", "latent", "hr_upscaler Latent (bicubic) -> latent"),
        ("R-ESRGAN 4x+", "lanczos", "hr_upscaler R-ESRGAN 4x+ -> lanczos"),
    ],
)
def test_upscalers(upscaler: str, ours: str, change: str | None) -> None:
    translated = txt2img(enable_hr=True, hr_upscaler=upscaler, denoising_strength=1)
    assert translated.request.hires is not None
    assert translated.request.hires.upscaler == ours
    assert translated.notes.changed == ([] if change is None else [change])


@pytest.mark.parametrize("body", [{"hr_scale": 1}, {"hr_scale": 0.5}, {"hr_resize_x": 512}])
def test_no_second_pass_that_enlarges_nothing(body: dict[str, Any]) -> None:
    assert hires(**body) is None
    assert "enable_hr" in said(txt2img(enable_hr=True, **body))


@pytest.mark.parametrize(
    ("body", "size", "change"),
    [
        ({"hr_resize_x": 1000}, (1000, 1000), None),
        ({"hr_resize_y": 768}, (768, 768), None),
        ({"hr_resize_x": 1024, "hr_resize_y": 1024}, (1024, 1024), None),
        ({"hr_resize_x": 1024, "hr_resize_y": 768}, (1024, 1024), "1024x768 -> 1024x1024"),
    ],
)
def test_the_second_pass_has_the_size_that_is_asked_for(
    body: dict[str, Any], size: tuple[int, int], change: str | None
) -> None:
    translated = txt2img(enable_hr=True, denoising_strength=1, **body)
    assert translated.request.hires is not None
    scale = translated.request.hires.scale
    assert (int(scale * 512) // 8 * 8, int(scale * 512) // 8 * 8) == size
    assert translated.notes.changed == ([] if change is None else [f"hr_resize {change}"])


def test_a_second_pass_of_no_strength_does_one_step() -> None:
    translated = txt2img(enable_hr=True, denoising_strength=0, steps=20)
    assert translated.request.hires is not None
    assert int(150 * translated.request.hires.strength) == 1
    assert "denoising_strength 0.0 -> 0.00667" in said(translated)
    assert "hr_second_pass_steps 20 -> 1" in said(translated)


def test_prompts_of_the_second_pass_are_listed() -> None:
    translated = txt2img(enable_hr=True, prompt="a", hr_prompt="b", hr_sampler_name="Euler a")
    assert set(translated.notes.not_applied) == {"hr_prompt", "hr_sampler_name"}
    same = txt2img(enable_hr=True, prompt="a", hr_prompt="a", hr_sampler_name="Use same sampler")
    assert same.notes.not_applied == []
    assert txt2img(enable_hr=True, cfg_scale=5, hr_cfg=3).notes.not_applied == ["hr_cfg"]


@pytest.mark.parametrize(
    "body",
    [
        {"hr_scheduler": "Automatic"},
        {"scheduler": "sgm_uniform", "hr_scheduler": "SGM Uniform"},
        {"sampler_name": "Euler a", "hr_sampler_name": "euler_a"},
        {"sampler_index": "DDIM", "hr_sampler_name": "DDIM"},
        {"cfg_scale": 5, "hr_cfg": 5.0},
    ],
)
def test_what_the_second_pass_shares_with_the_first_is_not_listed(body: dict[str, Any]) -> None:
    assert txt2img(enable_hr=True, **body).notes.not_applied == []


@pytest.mark.parametrize("steps", [1, 7, 14, 20, 29, 45])
@pytest.mark.parametrize("strength", [0.29, 0.3, 0.5, 0.55, 0.7, 0.999, 1])
def test_the_second_pass_does_all_steps_that_are_asked_for(steps: int, strength: float) -> None:
    body: dict[str, Any] = {"denoising_strength": strength, "steps": 50}
    translated = txt2img(enable_hr=True, hr_second_pass_steps=steps, **body)
    hires = translated.request.hires
    assert hires is not None and hires.steps is not None
    if hires.steps < 150:
        assert int(hires.steps * hires.strength) == steps
        assert said(translated) == "{}"


def test_a_second_pass_of_too_many_steps_is_cut_and_that_is_said() -> None:
    fewer = txt2img(enable_hr=True, steps=100, denoising_strength=0.5)
    assert fewer.notes.changed == ["hr_second_pass_steps 100 -> 75"]
    clipped = txt2img(enable_hr=True, hr_second_pass_steps=999, denoising_strength=1)
    assert clipped.notes.changed == ["hr_second_pass_steps 999 -> 150"]


def test_tokens_are_merged_by_a_setting() -> None:
    merged = txt2img(override_settings={"token_merging_ratio": 0.9})
    assert merged.request.token_merging_ratio == 0.75
    assert merged.notes.changed == ["token_merging_ratio 0.9 -> 0.75"]


# From an image


def test_an_image_to_start_from() -> None:
    request = img2img(denoising_strength="0.4", resize_mode="2").request
    assert (request.image, request.strength, request.resize_mode) == (PHOTO, 0.4, "fit")
    assert img2img().request.strength == 0.75


@pytest.mark.parametrize("nothing", [None, []])
def test_without_an_image_there_is_nothing_to_start_from(nothing: Any) -> None:
    with pytest.raises(NotFound, match="Init image not found"):
        img2img(init_images=nothing)


def test_only_the_first_image_is_used() -> None:
    translated = img2img(init_images=[PHOTO, MASK])
    assert translated.request.image == PHOTO
    assert "init_images after the first" in said(translated)


def test_a_mask() -> None:
    request = img2img(mask=MASK, inpainting_fill=1).request
    assert request.mask_image == MASK
    assert (request.mask_blur, request.padding_mask_crop) == (4, 0)
    whole = img2img(mask=MASK, inpaint_full_res=False, mask_blur=9, inpainting_fill=1)
    assert (whole.request.mask_blur, whole.request.padding_mask_crop) == (9, None)
    assert said(whole) == "{}"


def mask_of(translated: Translated) -> Image.Image:
    assert translated.request.mask_image is not None
    return Image.open(BytesIO(base64.b64decode(translated.request.mask_image)))


def test_a_mask_may_be_the_other_way() -> None:
    for invert in (1, "1", True, 1.0):
        mask = mask_of(img2img(mask=MASK, inpainting_mask_invert=invert))
        assert [mask.getpixel((x, 5)) for x in (5, 60)] == [255, 0]


def test_what_is_opaque_of_a_mask_with_transparency_is_repainted() -> None:
    clear = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    clear.paste((0, 0, 0, 255), (0, 0, 32, 64))
    mask = mask_of(img2img(mask=images.base64(clear)))
    assert [mask.getpixel((x, 5)) for x in (5, 60)] == [255, 0]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "inpainting_fill 0 -> 1"),
        ({"inpainting_fill": 2}, "inpainting_fill 2 -> 1"),
        ({"mask_blur": 200}, "mask_blur 200 -> 128"),
        ({"mask_blur_x": 2, "mask_blur_y": 6}, "mask_blur 2x6 -> 6"),
        ({"mask_blur": 0, "inpaint_full_res": False}, "mask_blur 0"),
        ({"resize_mode": 3}, "resize_mode 3"),
    ],
)
def test_differences_in_inpainting_are_said(body: dict[str, Any], words: str) -> None:
    assert words in said(img2img(mask=MASK, **body))


def test_a_refiner_does_the_last_steps() -> None:
    refiner = img2img("refiner", refiner_switch_at=0.7).request.refiner
    assert refiner is not None and (refiner.model, refiner.switch_at) == ("refiner", 0.7)
    assert img2img("refiner", refiner_switch_at=1).request.refiner is None
    masked = img2img("refiner", mask=MASK)
    assert masked.request.refiner is None and "refiner_checkpoint" in said(masked)


# ControlNet

UNIT: dict[str, Any] = {
    "image": PHOTO,
    "model": "control_v11p_sd15_canny [d14c016b]",
    "module": "none",
}


def controlled(*units: Any, name: str = "ControlNet", **body: Any) -> Translated:
    return txt2img(alwayson_scripts={name: {"args": list(units)}}, **body)


def one_control(*units: Any) -> dict[str, Any]:
    controls = controlled(*units).request.controlnet
    assert controls is not None
    return controls[0].model_dump()


def test_a_unit() -> None:
    unit = UNIT | {"weight": "0.7", "guidance_start": 0.1, "guidance_end": 0.9}
    assert one_control(unit) == {
        "type": "canny",
        "image": PHOTO,
        "conditioning_scale": 0.7,
        "guidance_start": 0.1,
        "guidance_end": 0.9,
        "preprocess": False,
    }


@pytest.mark.parametrize("name", ["controlnet", "ControlNet", "CONTROLNET"])
@pytest.mark.parametrize(
    "image", [{"image": PHOTO}, {"input_image": PHOTO}, {"image": {"image": PHOTO, "mask": None}}]
)
def test_images_of_units(name: str, image: dict[str, Any]) -> None:
    unit = {"model": "canny", **image}
    controls = controlled(unit, name=name).request.controlnet
    assert controls is not None and controls[0].image == PHOTO


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("control_v11f1p_sd15_depth [cfd03158]", "depth"),
        ("control_v11p_sd15_normalbae", "normal"),
        ("control_v11p_sd15s2_lineart_anime", "lineart"),
        ("diffusers_xl_canny_full", "canny"),
        ("lllyasviel/control_v11p_sd15_canny", "lllyasviel/control_v11p_sd15_canny"),
        ("no such", "no such"),
    ],
)
def test_models_of_units(model: str, kind: str) -> None:
    assert one_control(UNIT | {"model": model})["type"] == kind


def test_a_module_makes_the_control_image() -> None:
    translated = controlled(UNIT | {"module": "canny", "threshold_a": -1})
    assert translated.request.controlnet is not None
    assert translated.request.controlnet[0].preprocess
    assert said(translated) == "{}"
    assert "ControlNet 0 threshold_a" in said(
        controlled(UNIT | {"module": "canny", "threshold_a": 64})
    )
    openpose = UNIT | {"model": "control_v11p_sd15_openpose", "preprocessor": "openpose_full"}
    assert "module openpose_full -> openpose" in said(controlled(openpose))


@pytest.mark.parametrize("module", ["depth_midas", "reference_only", "invert (from white bg)"])
def test_a_module_for_something_else_is_refused(module: str) -> None:
    with pytest.raises(InvalidParameter, match="control images for canny"):
        controlled(UNIT | {"module": module})


def test_units_that_do_nothing_are_left_out() -> None:
    off = [UNIT | {"enabled": False}, {"model": "None", "module": "none"}, {}]
    assert controlled(*off).request.controlnet is None


def test_what_units_cannot_do_is_said() -> None:
    unit = UNIT | {"control_mode": "ControlNet is more important", "hr_option": "Low res only"}
    unit |= {"mask": MASK, "effective_region_mask": MASK, "inpaint_crop_input_image": False}
    masked = UNIT | {"resize_mode": 0, "image": {"image": PHOTO, "mask": MASK}}
    listed = controlled(unit, masked).notes.not_applied
    assert listed == [
        "ControlNet 1 resize_mode",
        "ControlNet 0 control_mode",
        "ControlNet 0 hr_option",
        "ControlNet 0 mask",
        "ControlNet 0 effective_region_mask",
        "ControlNet 0 inpaint_crop_input_image",
        "ControlNet 1 image.mask",
    ]


def test_what_webuiapi_sends_with_every_unit_is_not_listed() -> None:
    unit = UNIT | {"control_mode": "Balanced", "hr_option": "Both", "mask": None}
    unit |= {"low_vram": False, "processor_res": 512, "threshold_a": 64, "threshold_b": 64}
    assert said(controlled(unit | {"pixel_perfect": False})) == "{}"
    mlsd = {"model": "mlsd", "module": "mlsd", "pixel_perfect": False}
    assert said(controlled(unit | mlsd, width=1024)) == "{}"


@pytest.mark.parametrize(
    ("kind", "fields", "listed"),
    [
        ("canny", {"processor_res": 768}, ["processor_res"]),
        ("canny", {"processor_res": 1024}, []),
        ("canny", {"processor_res": 768, "pixel_perfect": True}, []),
        ("openpose", {"processor_res": 512}, []),
        ("openpose", {"pixel_perfect": True}, ["pixel_perfect"]),
        ("canny", {"threshold_a": 64, "threshold_b": 200.0}, ["threshold_a"]),
        ("canny", {"threshold_a": 500}, []),  # as which the extension takes its own, ours too
        ("mlsd", {"threshold_a": 0.5, "threshold_b": "0.1"}, ["threshold_a"]),
        ("tile", {"threshold_a": 4}, ["threshold_a"]),
    ],
)
def test_settings_of_preprocessors_that_ours_lack_are_listed(
    kind: str, fields: dict[str, Any], listed: list[str]
) -> None:
    unit = {"image": PHOTO, "model": kind, "module": kind, **fields}
    notes = controlled(unit, width=1024, height=1024).notes
    assert notes.not_applied == [f"ControlNet 0 {name}" for name in listed]


def test_control_images_get_their_size_as_the_image_does() -> None:
    fill = UNIT | {"resize_mode": "Resize and Fill"}
    assert controlled(UNIT).request.resize_mode == "crop"
    assert controlled(fill).request.resize_mode == "fit"
    scripts = {"controlnet": {"args": [fill]}}
    from_image = img2img(alwayson_scripts=scripts, resize_mode=1)
    assert from_image.request.resize_mode == "crop"
    assert from_image.notes.not_applied == ["ControlNet 0 resize_mode"]


def test_without_an_image_a_unit_takes_the_one_to_start_from() -> None:
    request = img2img(alwayson_scripts={"controlnet": {"args": [{"model": "canny"}]}}).request
    assert request.controlnet is not None and request.controlnet[0].image is None
