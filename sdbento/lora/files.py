"""Which file a LoRA's name means, and what is in that file.

A name is looked up in the LoRA folder and the catalogue. If the settings allow it, it may also be a
local path, a file on the Hub, or an https URL. A requested name never becomes part of a path in the
LoRA folder: it is compared with what the folder lists. Only safetensors are read. Knows nothing of
models or of what the tensors mean: see `layers`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import safetensors.torch
import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open

from sdbento.catalog import hub
from sdbento.catalog.families import PICKLED, Family
from sdbento.catalog.folder import list_files
from sdbento.catalog.specs import LoraSpec, catalogued_loras
from sdbento.errors import (
    InvalidParameter,
    ModelLoadFailed,
    SDBentoError,
    TooLarge,
    UnknownModel,
    UnsupportedModel,
    classify,
    nearest_names,
)
from sdbento.outbound import fetch, is_url
from sdbento.settings import Settings

log = logging.getLogger(__name__)

MAX_LORA_BYTES = 1_500_000_000
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
    changed: tuple[int, int] = (0, 0)  # a local file's time and size


@dataclass(frozen=True)
class LoraFile:
    """What is in a file. The tensors may share memory with the file: copy them to keep them."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def known_names(settings: Settings) -> list[str]:
    """Names in the LoRA folder and the catalogue."""
    names = [*_folder(settings.lora_dir), *(spec.name for spec in catalogued_loras())]
    return list(dict.fromkeys(names))


def is_known(name: str, settings: Settings) -> bool:
    """Whether a name is one of the LoRA folder or the catalogue."""
    return bool(_in_folder(name, settings)) or _catalogued(name) is not None


def nearest(name: str, settings: Settings) -> str:
    """What to add to a message that there is no such LoRA: names like it, if there are any."""
    names = known_names(settings)
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
    if settings.allow_any_model and (path := _local(name)) is not None:
        return _on_disk(name, path)
    if settings.allow_lora_hub and (place := _hub_file(name)) is not None:
        return LoraSource(name.removesuffix(SUFFIX), place)
    raise unknown(name, settings)


def read(source: LoraSource, settings: Settings) -> LoraFile:
    """Download the file if it is not here, and read it. Blocking.

    Raises InvalidParameter, UnsupportedModel, TooLarge, or the error that the Hub or the network
    caused, as `errors.classify` has it.
    """
    try:
        match source.place:
            case Url(address):
                data = fetch(address, settings, max_bytes=MAX_LORA_BYTES, param="lora")
                return LoraFile(safetensors.torch.load(data), _metadata(data))
            case HubFile():
                return _open(source.name, _download(source.name, source.place, settings))
            case path:
                return _open(source.name, path)
    except SDBentoError:
        raise
    except SafetensorError as exc:
        raise refusal(source.name, "it is no safetensors file, or a damaged one") from exc
    except Exception as exc:
        error = classify(exc)
        if isinstance(error, UnknownModel):
            raise unknown(source.name, settings) from exc
        reason = error.message.replace("the model's", "its").replace("the model ", "it ")
        raise type(error)(f"LoRA {source.name}: {reason}", param="lora") from exc


def refusal(name: str, reason: str) -> UnsupportedModel:
    return UnsupportedModel(f"LoRA {name} is not supported: {reason}", param="lora")


def unknown(name: str, settings: Settings) -> InvalidParameter:
    """The error for an unknown name, with those like it and the settings that rule out others."""
    hint = nearest(name, settings)
    if not settings.allow_any_model:
        hint += "; paths are not taken from requests (SDBENTO_ALLOW_ANY_MODEL=false)"
    if not settings.allow_lora_hub:
        hint += "; the Hub is not asked (SDBENTO_ALLOW_LORA_HUB=false)"
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
        return _on_disk(spec.name, Path(spec.source), spec.family)
    return LoraSource(spec.name, place, spec.family)


def _on_disk(name: str, file: Path, family: Family | None = None) -> LoraSource:
    try:
        stat = file.stat()
    except OSError as error:
        raise _unreadable(name) from error
    return LoraSource(name, file, family, (stat.st_mtime_ns, stat.st_size))


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


def _download(name: str, place: HubFile, settings: Settings) -> Path:
    """The file from the Hub, or from this machine's cache if the Hub cannot be reached."""
    if hub.is_offline(settings.offline):
        try:
            return _from_cache(name, place)
        except OSError as error:
            raise ModelLoadFailed(
                f"LoRA {name} is not on this machine and downloads are switched off", param="lora"
            ) from error
    try:
        return _from_hub(name, place)
    except (HfHubHTTPError, SDBentoError):  # the Hub was reached, and refused
        raise
    except Exception:
        try:
            return _from_cache(name, place)
        except Exception as error:
            log.info("LoRA %s is not in the cache either: %s", name, error)
        raise


def _from_hub(name: str, place: HubFile) -> Path:
    listed = HfApi().model_info(place.repo, files_metadata=True).siblings or ()
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in listed}
    file = _pick(name, place, sizes)
    _check_size(name, sizes[file])
    return Path(hf_hub_download(place.repo, file))


def _from_cache(name: str, place: HubFile) -> Path:
    # All files are ignored, so that a snapshot with only some of the repository's is found too.
    folder = Path(snapshot_download(place.repo, local_files_only=True, ignore_patterns="*"))
    files = list_files(folder)
    try:
        return folder / _pick(name, place, files)
    except InvalidParameter as error:
        if place.file is None and any(file.endswith(SUFFIX) for file in files):
            raise
        raise FileNotFoundError from error  # it may be on the Hub and not in the cache


def _pick(name: str, place: HubFile, files: Iterable[str]) -> str:
    """The file of the repository that `place` means. `name` is only for messages."""
    weights = [file for file in files if file.endswith(SUFFIX)]
    if place.file is not None:
        wanted = place.file.removesuffix(SUFFIX) + SUFFIX
    elif len(weights) == 1:
        return weights[0]
    else:
        wanted = STEM + SUFFIX
    if wanted in weights:
        return wanted
    if not weights:
        raise refusal(name, f"{place.repo} has no .safetensors file")
    near = nearest_names(wanted, weights, cutoff=0)
    raise InvalidParameter(
        f"LoRA {name}: say which file of {place.repo} is meant, as in "
        f"{', '.join(f'{place.repo}/{file}' for file in near)}",
        param="lora",
    )


def _open(name: str, path: Path) -> LoraFile:
    try:
        _check_size(name, path.stat().st_size)
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in list(file.keys())}
            return LoraFile(tensors, file.metadata() or {})
    except OSError as error:
        raise _unreadable(name) from error


def _unreadable(name: str) -> ModelLoadFailed:
    return ModelLoadFailed(f"LoRA {name}: its file cannot be read", param="lora")


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of a file in memory, which `safetensors.torch.load` does not return."""
    length = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    return metadata


def _check_size(name: str, num_bytes: int) -> None:
    if num_bytes > MAX_LORA_BYTES:
        raise TooLarge(
            f"LoRA {name} has {num_bytes} bytes; the limit is {MAX_LORA_BYTES}", param="lora"
        )
