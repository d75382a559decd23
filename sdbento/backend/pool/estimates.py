"""What engines have to do, estimated from what they report and from what they were given since."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite

from sdbento.backend.pool.messages import Report
from sdbento.backend.pool.routed import RoutedRequest
from sdbento.backend.pool.routing import EngineLoad, Need
from sdbento.catalog.specs import ModelSpec, Spec
from sdbento.models.device import GB
from sdbento.settings import Settings

UNIT_SECONDS = 0.05  # of a unit of work, until one was reported
LOAD_SECONDS = 1.0  # of a load, and for each GB as many more, until one was timed
LEARN = 0.3  # the weight of what was seen last


class Estimates:
    """Learns how long work and loads take. For the router's thread; `needs` for any."""

    def __init__(self, settings: Settings) -> None:
        in_fp32 = settings.precision == "fp32" or settings.device == "cpu"
        self._bytes = 2 * GB if in_fp32 else GB  # of a model that takes 1 GB in fp16
        self._default = settings.sd_model
        self._default_key = ""  # once a request has named the default model
        self._unit_seconds: float | None = None
        self._load_seconds: dict[str, float] = {}

    def needs(self, specs: Iterable[Spec]) -> list[Need]:
        """What a request for `specs` needs in memory."""
        specs = list(specs)
        for spec in specs:
            if isinstance(spec, ModelSpec) and self._default in spec.names:
                self._default_key = spec.key
        return [
            Need(
                spec.key,
                int(spec.memory_gb * self._bytes),
                self._load_seconds.get(spec.key, LOAD_SECONDS * (1 + spec.memory_gb)),
            )
            for spec in specs
        ]

    def load_of(
        self, report: Report | None, requests: Sequence[RoutedRequest], now: float, delay: float
    ) -> EngineLoad:
        """What an engine has to do that has these requests; `delay`: until it can begin."""
        known = _known_ends(report, requests)
        unknown = sum(one.num_units for one in requests if one.number not in known)
        resident = frozenset(() if report is None else (r.spec.key for r in report.residents))
        coming = {
            need.key: max(0.0, one.placed + need.load_seconds - now)
            for one in requests
            for need in one.needs
            if need.key not in resident
        }
        if report is None or not report.is_ready:
            coming[self._default_key] = 0.0  # every engine loads it when it starts
        busy = max((end - now for end in known.values()), default=0.0)
        return EngineLoad(
            seconds=delay + max(0.0, busy) + unknown * (self._unit_seconds or UNIT_SECONDS),
            num_requests=len(requests),
            resident=resident,
            coming=coming,
            room=0 if report is None else report.room,
        )

    def learn_work(self, report: Report, requests: Sequence[RoutedRequest], now: float) -> None:
        """From what an engine expects of the requests that it has: how long a unit takes."""
        known = _known_ends(report, requests)
        units = sum(one.num_units for one in requests if one.number in known)
        if units and (seconds := max(known.values()) - now) > 0:
            self._unit_seconds = _learned(self._unit_seconds, seconds / units)

    def learn_load(self, request: RoutedRequest, now: float) -> None:
        """From a request whose models are in memory now: how long a load takes, if it waited for
        exactly one from its beginning."""
        if len(request.loading) == 1:
            (key,) = request.loading
            seconds = now - request.placed
            self._load_seconds[key] = _learned(self._load_seconds.get(key), seconds)


def _known_ends(report: Report | None, requests: Sequence[RoutedRequest]) -> dict[int, float]:
    """When those of the requests end of which the engine knows it, by number."""
    numbers = {one.number for one in requests}
    endings = () if report is None else report.endings
    return {e.request: e.at for e in endings if e.request in numbers and isfinite(e.at)}


def _learned(earlier: float | None, seen: float) -> float:
    return seen if earlier is None else (1 - LEARN) * earlier + LEARN * seen
