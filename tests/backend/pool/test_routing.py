"""Which engine a request goes to."""

from __future__ import annotations

import pytest

from sdbento.backend.pool.routing import EngineLoad, Need, choose, expected_wait

GB = 10**9
SDXL = Need("sdxl", 7 * GB, 8.0)
CONTROL = Need("controlnet:canny", 2 * GB, 3.0)


def load(
    seconds: float = 0.0,
    *resident: str,
    num_requests: int = 0,
    room: int = 20 * GB,
    coming: dict[str, float] | None = None,
) -> EngineLoad:
    return EngineLoad(seconds, num_requests, frozenset(resident), coming or {}, room)


@pytest.mark.parametrize(
    ("loads", "chosen"),
    [
        pytest.param([load(), load()], 0, id="equal ones"),
        pytest.param([load(num_requests=1), load()], 1, id="the one with fewer requests"),
        pytest.param([load(9.0, "sdxl"), load(5.0, "sdxl")], 1, id="less work"),
        pytest.param([load(), load(7.0, "sdxl")], 1, id="who has the model, though it is busy"),
        pytest.param([load(), load(9.0, "sdxl")], 0, id="a hot model spreads"),
        pytest.param([load(room=GB), load()], 1, id="where it evicts nothing"),
        pytest.param(
            [load(12.0, "sdxl"), load(room=GB)], 0, id="not where it would evict, for so little"
        ),
        pytest.param([load(), load(coming={"sdxl": 2.0})], 1, id="where it is being loaded"),
        pytest.param([load(5.0), load(80.0, "sdxl"), load(3.0)], 2, id="the cheapest load"),
    ],
)
def test_a_request_goes_where_it_is_expected_to_begin_first(
    loads: list[EngineLoad], chosen: int
) -> None:
    assert choose(loads, [SDXL]) == chosen


def test_all_that_is_missing_is_loaded_and_what_is_coming_comes_at_once() -> None:
    needs = [SDXL, CONTROL]
    assert expected_wait(load(1.0), needs) == 1.0 + 8.0 + 3.0
    assert expected_wait(load(1.0, "sdxl"), needs) == 1.0 + 3.0
    both = load(1.0, coming={"sdxl": 4.0, "controlnet:canny": 2.0})
    assert expected_wait(both, needs) == 1.0 + 4.0
    assert expected_wait(load(0.0, room=8 * GB), needs) == 2 * (8.0 + 3.0)


def test_a_burst_is_divided_evenly() -> None:
    given = [0, 0, 0]
    for _ in range(30):
        loads = [load(2.0 * n, "sdxl", num_requests=n) for n in given]
        given[choose(loads, [SDXL])] += 1
    assert given == [10, 10, 10]
