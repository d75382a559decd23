"""Control images made from ordinary images: the edges, depth or pose that a ControlNet follows.

canny, scribble and tile are computed here. The others are made by networks of the optional package
controlnet_aux (Apache 2.0), on the CPU, with the weights that the authors of ControlNet published.
Knows nothing of ControlNets, nor of a request's size.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

import cv2
import numpy as np
from huggingface_hub import hf_hub_download
from PIL import Image

from sdbento.errors import InvalidParameter, ModelLoadFailed, classify
from sdbento.images.codec import flatten

log = logging.getLogger(__name__)

PARAM = "controlnet.preprocess"
REPOSITORY = "lllyasviel/Annotators"
MAX_DETECTORS = 3  # kept in memory, up to half a GB each
MAX_ASPECT = 8  # the networks read the shorter side as 512 pixels, and the longer in proportion
OTHERWISE = 'or send a finished control image with "preprocess": false'

Detector = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class Annotator:
    """A network of controlnet_aux."""

    processor: str  # its name there
    files: tuple[str, ...]  # its weights in REPOSITORY


ANNOTATORS = {
    "depth": Annotator("depth_midas", ("dpt_hybrid-midas-501f0c75.pt",)),
    "openpose": Annotator(
        "openpose", ("body_pose_model.pth", "hand_pose_model.pth", "facenet.pth")
    ),
    "softedge": Annotator("softedge_hed", ("ControlNetHED.pth",)),
    "lineart": Annotator("lineart_realistic", ("sk_model.pth", "sk_model2.pth")),
    "mlsd": Annotator("mlsd", ("mlsd_large_512_fp32.pth",)),
    "normal": Annotator("normal_bae", ("scannet.pt",)),
}
# Each network takes one image at a time: the one for depth keeps its activations in a global. One
# lock a kind, so that a download delays no other kind. Taken before `weights.constructing`.
_locks = {kind: Lock() for kind in ANNOTATORS}


def preprocess(kind: str, image: Image.Image) -> Image.Image:
    """The control image of `kind` for `image`, RGB and of its size; transparency counts as white.

    Raises InvalidParameter for a kind that is unknown or needs the optional package, and
    ModelLoadFailed where its network cannot be loaded now.
    """
    image = flatten(image)
    if kind in BUILT_IN:
        return BUILT_IN[kind](image)
    if kind not in ANNOTATORS:
        known = ", ".join([*BUILT_IN, *ANNOTATORS])
        raise InvalidParameter(
            f"{PARAM}: nothing here makes control images of type {kind[:60]!r}, only of {known}; "
            f"choose one {OTHERWISE}",
            param=PARAM,
        )
    _check_aspect(image)
    with _locks[kind]:
        control = _detector(kind)(image)
    return control.convert("RGB").resize(image.size, Image.Resampling.BILINEAR)


def available() -> list[str]:
    """The kinds of control images that can be made here."""
    has_networks = importlib.util.find_spec("controlnet_aux") is not None
    return [*BUILT_IN, *(ANNOTATORS if has_networks else ())]


def canny(image: Image.Image) -> Image.Image:
    """White edges on black (Canny 1986), with the thresholds of diffusers' documentation."""
    return _grey(cv2.Canny(np.asarray(image), 100, 200))


def scribble(image: Image.Image) -> Image.Image:
    """White strokes on black where the image is darker than its surroundings.

    A difference of Gaussians (Winnemöller et al. 2012) with a hard threshold.
    """
    pixels = np.asarray(image)
    wide, narrow = (cv2.GaussianBlur(pixels, (0, 0), sigma) for sigma in (5.0, 0.5))
    darker = cv2.subtract(wide, narrow).max(axis=2)  # saturating: 0 where the image is lighter
    return _grey((darker > 16).astype(np.uint8) * 255)


def tile(image: Image.Image) -> Image.Image:
    """The image itself: the tile ControlNet was trained to make it again with more detail."""
    return image


BUILT_IN: dict[str, Detector] = {"canny": canny, "scribble": scribble, "tile": tile}


@lru_cache(maxsize=MAX_DETECTORS)
def _detector(kind: str) -> Detector:
    """The network for `kind`; called under its lock, so that it is loaded once."""
    try:
        processors = importlib.import_module("controlnet_aux.processor")
    except ModuleNotFoundError as error:
        raise InvalidParameter(
            f"{PARAM}: control images of type {kind} need an extra that this server lacks: "
            f"pip install 'sdbento[preprocessors]'; {OTHERWISE}",
            param=PARAM,
        ) from error
    except Exception as error:  # for example a torchvision that was built for another torch
        raise _load_failed(kind, error) from error
    try:
        return _load(ANNOTATORS[kind], processors)
    except Exception as error:
        raise _load_failed(kind, error) from error


def _load(annotator: Annotator, processors: Any) -> Detector:
    # Imported here, because the preprocessors that are built in need no torch.
    from sdbento.models.weights import constructing

    for file in annotator.files:  # may take minutes, so not under the lock that models wait for
        hf_hub_download(REPOSITORY, file)
    with constructing:
        processor = processors.Processor(annotator.processor)
    options = dict(processor.params)
    return lambda image: processor.processor(image, output_type="pil", **options)


def _load_failed(kind: str, error: Exception) -> ModelLoadFailed:
    reason = classify(error).message
    log.warning("the %s preprocessor cannot be loaded: %s", kind, reason, exc_info=error)
    return ModelLoadFailed(
        f"the network that makes control images of type {kind} ({REPOSITORY}) could not be "
        f"loaded: {reason}; try again later {OTHERWISE}",
        param=PARAM,
    )


def _check_aspect(image: Image.Image) -> None:
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise InvalidParameter(
            f"{PARAM}: the image is {image.width} × {image.height} pixels; one side must not be "
            f"more than {MAX_ASPECT} times the other",
            param=PARAM,
        )


def _grey(pixels: Any) -> Image.Image:
    return Image.fromarray(np.repeat(pixels[:, :, None], 3, axis=2))
