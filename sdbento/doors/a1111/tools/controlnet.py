"""The routes of the ControlNet extension: what there is, and control images by themselves.

Source: scripts/api.py of Mikubill/sd-webui-controlnet.
"""

from __future__ import annotations

from typing import Annotated, Any

from PIL import Image
from pydantic import AliasChoices, BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from sdbento.access.caller import current_caller
from sdbento.access.threads import SharedThreads
from sdbento.catalog.specs import controlnets_for
from sdbento.doors.a1111.bodies import CUT, Lenient, Name
from sdbento.doors.a1111.notes import Notes
from sdbento.doors.a1111.tools.encoded import THREADS, EncodedImage, answer, work_on_image
from sdbento.doors.a1111.tools.options import TheChoices
from sdbento.doors.a1111.units import kind_of
from sdbento.doors.http.routing import TheApp, door
from sdbento.errors import InvalidParameter
from sdbento.images import codec
from sdbento.request.schema import MAX_CONTROLNETS
from sdbento.settings import Settings

router = door("AUTOMATIC1111")

VERSION = 3  # of the extension's API
NO_MODEL, NO_MODULE = "None", "none"
MAX_DETECTED = 16  # of one call of detect
RESOLUTION = 512  # of control images, where a call does not say
LABELS = {"mlsd": "MLSD", "normal": "NormalMap", "openpose": "OpenPose"}
LABELS |= {"seg": "Segmentation", "softedge": "SoftEdge"}

# Apart from those of other routes: a network may have to be downloaded first.
_threads = SharedThreads(THREADS, "sdbento-detect")


class Version(BaseModel):
    version: int = VERSION


class Units(BaseModel):
    control_net_unit_count: int = MAX_CONTROLNETS


class Models(BaseModel):
    model_list: list[str]


class Modules(BaseModel):
    module_list: list[str]
    module_detail: dict[str, dict[str, Any]]


class ControlType(BaseModel):
    module_list: list[str]
    model_list: list[str]
    default_option: str
    default_model: str


class ControlTypes(BaseModel):
    control_types: dict[str, ControlType]


class Detection(Lenient):
    """The body of detect."""

    model_config = ConfigDict(populate_by_name=True)

    controlnet_module: Name = Field(NO_MODULE, description="One of module_list")
    controlnet_input_images: list[EncodedImage] = Field(
        min_length=1,
        max_length=MAX_DETECTED,
        validation_alias=AliasChoices("controlnet_input_images", "controlnet_images"),
    )
    controlnet_processor_res: Annotated[int, Field(le=2048), CUT] = Field(
        RESOLUTION, description=f"Pixels of the shorter side; below 1: {RESOLUTION}"
    )


class Detected(BaseModel):
    images: list[str] = Field(description="Base64 of PNG files")
    info: str = Field(description='"Success", and what was done differently')


@router.get("/controlnet/version")
async def version() -> Version:
    """The version of the extension's API that these routes follow."""
    return Version()


@router.get("/controlnet/settings")
async def units() -> Units:
    """How many ControlNets a request may have."""
    return Units()


@router.get("/controlnet/model_list")
async def model_list(app: TheApp, choices: TheChoices) -> Models:
    """The types of ControlNet that are known for the caller's model."""
    return Models(model_list=[NO_MODEL, *await _known_types(app, choices)])


@router.get("/controlnet/module_list")
async def module_list() -> Modules:
    """The preprocessors that this server has."""
    modules = [NO_MODULE, *await run_in_threadpool(_preprocessors)]
    detail = {"model_free": False, "sliders": []}
    return Modules(module_list=modules, module_detail=dict.fromkeys(modules, detail))


@router.get("/controlnet/control_types")
async def control_types(app: TheApp, choices: TheChoices) -> ControlTypes:
    """The ControlNets with their preprocessors, by type."""
    models = await _known_types(app, choices)
    modules = await run_in_threadpool(_preprocessors)
    types = {"All": _control_type(modules, models, default=False)}
    for kind in sorted({*models, *modules}):
        both = ([one for one in listed if one == kind] for listed in (modules, models))
        types[LABELS.get(kind, kind.capitalize())] = _control_type(*both, default=True)
    return ControlTypes(control_types=types)


@router.post("/controlnet/detect", response_model=Detected)
async def detect(app: TheApp, body: Detection) -> Response:
    """Make control images, such as edges, out of ordinary ones."""
    kind, notes = await run_in_threadpool(_understand, body)
    images = [
        await work_on_image(
            app, _threads, _detect, kind, source, i, body.controlnet_processor_res, app.settings
        )
        for i, source in enumerate(body.controlnet_input_images)
    ]
    differences = (f"{title}: {text}" for title, text in notes.as_params().items())
    return await answer({"images": images, "info": ". ".join(["Success", *differences])})


async def _known_types(app: TheApp, choices: TheChoices) -> list[str]:
    return list(controlnets_for(await app.find_model(choices.of(current_caller()).checkpoint)))


def _preprocessors() -> list[str]:
    from sdbento.images.preprocessors import available  # imports OpenCV

    return available()


def _control_type(modules: list[str], models: list[str], *, default: bool) -> ControlType:
    return ControlType(
        module_list=[NO_MODULE, *modules],
        model_list=[NO_MODEL, *models],
        default_option=modules[0] if default and modules else NO_MODULE,
        default_model=models[0] if default and models else NO_MODEL,
    )


def _understand(body: Detection) -> tuple[str, Notes]:
    """The kind of control image that is wanted, and what of the call has no effect.

    Raises InvalidParameter.
    """
    notes, module = Notes(), body.controlnet_module
    if module.casefold() == NO_MODULE:
        return NO_MODULE, notes
    kind, known = kind_of(module), _preprocessors()
    if kind not in known:
        raise InvalidParameter(
            f"there is no module {module[:60]!r}; there are: {', '.join([NO_MODULE, *known])}",
            param="controlnet_module",
        )
    notes.change("controlnet_module", module, kind)
    for name in ("controlnet_threshold_a", "controlnet_threshold_b", "controlnet_masks"):
        if body.undeclared.get(name) not in (None, -1, []):
            notes.ignore(name)
    return kind, notes


def _detect(kind: str, source: str, number: int, resolution: int, settings: Settings) -> str:
    """Blocking."""
    param = f"controlnet_input_images.{number}"
    image = codec.decode(codec.read_encoded(source, settings, param=param), settings, param=param)
    if kind == NO_MODULE:
        return codec.as_base64(image)
    from sdbento.images.preprocessors import preprocess

    return codec.as_base64(preprocess(kind, _resized(image, resolution, param, settings)))


def _resized(image: Image.Image, resolution: int, param: str, settings: Settings) -> Image.Image:
    scale = (resolution if resolution > 0 else RESOLUTION) / min(image.size)
    width, height = (max(1, round(scale * side)) for side in image.size)
    if width * height > settings.max_pixels:
        raise InvalidParameter(
            f"{param} would be {width} × {height} pixels large at a resolution of {resolution}; "
            f"at most {settings.max_pixels} pixels are allowed (SDBENTO_MAX_PIXELS)",
            param="controlnet_processor_res",
        )
    return image.resize((width, height), Image.Resampling.LANCZOS)
