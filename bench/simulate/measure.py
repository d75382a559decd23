"""The cost curve of the bundled model on this machine, for `bench/curves/cpu-shapes.json`."""

from __future__ import annotations

from statistics import median

from bench.hardware import hardware
from bench.simulate.curves import Curves, Side
from sdbento.catalog.families import VAE_FACTOR
from sdbento.catalog.lookup import Catalog
from sdbento.engine.trajectory import BatchKey
from sdbento.environment import load_settings
from sdbento.models import weights
from sdbento.models.pipeline import Pipeline
from sdbento.process.malloc import keep_freed_memory
from sdbento.runner.torch_runner import TorchRunner

SIDES = (128, 192)
ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32)
REPEATS = 7


def measure_cpu() -> Curves:
    """Each call as a server makes it, at every row count in turn, the median of REPEATS rounds."""
    keep_freed_memory()
    settings = load_settings(sd_model="shapes")
    pipeline = weights.load(Catalog(settings).resolve("shapes"), settings)
    assert isinstance(pipeline, Pipeline)
    runner = TorchRunner()
    sides = {side: _side(runner, pipeline, side) for side in SIDES}
    return Curves(
        f"`shapes` on {hardware()}", "measured by `python -m bench.simulate --measure-cpu`", sides
    )


def _side(runner: TorchRunner, pipeline: Pipeline, side: int) -> Side:
    key = BatchKey(pipeline.spec.name, side // VAE_FACTOR, side // VAE_FACTOR)
    rounds = []
    for _ in range(1 + REPEATS):  # the first one warms up
        steps = [runner.measure(pipeline, key, rows) for rows in ROWS]
        rounds.append([*steps, runner.measure_decode(pipeline, key)])
    *steps, decode = (median(timings[1:]) for timings in zip(*rounds, strict=True))
    return Side(dict(zip(ROWS, steps, strict=True)), {1: decode})
