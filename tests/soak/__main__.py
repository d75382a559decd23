"""`make soak`: hours of bad company in minutes, on a real server, and what is left of it then.

    make soak                               kills: kill -9 while 100 jobs run, nothing is lost
    make soak ARGS="fleet --jobs 300"       three servers behind nginx on one PostgreSQL, killed,
                                            frozen and without their database in turn
    make soak ARGS="mixed --minutes 60"     all of the others at once; faults in the last sixth
    make soak ARGS="floods keys"            those alone, for ten minutes

    bystander   always there: one user who asks for one image at a time and must get it
    floods      more requests at once than there is room for; bad ones; clients that go away
    slow        clients that send or read a few bytes a second, or nothing
    strangers   images and webhooks at hosts that answer late, piecemeal, or never
    models      two models in turn, of which memory has room for one
    keys        users with limits, passwords, wrong keys, keys that come and go
    faults      kill -9 of the worker and of the supervisor, with accepted jobs

Every image of a call that was made alone before must equal it, new calls are made again alone in
the end, and no answer may be other than its mode expects. Every ten seconds the worker's memory,
descriptors, threads and connections are noted; every ten minutes all modes pause until the server
has given back what it does not need. What remains then, from pause to pause, is what it keeps.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import httpx

from tests.soak import fleet, kills, load, slow
from tests.soak.faults import faults
from tests.soak.ground import Ground, ground
from tests.soak.load import Oracle
from tests.soak.record import Record
from tests.soak.samples import Sampler, longest_lived, trends
from tests.support.server import free_port

Mode = Callable[[Ground, Oracle, Random], None]
MODES: dict[str, Mode] = {
    "floods": load.floods,
    "slow": slow.slow_clients,
    "strangers": slow.strangers,
    "models": load.models,
    "keys": load.keys,
    "faults": faults,
}
FAULTS_SHARE = 1 / 6  # of the time, at the end: the worker whose memory is judged lives before
REST_EVERY, DRAIN, REST = 600.0, 90.0, 35.0  # seconds; freed memory is given back after 60 idle
END_LIMIT = 300.0  # seconds until nothing is queued or connected any more
JUDGED_HOURS = 0.4  # in less, caches still fill
MOST_RISE = {"rss_mb": 40.0, "descriptors": 10.0, "threads": 5.0}  # at rest, from first to last


def main() -> int:
    options = arguments()
    if options.modes in ([], ["kills"]):
        return kills.run(options.jobs, options.kills, options.seed)
    if options.modes == ["fleet"]:
        counts = {"kill": options.kills, "database": 3, "freeze": 3}
        return 1 if fleet.run(options.jobs, counts, options.seed) else 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # ends the server as well
    names = list(MODES) if options.modes == ["mixed"] else options.modes
    print(f"{' '.join(names)}, {options.minutes:g} minutes, --seed {options.seed}", flush=True)
    record = Record()
    with (
        tempfile.TemporaryDirectory() as folder,
        ground(Path(folder), options.port or free_port(), record, options.pace) as place,
    ):
        for name in ("bystander", *names):
            if name not in place.keys:
                place.add_user(name)
        print("each call alone", flush=True)
        oracle = Oracle(place)
        print("side by side", flush=True)
        with httpx.Client(base_url=place.url, timeout=30, trust_env=False) as http:
            sampler = Sampler(lambda: place.server.process.pid, http, place.keys["operator"])
            run(place, oracle, sampler, names, options)
        end(place, oracle)
        report = summary(place, sampler, options)
    show(report)
    if options.json:
        samples = [asdict(sample) for sample in sampler.samples]
        Path(options.json).write_text(json.dumps(report | {"samples": samples}, indent=1))
    return 1 if report["num_problems"] else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="bad company for a server, and what it keeps")
    parser.add_argument(
        "modes", nargs="*", help="kills, fleet, mixed, or some of: " + " ".join(MODES)
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--pace", type=float, default=1.0, help="0.5: half as many requests")
    parser.add_argument("--port", type=int)
    parser.add_argument("--json", help="file for the figures and all samples")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--jobs", type=int, default=100, help="of kills and fleet")
    parser.add_argument("--kills", type=int, default=10, help="of kills and fleet")
    options = parser.parse_args()
    if unknown := set(options.modes) - {"kills", "fleet", "mixed", *MODES}:
        parser.error(f"there is no mode {' '.join(unknown)}")
    return options


def run(place: Ground, oracle: Oracle, sampler: Sampler, names: list[str], options: Any) -> None:
    """All modes side by side, with pauses, until the time is up."""
    seconds, alone = options.minutes * 60, names == ["faults"]
    last = [name for name in names if name == "faults" and not alone]
    first = ["bystander", *(name for name in names if name not in last)]
    modes = MODES | {"bystander": load.bystander}
    threads: list[threading.Thread] = []

    def begin(name: str) -> None:
        chance = Random(f"{options.seed} {name}")
        thread = threading.Thread(target=guarded, args=(modes[name], place, oracle, chance))
        thread.start()
        threads.append(thread)

    over = threading.Event()
    watching = threading.Thread(target=sampler.run, args=(over,), daemon=True)
    watching.start()
    for name in first:
        begin(name)
    spend(place, sampler, seconds * (1 - FAULTS_SHARE if last else 1))
    for name in last:
        begin(name)
        place.stop.wait(seconds * FAULTS_SHARE)
    place.stop.set()
    for thread in threads:
        thread.join()
    over.set()
    watching.join()


def guarded(mode: Mode, place: Ground, oracle: Oracle, chance: Random) -> None:
    try:
        mode(place, oracle, chance)
    except Exception as error:  # a mistake of this program must not look like a quiet server
        place.record.problem(f"{mode.__name__} has ended: {error!r}")


def spend(place: Ground, sampler: Sampler, seconds: float) -> None:
    """Let the modes work, but for a rest at the start and every REST_EVERY, and at the end."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        place.stop.wait(min(left, REST_EVERY))
        place.work.clear()
        sampler.phase = "pause"
        place.stop.wait(DRAIN)
        sampler.phase = "rest"
        place.stop.wait(REST)
        sampler.phase = "load"
        place.work.set()


def end(place: Ground, oracle: Oracle) -> None:
    """Make new calls again, alone; then nothing may be queued or connected."""
    oracle.make_kept_again()
    give_up = time.monotonic() + END_LIMIT
    http = httpx.Client(base_url=place.url, timeout=30, trust_env=False)
    headers = {"Authorization": f"Bearer {place.keys['operator']}"}
    left: Any = "no answer"
    while time.monotonic() < give_up:
        with suppress(httpx.TransportError):
            jobs = http.get("/health", headers=headers).json()["jobs"]
            text = http.get("/metrics", headers=headers).text
            depth = [line for line in text.splitlines() if line.startswith("sdbento_queue_depth")]
            left = [jobs["inQueue"], jobs["inProgress"], *(float(d.split()[-1]) for d in depth)]
            if not any(left):
                return
        time.sleep(1)
    place.record.problem(f"{END_LIMIT:.0f} s after the end there is still work: {left}")


def summary(place: Ground, sampler: Sampler, options: Any) -> dict[str, Any]:
    record, judged = place.record, longest_lived(sampler.samples)
    table = trends(judged)
    for column, most in MOST_RISE.items():
        rest = table.get("rest", {}).get(column)
        if rest is not None and rest["hours"] > JUDGED_HOURS and rest["rise"] > most:
            record.problem(f"{column} grows at rest: {rest}")
    log = "".join(path.read_text(errors="replace") for path in place.logs)
    errors = [line for line in log.splitlines() if "ERROR" in line or "Traceback" in line]
    return {
        "modes": options.modes,
        "minutes": options.minutes,
        "seed": options.seed,
        "answers": record.by_mode(),
        "seconds": {mode: (median(taken), max(taken)) for mode, taken in record.seconds.items()},
        "images_compared": record.compared,
        "largest_difference": record.worst,
        "error_lines": len(errors),
        "first_errors": errors[:20],
        "num_problems": record.num_problems,
        "problems": record.problems,
        "trends": table,
    }


def show(report: dict[str, Any]) -> None:
    for mode, counts in report["answers"].items():
        told = ", ".join(f"{count} {status}" for status, count in counts.items())
        print(f"{mode:10} {told}")
    print(
        f"{report['images_compared']} images compared with their solo runs: "
        f"{report['largest_difference']} levels apart at most"
    )
    for mode, (middle, longest) in report["seconds"].items():
        print(f"{mode:10} {middle:.1f} s to a 200 in the middle, {longest:.1f} s at most")
    for phase, columns in report["trends"].items():
        print(f"{phase:14} {'first':>9} {'last':>9} {'least':>9} {'most':>9} {'per hour':>9}")
        for name, t in columns.items():
            cells = (t["first"], t["last"], t["least"], t["most"], t["slope_per_hour"])
            print(f"  {name:12} " + " ".join(f"{cell:9.1f}" for cell in cells))
    print(f"the server's log has {report['error_lines']} errors")
    for line in report["first_errors"]:
        print(f"  {line[:200]}")
    print(f"FAILED: {report['num_problems']} problems" if report["num_problems"] else "all is well")


if __name__ == "__main__":
    sys.exit(main())
