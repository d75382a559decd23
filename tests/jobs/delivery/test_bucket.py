"""The bucket for large results: its settings and addresses."""

from __future__ import annotations

import pytest

from sdbento.environment import child_environment, load_settings
from sdbento.jobs.delivery.bucket import Bucket
from sdbento.settings import Settings, SettingsError


def bucket_settings(endpoint: str, key_id: str = "somebody") -> Settings:
    return load_settings(
        bucket_endpoint_url=endpoint,
        bucket_access_key_id=key_id,
        bucket_secret_access_key="hush",
        bucket_name="bucket",
        runpod_max_run_bytes=1024,
    )


@pytest.mark.parametrize("endpoint", ["s3.example.com", "foo:bar", "http://"])
def test_a_bucket_address_that_is_no_url_prevents_the_start(endpoint: str) -> None:
    with pytest.raises(SettingsError, match="must be a URL as https"):
        Bucket.configured(bucket_settings(endpoint))


def test_a_half_configured_bucket_prevents_the_start() -> None:
    with pytest.raises(SettingsError, match="BUCKET_ACCESS_KEY_ID, BUCKET_SECRET_ACCESS_KEY"):
        Bucket.configured(load_settings(bucket_endpoint_url="https://s3.example", bucket_name="b"))
    with pytest.raises(SettingsError, match="BUCKET_ENDPOINT_URL, BUCKET_ACCESS_KEY_ID"):
        Bucket.configured(load_settings(upload="always"))
    assert Bucket.configured(load_settings(bucket_name="")) is None  # RunPod's forms send ""


@pytest.mark.parametrize(
    ("endpoint", "start"),
    [
        ("https://s3.us-west-2.amazonaws.com", "https://s3.us-west-2.amazonaws.com/bucket/a?"),
        ("https://bucket.s3.eu-west-1.amazonaws.com/", "https://s3.eu-west-1.amazonaws.com/bu"),
        ("https://fra1.digitaloceanspaces.com", "https://fra1.digitaloceanspaces.com/bucket/a?"),
        ("https://x.r2.cloudflarestorage.com", "https://x.r2.cloudflarestorage.com/bucket/a?"),
    ],
)
def test_endpoints_are_accepted_as_runpod_and_others_write_them(endpoint: str, start: str) -> None:
    bucket = Bucket.configured(bucket_settings(endpoint))
    assert bucket is not None
    place = {"Bucket": "bucket", "Key": "a"}
    url = bucket.client.generate_presigned_url("get_object", Params=place)
    assert url.startswith(start)
    region = {"us-west-2", "eu-west-1", "fra1"} & set(endpoint.replace("/", ".").split("."))
    assert f"%2F{next(iter(region), 'us-east-1')}%2Fs3" in url


def test_secrets_are_not_shown_but_reach_a_child() -> None:
    settings = bucket_settings("https://s3.example", key_id="somebody")
    shown = f"{settings!r} {settings.changed()}"
    assert "hush" not in shown and "somebody" not in shown
    assert child_environment(settings)["BUCKET_SECRET_ACCESS_KEY"] == "hush"
    with pytest.raises(SettingsError) as caught:
        load_settings(bucket_secret_access_key=12345)
    assert "12345" not in str(caught.value)
