"""What an App with one device has in its own process, for tests and benchmarks that look inside."""

from __future__ import annotations

from sdbento.app import App
from sdbento.backend.local import LocalBackend


def local(app: App) -> LocalBackend:
    assert isinstance(app.backend, LocalBackend)
    return app.backend
