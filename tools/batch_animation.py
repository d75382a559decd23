"""Records a real batch, and draws it: docs/images/batch.json and batch.svg.

    python -m tools.batch_animation           # --draw: only from the recording that is there

A server on `emoji` is started, and GET /batch is written down, a snapshot for every UNet call; a
recording that misses one is made again. Requests come while others are under way, each once the
first has done so many steps. The time is scaled, and nothing else is.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from base64 import b64encode
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from sdbento.client import AsyncClient
from sdbento.client.answers import GeneratedImage, Generation
from sdbento.images import codec
from sdbento.live.batch import Batch
from tests.support.server import serving
from tools.batch_drawing import Call, Recording, Request, drawn

IMAGES = Path(__file__).parent.parent / "docs" / "images"
RECORDING, DRAWING = IMAGES / "batch.json", IMAGES / "batch.svg"
OUTLINE = {"model_id": "emoji-outline", "weight": 1.0}
THUMBNAIL = 76
"""The side of a picture in the drawing, in its own pixels."""


@dataclass(frozen=True)
class Asked:
    """A request that comes when the first one has done `after` steps."""

    after: int
    fields: dict[str, Any]


SCENE = (
    Asked(0, {"prompt": "a red apple", "num_inference_steps": 24, "scheduler": "Euler a"}),
    Asked(
        2,
        {
            "prompt": "a frog",
            "num_inference_steps": 14,
            "scheduler": "DPM++ 2M Karras",
            "lora": [OUTLINE],
        },
    ),
    Asked(
        6,
        {
            "prompt": "a blue heart",
            "num_inference_steps": 4,
            "scheduler": "UniPC",
            "guidance_scale": 1.0,
        },
    ),
    Asked(
        9,
        {
            "prompt": "a cat face",
            "num_inference_steps": 12,
            "scheduler": "DDIM",
            "num_images": 2,
        },
    ),
    Asked(14, {"prompt": "a pizza", "num_inference_steps": 8, "scheduler": "DPM++ SDE"}),
)


def record(side: int, tries: int = 20) -> Recording:
    """A recording of all calls, on a server that has warmed up."""
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), target="tools.every_call:service", SD_MODEL="emoji") as server,
    ):
        server.wait_until_ready()
        asyncio.run(_record(server.url, side))  # as it warms up, it learns what calls cost
        for _ in range(tries):
            recording = asyncio.run(_record(server.url, side))
            if recording is not None and _is_worth_seeing(recording):
                return recording
    raise SystemExit(f"none of {tries} recordings is whole: is the machine busy?")


async def _record(url: str, side: int) -> Recording | None:
    """Ask as in SCENE, and note every UNet call. None where one was missed, because its snapshot
    was not read before the next one came."""
    calls: list[Call] = []
    requests: dict[int, Request] = {}
    async with AsyncClient(url) as client, asyncio.TaskGroup() as asking:
        waiting = list(SCENE)
        tasks: list[asyncio.Task[Generation]] = []
        async with aclosing(client.batch()) as snapshots:
            async for batch in snapshots:
                if batch.calls > len(calls) + 1:
                    cancel(tasks)
                    return None
                _note(batch, calls, requests)
                while waiting and waiting[0].after <= _steps_of_first(calls):
                    fields = {**waiting.pop(0).fields, "width": side, "height": side, "seed": 1}
                    tasks.append(asking.create_task(client.generate(**fields)))
                if not waiting and all(task.done() for task in tasks):
                    break
    in_order = [requests[number] for number in sorted(requests)]
    made = [[thumbnail(image) for image in task.result().images] for task in tasks]
    pairs = zip(in_order, made, strict=True)
    return Recording(calls, [replace(request, pictures=pictures) for request, pictures in pairs])


def thumbnail(image: GeneratedImage) -> str:
    """A small copy as a data URI."""
    small = image.to_pil().resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return "data:image/webp;base64," + b64encode(codec.encode(small, "webp", quality=85)).decode()


def cancel(tasks: list[asyncio.Task[Generation]]) -> None:
    for task in tasks:
        task.cancel()


def _is_worth_seeing(recording: Recording) -> bool:
    """Whether all came while the first was there: a slow machine takes long to let them in."""
    numbers = [{one[0] for one in call.images} for call in recording.calls]
    first = recording.requests[0].number
    begun = set().union(*(those for those in numbers if first in those))
    return len(begun) == len(SCENE)


def _steps_of_first(calls: list[Call]) -> int:
    first = calls[0].images[0][:2] if calls else None
    return sum(one[:2] == first for call in calls for one in call.images)


def _note(batch: Batch, calls: list[Call], requests: dict[int, Request]) -> None:
    if batch.calls == len(calls):
        return
    lane = next(lane for lane in batch.lanes if lane.current)
    took_part = [one for one in lane.images if one.rows]
    images = [(one.request, one.image, one.step) for one in took_part]
    calls.append(Call(round(batch.time, 3), lane.rows or 0, lane.seconds or 0.0, images))
    steps = {one.request: one.num_steps for one in took_part}
    for one in batch.requests:
        if one.number in steps:
            requests[one.number] = Request(
                *(one.number, one.prompt or "", one.sampler or "", list(one.loras)),
                num_steps=steps[one.number],
                num_images=one.num_images,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--side", type=int, default=128, help="of the images, in pixels")
    parser.add_argument("--draw", action="store_true", help="draw the recording that is there")
    options = parser.parse_args()
    if not options.draw:
        recording = record(options.side)
        RECORDING.write_text(recording.as_json() + "\n", encoding="utf-8")
    recording = Recording.from_json(RECORDING.read_text(encoding="utf-8"))
    DRAWING.write_text(drawn(recording), encoding="utf-8")
    print(f"{DRAWING}: {len(recording.calls)} calls")


if __name__ == "__main__":
    main()
