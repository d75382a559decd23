"""The input of a job as a request of ours, together with a few flags for the job itself.

Names of RunPod's worker-sdxl are understood as well. Parsing and writing may take a while, because
inputs and outputs carry images: call these functions on a thread.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sdbento.jobs.delivery.deliver import Result
from sdbento.jobs.delivery.s3_config import S3Config
from sdbento.jobs.formats import worker_sdxl
from sdbento.request.parse import explain, parse
from sdbento.request.schema import GenerateRequest, GenerateResponse

OutputShape = Literal["images", "full", "worker-sdxl"]


class Flags(BaseModel):
    """Fields of a job's input that are not part of the request."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    stream: bool = Field(
        False,
        description="Whether a worker posts progress for /stream; a server always has it",
    )
    shape: OutputShape = Field(
        "images",
        alias="return",
        description="The output: a list of base64 images, the whole response of /generate, or what "
        "RunPod's worker-sdxl returns, whose defaults are used then",
    )
    allow_jpeg: bool = Field(
        False,
        description="Whether a worker sends JPEG if the result would exceed RunPod's limit",
    )


FLAG_NAMES = {field.alias or name for name, field in Flags.model_fields.items()}


@dataclass(frozen=True)
class JobInput:
    """A job's input, validated. `warnings` tell what of it cannot be done here."""

    flags: Flags
    request: GenerateRequest
    warnings: tuple[str, ...] = ()
    s3_config: S3Config | None = None  # the bucket that the job brings along

    def result(self, response: GenerateResponse) -> Result:
        def write(images: list[str], warnings: list[str]) -> Any:
            changed = {"images": images, "warnings": [*response.warnings, *warnings]}
            return self.output(response.model_copy(update=changed))

        output_format, allow_jpeg = self.request.output_format, self.flags.allow_jpeg
        return Result(response.images, write, output_format, allow_jpeg, self.s3_config)

    def output(self, response: GenerateResponse) -> Any:
        """What the job returns: JSON, in the shape that its input asks for.

        The images of `response` are base64, or URLs if they were uploaded.
        """
        warnings = [*self.warnings, *response.warnings]
        match self.flags.shape:
            case "full":
                return response.model_dump(mode="json") | {"warnings": warnings}
            case "worker-sdxl":
                return worker_sdxl.output(response, self.request.output_format, warnings)
            case "images":
                return response.images


def parse_input(given: dict[str, Any], s3_config: S3Config | None = None) -> JobInput:
    """Validate a job's input. Raises SDBentoError, usually InvalidParameter."""
    try:
        flags = Flags.model_validate({name: given[name] for name in FLAG_NAMES & given.keys()})
    except ValidationError as error:
        raise explain(error) from None
    fields = {name: value for name, value in given.items() if name not in FLAG_NAMES}
    fields, warnings = worker_sdxl.translated(fields, own=flags.shape == "worker-sdxl")
    request = parse(json.dumps(fields), what="the input")
    return JobInput(flags, request, tuple(warnings), s3_config)
