"""SDBENTO_COMPILE: the same images, and no request waits for the compiler.

Tracing, guards and dispatch are torch.compile's own; only the generated code is left out, because
compiling it with a C++ compiler takes minutes. `SDBENTO_COMPILE=true python -m bench.profile` runs
with that too.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from sdbento.engine.trajectory import BatchKey
from sdbento.environment import load_settings
from sdbento.models import torch_compile
from sdbento.models.pipeline import Pipeline
from sdbento.runner.torch_runner import TorchRunner
from tests.support.images import base64, gradient
from tests.support.loras import make_lora, save_peft
from tests.support.oracle import engine_pixels, run_together, tiny_control, tiny_model
from tests.support.oracle import trajectories_of as images

# A warning that torch causes itself while it imports its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

PARITY = 1e-3
BASE: dict[str, Any] = {"prompt": "a cat", "seed": 5, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def plain() -> Pipeline:
    return tiny_model("sd15")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def compiled(plain: Pipeline, folder: Path) -> Iterator[Pipeline]:
    """A model as a starting server makes it: enabled when loaded, compiled when measured."""
    components = plain.pipe.components | {"unet": copy.deepcopy(plain.unet)}
    pipeline = replace(plain, pipe=type(plain.pipe)(**components, requires_safety_checker=False))
    environment = dict(os.environ)
    torch_compile.enable(pipeline.unet, folder)
    pipeline.unet.compile(dynamic=True, backend="eager")
    with torch_compile.allowed():
        for rows in (1, 2):
            TorchRunner().measure(pipeline, BatchKey(plain.spec.name, 8, 8), rows)
    yield pipeline
    torch.compiler.set_stance("default")
    torch.compiler.reset()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def only_compiled() -> Iterator[None]:
    """A call that fits nothing compiled is an error here; a server runs it uncompiled."""
    with torch.compiler.set_stance("fail_on_recompile"):
        yield


@pytest.mark.usefixtures("only_compiled")
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"guidance_scale": 1.0},
        {"width": 128, "height": 64},
        {"prompt": "a cat " * 60},
        {"scheduler": "Euler a", "image": base64(gradient())},
    ],
    ids=["plain", "unguided", "wide", "long", "img2img"],
)
def test_a_compiled_model_makes_the_same_images(
    compiled: Pipeline, plain: Pipeline, fields: dict[str, Any]
) -> None:
    ours, theirs = (engine_pixels(model, **BASE | fields) for model in (compiled, plain))
    assert np.abs(ours - theirs).max() <= PARITY


@pytest.mark.usefixtures("only_compiled")
def test_any_number_of_rows_runs_compiled(compiled: Pipeline) -> None:
    together = run_together([images(compiled, **BASE | {"seed": i}) for i in range(4)])
    alone = [engine_pixels(compiled, **BASE | {"seed": i}) for i in range(4)]
    assert max(np.abs(t[0] - a).max() for t, a in zip(together, alone, strict=True)) <= PARITY


@pytest.mark.parametrize(
    "fields",
    [
        {"width": 72, "height": 88},
        {"controlnet": {"type": "canny", "image": base64(gradient())}},
        {"deep_cache_interval": 2},
        {"token_merging_ratio": 0.5},
    ],
    ids=["odd size", "ControlNet", "DeepCache", "merged tokens"],
)
def test_requests_that_fit_nothing_compiled_run_uncompiled(
    compiled: Pipeline, plain: Pipeline, fields: dict[str, Any]
) -> None:
    networks = [tiny_control("sd15")] if "controlnet" in fields else []
    ours = engine_pixels(compiled, controlnets=networks, **BASE | fields)
    theirs = engine_pixels(plain, controlnets=networks, **BASE | fields)
    assert np.abs(ours - theirs).max() <= PARITY


def test_loras_have_their_effect_in_a_compiled_model(
    compiled: Pipeline, plain: Pipeline, tmp_path: Path
) -> None:
    save_peft("sd15", make_lora("sd15"), tmp_path / "style.safetensors")
    options: dict[str, Any] = {
        "settings": load_settings(lora_dir=tmp_path),
        "lora": {"model_id": "style"},
    }
    ours, theirs = (engine_pixels(model, **BASE, **options) for model in (compiled, plain))
    assert np.abs(ours - theirs).max() <= PARITY
    assert np.abs(ours - engine_pixels(compiled, **BASE)).max() > 10 * PARITY


@pytest.mark.usefixtures("compiled")
def test_torch_caches_its_work_in_the_folder(folder: Path) -> None:
    assert cache_dir() == str(folder)


def test_without_a_working_compiler_models_run_uncompiled(
    compiled: Pipeline, plain: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    def call() -> None:
        raise RuntimeError("no compiler")

    with caplog.at_level(logging.ERROR), torch_compile.allowed():
        call()
    assert "no compiler" in caplog.text
    ours, theirs = engine_pixels(compiled, **BASE), engine_pixels(plain, **BASE)
    torch.compiler.set_stance("eager_on_recompile")
    assert np.array_equal(ours, theirs)
