"""The trace that all systems get: 64 mixed requests, made from a seed."""

from __future__ import annotations

import random
from typing import Any

NUM_REQUESTS = 64
SAMPLERS = ["DDIM", "Euler", "Euler a", "DPM++ 2M Karras", "UniPC", "DPM++ 2M SDE"]
COLOURS = ["red", "green", "blue", "yellow", "purple", "orange"]
SHAPES = ["circle", "square", "triangle", "star", "ring", "cross"]


def make_trace(seed: int = 0, num_requests: int = NUM_REQUESTS) -> list[dict[str, Any]]:
    """Requests of 4 to 40 steps, six samplers, guidance 1 to 9; one in five 192x192, else 128."""
    rng = random.Random(seed)
    return [_request(rng, i) for i in range(num_requests)]


def _request(rng: random.Random, i: int) -> dict[str, Any]:
    side = 192 if i % 5 == 4 else 128
    colour, background = rng.sample(COLOURS, 2)
    return {
        "prompt": f"a large {colour} {rng.choice(SHAPES)} on a {background} background",
        "num_inference_steps": rng.randint(4, 40),
        "guidance_scale": float(rng.randint(1, 9)),
        "scheduler": rng.choice(SAMPLERS),
        "width": side,
        "height": side,
        "seed": i,
    }
