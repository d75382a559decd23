from __future__ import annotations

import pickle
import subprocess
import sys

from sdbento.metrics.definitions import (
    METRICS,
    active_images,
    decode_seconds,
    rows_total,
)
from sdbento.metrics.exposition import Exposition, Snapshot, snapshot
from tests.support.metrics import counted

COUNTS = """
import pickle, sys
from sdbento.metrics.definitions import active_images, decode_seconds, rows_total, step_seconds
from sdbento.metrics.exposition import snapshot
rows_total.add("useful", amount=7)
active_images.set(3)
decode_seconds.observe(0.3)
step_seconds.observe(0.01, "another", "512")
sys.stdout.buffer.write(pickle.dumps(snapshot()))
"""


def test_every_metric_is_shown_before_anything_has_happened() -> None:
    code = "from tests.support.metrics import counted; print(*(n for n, _ in counted().series))"
    shown = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    for one in METRICS.values():
        if all(label.known for label in one.labels):
            assert (f"{one.name}_count" if one.kind == "histogram" else one.name) in shown


def test_another_process_adds_to_what_this_one_has_counted() -> None:
    theirs = pickle.loads(subprocess.check_output([sys.executable, "-c", COUNTS]))
    exposition, before = Exposition(), counted()
    for process in ("gpu 0", "gpu 1"):
        exposition.absorb(process, theirs)
        exposition.absorb(process, theirs)  # replaces what it said before
    both = counted(exposition)
    grown = both.since(before)
    assert grown["sdbento_rows_total{kind=useful}"] == 14
    assert grown["sdbento_active_images"] == 6
    assert grown["sdbento_decode_seconds_count"] == 2
    assert grown["sdbento_step_seconds_count{model=another,size=512}"] == 2

    exposition.end("gpu 1")
    exposition.end("gpu 1")
    grown = counted(exposition).since(before)
    assert grown["sdbento_rows_total{kind=useful}"] == 14  # a counter must not go back
    assert grown["sdbento_active_images"] == 3


def test_a_process_that_starts_anew_counts_on() -> None:
    exposition, before = Exposition(), counted()
    counted_by_it: Snapshot = {"sdbento_rows_total": {("useful",): [5.0]}}
    for _ in range(3):
        exposition.absorb("gpu 0", counted_by_it)
        exposition.end("gpu 0")
    assert counted(exposition).since(before) == {"sdbento_rows_total{kind=useful}": 15}


def test_a_snapshot_does_not_change_with_what_comes_later() -> None:
    rows_total.add("useful")
    decode_seconds.observe(1)
    active_images.set(1)
    before = snapshot()
    kept = pickle.dumps(before)
    rows_total.add("useful")
    decode_seconds.observe(1)
    active_images.set(0)
    assert pickle.dumps(before) == kept
