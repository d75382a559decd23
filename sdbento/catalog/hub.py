"""A model's or ControlNet's files: from a folder, from the Hub or one of its mirrors, or offline.

Knows nothing of devices and of what is in the files. huggingface_hub shows progress by its own
bars.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import (
    constants,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import get_session, hf_raise_for_status

from sdbento.catalog.downloads.process import HubError, HubProcess, Listing
from sdbento.catalog.downloads.room import disk
from sdbento.catalog.families import Kind, refusal
from sdbento.catalog.folder import list_files
from sdbento.catalog.layout import INDEX, Layout, controlnet_layout, model_layout
from sdbento.catalog.specs import ControlNetSpec, ModelSpec, Spec
from sdbento.errors import ModelLoadFailed, Unavailable, classify

log = logging.getLogger(__name__)

MB = 1_000_000
MAX_CONFIG_BYTES = MB  # of one JSON file; real ones have a few thousand
MAX_CONFIGS_BYTES = 50 * MB  # of all configurations and tokenizers; real ones have 2 to 4 MB
READ_SECONDS = 20.0  # in which the Hub sends a configuration

Select = Callable[[Layout, Collection[str]], list[str]]
Check = Callable[[int], None]  # given bytes of memory, raises where a model needs too many


def read_json(
    name: str, source: str, path: str, offline: bool, kind: Kind = "model"
) -> dict[str, Any]:
    """A configuration of a local folder or of a Hub repository, from the cache where it has it.

    `name` is what messages call the source, whose own path is nobody's business. Raises
    UnsupportedModel, or what keeps the Hub from being asked.
    """
    file: Path | None = Path(source, path)
    if not Path(source).is_absolute():
        cached = try_to_load_from_cache(source, path)
        file = Path(cached) if isinstance(cached, str) else None
    try:
        content = json.loads(_read_remote(source, path, offline) if file is None else _read(file))
    except RecursionError as error:
        raise refusal(name, f"its {path} is nested too deeply", kind) from error
    except _Unreadable as error:
        raise refusal(name, f"its {path} {error}", kind) from error
    except ValueError as error:
        raise refusal(name, f"its {path} cannot be read", kind) from error
    if not isinstance(content, dict):
        raise refusal(name, f"its {path} is not a JSON object", kind)
    return content


class _Unreadable(Exception):
    """Why a configuration is not read, as the end of a sentence about it."""


def _read(file: Path) -> bytes:
    try:
        if file.is_file() and file.stat().st_size > MAX_CONFIG_BYTES:
            raise _Unreadable(_TOO_LARGE)
        return file.read_bytes()
    except OSError as error:
        raise _Unreadable("cannot be read") from error


_TOO_LARGE = f"has more than {MAX_CONFIG_BYTES} bytes"


def _read_remote(repo: str, path: str, offline: bool) -> bytes:
    """A small file of a repository. Not by `hf_hub_download`, which takes as many bytes and as long
    as the Hub gives it."""
    if is_offline(offline):
        raise LocalEntryNotFoundError(f"{repo} is not in the cache")
    give_up = time.monotonic() + READ_SECONDS
    content = b""
    try:
        with get_session().stream(
            "GET",
            hf_hub_url(repo, path),
            headers=build_hf_headers(),
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        ) as answer:
            hf_raise_for_status(answer)
            for chunk in answer.iter_bytes():
                content += chunk
                if len(content) > MAX_CONFIG_BYTES:
                    raise _Unreadable(_TOO_LARGE)
                if time.monotonic() > give_up:
                    raise TimeoutError(f"{repo}: {path} takes longer than {READ_SECONDS} seconds")
    except Exception as error:
        if isinstance(classify(error), Unavailable) and not isinstance(error, HfHubHTTPError):
            raise LocalEntryNotFoundError(f"{repo}: {error}") from error
        raise
    return content


def read_layout(spec: Spec, source: str, offline: bool) -> Layout:
    """Which parts `spec` has in `source`, a Hub id or the absolute path of a folder."""
    if isinstance(spec, ControlNetSpec):
        return controlnet_layout(spec.name)
    return model_layout(spec.name, read_json(spec.name, source, INDEX, offline))


def fetch(
    spec: Spec,
    half: bool,
    offline: bool,
    prefer_cache: bool = False,
    *,
    hub: HubProcess | None = None,
    check: Check = lambda _: None,
) -> Path:
    """The folder or single file that `spec` is loaded from, downloaded where it must be.

    `half` prefers fp16 variants of the weights. When the Hub cannot be reached, the cache serves if
    it holds everything; `prefer_cache` looks there first. `hub` is asked, and may be ended by
    others; None: one of its own. `check` is given the memory that the weights need at least, before
    they are downloaded. Raises errors of the `errors` tree, and what huggingface_hub raises for its
    cache.
    """

    def select(layout: Layout, files: Collection[str]) -> list[str]:
        return layout.configs(files) + layout.weights(files, half)

    def remote(source: str, process: HubProcess) -> Path:
        listing, layout = _ask(spec, source, process)
        weights = layout.weights(listing.files, half)
        check(_least_memory(listing, weights, half))
        return _download(listing, [*layout.configs(listing.files), *weights], layout, process)

    return _fetch(spec, select, remote, offline, prefer_cache, hub)


def fetch_configs(
    spec: ModelSpec, offline: bool, prefer_cache: bool = False, *, hub: HubProcess | None = None
) -> Path:
    """As `fetch`, but the configurations and tokenizers only: 2 MB."""

    def remote(source: str, process: HubProcess) -> Path:
        listing, layout = _ask(spec, source, process)
        return _download(listing, layout.configs(listing.files), layout, process)

    return _fetch(spec, Layout.configs, remote, offline, prefer_cache, hub)


def is_offline(offline: bool) -> bool:
    """Whether downloads are switched off, by our setting or by huggingface_hub's."""
    return offline or constants.HF_HUB_OFFLINE


def cached_folder(repo: str) -> Path:
    """What the cache has of a repository, be it only some of its files. Raises
    LocalEntryNotFoundError where it has nothing."""
    # All files are ignored, as a snapshot with only some of the repository's is refused otherwise.
    return Path(snapshot_download(repo, local_files_only=True, ignore_patterns="*"))


def _fetch(
    spec: Spec,
    select: Select,
    remote: Callable[[str, HubProcess], Path],
    offline: bool,
    prefer_cache: bool,
    hub: HubProcess | None,
) -> Path:
    path = Path(spec.sources[0])
    if path.is_dir() and path.is_absolute():
        read_layout(spec, str(path), offline=True).check_configs(list_files(path))
    if path.is_absolute():
        return path
    process = hub or HubProcess()

    def find(source: str, cached_only: bool) -> Path:
        if not cached_only:
            return remote(source, process)
        layout, folder = read_layout(spec, source, offline=True), cached_folder(source)
        files = list_files(folder)
        select(layout, files)  # raises if the cache lacks weights
        layout.check_configs(files)
        return folder

    try:
        return _try_sources(spec.sources, offline, prefer_cache, find)
    finally:
        if hub is None:
            process.end()


def _ask(spec: Spec, source: str, process: HubProcess) -> tuple[Listing, Layout]:
    """What the Hub has there now, and which parts of it `spec` has."""
    listing = process.list(source)
    if isinstance(spec, ControlNetSpec):
        return listing, controlnet_layout(spec.name)
    if INDEX not in listing.files:
        raise ModelLoadFailed(f"model {spec.name} lacks {INDEX}")
    if listing.files[INDEX].size > MAX_CONFIG_BYTES:
        raise refusal(spec.name, f"its {INDEX} {_TOO_LARGE}")
    folder = process.get(listing, [INDEX], whole=False)
    return listing, read_layout(spec, str(folder), offline=True)


def _download(
    listing: Listing, paths: Collection[str], layout: Layout, process: HubProcess
) -> Path:
    layout.check_configs(paths)
    if (size := listing.size(layout.configs(paths))) > MAX_CONFIGS_BYTES:
        reason = f"its configurations have {size} bytes, of which {MAX_CONFIGS_BYTES} are read"
        raise refusal(layout.name, reason, layout.kind)
    with disk.hold(listing, paths):
        return process.get(listing, paths, whole=True)


def _least_memory(listing: Listing, weights: Sequence[str], half: bool) -> int:
    """Bytes that weights take in memory at least: files that are not marked as fp16 may be fp32."""
    stored = sum(listing.files[path].size // (2 if ".fp16" in path else 4) for path in weights)
    return stored * (2 if half else 4)


def _try_sources(
    sources: Sequence[str],
    offline: bool,
    prefer_cache: bool,
    find: Callable[[str, bool], Path],
) -> Path:
    """What `find(source, cached_only)` returns for the first source that succeeds.

    The Hub is tried before the cache, or after it with `prefer_cache`. An error that says that the
    network is down, or the disk full, ends the attempts at the Hub; otherwise each mirror would
    wait for its timeout.
    """
    errors: list[Exception] = []
    reachable = not is_offline(offline)
    places = (True, False) if prefer_cache else (False, True)
    for source, cached_only in [(source, place) for place in places for source in sources]:
        if not (reachable or cached_only):
            continue
        try:
            return find(source, cached_only)
        except HubError as error:
            errors.append(error)
            reachable = error.kind in ("absent", "refused")
        except (LocalEntryNotFoundError, ModelLoadFailed) as error:
            errors.append(error)
        log.info("%s (%s): %s", source, "cache" if cached_only else "Hub", errors[-1])
    raise _most_helpful(errors)


def _most_helpful(errors: list[Exception]) -> Exception:
    """A full disk says more than that a mirror failed, and that more than that the original has
    left the Hub; each more than that the cache has nothing."""

    def rank(error: Exception) -> int:
        if isinstance(error, HubError):
            return {"disk": 0, "absent": 2}.get(error.kind, 1)
        return 3 if isinstance(error, LocalEntryNotFoundError) else 1

    first = min(errors, key=rank)
    return first.error if isinstance(first, HubError) else first
