"""What whoever listens to a request is told, however slowly it listens."""

from __future__ import annotations

import asyncio

from PIL import Image

from sdbento.engine.handle import MAX_PREVIEWS, EngineEvent, Handle, Stepped
from tests.support.fakes import make_trajectory

NUM_STEPS = 100


async def test_a_slow_listener_hears_of_every_step_and_sees_the_newest_previews() -> None:
    handle = Handle([make_trajectory()], cancel=lambda _: None, request_estimate=lambda _: None)
    events = handle.events()
    first = asyncio.create_task(anext(events))
    await asyncio.sleep(0)
    for step in range(1, NUM_STEPS + 1):
        preview = Image.new("RGB", (8, 8))
        handle.emit(Stepped(image=0, step=step, num_steps=NUM_STEPS, eta=0.0, preview=preview))
        handle.emit(Stepped(image=1, step=step, num_steps=NUM_STEPS, eta=0.0))
    handle.done.set_result(None)
    heard: list[EngineEvent] = [await first, *[event async for event in events]]
    for image in (0, 1):
        told = [e for e in heard if isinstance(e, Stepped) and e.image == image]
        assert [event.step for event in told] == list(range(1, NUM_STEPS + 1))
    shown = [e.step for e in heard if isinstance(e, Stepped) and e.preview is not None]
    assert shown[-MAX_PREVIEWS:] == list(range(NUM_STEPS - MAX_PREVIEWS + 1, NUM_STEPS + 1))
    assert len(shown) <= MAX_PREVIEWS + 1  # the first was taken in time


async def test_one_that_keeps_up_sees_every_preview() -> None:
    handle = Handle([make_trajectory()], cancel=lambda _: None, request_estimate=lambda _: None)
    events = handle.events()
    for step in range(1, NUM_STEPS + 1):
        coming = asyncio.create_task(anext(events))
        await asyncio.sleep(0)
        preview = Image.new("RGB", (8, 8))
        handle.emit(Stepped(image=0, step=step, num_steps=NUM_STEPS, eta=0.0, preview=preview))
        event = await coming
        assert isinstance(event, Stepped) and event.step == step and event.preview is preview
    await events.aclose()
