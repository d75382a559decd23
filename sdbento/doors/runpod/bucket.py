"""An S3 bucket for results that are too large to post. Knows nothing of jobs."""

from __future__ import annotations

import re
from urllib.parse import urlsplit, urlunsplit

from sdbento.errors import Unavailable
from sdbento.settings import Settings, SettingsError

VARIABLES = (
    "BUCKET_ENDPOINT_URL",
    "BUCKET_ACCESS_KEY_ID",
    "BUCKET_SECRET_ACCESS_KEY",
    "BUCKET_NAME",
)
_REGION = re.compile(r"s3[.-]([a-z]+-[a-z-]+-\d)\.|([a-z]+\d)\.digitaloceanspaces\.com")


class Bucket:
    """An S3 bucket to upload results to. Thread-safe; everything blocks.

    url_seconds: how long the URLs of uploaded results can be read.
    """

    def __init__(
        self, endpoint: str, key_id: str, secret: str, name: str, url_seconds: int
    ) -> None:
        import boto3
        from botocore.config import Config

        self.name = name
        self._url_seconds = url_seconds
        self._client = boto3.client(
            "s3",
            endpoint_url=_without_bucket(endpoint, name),
            aws_access_key_id=key_id,
            aws_secret_access_key=secret,
            region_name=_region(endpoint),
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                connect_timeout=10,
                read_timeout=20,
                retries={"total_max_attempts": 3},
                # Only AWS understands checksums in trailers: other stores refuse the upload, or
                # store the checksum as a part of the file.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    @classmethod
    def configured(cls, settings: Settings) -> Bucket | None:
        """The bucket of the settings, None if they name none.

        Raises SettingsError if they name it incompletely, or if its address is no URL.
        """
        key_id, secret = settings.bucket_access_key_id, settings.bucket_secret_access_key
        given = (
            settings.bucket_endpoint_url,
            key_id and key_id.get_secret_value(),
            secret and secret.get_secret_value(),
            settings.bucket_name,
        )
        if not any(given):
            return None
        missing = [name for name, value in zip(VARIABLES, given, strict=True) if not value]
        if missing:
            raise SettingsError(f"{', '.join(missing)}: must be set as well to upload results")
        endpoint, access_key, secret_key, name = map(str, given)
        try:
            return cls(endpoint, access_key, secret_key, name, settings.bucket_url_seconds)
        except ValueError:
            raise SettingsError(
                f"BUCKET_ENDPOINT_URL={endpoint!r}: must be a URL as https://s3.example.com"
            ) from None

    def upload(self, key: str, data: bytes, media_type: str) -> str:
        """Store `data`. Returns a URL at which anybody can read it for `url_seconds`.

        Raises Unavailable.
        """
        place = {"Bucket": self.name, "Key": key}
        try:
            self._client.put_object(**place, Body=data, ContentType=media_type)
            return str(
                self._client.generate_presigned_url(
                    "get_object", Params=place, ExpiresIn=self._url_seconds
                )
            )
        except Exception as exc:  # botocore's errors share no base; their texts have no secrets
            reason = " ".join(str(exc).split())[:300]
            raise Unavailable(
                f"the result could not be uploaded to bucket {self.name}: {reason}"
            ) from exc


def _without_bucket(endpoint: str, bucket: str) -> str:
    """The endpoint without the bucket's name, which RunPod's guide has in the host.

    boto3 would otherwise address the bucket twice.
    """
    parts = urlsplit(endpoint)
    return urlunsplit(parts._replace(netloc=parts.netloc.removeprefix(f"{bucket}."), path=""))


def _region(endpoint: str) -> str:
    """The region that the host names; signatures are made for one. Most stores ignore it."""
    match = _REGION.search(urlsplit(endpoint).netloc)
    return next(filter(None, match.groups())) if match else "us-east-1"
