"""From a cold start to the first image: `make bench-cold` prints where the time goes.

    baseline   a process that only imports torch, diffusers' pipeline and transformers' text encoder
    engine     a process that makes one image through the App, by stages
    server     `sdbento serve`, from its start to the first image over HTTP

Each is run several times, in turn, and the best of each counts: disturbances only add time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import httpx

from tests.support.server import free_port

ROOT = Path(__file__).parent.parent
REQUEST = {"prompt": "a red circle", "num_inference_steps": 4, "seed": 1}

BASELINE = """
import torch, diffusers, transformers
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer
"""

ENGINE = """
import time; began = time.perf_counter(); marks = {}
def mark(name): marks[name] = time.perf_counter() - began
from sdbento.process.heavy_imports import without_collector
with without_collector():
    import torch; mark("torch")
    import diffusers, transformers
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel; mark("diffusers and transformers")
    import asyncio, json
    from sdbento.app import App
    from sdbento.request.schema import GenerateRequest
    from sdbento.environment import load_settings; mark("sdbento")
app = App(load_settings()); app.start()
while not app.ready: time.sleep(0.005)
mark("model loaded")
asyncio.run(app.run(GenerateRequest(**REQUEST))); mark("first image")
app.close(0)
print(json.dumps(marks))
"""


def seconds_of(code: str, environment: Mapping[str, str]) -> tuple[float, str]:
    """Wall time of a Python process, and what it printed."""
    started = time.perf_counter()
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True
    ).stdout
    return time.perf_counter() - started, output.decode().strip()


def server_seconds(environment: Mapping[str, str]) -> float:
    """From the start of `sdbento serve` until the first image has come."""
    port = free_port()
    started = time.perf_counter()
    command = [sys.executable, "-m", "sdbento", "serve", "--port", str(port)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while True:
            try:
                url = f"http://127.0.0.1:{port}/txt2img"
                httpx.post(url, json=REQUEST, timeout=120, trust_env=False).raise_for_status()
                return time.perf_counter() - started
            except httpx.TransportError:
                time.sleep(0.02)
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="From nothing to the first image")
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    engine_code = f"REQUEST = {REQUEST!r}\n{ENGINE}"
    baselines, servers, engines = [], [], []
    with tempfile.TemporaryDirectory() as state:
        environment = {**os.environ, "SD_MODEL": "shapes", "SDBENTO_STATE_DIR": state}
        for _ in range(runs):
            baselines.append(seconds_of(BASELINE, environment)[0])
            engines.append(seconds_of(engine_code, environment))
            servers.append(server_seconds(environment))
    baseline, (engine, output), server = min(baselines), min(engines), min(servers)
    print(f"baseline: importing torch, diffusers and transformers  {baseline:6.2f} s")
    before = 0.0
    for name, at in json.loads(output).items():
        print(f"engine:   {name:<42} {at - before:+6.2f} s")
        before = at
    print(f"engine:   process, start to end  {engine:6.2f} s = {engine / baseline:.2f} x baseline")
    print(f"server:   start to first image   {server:6.2f} s = {server / baseline:.2f} x baseline")


if __name__ == "__main__":
    main()
