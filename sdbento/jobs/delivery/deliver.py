"""What a job returns, and where its images go.

RunPod drops a result that is too large, and the job reads COMPLETED without an output. So sizes are
checked before anything is sent. A server of one's own has no such limit. Everything here blocks; it
knows no event loop and no SDK.
"""

from __future__ import annotations

import json
import re
import secrets
from base64 import b64decode, b64encode
from io import BytesIO
from typing import Any

from PIL import Image

from sdbento.errors import SDBentoError, TooLarge
from sdbento.images import codec
from sdbento.images.metadata import read_metadata
from sdbento.jobs.delivery.bucket import VARIABLES, Bucket, BucketOfJob
from sdbento.jobs.formats.native import JobInput, Output
from sdbento.jobs.runpod_format import SYNC_PREFIX
from sdbento.request.schema import GenerateResponse
from sdbento.settings import Settings

EXTENSIONS = {"png": "png", "jpeg": "jpg", "webp": "webp"}


class Delivery:
    """Turns a response into the output of a job.

    limited: whether RunPod posts the output, and so drops what is too large.
    """

    def __init__(self, settings: Settings, *, limited: bool) -> None:
        """Raises SettingsError if the settings name a bucket incompletely, or need one."""
        self._settings = settings
        self._limited = limited
        self._bucket = Bucket.configured(settings)

    def deliver(self, job_id: str, response: GenerateResponse, given: JobInput) -> Output:
        """The job's output, with the images in base64 or as URLs of a bucket.

        They go into the job's own bucket, if it brings one; into the operator's, if the output is
        above the limit or all are to be uploaded. Without a bucket, an output above RunPod's limit
        has JPEGs if the job's input allows them. Raises TooLarge if nothing helps; Unavailable or
        InvalidParameter if an upload fails.
        """
        if given.s3_config is not None:
            bucket = BucketOfJob(given.s3_config, self._settings)
            return _uploaded(bucket, job_id, response, given)
        if self._bucket is not None and self._settings.upload == "always":
            return _uploaded(self._bucket, job_id, response, given)
        output = given.output(response)
        if self._bucket is None and not self._limited:
            return output
        limit, variable = self._limit(job_id)
        if (size := posted_size(output)) <= limit:
            return output
        if self._bucket is not None:
            return _uploaded(self._bucket, job_id, response, given)
        if given.flags.allow_jpeg and given.request.output_format != "jpeg":
            output = given.output(_as_jpegs(response, size, limit))
            if posted_size(output) <= limit:
                return output
        raise _too_large(size, limit, variable, given)

    def _limit(self, job_id: str) -> tuple[int, str]:
        """The limit in bytes, and the variable that sets it."""
        if job_id.startswith(SYNC_PREFIX):
            return self._settings.runpod_max_runsync_bytes, "SDBENTO_RUNPOD_MAX_RUNSYNC_BYTES"
        return self._settings.runpod_max_run_bytes, "SDBENTO_RUNPOD_MAX_RUN_BYTES"


def posted_size(output: Any) -> int:
    """Bytes of the body in which the SDK posts `output`, which must be JSON."""
    return len(json.dumps({"output": output}, ensure_ascii=False).encode())


def _uploaded(bucket: Bucket, job_id: str, response: GenerateResponse, given: JobInput) -> Output:
    """The output with URLs in place of the images."""
    folder = re.sub(r"[^\w.-]", "_", job_id)
    output_format = given.request.output_format
    extension, media_type = EXTENSIONS[output_format], codec.MEDIA_TYPES[output_format]
    urls = [
        # Nobody can guess such a name, should the bucket be public.
        bucket.upload(
            f"{folder}/{i}-{secrets.token_hex(8)}.{extension}", b64decode(image), media_type
        )
        for i, image in enumerate(response.images)
    ]
    return given.output(response.model_copy(update={"images": urls}))


def _as_jpegs(response: GenerateResponse, size: int, limit: int) -> GenerateResponse:
    """The response with JPEG images, metadata and all, and a warning that says why."""

    def convert(image: str) -> str:
        data = b64decode(image)
        with Image.open(BytesIO(data)) as opened:
            jpeg = codec.encode(opened.convert("RGB"), "jpeg", read_metadata(data))
        return b64encode(jpeg).decode("ascii")

    converted = [convert(image) for image in response.images]
    warning = f"sent as JPEG: the result had {size} bytes, the limit is {limit}"
    return response.model_copy(
        update={"images": converted, "warnings": [*response.warnings, warning]}
    )


def _too_large(size: int, limit: int, variable: str, given: JobInput) -> SDBentoError:
    advice = "ask for fewer or smaller images"
    if given.request.output_format == "png" and not given.flags.allow_jpeg:
        advice += ', for output_format "jpeg" or "webp", or set "allow_jpeg": true'
    return TooLarge(
        f"the result has {size} bytes; the limit is {limit} ({variable}); {advice}; or let the "
        f"operator configure a bucket ({', '.join(VARIABLES)})"
    )
