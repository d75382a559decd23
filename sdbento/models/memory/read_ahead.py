"""Reads the files of a model into the page cache while the model is being constructed.

Weights are mapped into memory, so each page is read when it is first touched, one small read after
another. A network volume takes milliseconds to answer each of them, but serves many at once. Here
all files of a model are read by many threads. Knows nothing of what is in the files.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue

from sdbento.models.device import host_memory

NUM_THREADS = 16
PART = 8 * 2**20  # bytes that a thread reads before it takes the next part
READ = 2**20  # bytes of one read
MOST_OF_MEMORY = 0.5  # a larger share would drive out what was read first before it is used

Part = tuple[Path, int]  # a file and an offset


def read_ahead(files: Sequence[Path]) -> list[threading.Thread]:
    """Start to read `files`, in their order, and return at once.

    Does nothing if they are too large for the memory that is available. The threads end when all
    is read; nobody needs to wait for them. A file that cannot be read is left to whoever opens it.
    """
    sizes = {file: file.stat().st_size for file in files if file.is_file()}
    if sum(sizes.values()) > MOST_OF_MEMORY * host_memory()[1]:
        return []
    parts: SimpleQueue[Part] = SimpleQueue()
    for part in _parts(sizes):
        parts.put(part)
    threads = [
        threading.Thread(target=_read_all, args=(parts,), name="sdbento-read-ahead", daemon=True)
        for _ in range(min(NUM_THREADS, parts.qsize()))
    ]
    for thread in threads:
        thread.start()
    return threads


def _parts(sizes: dict[Path, int]) -> Iterator[Part]:
    for file, size in sizes.items():
        yield from ((file, offset) for offset in range(0, size, PART))


def _read_all(parts: SimpleQueue[Part]) -> None:
    buffer = bytearray(READ)
    with suppress(Empty):
        while True:
            file, offset = parts.get_nowait()
            with suppress(OSError):
                _read(file, offset, buffer)


def _read(file: Path, start: int, buffer: bytearray) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        for offset in range(start, start + PART, READ):
            if not _is_cached(descriptor, offset) and not os.preadv(descriptor, [buffer], offset):
                return  # the end of the file
    finally:
        os.close(descriptor)


def _is_cached(descriptor: int, offset: int) -> bool:
    """Whether the page at `offset` is cached; False where the file system cannot tell."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError:
        return False
