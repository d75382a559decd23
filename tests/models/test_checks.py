"""A model that is incomplete or cannot be used is refused when it is loaded, with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from sdbento.catalog import hub
from sdbento.catalog.families import Family
from sdbento.catalog.layout import TOKENIZERS
from sdbento.catalog.specs import ControlNetSpec
from sdbento.errors import ModelLoadFailed, UnsupportedModel
from sdbento.models import checks
from tests.support.checkpoints import save_tiny_checkpoint
from tests.support.loading import load, load_controlnet, resolve, settings, spec
from tests.support.server import ROOT
from tests.support.tiny import save_tiny, save_tiny_controlnet, tiny_pipeline

SHAPES = ROOT / "sdbento" / "bundled" / "shapes"
EMPTY = CLIPTokenizer().backend_tokenizer.to_str()


# Tokenizers


def in_two_files(folder: Path, **changes: Any) -> None:
    """Write a tokenizer's vocab.json and merges.txt in place of its tokenizer.json."""
    whole = folder / "tokenizer.json"
    model = {**json.loads(whole.read_text())["model"], **changes}
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n")
    whole.unlink()


def without_limit(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["model_max_length"]
    file.write_text(json.dumps(config))


def test_a_tokenizer_in_two_files_reads_as_the_one_in_one(tmp_path: Path) -> None:
    folder = save_tiny("sdxl", tmp_path / "mine")
    for tokenizer in TOKENIZERS:
        in_two_files(folder / tokenizer)
    pipe = load(resolve(folder), settings()).pipe
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        ids = tiny_pipeline("sdxl").tokenizer("a cat and a dog").input_ids
        assert tokenizer("a cat and a dog").input_ids == ids


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (
            lambda folder: (folder / "tokenizer.json").write_text(EMPTY),
            "has [23] tokens of the 520",
        ),
        (lambda folder: in_two_files(folder, merges=[]), "does not read the words"),
        (without_limit, "has no limit of 77 tokens"),
        (
            lambda folder: shutil.copy(SHAPES / "tokenizer/tokenizer.json", folder),
            "has token 632, but its text_encoder(_2)? knows 520 only",
        ),
    ],
    ids=["empty", "no merges", "no limit", "another model's"],
)
def test_a_tokenizer_that_cannot_tell_prompts_apart_is_refused(
    spoil: Callable[[Path], Any], fault: str, tokenizer: str, tmp_path: Path
) -> None:
    """Otherwise every prompt would give the same image, without an error."""
    folder = save_tiny("sdxl", tmp_path / "mine")
    spoil(folder / tokenizer)
    with pytest.raises(ModelLoadFailed, match=f"model .*mine: its {tokenizer} {fault}"):
        load(resolve(folder), settings())


def test_a_single_files_configurations_need_their_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = save_tiny("sd15", tmp_path / "configs")
    (configs / "tokenizer/tokenizer.json").write_text(EMPTY)
    monkeypatch.setattr(hub, "fetch_configs", lambda *_, **__: configs)
    file = save_tiny_checkpoint("sd15", tmp_path / "mine.safetensors")
    with pytest.raises(ModelLoadFailed, match="model mine: its tokenizer has 2 tokens"):
        load(spec(Family.SD15, file), settings())


# Weights and latents


def test_a_controlnet_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_controlnet("sd15", tmp_path / "control")
    wanted = ControlNetSpec("mine", Family.SD15, (str(folder),), 0.1)
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_in.bias"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelLoadFailed, match=r"ControlNet mine: 1 weights .* conv_in\.bias"):
        load_controlnet(wanted)
    file.unlink()
    with pytest.raises(ModelLoadFailed, match="ControlNet mine: its weights are not there"):
        load_controlnet(wanted)


@pytest.mark.parametrize(
    ("lacking", "reason"),
    [
        ("model.diffusion_model.out.2.bias", "weights of its UNet or VAE are not in the file"),
        (
            "cond_stage_model.transformer.text_model.final_layer_norm.bias",
            r"1 weights of its text_encoder .* final_layer_norm\.bias",
        ),
    ],
)
def test_a_single_file_that_lacks_weights_is_refused(
    lacking: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = save_tiny("sd15", tmp_path / "configs")
    monkeypatch.setattr(hub, "fetch_configs", lambda *_, **__: configs)
    file = save_tiny_checkpoint("sd15", tmp_path / "mine.safetensors")
    tensors = load_file(file)
    del tensors[lacking]
    save_file(tensors, file)
    with pytest.raises(ModelLoadFailed, match=reason):
        load(spec(Family.SD15, file), settings())


def test_a_vae_of_another_factor_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    mine = resolve(save_tiny("sd15", tmp_path / "mine"))
    monkeypatch.setattr(checks, "VAE_FACTOR", 16)
    with pytest.raises(UnsupportedModel, match="its VAE shrinks by 8"):
        load(mine, settings())
