"""The units of the ControlNet extension as ControlNets of a request.

Source: internal_controlnet/args.py and scripts/enums.py of Mikubill/sd-webui-controlnet.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from sdbento.doors.a1111.bodies import NEUTRAL_IN_UNIT, Script, Unit
from sdbento.doors.a1111.notes import Notes
from sdbento.errors import InvalidParameter
from sdbento.request.parse import explain

# Words in a model's or preprocessor's name, by ControlNet type.
_MARKS = {
    "canny": ("canny",),
    "normal": ("normal",),  # before depth: there is a "normal_midas"
    "depth": ("depth", "midas"),
    "openpose": ("openpose", "dw_pose"),
    "scribble": ("scribble",),
    "softedge": ("softedge", "hed", "pidinet"),
    "lineart": ("lineart",),
    "mlsd": ("mlsd",),
    "seg": ("seg", "oneformer"),
    "tile": ("tile",),
    "inpaint": ("inpaint",),
}
_RESIZE_MODES = {
    "0": "stretch",
    "just resize": "stretch",
    "1": "crop",
    "crop and resize": "crop",
    "2": "fit",
    "resize and fill": "fit",
}
# Of our preprocessors, where the extension has them too; and the range that it heeds.
_THRESHOLDS: dict[str, dict[str, tuple[float, float, float]]] = {
    "canny": {"threshold_a": (100, 1, 255), "threshold_b": (200, 1, 255)},
    "mlsd": {"threshold_a": (0.1, 0.01, 2), "threshold_b": (0.1, 0.01, 20)},
    "tile": {"threshold_a": (1, 1, 8)},
}
_AT_FULL_SIZE = ("canny", "scribble", "tile")  # preprocessors; the others are networks
NETWORK_SIDE = 512  # pixels that they work on


def read_units(scripts: dict[str, Script], notes: Notes) -> list[Unit]:
    """The units of ControlNet that are to work. Other scripts that would do something are noted."""
    units: list[Unit] = []
    for name, script in scripts.items():
        if name.casefold() == "controlnet":
            units += [_unit(args, i) for i, args in enumerate(script.args) if args is not None]
        elif script.args and script.args[0] is not False:  # by which ADetailer is turned off
            notes.ignore(f"script {name}")
    return [unit for unit in units if unit.enabled and _works(unit)]


def resize_mode(unit: Unit) -> str | None:
    """How the control image is brought to the size of the image; None: in no way of ours."""
    return _RESIZE_MODES.get(str(unit.resize_mode).casefold())


def controlnet(unit: Unit, number: int, side: int, notes: Notes) -> dict[str, Any]:
    """The ControlNet of a request that a unit stands for. Raises InvalidParameter.

    `side`: the shorter one of the image to come, in pixels.
    """
    kind = _type_of(unit.model)
    title = f"ControlNet {number}"
    preprocess = _preprocesses(_module(unit), kind, title, notes)
    ignored = [name for name, value in unit.undeclared.items() if _would_matter(name, value)]
    if preprocess:
        ignored += _ignored_of_preprocessor(unit, kind, side)
    image = unit.image or unit.input_image
    if isinstance(image, dict):
        ignored += ["image.mask"] if image.get("mask") else []
        image = image.get("image")
    for name in ignored:
        notes.ignore(f"{title} {name}")
    return {
        "type": kind,
        "image": image or None,
        "conditioning_scale": unit.weight,
        "guidance_start": unit.guidance_start,
        "guidance_end": unit.guidance_end,
        "preprocess": preprocess,
    }


def _unit(args: Any, number: int) -> Unit:
    try:
        return Unit.model_validate(args)
    except ValidationError as error:
        raise explain(error, f"ControlNet unit {number}") from None


def _works(unit: Unit) -> bool:
    """Whether it has a model. Raises InvalidParameter for a module that works without one."""
    if unit.model.casefold() != "none":
        return True
    if _module(unit).casefold() == "none":
        return False
    raise InvalidParameter(
        f"a ControlNet unit with the module {_module(unit)} needs a model",
        param="alwayson_scripts.controlnet",
    )


def _module(unit: Unit) -> str:
    return unit.preprocessor or unit.module


def _type_of(model: str) -> str:
    """ "control_v11p_sd15_canny [d14c016b]" is of type canny; Hub ids and paths are names."""
    name = re.sub(r"\s*\[\w+\]$", "", model.strip())
    return name if "/" in name else kind_of(name) or name


def kind_of(name: str) -> str | None:
    """The type of ControlNet that a name of a model or a preprocessor speaks of."""
    name = name.casefold()
    kinds = (kind for kind, marks in _MARKS.items() if any(mark in name for mark in marks))
    return next(kinds, None)


def _preprocesses(module: str, kind: str, title: str, notes: Notes) -> bool:
    """Whether the control image is made out of an ordinary one."""
    if module.casefold() == "none":
        return False
    made = kind_of(module)
    if made != kind:
        raise InvalidParameter(
            f"{title}: the module {module} makes no control images for {kind}; send a finished one "
            f'with the module "none", or take a module for {kind}',
            param="alwayson_scripts.controlnet",
        )
    notes.change(f"{title} module", module, made)
    return made != "inpaint"  # which reads the image and its mask themselves


def _would_matter(name: str, value: Any) -> bool:
    return name in NEUTRAL_IN_UNIT and value not in NEUTRAL_IN_UNIT[name]


def _ignored_of_preprocessor(unit: Unit, kind: str, side: int) -> Iterator[str]:
    """The settings of a preprocessor that ours does not have, and would change its image."""
    ours = side if kind in _AT_FULL_SIZE else NETWORK_SIDE
    if unit.pixel_perfect and side != ours:
        yield "pixel_perfect"
    if not unit.pixel_perfect and unit.processor_res > 0 and unit.processor_res != ours:
        yield "processor_res"
    for name, (threshold, least, most) in _THRESHOLDS.get(kind, {}).items():
        given = getattr(unit, name)
        if least <= given <= most and given != threshold:
            yield name
