"""Words that people add to a prompt and that change nothing in an icon.

Without them in its captions, the model would take "a robot, highly detailed" for something that it
has never seen. wording.json lists usual ones; for all others stand words that do not exist.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

WORDS: dict[str, list[str]] = json.loads((Path(__file__).parent / "wording.json").read_text())
VOWELS, CONSONANTS = "aeiouy", "bcdfghjklmnprstvwz"

Rng = np.random.Generator
T = TypeVar("T")


def pick(rng: Rng, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def adjective(rng: Rng) -> str:
    return _unknown(rng) if rng.random() < 0.3 else pick(rng, WORDS["adjectives"])


def worded(rng: Rng, caption: str) -> str:
    """A caption with up to five things more to say; now and then with a full stop."""
    kind = rng.random()
    if kind < 0.3:
        caption = f"{pick(rng, WORDS['openings'])} {caption}"
    elif kind < 0.6:
        caption = f"{_unknown(rng)}{pick(rng, (' ', ': ', ', '))}{caption}"
    if rng.random() < 0.35:
        caption = f"{caption} {pick(rng, WORDS['settings'])}"
    for _ in range(int(rng.integers(4))):
        ending = _unknown(rng) if rng.random() < 0.25 else pick(rng, WORDS["endings"])
        caption = f"{ending}, {caption}" if rng.random() < 0.15 else f"{caption}, {ending}"
    return f"{caption}." if rng.random() < 0.1 else caption


def _unknown(rng: Rng) -> str:
    """One to three words that do not exist; sometimes a number is among them."""
    words = [_unknown_word(rng) for _ in range(int(rng.integers(1, 4)))]
    if rng.random() < 0.1:
        words.append(str(int(rng.integers(1, 3000))))
    return " ".join(words)


def _unknown_word(rng: Rng) -> str:
    """Two to four syllables, of which some end in a consonant."""
    return "".join(
        pick(rng, CONSONANTS)
        + pick(rng, VOWELS)
        + (pick(rng, CONSONANTS) if rng.random() < 0.4 else "")
        for _ in range(int(rng.integers(2, 5)))
    )
