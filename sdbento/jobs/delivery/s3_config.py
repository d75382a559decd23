"""The bucket that a client may name in a job, as RunPod's API has it. Makes no connection.

Its secrets are never shown: not in a status, a message, a log or a repr.
"""

from __future__ import annotations

import json
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
    field_validator,
)

from sdbento.errors import InvalidParameter

PARAM = "s3Config"
MAX_SECRET_CHARS = 500

BucketName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=255)
]


class S3Config(BaseModel):
    """Where the images of one job go, and with whose credentials."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    access_id: SecretStr = Field(alias="accessId")
    access_secret: SecretStr = Field(alias="accessSecret")
    bucket_name: BucketName = Field(alias="bucketName")
    endpoint_url: Annotated[str, StringConstraints(max_length=2000)] = Field(alias="endpointUrl")

    @field_validator("access_id", "access_secret")
    @classmethod
    def _check_characters(cls, secret: SecretStr) -> SecretStr:
        text = secret.get_secret_value()
        if not (0 < len(text) <= MAX_SECRET_CHARS and text.isascii() and text.isprintable()):
            raise ValueError(f"must be 1 to {MAX_SECRET_CHARS} printable ASCII characters")
        return secret

    @property
    def host(self) -> str:
        return urlsplit(self.endpoint_url).hostname or ""

    def stored(self) -> str:
        """As JSON, secrets and all, for `of_stored`."""
        fields = self.model_dump(by_alias=True)
        secrets = {
            name: value.get_secret_value()
            for name, value in fields.items()
            if isinstance(value, SecretStr)
        }
        return json.dumps(fields | secrets)

    @classmethod
    def of_stored(cls, text: str) -> S3Config:
        return cls.model_validate_json(text)


def s3_config_of(given: Any) -> S3Config | None:
    """A job's s3Config; None if it is absent or empty. Raises InvalidParameter."""
    if given is None or (isinstance(given, dict) and not any(given.values())):
        return None  # clients in typed languages send {} or nulls
    try:
        return S3Config.model_validate(given)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        param = ".".join([PARAM, *map(str, problem["loc"])])
        text = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
        text = "is required" if problem["type"] == "missing" else text[:1].lower() + text[1:]
        raise InvalidParameter(f"{param} {text}", param=param) from None
