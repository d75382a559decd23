"""`python -m bench.simulate`: its arithmetic by hand, and what the planner promises under load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.gpu.rows import Kind, Label, Log
from bench.simulate.__main__ import CURVES, main
from bench.simulate.curves import Curves, Side, read, write
from bench.simulate.device import MakePolicy, Outcome, capacity, closed_loop, open_loop
from bench.simulate.fleet import COLD_START, Fleet
from bench.simulate.gpu_rows import curves_of
from bench.simulate.owners import HEAVIES, LIGHTS, Heavy, Light, TwoOwners
from bench.simulate.policies import WINDOW, OneAtATime, OneQueue, Ours, StaticBatches, StepsInOrder
from bench.simulate.traces import MIXED, Mix, Request, poisson
from bench.simulate.traces import read as read_trace

H100 = "nvidia-h100-80gb-hbm3"  # of the names of curves
SEED = 1
SIMPLE = Curves("made up", "made up", {64: Side({2: 2.0, 4: 3.0}, {1: 1.0})})
TWO = [Request(steps=2, side=64, at=0.0), Request(steps=1, side=64, at=1.0)]


@pytest.mark.parametrize(
    ("policy", "latencies"),
    [
        (OneAtATime, [5.0, 7.0]),  # two steps of 2 s and a decode; a step and a decode, from 5 s on
        (StaticBatches, [5.0 + WINDOW, 7.0 + WINDOW]),
        # A step of the first alone, one of 3 s together, both images decoded in 2 s.
        (StepsInOrder, [7.0, 6.0]),
        (Ours, [5.0, 7.0]),  # calls of more than a second are not shared
    ],
)
def test_two_requests_take_as_long_as_computed_by_hand(
    policy: MakePolicy, latencies: list[float]
) -> None:
    outcome = open_loop(SIMPLE, policy, TWO)
    assert outcome.latencies == pytest.approx(latencies)
    assert outcome.seconds == pytest.approx(1.0 + latencies[1])


def test_static_batches_share_calls_of_equal_requests_and_answer_together() -> None:
    alike = [Request(steps=2, side=64), Request(steps=2, side=64), Request(steps=1, side=64)]
    outcome = open_loop(SIMPLE, StaticBatches, alike)
    together, alone = 2 * 3.0 + 2.0, 2.0 + 1.0
    assert outcome.latencies == pytest.approx([WINDOW + together + alone] * 3)


def test_a_client_waits_for_its_answer() -> None:
    outcome = closed_loop(SIMPLE, OneAtATime, TWO, clients=1)
    assert outcome.latencies == [5.0, 3.0]
    assert capacity(SIMPLE, TWO) == 2 / 8


def test_packing_compares_with_the_best_call_of_any_size() -> None:
    packing = open_loop(SIMPLE, OneAtATime, TWO).packing
    assert (packing.seconds, packing.best) == (6.0, 6 * 3.0 / 4)


def test_a_fleet_starts_from_nothing_and_pays_for_its_cold_start() -> None:
    trace = [Request(steps=2, side=64, at=0.0), Request(steps=1, side=64, at=0.5)]
    made = Fleet(SIMPLE, OneAtATime, together=1, most=1).run(trace)
    began = 1.0 + COLD_START  # the scaler looks every second
    assert made.outcome.latencies == [began + 5.0, began + 5.0 + 3.0 - 0.5]
    assert made.most_workers == 1
    assert made.worker_seconds == pytest.approx(COLD_START + 8.0, abs=1.0)
    two = Fleet(SIMPLE, OneAtATime, together=1, most=9).run(trace)
    assert two.outcome.latencies == [began + 3.0 - 0.5, began + 5.0]
    assert two.most_workers == 2


def test_costs_between_beyond_and_beside_those_that_a_file_lists(tmp_path: Path) -> None:
    write(SIMPLE, tmp_path / "curve.json")
    curves = read(tmp_path / "curve.json")
    assert curves == SIMPLE
    assert [curves.step(64, rows) for rows in (1, 2, 3, 4, 8)] == [2.0, 2.0, 2.5, 3.0, 6.0]
    assert curves.step(128, 2) == 4 * 2.0
    assert curves.decode(64, 3) == 3.0
    padded = Curves("made up", "made up", SIMPLE.sides, padded=True)
    assert padded.step(64, 3) == 3.0


def test_a_trace_is_sorted_and_may_leave_out_what_is_usual(tmp_path: Path) -> None:
    lines = [{"at": 2.0, "steps": 3, "side": 96, "rows": 1}, {"at": 1.0, "steps": 4}]
    (tmp_path / "trace").write_text("\n".join(json.dumps(line) for line in lines))
    first, second = read_trace(tmp_path / "trace", side=64)
    assert first == Request(steps=4, side=64, at=1.0)
    assert second == Request(steps=3, side=96, rows=1, at=2.0)


def test_ones_own_curve_and_trace_make_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(SIMPLE, tmp_path / "curve.json")
    (tmp_path / "trace").write_text('{"at": 0, "steps": 2}\n{"at": 1, "steps": 1}\n')
    main(["--curve", str(tmp_path / "curve.json"), "--trace", str(tmp_path / "trace")])
    table = capsys.readouterr().out
    assert "| one at a time | 6.00 | 6.90 | 6.98 | 7.00 | 0.25 | 75% |" in table
    assert "| sdbento | 6.00 |" in table  # calls of more than a second are not shared


def test_rows_of_a_gpu_become_a_curve_for_each_way_to_step(tmp_path: Path) -> None:
    log = Log(tmp_path / "rows.jsonl", "1")
    log.add("eager", Kind.HEADER, figures={"device": "Some GPU"})
    for label, way in (("system", "stock"), ("system", "engine"), ("variant", "graph")):
        for images, ms in ((1, 20.0), (4, 50.0)):
            labels: dict[str, Label] = {"what": "a step", "model": "sd15", label: way}
            log.add("eager", Kind.FIGURES, labels | {"images": images}, {"ms_per_step": ms})
    other: dict[str, Label] = {"what": "a step", "model": "sdxl", "variant": "graph", "images": 1}
    log.add("graphs", Kind.FIGURES, other, {"ms_per_step": 40.0})
    decode: dict[str, Label] = {"what": "decode", "model": "sd15", "images": 1}
    log.add("vae", Kind.FIGURES, decode, {"ms_per_image": 9.0})
    made = curves_of(tmp_path)
    assert made.keys() == {"some-gpu-sd15-graph", "some-gpu-sdxl-graph"}
    assert "Some GPU" in made["some-gpu-sd15-graph"].name
    assert made["some-gpu-sd15-graph"].sides == {512: Side({2: 0.02, 8: 0.05}, {1: 0.009})}
    assert "decoding predicted" not in made["some-gpu-sd15-graph"].origin
    assert "decoding predicted" in made["some-gpu-sdxl-graph"].origin


def test_every_curve_in_the_repository_says_where_it_comes_from() -> None:
    for path in CURVES.glob("*.json"):
        assert read(path).origin.startswith("measured")


def both(
    path: str, mix: Mix, load: float | None, other: MakePolicy = OneAtATime
) -> tuple[Outcome, Outcome]:
    """Another policy and ours; `load` None: a closed loop of 8."""
    curves = read(CURVES / f"{path}.json")
    requests = mix.draw(400, curves.side, SEED)
    if load is None:
        one, ours = (closed_loop(curves, p, requests, 8) for p in (other, Ours))
    else:
        trace = poisson(requests, load * capacity(curves, requests), SEED)
        one, ours = (open_loop(curves, p, trace) for p in (other, Ours))
    return one, ours


@pytest.mark.long
@pytest.mark.parametrize("path", ["cpu-shapes", f"{H100}-sd15-graph"])
def test_under_load_the_median_halves_and_the_tail_is_no_worse(path: str) -> None:
    one, ours = both(path, MIXED, 0.9)
    assert ours.percentile(50) <= 0.5 * one.percentile(50)
    assert ours.percentile(99) <= one.percentile(99)


@pytest.mark.long
@pytest.mark.parametrize("way", ["sdxl-graph", "sdxl-compiled-graph", "sdxl-fp8-compiled-graph"])
def test_where_batches_save_little_the_median_is_half_that_of_static_batches(way: str) -> None:
    static, ours = both(f"{H100}-{way}", MIXED, 0.9, StaticBatches)
    assert ours.percentile(50) <= 0.5 * static.percentile(50)
    assert ours.percentile(99) <= static.percentile(99)


@pytest.mark.long
@pytest.mark.parametrize("load", [0.5, 0.8, None])
def test_where_batches_save_little_nobody_pays_for_them(load: float | None) -> None:
    one, ours = both(f"{H100}-sdxl-fp8-compiled-graph", MIXED, load)
    assert ours.percentile(50) <= one.percentile(50)
    assert ours.percentile(99) <= 1.02 * one.percentile(99)


@pytest.mark.long
def test_the_few_large_images_of_the_benchmarks_mix_do_not_wait_until_the_end() -> None:
    one, ours = both("cpu-shapes", MIXED, None)
    assert max(ours.latencies) <= max(one.latencies)
    assert ours.throughput >= 1.6 * one.throughput


@pytest.mark.long
def test_where_enough_rows_wait_they_are_packed_nearly_perfectly() -> None:
    curves = read(CURVES / "cpu-shapes.json")
    packing = closed_loop(curves, Ours, MIXED.draw(400, curves.side, 1), 64).packing
    assert packing.best >= 0.97 * packing.seconds


def test_two_owners_send_until_the_many_images_of_one_are_done() -> None:
    took, outcome = TwoOwners(SIMPLE, Ours, HEAVIES[1], Light("one", steps=1), 100, seed=0).run()
    assert min(took) >= 1.0
    assert len(outcome.latencies) == 100 + len(took)
    assert outcome.seconds >= 100 * 1.0  # of decoding


@pytest.mark.long
@pytest.mark.parametrize("path", ["cpu-shapes", f"{H100}-sdxl-fp8-compiled-graph"])
def test_who_asks_now_and_then_does_not_wait_for_another_ones_flood(path: str) -> None:
    curves = read(CURVES / f"{path}.json")

    def both(make: MakePolicy) -> tuple[float, Outcome]:
        took, outcome = TwoOwners(curves, make, Heavy("", 150, 150), LIGHTS[0], 150, seed=2).run()
        return max(took), outcome

    (before, one_queue), (after, ours) = both(OneQueue), both(Ours)
    assert after < before / 2  # where the light requests pass as well, once they are overdue
    assert ours.throughput >= 0.97 * one_queue.throughput
    assert ours.packing.best / ours.packing.seconds >= 0.95


@pytest.mark.parametrize(
    ("trace", "words"),
    [
        ("", "has no requests"),
        ('{"at": 0, "steps": 4}\n{"at": 0, "stepz": 4}', "line 2, is no request"),
        ("nonsense", "line 1, is no request"),
    ],
)
def test_a_trace_that_cannot_be_read_is_named(
    trace: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(trace, encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["--curve", str(CURVES / "cpu-shapes.json"), "--trace", str(file)])
    assert words in capsys.readouterr().err


def test_a_curve_that_cannot_be_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "curve.json").write_text('{"sides": []}', encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["--curve", str(tmp_path / "curve.json")])
    assert "curve.json has no curves" in capsys.readouterr().err


def test_one_request_alone_takes_as_long_by_every_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trace.jsonl").write_text('{"at": 3, "steps": 4}', encoding="utf-8")
    main(["--curve", str(CURVES / "cpu-shapes.json"), "--trace", str(tmp_path / "trace.jsonl")])
    cells = [line.split("|") for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert len({tuple(row[2:6]) for row in cells if "static" not in row[1]}) == 1
