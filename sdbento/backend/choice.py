"""Which backend the settings ask for: one device in this process, or several in their own."""

from __future__ import annotations

from collections.abc import Callable

from sdbento.backend.local import LocalBackend
from sdbento.backend.pool.devices import engine_devices
from sdbento.backend.pool.router import EnginePool
from sdbento.backend.protocol import Backend
from sdbento.catalog.lookup import Catalog
from sdbento.engine.trajectory import Runner
from sdbento.prompts.inversions import Inversions
from sdbento.settings import Settings


def choose_backend(
    settings: Settings,
    catalog: Catalog,
    inversions: Inversions,
    runner: Runner | None,
    on_broken: Callable[[str], None],
) -> Backend:
    """`runner`, `on_broken`: see LocalBackend. Raises SettingsError for GPUs that are not there."""
    if runner is None and (devices := engine_devices(settings)):
        return EnginePool(devices, settings.stall_seconds, on_broken)
    return LocalBackend(settings, catalog, inversions, runner, on_broken)
