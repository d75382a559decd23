"""Prompts as people write them for AUTOMATIC1111's web UI: attention, LoRA tags, editing.

    (word) ((word)) [word] (word:1.3) \\( BREAK   <lora:name:0.8>   [from:to:0.5]

Knows nothing of tokens or of what a weight does. Every function takes time linear in its text, or
nearly: prompts come from strangers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sdbento.errors import InvalidParameter

MAX_WEIGHT = 100.0
UP, DOWN = 1.1, 1 / 1.1  # what a round and a square bracket multiply with


@dataclass(frozen=True)
class Span:
    """A piece of text with one weight; None: BREAK."""

    text: str | None
    weight: float = 1.0


@dataclass(frozen=True)
class LoraTag:
    """<lora:name:weight>; `weight` is the UNet's."""

    name: str
    weight: float
    text_encoder_weight: float


_LORA = re.compile(r"<lora:([^<>]*)>", re.IGNORECASE)


def extract_loras(text: str) -> tuple[str, list[LoraTag]]:
    """The text without its LoRA tags, and the tags.

    One number is both weights; of two, the first is the text encoder's, as AUTOMATIC1111 has it.
    Raises InvalidParameter for a tag that cannot be read.
    """
    tags = [_lora_tag(match) for match in _LORA.finditer(text)]
    if not tags:
        return text, []
    return re.sub(r"\s+", " ", _LORA.sub(" ", text)).strip(), tags


def _lora_tag(match: re.Match[str]) -> LoraTag:
    name, *options = (part.strip() for part in match[1].split(":"))
    named = dict(option.split("=", 1) for option in options if "=" in option)
    numbers = [_weight(option, match[0]) for option in options if "=" not in option]
    if not name or len(numbers) > 2 or named.keys() - {"te", "unet"}:
        raise _unreadable(match[0])
    text_encoder = numbers[0] if numbers else 1.0
    if "te" in named:
        text_encoder = _weight(named["te"], match[0])
    unet = numbers[-1] if numbers else text_encoder
    if "unet" in named:
        unet = _weight(named["unet"], match[0])
    return LoraTag(name, unet, text_encoder)


def _weight(text: str, tag: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        raise _unreadable(tag) from None
    if not (math.isfinite(weight) and abs(weight) <= MAX_WEIGHT):
        raise _unreadable(tag)
    return weight


def _unreadable(tag: str) -> InvalidParameter:
    return InvalidParameter(
        f"{tag[:80]} in the prompt cannot be read; write <lora:name>, <lora:name:weight> or "
        f"<lora:name:te=weight:unet=weight>, with weights of {MAX_WEIGHT:g} at most",
        param="prompt",
    )


_TOKEN = re.compile(
    r"""\\[()\[\]\\] | (?P<weight>:\s*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)) | [()\[\]]
    | [^\\()\[\]:]+ | [\\:]""",
    re.VERBOSE,
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


def parse_attention(text: str) -> list[Span]:
    """Spans of one weight each. Brackets that do not match anything weigh until the end, or are
    text where they close nothing, as in AUTOMATIC1111."""
    pieces: list[str | None] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    ranges: list[tuple[int, int, float]] = []
    for match in _TOKEN.finditer(text):
        token, number = match[0], match["number"]
        if token in opened:
            opened[token].append(len(pieces))
        elif number is not None and opened["("] and abs(float(number)) <= MAX_WEIGHT:
            ranges.append((opened["("].pop(), len(pieces), float(number)))
        elif token == ")" and opened["("]:
            ranges.append((opened["("].pop(), len(pieces), UP))
        elif token == "]" and opened["["]:
            ranges.append((opened["["].pop(), len(pieces), DOWN))
        elif len(token) == 2 and token[0] == "\\":
            pieces.append(token[1])
        else:
            pieces += _broken(token)
    for bracket, factor in (("(", UP), ("[", DOWN)):
        ranges += [(start, len(pieces), factor) for start in opened[bracket]]
    return _merged(pieces, _weights(len(pieces), ranges))


def _broken(text: str) -> list[str | None]:
    """The text around each BREAK, with None for the BREAK itself."""
    pieces: list[str | None] = []
    for part in _BREAK.split(text):
        pieces += [None, part] if pieces else [part]
    return pieces


def _weights(count: int, ranges: list[tuple[int, int, float]]) -> list[float]:
    weights = np.ones(count)
    for start, stop, factor in ranges:
        weights[start:stop] *= factor
    bounded: list[float] = np.clip(weights, -MAX_WEIGHT, MAX_WEIGHT).tolist()
    return bounded


def _merged(pieces: list[str | None], weights: list[float]) -> list[Span]:
    spans: list[Span] = []
    for text, weight in zip(pieces, weights, strict=True):
        if text is None:
            spans.append(Span(None))
        elif spans and spans[-1].text is not None and spans[-1].weight == weight:
            spans[-1] = Span(spans[-1].text + text, weight)
        elif text:
            spans.append(Span(text, weight))
    return spans


# Innermost first: no bracket inside, two colons or one, a number at the end.
_EDIT = re.compile(r"(?<!\\)\[([^\[\]]*?):(?:([^\[\]:]*):)?\s*(\d+\.?\d*|\.\d+)\s*\]")
MAX_EDITS = 100


def schedule(text: str, num_steps: int) -> list[tuple[int, str]]:
    """(first step, text) pairs of a prompt with [from:to:when], [to:when] and [from::when].

    `when` is a share of the steps, or a number of steps where it is 1 or more without a point.
    """
    switches = sorted({0, *(s for s in _switches(text, num_steps) if 0 < s < num_steps)})
    texts = [(step, _at(text, step, num_steps)) for step in switches]
    return [pair for i, pair in enumerate(texts) if i == 0 or pair[1] != texts[i - 1][1]]


def _switches(text: str, num_steps: int) -> Iterator[int]:
    for _ in range(MAX_EDITS):
        match = _EDIT.search(text)
        if match is None:
            return
        yield _step(match[3], num_steps)
        kept = f"{match[1]} {match[2] or ''}"
        text = text[: match.start()] + kept + text[match.end() :]


def _at(text: str, step: int, num_steps: int) -> str:
    for _ in range(MAX_EDITS):
        match = _EDIT.search(text)
        if match is None:
            return text
        before, after = (match[1], match[2]) if match[2] is not None else ("", match[1])
        chosen = before if step < _step(match[3], num_steps) else after
        text = text[: match.start()] + chosen + text[match.end() :]
    return text


def _step(when: str, num_steps: int) -> int:
    value = float(when)
    return round(value * num_steps) if value < 1 or "." in when else int(value)
