"""AUTOMATIC1111's infotext, written, and read as the web UI reads it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdbento.images import infotext

PAIRS = [("Steps", 20), ("Sampler", "DPM++ 2M"), ("CFG scale", "7"), ("Seed", 42)]


def test_it_has_the_layout_of_the_web_ui() -> None:
    assert infotext.write("a cat", "blurry", PAIRS) == (
        "a cat\nNegative prompt: blurry\nSteps: 20, Sampler: DPM++ 2M, CFG scale: 7, Seed: 42"
    )


def test_there_is_no_line_for_an_empty_negative_prompt() -> None:
    assert infotext.write("a cat", None, PAIRS).count("\n") == 1


@pytest.mark.parametrize("prompt", ["a cat", "a cat\nin two lines", "", "Steps: 3, a: b"])
@pytest.mark.parametrize("negative", [None, "blurry, low: quality\nand more"])
def test_what_is_written_is_read(prompt: str, negative: str | None) -> None:
    pairs = [*PAIRS, ("ControlNet 0", 'Module: canny, Model: "x"'), ("Model", "a, b: c\nd")]
    read = infotext.read(infotext.write(prompt, negative, pairs))
    expected = {"Prompt": prompt} | ({"Negative prompt": negative} if negative else {})
    assert read == expected | {name: str(value) for name, value in pairs}


def test_the_example_of_the_web_ui_is_read() -> None:
    read = infotext.read(
        "girl by the sea <lora:name:0.8>\n"
        "Negative prompt: bad hands\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 512x512, "
        'Model hash: 45dee52b, Lora hashes: "name: 1234567890ab, other: 0", Version: v1.10.1'
    )
    assert read["Prompt"] == "girl by the sea <lora:name:0.8>"
    assert read["Negative prompt"] == "bad hands"
    assert read["Size"] == "512x512"
    assert read["Lora hashes"] == "name: 1234567890ab, other: 0"
    assert read["Version"] == "v1.10.1"


def test_a_text_without_parameters_is_a_prompt() -> None:
    assert infotext.read("a cat: a small one") == {"Prompt": "a cat: a small one"}
    assert infotext.read("") == {"Prompt": ""}


def test_a_last_line_that_is_far_too_long_is_a_prompt() -> None:
    """Searching it would stop all threads for seconds: a file may bring a text of megabytes."""
    line = "Steps: 20, " * (infotext.MAX_PAIRS_CHARS // 10)
    assert infotext.read(line) == {"Prompt": line.strip()}
    assert infotext.read(f"{line}\nSteps: 20, Seed: 1, Size: 8x8")["Seed"] == "1"


def test_a_prompt_may_speak_of_negative_prompts() -> None:
    read = infotext.read(infotext.write("a sign: Negative prompt: no", "blurry", PAIRS))
    assert read["Prompt"] == "a sign: Negative prompt: no"
    assert read["Negative prompt"] == "blurry"


def parsed_by_the_web_ui(text: str) -> tuple[str, str, dict[str, str]]:
    """As `parse_generation_parameters` does it: its expression, on the last line."""
    expression = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    *lines, last = text.strip().split("\n")
    pairs: Any = dict(expression.findall(last))
    assert len(pairs) >= infotext.MIN_PAIRS
    start = [line.strip().startswith("Negative prompt:") for line in [*lines, "Negative prompt:"]]
    prompt, negative = lines[: start.index(True)], lines[start.index(True) :]
    return "\n".join(prompt), "\n".join(negative).removeprefix("Negative prompt: "), pairs


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat\nby the sea\n\nat night",
        'she said: "no", twice, \\(quietly\\)',
        "猫 ☕ \U0001f408, Größe: 3",
        "Steps: 20, Sampler: Euler, Seed: 1",
    ],
)
def test_the_web_ui_reads_what_is_written(prompt: str) -> None:
    model = 'a, b: "c"\\d'
    pairs = [*PAIRS, ("Model", model), ("Size", "512x768"), ("Version", "sdbento 1.0")]
    read, negative, values = parsed_by_the_web_ui(infotext.write(prompt, "blurry\nbad", pairs))
    assert (read, negative) == (prompt, "blurry\nbad")
    assert values["Size"] == "512x768"
    assert values["Seed"] == "42"
    assert infotext.read(infotext.write(prompt, None, pairs))["Model"] == model
    assert values.keys() == {name for name, _ in pairs}


@pytest.mark.timeout(30)  # less than a second; quadratic would be minutes
@pytest.mark.parametrize("piece", ["a", " ", "ab:", 'ab:"', "ab: ", '"\\', "a b", "\n"])
def test_reading_takes_time_in_proportion_to_the_length(piece: str) -> None:
    """A file may bring a text of megabytes."""
    infotext.read(piece * 300_000)


WORDS = st.lists(
    st.sampled_from([*'"\\,:<>()[]\n ', "Steps", "Negative prompt", "a cat", "20", "é", "\u2028"]),
    max_size=20,
).map("".join)


def without_marks(prompt: str) -> str:
    """A prompt that cannot be taken for another: spaces at the ends of lines are not kept."""
    lines = (line.strip() for line in prompt.replace("Negative prompt", "").split("\n"))
    return "\n".join(lines).strip()


@given(WORDS.map(without_marks), WORDS.map(without_marks), st.lists(WORDS | st.text(), max_size=5))
def test_whatever_is_written_is_read(prompt: str, negative: str, values: list[str]) -> None:
    pairs = [*PAIRS, *((f"Value {i}", value) for i, value in enumerate(values))]
    read = infotext.read(infotext.write(prompt, negative, pairs))
    expected = {"Prompt": prompt} | ({"Negative prompt": negative} if negative else {})
    assert read == expected | {name: str(value) for name, value in pairs}


@given(WORDS | st.text())
def test_every_text_is_read_as_something(text: str) -> None:
    read = infotext.read(text)
    assert "Prompt" in read and all(isinstance(value, str) for value in read.values())
