"""What was counted, in this process or by a server, so that tests can tell what has come to it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from sdbento.metrics.exposition import Exposition
from tests.support.server import Server

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Counted:
    """Values at one time: `value("sdbento_jobs", status="FAILED")`."""

    def __init__(self, text: str) -> None:
        families = text_string_to_metric_families(text)
        samples = [sample for family in families for sample in family.samples]
        self.series: Series = {
            (sample.name, frozenset(sample.labels.items())): sample.value for sample in samples
        }

    def value(self, name: str, **labels: str) -> float:
        """Of the one series of that name with these labels. KeyError where there is none."""
        return self.series[name, frozenset(labels.items())]

    def since(self, before: Counted) -> dict[str, float]:
        """What has grown, and by how much, but for seconds: by `name{label=value}`.

        Without `sdbento_jobs`, which is read from the store now and then.
        """
        grown = {}
        for (name, labels), value in self.series.items():
            more = value - before.series.get((name, labels), 0.0)
            is_left_out = name == "sdbento_jobs" or name.endswith(("_bucket", "onds_sum"))
            if more and name.startswith("sdbento") and not is_left_out:
                inside = ",".join(f"{label}={text}" for label, text in sorted(labels))
                grown[f"{name}{{{inside}}}" if inside else name] = more
        return grown


def scraped(server: Server) -> Counted:
    return Counted(server.client.get("/metrics").text)


def counted(collector: Collector | None = None) -> Counted:
    """By this process, or whatever `collector` shows."""
    registry = CollectorRegistry()
    registry.register(collector or Exposition())
    return Counted(generate_latest(registry).decode())
