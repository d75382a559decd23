"""The service, which makes a snapshot of the batch after every UNet call: for recordings only."""

from __future__ import annotations

import time

from sdbento.live.recorder import Recorder
from service import StableDiffusion


def record(self: Recorder) -> None:
    """As `Recorder.refresh`, but always."""
    self._record(time.monotonic())


Recorder.refresh = record  # type: ignore[method-assign]
service = StableDiffusion
