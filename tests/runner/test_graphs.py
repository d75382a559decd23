"""CUDA graphs, with captures that a CPU can make: right images, and every way back to eager."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from sdbento.engine.loop import Engine
from sdbento.engine.planner import Planner
from sdbento.engine.trajectory import BatchKey, StepPlan, Trajectory
from sdbento.environment import load_settings
from sdbento.models.acceleration.torch_compile import CompiledUnet
from sdbento.models.pipeline import Pipeline
from sdbento.runner.graphs import (
    MAX_SLOTS,
    RETRY_AFTER,
    CudaCapture,
    Graphs,
    NoRoom,
    bucket,
    make_graphs,
)
from sdbento.runner.torch_runner import TorchRunner
from sdbento.samplers.compile import compile_table
from sdbento.samplers.names import list_samplers
from sdbento.samplers.scheduler import SamplerSpec
from tests.support.graphs import NBYTES, FakeCapture, FakeMemory, fake_graphs
from tests.support.images import data_uri, gradient, half_mask
from tests.support.loras import make_lora, save_peft
from tests.support.metrics import counted
from tests.support.oracle import (
    engine_pixels,
    run_together,
    stock_pixels,
    tiny_control,
    tiny_model,
    trajectories_of,
)

SAMPLERS = [sampler.name for sampler in list_samplers() if "EDM" not in sampler.name]
KINDS = ["sd15", "sd21", "sdxl", "sd15-inpaint"]
PARITY = 1e-3  # of the decoded image on [0, 1]
BASE: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 5, "seed": 7}
INPAINT: dict[str, Any] = {
    **BASE,
    "image": data_uri(gradient()),
    "mask_image": data_uri(half_mask()),
}


@cache
def model(kind: str) -> Pipeline:
    return tiny_model(kind)


@pytest.fixture
def replays() -> Callable[[], int]:
    """How many steps were replayed since the test began."""
    before = FakeCapture.replays
    return lambda: FakeCapture.replays - before


def difference(one: Any, other: Any) -> float:
    return float(np.abs(np.asarray(one) - np.asarray(other)).max())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_replayed_sampler_makes_the_stock_pipelines_image(
    sampler: str, replays: Callable[[], int]
) -> None:
    fields = {**BASE, "scheduler": sampler}
    ours = engine_pixels(model("sd15"), graphs=fake_graphs(), **fields)
    assert replays() >= 4
    assert difference(ours, stock_pixels(model("sd15"), **fields)) <= PARITY


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.6, "scheduler": "Euler a"},
        {"prompt": "a [cat:dog:0.5]"},
        {"guidance_start": 0.3, "guidance_end": 0.8},
    ],
    ids=str,
)
def test_a_replayed_image_is_the_eager_one(
    kind: str, fields: dict[str, Any], replays: Callable[[], int]
) -> None:
    asked = {**(INPAINT if "inpaint" in kind else BASE), **fields}
    eager = engine_pixels(model(kind), **asked)
    assert replays() == 0
    replayed = engine_pixels(model(kind), graphs=fake_graphs(), **asked)
    assert replays() >= 4
    assert difference(eager, replayed) <= 1e-5


def test_padded_rows_change_nothing() -> None:
    """Five images of one or two rows each: batches of 5 to 7 rows, padded to 6 and 8."""
    asked = [{**BASE, "seed": i, "guidance_scale": 1.0 + (i % 2)} for i in range(5)]
    jobs = [trajectories_of(model("sd15"), **fields) for fields in asked]
    together = run_together(jobs, 5, graphs=fake_graphs())
    for fields, [pixels] in zip(asked, together, strict=True):
        assert difference(engine_pixels(model("sd15"), **fields), pixels) <= 1e-5


def test_padding_is_counted_but_not_where_a_model_is_measured() -> None:
    """Seven rows are padded to eight in each of the steps that were replayed."""
    asked = [{**BASE, "seed": i, "guidance_scale": 5.0 if i else 1.0} for i in range(4)]
    replayed, before = FakeCapture.replays, counted()
    run_together([trajectories_of(model("sd15"), **f) for f in asked], 4, graphs=fake_graphs())
    replayed = FakeCapture.replays - replayed
    grown = counted().since(before)
    assert grown["sdbento_rows_total{kind=padding}"] == replayed > 0
    before = counted()
    runner = TorchRunner(graphs=fake_graphs())
    for _ in range(2):
        runner.measure(model("sd15"), BatchKey("sd15", 8, 8), 7, capture=True)
    assert "sdbento_rows_total{kind=padding}" not in counted().since(before)


def test_an_image_that_overflows_harms_no_other_whatever_place_it_leaves(
    replays: Callable[[], int],
) -> None:
    broken = trajectories_of(model("sd15"), **{**BASE, "scheduler": "DPM++ 2M"})
    graphs = fake_graphs()
    planner, runner = Planner(4), TorchRunner(graphs=graphs)
    planner.add(broken)
    for _ in range(4):
        advance(planner, runner)
        if (state := broken[0].state) is not None:
            state.slots, state.batch = torch.full_like(state.slots, torch.inf), None
    planner.remove(broken)
    without_memory = {**BASE, "scheduler": "Euler"}
    good = engine_pixels(model("sd15"), graphs=graphs, **without_memory)
    assert replays() >= 6
    assert difference(good, engine_pixels(model("sd15"), **without_memory)) <= 1e-5


def advance(planner: Planner, runner: TorchRunner) -> StepPlan | None:
    if (plan := planner.plan()) is not None:
        launched = runner.launch(plan)
        planner.advance(plan)
        planner.record(plan, launched.wait(), 0.0)
    return plan


def finish(runner: TorchRunner, trajectories: list[Trajectory]) -> None:
    planner = Planner(4)
    planner.add(trajectories)
    while advance(planner, runner):
        pass


def test_a_kind_of_step_is_captured_once_it_has_come_often_enough(
    replays: Callable[[], int],
) -> None:
    graphs = fake_graphs(eager_calls=3)
    engine_pixels(model("sd15"), graphs=graphs, **{**BASE, "scheduler": "Euler"})
    assert replays() == BASE["num_inference_steps"] - 3


@pytest.mark.parametrize(
    "fields",
    [
        {"lora": {"model_id": "style"}},
        {"controlnet": {"type": "canny", "image": data_uri(gradient())}},
        {"deep_cache_interval": 2},
        {"token_merging_ratio": 0.5},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_steps_that_are_more_than_the_unet_run_eagerly(
    fields: dict[str, Any], replays: Callable[[], int], tmp_path: Path
) -> None:
    save_peft("sd15", make_lora("sd15"), tmp_path / "style.safetensors")
    asked: dict[str, Any] = {
        "controlnets": [tiny_control("sd15")] if "controlnet" in fields else [],
        "settings": load_settings(lora_dir=tmp_path),
        **BASE,
        **fields,
        "num_inference_steps": 4,
        "scheduler": "Euler",
    }
    images = [engine_pixels(model("sd15"), graphs=used, **asked) for used in (None, fake_graphs())]
    assert difference(*images) <= 1e-6
    assert replays() == 0


def test_what_cannot_be_captured_runs_eagerly_and_is_not_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    attempts = list[int]()

    class Refused(FakeCapture):
        def __call__(self, *args: Any) -> Any:
            attempts.append(1)
            raise RuntimeError("operation not permitted when stream is capturing")

    pixels = engine_pixels(model("sd15"), graphs=fake_graphs(capture=Refused), **BASE)
    assert difference(pixels, engine_pixels(model("sd15"), **BASE)) == 0
    assert len(attempts) == 1
    assert "cannot be captured and runs eagerly: operation not permitted" in caplog.text


def test_a_graph_that_finds_no_room_is_tried_again_much_later(
    replays: Callable[[], int],
) -> None:
    memory = FakeMemory(graphs=0)
    graphs = fake_graphs(memory)
    engine_pixels(model("sd15"), graphs=graphs, **BASE)
    memory._graphs = 5
    engine_pixels(model("sd15"), graphs=graphs, **BASE)
    assert (replays(), dict(memory.grown)) == (0, {})
    many = {**BASE, "num_inference_steps": RETRY_AFTER // 2}
    run_together([trajectories_of(model("sd15"), **many) for _ in range(2)], 1, graphs=graphs)
    assert replays() > 0
    assert memory.num_graphs(model("sd15")) == 1


def test_a_device_without_memory_gets_that_of_the_graphs_back(
    monkeypatch: pytest.MonkeyPatch, replays: Callable[[], int]
) -> None:
    memory = FakeMemory()
    graphs = fake_graphs(memory)
    runner = TorchRunner(graphs=graphs)
    finish(runner, trajectories_of(model("sd15"), **BASE))
    assert memory.num_graphs(model("sd15")) == 1
    planner = Planner(4)
    planner.add(trajectories_of(model("sd15"), **BASE))
    advance(planner, runner)
    with monkeypatch.context() as patch:
        patch.setattr(TorchRunner, "_compute", lambda *_: raise_(torch.OutOfMemoryError("full")))
        with pytest.raises(torch.OutOfMemoryError):
            advance(planner, runner)
    assert memory.grown[model("sd15")] == 0
    before = replays()
    long = {**BASE, "num_inference_steps": 150}
    finish(runner, trajectories_of(model("sd15"), **long))
    assert replays() == before, "memory is short"
    finish(runner, trajectories_of(model("sd15"), **long))
    assert replays() > before, "captured anew"


def raise_(error: Exception) -> Any:
    raise error


def test_graphs_do_not_outlive_their_model() -> None:
    """A model that was offloaded comes back elsewhere in memory."""

    class Forgetful(FakeCapture):
        """As CudaCapture, keeps nothing of what it has captured."""

        def __call__(self, work: Any, room: int) -> Any:
            made = work()
            return made, lambda: None, NBYTES

    pipeline = tiny_model("sd15")
    graphs = fake_graphs(capture=Forgetful)
    runner = TorchRunner(graphs=graphs)
    finish(runner, trajectories_of(pipeline, **BASE))
    gone = weakref.ref(pipeline)
    captured = weakref.ref(next(iter(captured_steps(graphs))))
    del pipeline, runner
    gc.collect()
    assert gone() is None
    assert captured() is None


def captured_steps(graphs: Graphs) -> Iterator[Any]:
    return (step for model in graphs._models.values() for step in model.steps.values())


def test_buckets_are_the_row_counts_that_steps_are_padded_to() -> None:
    assert sorted({bucket(rows) for rows in range(1, 33)}) == [
        *(1, 2, 3, 4, 6, 8, 10, 12, 14, 16),
        *(20, 24, 28, 32),
    ]
    assert all(rows <= bucket(rows) < rows + 4 for rows in range(1, 33))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_sampler_has_more_memory_than_a_graph_has_room_for(sampler: str) -> None:
    config = model("sd15").scheduler_config
    assert compile_table(SamplerSpec(sampler), config, 20).num_slots <= MAX_SLOTS


def test_without_a_gpu_graphs_are_asked_for_in_vain(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    nobody: Any = None
    assert make_graphs(load_settings(cuda_graphs=False), nobody) is None
    assert make_graphs(load_settings(cuda_graphs=True), nobody) is None
    assert caplog.messages == ["SDBENTO_CUDA_GRAPHS needs a GPU: steps are computed eagerly"]


def test_what_is_measured_is_captured_so_that_no_request_waits_for_it(
    replays: Callable[[], int],
) -> None:
    memory = FakeMemory()
    runner = TorchRunner(graphs=fake_graphs(memory, eager_calls=3))
    key = BatchKey(model("sd15").spec.name, 8, 8)
    for rows in (1, 2, 5, 6):
        runner.measure(model("sd15"), key, rows, capture=True)
    assert memory.num_graphs(model("sd15")) == 3
    before = replays()
    finish(runner, trajectories_of(model("sd15"), **{**BASE, "scheduler": "Euler"}))
    assert replays() == before + 5


@pytest.mark.long
def test_nothing_is_captured_while_it_is_being_compiled(tmp_path: Path) -> None:
    compiled = CompiledUnet(model("sd15").unet, tmp_path, backend="eager")
    pipeline = replace(model("sd15"), compiled=compiled)
    memory = FakeMemory()
    runner = TorchRunner(graphs=fake_graphs(memory, eager_calls=3))
    key = BatchKey(pipeline.spec.name, 8, 8)
    compiled.compile(lambda rows: runner.measure(pipeline, key, rows), 2)
    assert not memory.grown
    runner.measure(pipeline, key, 2, capture=True)
    assert memory.num_graphs(pipeline) == 1


def test_a_graph_outlives_the_requests_that_it_was_captured_with(
    replays: Callable[[], int],
) -> None:
    """The engine lets go of models and tensors of a request that has ended."""
    engine = Engine(TorchRunner(graphs=fake_graphs()), Planner(4))
    engine.start()
    for seed in (1, 2, 3):
        fields = {**BASE, "seed": seed}
        [trajectory] = trajectories_of(model("sd15"), **fields)
        engine.submit([trajectory], time.monotonic() + 60).done.result(60)
        alone = engine_pixels(model("sd15"), **fields)
        assert difference(np.asarray(trajectory.image) / 255, alone) <= 1.01 / 255
    engine.close()
    assert replays() >= 15


class Cuda:
    """What torch.cuda does for a capture, noted in order; `fails` in the graph itself."""

    def __init__(self, fails: bool = False) -> None:
        self.log: list[str] = []
        self.pool_bytes = 0
        self._fails = fails

    def memory_snapshot(self, pool: object, *, include_traces: bool) -> list[dict[str, int]]:
        assert pool == (0, 1)
        return [{"total_size": self.pool_bytes}] if self.pool_bytes else []

    @contextmanager
    def graph(self, *_: object, capture_error_mode: str) -> Iterator[None]:
        self.log.append(f"capture, {capture_error_mode}")
        self.pool_bytes += 700
        try:
            yield
        finally:
            if self._fails:
                raise RuntimeError("CUDA error: operation failed due to a previous error")

    @contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        self.log.append(f"to {stream}")
        yield
        self.log.append(f"from {stream}")

    def install(self, patch: pytest.MonkeyPatch) -> None:
        stream = SimpleNamespace(wait_stream=lambda other: self.log.append(f"wait for {other}"))
        current = SimpleNamespace(wait_stream=lambda _: self.log.append("current waits"))
        fakes: dict[str, Any] = {
            "graph_pool_handle": lambda: (0, 1),
            "memory_snapshot": self.memory_snapshot,
            "memory_allocated": lambda: 100,
            "max_memory_allocated": lambda: 600,
            "reset_peak_memory_stats": lambda: None,
            "current_device": lambda: 0,
            "current_stream": lambda: current,
            "stream": lambda used: self.stream("side" if used is stream else "current"),
            "graph": self.graph,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.log.append("replay")),
        }
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)
        patch.setattr("sdbento.runner.graphs._stream", lambda: stream)
        close = lambda *pool: self.log.append(f"close {pool}")  # noqa: E731
        patch.setattr(torch._C, "_cuda_endAllocateToPool", close)


def test_a_capture_is_warmed_up_and_counts_its_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    cuda.install(monkeypatch)
    nothing: Any = object()

    def work() -> Any:
        cuda.log.append("work")
        return nothing

    made, replay, nbytes = CudaCapture()(work, room=500)
    replay()
    assert (made, nbytes) == (nothing, 700)
    assert cuda.log[1:5] == ["to side", "work", "from side", "current waits"]
    assert cuda.log[5:] == [
        "to current",
        "capture, thread_local",
        "work",
        "from current",
        "replay",
    ]


def test_a_capture_that_needs_more_than_there_is_is_not_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = Cuda()
    cuda.install(monkeypatch)
    with pytest.raises(NoRoom):
        CudaCapture()(lambda: cast(Any, None), room=499)
    assert not any(entry.startswith("capture") for entry in cuda.log)


def test_after_a_failed_capture_its_pool_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(fails=True)
    cuda.install(monkeypatch)
    with pytest.raises(RuntimeError, match="previous error"):
        CudaCapture()(lambda: cast(Any, None), room=500)
    assert cuda.log[-1] == "close (0, (0, 1))"
