"""Room on the disk for what is about to be downloaded into the Hub cache."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from sdbento.catalog.downloads.process import HubError, Listing
from sdbento.errors import ModelLoadFailed

GB = 1e9
MARGIN = 2 * GB  # bytes that stay free on the disk, for results, logs and everybody else

_Wanted = tuple[Listing, tuple[str, ...]]


class DiskRoom:
    """Downloads that are under way count with what they still lack. Thread-safe."""

    def __init__(self) -> None:
        self._held: list[_Wanted] = []
        self._lock = threading.Lock()

    @contextmanager
    def hold(self, listing: Listing, paths: Collection[str]) -> Iterator[None]:
        """Raises HubError where these files do not fit beside what others are downloading."""
        wanted = (listing, tuple(paths))
        with self._lock:
            if missing := _missing(wanted):
                self._check(listing.repo, missing, sum(map(_missing, self._held)))
            self._held.append(wanted)
        try:
            yield
        finally:
            with self._lock:
                self._held.remove(wanted)

    def _check(self, repo: str, missing: int, others: int) -> None:
        free = shutil.disk_usage(_existing(Path(constants.HF_HUB_CACHE))).free
        if missing + others + MARGIN <= free:
            return
        beside = f" beside {others / GB:.1f} GB of other downloads" if others else ""
        raise HubError(
            ModelLoadFailed(
                f"{repo} has {missing / GB:.1f} GB to download, but the disk of the Hub cache has "
                f"{free / GB:.1f} GB free{beside}, of which {MARGIN / GB:.0f} GB are kept "
                "(HF_HUB_CACHE)"
            ),
            "disk",
        )


disk = DiskRoom()  # of this process


def _missing(wanted: _Wanted) -> int:
    """Bytes that are not in the cache yet; of files under way, the rest of them."""
    listing, paths = wanted
    folder = repo_folder_name(repo_id=listing.repo, repo_type="model")
    blobs = Path(constants.HF_HUB_CACHE, folder, "blobs")
    files = [listing.files[path] for path in paths]
    return sum(max(0, file.size - _present(blobs, file.blob)) for file in files)


def _present(blobs: Path, blob: str) -> int:
    sizes = [0]
    for path in (blobs / blob, *blobs.glob(f"{blob}.*")):
        try:
            sizes.append(path.stat().st_size)
        except OSError:
            continue
    return max(sizes)


def _existing(folder: Path) -> Path:
    """`folder` or the nearest above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.exists())
