"""The units of the ControlNet extension as ControlNets of a request.

Source: internal_controlnet/args.py and scripts/enums.py of Mikubill/sd-webui-controlnet.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

from sdbento.doors.a1111.bodies import Script, Unit
from sdbento.doors.a1111.notes import Notes
from sdbento.errors import InvalidParameter
from sdbento.request.parse import explain

# What names of models and preprocessors have in them, by the type of ControlNet that they mean.
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
_CANNY_THRESHOLDS = (100, 200)  # of ours, which no request can change


def read_units(scripts: dict[str, Script], notes: Notes) -> list[Unit]:
    """The units of ControlNet that are to work. Other scripts that would do something are noted."""
    units: list[Unit] = []
    for name, script in scripts.items():
        if name.casefold() == "controlnet":
            units += [_unit(args, i) for i, args in enumerate(script.args)]
        elif script.args and script.args[0] is not False:  # by which ADetailer is turned off
            notes.ignore(f"script {name}")
    return [unit for unit in units if unit.enabled and _works(unit)]


def resize_mode(unit: Unit) -> str | None:
    """How the control image is brought to the size of the image; None: in no way of ours."""
    return _RESIZE_MODES.get(str(unit.resize_mode).casefold())


def controlnet(unit: Unit, number: int, notes: Notes) -> dict[str, Any]:
    """The ControlNet of a request that a unit stands for. Raises InvalidParameter."""
    kind = _type_of(unit.model)
    title = f"ControlNet {number}"
    preprocess = _preprocesses(_module(unit), kind, title, notes)
    _note_what_is_not_done(unit, preprocess and kind == "canny", title, notes)
    image = unit.image or unit.input_image
    if isinstance(image, dict):  # {"image": ..., "mask": ...}
        image = image.get("image")
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


def _note_what_is_not_done(unit: Unit, by_canny: bool, title: str, notes: Notes) -> None:
    if unit.control_mode not in ("Balanced", 0):
        notes.ignore(f"{title} control_mode")
    if unit.hr_option not in ("Both", "HiResFixOption.BOTH", 0):
        notes.ignore(f"{title} hr_option")
    if by_canny:
        for name, ours in zip(("threshold_a", "threshold_b"), _CANNY_THRESHOLDS, strict=True):
            if unit.undeclared.get(name, ours) not in (ours, -1):
                notes.ignore(f"{title} {name}")
