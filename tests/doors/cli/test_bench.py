"""`sdbento bench`: what it asks of a real server, and what it says of the answers."""

from __future__ import annotations

import json
from collections import Counter
from random import Random

import click
import pytest
from click.testing import CliRunner

from sdbento.doors.cli.bench import Load, Outcome, StepRange, _fields, as_text, bench, measure
from sdbento.errors import SDBentoError, UnknownModel
from tests.support.server import Server

QUICK = {"prompt": "a red circle", "width": 64, "height": 64}


def load(server: Server | None = None, **fields: object) -> Load:
    url = "http://localhost:1" if server is None else server.url
    return Load(url, None, 2, 0.5, (2, 4), QUICK | fields, seed=3)


async def test_clients_ask_until_the_time_is_over(server: Server) -> None:
    seen: list[int] = []
    outcome = await measure(load(server), lambda so_far: seen.append(so_far.num_images))
    assert len(outcome.latencies) == outcome.num_images == seen[-1] >= 2
    assert outcome.elapsed >= 0.5
    assert outcome.model == "shapes"
    assert not outcome.failures


def test_the_command_prints_json(server: Server) -> None:
    args = ["--url", server.url, "--seconds", "0.1", "--clients", "1", "--steps", "2", "--json"]
    result = CliRunner().invoke(bench, args)
    printed = json.loads(result.stdout)
    assert (result.exit_code, printed["requests"] >= 1, printed["failures"]) == (0, True, {})
    assert printed["latency_seconds"]["p50"] > 0


async def test_what_the_first_request_is_refused_for_ends_it(server: Server) -> None:
    with pytest.raises(UnknownModel, match="nope"):
        await measure(load(server, model="nope"))


async def test_a_server_that_is_not_there_ends_it() -> None:
    with pytest.raises(SDBentoError, match="connection"):
        await measure(load())


def test_each_request_has_a_seed_and_steps_of_its_own() -> None:
    chance = Random(1)
    asked = [_fields(load(), chance) for _ in range(50)]
    assert {fields["num_inference_steps"] for fields in asked} == {2, 3, 4}
    assert len({fields["seed"] for fields in asked}) == 50


def test_the_text_names_what_failed() -> None:
    latencies = [0.1 * i for i in range(1, 101)]
    outcome = Outcome(latencies, 100, Counter({"429 queue_full": 7}), 20.0, "shapes")
    assert as_text(load(), outcome).splitlines() == [
        "2 clients, 20.0 s, model shapes",
        "5.00 images/s: 100 images in 100 requests; 7 failed",
        "answered after p50 5.00 s, p95 9.50 s, p99 9.90 s, at most 10.00 s",
        "7 x 429 queue_full",
    ]


@pytest.mark.parametrize(("text", "steps"), [("20", (20, 20)), ("4-40", (4, 40))])
def test_steps_are_a_number_or_a_range(text: str, steps: tuple[int, int]) -> None:
    assert StepRange().convert(text, None, None) == steps


@pytest.mark.parametrize("text", ["x", "4-", "-4", "9-4", "4-x"])
def test_other_steps_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        StepRange().convert(text, None, None)
