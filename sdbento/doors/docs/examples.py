"""Bodies that succeed with any model, for each route that takes one: with few steps."""

from __future__ import annotations

from typing import Any

# A white square on black, 256 x 256: an image, and a mask of its middle.
SQUARE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAQAAAAEAAQAAAAB0CZXLAAAAOUlEQVR42u3LIQ4AMAgEQcLL+/Niqj"
    "Ak1M7Iy14EAMDSbc7bczoKBAKBQCAQCAQCgUAgEHwGAABNAWnCEXFhrLx4AAAAAElFTkSuQmCC"
)
APPLE: dict[str, Any] = {
    "prompt": "a red apple on a blue background",
    "num_inference_steps": 4,
    "seed": 7,
}
WEB_UI: dict[str, Any] = {"prompt": APPLE["prompt"], "steps": 4, "seed": 7}
ENLARGED: dict[str, Any] = {"upscaler_1": "Lanczos", "upscaling_resize": 2}
EXAMPLES: dict[str, dict[str, Any]] = {
    "/generate": APPLE | {"num_images": 2},
    "/generate_stream": APPLE | {"preview_every": 2},
    "/txt2img": APPLE,
    "/img2img": APPLE | {"image": SQUARE, "strength": 0.75},
    "/inpaint": APPLE | {"image": SQUARE, "mask_image": SQUARE},
    "/v1/images/generations": APPLE | {"n": 2},
    "/v1/images/edits": APPLE | {"image": SQUARE},
    "/v1/images/variations": {"image": SQUARE, "num_inference_steps": 4},
    "/sdapi/v1/txt2img": WEB_UI,
    "/sdapi/v1/img2img": WEB_UI | {"init_images": [SQUARE]},
    "/sdapi/v1/options": {"CLIP_stop_at_last_layers": 1},
    "/sdapi/v1/png-info": {"image": SQUARE},
    "/sdapi/v1/extra-single-image": ENLARGED | {"image": SQUARE},
    "/sdapi/v1/extra-batch-images": ENLARGED | {"imageList": [{"data": SQUARE, "name": "square"}]},
    "/controlnet/detect": {"controlnet_module": "canny", "controlnet_input_images": [SQUARE]},
    "/run": {"input": APPLE},
    "/runsync": {"input": APPLE},
}
