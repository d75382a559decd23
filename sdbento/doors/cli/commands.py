"""The command `sdbento`: serve, generate, inspect, models, samplers, pull, top, bench, ...

Any error is one line on stderr. The commands import what is slow to import (torch, diffusers)
themselves, so that `--help` answers at once.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

import sdbento
from sdbento.access.keyring import Keyring
from sdbento.doors.cli import inspection
from sdbento.doors.cli.bench import bench
from sdbento.doors.cli.completion import completion, model_names
from sdbento.doors.cli.generate import build_request, generate_with_progress, write_images
from sdbento.doors.cli.keys import keys
from sdbento.doors.cli.output import keep_quiet, say
from sdbento.doors.cli.ports import listening_problem
from sdbento.doors.cli.top import top
from sdbento.doors.default_model import NOTICE, with_default_model
from sdbento.doors.runpod.volume import use_volume
from sdbento.environment import child_environment, load_settings, terminal_variables
from sdbento.errors import SDBentoError, reraise
from sdbento.process.malloc import keep_freed_memory
from sdbento.settings import Settings, SettingsError

INTERRUPTED = 130  # the exit status, in shells, of a command that SIGINT has ended
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 3000


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


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(sdbento.__version__)
def commands() -> None:
    """Stable Diffusion with step-level continuous batching.

    `sdbento serve` starts a server; `sdbento generate` needs none.
    """


model_option = click.option(
    "--model",
    shell_complete=model_names,
    help="A name from `sdbento models`, a Hub id, a diffusers folder or a .safetensors file.  "
    "[default: SD_MODEL; else SDXL base if there is a GPU, else emoji]",
)


@commands.command()
@click.option("--host", help="Address to listen on; 0.0.0.0 for all.  [default: 127.0.0.1]")
@click.option(
    "--port", type=click.IntRange(1, 65535), help=f"Port to listen on.  [default: {DEFAULT_PORT}]"
)
@model_option
@click.option(
    "--gpus",
    help="GPUs to compute on: all, how many (2), or which (0,2); cpu:2 divides a CPU between two "
    "engines.  [default: one]",
)
def serve(host: str | None, port: int | None, model: str | None, gpus: str | None) -> None:
    """Serve over HTTP.

    All other settings are environment variables: see docs/settings.md.
    """
    settings = with_told_default_model(use_volume(load_settings(sd_model=model, gpus=gpus)))
    Keyring(settings)  # a bad file of keys is told here, in one line
    environment = child_environment(settings, BENTOML_DO_NOT_TRACK="1")
    host = host or environment.get("BENTOML_HOST") or DEFAULT_HOST
    port = port or settings.port or int(environment.get("BENTOML_PORT") or DEFAULT_PORT)
    if (problem := listening_problem(host, port)) is not None:
        raise click.ClickException(f"cannot listen on {host}:{port}: {problem}")
    health = settings.port_health or port
    if health != port and (problem := listening_problem("", health)) is not None:
        raise click.ClickException(f"cannot listen on PORT_HEALTH={health}: {problem}")
    environment["PORT"] = str(port)  # the server compares PORT_HEALTH with it
    folder = Path(sdbento.__file__).parent.parent  # service.py lies beside the package
    command = [sys.executable, "-P", "-m", "bentoml", "serve", "service:StableDiffusion"]
    command += ["--working-dir", str(folder), "--host", host, "--port", str(port)]
    os.execve(sys.executable, command, environment)  # so that signals reach BentoML's supervisor


image_file = click.Path(exists=True, dir_okay=False, path_type=Path)


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
@click.option("--negative-prompt", help="What to keep out of the image.")
@click.option(
    "--steps",
    "num_inference_steps",
    type=int,
    help="Denoising steps; the model's default if left out.",
)
@click.option(
    "--guidance",
    "guidance_scale",
    type=float,
    help="How strongly the image follows the prompt; the model's default if left out.",
)
@click.option(
    "--seed",
    type=int,
    help="Seed of the first image; the next ones have seed + 1, ...; random if left out.",
)
@click.option("--width", type=int, help="Width in pixels, a multiple of 8.")
@click.option("--height", type=int, help="Height in pixels, a multiple of 8.")
@click.option("--scheduler", help="Sampler; `sdbento samplers` lists them.")
@click.option("--image", type=image_file, help="Image to start from.")
@click.option(
    "--mask-image", type=image_file, help="Mask for --image: its white parts are repainted."
)
@click.option("--strength", type=float, help="How far to go from --image, up to 1.")
@click.option("--num-images", type=int, default=1, show_default=True, help="Number of images.")
@click.option(
    "--show",
    type=click.Choice(["auto", "iterm", "kitty", "sixel", "blocks", "none"]),
    default="auto",
    show_default=True,
    help="How to show the first image in the terminal.",
)
def generate(output: Path, model: str | None, show: str, **fields: Any) -> None:
    """Make an image of PROMPT, without a server."""
    from sdbento.doors.cli.display import Display
    from sdbento.doors.cli.terminal import protocol_named

    request = build_request(output, fields)
    settings = operators(load_settings(sd_model=model, max_batch_size=request.num_images, gpus=""))
    settings = with_told_default_model(settings)
    keep_quiet(settings)
    display = Display(protocol_named(show, terminal_variables()))
    response = asyncio.run(generate_with_progress(settings, request, display))
    write_images(output, response)
    display.show(response.images[0])


@commands.command()
@click.argument("file", type=image_file)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(file: Path, as_json: bool) -> None:
    """Print how an image was made.

    FILE is an image of sdbento or of AUTOMATIC1111's web UI.
    """
    metadata = inspection.inspect(file)
    click.echo(inspection.as_json(metadata) if as_json else inspection.as_text(metadata))


@commands.command()
def models() -> None:
    """List the models that requests can name.

    Each with its family, native size, memory in fp16 and other names.
    """
    settings = use_volume(load_settings())
    from sdbento.catalog.lookup import Catalog

    for spec in Catalog(settings).list():
        traits = f"{spec.family:<5} {spec.width}x{spec.height}, {spec.memory_gb:g} GB"
        aliases = f"  (also {', '.join(spec.aliases)})" if spec.aliases else ""
        click.echo(f"{spec.name:<48} {traits}{aliases}")


@commands.command()
def samplers() -> None:
    """List the samplers, each with its noise schedules."""
    from sdbento.samplers.names import list_samplers

    for sampler in list_samplers():
        click.echo(f"{sampler.name:<24} {', '.join(sampler.sigmas)}")


@commands.command()
@click.argument("model", shell_complete=model_names)
@click.option(
    "--controlnet",
    multiple=True,
    help="Also a ControlNet for it, by type or Hub id; can be repeated.",
)
def pull(model: str, controlnet: tuple[str, ...]) -> None:
    """Download MODEL from the Hub.

    Without this, it is downloaded when it is first used.
    """
    settings = operators(load_settings())
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


@commands.command()  # RunPod's SDK reads these options from sys.argv itself.
@click.option(
    "--test_input", callback=check_test_input, help="Run this one job, given as JSON, and exit."
)
@click.option("--rp_serve_api", is_flag=True, help="Serve the SDK's own API, to try out jobs.")
@click.option("--rp_api_host", help="Host of that API.  [default: localhost]")
@click.option("--rp_api_port", type=int, help="Port of that API.  [default: 8000]")
@click.option(
    "--rp_log_level", type=click.Choice(["ERROR", "WARN", "INFO"]), help="What the SDK logs."
)
def worker(test_input: str | None, rp_serve_api: bool, **_: Any) -> None:
    """Take jobs from RunPod's queue.

    The image starts this on a RunPod queue. The options are those of RunPod's SDK.
    """
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
    settings = use_volume(
        load_settings()
    )  # before torch is imported: a bad setting is told at once
    keep_quiet(settings)
    from sdbento.doors.cli.doctor import examine

    host = child_environment(settings).get("BENTOML_HOST") or DEFAULT_HOST
    for finding in examine(settings, host, settings.port or DEFAULT_PORT):
        click.echo(finding)


commands.add_command(bench)
commands.add_command(completion)
commands.add_command(top)
commands.add_command(keys)


def operators(settings: Settings) -> Settings:
    """The settings for a command with which the operator himself, and no request, names models."""
    allowed = {"allow_any_model": True, "hub_owners": ""}
    return use_volume(settings).model_copy(update=allowed)


def with_told_default_model(settings: Settings) -> Settings:
    """The settings, with the default model decided, and a line on stderr if it is the embedded
    one because there is no GPU."""
    decided = with_default_model(settings)
    if decided is not settings:
        say(NOTICE)
    return decided
