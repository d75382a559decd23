"""sdbento's service with a log of its calls, which the benchmark starts in place of `service`.

The file of the log is named by BENCH_CALLS.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bench.calls import CallLog, record
from service import StableDiffusion

_inner: Any = StableDiffusion.inner  # type: ignore[attr-defined]  # it is a Service by now
_begin = _inner.__init__


def _begin_recorded(self: Any) -> None:
    _begin(self)
    record(self.app.backend.runner, CallLog(Path(os.environ["BENCH_CALLS"])).add)


_inner.__init__ = _begin_recorded
