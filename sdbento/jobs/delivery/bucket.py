"""S3 buckets for results: the operator's, and one that a job brings along.

A bucket of a job is an address and credentials of a client. So boto3 only signs for it, which needs
no connection, and `outbound` sends. Knows nothing of jobs.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping
from threading import Lock
from urllib.parse import urlsplit, urlunsplit

from sdbento.access.threads import SharedThreads
from sdbento.errors import InvalidParameter, LimitReached, Unavailable
from sdbento.jobs.delivery.s3_config import S3Config
from sdbento.outbound.http import Body, Outbound
from sdbento.outbound.urls import check_send
from sdbento.settings import Settings, SettingsError

log = logging.getLogger(__name__)

VARIABLES = (
    "BUCKET_ENDPOINT_URL",
    "BUCKET_ACCESS_KEY_ID",
    "BUCKET_SECRET_ACCESS_KEY",
    "BUCKET_NAME",
)
ENDPOINT = "s3Config.endpointUrl"
PAUSES = (0.0, 1.0, 2.0)  # seconds before each attempt to upload an image
UPLOADS = 8  # to the operator's bucket at once
_making = Lock()  # boto3's default session may make one client at a time
_REGION = re.compile(r"s3[.-]([a-z]+-[a-z-]+-\d)\.|([a-z]+\d)\.digitaloceanspaces\.com")


class Bucket:
    """An S3 bucket to upload results to. To make one takes a while; `close` it at the end.

    url_seconds: how long the URLs of uploaded results can be read.
    """

    def __init__(
        self, endpoint: str, key_id: str, secret: str, name: str, url_seconds: int
    ) -> None:
        import boto3
        from botocore.config import Config

        self.name = name
        self._url_seconds = url_seconds
        self._threads = SharedThreads(UPLOADS, "sdbento-bucket")
        config = Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            connect_timeout=10,
            read_timeout=20,
            retries={"total_max_attempts": len(PAUSES)},
            # Only AWS understands checksums in trailers: other stores refuse the upload, or
            # store the checksum as a part of the file.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        with _making:
            self.client = boto3.client(
                "s3",
                endpoint_url=_without_bucket(endpoint, name),
                aws_access_key_id=key_id,
                aws_secret_access_key=secret,
                region_name=_region(endpoint),
                config=config,
            )

    @classmethod
    def configured(cls, settings: Settings) -> Bucket | None:
        """The bucket of the settings, None if they name none.

        Raises SettingsError if they need one, name it incompletely, or if its address is no URL.
        """
        key_id, secret = settings.bucket_access_key_id, settings.bucket_secret_access_key
        given = (
            settings.bucket_endpoint_url,
            key_id and key_id.get_secret_value(),
            secret and secret.get_secret_value(),
            settings.bucket_name,
        )
        is_needed = settings.upload == "always" or settings.job_results == "bucket"
        if not any(given) and not is_needed:
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

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def upload(self, key: str, data: bytes, media_type: str) -> str:
        """Store `data`. Returns a URL at which anybody can read it for `url_seconds`.

        Raises Unavailable, or InvalidParameter if the bucket came with the job.
        """
        place = {"Bucket": self.name, "Key": key}
        await self._store(place, data, media_type)
        return await asyncio.to_thread(self._signed, "get_object", place)

    async def _store(self, place: Mapping[str, str], data: bytes, media_type: str) -> None:
        # Not on asyncio's threads: a bucket that hangs would keep all of them busy.
        await self._threads.run(self._put, place, data, media_type)

    def _put(self, place: Mapping[str, str], data: bytes, media_type: str) -> None:
        """Blocking, for long."""
        from botocore.exceptions import ClientError

        problem = f"the result could not be uploaded to bucket {self.name}"
        try:
            self.client.put_object(**place, Body=data, ContentType=media_type)
        except ClientError as error:
            raise Unavailable(f"{problem}: {error.response['Error']['Code']}") from error
        except Exception as error:  # botocore's others share no base
            log.error("%s: %s", problem, error)  # names a host that is the operator's matter
            raise Unavailable(f"{problem}; the server's log says why") from error

    def _signed(self, action: str, place: Mapping[str, str]) -> str:
        url: str = self.client.generate_presigned_url(
            action, Params=dict(place), ExpiresIn=self._url_seconds
        )
        return url


class BucketOfJob(Bucket):
    """A bucket that a client names for one job."""

    def __init__(
        self, given: S3Config, settings: Settings, outbound: Outbound | None = None
    ) -> None:
        """outbound: what it sends with; None: something of its own.

        Raises InvalidParameter if the address is refused without a connection.
        """
        from botocore.exceptions import BotoCoreError

        check_send(given.endpoint_url, settings, param=ENDPOINT)
        key_id, secret = given.access_id.get_secret_value(), given.access_secret.get_secret_value()
        try:
            super().__init__(
                given.endpoint_url, key_id, secret, given.bucket_name, settings.bucket_url_seconds
            )
            self._signed("put_object", {"Bucket": self.name, "Key": "any"})  # reads the URL
        except (ValueError, BotoCoreError):
            raise InvalidParameter(
                f"{ENDPOINT} must be a URL as https://s3.example.com", param=ENDPOINT
            ) from None
        self._outbound = outbound or Outbound(settings)

    async def _store(self, place: Mapping[str, str], data: bytes, media_type: str) -> None:
        asked = {**place, "ContentType": media_type}
        url = await asyncio.to_thread(self._signed, "put_object", asked)
        headers = {"content-type": media_type}
        for pause in PAUSES:
            await asyncio.sleep(pause)
            try:
                answer = await self._outbound.send(
                    "PUT", url, Body.of(data), headers, param=ENDPOINT
                )
            except LimitReached as error:  # the images need not be made again
                raise Unavailable(error.message) from error
            if answer.accepted:
                return
            if answer.status < 500:
                break
        raise InvalidParameter(
            f"the result could not be uploaded to the bucket of s3Config: its host answered "
            f"{answer.status}",
            param="s3Config",
        )


def _without_bucket(endpoint: str, bucket: str) -> str:
    """The endpoint without the bucket's name, which RunPod's guide has in the host.

    boto3 would otherwise address the bucket twice.
    """
    parts = urlsplit(endpoint)
    return urlunsplit((parts.scheme, parts.netloc.removeprefix(f"{bucket}."), "", "", ""))


def _region(endpoint: str) -> str:
    """The region that the host names; signatures are made for one. Most stores ignore it."""
    match = _REGION.search(urlsplit(endpoint).netloc)
    return next(filter(None, match.groups())) if match else "us-east-1"
