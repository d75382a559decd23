"""Looks up the names of LoRAs: which file each one means, and where that is.

A name is looked up in the LoRA folder and the catalogue. If the settings allow it, it may also be a
local path, a file on the Hub, or an https URL. A requested name never becomes part of a path in the
LoRA folder: it is compared with what the folder lists. Opens no file: see `files`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from sdbento.catalog.families import PICKLED, Family
from sdbento.catalog.folder import list_files
from sdbento.catalog.permission import loras_allowed, paths_allowed
from sdbento.catalog.specs import LoraSpec, catalogued_loras
from sdbento.errors import InvalidParameter, ModelLoadFailed, UnsupportedModel, nearest_names
from sdbento.outbound.urls import is_url
from sdbento.settings import Settings

SUFFIX = ".safetensors"
STEM = "pytorch_lora_weights"  # of the file that diffusers writes into a folder
_HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/(.+))?", re.ASCII)


@dataclass(frozen=True)
class HubFile:
    """A file of a repository; None: its only safetensors file, or the one that diffusers wrote."""

    repo: str
    file: str | None


@dataclass(frozen=True)
class Url:
    address: str


@dataclass(frozen=True)
class LoraSource:
    """Where a LoRA is. Two are equal if they mean the same version of the same file."""

    name: str
    place: Path | HubFile | Url
    family: Family | None = None  # None: the catalogue does not say
    model: str | None = None  # the only one that it fits, if the catalogue says so
    changed: tuple[int, int] = (0, 0)  # a local file's time and size


def known(settings: Settings) -> dict[str, str | None]:
    """Names in the LoRA folder and the catalogue, with the only model that each fits, if that is
    known."""
    names: dict[str, str | None] = dict.fromkeys(_folder(settings.lora_dir))
    for spec in catalogued_loras():
        names.setdefault(spec.name, spec.model)
    return names


def is_known(name: str, settings: Settings) -> bool:
    """Whether a name is one of the LoRA folder or the catalogue."""
    return bool(_in_folder(name, settings)) or _catalogued(name) is not None


def nearest(name: str, settings: Settings) -> str:
    """What to add to a message that there is no such LoRA: names like it, if there are any."""
    names = [*known(settings)]
    near = nearest_names(name, names) or names[:3]
    return f"; the nearest: {', '.join(near)}" if near else "; this server has none of its own"


def locate(name: str, settings: Settings) -> LoraSource:
    """Where the LoRA of that name is. Reads this machine's disk, and uses no network.

    Raises InvalidParameter for a name that is unknown, ambiguous or forbidden by the settings,
    UnsupportedModel for a pickled file, and ModelLoadFailed for a file that cannot be read.
    """
    if is_url(name):
        return _url(name, settings)
    if name.lower().endswith(PICKLED):
        raise refusal(name, "pickled weights can run code when loaded; only safetensors are read")
    if len(found := _in_folder(name, settings)) > 1:
        raise InvalidParameter(
            f"the LoRA name {name!r} is ambiguous: {', '.join(sorted(found))}", param="lora"
        )
    for canonical, file in found.items():
        return _on_disk(canonical, file)
    if (spec := _catalogued(name)) is not None:
        return _from_catalogue(spec)
    if paths_allowed(settings) and (path := _local(name)) is not None:
        return _on_disk(name, path)
    if (place := _hub_file(name)) is not None and loras_allowed(place.repo, settings):
        return LoraSource(name.removesuffix(SUFFIX), place)
    raise unknown(name, settings)


def refusal(name: str, reason: str) -> UnsupportedModel:
    return UnsupportedModel(f"LoRA {name} is not supported: {reason}", param="lora")


def unreadable(name: str) -> ModelLoadFailed:
    return ModelLoadFailed(f"LoRA {name}: its file cannot be read", param="lora")


def unknown(name: str, settings: Settings) -> InvalidParameter:
    """The error for an unknown name, with those like it and the settings that rule out others."""
    hint = nearest(name, settings)
    if not paths_allowed(settings):
        hint += "; paths are not taken from requests (SDBENTO_ALLOW_ANY_MODEL)"
    if not settings.allow_lora_hub:
        hint += "; the Hub is not asked (SDBENTO_ALLOW_LORA_HUB=false)"
    elif settings.hub_owners:
        hint += "; of the Hub, only what SDBENTO_HUB_OWNERS names may be used"
    return InvalidParameter(f"there is no LoRA {name!r}{hint}", param="lora")


def _url(name: str, settings: Settings) -> LoraSource:
    shown = name.partition("?")[0]  # the query may contain somebody's token
    if not settings.allow_lora_urls:
        raise InvalidParameter(
            f"LoRA {shown}: URLs are not allowed here (SDBENTO_ALLOW_LORA_URLS=false)", param="lora"
        )
    try:
        path = urlsplit(name).path
    except ValueError:
        raise InvalidParameter(f"LoRA {shown}: the URL is not valid", param="lora") from None
    if path.lower().endswith(PICKLED):
        raise refusal(shown, "pickled weights can run code when loaded; only safetensors are read")
    return LoraSource(shown, Url(name))


def _in_folder(name: str, settings: Settings) -> dict[str, Path]:
    """The LoRAs in the folder that a name may mean. A file name without its path is enough if no
    other file has it."""
    listed = _folder(settings.lora_dir)
    wanted = name.removesuffix(SUFFIX)
    for key in (wanted, wanted.removesuffix(f"/{STEM}")):
        if key in listed:
            return {key: listed[key]}
    return {key: file for key, file in listed.items() if key.rpartition("/")[2] == wanted}


def _folder(root: Path) -> dict[str, Path]:
    """Files by name. A folder that diffusers wrote has its own name, unless a file has that."""
    files = {key.removesuffix(SUFFIX): file for key, file in list_files(root, SUFFIX).items()}
    named = {}
    for key, file in files.items():
        folder, _, stem = key.rpartition("/")
        named[folder if stem == STEM and folder and folder not in files else key] = file
    return named


def _catalogued(name: str) -> LoraSpec | None:
    wanted = name.casefold()
    return next(
        (s for s in catalogued_loras() if wanted in map(str.casefold, (*s.names, s.source))), None
    )


def _from_catalogue(spec: LoraSpec) -> LoraSource:
    place = _hub_file(spec.source)
    if place is None or Path(spec.source).is_absolute():
        return _on_disk(spec.name, Path(spec.source), spec)
    return LoraSource(spec.name, place, spec.family, spec.model)


def _on_disk(name: str, file: Path, spec: LoraSpec | None = None) -> LoraSource:
    try:
        stat = file.stat()
    except OSError as error:
        raise unreadable(name) from error
    family, model = (None, None) if spec is None else (spec.family, spec.model)
    return LoraSource(name, file, family, model, (stat.st_mtime_ns, stat.st_size))


def _local(name: str) -> Path | None:
    """The path of a file, given with or without its suffix, or of a folder that diffusers wrote."""
    whole = Path(name) if name.endswith(SUFFIX) else Path(f"{name}{SUFFIX}")
    for path in (whole, Path(name, STEM + SUFFIX)):
        try:
            if path.is_file():
                return path.absolute()
        except OSError:  # not a path: too long, or not readable
            continue
    return None


def _hub_file(name: str) -> HubFile | None:
    match = _HUB_NAME.fullmatch(name)
    return HubFile(match[1], match[2]) if match else None
