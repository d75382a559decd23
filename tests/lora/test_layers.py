"""How a LoRA's tensors are mapped to a model's layers, and files that are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdbento.errors import UnsupportedModel
from sdbento.lora import layers
from tests.support.loras import (
    TEXT,
    TEXT_ENCODERS,
    WRITERS,
    Layers,
    cache_of,
    everything,
    make_lora,
    save_comfyui,
    save_diffusers_old,
    save_kohya,
    save_peft,
    save_peft_alone,
)
from tests.support.oracle import tiny_model

FAMILIES = ["sd15", "sd21", "sdxl"]


def test_a_rank_stabilised_lora_divides_by_the_root_of_its_rank(tmp_path: Path) -> None:
    config = {"unet.r": 4, "unet.lora_alpha": 3, "unet.use_rslora": True}
    lora = make_lora("sd15", rank=4, alpha=None)
    save_peft("sd15", lora, tmp_path / "a.safetensors", lora_adapter_metadata=json.dumps(config))
    adapter = cache_of(tmp_path).get(tiny_model("sd15"), "a")
    assert {low.scale for low in adapter.parts["unet"].values()} == {1.5}


def test_all_matrices_go_to_the_models_device_in_one_transfer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one, each would wait for the step that the device computes."""
    transfers: list[tuple[int, torch.device]] = []

    def copied(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        transfers.append((len(tensors), device))
        return [tensor + 1 for tensor in tensors]

    lora, device = make_lora("sd15"), torch.device("cuda", 0)
    save_peft("sd15", lora, tmp_path / "a.safetensors")
    plain = cache_of(tmp_path).get(tiny_model("sd15"), "a")
    monkeypatch.setattr(layers, "copied", copied)
    adapter = cache_of(tmp_path).get(replace(tiny_model("sd15"), device=device), "a")
    assert transfers == [(2 * sum(map(len, lora.values())), device)]
    for part, by_name in plain.parts.items():
        for name, low in by_name.items():
            moved = adapter.parts[part][name]
            assert torch.equal(moved.down, low.down + 1) and torch.equal(moved.up, low.up + 1)


def test_names_without_a_prefix_belong_to_the_unet(tmp_path: Path) -> None:
    lora = make_lora("sd15", alpha=None)
    whole = load_file(save_diffusers_old("sd15", lora, tmp_path / "a.safetensors"))
    save_file({k.removeprefix("unet."): t for k, t in whole.items()}, tmp_path / "b.safetensors")
    model, cache = tiny_model("sd15"), cache_of(tmp_path)
    a, b = (cache.get(model, name) for name in "ab")
    assert a.parts.keys() == b.parts.keys() == {"unet"}
    assert a.parts["unet"].keys() == b.parts["unet"].keys() == lora["unet"].keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_comfyui_names_the_same_layers(family: str, tmp_path: Path) -> None:
    lora = make_lora(family, marks=everything(family))
    save_kohya(family, lora, tmp_path / "a.safetensors")
    save_comfyui(family, lora, tmp_path / "b.safetensors")
    a, b = (cache_of(tmp_path).get(tiny_model(family), name) for name in "ab")
    assert a.warnings == b.warnings == ()
    assert_same_parts(a.parts, b.parts)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_peft_saves_one_network_a_file(part: str, tmp_path: Path) -> None:
    lora = make_lora("sd15", marks={part: everything("sd15")[part]}, alpha=None)
    save_peft("sd15", lora, tmp_path / "a.safetensors")
    save_peft_alone(lora, tmp_path / "b.safetensors")
    a, b = (cache_of(tmp_path).get(tiny_model("sd15"), name) for name in "ab")
    assert_same_parts(a.parts, b.parts)


def test_the_alpha_of_peft_lies_beside_its_file(tmp_path: Path) -> None:
    save_peft_alone(make_lora("sd15", rank=4, alpha=None), tmp_path / "b/adapter_model.safetensors")
    (tmp_path / "b/adapter_config.json").write_text('{"lora_alpha": 6, "r": 4}')
    adapter = cache_of(tmp_path).get(tiny_model("sd15"), "b/adapter_model")
    assert {low.scale for low in adapter.parts["unet"].values()} == {1.5}


def assert_same_parts(some: layers.Parts, others: layers.Parts) -> None:
    assert some.keys() == others.keys()
    for part, by_name in some.items():
        assert by_name.keys() == others[part].keys()
        for name, low in by_name.items():
            other = others[part][name]
            assert torch.equal(low.down, other.down) and torch.equal(low.up, other.up)
            assert low.scale == other.scale


def test_matrices_fit_equivalent_layers(tmp_path: Path) -> None:
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


# What is refused


def refused(folder: Path, tensors: Mapping[str, Tensor], **metadata: str) -> str:
    """The message of the error when the tiny SD 1.5 model is given this file."""
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
        ({f"diffusion_model.{Q}.diff": UP}, "whole differences"),
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
def test_files_that_are_no_plain_lora_are_refused(
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
        marks = {"unet": ("proj_in.x",)}  # only here the tiny two differ: it fits neither
    lora: Layers = make_lora(made_for, marks=marks)
    if not lora["unet"]:
        layer = make_lora(made_for)["unet"][f"{Q}"]
        wide = replace(layer, down=torch.ones(3, 1024 if made_for == "sd21" else 768))
        lora = {"unet": {Q.replace("attn1.to_q", "attn2.to_k"): wide}}
    WRITERS[writer](made_for, lora, tmp_path / "a.safetensors")
    likely = {"sd15": "1.x", "sd21": "2.x", "sdxl": "XL"}
    message = rf"LoRA a does not fit model tiny-{used_on} \(Stable Diffusion {likely[used_on]}\)"
    if made_for == "sdxl" or lora.keys() == {"unet"}:
        message += rf".*likely made for Stable Diffusion {likely[made_for]}"
    with pytest.raises(UnsupportedModel, match=message):
        cache_of(tmp_path).get(tiny_model(used_on), "a")


@pytest.mark.parametrize(("name", "model"), [("outline", "shapes"), ("emoji-outline", "emoji")])
def test_the_catalogue_knows_which_model_its_lora_is_for(
    name: str, model: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel, match=f"it is likely made for model {model} "):
        cache_of(tmp_path).get(tiny_model("sd15"), name)


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
