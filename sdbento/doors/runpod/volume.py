"""RunPod's volume: a network volume, or the disk on which the platform puts cached models.

Its folders are used unless the operator names others. Outside RunPod there is no volume.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from sdbento.environment import use_hub_cache
from sdbento.settings import Settings

log = logging.getLogger(__name__)

HUB_CACHE = "huggingface-cache/hub"  # where the platform puts cached models
FOLDERS = {
    "models_dir": "models",
    "lora_dir": "loras",
    "embeddings_dir": "embeddings",
    "compile_dir": "compiled",
}


def use_volume(settings: Settings) -> Settings:
    """The settings with the folders of the volume; unchanged if there is no volume.

    It also makes the volume's Hub cache the one of this process. Must be called before
    huggingface_hub is imported.
    """
    volume = settings.runpod_volume
    if not volume.is_dir():
        return settings
    found = {
        field: volume / folder
        for field, folder in FOLDERS.items()
        if field not in settings.model_fields_set and (volume / folder).is_dir()
    }
    if (cache := hub_cache(volume, Path.home() / ".cache/huggingface/hub")) is not None:
        use_hub_cache(cache)
    return settings.model_copy(update={**found, "prefer_cache": True})


def hub_cache(volume: Path, own: Path) -> Path | None:
    """The Hub cache to use: the volume's if it can be written; None: leave the default.

    If the platform mounts cached models read-only, it is `own`, with links to those models: other
    models, LoRAs and ControlNets may have to be downloaded, and the Hub's client knows one cache.
    """
    cache = volume / HUB_CACHE
    if os.access(cache if cache.is_dir() else volume, os.W_OK):
        return cache
    models = list(cache.glob("models--*"))
    if not models:
        return None
    try:
        own.mkdir(parents=True, exist_ok=True)
        for model in models:
            link = own / model.name
            if not link.exists():
                link.unlink(missing_ok=True)  # a broken link, to a volume of an earlier start
                link.symlink_to(model)
    except OSError as exc:
        log.warning("nothing can be downloaded: neither %s nor %s is writable: %s", cache, own, exc)
        return cache
    return own
