"""Modes that send whole requests: the bystander, floods, changes of model, users with limits."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random

import httpx

from sdbento.access import entries
from tests.soak.calls import OTHER_MODEL, Call, fixed_calls, new_call
from tests.soak.ground import Ground
from tests.soak.record import Images

FLOOD = 40  # requests at once; more than MAX_QUEUE_SIZE and MAX_BATCH_SIZE take
KEPT = 100  # new calls whose images are kept, to be made again alone in the end
BAD_CALLS: list[tuple[bytes, int]] = [
    (b"{", 400),
    (b'"text"', 400),
    (b'{"prompt": "x", "width": 8}', 422),
    (b'{"prompt": "x", "no_such_field": 1}', 422),
    (b'{"prompt": "x", "model": "no-such-model"}', 404),
    (b'{"prompt": "x", "image": "data:image/png;base64,AAAA"}', 422),
    (b'{"prompt": "x", "lora": [{"model_id": "no-such-lora"}]}', 422),
    (b'{"prompt": "' + b"x" * 1_100_000 + b'"}', 413),
]


class Oracle:
    """Fixed calls with the images of their solo runs, and new calls to make again in the end."""

    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        self.alone: list[tuple[Call, Images]] = []
        self.kept: list[tuple[Call, Images]] = []
        for call in fixed_calls():
            images = ground.make("operator", call)
            if images is None:
                raise RuntimeError(f"an undisturbed server does not make {call}")
            self.alone.append((call, images))

    def ask(self, mode: str, chance: Random, *, busy: bool = False, new: bool = False) -> None:
        """Make a call and compare; a busy server may answer 429."""
        expected = (200, 429) if busy else (200,)
        if new:
            call = new_call(chance)
            images = self.ground.make(mode, call, expected)
            if images is not None and len(self.kept) < KEPT and chance.random() < 0.1:
                self.kept.append((call, images))
            return
        call, alone = chance.choice(self.alone)
        images = self.ground.make(mode, call, expected)
        if images is not None:
            self.ground.record.compare(mode, call, images, alone)

    def make_kept_again(self) -> None:
        for call, images in self.kept:
            alone = self.ground.make("operator", call)
            if alone is not None:
                self.ground.record.compare("again", call, images, alone)


def bystander(ground: Ground, oracle: Oracle, chance: Random) -> None:
    """One user who asks for one image at a time, and must always get it."""
    for _ in ground.pauses(chance, 0.5, 4.0):
        oracle.ask("bystander", chance)


def floods(ground: Ground, oracle: Oracle, chance: Random) -> None:
    """Many requests at once; some new, some bad, some from clients that go away."""

    def one(chance: Random) -> None:
        kind = chance.random()
        if kind < 0.4:
            oracle.ask("floods", chance, busy=True)
        elif kind < 0.8:
            oracle.ask("floods", chance, busy=True, new=True)
        elif kind < 0.9:
            body, status = chance.choice(BAD_CALLS)
            headers = {"Content-Type": "application/json"}
            ground.ask("floods", "POST", "/generate", (status, 429), content=body, headers=headers)
        else:
            go_away(ground, chance)

    with ThreadPoolExecutor(FLOOD) as pool:
        for _ in ground.pauses(chance, 10.0, 30.0):
            for future in [pool.submit(one, Random(chance.random())) for _ in range(FLOOD)]:
                future.result()


def go_away(ground: Ground, chance: Random) -> None:
    """Ask for a long run, read nothing or some events, and close the connection."""
    body = new_call(chance).body | {"num_inference_steps": 40}
    headers = {"Authorization": f"Bearer {ground.keys['floods']}"}
    try:
        with ground.http.stream(
            "POST", "/generate_stream", json=body, headers=headers, timeout=chance.uniform(0.2, 3)
        ) as answer:
            for _ in zip(range(chance.randint(1, 20)), answer.iter_lines(), strict=False):
                pass
    except httpx.TransportError:
        pass
    ground.record.answered("floods", "client gone", 0.0)


def models(ground: Ground, oracle: Oracle, chance: Random) -> None:
    """Asks for one model and the other in turn; every few times another file of its own kind."""
    by_model = [
        [pair for pair in oracle.alone if (pair[0].model == OTHER_MODEL) == other]
        for other in (False, True)
    ]
    for turn, _ in enumerate(ground.pauses(chance, 1.0, 6.0)):
        call, alone = chance.choice(by_model[turn % 2])
        images = ground.make("models", call)
        if images is not None:
            ground.record.compare("models", call, images, alone)


def keys(ground: Ground, oracle: Oracle, chance: Random) -> None:
    """Users with limits, a password, wrong keys, and keys that come and go."""
    users: list[tuple[str, Callable[[], None]]] = [
        ("minute", lambda: oracle.ask("minute", chance, busy=True)),
        ("at-once", lambda: _several(ground, oracle, chance)),
        ("one-model", lambda: _forbidden(ground)),
        ("password", lambda: oracle.ask("password", chance, busy=True)),
        ("nobody", lambda: _nobody(ground, chance)),
        ("owner", lambda: _not_the_owner(ground, chance)),
        ("guest", lambda: _guest(ground)),
    ]
    ground.add_user("minute", requests_per_minute=6)
    ground.add_user("at-once", images_at_once=2)
    ground.add_user("one-model", models=["shapes"])
    ground.add_user("password", password="correct horse battery staple")
    ground.add_user("owner")
    ground.keys["nobody"] = "not-a-key"
    ground.stop.wait(10)  # until the server has read the file again
    for _ in ground.pauses(chance, 1.0, 6.0):
        chance.choice(users)[1]()


def _several(ground: Ground, oracle: Oracle, chance: Random) -> None:
    threads = [
        threading.Thread(
            target=oracle.ask, args=("at-once", Random(i)), kwargs={"busy": True, "new": True}
        )
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ground.ask("at-once", "POST", "/generate", (403,), json={"prompt": "x", "num_images": 3})


def _forbidden(ground: Ground) -> None:
    body = {"prompt": "x", "model": OTHER_MODEL}
    ground.ask("one-model", "POST", "/generate", (403,), json=body)
    ground.ask("one-model", "GET", "/models", (200,))


def _nobody(ground: Ground, chance: Random) -> None:
    path = chance.choice(["/generate", "/run", "/v1/images/generations", "/sdapi/v1/txt2img"])
    ground.ask("nobody", "POST", path, (401,), json={"prompt": "x"})


def _not_the_owner(ground: Ground, chance: Random) -> None:
    """A job that its owner sees and nobody else."""
    body = {"input": {"prompt": "a red circle", "num_inference_steps": 3}}
    answer = ground.ask("owner", "POST", "/run", (200, 429), json=body)
    if answer is None or answer.status_code != 200:
        return
    path = f"/status/{json.loads(answer.text)['id']}"
    ground.ask("owner", "GET", path, (200,))
    ground.ask("at-once", "GET", path, (404,))
    ground.ask("at-once", "POST", path.replace("status", "cancel"), (404,))


def _guest(ground: Ground) -> None:
    """A user who is added, asks, and is removed."""
    if "guest" in ground.keys:
        entries.remove(ground.file, "guest")
    ground.add_user("guest")
    ground.stop.wait(6)
    ground.ask("guest", "GET", "/models", (200, 401))
