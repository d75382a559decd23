"""sdbento's service with BENCH_WORKERS of BentoML's workers, started by `bench.devices` in place of
`service`. Each keeps jobs in a folder of its own: they know nothing of each other.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["SDBENTO_STATE_DIR"] = str(Path(os.environ["SDBENTO_STATE_DIR"]) / str(os.getpid()))

from service import StableDiffusion

_service: Any = StableDiffusion
_service.config["workers"] = int(os.environ["BENCH_WORKERS"])
