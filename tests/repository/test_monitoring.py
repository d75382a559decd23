"""The configuration of Prometheus and Grafana: rules, queries, and the metrics that they name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdbento.errors import OUTCOMES
from sdbento.metrics.definitions import METRICS
from tests.support.prometheus import promtool

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "configs" / "monitoring"
# Of PromQL, what is neither a metric nor a label.
SUFFIXES = ("_bucket", "_sum", "_count")


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((MONITORING / "grafana" / "dashboard.json").read_text())
    return loaded


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def dashboard_queries() -> Iterator[str]:
    """As Grafana sends them, with values for its variables."""
    for panel in panels():
        for target in panel["targets"]:
            yield target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*")


def documented_queries() -> list[str]:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    table = text.partition("| question | query |\n")[2].partition("\n\n")[0]
    rows = [row.split(" | ", 1)[1] for row in table.splitlines()[1:]]
    return [row.split("`")[1].replace("\\|", "|") for row in rows]


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def every_query() -> list[str]:
    return [*dashboard_queries(), *documented_queries(), *(rule["expr"] for rule in rules())]


def unknown_metrics(query: str) -> set[str]:
    names = set(re.findall(r"\bsdbento_\w+", query))
    known = {*METRICS}
    for one in METRICS.values():
        if one.kind == "histogram":
            known.remove(one.name)
            known |= {one.name + suffix for suffix in SUFFIXES}
    return names - known


def unknown_values(query: str) -> set[tuple[str, str]]:
    """Values of labels that no metric has; they would never match."""
    known = {
        (label.name, v) for one in METRICS.values() for label in one.labels for v in label.known
    }
    named = {label.name for one in METRICS.values() for label in one.labels}
    given = re.findall(r'(\w+)(?:=~|!=|=)"([^"]*)"', query)
    return {(name, v) for name, text in given if name in named for v in text.split("|")} - known


@pytest.mark.parametrize("query", every_query())
def test_every_query_names_metrics_and_values_that_there_are(query: str) -> None:
    assert "sdbento" in query
    assert unknown_metrics(query) == set()
    assert unknown_values(query) == set()


def test_a_query_that_cannot_match_would_be_noticed() -> None:
    query = (
        'rate(sdbento_requests_total{outcome="okay"}[5m]) + sdbento_step_seconds + sdbento_joobs'
    )
    assert unknown_metrics(query) == {"sdbento_step_seconds", "sdbento_joobs"}
    assert unknown_values(query) == {("outcome", "okay")}
    assert unknown_values(f'sdbento_requests_total{{outcome=~"{"|".join(OUTCOMES)}"}}') == set()


def test_the_dashboard_shows_every_metric() -> None:
    shown = " ".join(dashboard_queries())
    assert [name for name in METRICS if name not in shown] == []


def test_the_panels_do_not_overlap() -> None:
    places = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert x < 24 and (x, y) not in places
                places.add((x, y))
    numbers = [panel["id"] for panel in dashboard()["panels"]]
    assert len(numbers) == len(set(numbers))


def test_the_containers_get_the_files_that_there_are() -> None:
    services = yaml.safe_load((MONITORING / "compose.yaml").read_text())["services"]
    for name in ("prometheus", "grafana"):
        for volume in services[name]["volumes"]:
            source = volume.partition(":")[0]
            assert not source.startswith(".") or (MONITORING / source).is_file()
    provider = yaml.safe_load((MONITORING / "grafana" / "dashboards.yaml").read_text())
    folder = provider["providers"][0]["options"]["path"]
    assert any(f":{folder}/" in volume for volume in services["grafana"]["volumes"])


def test_prometheus_accepts_its_configuration_and_every_query(tmp_path: Path) -> None:
    promtool("check", "config", "prometheus.yaml", cwd=MONITORING)
    recorded = [{"record": f"r{i}", "expr": query} for i, query in enumerate(every_query())]
    written = {"groups": [{"name": "all", "rules": recorded}]}
    (tmp_path / "rules.json").write_text(json.dumps(written), encoding="utf-8")
    promtool("check", "rules", "rules.json", cwd=tmp_path)


def test_the_alerts_do_what_their_tests_say() -> None:
    promtool("test", "rules", "alerts_test.yaml", cwd=MONITORING)
    tried = (MONITORING / "alerts_test.yaml").read_text()
    assert [rule["alert"] for rule in rules() if rule["alert"] not in tried] == []
