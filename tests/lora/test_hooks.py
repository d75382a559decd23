"""LoRAs on some rows of a call: as stock diffusers has them, and none of the others' business."""

from __future__ import annotations

import copy
import gc
import json
import logging
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdbento.errors import InvalidParameter, UnsupportedModel
from sdbento.lora import hooks as adapters_module
from sdbento.lora.hooks import Adapter, AdapterCache, WeightedAdapter, applied
from sdbento.lora.layers import LowRank
from sdbento.models.pipeline import Pipeline
from sdbento.settings import Settings
from tests.support.loras import (
    TEXT,
    TEXT_ENCODERS,
    WRITERS,
    Layers,
    everything,
    make_lora,
    merged,
    save_diffusers_old,
    save_kohya,
    save_peft,
)
from tests.support.oracle import tiny_model
from tests.support.tiny import tiny_pipeline

FAMILIES = ["sd15", "sd21", "sdxl"]
TOLERANCE = 1e-5
NUM_ROWS = 4


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The stock loader warns of what it then does right."""
    logger = logging.getLogger("diffusers")
    level, logger.level = logger.level, logging.CRITICAL
    yield
    logger.setLevel(level)


def cache_of(folder: Path, **settings: Any) -> AdapterCache:
    return AdapterCache(Settings.load(lora_dir=folder, **settings))


def run_unet(unet: Any, rows: Sequence[int] = range(NUM_ROWS)) -> Tensor:
    """What the UNet makes of some of the rows of one fixed batch."""
    generator = torch.Generator().manual_seed(5)

    def noise(*shape: int) -> Tensor:
        return torch.randn(NUM_ROWS, *shape, generator=generator)[list(rows)]

    latents, text = noise(4, 8, 8), noise(77, unet.config.cross_attention_dim)
    conditions = None
    if unet.config.addition_embed_type == "text_time":
        conditions = {"text_embeds": noise(48), "time_ids": noise(6)}
    timesteps = torch.tensor([981, 501, 21, 1])[list(rows)]
    with torch.no_grad():
        output = unet(latents, timesteps, text, added_cond_kwargs=conditions)
    sample: Tensor = output.sample
    return sample


def run_text_encoder(encoder: Any, num_rows: int = 2) -> Tensor:
    """Hidden states and output of a text encoder, a row each."""
    ids = torch.arange(77 * NUM_ROWS).reshape(NUM_ROWS, 77)[:num_rows] % 300
    with torch.no_grad():
        output = encoder(ids, output_hidden_states=True)
    return torch.cat([output.hidden_states[-2].flatten(1), output[0].flatten(1)], dim=1)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def num_hooks(module: nn.Module) -> int:
    """Our own: transformers keeps some of its own on its modules."""
    hooks = [hook for child in module.modules() for hook in child._forward_hooks.values()]
    return sum(isinstance(hook, adapters_module._Hook) for hook in hooks)


def stock(family: str, files: Sequence[Path]) -> Any:
    """A copy of the stock pipeline with the LoRAs by their files' names."""
    pipe = copy.deepcopy(tiny_pipeline(family))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a second adapter is meant
        for file in files:
            pipe.load_lora_weights(file, adapter_name=file.stem)
    return pipe


def on(adapter: Adapter, weight: float = 1.0, text_encoder_weight: float = 1.0) -> WeightedAdapter:
    return WeightedAdapter(adapter, weight, text_encoder_weight)


# As stock diffusers


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_and_two_loras_are_as_in_stock_diffusers(
    family: str, writer: str, tmp_path: Path
) -> None:
    alpha = 2.0 if writer in ("kohya", "peft") else None
    files = []
    for seed in (1, 2):
        lora = make_lora(family, seed, marks=everything(family), rank=2 + seed, alpha=alpha)
        files.append(WRITERS[writer](family, lora, tmp_path / f"{'ab'[seed - 1]}.safetensors"))
    model, cache = tiny_model(family), cache_of(tmp_path)
    a, b = (cache.get(model, file.stem) for file in files)
    theirs = stock(family, files)
    for used, weights in (([a], [0.8]), ([a, b], [0.7, -0.4])):
        theirs.set_adapters([adapter.name for adapter in used], weights)
        row = [on(x, w, w) for x, w in zip(used, weights, strict=True)]
        base = run_unet(model.unet)
        with applied(model.unet, "unet", [row] * NUM_ROWS):
            ours = run_unet(model.unet)
        assert difference(ours, run_unet(theirs.unet)) <= TOLERANCE
        assert difference(ours, base) > 0.1
        for part in TEXT_ENCODERS[: 2 if family == "sdxl" else 1]:
            encoder = getattr(model.pipe, part)
            with applied(encoder, part, [row] * 2):
                ours = run_text_encoder(encoder)
            assert difference(ours, run_text_encoder(getattr(theirs, part))) <= TOLERANCE
            assert difference(ours, run_text_encoder(encoder)) > 0.1


@pytest.mark.parametrize("save", [save_kohya, save_peft])
def test_every_layer_has_its_own_rank_and_alpha(save: Callable[..., Path], tmp_path: Path) -> None:
    """Stock diffusers mixes the alphas of a file up: the merged weights are the measure here."""
    lora: dict[str, dict[str, Any]] = {}
    for rank, alpha, mark in ((2, 1.0, "attn1"), (4, 3.0, "attn2"), (2, 2.0, "ff"), (3, 6.0, "co")):
        layers = make_lora("sd15", rank, marks={"unet": (mark,)}, rank=rank, alpha=alpha)
        lora.setdefault("unet", {}).update(layers["unet"])
    lora["text_encoder"] = {
        **make_lora("sd15", 1, marks={"text_encoder": ("mlp",)}, alpha=1.0)["text_encoder"],
        **make_lora("sd15", 1, marks={"text_encoder": ("q_proj",)}, alpha=9.0)["text_encoder"],
    }
    save("sd15", lora, tmp_path / "a.safetensors")
    model = tiny_model("sd15")
    row = [on(cache_of(tmp_path).get(model, "a"), 0.5, 0.5)]
    expected = merged(copy.deepcopy(model.pipe), lora, 0.5)
    with applied(model.unet, "unet", [row] * NUM_ROWS):
        assert difference(run_unet(model.unet), run_unet(expected.unet)) <= TOLERANCE
    encoder = model.pipe.text_encoder
    with applied(encoder, "text_encoder", [row] * 2):
        ours = run_text_encoder(encoder)
    assert difference(ours, run_text_encoder(expected.text_encoder)) <= TOLERANCE


def test_a_rank_stabilised_lora_divides_by_the_root_of_its_rank(tmp_path: Path) -> None:
    config = {"unet.r": 4, "unet.lora_alpha": 3, "unet.use_rslora": True}
    lora = make_lora("sd15", rank=4, alpha=None)
    save_peft("sd15", lora, tmp_path / "a.safetensors", lora_adapter_metadata=json.dumps(config))
    adapter = cache_of(tmp_path).get(tiny_model("sd15"), "a")
    assert {low.scale for low in adapter.parts["unet"].values()} == {1.5}


def test_names_without_the_part_are_the_unets(tmp_path: Path) -> None:
    lora = make_lora("sd15", alpha=None)
    whole = load_file(save_diffusers_old("sd15", lora, tmp_path / "a.safetensors"))
    save_file({k.removeprefix("unet."): t for k, t in whole.items()}, tmp_path / "b.safetensors")
    model, cache = tiny_model("sd15"), cache_of(tmp_path)
    a, b = (cache.get(model, name) for name in "ab")
    assert a.parts.keys() == b.parts.keys() == {"unet"}
    assert a.parts["unet"].keys() == b.parts["unet"].keys() == lora["unet"].keys()


def test_matrices_fit_layers_that_are_their_like(tmp_path: Path) -> None:
    """A linear layer and a 1 x 1 convolution are the same; trainers write either for both."""
    lora = make_lora("sd15", marks={"unet": ("proj_in",)})
    square = {
        name: replace(m, down=m.down.flatten(1), up=m.up.flatten(1))
        for name, m in lora["unet"].items()
    }
    other = make_lora("sd15", marks={"unet": ("to_q",)})["unet"]
    deep = {
        name: replace(m, down=m.down[..., None, None], up=m.up[..., None, None])
        for name, m in other.items()
    }
    save_kohya("sd15", {"unet": {**square, **deep}}, tmp_path / "a.safetensors")
    adapter = cache_of(tmp_path).get(tiny_model("sd15"), "a")
    dims = {name.rpartition(".")[2]: low.down.dim() for name, low in adapter.parts["unet"].items()}
    assert dims == {"proj_in": 4, "to_q": 2}


# Rows


@pytest.fixture
def ab(tmp_path: Path) -> tuple[Pipeline, Adapter, Adapter]:
    """A model, and two LoRAs for all of its layers."""
    model, cache = tiny_model("sdxl"), cache_of(tmp_path)
    for seed, name in ((1, "a"), (2, "b")):
        lora = make_lora("sdxl", seed, marks=everything("sdxl"), rank=1 + seed)
        save_kohya("sdxl", lora, tmp_path / f"{name}.safetensors")
    return model, cache.get(model, "a"), cache.get(model, "b")


def test_rows_with_different_loras_share_a_call(ab: tuple[Pipeline, Adapter, Adapter]) -> None:
    model, a, b = ab
    rows = [[], [on(a, 0.5)], [on(b, -1.3)], [on(b, 0.2), on(a, 0.9)]]
    for order in ([0, 1, 2, 3], [3, 0, 1, 2], [1, 0, 3, 2]):
        with applied(model.unet, "unet", [rows[i] for i in order]):
            together = run_unet(model.unet, order)
        for place, i in enumerate(order):
            with applied(model.unet, "unet", [rows[i]]):
                alone = run_unet(model.unet, [i])
            assert difference(together[place : place + 1], alone) <= TOLERANCE


def test_text_encoders_have_their_own_weight(ab: tuple[Pipeline, Adapter, Adapter]) -> None:
    model, a, b = ab
    encoder = model.pipe.text_encoder_2
    rows = [[on(a, 9.0, 0.5)], [], [on(b, 9.0, 0.0)], [on(b, 0.0, 0.7)]]
    with applied(encoder, "text_encoder_2", rows):
        together = run_text_encoder(encoder, 4)
    base = run_text_encoder(encoder, 4)
    assert difference(together[1:3], base[1:3]) <= TOLERANCE
    for i, adapter, weight in ((0, a, 0.5), (3, b, 0.7)):
        with applied(encoder, "text_encoder_2", [[on(adapter, 0.0, weight)]] * 4):
            assert difference(together[i], run_text_encoder(encoder, 4)[i]) <= TOLERANCE
        assert difference(together[i], base[i]) > 0.1


def test_a_lora_twice_on_a_row_adds_up(ab: tuple[Pipeline, Adapter, Adapter]) -> None:
    model, a, _ = ab
    with applied(model.unet, "unet", [[on(a, 0.5), on(a, 0.25)]] * NUM_ROWS):
        twice = run_unet(model.unet)
    with applied(model.unet, "unet", [[on(a, 0.75)]] * NUM_ROWS):
        assert difference(twice, run_unet(model.unet)) <= TOLERANCE


def test_rows_without_loras_cost_nothing(ab: tuple[Pipeline, Adapter, Adapter]) -> None:
    model, a, _ = ab
    only_unet = replace(a, parts={"unet": a.parts["unet"]})
    for part, rows in (
        ("unet", [[], []]),
        ("unet", [[on(a, 0.0)], []]),
        ("text_encoder", [[on(only_unet)]]),
    ):
        module = getattr(model.pipe, part)
        with applied(module, part, rows):
            assert num_hooks(module) == 0


def test_the_hooks_are_gone_afterwards(ab: tuple[Pipeline, Adapter, Adapter]) -> None:
    model, a, b = ab
    base = run_unet(model.unet)
    with applied(model.unet, "unet", [[on(a), on(b)], []]):
        assert num_hooks(model.unet) == len(a.parts["unet"])
    with pytest.raises(KeyError), applied(model.unet, "unet", [[on(a)]]):
        raise KeyError
    assert num_hooks(model.unet) == 0
    assert torch.equal(run_unet(model.unet), base)


def test_hooks_that_cannot_all_be_set_are_gone(ab: tuple[Pipeline, Adapter, Adapter]) -> None:
    model, a, _ = ab
    low_rank = next(iter(a.parts["unet"].values()))
    broken = replace(a, parts={"unet": {**a.parts["unet"], "no.such.layer": low_rank}})
    with pytest.raises(KeyError):
        applied(model.unet, "unet", [[on(broken)]]).__enter__()
    assert num_hooks(model.unet) == 0


def test_a_call_of_other_rows_is_an_error(ab: tuple[Pipeline, Adapter, Adapter]) -> None:
    model, a, _ = ab
    with (
        applied(model.unet, "unet", [[on(a)], []]),
        pytest.raises(ValueError, match="4 rows where 2"),
    ):
        run_unet(model.unet)
    assert num_hooks(model.unet) == 0


# What is refused


def refused(folder: Path, tensors: Mapping[str, Tensor], **metadata: str) -> str:
    """The message with which a file is refused for the tiny SD 1.5."""
    own = {key: tensor.clone() for key, tensor in tensors.items()}
    save_file(own, folder / "odd.safetensors", metadata=metadata or None)
    with pytest.raises(UnsupportedModel) as caught:
        cache_of(folder).get(tiny_model("sd15"), "odd")
    assert caught.value.param == "lora"
    return caught.value.message


Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
DOWN, UP = torch.ones(2, 8), torch.ones(8, 2)
PLAIN = {f"unet.{Q}.lora_A.weight": DOWN, f"unet.{Q}.lora_B.weight": UP}
KOHYA = f"lora_unet_{Q.replace('.', '_')}"


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({f"{KOHYA}.dora_scale": UP}, "DoRA"),
        ({f"unet.{Q}.lora_magnitude_vector": UP}, "DoRA"),
        ({f"{KOHYA}.lokr_w1": UP}, "LoKr"),
        ({f"{KOHYA}.hada_w1_a": UP}, "LoHa"),
        ({f"{KOHYA}.lora_mid.weight": UP}, "third matrix"),
        ({f"unet.{Q}.lora_B.bias": UP}, "biases"),
        ({f"unet.{Q}.strange": UP}, "a key that is none of a LoRA's: .*strange"),
        ({f"unet.{Q}x.lora_A.weight": DOWN}, "only one of two matrices"),
        ({"stray.lora_A.weight": DOWN}, "not named as"),
        ({f"unet.{Q}.lora_A.weight": torch.ones(0, 8)}, "is empty"),
        ({f"unet.{Q}.lora_A.weight": DOWN.to(torch.int8)}, "floating-point"),
        ({f"unet.{Q}.lora_A.weight": DOWN * torch.nan}, "not finite"),
        ({f"unet.{Q}.lora_A.weight": torch.ones(2, 9)}, "does not fit"),
        ({f"unet.{Q}.lora_B.weight": torch.ones(8, 3)}, "does not fit"),
        ({f"unet.{Q}.alpha": torch.tensor(torch.inf)}, "alpha"),
    ],
)
def test_what_is_no_plain_lora_is_refused(
    extra: dict[str, Tensor], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        raise UnsupportedModel(refused(tmp_path, {**PLAIN, **extra}))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    assert "no LoRA layers" in refused(tmp_path, {})


def test_kohyas_layers_come_in_pairs(tmp_path: Path) -> None:
    assert "not named as" in refused(tmp_path, {f"{KOHYA}.lora_down.weight": DOWN})


@pytest.mark.parametrize("config", ["no json", "[]", '{"unet.lora_alpha": "x"}'])
def test_metadata_that_cannot_be_read_is_refused(config: str, tmp_path: Path) -> None:
    assert "metadata" in refused(tmp_path, PLAIN, lora_adapter_metadata=config)


@pytest.mark.parametrize("writer", ["kohya", "peft"])
@pytest.mark.parametrize(
    ("made_for", "used_on"), [(a, b) for a in FAMILIES for b in FAMILIES if a != b]
)
def test_a_lora_of_another_family_says_so(
    made_for: str, used_on: str, writer: str, tmp_path: Path
) -> None:
    marks = {"unet": ("attn2",), **dict.fromkeys(TEXT_ENCODERS, TEXT)}
    if {made_for, used_on} == {"sd15", "sd21"}:
        marks = {"unet": ("proj_in.x",)}  # the tiny two differ in this alone: it fits neither
    lora: Layers = make_lora(made_for, marks=marks)
    if not lora["unet"]:
        layer = make_lora(made_for)["unet"][f"{Q}"]
        wide = replace(layer, down=torch.ones(3, 1024 if made_for == "sd21" else 768))
        lora = {"unet": {Q.replace("attn1.to_q", "attn2.to_k"): wide}}
    WRITERS[writer](made_for, lora, tmp_path / "a.safetensors")
    likely = {"sd15": "1.x", "sd21": "2.x", "sdxl": "XL"}
    told = rf"LoRA a does not fit model tiny-{used_on} \(Stable Diffusion {likely[used_on]}\)"
    if made_for == "sdxl" or lora.keys() == {"unet"}:
        told += rf".*likely made for Stable Diffusion {likely[made_for]}"
    with pytest.raises(UnsupportedModel, match=told):
        cache_of(tmp_path).get(tiny_model(used_on), "a")


@pytest.mark.parametrize(
    ("key", "value", "likely"),
    [
        ("ss_base_model_version", "sdxl_base_v1-0", "XL"),
        ("ss_base_model_version", "sd_v2_768_v", "2.x"),
        ("modelspec.architecture", "stable-diffusion-xl-v1-base/lora", "XL"),
        ("ss_base_model_version", "sd_v1", "another model"),
        ("ss_base_model_version", "flux1", "another model"),
    ],
)
def test_a_file_may_state_what_it_was_made_for(
    key: str, value: str, likely: str, tmp_path: Path
) -> None:
    odd = {k.replace("to_q", "to_z"): tensor for k, tensor in PLAIN.items()}
    message = refused(tmp_path, odd, **{key: value})
    assert "the model has no layer" in message
    assert f"{likely} (" in message


# The cache


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
    assert cache.resident(model) == ["b", "a"]
    cache.get(model, "c")
    assert cache.resident(model) == ["a", "c"]
    gc.collect()
    assert b() is None
    again = cache.get(model, "b")
    assert cache.resident(model) == ["c", "b"]
    assert again.id > a.id


def test_an_evicted_adapter_serves_who_holds_it(tmp_path: Path) -> None:
    fill(tmp_path, *"ab")
    cache, model = cache_of(tmp_path, max_loras=1), tiny_model("sd15")
    a = cache.get(model, "a")
    with applied(model.unet, "unet", [[on(a)]] * NUM_ROWS):
        before = run_unet(model.unet)
        cache.get(model, "b")
        assert torch.equal(run_unet(model.unet), before)
    assert cache.resident(model) == ["b"]


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    fill(tmp_path, "x", "a")
    cache, model = cache_of(tmp_path), tiny_model("sd15")
    old = cache.get(model, "a")
    kept = {name: low.down.clone() for name, low in old.parts["unet"].items()}
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes())
    os.utime(tmp_path / "a.safetensors", ns=(0, 0))  # clocks of file systems are coarse
    new = cache.get(model, "a")
    assert new is not old
    assert cache.resident(model) == ["a"]
    for name, low in old.parts["unet"].items():
        assert torch.equal(low.down, kept[name])  # a copy, not a view of the file


def test_adapters_go_with_their_model(tmp_path: Path) -> None:
    fill(tmp_path, "a")
    cache, model, other = cache_of(tmp_path), tiny_model("sd15"), tiny_model("sd15")
    adapter = weakref.ref(cache.get(model, "a"))
    assert cache.resident(other) == []
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
    load, loads = adapters_module.load, []
    all_ask = threading.Event()

    def slow(*args: Any) -> Adapter:
        loads.append(args)
        all_ask.wait(5)
        return load(*args)

    monkeypatch.setattr(adapters_module, "load", slow)
    cache, model = cache_of(tmp_path), tiny_model("sd15")
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(cache.get, model, "a") for _ in range(4)]
        assert cache.resident(model) == []
        all_ask.set()
        assert len({id(future.result()) for future in futures}) == 1
    assert len(loads) == 1


def test_a_failure_is_everyones_but_not_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"damaged")
    cache, model = cache_of(tmp_path), tiny_model("sd15")
    for _ in range(2):
        with pytest.raises(InvalidParameter, match=r"LoRA a is not supported: .*damaged"):
            cache.get(model, "a")
    assert cache.resident(model) == []
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
        with applied(model.unet, "unet", [[on(adapter)], []]):
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
    assert cache.resident(model) == ["n197", "n198", "n199"]
    assert len(alive) == 3 * len(lora["unet"])
    assert num_hooks(model.unet) == 0
    assert grown < total / 4 > 10e6
