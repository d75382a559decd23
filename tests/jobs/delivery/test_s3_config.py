"""The bucket that a client names in a job: what is accepted, and that its secrets are not shown."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sdbento.errors import InvalidParameter
from sdbento.jobs.delivery.bucket import BucketOfJob
from sdbento.jobs.delivery.s3_config import S3Config, s3_config_of
from sdbento.settings import Settings

GIVEN = {
    "accessId": "somebody",
    "accessSecret": "hush",
    "bucketName": "pictures",
    "endpointUrl": "https://s3.eu-west-1.amazonaws.com",
}


def read(**changed: Any) -> S3Config:
    config = s3_config_of(GIVEN | changed)
    assert config is not None
    return config


@pytest.mark.parametrize("given", [None, {}, dict.fromkeys(GIVEN), dict.fromkeys(GIVEN, "")])
def test_an_empty_one_is_none(given: Any) -> None:
    assert s3_config_of(given) is None


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize(
    "value", [None, "", 5, ["x"], {"a": "b"}, True, "é\n", "\ud800", "x" * 9999]
)
def test_a_wrong_value_is_named_but_not_shown(name: str, value: Any) -> None:
    with pytest.raises(InvalidParameter) as caught:
        BucketOfJob(read(**{name: value}), Settings())
    assert caught.value.param == f"s3Config.{name}"
    assert "hush" not in caught.value.message


@pytest.mark.parametrize("given", ["x", [1], 5, {"accessId": "x"}, {"other": "x"}])
def test_an_incomplete_one_is_refused(given: Any) -> None:
    with pytest.raises(InvalidParameter, match="s3Config"):
        s3_config_of(given)


@pytest.mark.parametrize("name", [".", "..", "a/b", "a?b", "arn:aws:s3:us-east-1:1:accesspoint/x"])
def test_a_bucket_cannot_be_a_path(name: str) -> None:
    with pytest.raises(InvalidParameter, match="bucketName"):
        read(bucketName=name)


@pytest.mark.parametrize(
    "url",
    ["https://127.0.0.1:9000", "https://169.254.169.254/latest", "https://[::1]", "https://10.0.0.1",
     "http://s3.example.com", "https://user:password@s3.example.com", "https://s3.example.com:0",
     "ftp://s3.example.com", "s3.example.com", "https://", "https://a b.com", "https://pictures.",
     "https://s3.example.com:٣", "https://xn--/", "https://a..b"],
)  # fmt: skip
def test_addresses_that_must_not_be_reached_are_refused_at_once(url: str) -> None:
    with pytest.raises(InvalidParameter, match=r"s3Config\.endpointUrl") as caught:
        BucketOfJob(read(endpointUrl=url), Settings())
    assert "password" not in caught.value.message.replace("user name or password", "")


def test_what_is_stored_is_read_again_and_secrets_are_not_in_a_repr() -> None:
    config = read(other="ignored")
    assert json.loads(config.stored()) == GIVEN
    assert S3Config.of_stored(config.stored()) == config
    assert "hush" not in f"{config!r} {config}"
    assert "somebody" not in f"{config!r} {config}"
