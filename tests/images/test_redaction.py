"""What is taken out of names and texts before they leave this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdbento.images.redaction import public_name, without_secrets


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("https://u:p@ss@h.example/a?b", "https://h.example/a"),
        ("https://h.example/a#access_token=s", "https://h.example/a"),
        ("https://h.example/a?x=1,2:3&y=4", "https://h.example/a"),
        ("https://h.example/?u=https://i.example/b&token=s", "https://h.example/"),
        ("https://h.example?token=s", "https://h.example"),
        ("a,https://a.example,ftp://u:p@h.example", "a,https://a.example,ftp://h.example"),
        ("<lora:/srv/loras/ink.safetensors:0.5> a cat", "<lora:ink.safetensors:0.5> a cat"),
        ("a <LoRA:~/ink:1> <lora:ink:te=1:unet=2>", "a <LoRA:ink:1> <lora:ink:te=1:unet=2>"),
        (
            "a <lora:https://u:p@host.example/a.png?sig=s:1> cat",
            "a <lora:https://host.example/a.png> cat",
        ),
    ],
)
def test_what_is_kept_of_a_text(text: str, told: str) -> None:
    assert without_secrets(text) == told


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("/srv/models/x.safetensors", "x.safetensors"),
        ("./x.safetensors", "x.safetensors"),
        ("~/x.safetensors", "x.safetensors"),
        ("customer/x", "x"),  # which is there
        ("customer/y", "y"),  # as y.safetensors
        ("org/model", "org/model"),
        ("org/repo/file", "org/repo/file"),
        ("https://u:p@h.example/x.safetensors?token=s", "https://h.example/x.safetensors"),
        ("a\0b", "a\0b"),
        ("", ""),
    ],
)
def test_what_is_kept_of_a_name(
    name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "customer" / "x").mkdir(parents=True)
    (tmp_path / "customer" / "y.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    assert public_name(name) == told


@pytest.mark.timeout(30)  # less than a second; quadratic would be minutes
@pytest.mark.parametrize("piece", ["a", "a://", "a://b@", "a://?", "<lora:", "<lora:/a", "://@?#"])
def test_long_texts_take_time_in_proportion_to_their_length(piece: str) -> None:
    without_secrets(piece * 100_000)
    public_name(piece * 100_000)
