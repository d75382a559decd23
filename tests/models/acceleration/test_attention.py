"""Which attention networks compute with. On a GPU it is measured: here on a CPU, by a clock that
says what the test wants."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention as AttentionLayer
from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor
from torch.nn.attention import SDPBackend

from sdbento.engine.trajectory import BatchKey
from sdbento.models import device
from sdbento.models.acceleration import attention
from sdbento.models.acceleration.attention import (
    SDPA,
    XFORMERS,
    Attention,
    Layer,
    fastest,
    fit,
    using,
)
from sdbento.runner.torch_runner import TorchRunner
from tests.support.device_errors import AcceleratorError
from tests.support.images import base64, gradient
from tests.support.loading import load, resolve, settings
from tests.support.oracle import engine_pixels, tiny_control, tiny_model
from tests.support.tiny import save_tiny, tiny_controlnet, tiny_pipeline

CPU, FP32 = torch.device("cpu"), torch.float32
CUDNN, FLASH, EFFICIENT = attention._PREFERRED


def order() -> list[Any]:
    """SDPA's kernels in torch's order."""
    return [SDPBackend(kernel) for kernel in torch._C._get_sdp_priority_order()]


@pytest.fixture(autouse=True)
def _nothing_is_known() -> Iterator[None]:
    attention._chosen.clear()
    device.say_once.cache_clear()
    before = order()
    yield
    assert order() == before


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Milliseconds of a call by the attention's name, else 2; every layer is really computed."""
    times: dict[str, float] = {}

    def time(call: Callable[[Attention], Tensor], choice: Attention) -> float:
        with using(choice), torch.inference_mode():
            assert call(choice).isfinite().all()
        return times.get(choice.name, 2.0)

    monkeypatch.setattr(attention, "_time", time)
    return times


def layers(family: str = "sd15") -> attention.Layers:
    return attention._layers(tiny_pipeline(family).unet, 8 * 8)


def choose(**fields: Any) -> Attention:
    return fastest(layers(), settings(**fields), CPU, FP32)


def test_on_a_cpu_it_is_torchs_own(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    pipeline = load(resolve(save_tiny("sd15", tmp_path / "mine")), settings())
    assert {type(p) for p in pipeline.unet.attn_processors.values()} == {AttnProcessor2_0}
    assert "attention by SDPA" in caplog.text
    assert pipeline.attention is SDPA


@pytest.mark.parametrize("name", ["cuDNN", "flash", "memory-efficient"])
def test_the_fastest_is_chosen(name: str, clock: dict[str, float]) -> None:
    clock[f"SDPA ({name})"] = 1.5
    assert choose().name == f"SDPA ({name})"


def test_torchs_own_choice_stays_where_others_are_hardly_faster(clock: dict[str, float]) -> None:
    clock[CUDNN.name] = 1.97
    assert choose() is SDPA
    attention._chosen.clear()
    clock[CUDNN.name] = 1.9
    assert choose() is CUDNN


def test_a_call_counts_with_its_shortest_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of another model disturb some of the calls; the very first also builds plans."""
    calls: dict[Attention, int] = {}

    def time(_: object, choice: Attention) -> float:
        turn = calls[choice] = calls.get(choice, -1) + 1
        number = len(layers())
        if turn < number:  # the warm-up: would win if it counted
            return 0.0 if choice is FLASH else 400.0
        disturbed = turn // number != 3
        return (1.0 if choice is EFFICIENT else 2.0) + 100.0 * disturbed

    monkeypatch.setattr(attention, "_time", time)
    assert choose() is EFFICIENT


def test_the_measuring_ends_when_its_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(0, 1000, 10))
    monkeypatch.setattr("time.monotonic", lambda: next(seconds))
    turns: list[Attention] = []

    def time(_: object, choice: Attention) -> float:
        turns.append(choice)
        return 1.0

    monkeypatch.setattr(attention, "_time", time)
    choose()
    assert turns.count(SDPA) == 2 * len(layers())  # a warm-up and one that counts


def test_layers_that_are_alike_are_measured_once(clock: dict[str, float]) -> None:
    clock[FLASH.name] = 1.0
    assert choose() is FLASH
    clock[CUDNN.name] = 0.5
    assert choose() is FLASH
    assert fastest(layers("sdxl"), settings(), CPU, FP32) is CUDNN


def test_what_fails_is_left_out_and_named_once(
    clock: dict[str, float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    clock[CUDNN.name] = 1.0
    measured = attention._time

    def time(call: Any, choice: Attention) -> float:
        if choice is CUDNN:
            raise RuntimeError("no engine can execute this graph")
        return measured(call, choice)

    monkeypatch.setattr(attention, "_time", time)
    assert choose() is SDPA
    assert fastest(layers("sdxl"), settings(), CPU, FP32) is SDPA
    line = "attention by SDPA (cuDNN) does not work here: no engine can execute this graph"
    assert caplog.text.count(line) == 1


def test_a_gpu_that_fails_meanwhile_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def time(*_: object) -> float:
        raise AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(attention, "_time", time)
    with pytest.raises(AcceleratorError):
        choose()


def test_where_everything_fails_torch_chooses_and_the_next_model_measures_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def time(*_: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention, "_time", time)
    assert choose() is SDPA
    monkeypatch.setattr(attention, "_time", lambda _, choice: 2.0 - (choice is FLASH))
    assert choose() is FLASH


@pytest.mark.parametrize(
    ("fields", "installed", "is_measured"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"enable_xformers": False}, True, False),
        ({"compile": True}, True, False),
    ],
)
def test_xformers_is_measured_where_it_may_be_used(
    fields: dict[str, Any], installed: bool, is_measured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: installed or None)
    assert (XFORMERS in attention._candidates(settings(**fields))) == is_measured


def test_xformers_is_used_where_it_is_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny_controlnet("sd15", seed=7)
    monkeypatch.setattr(type(network), "device", torch.device("cuda", 0))
    monkeypatch.setattr(attention, "fastest", lambda *_: XFORMERS)
    assert fit(network, settings(), 64) is XFORMERS
    assert {type(p) for p in network.attn_processors.values()} == {XFormersAttnProcessor}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_layer_is_measured_with_the_tokens_that_it_has_in_a_call(family: str) -> None:
    pipeline = tiny_model(family)
    called: Counter[Layer] = Counter()

    def note(module: Any, args: Any, kwargs: Any) -> None:
        text = kwargs["encoder_hidden_states"]
        text_width = None if text is None else text.shape[-1]
        called[Layer(module.query_dim, module.heads, text_width, args[0].shape[1])] += 1

    hooks = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in pipeline.unet.modules()
        if isinstance(module, AttentionLayer)
    ]
    TorchRunner().measure(pipeline, BatchKey("tiny", 8, 8), 1)
    for hook in hooks:
        hook.remove()
    assert {layer: len(alike) for layer, alike in layers(family).items()} == called


def test_kernels_are_preferred_within_the_context_only() -> None:
    before = order()
    with using(FLASH):
        assert order()[0] == FLASH.order[0] and set(order()) >= set(before)
        with using(EFFICIENT):
            assert order()[0] == EFFICIENT.order[0]
        assert order()[0] == FLASH.order[0]
        with using(SDPA):
            assert order()[0] == FLASH.order[0]
    assert order() == before


def test_each_network_is_called_with_the_kernels_that_were_chosen_for_it() -> None:
    model = replace(tiny_model("sd15"), attention=FLASH)
    control = replace(tiny_control("sd15"), attention=EFFICIENT)
    seen: dict[str, set[Any]] = {"UNet": set(), "ControlNet": set()}
    hooks = [
        network.register_forward_pre_hook(lambda *_, name=name: seen[name].add(order()[0]))
        for name, network in (("UNet", model.unet), ("ControlNet", control.module))
    ]
    canny = {"type": "canny", "image": base64(gradient())}
    engine_pixels(model, controlnets=[control], prompt="a cat", controlnet=canny)
    for hook in hooks:
        hook.remove()
    assert seen == {"UNet": {FLASH.order[0]}, "ControlNet": {EFFICIENT.order[0]}}


def test_a_measurement_neither_disturbs_a_step_nor_is_disturbed_by_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The order is the whole process's: two threads that set it at once could leave it behind."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            pass

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, _: Event) -> float:
            return 1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    seen: list[Any] = []
    inside, measured = threading.Event(), threading.Event()

    def step() -> None:
        with using(EFFICIENT):
            inside.set()
            assert not measured.wait(0.2)
            seen.append(order()[0])

    thread = threading.Thread(target=step)
    thread.start()
    assert inside.wait(10)
    attention._time(lambda choice: seen.append(order()[0]), SDPA)
    measured.set()
    thread.join()
    assert seen == [EFFICIENT.order[0], order()[0]]
