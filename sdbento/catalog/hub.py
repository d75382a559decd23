"""A model's or ControlNet's files: from a folder, from the Hub or one of its mirrors, or offline.

Knows nothing of devices and of what is in the files. huggingface_hub shows progress by its own
bars.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from sdbento.catalog.families import Kind, refusal
from sdbento.catalog.folder import list_files
from sdbento.catalog.layout import INDEX, Layout, controlnet_layout, model_layout
from sdbento.catalog.specs import ControlNetSpec, ModelSpec, Spec
from sdbento.errors import ModelLoadFailed, SDBentoError

log = logging.getLogger(__name__)

Select = Callable[[Layout, Collection[str]], list[str]]


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


def read_layout(spec: Spec, source: str, offline: bool) -> Layout:
    """Which parts `spec` has in `source`, a Hub id or the absolute path of a folder."""
    if isinstance(spec, ControlNetSpec):
        return controlnet_layout(spec.name)
    return model_layout(spec.name, read_json(source, INDEX, offline))


def fetch(spec: Spec, half: bool, offline: bool, prefer_cache: bool = False) -> Path:
    """The folder or single file that `spec` is loaded from, downloaded where it must be.

    `half` prefers fp16 variants of the weights. When the Hub cannot be reached, the cache serves if
    it holds everything; `prefer_cache` looks there first. Raises what the Hub raises, or errors of
    the `errors` tree.
    """

    def select(layout: Layout, files: Collection[str]) -> list[str]:
        return layout.configs(files) + layout.weights(files, half)

    return _fetch(spec, select, offline, prefer_cache)


def fetch_configs(spec: ModelSpec, offline: bool, prefer_cache: bool = False) -> Path:
    """As `fetch`, but the configurations and tokenizers only: 2 MB."""
    return _fetch(spec, Layout.configs, offline, prefer_cache)


def is_offline(offline: bool) -> bool:
    """Whether downloads are switched off, by our setting or by huggingface_hub's."""
    return offline or constants.HF_HUB_OFFLINE


def _fetch(spec: Spec, select: Select, offline: bool, prefer_cache: bool) -> Path:
    path = Path(spec.sources[0])
    if path.is_dir() and path.is_absolute():
        read_layout(spec, str(path), offline=True).check_configs(list_files(path))
    if path.is_absolute():
        return path

    def download(source: str, cached_only: bool) -> Path:
        layout = read_layout(spec, source, cached_only)
        if cached_only:
            folder = Path(snapshot_download(source, local_files_only=True))
            select(layout, list_files(folder))  # raises if the cache lacks weights
        else:
            wanted = select(layout, HfApi().list_repo_files(source))
            folder = Path(snapshot_download(source, allow_patterns=wanted))
        layout.check_configs(list_files(folder))
        return folder

    return _try_sources(spec.sources, offline, prefer_cache, download)


def _try_sources(
    sources: Sequence[str],
    offline: bool,
    prefer_cache: bool,
    download: Callable[[str, bool], Path],
) -> Path:
    """What `download(source, cached_only)` returns for the first source that succeeds.

    The Hub is tried before the cache, or after it with `prefer_cache`. An error that says that the
    network is down ends the attempts at the Hub; otherwise each mirror would wait for its timeout.
    """
    errors: list[Exception] = []
    reachable = not is_offline(offline)
    places = (True, False) if prefer_cache else (False, True)
    for source, cached_only in [(source, place) for place in places for source in sources]:
        if not (reachable or cached_only):
            continue
        try:
            return download(source, cached_only)
        except (HfHubHTTPError, ModelLoadFailed) as error:  # of this source, not of the network
            errors.append(error)
        except SDBentoError:
            raise
        except Exception as error:
            errors.append(error)
            reachable = reachable and cached_only
        log.info("%s (%s): %s", source, "cache" if cached_only else "Hub", errors[-1])
    # That a mirror failed is more helpful to know than that the original has left the Hub.
    helpful = [error for error in errors if not isinstance(error, RepositoryNotFoundError)]
    raise (helpful or errors)[0]
