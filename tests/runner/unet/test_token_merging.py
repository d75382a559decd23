"""Token merging: which tokens become one, and that nobody else has a say in it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdbento.lora.hooks import active_adapters
from sdbento.runner.unet.token_merging import match, merged_tokens
from tests.support.loras import cache_of, make_lora, merged, on, save_peft
from tests.support.oracle import tiny_model
from tests.support.tiny import NUM_ROWS, UNETS, run_unet, tiny_pipeline

SIZES = [(8, 8), (9, 13)]


def random_tokens(height: int, width: int, channels: int = 8) -> Tensor:
    return torch.randn(2, height * width, channels, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("height", "width"), [(2, 2), (8, 8), (9, 13), (1, 5)])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75])
def test_that_share_of_the_tokens_is_merged_as_far_as_there_are_targets(
    height: int, width: int, ratio: float
) -> None:
    tokens = random_tokens(height, width)
    num_targets = ((height + 1) // 2) * ((width + 1) // 2)
    left = max(num_targets, height * width - round(ratio * height * width))
    assert match(tokens, ratio, height, width).apply(tokens).shape == (2, left, 8)


def test_the_most_alike_tokens_are_averaged_and_all_of_them_get_the_result() -> None:
    """Rows of a 2x4 grid of unit vectors: targets are tokens 0 and 2 of the first row."""
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    near_one, between = torch.tensor([0.9, 0.1]), torch.tensor([0.6, 0.7])
    image = torch.stack([one, between, other, other, near_one, one, between, between])
    merge = match(image[None], ratio=4 / 8, height=2, width=4)
    merged = merge.apply(image[None])
    assert torch.allclose(merged[0, 0], (one + near_one + one) / 3)
    assert torch.allclose(merged[0, 1], torch.stack([other, other, between]).mean(0))
    restored = merge.undo(merged)[0]
    assert torch.equal(restored[[0, 4, 5]], merged[0, :1].expand(3, -1))
    assert torch.equal(restored[[2, 3]], merged[0, 1:2].expand(2, -1))
    alone = [i for i in (1, 6, 7) if torch.equal(restored[i], between)]
    assert len(alone) == 2


def test_equal_tokens_lose_nothing_by_being_merged() -> None:
    tokens = random_tokens(2, 2)[:, :1].expand(-1, 16, -1)
    merge = match(tokens, 0.75, 4, 4)
    assert merge.apply(tokens).shape[1] == 4
    assert torch.allclose(merge.undo(merge.apply(tokens)), tokens)


def merged_output(kind: str, ratio: float, size: tuple[int, int], *rows: int) -> Tensor:
    unet = tiny_pipeline(kind).unet
    with merged_tokens(unet, ratio, *size):
        return run_unet(unet, rows or range(NUM_ROWS), size=size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", UNETS)
def test_rows_do_not_depend_on_one_another(kind: str, size: tuple[int, int]) -> None:
    together = merged_output(kind, 0.5, size)
    for row in range(NUM_ROWS):
        assert (merged_output(kind, 0.5, size, row) - together[row]).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sdxl-refiner"])
def test_more_merged_tokens_change_more_and_none_change_nothing(kind: str) -> None:
    whole = run_unet(tiny_pipeline(kind).unet, size=(16, 16))
    little, much = (
        (merged_output(kind, ratio, (16, 16)) - whole).square().mean() for ratio in (0.1, 0.75)
    )
    assert 1e-6 < little < much
    assert torch.equal(merged_output(kind, 0.0, (16, 16)), whole)


def test_afterwards_the_unet_is_as_before_even_after_an_error() -> None:
    unet = tiny_pipeline("sd15").unet
    before = run_unet(unet)
    with pytest.raises(RuntimeError, match="stop"), merged_tokens(unet, 0.5, 8, 8):
        raise RuntimeError("stop")
    assert torch.equal(run_unet(unet), before)


def test_loras_work_on_merged_tokens_as_if_they_were_in_the_weights(tmp_path: Path) -> None:
    model, lora = tiny_model("sd15"), make_lora("sd15", 1, marks={"unet": ("attn1.", "ff.net")})
    save_peft("sd15", lora, tmp_path / "a.safetensors")
    changed = merged(copy.deepcopy(model.pipe), lora, 0.8).unet
    row = [on(cache_of(tmp_path).get(model, "a"), 0.8)]
    with merged_tokens(model.unet, 0.5, 8, 8), merged_tokens(changed, 0.5, 8, 8):
        with active_adapters(model.unet, "unet", [row, [], row, []]):
            adapted = run_unet(model.unet)
        expected, without = run_unet(changed), run_unet(model.unet)
    assert (adapted - expected)[[0, 2]].abs().max() <= 1e-5
    assert (adapted - without)[[1, 3]].abs().max() <= 1e-5
    assert (adapted - without)[[0, 2]].abs().amax(dim=(1, 2, 3)).min() > 0.01
