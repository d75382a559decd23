"""`sdbento generate`: images without a server, into files; the terminal shows how they form.

torch and diffusers are imported only once the request has been found valid.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import ValidationError

from sdbento.doors.cli.output import say
from sdbento.process.heavy_imports import without_collector
from sdbento.request.parse import explain
from sdbento.request.schema import GenerateRequest, GenerateResponse, OutputFormat
from sdbento.settings import Settings

if TYPE_CHECKING:
    from sdbento.doors.cli.display import Display

PREVIEW_EVERY = 2  # steps
FORMATS: dict[str, OutputFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


def build_request(output: Path, fields: dict[str, Any]) -> GenerateRequest:
    """The request for a file `output`. Paths among `fields` are read and become base64.

    Raises click.BadParameter where `output` cannot be written, and else what other doors raise.
    """
    if output.suffix.lower() not in FORMATS:
        raise click.BadParameter(
            f"{output} must end in {', '.join(FORMATS)}", param_hint="--output"
        )
    if not output.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder {output.parent}", param_hint="--output")
    images = {name: value for name, value in fields.items() if isinstance(value, Path)}
    fields |= {name: b64encode(path.read_bytes()).decode() for name, path in images.items()}
    try:
        return GenerateRequest(output_format=FORMATS[output.suffix.lower()], **fields)
    except ValidationError as error:
        raise explain(error) from None


async def generate_with_progress(
    settings: Settings, request: GenerateRequest, display: Display
) -> GenerateResponse:
    """The response. Until it is there, `display` shows the loading and each step."""
    with without_collector():
        from sdbento.app import App
        from sdbento.engine.handle import Stepped
        from sdbento.request.events import Done

    if display.shows_pictures:
        request = request.model_copy(update={"preview_every": PREVIEW_EVERY})
    app = App(settings)
    app.start()
    try:
        with display.running(f"loading {settings.sd_model}", request.num_images):
            async with aclosing(app.stream(request)) as events:
                async for event in events:
                    if isinstance(event, Done):
                        response = event.response
                    elif isinstance(event, Stepped):
                        display.step(event)
        return response
    finally:
        app.close(grace=0)


def output_paths(output: Path, num_images: int) -> list[Path]:
    """out.png for one image; out-1.png, out-2.png, ... for more."""
    if num_images == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{i + 1}") for i in range(num_images)]


def write_images(output: Path, response: GenerateResponse) -> None:
    """Write each image and say where it is and how to make it again."""
    seconds = response.timings.total
    paths = output_paths(output, len(response.images))
    for path, image in zip(paths, response.images, strict=True):
        try:
            path.write_bytes(b64decode(image))
        except OSError as error:
            raise click.ClickException(f"cannot write {path}: {error.strerror}") from None
    for path, seed in zip(paths, response.seeds, strict=True):
        click.echo(f"{path}: {response.model}, seed {seed}, {seconds:.1f} s")
    for warning in response.warnings:
        say(warning)
