"""A model's or ControlNet's files on the Hub: which are needed, from which mirror, also offline.

Only configurations, tokenizers and safetensors weights are ever asked for. Knows nothing of names
and devices; progress is shown by huggingface_hub's own bars.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from sdbento.catalog.families import PICKLED, Kind, refusal
from sdbento.errors import ModelLoadFailed, SDBentoError

log = logging.getLogger(__name__)

T = TypeVar("T")

INDEX = "model_index.json"
UNET = "unet/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
CONFIG = "config.json"  # of a network; a ControlNet's lies beside its weights
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
_SHARD = r"(?:-\d{5}-of-\d{5})?"
_WEIGHTS = re.compile(
    rf"(?:diffusion_pytorch_)?model(\.fp16)?{_SHARD}(\.fp16)?\.safetensors(?:\.index(\.fp16)?\.json)?"
)


def read_json(source: str, path: str, offline: bool, kind: Kind = "model") -> dict[str, Any]:
    """A configuration of a local folder or of a Hub repository, from the cache where it has it."""
    if Path(source).is_absolute():
        file = Path(source, path)
    elif isinstance(cached := try_to_load_from_cache(source, path), str):
        file = Path(cached)
    else:
        file = Path(hf_hub_download(source, path, local_files_only=is_offline(offline)))
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refusal(source, f"its {path} cannot be read", kind) from error
    if not isinstance(content, dict):
        raise refusal(source, f"its {path} is not a JSON object", kind)
    return content


def fetch(
    name: str, sources: Sequence[str], half: bool, offline: bool, prefer_cache: bool = False
) -> Path:
    """The folder or file that `name` is loaded from, downloaded where it must be.

    `half` prefers fp16 variants of the weights. What cannot be reached is taken from the cache if
    it is all there. Raises what the Hub raises, or errors of the `errors` tree.
    """
    if (path := Path(sources[0])).is_absolute():
        if path.is_dir():
            require_configs(name, path, read_json(sources[0], INDEX, offline))
        return path
    return _first(
        sources, offline, prefer_cache, lambda source, local: _fetch(name, source, half, local)
    )


def fetch_controlnet(
    name: str, sources: Sequence[str], half: bool, offline: bool, prefer_cache: bool = False
) -> Path:
    """As `fetch`, of a ControlNet."""
    if Path(sources[0]).is_absolute():
        return Path(sources[0])
    return _first(
        sources,
        offline,
        prefer_cache,
        lambda source, local: _fetch_controlnet(name, source, half, local),
    )


def fetch_configs(
    name: str, sources: Sequence[str], offline: bool, prefer_cache: bool = False
) -> Path:
    """As `fetch`, but the configurations and tokenizers only: 2 MB."""
    return _first(
        sources, offline, prefer_cache, lambda source, local: _fetch_configs(name, source, local)
    )


def is_offline(offline: bool) -> bool:
    return offline or constants.HF_HUB_OFFLINE


def local_files(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return [path.relative_to(folder).as_posix() for path in files]


def needed_weights(
    name: str, files: Iterable[str], index: Mapping[str, Any], half: bool
) -> list[str]:
    """The safetensors files of every network in `index`, in one variant each.

    Raises UnsupportedModel where there are only pickled weights, ModelLoadFailed where none.
    """
    files = list(files)
    return [
        file
        for network in NETWORKS
        if _has(index, network)
        for file in _weights_of(name, network, files, half)
    ]


def controlnet_weights(name: str, files: Iterable[str], half: bool) -> list[str]:
    """As `needed_weights`, of a ControlNet, whose weights lie beside its configuration."""
    beside = [file for file in files if "/" not in file and not file.startswith("model.")]
    if found := _one_variant(beside, "", half):
        return found
    if any(file.endswith(PICKLED) for file in beside):
        reason = "it has pickled weights only; safetensors are needed"
        raise refusal(name, reason, "ControlNet")
    raise ModelLoadFailed(f"ControlNet {name}: its weights are not there")


def _weights_of(name: str, network: str, files: Sequence[str], half: bool) -> list[str]:
    inside = [file for file in files if file.startswith(f"{network}/")]
    if found := _one_variant(inside, f"{network}/", half):
        return found
    if any(file.endswith(PICKLED) for file in inside):
        raise refusal(name, f"its {network} has pickled weights only; safetensors are needed")
    raise ModelLoadFailed(f"model {name}: the weights of its {network} are not there")


def _one_variant(files: Sequence[str], prefix: str, half: bool) -> list[str]:
    """The weights in half precision or in full, whichever is wanted, else the other."""
    by_half: dict[bool, list[str]] = {True: [], False: []}
    for file in files:
        if match := _WEIGHTS.fullmatch(file.removeprefix(prefix)):
            by_half[any(match.groups())].append(file)
    return by_half[half] or by_half[not half]


def require_configs(name: str, folder: Path, index: Mapping[str, Any]) -> None:
    """Raise ModelLoadFailed where `folder` lacks what a component of `index` is made from.

    transformers makes an empty tokenizer of a folder without a vocabulary, and every prompt would
    give the same picture.
    """
    files = set(local_files(folder))
    needed = [SCHEDULER, *(f"{network}/{CONFIG}" for network in NETWORKS if _has(index, network))]
    for tokenizer in (tokenizer for tokenizer in TOKENIZERS if _has(index, tokenizer)):
        parts = ("vocab.json", "merges.txt") if f"{tokenizer}/tokenizer.json" not in files else ()
        needed += [f"{tokenizer}/{part}" for part in (*parts, "tokenizer_config.json")]
    if lacking := [file for file in needed if file not in files]:
        raise ModelLoadFailed(f"model {name} lacks {', '.join(lacking)}")


def _needed_configs(files: Iterable[str], index: Mapping[str, Any]) -> list[str]:
    wanted = {INDEX, SCHEDULER}
    wanted |= {f"{network}/{CONFIG}" for network in NETWORKS if _has(index, network)}
    folders = tuple(f"{tokenizer}/" for tokenizer in TOKENIZERS if _has(index, tokenizer))
    return [
        file
        for file in files
        if file in wanted or (file.startswith(folders) and file.endswith((".json", ".txt")))
    ]


def _has(index: Mapping[str, Any], component: str) -> bool:
    return any(index.get(component) or ())


def _fetch(name: str, source: str, half: bool, offline: bool) -> Path:
    index = read_json(source, INDEX, offline)
    if offline:
        folder = Path(snapshot_download(source, local_files_only=True))
        needed_weights(name, local_files(folder), index, half)
    else:
        files = HfApi().list_repo_files(source)
        wanted = _needed_configs(files, index) + needed_weights(name, files, index, half)
        folder = Path(snapshot_download(source, allow_patterns=wanted))
    require_configs(name, folder, index)
    return folder


def _fetch_controlnet(name: str, source: str, half: bool, offline: bool) -> Path:
    if offline:
        folder = Path(snapshot_download(source, local_files_only=True))
        controlnet_weights(name, local_files(folder), half)
        return folder
    weights = controlnet_weights(name, HfApi().list_repo_files(source), half)
    return Path(snapshot_download(source, allow_patterns=[CONFIG, *weights]))


def _fetch_configs(name: str, source: str, offline: bool) -> Path:
    index = read_json(source, INDEX, offline)
    if offline:
        folder = Path(snapshot_download(source, local_files_only=True))
    else:
        wanted = _needed_configs(HfApi().list_repo_files(source), index)
        folder = Path(snapshot_download(source, allow_patterns=wanted))
    require_configs(name, folder, index)
    return folder


def _first(
    sources: Sequence[str], offline: bool, prefer_cache: bool, attempt: Callable[[str, bool], T]
) -> T:
    """What the first source gives that can be reached; else what the cache has of any.

    `prefer_cache`: the other way round.
    """
    errors: list[Exception] = []
    reachable = not is_offline(offline)
    places = (True, False) if prefer_cache else (False, True)
    attempts = [(source, local) for local in places for source in sources]
    for source, local in attempts:
        if not (reachable or local):
            continue
        try:
            return attempt(source, local)
        except (HfHubHTTPError, ModelLoadFailed) as error:  # of this source, not of the network
            errors.append(error)
        except SDBentoError:
            raise
        except Exception as error:
            errors.append(error)
            reachable = reachable and local
        log.info("%s (%s): %s", source, "cache" if local else "Hub", errors[-1])
    # A mirror that failed says more than a repository that left the Hub.
    telling = [error for error in errors if not isinstance(error, RepositoryNotFoundError)]
    raise (telling or errors)[0]
