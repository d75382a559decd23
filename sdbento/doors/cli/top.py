"""`sdbento top`: what a running server computes at this moment, and who waits.

Knows only the server's API.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import click

from sdbento.doors.cli.output import key_option, url_option
from sdbento.live.batch import Batch, BatchImage, BatchRequest, Lane

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

BAR = 20  # cells
COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")


@click.command()
@url_option
@key_option
@click.option("--once", is_flag=True, help="Print it once, and end.")
def top(url: str, key: str | None, once: bool) -> None:
    """Show what a running server computes.

    Shows the running batch step by step, and who waits, until you press Ctrl+C.
    """
    from rich.console import Console

    from sdbento.client import Client
    from sdbento.client.errors import NotConnected

    console = Console()
    try:
        with Client(url, api_key=key, max_retries=0) as client, closing(client.batch()) as batches:
            if once or not console.is_terminal:
                console.print(picture(next(batches), url))
            else:
                _follow(batches, url, console)
    except NotConnected as error:
        raise click.ClickException(f"there is no server at {url}: {error.message}") from None


def _follow(batches: Iterator[Batch], url: str, console: Console) -> None:
    """Show each snapshot in place of the one before, on a screen of its own."""
    from rich.live import Live

    first = picture(next(batches), url)
    with (
        suppress(KeyboardInterrupt),  # as it is meant to end
        Live(first, console=console, screen=True, auto_refresh=False) as live,
    ):
        for batch in batches:
            live.update(picture(batch, url), refresh=True)


def picture(batch: Batch, url: str) -> RenderableType:
    """The batch as lines and tables."""
    from rich.console import Group
    from rich.text import Text

    requests = {request.number: request for request in batch.requests}
    parts: list[RenderableType] = [
        Text.assemble(("sdbento", "bold"), f"  {url}"),
        Text(f"Queue: {_queue(batch)}"),
        Text(f"Calls: {_calls(batch)}"),
        Text(f"Memory: {_memory(batch)}"),
    ]
    if len(batch.devices) > 1:
        parts.append(Text(f"Devices: {_devices(batch)}"))
    parts += [_lane(lane, requests) for lane in batch.lanes]
    if waiting := [one for one in batch.requests if one.num_waiting]:
        parts.append(_waiting(waiting))
    return Group(*parts)


def _queue(batch: Batch) -> str:
    queue = batch.queue
    if not queue.requests and not queue.preparing:
        return "nothing to do"
    text = f"{_count(queue.requests, 'request')}, {_count(queue.images, 'image')}"
    text += f", {queue.waiting} of them not begun" if queue.waiting else ""
    text += f"; {queue.preparing} more are being prepared" if queue.preparing else ""
    return text + ("" if queue.eta is None else f"; all done in {_duration(queue.eta)}")


def _calls(batch: Batch) -> str:
    if (recent := batch.recent) is None:
        return "none of late"
    return (
        f"{1000 * recent.seconds:.0f} ms each, with {recent.rows:.1f} rows of {recent.images:.1f} "
        f"images, in the last {recent.calls}"
    )


def _memory(batch: Batch) -> str:
    models = [
        f"{one.name or 'another'} {one.memory_gb:.2f} GB"
        + ("" if one.device is None else f" on device {one.device}")
        for one in batch.models
    ]
    return ", ".join(models) or "no model"


def _devices(batch: Batch) -> str:
    states = {True: "", False: " (starting)"}
    return ", ".join(f"{one.number} {one.name}{states[one.alive]}" for one in batch.devices)


def _lane(lane: Lane, requests: dict[int, BatchRequest]) -> Table:
    from rich.text import Text

    call = "" if lane.rows is None else f", {_count(lane.rows, 'row')} in {_ms(lane.seconds)}"
    device = "" if lane.device is None else f" on device {lane.device}"
    title = f"{lane.model or 'another model'} {lane.width}x{lane.height}{device}{call}"
    table = _table(title, "bold" if lane.current else "", "step", "")
    for image in lane.images:
        request = requests.get(image.request)
        style = COLOURS[image.request % len(COLOURS)]
        bar = Text("█" * _filled(image), style if image.rows else "dim")
        bar.append("░" * (BAR - _filled(image)), "dim")
        table.add_row(
            *_whose(image.request, request, image.image),
            bar,
            f"{image.step}/{image.num_steps}",
            _state(image),
            "" if request is None else _duration(request.eta),
        )
    return table


def _waiting(requests: list[BatchRequest]) -> Table:
    table = _table("Waiting", "", "", "waits")
    for one in requests:
        table.add_row(
            *_whose(one.number, one),
            _count(one.num_waiting, "image"),
            "",
            _duration(one.waited),
            _duration(one.eta),
        )
    return table


def _table(title: str, style: str, counted: str, told: str) -> Table:
    """A table for images or requests; `counted` and `told` head what differs between the two."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(f"\n{title}", style),
        title_justify="left",
        box=None,
        header_style="dim",
        expand=True,
        padding=(0, 2, 0, 0),
    )
    table.add_column("no.", justify="right", width=6)
    table.add_column("request", ratio=3, no_wrap=True)
    table.add_column("made with", ratio=4, no_wrap=True)
    table.add_column(width=BAR)
    table.add_column(counted, justify="right", width=7)
    table.add_column(told, width=9)
    table.add_column("done in", justify="right", width=10)
    return table


def _whose(number: int, request: BatchRequest | None, image: int | None = None) -> Iterator[Text]:
    """Number, prompt and sampler of a request."""
    from rich.text import Text

    label = str(number)
    if request is not None and request.num_images > 1 and image is not None:
        label += f".{image + 1}"
    yield Text(label, COLOURS[number % len(COLOURS)])
    if request is None or not request.yours:
        yield Text("another's", "dim")
    else:
        yield Text(" ".join((request.prompt or "").split()))
    yield Text("" if request is None else _how(request))


def _how(request: BatchRequest) -> str:
    extras = [request.sampler or ""]
    if request.num_loras:
        extras.append(", ".join(request.loras) or _count(request.num_loras, "LoRA"))
    if request.num_controlnets:
        extras.append(_count(request.num_controlnets, "ControlNet"))
    return " + ".join(extras)


def _state(image: BatchImage) -> str:
    if image.step == image.num_steps:
        return "decoding"
    if image.rows:
        return ""
    return "paused" if image.step else "begins"


def _filled(image: BatchImage) -> int:
    return BAR * image.step // max(1, image.num_steps)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.0f} ms"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
