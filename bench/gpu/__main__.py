"""Measure everything that needs a GPU, section by section, within one time limit.

    python -m bench.gpu                        # on a GPU; needs no bentoml and downloads nothing
    python -m bench.gpu --toy                  # the same with small networks, on a CPU too
    python -m bench.gpu --sections eager,vae   # some; rows are added to what is in --out
    python -m bench.gpu --table --out DIR      # only the table of what is there

Every row is printed and stored as soon as it is known; the table comes last.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench.gpu.rows import Kind, Log, latest, read
from bench.gpu.sections import DEFAULT, SECTIONS, TOY, Options
from bench.gpu.supervise import CPU, Supervisor
from bench.gpu.tables import table

TABLE_SECONDS = 5.0  # of the limit are kept for the table
ROWS, TABLE = "rows.jsonl", "table.md"


def main() -> int:
    parser = _parser()
    options = parser.parse_args()
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.table:
        names = options.sections.split(",") if options.sections else TOY if options.toy else DEFAULT
        if unknown := [name for name in names if name not in SECTIONS]:
            parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the table is still printed
        try:
            return _measure(parser, options, names, started)
        finally:
            _write_table(options.out)
    _write_table(options.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of the rows")
    parser.add_argument("--limit", type=float, default=540, help="seconds for everything")
    parser.add_argument("--sections", help="comma-separated; default: all")
    parser.add_argument("--precision", default="fp16", choices=["fp16", "bf16", "fp32"])
    parser.add_argument("--toy", action="store_true", help="small networks, on a CPU too")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    return parser


def _measure(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    names: Sequence[str],
    started: float,
) -> int:
    run = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    log = Log(options.out / ROWS, run)
    deadline = started + options.limit - TABLE_SECONDS
    settings = Options(toy=options.toy, precision=options.precision)
    supervisor = Supervisor(log, settings, deadline)
    device = supervisor.choose_start()
    if device == CPU and not options.toy:
        parser.error("no GPU here; --toy runs small networks on the CPU")
    log.add(
        "run",
        Kind.HEADER,
        figures={"device": device, "toy": str(options.toy), "precision": options.precision},
    )
    outcomes = supervisor.run([SECTIONS[name] for name in names])
    return 0 if all(outcome.ended_well for outcome in outcomes) else 1


def _write_table(folder: Path) -> None:
    text = table(latest(read(folder.glob("*.jsonl"))))
    (folder / TABLE).write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")


if __name__ == "__main__":
    sys.exit(main())
