"""Other plans run in the midst of a long one, of any kind, and every image is what it is alone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdbento.engine import loop
from sdbento.engine.handle import Handle
from sdbento.engine.loop import Engine
from sdbento.engine.planner import Planner
from sdbento.engine.trajectory import Launched, Stage, StepPlan, Trajectory, image_of
from sdbento.environment import load_settings
from sdbento.models.pipeline import ControlNet, Pipeline
from sdbento.prompts.inversions import Inversions
from sdbento.request.build import TrajectoryBuilder
from sdbento.request.resolved import ResidentModels
from sdbento.runner import launched
from sdbento.runner.torch_runner import TorchRunner
from sdbento.settings import Settings
from tests.support.images import data_uri, gradient, half_mask
from tests.support.loras import everything, make_lora, save_peft
from tests.support.oracle import resolved, tiny_control, tiny_model

SOON = 100.0
EVERY = 7  # operators: planning at each of them takes long, and finds nobody new
BASE: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 3, "width": 64, "height": 64}
PICTURE: dict[str, Any] = {"image": data_uri(gradient()), "strength": 0.9}
MASK = {**PICTURE, "mask_image": data_uri(half_mask())}
LARGE: list[dict[str, Any]] = [
    {"scheduler": "DPM++ 2M", "prompt": "a (big:1.3) mystyle [dog:house:0.5]"},
    {"scheduler": "Euler a", **MASK},
    {"num_images": 2, "scheduler": "UniPC", **PICTURE},
    {"hires": {"scale": 1.5, "steps": 2, "strength": 0.7, "upscaler": "lanczos"}},
    {"lora": {"model_id": "a"}, "prompt": "mystyle"},
]
SMALL: list[dict[str, Any]] = [
    {"scheduler": "Euler a"},
    {"scheduler": "DPM++ 2M SDE", "guidance_scale": 1.0, "prompt": "mystyle house"},
    {"scheduler": "LMS", "lora": {"model_id": "a", "weight": 0.6}},
    {"lora": {"model_id": "a"}, "prompt": "a dog"},
    {"controlnet": {"type": "canny", "image": data_uri(gradient())}},
    PICTURE,
    MASK,
    {"deep_cache_interval": 2},
    {"token_merging_ratio": 0.5},
    {"hires": {"scale": 1.5, "steps": 2, "strength": 0.7, "upscaler": "latent"}},
]


@cache
def model() -> Pipeline:
    return tiny_model("sd15")


@cache
def control() -> ControlNet:
    return tiny_control("sd15")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """With a LoRA in UNet and text encoder, and a textual inversion."""
    folder = tmp_path_factory.mktemp("files")
    lora = make_lora("sd15", 1, marks=everything("sd15"))
    save_peft("sd15", lora, folder / "a.safetensors")
    inversions = folder / "embeddings"
    inversions.mkdir()
    save_file({"emb_params": torch.randn(3, 32)}, inversions / "mystyle.safetensors")
    return load_settings(lora_dir=folder, embeddings_dir=inversions)


def requests(files: Settings) -> list[list[Trajectory]]:
    """Large images first; everything is of another owner."""
    asked = [BASE | {"width": 128, "height": 128} | fields for fields in LARGE]
    asked += [BASE | fields for fields in SMALL]
    made = [images(fields | {"seed": seed}, files) for seed, fields in enumerate(asked)]
    for owner, trajectories in enumerate(made):
        for one in trajectories:
            one.owner = str(owner)
    return made


def images(fields: dict[str, Any], files: Settings) -> list[Trajectory]:
    networks = (control(),) if "controlnet" in fields else ()
    request = resolved(model(), controlnets=networks, settings=files, **fields)
    builder = TrajectoryBuilder(files, Inversions(files))
    return builder.build(request, ResidentModels(model(), networks, None))[0]


class Nested(TorchRunner):
    """Lets plans of one stage pause; counts those that run in the midst of them, by both stages."""

    def __init__(self, pausing: Stage) -> None:
        super().__init__()
        self._pausing = pausing
        self.counts = Counter[tuple[Stage, Stage]]()
        self._outer: list[Stage] = []
        self._operators = count()

    def launch(self, plan: StepPlan, pause: Callable[[], None] | None = None) -> Launched:
        if self._outer:
            self.counts[self._outer[-1], plan.stage] += 1
        self._outer.append(plan.stage)
        try:
            if pause is None or plan.stage is not self._pausing:
                return super().launch(plan)
            return super().launch(plan, partial(self._sometimes, pause))
        finally:
            self._outer.pop()

    def _sometimes(self, pause: Callable[[], None]) -> None:
        if next(self._operators) % EVERY == 0:
            pause()


def ended(groups: Sequence[list[Trajectory]], runner: TorchRunner) -> list[list[Image.Image]]:
    """The images of requests that are all there when the engine starts."""
    engine = Engine(runner, Planner(4))
    handles: list[Handle] = [engine.submit(group, time.monotonic() + SOON) for group in groups]
    engine.start()
    try:
        for handle in handles:
            handle.done.result(SOON)
    finally:
        engine.close(0.0)
    return [[image_of(one) for one in group] for group in groups]


def levels(one: Image.Image, other: Image.Image) -> int:
    """The largest difference between two images."""
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


def test_images_of_all_kinds_are_what_they_are_alone(
    files: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [ended([group], TorchRunner())[0] for group in requests(files)]
    monkeypatch.setattr(loop, "LONG", 0.0)
    monkeypatch.setattr(launched, "PAUSE_EVERY", 0.0)
    monkeypatch.setattr(launched, "QUERIES", 8)
    monkeypatch.setattr(launched, "PRODUCTS", 1.0)
    nested = set[Stage]()
    for pausing in Stage:
        runner = Nested(pausing)
        together = ended(requests(files), runner)
        for i, (expected, made) in enumerate(zip(alone, together, strict=True)):
            assert max(map(levels, expected, made)) <= 1, (pausing, i)
        assert runner.counts, pausing
        nested |= {inner for _, inner in runner.counts}
    assert nested == set(Stage)
