"""What is in a LoRA's file, which is downloaded first if it is not here.

Only safetensors are read. Knows nothing of models or of what the tensors mean: see `layers`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from sdbento.catalog import hub
from sdbento.catalog.downloads.process import HubError, HubProcess
from sdbento.catalog.downloads.room import disk
from sdbento.catalog.families import check_header
from sdbento.catalog.folder import list_files
from sdbento.errors import (
    InvalidParameter,
    ModelLoadFailed,
    SDBentoError,
    TooLarge,
    classify,
    nearest_names,
)
from sdbento.lora.lookup import (
    STEM,
    SUFFIX,
    HubFile,
    LoraSource,
    Url,
    refusal,
    unknown,
    unreadable,
)
from sdbento.outbound.http import fetch_blocking
from sdbento.settings import Settings

log = logging.getLogger(__name__)

MAX_LORA_BYTES = 1_500_000_000
# PEFT's own two files: what the second says of the first, such as its alpha, is in no tensor.
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
MAX_CONFIG_BYTES = 1_000_000


@dataclass(frozen=True)
class LoraFile:
    """What is in a file. The tensors may share memory with the file: copy them to keep them.

    `metadata` has the text of PEFT's configuration as `PEFT_CONFIG`, where it lies beside the file.
    """

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def read(source: LoraSource, settings: Settings) -> LoraFile:
    """Read the file; one of the Hub must be on this machine (`fetch_lora`). Blocking.

    Raises InvalidParameter, UnsupportedModel, TooLarge, or the error that the Hub or the network
    caused, as `errors.classify` has it.
    """
    try:
        match source.place:
            case Url(address):
                data = fetch_blocking(address, settings, max_bytes=MAX_LORA_BYTES, param="lora")
                return LoraFile(safetensors.torch.load(data), _metadata(data))
            case HubFile():
                return _open(source.name, _from_cache(source.name, source.place, settings))
            case path:
                return _open(source.name, path)
    except SDBentoError:
        raise
    except SafetensorError as exc:
        raise refusal(source.name, "it is no safetensors file, or a damaged one") from exc
    except Exception as exc:
        error = classify(exc)
        raise _named(source.name, error) from exc


def _named(name: str, error: SDBentoError) -> SDBentoError:
    reason = error.message.replace("the model's", "its").replace("the model ", "it ")
    return type(error)(f"LoRA {name}: {reason}", param="lora")


def fetch_lora(name: str, place: HubFile, settings: Settings, process: HubProcess) -> None:
    """Download a file of the Hub; where the Hub cannot be reached, this machine's cache serves.

    Blocking; ending `process` ends it. Raises errors of the `errors` tree.
    """
    if hub.is_offline(settings.offline):
        return
    try:
        _from_hub(name, place, process)
    except HubError as exc:
        if exc.kind != "absent" and _is_cached(name, place, settings):
            log.info("LoRA %s: %s; the one in the cache is used", name, exc)
            return
        if exc.kind == "absent":
            raise unknown(name, settings) from exc
        raise _named(name, exc.error) from exc


def _from_hub(name: str, place: HubFile, process: HubProcess) -> None:
    listing = process.list(place.repo)
    file = _pick(name, place, listing.files)
    _check_size(name, listing.size([file]))
    wanted = [file]
    config = str(PurePosixPath(file).with_name(PEFT_CONFIG))
    known = listing.files.get(config) if file.endswith(PEFT_WEIGHTS) else None
    if known is not None and known.size <= MAX_CONFIG_BYTES:
        wanted.append(config)
    with disk.hold(listing, wanted):
        process.get(listing, wanted, whole=True)


def _is_cached(name: str, place: HubFile, settings: Settings) -> bool:
    try:
        return _from_cache(name, place, settings).is_file()
    except SDBentoError:
        return False


def _from_cache(name: str, place: HubFile, settings: Settings) -> Path:
    """Raises ModelLoadFailed where it is not there."""
    off = " and downloads are switched off" if hub.is_offline(settings.offline) else ""
    absent = ModelLoadFailed(f"LoRA {name} is not on this machine{off}", param="lora")
    try:
        folder = hub.cached_folder(place.repo)
    except OSError as error:
        raise absent from error
    files = list_files(folder)
    try:
        return folder / _pick(name, place, files)
    except InvalidParameter as error:
        if place.file is None and any(file.endswith(SUFFIX) for file in files):
            raise
        raise absent from error  # it may be on the Hub and not in the cache


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
        check_header(name, path)
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in list(file.keys())}
            return LoraFile(tensors, _peft_config(path) | (file.metadata() or {}))
    except OSError as error:
        raise unreadable(name) from error


def _peft_config(path: Path) -> dict[str, str]:
    config = path.with_name(PEFT_CONFIG)
    if path.name != PEFT_WEIGHTS or not config.is_file():
        return {}
    if config.stat().st_size > MAX_CONFIG_BYTES:
        return {}
    return {PEFT_CONFIG: config.read_text(encoding="utf-8", errors="replace")}


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of a file in memory, which `safetensors.torch.load` does not return. That has
    found the header to be good: its reader takes no deep nesting."""
    length = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    return metadata


def _check_size(name: str, num_bytes: int) -> None:
    if num_bytes > MAX_LORA_BYTES:
        raise TooLarge(
            f"LoRA {name} has {num_bytes} bytes; the limit is {MAX_LORA_BYTES}", param="lora"
        )
