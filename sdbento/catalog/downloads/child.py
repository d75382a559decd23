"""The process that talks to the Hub: lists repositories and downloads files, as its parent asks.

A process, because huggingface_hub cannot be cancelled: its threads, and the native ones of hf_xet,
go on until the last byte, and a host that hangs holds them for minutes. This process ends when its
standard input does, so also when its parent dies, and takes unfinished files with it. It ends as
well when a file grows beyond what the Hub announced.

    stdin   a command a line: {"list": REPO}, or
            {"get": REPO, "revision": SHA, "files": {PATH: [BYTES, BLOB]}, "whole": true}
    stdout  an answer a line: {"ok": ...}, or {"error": CLASS, "message": TEXT, "kind": KIND}, with
            "last" where this process ends

Knows nothing of models, nor of who waits for the files.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import disable_progress_bars

from sdbento.errors import ModelLoadFailed, classify, unexplained

LOOK = 0.2  # seconds between two looks at the sizes of files, and at the parent
ABANDONED = 3600.0  # seconds without a change after which nobody writes to a file any more
PARTIAL = ".incomplete"  # how huggingface_hub calls what it has not finished
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)

_answering = threading.Lock()


def main() -> None:
    """Obey until the parent is gone."""
    if not sys.stderr.isatty():  # a log
        disable_progress_bars()
    limits = _Limits()
    threading.Thread(target=_watch, args=(limits, os.getppid()), daemon=True).start()
    for line in sys.stdin:
        threading.Thread(target=_obey, args=(json.loads(line), limits), daemon=True).start()
    _end()


class _Limits:
    """How large files may get, in bytes; by the names under which the Hub keeps contents."""

    def __init__(self) -> None:
        self.by_blob: dict[str, int] = {}
        self.largest = 0

    def exceeded(self) -> str | None:
        """What has outgrown its limit, in words."""
        for path, num_bytes in _partial_files().items():
            allowed = self.by_blob.get(path.name.partition(".")[0], self.largest)
            if num_bytes > allowed:
                return f"a file of {allowed} bytes has {num_bytes} so far"
        return None


def _watch(limits: _Limits, parent: int) -> None:
    """Ends the process when a file is larger than announced, or the parent is another: a process
    that was forked from it may still hold the pipe open."""
    while os.getppid() == parent:
        if (excess := limits.exceeded()) is not None:
            _answer(
                error="ModelLoadFailed",
                message=f"the Hub sends more than it announced ({excess}); the download is stopped",
                kind="refused",
                last=True,
            )
            break
        time.sleep(LOOK)
    _end()


def _end() -> None:
    """At once, whatever the other threads are doing."""
    for path in _partial_files():
        path.unlink(missing_ok=True)
    os._exit(1)


def _partial_files() -> dict[Path, int]:
    """The unfinished files that this process writes, with their sizes."""
    found = {}
    for file in psutil.Process().open_files():
        if file.path.endswith(PARTIAL):
            with suppress(OSError):  # it has just been finished
                found[Path(file.path)] = os.stat(file.path).st_size
    return found


def _obey(command: Mapping[str, Any], limits: _Limits) -> None:
    try:
        answer = _list(command["list"]) if "list" in command else _get(command, limits)
    except BaseException as error:
        _answer(**_told(error))
    else:
        _answer(ok=answer)


def _answer(**fields: Any) -> None:
    with _answering:
        print(json.dumps(fields), flush=True)


def _told(error: BaseException) -> dict[str, str]:
    known, kind = classify(error), _kind(error)
    if kind == "away" and not isinstance(known, ModelLoadFailed):
        if unexplained(error) is not None:
            traceback.print_exception(error)  # on stderr, which is the server's
        known = ModelLoadFailed("it is not on this machine and the Hub cannot be reached")
    elif kind == "disk":
        reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else ""
        known = ModelLoadFailed(f"the Hub cache cannot be written: {reason} (HF_HUB_CACHE)")
    return {"error": type(known).__name__, "message": known.message, "kind": kind}


def _kind(error: BaseException) -> str:
    """absent: there is no such repository; refused: the Hub has answered, otherwise; disk: of this
    machine; away: anything else, most likely the network."""
    if isinstance(error, RepositoryNotFoundError):
        return "absent"
    if isinstance(error, HfHubHTTPError):
        return "refused"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return "disk"
    return "away"


def _list(repo: str) -> dict[str, Any]:
    """Its newest revision, and of each file the size and the name of its content."""
    api = HfApi()
    revision = api.model_info(repo).sha
    files = {
        entry.path: (entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
        for entry in api.list_repo_tree(repo, recursive=True, revision=revision)
        if isinstance(entry, RepoFile)
    }
    return {"revision": revision, "files": files}


def _get(command: Mapping[str, Any], limits: _Limits) -> str:
    """Download files of a revision; the folder where they are. `whole`: it is the one that the
    cache has under the repository's name from now on. Not before: what is not there whole must
    not take the place of an older revision that is."""
    repo, revision, files = command["get"], command["revision"], command["files"]
    _sweep()
    limits.largest = max((size for size, _ in files.values()), default=0)
    limits.by_blob = {blob: size for size, blob in files.values()}
    folder = snapshot_download(repo, revision=revision, allow_patterns=[*map(glob.escape, files)])
    if command["whole"]:
        _point_to(repo, revision)
    return folder


def _sweep() -> None:
    """Remove what processes left that could not do it themselves, as when the machine failed. What
    is still written to has changed lately."""
    for path in Path(constants.HF_HUB_CACHE).glob(f"models--*/blobs/*{PARTIAL}"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()


def _point_to(repo: str, revision: str) -> None:
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"))
    ref = folder / "refs" / constants.DEFAULT_REVISION
    if ref.is_file() and ref.read_text() == revision:
        return
    ref.parent.mkdir(parents=True, exist_ok=True)
    new = ref.with_name(f"{ref.name}.{uuid.uuid4().hex[:8]}")
    new.write_text(revision)
    new.replace(ref)


if __name__ == "__main__":
    main()
