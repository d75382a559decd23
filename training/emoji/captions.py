"""Scenes of one or two icons, and the captions that people would type for them.

Also says what is held out: combinations and icons that training never shows, so that score.py can
ask for them. Knows nothing of pixels or torch.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from training.emoji.icons import Icon
from training.emoji.wording import Rng, adjective, pick, worded

COLOURS = {
    "white": (255, 255, 255),
    "black": (20, 20, 20),
    "grey": (140, 140, 140),
    "red": (215, 45, 45),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 60),
    "green": (60, 165, 75),
    "blue": (45, 90, 215),
    "light blue": (150, 205, 245),
    "purple": (130, 65, 185),
    "pink": (245, 150, 190),
    "brown": (125, 80, 50),
}
DEFAULT_BACKGROUND = "white"
DEFAULT_STYLE = "3d"
"""What a caption means that names no style."""
STYLES = {
    "3d": ("3d style", "3d", "3d render", "in 3d style"),
    "flat": ("flat style", "flat", "flat design", "in flat style"),
    "noto": ("noto style", "noto", "cartoon style", "in noto style"),
    "twemoji": ("twemoji style", "twemoji", "simple style", "in twemoji style"),
}
OPENINGS = ("", "", "", "", "", "", "a picture of ", "an icon of ", "an emoji of ", "a drawing of ")
BACKGROUNDS = (
    "on a {} background",
    "on a {} background",
    "on a {} background",
    "on {} background",
    "on {}",
    "with a {} background",
    ", {} background",
)
JOINTS = ("and", "and", "and", "next to", "beside")
SIZES = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
SIDES = {"small": 0.42, "large": 0.92}
"""Side of an icon as a part of the picture's side; without a word it is ORDINARY."""
ORDINARY = (0.74, 0.78)
WOBBLE = 0.01
"""How far from its place an icon may be. Were it more, captions would tell less of the latents."""
PLACED, PAIRED = 0.42, 0.46
PLACES = {
    "on the left": (0.26, 0.5),
    "on the right": (0.74, 0.5),
    "at the top": (0.5, 0.26),
    "at the bottom": (0.5, 0.74),
}
NEGATIVES = ("blurry", "low quality", "text, watermark", "ugly", "photo", "noisy", "deformed")
"""Habitual negative prompts, which the model takes for an empty prompt."""
HELD_OUT = 20
"""One in so many is held out."""
ADDED, DESCRIBED, SEVERAL = 0.35, 0.15, 0.04
"""Of the captions so many have words that change nothing; of the nouns, so many an adjective that
does not, or a plural, which shows one thing all the same."""

Box = tuple[float, float, float]
"""Centre and side of an icon, as parts of the picture's side."""


@dataclass(frozen=True)
class Scene:
    """What one picture shows: indices of its icons, left to right, and where they are."""

    icons: tuple[int, ...]
    boxes: tuple[Box, ...]
    background: str
    caption: str


def _one_in(count: int, *words: str) -> bool:
    return zlib.crc32("|".join(words).encode()) % count == 0


def is_held_out_combination(icon: Icon, background: str) -> bool:
    """Whether training never shows this icon on this background."""
    return _one_in(HELD_OUT, icon.name, background, icon.style)


def held_out_icons(icons: Sequence[Icon]) -> frozenset[int]:
    """Icons that training never shows: one style each of 5% of the names that have several."""
    styles: dict[str, dict[str, int]] = defaultdict(dict)
    for index, icon in enumerate(icons):
        styles[icon.name][icon.style] = index
    chosen = []
    for name, own in styles.items():
        if len(own) > 1 and _one_in(HELD_OUT, name, "one style"):
            names = sorted(own)
            chosen.append(own[names[zlib.crc32(name.encode()) % len(names)]])
    return frozenset(chosen)


class Catalogue:
    """The icons that may be shown in training, by style."""

    def __init__(self, icons: Sequence[Icon]) -> None:
        self.icons = icons
        self.names = {name for icon in icons for name in (icon.name, *icon.synonyms)}
        self.held_out = held_out_icons(icons)
        self.by_style: dict[str, list[int]] = defaultdict(list)
        for index, icon in enumerate(icons):
            if index not in self.held_out:
                self.by_style[icon.style].append(index)

    def sample(self, rng: Rng) -> Scene:
        """A random scene with its caption; one in ten says nothing."""
        style = pick(rng, [*self.by_style])
        style_named = style != DEFAULT_STYLE or rng.random() < 0.5
        count = 2 if rng.random() < 0.15 else 1
        chosen = tuple(pick(rng, self.by_style[style]) for _ in range(count))
        background = self._background(rng, chosen)
        nouns = [self._noun(rng, self.icons[index]) for index in chosen]
        subject, boxes = _pair(rng, nouns) if count == 2 else _single(rng, nouns[0])
        caption = _caption(rng, subject, background, style if style_named else None)
        if rng.random() < 0.1:
            caption = pick(rng, NEGATIVES) if rng.random() < 0.15 else ""
        return Scene(chosen, boxes, background, caption)

    def _background(self, rng: Rng, chosen: tuple[int, ...]) -> str:
        """White as often as all other colours together, and nothing that is held out."""
        names = [
            name
            for name in COLOURS
            if not any(is_held_out_combination(self.icons[index], name) for index in chosen)
        ]
        if DEFAULT_BACKGROUND in names and rng.random() < 0.4:
            return DEFAULT_BACKGROUND
        return pick(rng, names or [DEFAULT_BACKGROUND])

    def _noun(self, rng: Rng, icon: Icon) -> str:
        """The icon's name, now and then a word that means the same, usually with an article."""
        named = icon.name
        if icon.synonyms and rng.random() < 0.15:
            named = pick(rng, icon.synonyms)
        if rng.random() < DESCRIBED:
            described = f"{adjective(rng)} {named}"
            named = named if described in self.names else described  # no "hot dog" for a dog
        if rng.random() < SEVERAL:
            return f"{named}s"
        return named if rng.random() < 0.35 else with_article(named)


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def background_words(pattern: str, colour: str) -> str:
    """One of BACKGROUNDS with a colour in it: "on an orange background"."""
    if " a {}" in pattern:
        return pattern.replace("a {}", with_article(colour))
    return pattern.format(colour)


def _single(rng: Rng, noun: str) -> tuple[str, tuple[Box, ...]]:
    """One icon; its size is named in 16 of 100 captions, its place in 10."""
    kind = rng.random()
    wobble = float(rng.uniform(-WOBBLE, WOBBLE))
    if kind < 0.16:
        size = "small" if kind < 0.08 else "large"
        article, _, rest = noun.partition(" ")
        word = pick(rng, SIZES[size])
        named = f"a {word} {rest}" if article in ("a", "an") else f"{word} {noun}"
        return named, ((0.5 + wobble, 0.5 - wobble, SIDES[size] + wobble),)
    if kind < 0.26:
        place = pick(rng, [*PLACES])
        x, y = PLACES[place]
        return f"{noun} {place}", ((x + wobble, y + wobble, PLACED),)
    return noun, ((0.5 + wobble, 0.5 - wobble, float(rng.uniform(*ORDINARY))),)


def _pair(rng: Rng, nouns: list[str]) -> tuple[str, tuple[Box, ...]]:
    wobble = float(rng.uniform(-WOBBLE, WOBBLE))
    boxes = ((0.26 + wobble, 0.5, PAIRED), (0.74 + wobble, 0.5, PAIRED))
    return f"{nouns[0]} {pick(rng, JOINTS)} {nouns[1]}", boxes


def _caption(rng: Rng, subject: str, background: str, style: str | None) -> str:
    caption = pick(rng, OPENINGS) + subject
    if background != DEFAULT_BACKGROUND or rng.random() < 0.3:
        caption = f"{caption} {background_words(pick(rng, BACKGROUNDS), background)}"
        caption = caption.replace(" ,", ",")
    if rng.random() < ADDED:
        caption = worded(rng, caption)
    if style is None:
        return caption
    word = pick(rng, STYLES[style])
    return f"{word}, {caption}" if rng.random() < 0.15 else f"{caption}, {word}"
