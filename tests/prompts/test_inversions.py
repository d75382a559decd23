from __future__ import annotations

import copy
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdbento.environment import load_settings
from sdbento.errors import InvalidParameter
from sdbento.models.pipeline import Pipeline
from sdbento.prompts import inversions as inversions_module
from sdbento.prompts.encoder import Conditioning, PromptEncoder
from sdbento.prompts.inversions import Inversion, Inversions
from sdbento.prompts.tokens import tokenize
from sdbento.settings import Settings
from tests.support.oracle import tiny_model


@pytest.fixture(autouse=True)
def _changes_are_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inversions_module, "LISTED_SECONDS", 0)


def encoded(model: Pipeline, text: str, inversions: Inversions | None = None) -> Conditioning:
    return PromptEncoder().encode(model, tokenize(model, text, inversions=inversions), 1)


def difference(one: Conditioning, other: Conditioning) -> float:
    return float((one.embeds - other.embeds).abs().max())


def settings_of(folder: Path) -> Settings:
    return load_settings(embeddings_dir=folder)


@pytest.mark.parametrize("key", ["emb_params", "<style>"])
def test_a_textual_inversion_is_encoded_as_by_the_stock_pipeline(tmp_path: Path, key: str) -> None:
    model = tiny_model("sd15")
    save_file({key: torch.randn(3, 32)}, tmp_path / "mystyle.safetensors")
    pipe = copy.deepcopy(model.pipe)
    pipe.load_textual_inversion(tmp_path / "mystyle.safetensors", token="mystyle")
    embeds, *_ = pipe.encode_prompt("a mystyle cat", "cpu", 1, False)
    ours = encoded(model, "a MyStyle cat", Inversions(settings_of(tmp_path)))
    assert torch.allclose(ours.embeds, embeds, atol=1e-6)
    assert difference(ours, encoded(model, "a MyStyle cat")) > 0.01


SDXL = {"clip_l": torch.full((2, 32), 0.3), "clip_g": torch.linspace(-2, 2, 96).view(2, 48)}


def test_on_sdxl_both_encoders_and_the_pooled_output_are_the_stock_pipelines(
    tmp_path: Path,
) -> None:
    model = tiny_model("sdxl")
    save_file(SDXL, tmp_path / "style.safetensors")
    pipe = copy.deepcopy(model.pipe)
    for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
        pipe.load_textual_inversion(
            SDXL[key],
            token="style",
            text_encoder=getattr(pipe, f"text_encoder{suffix}"),
            tokenizer=getattr(pipe, f"tokenizer{suffix}"),
        )
    embeds, _, pooled, _ = pipe.encode_prompt(
        "a style cat", device="cpu", do_classifier_free_guidance=False
    )
    ours = encoded(model, "a style cat", Inversions(settings_of(tmp_path)))
    assert torch.allclose(ours.embeds, embeds, atol=1e-6)
    assert ours.pooled is not None and torch.allclose(ours.pooled, pooled, atol=1e-6)


def test_the_refiner_takes_the_vectors_of_the_second_encoder(tmp_path: Path) -> None:
    model = tiny_model("sdxl-refiner")
    save_file(SDXL, tmp_path / "style.safetensors")
    ours = encoded(model, "a style cat", Inversions(settings_of(tmp_path)))
    assert difference(ours, encoded(model, "a style cat")) > 0.01


def test_sdxl_takes_vectors_for_both_encoders(tmp_path: Path) -> None:
    model = tiny_model("sdxl")
    both = {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 48)}
    save_file(both, tmp_path / "style.safetensors")
    inversions = Inversions(settings_of(tmp_path))
    with_style = encoded(model, "a (style:1.2) cat", inversions=inversions)
    assert difference(with_style, encoded(model, "a (style:1.2) cat")) > 0.01
    with pytest.raises(InvalidParameter, match="another family"):
        tokenize(tiny_model("sd15"), "a style cat", inversions=inversions)


def test_names_are_words_and_found_when_the_folder_changes(tmp_path: Path) -> None:
    model = tiny_model("sd15")
    inversions = Inversions(settings_of(tmp_path))
    assert not tokenize(model, "ink", inversions=inversions).chunks[0][0].vectors
    (tmp_path / "sub").mkdir()
    save_file({"emb_params": torch.randn(2, 32)}, tmp_path / "sub" / "ink.safetensors")
    assert len(tokenize(model, "an ink drawing", inversions=inversions).chunks[0][0].vectors) == 2
    assert not tokenize(model, "pinks", inversions=inversions).chunks[0][0].vectors


def test_a_damaged_or_unknown_file_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_model("sd15")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    save_file({"a": torch.ones(1, 32), "b": torch.ones(1, 32)}, tmp_path / "odd.safetensors")
    save_file({"emb_params": torch.randn(90, 32)}, tmp_path / "long.safetensors")
    inversions = Inversions(settings_of(tmp_path))
    for name in ("broken", "odd", "long"):
        with pytest.raises(InvalidParameter, match=f"textual inversion {name}"):
            tokenize(model, f"a {name} cat", inversions=inversions)


def test_a_pickle_is_not_read_and_is_reported_once_when_a_prompt_names_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("sd15")
    for name in ("style.pt", "other.bin"):
        (tmp_path / name).write_bytes(b"\x80")
    inversions = Inversions(settings_of(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert tokenize(model, "it's style", inversions=inversions) == tokenize(model, "it's style")
        tokenize(model, "style", inversions=inversions)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "style.pt" in caplog.text and "other.bin" not in caplog.text


def test_a_pickle_beside_a_safetensors_file_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "ink.pt").write_bytes(b"\x80")
    save_file({"emb_params": torch.ones(1, 32)}, tmp_path / "ink.safetensors")
    inversions = Inversions(settings_of(tmp_path))
    assert tokenize(tiny_model("sd15"), "ink", inversions=inversions).chunks[0][0].vectors


@pytest.mark.parametrize("text", ["\u017ftyle", "STYLE", "İstyle", "(style:1.2)", "style, ink"])
def test_every_spelling_of_a_name_is_accepted(tmp_path: Path, text: str) -> None:
    save_file({"emb_params": torch.ones(1, 32)}, tmp_path / "style.safetensors")
    tokenize(tiny_model("sd15"), text, inversions=Inversions(settings_of(tmp_path)))


def test_a_file_that_was_replaced_or_removed_is_noticed(tmp_path: Path) -> None:
    model, file = tiny_model("sd15"), tmp_path / "ink.safetensors"
    inversions = Inversions(settings_of(tmp_path))
    for count in (1, 3):
        save_file({"emb_params": torch.ones(count, 32)}, file)
        assert len(tokenize(model, "ink", inversions=inversions).chunks[0][0].vectors) == count
    file.unlink()
    assert not tokenize(model, "ink", inversions=inversions).chunks[0][0].vectors


def test_the_folder_is_not_listed_for_every_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"emb_params": torch.ones(1, 32)}, tmp_path / "ink.safetensors")
    monkeypatch.setattr(inversions_module, "LISTED_SECONDS", 60)
    inversions = Inversions(settings_of(tmp_path))
    monkeypatch.setattr(inversions_module, "list_files", lambda *_: pytest.fail("listed again"))
    assert len(tokenize(tiny_model("sd15"), "(ink) " * 3, inversions=inversions).chunks[0]) == 1


def test_a_missing_folder_holds_nothing_until_it_is_made(tmp_path: Path) -> None:
    inversions = Inversions(settings_of(tmp_path / "later"))
    assert inversions.split("ink") == ["ink"]
    (tmp_path / "later").mkdir()
    save_file({"emb_params": torch.ones(1, 32)}, tmp_path / "later" / "ink.safetensors")
    assert inversions.split("ink") != ["ink"]


def test_a_file_of_the_folder_itself_comes_before_one_of_a_subfolder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for count, file in ((1, "a/ink"), (2, "ink"), (3, "z/ink")):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        save_file({"emb_params": torch.ones(count, 32)}, tmp_path / f"{file}.safetensors")
    [ink] = Inversions(settings_of(tmp_path)).split("ink")
    assert isinstance(ink, Inversion) and len(ink.for_encoder(0, 32)) == 2


def test_a_word_is_read_once_for_all_threads(tmp_path: Path) -> None:
    save_file({"emb_params": torch.ones(1, 32)}, tmp_path / "ink.safetensors")
    inversions = Inversions(settings_of(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(inversions.split, ["ink"] * 50))
    assert len({id(piece) for [piece] in found}) == 1


def test_no_hook_stays_behind(tmp_path: Path) -> None:
    model = tiny_model("sd15")
    save_file({"emb_params": torch.randn(1, 32)}, tmp_path / "ink.safetensors")
    before = encoded(model, "a cat")
    encoded(model, "ink", Inversions(settings_of(tmp_path)))
    assert torch.equal(encoded(model, "a cat").embeds, before.embeds)
    assert not model.pipe.text_encoder.embeddings.token_embedding._forward_hooks
