"""sdbento's own client against a running server.

python examples/client.py [http://localhost:3000 [key]]
"""

from __future__ import annotations

import asyncio
import sys

from sdbento.client import AsyncClient, Client
from sdbento.client.events import Preview, Step
from sdbento.errors import InvalidParameter

URL = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:3000"
KEY = sys.argv[2] if len(sys.argv) > 2 else None
PROMPT = "a red apple on a blue background"


def images(client: Client) -> None:
    made = client.generate(PROMPT, seed=3, num_images=2)
    print(f"two images: seeds {made.seeds}, {made.timings.total:.2f} s")
    print(f"saved as {', '.join(map(str, made.save('apple.png')))}")
    edited = client.edit(made.image.to_pil(), "an orange", strength=0.9, seed=3)
    print(f"another one out of the first: {edited.image.to_pil().size}")
    try:
        client.generate(PROMPT, width=500)
    except InvalidParameter as error:
        print(f"refused: {error.message}")


def progress(client: Client) -> None:
    with client.stream(PROMPT, seed=3, num_inference_steps=5, preview_every=2) as stream:
        for event in stream:
            if isinstance(event, Step):
                print(f"{stream.progress:.0%}, {event.eta:.1f} s to go")
            elif isinstance(event, Preview):
                print(f"a preview: {event.to_pil().size}")
        print(f"done: seed {stream.result().seeds[0]}")


def jobs(client: Client) -> None:
    job = client.jobs.submit(PROMPT, seed=3)
    print(f"a job that goes on without us: {job.status}")
    print(f"its image: seed {client.jobs.wait(job.id).seeds[0]}")


async def many_at_once() -> None:
    async with AsyncClient(URL, api_key=KEY) as client:
        tasks = (client.generate(PROMPT, seed=seed, num_inference_steps=5) for seed in range(4))
        made = await asyncio.gather(*tasks)
    print(f"four at once, which share a batch: seeds {[one.seeds[0] for one in made]}")


def main() -> None:
    with Client(URL, api_key=KEY) as client:
        images(client)
        progress(client)
        jobs(client)
    asyncio.run(many_at_once())


if __name__ == "__main__":
    main()
