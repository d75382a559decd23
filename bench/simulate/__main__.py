"""The planner judged in virtual time: the server's own, against other policies, by cost curves.

    python -m bench.simulate                                   every curve in bench/curves
    python -m bench.simulate --curve FILE --trace FILE         a curve and requests of one's own
    python -m bench.simulate --fleet --workers 1000            workers with cold starts
    python -m bench.simulate --grace inf                       small requests pass no larger ones
    python -m bench.simulate --owners                          one with many images, one with few
    python -m bench.simulate --measure-cpu                     writes bench/curves/cpu-shapes.json
    python -m bench.simulate --from-gpu bench/results/gpu      writes curves of GPUs

`curves.py` and `traces.py` describe the files. The same arguments print the same tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.simulate import curves, report, traces
from sdbento.engine import overdue

CURVES = Path(__file__).parents[1] / "curves"
REQUESTS = 1000
WORKER_REQUESTS = 20  # of a fleet, for each worker


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--curve", type=Path, action="append", help="a file; may be repeated")
    parser.add_argument("--trace", type=Path, help="requests, one JSON object a line")
    parser.add_argument("--fleet", action="store_true")
    parser.add_argument("--workers", type=int, default=1000, help="of the fleet, at most")
    parser.add_argument("--owners", action="store_true")
    parser.add_argument("--requests", type=int, help="of each run")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--grace", type=float, default=overdue.GRACE, help="see engine/overdue.py")
    parser.add_argument("--measure-cpu", action="store_true")
    parser.add_argument("--from-gpu", type=Path, metavar="DIR")
    options = parser.parse_args(args)
    overdue.GRACE = options.grace
    if options.measure_cpu:
        from bench.simulate.measure import measure_cpu  # needs torch, and nothing else here does

        curves.write(measure_cpu(), CURVES / "cpu-shapes.json")
        return
    if options.from_gpu is not None:
        write_gpu_curves(options.from_gpu)
        return
    usual = WORKER_REQUESTS * options.workers if options.fleet else REQUESTS
    requests = options.requests or usual
    size = report.Size(requests, options.seeds)
    for path in options.curve or sorted(CURVES.glob("*.json")):
        try:
            run(curves.read(path), options, size)
        except (OSError, ValueError) as error:
            parser.error(str(error))


def run(one: curves.Curves, options: argparse.Namespace, size: report.Size) -> None:
    print(f"\n### {one.name}\n\nCosts: {one.origin}.\n", flush=True)
    if options.trace is not None:
        lines = report.own_trace(one, traces.read(options.trace, one.side))
    elif options.fleet:
        lines = report.fleet(one, size.requests, options.workers)
    elif options.owners:
        lines = report.owners(one, size)
    else:
        for line in report.in_full(one, size):
            print(line, flush=True)
        print()
        lines = report.ratios(one, size)
    for line in lines:
        print(line, flush=True)


def write_gpu_curves(folder: Path) -> None:
    from bench.simulate.gpu_rows import curves_of

    for name, one in curves_of(folder).items():
        curves.write(one, CURVES / f"{name}.json")
        print(f"wrote bench/curves/{name}.json")


if __name__ == "__main__":
    main()
