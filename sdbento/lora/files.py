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
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open

from sdbento.catalog import hub
from sdbento.catalog.folder import list_files
from sdbento.errors import (
    InvalidParameter,
    ModelLoadFailed,
    SDBentoError,
    TooLarge,
    UnknownModel,
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
    """Download the file if it is not here, and read it. Blocking.

    Raises InvalidParameter, UnsupportedModel, TooLarge, or the error that the Hub or the network
    caused, as `errors.classify` has it.
    """
    try:
        match source.place:
            case Url(address):
                data = fetch_blocking(address, settings, max_bytes=MAX_LORA_BYTES, param="lora")
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
    config = str(PurePosixPath(file).with_name(PEFT_CONFIG))
    if file.endswith(PEFT_WEIGHTS) and sizes.get(config, MAX_CONFIG_BYTES + 1) <= MAX_CONFIG_BYTES:
        hf_hub_download(place.repo, config)
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
    """The metadata of a file in memory, which `safetensors.torch.load` does not return."""
    length = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    return metadata


def _check_size(name: str, num_bytes: int) -> None:
    if num_bytes > MAX_LORA_BYTES:
        raise TooLarge(
            f"LoRA {name} has {num_bytes} bytes; the limit is {MAX_LORA_BYTES}", param="lora"
        )
