"""LoRAs in memory: how many, for how long, and how often their files are read."""

from __future__ import annotations

import copy
import gc
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sdbento.errors import InvalidParameter
from sdbento.lora import cache as lora_cache
from sdbento.lora.cache import AdapterCache
from sdbento.lora.hooks import Adapter, active_adapters
from sdbento.lora.layers import LowRank
from sdbento.models.pipeline import Pipeline
from tests.support.loras import (
    cache_of,
    make_lora,
    num_hooks,
    on,
    save_peft,
)
from tests.support.metrics import counted
from tests.support.oracle import tiny_model
from tests.support.tiny import NUM_ROWS, run_unet


def resident(cache: AdapterCache, model: Pipeline) -> list[str]:
    """Names of the LoRAs in memory, the least recently used first."""
    if model not in cache._models:
        return []
    loaded = copy.copy(cache._models[model].loaded)
    return [loaded.popitem()[0] for _ in range(len(loaded))]


def fill(folder: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        lora = make_lora("sd15", seed, marks={"unet": ("attn1.to_q",)})
        save_peft("sd15", lora, folder / f"{name}.safetensors")


def test_the_least_recently_used_makes_room(tmp_path: Path) -> None:
    fill(tmp_path, *"abc")
    cache, model = cache_of(tmp_path, max_loras=2), tiny_model("sd15")
    a = cache.get(model, "a")
    b = weakref.ref(cache.get(model, "b"))
    assert cache.get(model, "a.safetensors") is a
    assert resident(cache, model) == ["b", "a"]
    cache.get(model, "c")
    assert resident(cache, model) == ["a", "c"]
    gc.collect()
    assert b() is None
    again = cache.get(model, "b")
    assert resident(cache, model) == ["c", "b"]
    assert again.id > a.id


def test_an_evicted_adapter_still_serves_its_holder(tmp_path: Path) -> None:
    fill(tmp_path, *"ab")
    cache, model = cache_of(tmp_path, max_loras=1), tiny_model("sd15")
    a = cache.get(model, "a")
    with active_adapters(model.unet, "unet", [[on(a)]] * NUM_ROWS):
        before = run_unet(model.unet)
        cache.get(model, "b")
        assert torch.equal(run_unet(model.unet), before)
    assert resident(cache, model) == ["b"]


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    fill(tmp_path, "x", "a")
    cache, model = cache_of(tmp_path), tiny_model("sd15")
    old = cache.get(model, "a")
    kept = {name: low.down.clone() for name, low in old.parts["unet"].items()}
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes())
    os.utime(tmp_path / "a.safetensors", ns=(0, 0))  # clocks of file systems are coarse
    new = cache.get(model, "a")
    assert new is not old
    assert resident(cache, model) == ["a"]
    for name, low in old.parts["unet"].items():
        assert torch.equal(low.down, kept[name])  # a copy, not a view of the file


def test_only_what_is_read_from_a_file_is_counted(tmp_path: Path) -> None:
    fill(tmp_path, *"ab")
    cache, model, before = cache_of(tmp_path), tiny_model("sd15"), counted()
    for name in ("a", "b", "a", "a"):
        cache.get(model, name)
    assert counted().since(before) == {"sdbento_lora_loads_total": 2}


def test_adapters_go_with_their_model(tmp_path: Path) -> None:
    fill(tmp_path, "a")
    cache, model, other = cache_of(tmp_path), tiny_model("sd15"), tiny_model("sd15")
    adapter = weakref.ref(cache.get(model, "a"))
    assert resident(cache, other) == []
    del model
    gc.collect()
    assert adapter() is None


def test_matrices_are_in_the_models_precision(tmp_path: Path) -> None:
    fill(tmp_path, "a")
    model = replace(tiny_model("sd15"), dtype=torch.bfloat16)
    adapter = cache_of(tmp_path).get(model, "a")
    matrices = [m for low in adapter.parts["unet"].values() for m in (low.down, low.up)]
    assert {matrix.dtype for matrix in matrices} == {torch.bfloat16}
    assert adapter.nbytes == sum(2 * matrix.numel() for matrix in matrices)


def test_threads_that_ask_at_once_load_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "a")
    load, loads = lora_cache.load, []
    all_ask = threading.Event()

    def slow(*args: Any) -> Adapter:
        loads.append(args)
        all_ask.wait(5)
        return load(*args)

    monkeypatch.setattr(lora_cache, "load", slow)
    cache, model = cache_of(tmp_path), tiny_model("sd15")
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(cache.get, model, "a") for _ in range(4)]
        assert resident(cache, model) == []
        all_ask.set()
        assert len({id(future.result()) for future in futures}) == 1
    assert len(loads) == 1


def test_a_failed_load_fails_all_who_wait_and_can_be_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"damaged")
    cache, model = cache_of(tmp_path), tiny_model("sd15")
    for _ in range(2):
        with pytest.raises(InvalidParameter, match=r"LoRA a is not supported: .*damaged"):
            cache.get(model, "a")
    assert resident(cache, model) == []
    fill(tmp_path, "a")
    assert cache.get(model, "a").name == "a"


def test_two_hundred_loras_leave_no_trace(tmp_path: Path) -> None:
    lora = make_lora("sd15", marks={"unet": ("attn2.to_q", "attn2.to_k")}, rank=256)
    source = save_peft("sd15", lora, tmp_path / "n0.safetensors")
    for i in range(1, 200):
        (tmp_path / f"n{i}.safetensors").hardlink_to(source)
    cache, model = cache_of(tmp_path, max_loras=3), tiny_model("sd15")

    def use(i: int) -> int:
        adapter = cache.get(model, f"n{i}")
        with active_adapters(model.unet, "unet", [[on(adapter)], []]):
            pass
        return adapter.nbytes

    process = psutil.Process()
    for i in range(20):
        use(i)
    before = process.memory_info().rss
    total = sum(use(i) for i in range(20, 200))
    grown = process.memory_info().rss - before
    gc.collect()
    alive = [thing for thing in gc.get_objects() if type(thing) is LowRank]
    assert resident(cache, model) == ["n197", "n198", "n199"]
    assert len(alive) == 3 * len(lora["unet"])
    assert num_hooks(model.unet) == 0
    assert grown < total / 4 > 10e6
