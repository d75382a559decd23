"""What is left of the URLs in a text."""

from __future__ import annotations

import pytest

from sdbento.errors import InvalidParameter
from sdbento.url_redaction import (
    all_without_credentials,
    redacted_message,
    without_credentials,
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a cat, https://h.example/a.png, and; more? #1 & 2=3", None),
        ("<lora:ink:te=1:unet=2> (a:1.2) [b|c] a//b me@h.example", None),
        ("https://u:SECRET@h.example/a", "https://h.example/a"),
        ("HTTPS://U:SECRET@H.example/a?TOKEN=SECRET", "HTTPS://H.example/a"),
        ("https://SECRET@h.example", "https://h.example"),
        ("s3://h/a?X-Amz-Signature=SECRET&X-Amz-Date=1, a cat", "s3://h/a, a cat"),
        ("https://h/a#access_token=SECRET", "https://h/a"),
        ("https://h/a;token=SECRET/b", "https://h/a"),
        ("https://h/a%3Ftoken=SECRET", "https://h/a"),
        ("https%3A%2F%2Fu%3ASECRET%40h%2Fa%3Ftoken%3DSECRET", "https%3A%2F%2Fh%2Fa"),
        ("https:\\\\u:SECRET@h\\a?token=SECRET", "https:\\\\h\\a"),
        ("<lora:https://h/a.safetensors?token=SECRET:1> b", "<lora:https://h/a.safetensors> b"),
        ("no 'https://h/a?token=SECRET'; (s3://h/a?b=SECRET).", "no 'https://h/a'; (s3://h/a)."),
        ("é_https://h/a?token=SECRET", "é_https://h/a"),
    ],
)
def test_what_is_left_of_a_text(text: str, told: str | None) -> None:
    assert without_credentials(text) == (text if told is None else told)


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat &style=anime, blue sky",
        "what?x=y",
        " #a=1 dog; b=2",
        "a //cat:1.2@dusk// \\\\(b:c@d\\\\)",
        "<lora:ink:te=1&unet=2> h.example/a?width=512",
    ],
)
def test_a_prompt_without_a_url_stays_as_it_is(prompt: str) -> None:
    assert without_credentials(prompt) == prompt
    assert all_without_credentials([prompt]) == [prompt]


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("no 'https://u:SECRET@h/a?token=SECRET'; (h/a?b=SECRET).", "no 'https://h/a'; (h/a)."),
        ("//u:SECRET@h/a?token=SECRET b", "//h/a b"),
        ("h.example/a?token=SECRET b", "h.example/a b"),
        ("https:h/a?token=SECRET", "https:h/a"),
        ("https://h/a\n?token=SECRET", "https://h/a\n"),
        ("https://h/a?x=<b>&token=SECRET", "https://h/a<b>"),
    ],
)
def test_a_message_loses_what_may_be_a_secret(message: str, told: str) -> None:
    assert redacted_message(message) == told


def test_a_value_of_json_keeps_its_shape() -> None:
    value = {"lora": [{"model_id": "https://h/a?token=SECRET", "weight": 1.0}], "seed": None}
    told = {"lora": [{"model_id": "https://h/a", "weight": 1.0}], "seed": None}
    assert all_without_credentials(value) == told


def test_no_error_quotes_them() -> None:
    error = InvalidParameter("there is no LoRA 'https://u:SECRET@h/a?token=SECRET'")
    assert "SECRET" not in f"{error} {error.to_body()}"


@pytest.mark.timeout(30)  # less than a second; quadratic would be minutes
@pytest.mark.parametrize(
    "piece",
    [
        "a",
        "//",
        "//a:",
        "a%3a%2f%2f",
        "%2f",
        "?a",
        ",a%3a%2f%2f",
        "&a=",
        ";",
        "a://b@",
        "%3f",
        "\\",
        "a:",
        "?,",
    ],
)
def test_long_texts_take_time_in_proportion_to_their_length(piece: str) -> None:
    redacted_message(piece * 100_000)
