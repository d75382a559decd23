"""Prompts as people write them for AUTOMATIC1111's web UI: attention, LoRA tags, editing.

    (word) ((word)) [word] (word:1.3) \\( BREAK   <lora:name:0.8>   [from:to:0.5]

Knows nothing of tokens or of what a weight does. Every function takes time about linear in the
length of its text, because anybody may send a prompt made to be slow.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, compress

import numpy as np

from sdbento.errors import InvalidParameter

MAX_WEIGHT = 100.0
UP, DOWN = 1.1, 1 / 1.1  # what a round and a square bracket multiply with


@dataclass(frozen=True)
class Span:
    """A piece of text with one weight. A `text` of None is a BREAK."""

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

    A single number is both weights; of two, the first is the text encoder's, as in AUTOMATIC1111.
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
    r"""\\[()\[\]\\] | (?P<weight>:\s*(?P<number>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)) | [()\[\]]
    | [^\\()\[\]:]+ | [\\:]""",
    re.VERBOSE,
)
_BREAK = re.compile(r"\bBREAK\b")
HUGE = 1e100  # far above MAX_WEIGHT, and finite: infinity times 0 would be NaN


def parse_attention(text: str) -> list[Span]:
    """Spans of one weight each. As in AUTOMATIC1111, a bracket that is not closed changes the
    weight up to the end of the text, and one that was not opened is text."""
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
            pieces += _split_at_breaks(token)
    for bracket, factor in (("(", UP), ("[", DOWN)):
        ranges += [(start, len(pieces), factor) for start in opened[bracket]]
    return _merged(pieces, _weights(len(pieces), ranges))


def _split_at_breaks(text: str) -> list[str | None]:
    """The text before and after each BREAK, without the space next to it; None for the BREAK."""
    first, *others = _BREAK.split(text)
    pieces: list[str | None] = [first]
    for part in others:
        pieces[-1] = (pieces[-1] or "").rstrip()
        pieces += [None, part.lstrip()]
    return pieces


def _weights(count: int, ranges: list[tuple[int, int, float]]) -> list[float]:
    weights = np.ones(count)
    for start, stop, factor in ranges:
        weights[start:stop] = np.clip(weights[start:stop] * factor, -HUGE, HUGE)
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


_MARK = re.compile(r"\\.|[()\[\]:]", re.DOTALL)
_WHEN = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*")


@dataclass(frozen=True)
class _Edit:
    """A [from:to:when] from `start` to `stop` of a text. Up to `step` only the range `before` is
    kept of it, from then on only `after`."""

    step: int
    start: int
    stop: int
    before: tuple[int, int]
    after: tuple[int, int]


def schedule(text: str, num_steps: int) -> list[tuple[int, str]]:
    """The texts of a prompt with [from:to:when], [to:when] and [from::when], each with its first
    step.

    `when` is a number of steps if it is an integer above 0; otherwise a share of all steps, rounded
    down.
    """
    edits = list(_edits(text, num_steps))
    switches = sorted({0, *(edit.step for edit in edits if edit.step < num_steps)})
    texts = [(step, _at(text, edits, step)) for step in switches]
    return [pair for i, pair in enumerate(texts) if i == 0 or pair[1] != texts[i - 1][1]]


def _edits(text: str, num_steps: int) -> Iterator[_Edit]:
    """Innermost first. A colon inside round brackets belongs to a weight, not to an edit."""
    opened: list[tuple[str, list[int]]] = []  # a bracket, its place and those of its colons
    num_square = 0
    for match in _MARK.finditer(text):
        mark, place = match[0], match.start()
        if mark in ("(", "["):
            opened.append((mark, [place]))
            num_square += mark == "["
        elif mark == ":" and opened:
            opened[-1][1].append(place)
        elif mark == ")" and opened and opened[-1][0] == "(":
            opened.pop()
        elif mark == "]" and num_square:
            num_square -= 1
            if edit := _edit(text, _close_square(opened), place, num_steps):
                yield edit


def _close_square(opened: list[tuple[str, list[int]]]) -> list[int]:
    """The places of the last square bracket and of its colons. Round brackets that were opened
    after it and not closed are text, for example a smiley."""
    colons: list[int] = []
    while opened[-1][0] == "(":
        colons += opened.pop()[1][1:]
    start, *others = opened.pop()[1]
    return [start, *sorted(colons + others)]


def _edit(text: str, places: list[int], end: int, num_steps: int) -> _Edit | None:
    start, *colons = places
    when = _WHEN.fullmatch(text, colons[-1] + 1, end) if colons else None
    if when is None:
        return None
    between = colons[-2] if len(colons) > 1 else start
    before, after = (start + 1, max(between, start + 1)), (between + 1, colons[-1])
    return _Edit(_step(when[1], num_steps), start, end + 1, before, after)


def _at(text: str, edits: list[_Edit], step: int) -> str:
    """The text of one step, without what the edits remove there."""
    changes = [0] * (len(text) + 1)  # of the number of edits that remove a character
    for edit in edits:
        first, last = edit.before if step < edit.step else edit.after
        for start, stop in ((edit.start, first), (last, edit.stop)):
            changes[start] += 1
            changes[stop] -= 1
    return "".join(compress(text, (not removed for removed in accumulate(changes))))


def _step(when: str, num_steps: int) -> int:
    value = float(when)
    is_share = value < 1 or "." in when
    return int(min(value * num_steps if is_share else value, num_steps))
