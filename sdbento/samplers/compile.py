"""Samplers compiled into tables, for a model's scheduler configuration and a number of steps.

A `SamplerSpec` becomes a diffusers scheduler by `build_scheduler`, and that a `StepTable` by
`read_table`, which runs the scheduler through all of its steps. So tables are cached.
"""

from __future__ import annotations

import json
import logging
import math
import re
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

from sdbento.errors import InvalidParameter, SDBentoError, UnsupportedSampler
from sdbento.samplers.names import canonical_name
from sdbento.samplers.scheduler import SamplerSpec, build_scheduler
from sdbento.samplers.step_table import WHOLE, StepTable, Window, read_table

CACHE_SIZE = 256  # tables; one of 150 steps, the most, takes 35 kB or less


def compile_table(
    spec: SamplerSpec,
    scheduler_config: Mapping[str, Any],
    num_inference_steps: int,
    window: Window = WHOLE,
) -> StepTable:
    """The compiled sampler. `scheduler_config` is the model's (`pipe.scheduler.config`).

    Thread-safe; cached. Raises UnknownSampler, InvalidParameter naming the field, or
    UnsupportedSampler where diffusers or the table cannot do what is asked.
    """
    if num_inference_steps < 1:
        raise InvalidParameter(
            f"num_inference_steps must be at least 1, not {num_inference_steps}",
            param="num_inference_steps",
        )
    if not (math.isfinite(spec.eta) and spec.eta >= 0):
        raise InvalidParameter(f"eta must be 0 or more, not {spec.eta}", param="eta")
    spec = replace(spec, name=canonical_name(spec.name))
    config = json.dumps(dict(scheduler_config), sort_keys=True, default=_plain)
    with _compiling:
        return _compile(spec, config, num_inference_steps, window)


# Held during the look into the cache too, so that equal requests at the same time compile one
# table; and during the compilation, because `_quiet` changes state of the whole process. No other
# lock is taken inside.
_compiling = threading.Lock()


@lru_cache(maxsize=CACHE_SIZE)
def _compile(spec: SamplerSpec, config: str, num_inference_steps: int, window: Window) -> StepTable:
    try:
        with _quiet():
            scheduler = build_scheduler(spec, json.loads(config))
            scheduler.set_timesteps(num_inference_steps, device="cpu")
            return read_table(scheduler, window, spec.eta)
    except SDBentoError:
        raise
    except Exception as exc:  # schedulers raise anything for options that do not go together
        raise UnsupportedSampler(
            f"{spec.name} with num_inference_steps={num_inference_steps} does not go with this "
            f"model's scheduler configuration{_reason(exc)}",
            param="scheduler",
        ) from exc


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the schedulers' warnings of deprecated or changed options: no user can act on them."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _reason(exc: Exception) -> str:
    """The scheduler's own message if it raised on purpose, else nothing: the message of an
    IndexError deep inside explains little."""
    line = traceback.extract_tb(exc.__traceback__)[-1].line or ""
    if not line.startswith("raise") or not str(exc):
        return ""
    return ": " + re.sub(r"<class '[^']*?(\w+)'>", r"\1", str(exc).splitlines()[0])


def _plain(value: Any) -> Any:
    """What json.dumps cannot write: an array of betas as a list, anything else as its repr."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)
