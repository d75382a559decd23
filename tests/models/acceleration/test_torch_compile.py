"""SDBENTO_COMPILE: the same images, and no request waits for the compiler.

Tracing, guards and dispatch are torch.compile's own; only the generated code is left out, because
compiling it with a C++ compiler takes minutes. `SDBENTO_COMPILE=true python -m bench.profile` runs
with that too.
"""

from __future__ import annotations

import copy
import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import cache_dir

from sdbento.engine.trajectory import BatchKey
from sdbento.models.acceleration.torch_compile import BLOCKS, CompiledUnet
from sdbento.models.pipeline import Pipeline
from sdbento.runner.torch_runner import TorchRunner
from tests.support.device_errors import AcceleratorError
from tests.support.images import base64, gradient
from tests.support.loras import styled
from tests.support.oracle import engine_pixels, run_together, tiny_control, tiny_model
from tests.support.oracle import trajectories_of as images

pytestmark = [
    pytest.mark.long,
    # A warning that torch causes itself while it imports its compiler.
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


class Compiler:
    """Leaves the code as it is, and counts how often compiled code runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


COMPILER = Compiler()
PARITY = 1e-3
MAX_ROWS = 12
BASE: dict[str, Any] = {"prompt": "a cat", "seed": 5, "num_inference_steps": 4}
UNGUIDED = BASE | {"guidance_scale": 1.0}


@pytest.fixture(scope="module", autouse=True)
def _room_for_all_models() -> Iterator[None]:
    """torch gives up compiling the same code for the ninth time; a server compiles one model."""
    with torch._dynamo.config.patch(recompile_limit=64):
        yield


@pytest.fixture(scope="module")
def plain() -> Pipeline:
    return tiny_model("sd15")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def compiled(plain: Pipeline, folder: Path) -> Iterator[Pipeline]:
    """A model as a starting server makes it, compiled when it is measured."""
    environment = dict(os.environ)
    pipeline = compilable(plain, folder)
    compile_own_size(pipeline)
    yield pipeline
    torch.compiler.reset()
    os.environ.clear()
    os.environ.update(environment)


def compilable(plain: Pipeline, folder: Path) -> Pipeline:
    components = plain.pipe.components | {"unet": copy.deepcopy(plain.unet)}
    pipe = type(plain.pipe)(**components, requires_safety_checker=False)
    return replace(plain, pipe=pipe, compiled=CompiledUnet(pipe.unet, folder, COMPILER))


def compile_own_size(pipeline: Pipeline, max_rows: int = MAX_ROWS) -> None:
    key = BatchKey(pipeline.spec.name, 8, 8)
    assert pipeline.compiled is not None
    pipeline.compiled.compile(partial(TorchRunner().measure, pipeline, key), max_rows)


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """The compiler is never asked, not even for what then runs uncompiled; and calls of compiled
    code that it would have to be asked for are errors."""
    before = Counter(counters["frames"])
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert Counter(counters["frames"]) == before


@contextmanager
def uncompiled_calls(pipeline: Pipeline) -> Iterator[list[int]]:
    """Rows of the calls in which not all blocks run compiled."""
    calls: list[int] = []
    forward = pipeline.unet.forward
    num_blocks = sum(type(module).__name__ in BLOCKS for module in pipeline.unet.modules())

    def note(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        before = COMPILER.runs
        output = forward(sample, *args, **kwargs)
        if COMPILER.runs - before < num_blocks:
            calls.append(len(sample))
        return output

    pipeline.unet.forward = note
    try:
        yield calls
    finally:
        del pipeline.unet.forward


def check_all_runs_compiled(compiled: Pipeline, plain: Pipeline, **asked: Any) -> None:
    """And it makes the image that `plain` makes."""
    with nothing_compiled(), uncompiled_calls(compiled) as calls:
        ours = engine_pixels(compiled, **asked)
    assert np.abs(ours - engine_pixels(plain, **asked)).max() <= PARITY
    assert calls == []


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"guidance_scale": 1.0},
        {"scheduler": "Euler a", "image": base64(gradient())},
        {"controlnet": {"type": "canny", "image": base64(gradient())}},
    ],
    ids=["plain", "unguided", "img2img", "ControlNet"],
)
def test_a_compiled_model_makes_the_same_images(
    compiled: Pipeline, plain: Pipeline, fields: dict[str, Any]
) -> None:
    networks = [tiny_control("sd15")] if "controlnet" in fields else []
    check_all_runs_compiled(compiled, plain, controlnets=networks, **BASE | fields)


def test_any_number_of_rows_runs_compiled(compiled: Pipeline) -> None:
    with nothing_compiled(), uncompiled_calls(compiled) as calls:
        together = run_together([images(compiled, **BASE | {"seed": i}) for i in range(6)])
        alone = [engine_pixels(compiled, **BASE | {"seed": i}) for i in range(6)]
    assert max(np.abs(t[0] - a).max() for t, a in zip(together, alone, strict=True)) <= PARITY
    assert calls == []


@pytest.mark.parametrize(
    "fields",
    [
        {"width": 72, "height": 88},
        {"width": 128, "height": 64},
        {"prompt": "a cat " * 60},
        {"token_merging_ratio": 0.5},
    ],
    ids=["odd size", "wide", "long", "merged tokens"],
)
def test_what_was_not_compiled_runs_uncompiled_and_at_once(
    compiled: Pipeline, plain: Pipeline, fields: dict[str, Any]
) -> None:
    with nothing_compiled(), uncompiled_calls(compiled) as calls:
        ours = engine_pixels(compiled, **BASE | fields)
    assert np.abs(ours - engine_pixels(plain, **BASE | fields)).max() <= PARITY
    assert set(calls) == {2}


def test_shallow_steps_run_uncompiled_and_at_once(compiled: Pipeline, plain: Pipeline) -> None:
    fields = BASE | {"deep_cache_interval": 2}
    with nothing_compiled():
        ours = engine_pixels(compiled, **fields)
    assert np.abs(ours - engine_pixels(plain, **fields)).max() <= PARITY


def test_more_rows_than_were_compiled_for_run_compiled_too(compiled: Pipeline) -> None:
    with nothing_compiled(), uncompiled_calls(compiled) as calls:
        for rows in (MAX_ROWS, MAX_ROWS + 1):
            TorchRunner().measure(compiled, BatchKey(compiled.spec.name, 8, 8), rows)
    assert calls == []


def test_where_memory_ends_what_is_compiled_so_far_is_used(
    plain: Pipeline, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline, key = compilable(plain, folder), BatchKey(plain.spec.name, 8, 8)
    assert pipeline.compiled is not None

    def call(rows: int) -> None:
        if rows > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        TorchRunner().measure(pipeline, key, rows)

    pipeline.compiled.compile(call, MAX_ROWS)
    assert "out of memory" in caplog.text
    with nothing_compiled(), uncompiled_calls(pipeline) as calls:
        for rows in (7, 8, 9):
            TorchRunner().measure(pipeline, key, rows)
    assert calls == []


def test_a_model_that_was_never_measured_runs_uncompiled(
    plain: Pipeline, compiled: Pipeline, folder: Path
) -> None:
    """And it does not matter that another one was compiled."""
    other = compilable(plain, folder)
    with nothing_compiled(), uncompiled_calls(other) as calls:
        engine_pixels(other, **BASE)
    assert set(calls) == {2}


def test_sdxl_runs_compiled_too(folder: Path) -> None:
    plain = tiny_model("sdxl")
    pipeline = replace(plain, compiled=CompiledUnet(plain.unet, folder, COMPILER))
    compile_own_size(pipeline, max_rows=1)
    check_all_runs_compiled(pipeline, plain, **UNGUIDED)


def test_the_input_has_the_order_in_memory_that_the_weights_have(
    plain: Pipeline, folder: Path
) -> None:
    """Code that was compiled for one order does not fit another."""
    pipeline = compilable(plain, folder)
    pipeline.unet.to(memory_format=torch.channels_last)
    compile_own_size(pipeline, max_rows=1)
    check_all_runs_compiled(pipeline, plain, **UNGUIDED)


def test_loras_have_their_effect_in_a_compiled_model(
    compiled: Pipeline, plain: Pipeline, tmp_path: Path
) -> None:
    options = styled("sd15", tmp_path)
    ours, theirs = (engine_pixels(model, **BASE, **options) for model in (compiled, plain))
    assert np.abs(ours - theirs).max() <= PARITY
    assert np.abs(ours - engine_pixels(compiled, **BASE)).max() > 10 * PARITY


@pytest.mark.usefixtures("compiled")
def test_torch_caches_its_work_in_the_folder(folder: Path) -> None:
    assert cache_dir() == str(folder)


def test_without_a_working_compiler_only_that_model_runs_uncompiled(
    compiled: Pipeline, plain: Pipeline, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def backend(*_: object) -> Any:
        raise RuntimeError("no compiler")

    broken = compilable(plain, folder)
    broken = replace(broken, compiled=CompiledUnet(broken.unet, folder, backend=backend))
    with caplog.at_level(logging.ERROR):
        compile_own_size(broken)
    assert "no compiler" in caplog.text
    with uncompiled_calls(broken) as calls:
        assert np.array_equal(engine_pixels(broken, **BASE), engine_pixels(plain, **BASE))
    assert set(calls) == {2}
    with uncompiled_calls(compiled) as calls:
        engine_pixels(compiled, **BASE)
    assert calls == []


def test_a_gpu_that_fails_while_a_model_is_compiled_is_reported(
    plain: Pipeline, folder: Path
) -> None:
    def call(rows: int) -> None:
        raise AcceleratorError("CUDA error: an illegal memory access was encountered")

    compiled = CompiledUnet(plain.unet, folder, backend="eager")
    with pytest.raises(AcceleratorError):
        compiled.compile(call, max_rows=2)
