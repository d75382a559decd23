"""Samplers compiled for a model and a number of steps, and kept: schedulers are slow to read off.

name -> scheduler.build_scheduler (diffusers' own) -> step_table.read_table (matrices)
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

CACHE_SIZE = 256  # tables; one of 50 steps takes 10 kB or less


def compile_table(
    spec: SamplerSpec,
    scheduler_config: Mapping[str, Any],
    num_inference_steps: int,
    window: Window = WHOLE,
) -> StepTable:
    """The compiled sampler, cached. `scheduler_config` is the model's (`pipe.scheduler.config`).

    Raises UnknownSampler, InvalidParameter naming the field, or UnsupportedSampler where diffusers
    or the table cannot do what is asked. Safe to call from any thread.
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


# Held while looking in the cache too, so that equal requests at once compile one table, and
# because `_quiet` changes state of the whole process. No other lock is taken inside.
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
    except Exception as exc:  # whatever a scheduler raises for options it cannot combine
        raise UnsupportedSampler(
            f"{spec.name} with num_inference_steps={num_inference_steps} does not go with this "
            f"model's scheduler configuration{_reason(exc)}",
            param="scheduler",
        ) from exc


@contextmanager
def _quiet() -> Iterator[None]:
    """Schedulers warn of deprecations and changed options; nobody who asks here can act on it."""
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
    """A scheduler's own words, where it refused on purpose; an IndexError tells nobody much."""
    line = traceback.extract_tb(exc.__traceback__)[-1].line or ""
    if not line.startswith("raise") or not str(exc):
        return ""
    return ": " + re.sub(r"<class '[^']*?(\w+)'>", r"\1", str(exc).splitlines()[0])


def _plain(value: Any) -> Any:
    """An array of betas as JSON; anything else by what it prints as."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)
