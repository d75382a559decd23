"""Which bodies of /run and /runsync are accepted."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sdbento.errors import (
    InvalidParameter,
    MalformedRequest,
)
from sdbento.jobs.runpod_format import WEEK, new_job
from sdbento.settings import Settings
from tests.support.job_server import SETTINGS

BUCKET = json.dumps(
    {
        "accessId": "somebody",
        "accessSecret": "hush",
        "bucketName": "pictures",
        "endpointUrl": "https://s3.example.com",
    }
)


def accepted(body: str, settings: Settings = SETTINGS, sync: bool = False) -> Any:
    return new_job(body.encode(), settings, sync=sync)


@pytest.mark.parametrize(
    "body",
    ["", "{", "[]", "1", "{}", '{"input": null}', '{"input": []}', '{"input": "x"}',
     '{"prompt": "x"}', "[" * 100_000, '{"input": {"prompt": "\\ud800"}}'],
)  # fmt: skip
def test_a_body_without_an_input_object_is_refused(body: str) -> None:
    with pytest.raises(MalformedRequest):
        accepted(body)


@pytest.mark.parametrize(
    ("around", "param"),
    [
        ('"policy": {"executionTimeout": 4999}', "policy.executionTimeout"),
        (f'"policy": {{"executionTimeout": {WEEK + 1}}}', "policy.executionTimeout"),
        ('"policy": {"ttl": 9999}', "policy.ttl"),
        ('"policy": {"ttl": "soon"}', "policy.ttl"),
        ('"policy": {"lowPriority": "perhaps"}', "policy.lowPriority"),
        ('"policy": 5', "policy"),
        ('"webhook": 5', "webhook"),
        ('"webhook": "ftp://listener.example/"', "webhook"),
        ('"webhook": "https://bob:secret@listener.example/"', "webhook"),
        ('"webhook": "nonsense"', "webhook"),
        ('"s3Config": "x"', "s3Config"),
        ('"s3Config": {"accessId": "x"}', "s3Config.accessSecret"),
        (f'"s3Config": {BUCKET.replace("https:", "ftp:")}', "s3Config.endpointUrl"),
    ],
)
def test_bad_fields_beside_the_input_are_refused_at_once(around: str, param: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        accepted(f'{{"input": {{"prompt": "x"}}, {around}}}')
    assert caught.value.param == param


def test_a_webhook_must_be_https_unless_private_ones_are_allowed() -> None:
    body = '{"input": {"prompt": "x"}, "webhook": "http://listener.example/"}'
    assert accepted(body).webhook == "http://listener.example/"
    with pytest.raises(InvalidParameter, match="use https"):
        accepted(body, Settings())


def test_a_bucket_is_stored_with_the_job_unless_its_address_is_private() -> None:
    body = f'{{"input": {{"prompt": "x"}}, "s3Config": {BUCKET}}}'
    job = accepted(body)
    assert json.loads(job.s3_config) == json.loads(BUCKET)
    assert "hush" not in repr(job) and "hush" not in job.input
    with pytest.raises(InvalidParameter, match="private"):
        accepted(body.replace("s3.example.com", "169.254.169.254"), Settings())


def test_runpods_defaults_and_limits_hold() -> None:
    plain = accepted('{"input": {"prompt": "x"}, "s3Config": {}, "webhook": null, "policy": null}')
    assert (plain.ttl, plain.execution_timeout, plain.keep) == (86_400_000, 600_000, 1_800_000)
    assert (plain.low_priority, plain.webhook) == (False, None)
    nulls = '"policy": {"executionTimeout": null, "ttl": null, "lowPriority": null}'
    assert accepted(f'{{"input": {{"prompt": "x"}}, {nulls}}}').ttl == plain.ttl
    policy = '"policy": {"executionTimeout": 5000, "ttl": 10000, "lowPriority": true}'
    job = accepted(f'{{"input": {{"prompt": "x"}}, {policy}}}', sync=True)
    assert (job.execution_timeout, job.ttl, job.low_priority) == (5000, 10_000, True)
    assert (job.id[:5], job.keep) == ("sync-", 60_000)


@pytest.mark.parametrize("seed", ["", ', "seed": null', ', "seed": -1'])
def test_a_seed_is_chosen_once_when_the_job_is_accepted(seed: str) -> None:
    body = f'{{"input": {{"prompt": "x"{seed}}}}}'
    seeds = {json.loads(accepted(body).input)["seed"] for _ in range(5)}
    assert len(seeds) == 5 and min(seeds) >= 0
    assert json.loads(accepted('{"input": {"prompt": "x", "seed": 4}}').input)["seed"] == 4


@pytest.mark.parametrize(
    ("given", "model"),
    [
        ('{"prompt": "x"}', SETTINGS.sd_model),
        ('{"prompt": "x", "model": "rare"}', "rare"),
        ('{"prompt": "x", "model": "ra\\u0000re"}', None),
        ('{"prompt": "x", "steps": 5}', None),  # a call of another API, which names it otherwise
    ],
)
def test_the_model_of_a_job_is_known_before_it_runs(given: str, model: str | None) -> None:
    assert accepted(f'{{"input": {given}}}').model == model
