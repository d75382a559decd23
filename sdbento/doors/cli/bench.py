"""`sdbento bench`: how fast a running server answers clients that ask as soon as they are answered.

Knows only the server's API: it says the same of any server that speaks it.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from random import Random
from typing import TYPE_CHECKING, Any

import click

from sdbento.doors.cli.output import key_option, progress_bar, url_option
from sdbento.errors import SDBentoError

if TYPE_CHECKING:
    from sdbento.client import AsyncClient

SHARES = (0.5, 0.95, 0.99)
PAUSE = 1.0  # seconds after a refusal that does not say when to ask again


class StepRange(click.ParamType[tuple[int, int]]):
    """`20`, or `4-40`: each request then has another number of steps in between."""

    name = "N or N-M"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", str(value), re.ASCII)
        if match is None:
            self.fail(f"{value!r} is neither a number nor two such as 4-40", param, ctx)
        steps = int(match[1]), int(match[2] or match[1])
        if steps[0] > steps[1]:
            self.fail(f"{value!r}: the first number is the larger one", param, ctx)
        return steps


@dataclass(frozen=True)
class Load:
    """What is asked of the server, by how many clients at once, for how long."""

    url: str
    key: str | None
    num_clients: int
    seconds: float
    steps: tuple[int, int] | None  # None: the model's own
    fields: dict[str, Any]
    seed: int


@dataclass
class Outcome:
    """`latencies`: seconds of each request that got its images. `elapsed`: until the last one."""

    latencies: list[float] = field(default_factory=list)
    num_images: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    elapsed: float = 0.0
    model: str = ""

    def percentile(self, share: float) -> float:
        """The least latency that so large a share of the requests did not exceed (nearest rank)."""
        return sorted(self.latencies)[max(0, ceil(share * len(self.latencies)) - 1)]


async def measure(load: Load, on_answer: Callable[[Outcome], None] = lambda _: None) -> Outcome:
    """Ask once, so that the model is in memory, and then for as long as `load` says.

    Raises what that first request raises; later errors are counted.
    """
    from sdbento.client import AsyncClient

    outcome, chance = Outcome(), Random(load.seed)
    async with AsyncClient(load.url, api_key=load.key, max_retries=0) as client:
        first = await client.generate(**_fields(load, chance))
        outcome.model = first.model
        began = time.monotonic()
        async with asyncio.TaskGroup() as clients:
            for _ in range(load.num_clients):
                clients.create_task(_ask(client, load, chance, began, outcome, on_answer))
        outcome.elapsed = time.monotonic() - began
    return outcome


async def _ask(
    client: AsyncClient,
    load: Load,
    chance: Random,
    began: float,
    outcome: Outcome,
    on_answer: Callable[[Outcome], None],
) -> None:
    """One client: the next request as soon as the last one is answered."""
    while (left := began + load.seconds - time.monotonic()) > 0:
        asked = time.monotonic()
        try:
            answer = await client.generate(**_fields(load, chance))
        except SDBentoError as error:
            outcome.failures[f"{error.status} {error.type}" if error.status else error.type] += 1
            await asyncio.sleep(min(left, error.retry_after or PAUSE))
        else:
            outcome.latencies.append(time.monotonic() - asked)
            outcome.num_images += len(answer.images)
        on_answer(outcome)


def _fields(load: Load, chance: Random) -> dict[str, Any]:
    fields = load.fields | {"seed": chance.randrange(2**32)}
    if load.steps is not None:
        fields["num_inference_steps"] = chance.randint(*load.steps)
    return fields


def as_text(load: Load, outcome: Outcome) -> str:
    """A few lines for a person."""
    answered, failed = len(outcome.latencies), outcome.failures.total()
    lines = [
        f"{load.num_clients} clients, {outcome.elapsed:.1f} s, model {outcome.model}",
        f"{outcome.num_images / outcome.elapsed:.2f} images/s: {outcome.num_images} images in "
        f"{answered} requests; {failed} failed",
    ]
    if answered:
        shares = [f"p{share * 100:.0f} {outcome.percentile(share):.2f} s" for share in SHARES]
        lines.append(f"answered after {', '.join(shares)}, at most {max(outcome.latencies):.2f} s")
    lines += [f"{number} x {what}" for what, number in outcome.failures.most_common()]
    return "\n".join(lines)


def as_json(load: Load, outcome: Outcome) -> dict[str, Any]:
    latencies = {f"p{share * 100:.0f}": outcome.percentile(share) for share in SHARES}
    return {
        "url": load.url,
        "model": outcome.model,
        "clients": load.num_clients,
        "seconds": outcome.elapsed,
        "images": outcome.num_images,
        "images_per_second": outcome.num_images / outcome.elapsed,
        "requests": len(outcome.latencies),
        "latency_seconds": latencies if outcome.latencies else {},
        "failures": dict(outcome.failures),
    }


async def measure_with_progress(load: Load) -> Outcome:
    """As `measure`, with a bar on stderr."""
    from rich.console import Console

    with progress_bar(Console(stderr=True)) as progress:
        bar = progress.add_task("the first request", total=None)
        began: float | None = None

        def show(outcome: Outcome) -> None:
            nonlocal began
            began = began or time.monotonic()
            seconds = time.monotonic() - began
            text = f"{outcome.num_images} images, {outcome.failures.total()} failed"
            progress.update(bar, description=text, completed=seconds, total=load.seconds)

        return await measure(load, show)


@click.command()
@url_option
@key_option
@click.option(
    "--clients",
    "num_clients",
    default=8,
    show_default=True,
    type=click.IntRange(1, 1000),
    help="Clients that send requests at the same time.",
)
@click.option(
    "--seconds",
    default=30.0,
    show_default=True,
    type=click.FloatRange(min=0.1),
    help="For how long they send new requests.",
)
@click.option(
    "--prompt",
    default="a red apple on a blue background",
    show_default=True,
    help="Prompt of each request.",
)
@click.option("--model", help="Model of each request; the server's default model if left out.")
@click.option(
    "--steps", type=StepRange(), help="Denoising steps: a number, or a range such as 4-40."
)
@click.option("--width", type=int, help="Width in pixels.")
@click.option("--height", type=int, help="Height in pixels.")
@click.option("--scheduler", help="Sampler; `sdbento samplers` lists them.")
@click.option(
    "--num-images", type=int, default=1, show_default=True, help="Images in each request."
)
@click.option(
    "--seed", default=0, show_default=True, help="Seed for the seeds and steps of all requests."
)
@click.option("--json", "wants_json", is_flag=True, help="Print one JSON object.")
def bench(
    url: str,
    key: str | None,
    num_clients: int,
    seconds: float,
    steps: tuple[int, int] | None,
    seed: int,
    wants_json: bool,
    **fields: Any,
) -> None:
    """Measure a running server.

    Several clients send requests, each the next one as soon as it has its answer. Then images a
    second and the times of the requests are printed.
    """
    asked = {name: value for name, value in fields.items() if value is not None}
    load = Load(url, key, num_clients, seconds, steps, asked, seed)
    outcome = asyncio.run(measure_with_progress(load))
    click.echo(json.dumps(as_json(load, outcome)) if wants_json else as_text(load, outcome))
    if not outcome.latencies:
        raise click.exceptions.Exit(1)
