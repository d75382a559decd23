"""What both models' files have in common."""

from __future__ import annotations

import json
from pathlib import Path

ORIGIN = "_name_or_path"


def forget(folder: Path, *keys: str) -> None:
    """Removes keys of configurations that diffusers wrote into `folder`.

    ORIGIN is the path of what it had loaded.
    """
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text())
        kept = {key: value for key, value in config.items() if key not in keys}
        if kept != config:
            path.write_text(json.dumps(kept, indent=2) + "\n")
