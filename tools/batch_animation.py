"""Records a real batch on a running server, and draws it: docs/images/batch.json and batch.svg.

    make serve SD_MODEL=shapes           # in one terminal
    python -m tools.batch_animation      # in another; --draw: only from the recording that is there

Requests come while others are under way, each once the first has done so many steps. Every UNet
call must be seen, so calls have to take longer than the pause between two snapshots of GET /batch:
--side makes the images larger. What is drawn is what the server has told, and no more.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdbento.client import AsyncClient
from sdbento.live.batch import Batch
from tools.batch_drawing import Call, Recording, Request, drawn

IMAGES = Path(__file__).parent.parent / "docs" / "images"
RECORDING, DRAWING = IMAGES / "batch.json", IMAGES / "batch.svg"
OUTLINE, CHECKER = ({"model_id": name, "weight": 1.0} for name in ("outline", "checker"))


@dataclass(frozen=True)
class Asked:
    """A request that comes when the first one has done `after` steps."""

    after: int
    fields: dict[str, Any]


SCENE = (
    Asked(0, {"prompt": "a red circle", "num_inference_steps": 24, "scheduler": "Euler a"}),
    Asked(
        2,
        {
            "prompt": "a green triangle",
            "num_inference_steps": 14,
            "scheduler": "DPM++ 2M Karras",
            "lora": [OUTLINE],
        },
    ),
    Asked(
        6,
        {
            "prompt": "a blue ring",
            "num_inference_steps": 4,
            "scheduler": "UniPC",
            "guidance_scale": 1.0,
        },
    ),
    Asked(
        9,
        {
            "prompt": "a yellow star",
            "num_inference_steps": 12,
            "scheduler": "DDIM",
            "lora": [CHECKER],
            "num_images": 2,
        },
    ),
    Asked(14, {"prompt": "a white cross", "num_inference_steps": 8, "scheduler": "DPM++ SDE"}),
)


async def record(url: str, side: int) -> Recording:
    """Ask as in SCENE, and note every UNet call. Exits where calls were missed."""
    calls: list[Call] = []
    requests: dict[int, Request] = {}
    async with AsyncClient(url) as client, asyncio.TaskGroup() as asking:
        waiting = list(SCENE)
        tasks: list[asyncio.Task[Any]] = []
        async for batch in _until_done(client, tasks, waiting):
            while waiting and waiting[0].after <= _steps_of_first(calls):
                fields = {**waiting.pop(0).fields, "width": side, "height": side, "seed": 1}
                tasks.append(asking.create_task(client.generate(**fields)))
            _note(batch, calls, requests)
    return Recording(calls, [requests[number] for number in sorted(requests)])


async def _until_done(
    client: AsyncClient, tasks: list[asyncio.Task[Any]], waiting: list[Asked]
) -> AsyncIterator[Batch]:
    snapshots = client.batch()
    async for batch in snapshots:
        yield batch
        if not waiting and all(task.done() for task in tasks):
            break
    await snapshots.aclose()


def _steps_of_first(calls: list[Call]) -> int:
    first = calls[0].images[0][:2] if calls else None
    return sum(one[:2] == first for call in calls for one in call.images)


def _note(batch: Batch, calls: list[Call], requests: dict[int, Request]) -> None:
    if batch.calls == len(calls):
        return
    if batch.calls > len(calls) + 1:
        sys.exit("calls were missed: choose a larger --side")
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
    parser.add_argument("--url", default="http://localhost:3000")
    parser.add_argument("--side", type=int, default=256, help="of the images, in pixels")
    parser.add_argument("--draw", action="store_true", help="draw the recording that is there")
    options = parser.parse_args()
    if not options.draw:
        recording = asyncio.run(record(options.url, options.side))
        RECORDING.write_text(recording.as_json() + "\n", encoding="utf-8")
    recording = Recording.from_json(RECORDING.read_text(encoding="utf-8"))
    DRAWING.write_text(drawn(recording), encoding="utf-8")
    seconds = recording.calls[-1].at - recording.calls[0].at
    print(f"{DRAWING}: {len(recording.calls)} calls, {seconds:.1f} s")


if __name__ == "__main__":
    main()
