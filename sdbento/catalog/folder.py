"""Lists the files of a folder from which models, LoRAs or inversions are chosen by name.

A requested name is compared with what the folder lists. It never becomes part of a path, so that no
name can lead out of the folder.
"""

from __future__ import annotations

import os
from pathlib import Path


def list_files(
    root: Path, suffixes: str | tuple[str, ...] = "", max_depth: int | None = None
) -> dict[str, Path]:
    """The files below `root` that end in one of `suffixes`: `styles/ink.safetensors` -> its path.

    Keys are paths relative to `root`, with slashes; a folder's own files come before those of its
    subfolders, each sorted. `max_depth` is how many levels of subfolders are searched, None all.
    Links are followed. Whatever is missing or cannot be read is left out.
    """
    found: dict[str, Path] = {}
    visited: set[str] = set()
    for path, folders, names in os.walk(root, followlinks=True):
        folder = Path(path)
        depth = len(folder.relative_to(root).parts)
        real = os.path.realpath(folder)
        if depth == max_depth:
            folders.clear()
        elif max_depth is None and real in visited:  # links that lead in a circle
            folders.clear()
            continue
        visited.add(real)
        folders.sort()
        files = (folder / name for name in sorted(names) if name.endswith(suffixes))
        found |= {file.relative_to(root).as_posix(): file for file in files if is_file(file)}
    return found


def is_file(path: Path) -> bool:
    """False also for what cannot be asked: `path` is too long, or in an unreadable folder."""
    try:
        return path.is_file()
    except OSError:
        return False
