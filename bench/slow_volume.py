"""A folder as a network volume shows it: each read waits, and all of them share a rate.

    python -m bench.slow_volume FOLDER MOUNT_POINT

Needs fuse3 from the distribution, and `pip install mfusepy==3.1.1`.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from pathlib import Path
from typing import Any

from mfusepy import FUSE, Operations

LATENCY = 0.002  # seconds until a read is answered
STREAM_RATE = 250e6  # bytes a second of one read
TOTAL_RATE = 1000e6  # of all reads together

_STAT = ("st_atime", "st_ctime", "st_mtime", "st_gid", "st_mode", "st_nlink", "st_size", "st_uid")


class SlowVolume(Operations):  # type: ignore[misc]  # mfusepy has no types
    """Shows `folder`, to read only."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._sharing = threading.Lock()
        self._free_at = 0.0  # when the volume has sent what was asked for so far

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        stat = os.lstat(self._folder + path)
        return {name: getattr(stat, name) for name in _STAT}

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(self._folder + path)]

    def open(self, path: str, flags: int) -> int:
        return os.open(self._folder + path, os.O_RDONLY)

    def release(self, path: str, fh: int) -> None:
        os.close(fh)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        now = time.monotonic()
        with self._sharing:
            self._free_at = max(now, self._free_at) + size / TOTAL_RATE
            answered = max(self._free_at, now + LATENCY + size / STREAM_RATE)
        data = os.pread(fh, size, offset)
        time.sleep(max(0.0, answered - time.monotonic()))
        return data


def main() -> None:
    parser = argparse.ArgumentParser(description="Mount a folder as a slow network volume")
    parser.add_argument("folder", type=Path)
    parser.add_argument("mount_point", type=Path)
    args = parser.parse_args()
    volume = SlowVolume(args.folder.resolve())
    # The kernel keeps what was read, as it does for network file systems.
    FUSE(volume, str(args.mount_point), foreground=True, ro=True, kernel_cache=True)


if __name__ == "__main__":
    main()
