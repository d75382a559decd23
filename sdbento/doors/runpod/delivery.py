"""What a RunPod job returns, and where it goes when it is larger than the platform takes.

The platform drops a result that is too large and the job reads COMPLETED without output, so sizes
are counted before anything is sent. Everything here blocks; it knows no event loop and no SDK.
"""

from __future__ import annotations

import json
import re
from base64 import b64decode, b64encode
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

from PIL import Image

from sdbento.errors import SDBentoError, TooLarge, Unavailable
from sdbento.images import codec
from sdbento.request.schema import GenerateResponse, OutputFormat
from sdbento.settings import Settings, SettingsError

Shape = Literal["images", "full"]
Output = list[str] | dict[str, Any]

SYNC_PREFIX = "sync-"  # of the ids that the platform gives to /runsync jobs
EXTENSIONS = {"png": "png", "jpeg": "jpg", "webp": "webp"}
VARIABLES = (
    "BUCKET_ENDPOINT_URL",
    "BUCKET_ACCESS_KEY_ID",
    "BUCKET_SECRET_ACCESS_KEY",
    "BUCKET_NAME",
)
_REGION = re.compile(r"s3[.-]([a-z]+-[a-z-]+-\d)\.|([a-z]+\d)\.digitaloceanspaces\.com")


class Bucket:
    """An S3 bucket that results are uploaded to. Its client is thread-safe."""

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
                # Checksums in trailers are AWS's own; others refuse or store them.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    @classmethod
    def configured(cls, settings: Settings) -> Bucket | None:
        """The bucket that the settings name, if they do; SettingsError where they do by half."""
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
        endpoint, key, hidden, name = map(str, given)
        try:
            return cls(endpoint, key, hidden, name, settings.bucket_url_seconds)
        except ValueError:
            raise SettingsError(
                f"BUCKET_ENDPOINT_URL={endpoint!r}: must be a URL as https://s3.example.com"
            ) from None

    def upload(self, key: str, data: bytes, media_type: str) -> str:
        """Store `data`; a URL that anybody can read it by for a while. Raises Unavailable."""
        place = {"Bucket": self.name, "Key": key}
        try:
            self._client.put_object(**place, Body=data, ContentType=media_type)
            return str(
                self._client.generate_presigned_url(
                    "get_object", Params=place, ExpiresIn=self._url_seconds
                )
            )
        except Exception as exc:  # botocore has a tree of its own; its texts hold no secrets
            reason = " ".join(str(exc).split())[:300]
            raise Unavailable(
                f"the result could not be uploaded to bucket {self.name}: {reason}"
            ) from exc


def _without_bucket(endpoint: str, bucket: str) -> str:
    """RunPod's guide names the bucket in the host as well; boto3 wants the bare host."""
    parts = urlsplit(endpoint)
    return urlunsplit(parts._replace(netloc=parts.netloc.removeprefix(f"{bucket}."), path=""))


def _region(endpoint: str) -> str:
    match = _REGION.search(urlsplit(endpoint).netloc)
    return next(filter(None, match.groups())) if match else "us-east-1"


@dataclass(frozen=True)
class Wish:
    """How a job wants its result."""

    shape: Shape = "images"
    allow_jpeg: bool = False
    output_format: OutputFormat = "png"


class Delivery:
    """Turns a response into what the job returns, within the platform's limits."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._bucket = Bucket.configured(settings)

    def deliver(self, job_id: str, response: GenerateResponse, wish: Wish) -> Output:
        """The job's output: base64; above the limit URLs, else JPEGs where allowed, else TooLarge.

        Blocking.
        """
        output = shaped(response, wish.shape)
        limit, variable = self._limit(job_id)
        if (size := posted_size(output)) <= limit:
            return output
        if self._bucket is not None:
            return shaped(self._upload(self._bucket, job_id, response, wish), wish.shape)
        if wish.allow_jpeg and wish.output_format != "jpeg":
            output = shaped(as_jpegs(response, size, limit), wish.shape)
            if posted_size(output) <= limit:
                return output
        raise too_large(size, limit, variable, wish)

    def _limit(self, job_id: str) -> tuple[int, str]:
        if job_id.startswith(SYNC_PREFIX):
            return self._settings.runpod_max_runsync_bytes, "SDBENTO_RUNPOD_MAX_RUNSYNC_BYTES"
        return self._settings.runpod_max_run_bytes, "SDBENTO_RUNPOD_MAX_RUN_BYTES"

    def _upload(
        self, bucket: Bucket, job_id: str, response: GenerateResponse, wish: Wish
    ) -> GenerateResponse:
        folder = re.sub(r"[^\w.-]", "_", job_id)
        urls = [
            bucket.upload(
                f"{folder}/{i}.{EXTENSIONS[wish.output_format]}",
                b64decode(image),
                codec.MEDIA_TYPES[wish.output_format],
            )
            for i, image in enumerate(response.images)
        ]
        return response.model_copy(update={"images": urls})


def shaped(response: GenerateResponse, shape: Shape) -> Output:
    return response.model_dump(mode="json") if shape == "full" else response.images


def posted_size(output: Output) -> int:
    """Bytes of the body that carries `output`, as the SDK writes it."""
    return len(json.dumps({"output": output}, ensure_ascii=False).encode())


def as_jpegs(response: GenerateResponse, size: int, limit: int) -> GenerateResponse:
    """The same pictures as JPEG files, parameters embedded, with a warning that says why."""

    def convert(image: str, seed: int) -> str:
        with Image.open(BytesIO(b64decode(image))) as picture:
            parameters = response.parameters | {"seed": seed}
            data = codec.encode(picture.convert("RGB"), "jpeg", parameters)
        return b64encode(data).decode("ascii")

    converted = [convert(*pair) for pair in zip(response.images, response.seeds, strict=True)]
    warning = f"sent as JPEG: the result had {size} bytes, the limit is {limit}"
    return response.model_copy(
        update={"images": converted, "warnings": [*response.warnings, warning]}
    )


def too_large(size: int, limit: int, variable: str, wish: Wish) -> SDBentoError:
    advice = "ask for fewer or smaller images"
    if wish.output_format == "png" and not wish.allow_jpeg:
        advice += ', for output_format "jpeg" or "webp", or set "allow_jpeg": true'
    return TooLarge(
        f"the result has {size} bytes; the limit is {limit} ({variable}); {advice}; or let the "
        f"operator configure a bucket ({', '.join(VARIABLES)})"
    )
