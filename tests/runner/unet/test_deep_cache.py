"""DeepCache on UNets of all families: the outermost blocks around what a whole call has kept."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdbento.lora.hooks import active_adapters
from sdbento.runner.unet.deep_cache import kept_features, shallow
from tests.support.loras import cache_of, everything, make_lora, on, save_peft
from tests.support.oracle import tiny_model
from tests.support.tiny import NUM_ROWS, UNETS, run_unet, tiny_pipeline

ODD = (9, 13)  # latents that the UNet cannot halve evenly


def features_of(kind: str, size: tuple[int, int] = (8, 8)) -> tuple[Tensor, Tensor]:
    """What a whole call makes, and the features that it keeps."""
    unet = tiny_pipeline(kind).unet
    with kept_features(unet) as kept:
        output = run_unet(unet, size=size)
    [features] = kept
    return output, features


@pytest.mark.parametrize("size", [(8, 8), ODD])
@pytest.mark.parametrize("kind", UNETS)
def test_with_the_features_of_the_same_inputs_a_shallow_call_is_the_whole_one(
    kind: str, size: tuple[int, int]
) -> None:
    unet = tiny_pipeline(kind).unet
    full, features = features_of(kind, size)
    assert torch.equal(full, run_unet(unet, size=size))
    assert torch.equal(full, run_unet(shallow(unet, features), size=size))


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_shallow_call_computes_the_outermost_blocks_only(kind: str) -> None:
    unet = copy.deepcopy(tiny_pipeline(kind).unet)
    full, features = features_of(kind)
    for block in (*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1]):
        for parameter in block.parameters():
            parameter.data.fill_(torch.nan)
    assert torch.equal(full, run_unet(shallow(unet, features)))
    assert run_unet(shallow(unet, features.roll(1, 0))).sub(full).abs().max() > 0.01


def test_a_shallow_call_leaves_the_unet_as_it_was() -> None:
    unet = tiny_pipeline("sd15").unet
    before, features = features_of("sd15")
    run_unet(shallow(unet, features.zero_()))
    assert torch.equal(before, run_unet(unet))


def test_nothing_is_kept_after_the_block_even_after_an_error() -> None:
    unet = tiny_pipeline("sd15").unet
    with pytest.raises(RuntimeError, match="stop"), kept_features(unet) as kept:
        raise RuntimeError("stop")
    run_unet(unet)
    assert kept == []


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_loras_work_on_the_blocks_that_are_computed(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    save_peft(family, make_lora(family, 1, marks=everything(family)), tmp_path / "a.safetensors")
    row = [on(cache_of(tmp_path).get(model, "a"), 0.8)]
    with active_adapters(model.unet, "unet", [row, [], row, []]):
        with kept_features(model.unet) as kept:
            full = run_unet(model.unet)
        assert torch.equal(full, run_unet(shallow(model.unet, kept[0])))
    without = run_unet(shallow(model.unet, kept[0]))
    assert torch.equal(full[[1, 3]], without[[1, 3]])
    assert (full - without)[[0, 2]].abs().amax(dim=(1, 2, 3)).min() > 0.01


def test_a_compiled_unet_can_be_made_shallow() -> None:
    """Compiled code runs whole UNets; a shallow one is computed without it."""
    unet = copy.deepcopy(tiny_pipeline("sd15").unet)

    def refuse(*_: object) -> None:
        raise AssertionError("the whole UNet's compiled code was called")

    full, features = features_of("sd15")
    unet.compile(backend=refuse)
    assert torch.equal(full, run_unet(shallow(unet, features)))
    assert len(features) == NUM_ROWS
