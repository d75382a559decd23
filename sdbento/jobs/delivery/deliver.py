"""What a job returns, and where its images go.

RunPod drops a result that is too large, and the job reads COMPLETED without an output. So sizes are
checked before anything is sent. A server of one's own has no such limit. Knows no SDK.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image

from sdbento.errors import SDBentoError, TooLarge
from sdbento.images.codec import MEDIA_TYPES, SUFFIXES, encode
from sdbento.images.metadata import read_metadata
from sdbento.jobs.delivery.bucket import VARIABLES, Bucket, BucketOfJob
from sdbento.jobs.delivery.s3_config import S3Config
from sdbento.jobs.table import SYNC_PREFIX
from sdbento.metrics.definitions import uploads_total
from sdbento.outbound.http import Outbound
from sdbento.request.schema import OutputFormat
from sdbento.settings import Settings


@dataclass(frozen=True)
class Result:
    """What a job has made, before it is known where its images go.

    images: in base64. write: makes the output, which is JSON, from them or from their URLs, and
    from warnings that have arisen since. allow_jpeg: None where the format has no such choice.
    """

    images: list[str]
    write: Callable[[list[str], list[str]], Any]
    output_format: OutputFormat = "png"
    allow_jpeg: bool | None = None
    s3_config: S3Config | None = None

    def output(self) -> Any:
        return self.write(self.images, [])


class Delivery:
    """Turns the results of jobs into their outputs. `close` it at the end.

    limited: whether RunPod posts the output, and so drops what is too large.
    """

    def __init__(self, settings: Settings, *, limited: bool) -> None:
        """Raises SettingsError if the settings name a bucket incompletely, or need one."""
        self._settings = settings
        self._limited = limited
        self._bucket = Bucket.configured(settings)
        self._outbound = Outbound(settings)

    def close(self) -> None:
        if self._bucket is not None:
            self._bucket.close()

    async def deliver(self, job_id: str, result: Result) -> Any:
        """The job's output, with the images in base64 or as URLs of a bucket.

        They go into the job's own bucket, if it brings one; into the operator's, if the output is
        above the limit or all are to be uploaded. Without a bucket, an output above RunPod's limit
        has JPEGs if the job allows them. Raises TooLarge if nothing helps; Unavailable or
        InvalidParameter if an upload fails. If this is cancelled, an upload to the job's own bucket
        stops at once.
        """
        if (config := result.s3_config) is not None:
            made = asyncio.to_thread(BucketOfJob, config, self._settings, self._outbound)
            return await self._uploaded(await made, job_id, result)
        if self._bucket is not None and self._settings.upload == "always":
            return await self._uploaded(self._bucket, job_id, result)
        try:
            return await asyncio.to_thread(self._within_limit, job_id, result)
        except TooLarge:
            if self._bucket is None:
                raise
            return await self._uploaded(self._bucket, job_id, result)

    def _within_limit(self, job_id: str, result: Result) -> Any:
        """The output with its images. Raises TooLarge. Blocking, as the methods below."""
        output = result.output()
        if self._bucket is None and not self._limited:
            return output
        limit, variable = self._limit(job_id)
        if (size := posted_size(output)) <= limit:
            return output
        if self._bucket is None and result.allow_jpeg and result.output_format != "jpeg":
            warning = f"sent as JPEG: the result had {size} bytes, the limit is {limit}"
            output = result.write([_as_jpeg(image) for image in result.images], [warning])
            if posted_size(output) <= limit:
                return output
        raise _too_large(size, limit, variable, result)

    async def _uploaded(self, bucket: Bucket, job_id: str, result: Result) -> Any:
        """The output with URLs in place of the images. Raises TooLarge if the rest is too large."""
        urls = await _upload(bucket, job_id, result)
        return await asyncio.to_thread(self._with_urls, job_id, result, urls)

    def _with_urls(self, job_id: str, result: Result, urls: list[str]) -> Any:
        output = result.write(urls, [])
        limit, variable = self._limit(job_id)
        if self._limited and (size := posted_size(output)) > limit:
            raise TooLarge(
                f"without its images the result has {size} bytes; the limit is {limit} ({variable})"
            )
        return output

    def _limit(self, job_id: str) -> tuple[int, str]:
        """The limit in bytes, and the variable that sets it."""
        if job_id.startswith(SYNC_PREFIX):
            return self._settings.runpod_max_runsync_bytes, "SDBENTO_RUNPOD_MAX_RUNSYNC_BYTES"
        return self._settings.runpod_max_run_bytes, "SDBENTO_RUNPOD_MAX_RUN_BYTES"


def posted_size(output: Any) -> int:
    """Bytes of the body in which the SDK posts `output`, which must be JSON."""
    return len(json.dumps({"output": output}, ensure_ascii=False).encode())


async def _upload(bucket: Bucket, job_id: str, result: Result) -> list[str]:
    """The URLs of the images, once they are in the bucket."""
    folder = re.sub(r"[^\w.-]", "_", job_id)
    suffix, media_type = SUFFIXES[result.output_format], MEDIA_TYPES[result.output_format]
    urls = []
    for i, image in enumerate(result.images):
        unguessable = secrets.token_hex(8)  # should the bucket be public
        key = f"{folder}/{i}-{unguessable}{suffix}"
        data = await asyncio.to_thread(b64decode, image)
        try:
            urls.append(await bucket.upload(key, data, media_type))
        except Exception:
            uploads_total.add("failed")
            raise
        uploads_total.add("ok")
    return urls


def _as_jpeg(image: str) -> str:
    """A JPEG with the metadata of `image`; both in base64."""
    data = b64decode(image)
    with Image.open(BytesIO(data)) as opened:
        jpeg = encode(opened.convert("RGB"), "jpeg", read_metadata(data))
    return b64encode(jpeg).decode("ascii")


def _too_large(size: int, limit: int, variable: str, result: Result) -> SDBentoError:
    advice = "ask for fewer or smaller images"
    if result.output_format == "png" and result.allow_jpeg is False:
        advice += ', for output_format "jpeg" or "webp", or set "allow_jpeg": true'
    return TooLarge(
        f"the result has {size} bytes; the limit is {limit} ({variable}); {advice}; or let the "
        f"operator configure a bucket ({', '.join(VARIABLES)})"
    )
