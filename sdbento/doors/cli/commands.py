"""The command `sdbento`: serve, generate, models, samplers, pull, doctor.

Whatever goes wrong is one line on stderr. Heavy imports stand inside the commands that need them,
so that `--help` answers at once. Knows nothing of engine and models: it asks App and catalogue.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
from base64 import b64decode, b64encode
from contextlib import aclosing
from glob import glob
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

import sdbento
from sdbento.doors.runpod.volume import use_volume
from sdbento.environment import child_environment, load_settings
from sdbento.errors import SDBentoError, reraise
from sdbento.heavy_imports import without_collector
from sdbento.malloc import keep_freed_memory
from sdbento.request.parse import explain
from sdbento.request.schema import GenerateRequest, GenerateResponse, OutputFormat
from sdbento.settings import Settings, SettingsError

INTERRUPTED = 130  # what shells call a command that SIGINT ended
FORMATS: dict[str, OutputFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 3000
# Of NVIDIA, of its Jetsons, of WSL, of AMD.
GPU_DRIVERS = ("/dev/nvidia*", "/dev/nvhost*", "/dev/dxg", "/dev/kfd")


def main(args: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    keep_freed_memory()
    try:
        return commands.main(args=args, prog_name="sdbento", standalone_mode=False) or 0
    except click.UsageError as error:
        error.show()
        return error.exit_code
    except (SDBentoError, SettingsError, click.ClickException) as error:
        say(str(error))
        return 1
    except (KeyboardInterrupt, click.Abort):
        say("interrupted")
        return INTERRUPTED


def say(text: str) -> None:
    """One line for the person, apart from what a command is asked for."""
    click.echo(f"sdbento: {text}", err=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(sdbento.__version__)
def commands() -> None:
    """Stable Diffusion with step-level continuous batching."""


model_option = click.option(
    "--model", help="Catalogue name, Hub id, diffusers folder or .safetensors file."
)


@commands.command()
@click.option("--host", help="Address to listen on; 0.0.0.0 for all.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(1, 65535), help=f"  [default: {DEFAULT_PORT}]")
@model_option
def serve(host: str | None, port: int | None, model: str | None) -> None:
    """Serve over HTTP; settings come from the environment."""
    settings = with_default_model(use_volume(load_settings(sd_model=model)))
    environment = child_environment(settings, BENTOML_DO_NOT_TRACK="1")
    host = host or environment.get("BENTOML_HOST") or DEFAULT_HOST
    port = port or settings.port or int(environment.get("BENTOML_PORT") or DEFAULT_PORT)
    if (problem := listening_problem(host, port)) is not None:
        raise click.ClickException(f"cannot listen on {host}:{port}: {problem}")
    health = settings.port_health or port
    if health != port and (problem := listening_problem("", health)) is not None:
        raise click.ClickException(f"cannot listen on PORT_HEALTH={health}: {problem}")
    environment["PORT"] = str(port)  # whatever said so, for PORT_HEALTH to be compared with
    folder = Path(sdbento.__file__).parent.parent  # service.py lies beside the package
    command = [sys.executable, "-P", "-m", "bentoml", "serve", "service:StableDiffusion"]
    command += ["--working-dir", str(folder), "--host", host, "--port", str(port)]
    os.execve(sys.executable, command, environment)  # signals reach BentoML's supervisor itself


picture_file = click.Path(exists=True, dir_okay=False, path_type=Path)


@commands.command()
@click.argument("prompt")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("out.png"),
    show_default=True,
    help="File to write: .png, .jpg or .webp; several images are numbered.",
)
@model_option
@click.option("--negative-prompt", help="What to keep out of the picture.")
@click.option("--steps", "num_inference_steps", type=int, help="Denoising steps.")
@click.option("--guidance", "guidance_scale", type=float, help="Classifier-free guidance.")
@click.option("--seed", type=int, help="Seed of the first image.")
@click.option("--width", type=int, help="Pixels, a multiple of 8.")
@click.option("--height", type=int, help="Pixels, a multiple of 8.")
@click.option("--scheduler", help="Sampler; `sdbento samplers` lists them.")
@click.option("--image", type=picture_file, help="Picture to start from.")
@click.option("--mask-image", type=picture_file, help="What to repaint of it: white.")
@click.option("--strength", type=float, help="How far from --image, up to 1.")
@click.option("--num-images", type=int, default=1, show_default=True, help="Images to make.")
def generate(output: Path, model: str | None, **fields: Any) -> None:
    """Make a picture of PROMPT, without a server."""
    request = build_request(output, fields)
    settings = use_volume(load_settings(sd_model=model, max_batch_size=request.num_images))
    settings = with_default_model(settings)
    keep_quiet(settings)
    response = asyncio.run(generate_with_progress(settings, request))
    for path, image in zip(numbered(output, len(response.images)), response.images, strict=True):
        write(path, b64decode(image))
    report(output, response)


@commands.command()
def models() -> None:
    """List the models that can be asked for by name."""
    settings = use_volume(load_settings())
    from sdbento.catalog.lookup import Catalog

    for spec in Catalog(settings).list():
        traits = f"{spec.family:<5} {spec.width}x{spec.height}, {spec.memory_gb:g} GB"
        aliases = f"  (also {', '.join(spec.aliases)})" if spec.aliases else ""
        click.echo(f"{spec.name:<48} {traits}{aliases}")


@commands.command()
def samplers() -> None:
    """List the samplers that --scheduler takes, each with its noise schedules."""
    from sdbento.samplers.names import list_samplers

    for sampler in list_samplers():
        click.echo(f"{sampler.name:<24} {', '.join(sampler.sigmas)}")


@commands.command()
@click.argument("model")
@click.option(
    "--controlnet", multiple=True, help="A ControlNet for it: type or Hub id; repeatable."
)
def pull(model: str, controlnet: tuple[str, ...]) -> None:
    """Download MODEL from the Hub, so that it need not be fetched when it is first used."""
    settings = use_volume(load_settings())
    keep_quiet(settings)
    from sdbento.catalog.lookup import Catalog
    from sdbento.models.weights import pull as download

    try:
        catalog = Catalog(settings)
        spec = catalog.resolve(model)
        download(spec, settings, progress=say)
        for name in controlnet:
            download(catalog.controlnets(spec).resolve(name), settings, progress=say)
    except Exception as exc:
        reraise(exc)


EXAMPLE = '{"input": {"prompt": "a red circle"}}'


def check_test_input(_: click.Context, __: click.Parameter, text: str | None) -> str | None:
    if text is None:
        return None
    try:
        job = json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"it is not JSON: {error}") from None
    if not isinstance(job, dict) or not isinstance(job.get("input"), dict):
        raise click.BadParameter(f"it must look like {EXAMPLE}")
    return text


@commands.command()  # The SDK takes the options from the command line itself.
@click.option("--test_input", callback=check_test_input, help="Run this job and end; JSON.")
@click.option("--rp_serve_api", is_flag=True, help="Serve the SDK's own API for trying jobs.")
@click.option("--rp_api_host", help="Where it listens; localhost.")
@click.option("--rp_api_port", type=int, help="Likewise; 8000.")
@click.option("--rp_log_level", type=click.Choice(["ERROR", "WARN", "INFO"]), help="Of the SDK.")
def worker(test_input: str | None, rp_serve_api: bool, **_: Any) -> None:
    """Take jobs from RunPod's queue, as a serverless worker."""
    settings = load_settings()
    try:
        from sdbento.doors.runpod.worker import has_queue, run
    except ValueError as error:
        problem = f"RunPod's SDK does not start, one of its variables is bad: {error}"
        raise click.ClickException(problem) from None

    if not (test_input or rp_serve_api or has_queue()):
        raise click.ClickException(
            "RUNPOD_WEBHOOK_GET_JOB, RunPod's queue, is not set: there are no jobs to take; "
            f"to try one: sdbento worker --test_input '{EXAMPLE}'"
        )
    raise click.exceptions.Exit(run(settings))


@commands.command()
def doctor() -> None:
    """Say what this machine can run, and why."""
    settings = use_volume(load_settings())  # first: a bad one should not have to wait for torch
    keep_quiet(settings)
    from sdbento.doors.cli.doctor import examine

    for finding in examine(settings, DEFAULT_HOST, settings.port or DEFAULT_PORT):
        click.echo(finding)


def with_default_model(settings: Settings) -> Settings:
    """The settings with the model that is used where nobody has named one.

    Whoever has a GPU gets the default of the RunPod worker; a CPU would need minutes for a picture
    of it, so there it is the embedded model.
    """
    if "sd_model" in settings.model_fields_set or has_gpu(settings):
        return settings
    say("no GPU here: using the embedded model `shapes`; --model or SD_MODEL names another")
    return settings.model_copy(update={"sd_model": "shapes"})


def has_gpu(settings: Settings) -> bool:
    if settings.device == "cpu" or not any(glob(driver) for driver in GPU_DRIVERS):
        return False  # known without torch, which takes a second to import
    import torch

    return torch.cuda.is_available()


def listening_problem(host: str, port: int) -> str | None:
    """Why a server could not listen there, or None where it could."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            return str(error.strerror).lower()
    return None


def keep_quiet(settings: Settings) -> None:
    """Leave the terminal to the progress bar, unless the log is asked for."""
    if settings.log_level == "DEBUG":
        logging.basicConfig(level=logging.DEBUG)
    else:
        logging.disable(logging.ERROR)


def build_request(output: Path, fields: dict[str, Any]) -> GenerateRequest:
    """Raises InvalidParameter, in the words of every other door."""
    if output.suffix.lower() not in FORMATS:
        raise click.BadParameter(
            f"{output} must end in {', '.join(FORMATS)}", param_hint="--output"
        )
    if not output.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder {output.parent}", param_hint="--output")
    pictures = {name: value for name, value in fields.items() if isinstance(value, Path)}
    fields |= {name: b64encode(path.read_bytes()).decode() for name, path in pictures.items()}
    try:
        return GenerateRequest(output_format=FORMATS[output.suffix.lower()], **fields)
    except ValidationError as error:
        raise explain(error) from None


async def generate_with_progress(settings: Settings, request: GenerateRequest) -> GenerateResponse:
    """The response, with a bar on stderr on the way: waiting for the model, then step k of n."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    with without_collector():
        from sdbento.app import App

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    app = App(settings)
    app.start()
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task(f"loading {settings.sd_model}", total=None)
            steps = [0] * request.num_images
            async with aclosing(app.stream(request)) as events:
                async for event in events:
                    if event["event"] == "done":
                        response: GenerateResponse = event["response"]
                    elif event["event"] == "step":
                        steps[event["image"]] = event["step"]
                        total = event["num_steps"] * request.num_images
                        text = f"step {min(steps)} of {event['num_steps']}"
                        progress.update(bar, description=text, completed=sum(steps), total=total)
        return response
    finally:
        app.close(grace=0)


def numbered(output: Path, count: int) -> list[Path]:
    """out.png, or out-1.png, out-2.png, ..."""
    if count == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{i + 1}") for i in range(count)]


def write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from None


def report(output: Path, response: GenerateResponse) -> None:
    seconds = response.timings.total
    for path, seed in zip(numbered(output, len(response.seeds)), response.seeds, strict=True):
        click.echo(f"{path}: {response.model}, seed {seed}, {seconds:.1f} s")
    for warning in response.warnings:
        say(warning)
