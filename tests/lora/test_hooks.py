"""LoRAs on some rows of a call: as in stock diffusers, and without effect on other rows."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdbento.lora.hooks import Adapter, active_adapters
from sdbento.models.pipeline import Pipeline
from tests.support.loras import (
    TEXT_ENCODERS,
    WRITERS,
    cache_of,
    everything,
    make_lora,
    merged,
    num_hooks,
    on,
    save_kohya,
    save_peft,
)
from tests.support.oracle import tiny_model
from tests.support.tiny import NUM_ROWS, run_unet, tiny_pipeline

FAMILIES = ["sd15", "sd21", "sdxl"]
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The stock loader warns although it then loads the file correctly."""
    logger = logging.getLogger("diffusers")
    level, logger.level = logger.level, logging.CRITICAL
    yield
    logger.setLevel(level)


def run_text_encoder(encoder: Any, num_rows: int = 2) -> Tensor:
    """Hidden states and output of a text encoder, one row per prompt."""
    ids = torch.arange(77 * NUM_ROWS).reshape(NUM_ROWS, 77)[:num_rows] % 300
    with torch.no_grad():
        output = encoder(ids, output_hidden_states=True)
    return torch.cat([output.hidden_states[-2].flatten(1), output[0].flatten(1)], dim=1)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def stock(family: str, files: Sequence[Path]) -> Any:
    """A copy of the stock pipeline with these LoRA files loaded, named by their files."""
    pipe = copy.deepcopy(tiny_pipeline(family))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the second adapter is intended
        for file in files:
            pipe.load_lora_weights(file, adapter_name=file.stem)
    return pipe


# As stock diffusers


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_and_two_loras_give_the_images_of_stock_diffusers(
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
        with active_adapters(model.unet, "unet", [row] * NUM_ROWS):
            ours = run_unet(model.unet)
        assert difference(ours, run_unet(theirs.unet)) <= TOLERANCE
        assert difference(ours, base) > 0.1
        for part in TEXT_ENCODERS[: 2 if family == "sdxl" else 1]:
            encoder = getattr(model.pipe, part)
            with active_adapters(encoder, part, [row] * 2):
                ours = run_text_encoder(encoder)
            assert difference(ours, run_text_encoder(getattr(theirs, part))) <= TOLERANCE
            assert difference(ours, run_text_encoder(encoder)) > 0.1


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_layers_that_the_model_lacks_are_left_out_as_by_stock_diffusers(
    family: str, tmp_path: Path
) -> None:
    file = save_kohya(family, make_lora(family), tmp_path / "a.safetensors")
    tensors = load_file(file)
    odd = {k.replace("blocks_0_attn1_to_q", "blocks_9_attn1_to_q"): t for k, t in tensors.items()}
    save_file({k: t.clone() for k, t in (tensors | odd).items()}, file)
    model = tiny_model(family)
    adapter = cache_of(tmp_path).get(model, "a")
    [warning] = adapter.warnings
    assert "layers are not in the model and were left out, such as" in warning
    assert "transformer_blocks.9.attn1.to_q" in warning
    with active_adapters(model.unet, "unet", [[on(adapter)]] * NUM_ROWS):
        ours = run_unet(model.unet)
    assert difference(ours, run_unet(stock(family, [file]).unet)) <= TOLERANCE


@pytest.mark.parametrize("save", [save_kohya, save_peft])
def test_every_layer_has_its_own_rank_and_alpha(save: Callable[..., Path], tmp_path: Path) -> None:
    """Stock diffusers mixes up the alphas of a file, so merged weights are the reference here."""
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
    with active_adapters(model.unet, "unet", [row] * NUM_ROWS):
        assert difference(run_unet(model.unet), run_unet(expected.unet)) <= TOLERANCE
    encoder = model.pipe.text_encoder
    with active_adapters(encoder, "text_encoder", [row] * 2):
        ours = run_text_encoder(encoder)
    assert difference(ours, run_text_encoder(expected.text_encoder)) <= TOLERANCE


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
        with active_adapters(model.unet, "unet", [rows[i] for i in order]):
            together = run_unet(model.unet, order)
        for place, i in enumerate(order):
            with active_adapters(model.unet, "unet", [rows[i]]):
                alone = run_unet(model.unet, [i])
            assert difference(together[place : place + 1], alone) <= TOLERANCE


def test_text_encoders_have_their_own_weight(ab: tuple[Pipeline, Adapter, Adapter]) -> None:
    model, a, b = ab
    encoder = model.pipe.text_encoder_2
    rows = [[on(a, 9.0, 0.5)], [], [on(b, 9.0, 0.0)], [on(b, 0.0, 0.7)]]
    with active_adapters(encoder, "text_encoder_2", rows):
        together = run_text_encoder(encoder, 4)
    base = run_text_encoder(encoder, 4)
    assert difference(together[1:3], base[1:3]) <= TOLERANCE
    for i, adapter, weight in ((0, a, 0.5), (3, b, 0.7)):
        with active_adapters(encoder, "text_encoder_2", [[on(adapter, 0.0, weight)]] * 4):
            assert difference(together[i], run_text_encoder(encoder, 4)[i]) <= TOLERANCE
        assert difference(together[i], base[i]) > 0.1


def test_a_lora_twice_on_a_row_adds_up(ab: tuple[Pipeline, Adapter, Adapter]) -> None:
    model, a, _ = ab
    with active_adapters(model.unet, "unet", [[on(a, 0.5), on(a, 0.25)]] * NUM_ROWS):
        twice = run_unet(model.unet)
    with active_adapters(model.unet, "unet", [[on(a, 0.75)]] * NUM_ROWS):
        assert difference(twice, run_unet(model.unet)) <= TOLERANCE


def test_rows_without_loras_set_no_hooks(ab: tuple[Pipeline, Adapter, Adapter]) -> None:
    model, a, _ = ab
    only_unet = replace(a, parts={"unet": a.parts["unet"]})
    for part, rows in (
        ("unet", [[], []]),
        ("unet", [[on(a, 0.0)], []]),
        ("text_encoder", [[on(only_unet)]]),
    ):
        module = getattr(model.pipe, part)
        with active_adapters(module, part, rows):
            assert num_hooks(module) == 0


def test_the_hooks_are_gone_afterwards(ab: tuple[Pipeline, Adapter, Adapter]) -> None:
    model, a, b = ab
    base = run_unet(model.unet)
    with active_adapters(model.unet, "unet", [[on(a), on(b)], []]):
        assert num_hooks(model.unet) == len(a.parts["unet"])
    with pytest.raises(KeyError), active_adapters(model.unet, "unet", [[on(a)]]):
        raise KeyError
    assert num_hooks(model.unet) == 0
    assert torch.equal(run_unet(model.unet), base)


def test_hooks_are_removed_when_not_all_can_be_set(ab: tuple[Pipeline, Adapter, Adapter]) -> None:
    model, a, _ = ab
    low_rank = next(iter(a.parts["unet"].values()))
    broken = replace(a, parts={"unet": {**a.parts["unet"], "no.such.layer": low_rank}})
    with pytest.raises(KeyError):
        active_adapters(model.unet, "unet", [[on(broken)]]).__enter__()
    assert num_hooks(model.unet) == 0


def test_a_call_of_other_rows_is_an_error(ab: tuple[Pipeline, Adapter, Adapter]) -> None:
    model, a, _ = ab
    with (
        active_adapters(model.unet, "unet", [[on(a)], []]),
        pytest.raises(ValueError, match="4 rows where 2"),
    ):
        run_unet(model.unet)
    assert num_hooks(model.unet) == 0
