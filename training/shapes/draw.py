"""Drawings of coloured shapes and the captions people would type for them.

Knows nothing of torch or of the model: it hands out numpy masks, colours and strings.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

SIDE = 128
OVERSAMPLING = 4

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 50),
    "purple": (140, 60, 190),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
RADII = {"small": 0.19, "large": 0.36}
"""Radius of each size as a fraction of the image's side; a drawing varies it by 8 percent."""

STYLES = ("solid", "outline", "checker")
STROKE = 0.05
"""Width of an outline as a fraction of the image's side."""
CELL = 12 / 128
"""Side of a checker's cell as a fraction of the image's side; the cells lie on a fixed grid."""

SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big")}
OPENINGS = ("", "", "", "", "", "a picture of ", "a drawing of ", "an image of ")
BACKGROUNDS = (
    "on a {} background",
    "on a {} background",
    "on a {} background",
    "on {} background",
    "on the {} background",
    "on {}",
    "with a {} background",
    ", {} background",
)
NEGATIVES = ("blurry", "low quality", "text, watermark", "ugly", "photo", "noisy")
"""Words of habitual negative prompts; captions made of them are paired with any drawing, so that
the model takes them for an empty prompt."""

Mask = NDArray[np.float32]
Rng = np.random.Generator
Point = tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """What one drawing shows; `cx`, `cy` and `radius` are fractions of the image's side."""

    shape: str
    colour: str
    background: str
    size: str
    cx: float = 0.5
    cy: float = 0.5
    radius: float = 0.3


def default_background(colour: str) -> str:
    """The background of a caption that names none: plain white, unless the shape is white."""
    return "black" if colour == "white" else "white"


def _pick(rng: Rng, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def sample_scene(rng: Rng, background_named: bool = True) -> Scene:
    """A random scene; without a named background it stands on the default one."""
    colour = _pick(rng, tuple(COLOURS))
    others = tuple(name for name in COLOURS if name != colour)
    background = _pick(rng, others) if background_named else default_background(colour)
    size = _pick(rng, tuple(RADII))
    spread = 0.08 if size == "large" else 0.14
    cx, cy = 0.5 + rng.uniform(-spread, spread, 2)
    radius = RADII[size] * (1 + 0.08 * rng.uniform(-1, 1))
    return Scene(_pick(rng, SHAPES), colour, background, size, cx, cy, radius)


def _box(cx: float, cy: float, half_width: float, half_height: float) -> list[Point]:
    return [(cx - half_width, cy - half_height), (cx + half_width, cy + half_height)]


def _triangle(cx: float, cy: float, radius: float) -> list[Point]:
    foot = cy + radius * 0.8
    return [(cx, cy - radius), (cx - radius * 0.95, foot), (cx + radius * 0.95, foot)]


def _star(cx: float, cy: float, radius: float) -> list[Point]:
    spokes = [(radius if k % 2 == 0 else radius * 0.45, k * math.pi / 5) for k in range(10)]
    return [(cx + r * math.sin(angle), cy - r * math.cos(angle)) for r, angle in spokes]


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, cx: float, cy: float, r: float) -> None:
    if shape == "circle":
        pen.ellipse(_box(cx, cy, r, r), fill=255)
    elif shape == "square":
        pen.rectangle(_box(cx, cy, r * 0.88, r * 0.88), fill=255)
    elif shape == "triangle":
        pen.polygon(_triangle(cx, cy, r), fill=255)
    elif shape == "star":
        pen.polygon(_star(cx, cy, r), fill=255)
    elif shape == "ring":
        pen.ellipse(_box(cx, cy, r, r), fill=255)
        pen.ellipse(_box(cx, cy, r * 0.55, r * 0.55), fill=0)
    elif shape == "cross":
        pen.rectangle(_box(cx, cy, r, r * 0.35), fill=255)
        pen.rectangle(_box(cx, cy, r * 0.35, r), fill=255)
    else:
        raise ValueError(f"no such shape: {shape}")


def _fine_mask(shape: str, cx: float, cy: float, radius: float, side: int) -> Image.Image:
    """The shape in white on black, oversampled."""
    fine = side * OVERSAMPLING
    canvas = Image.new("L", (fine, fine))
    _draw_shape(ImageDraw.Draw(canvas), shape, cx * fine, cy * fine, radius * fine)
    return canvas


def _reduced(canvas: Image.Image) -> Mask:
    return np.asarray(canvas.reduce(OVERSAMPLING), dtype=np.float32) / np.float32(255)


def mask_of(shape: str, cx: float, cy: float, radius: float, side: int = SIDE) -> Mask:
    """Coverage of each pixel by the shape, (side, side) in [0, 1], with smooth edges."""
    return _reduced(_fine_mask(shape, cx, cy, radius, side))


def interior_of(
    shape: str, cx: float, cy: float, radius: float, depth: float, side: int = SIDE
) -> Mask:
    """Coverage by the part of the shape that lies at least `depth` from its edge."""
    canvas = _fine_mask(shape, cx, cy, radius, side)
    distance = ndimage.distance_transform_edt(np.asarray(canvas))
    deep = np.where(distance > depth * canvas.width, 255, 0).astype(np.uint8)
    return _reduced(Image.fromarray(deep))


def checkerboard(side: int = SIDE) -> Mask:
    """Ones and zeros in cells of `CELL`, (side, side)."""
    places = np.arange(side) // round(CELL * side)
    return ((places[:, None] + places) % 2).astype(np.float32)


def coverage_of(scene: Scene, side: int = SIDE, style: str = "solid") -> Mask:
    """How much of each pixel the shape's colour covers; the rest is background."""
    placed = (scene.shape, scene.cx, scene.cy, scene.radius)
    if style == "solid":
        return mask_of(*placed, side)
    if style == "outline":
        return mask_of(*placed, side) - interior_of(*placed, STROKE, side)
    if style == "checker":
        return mask_of(*placed, side) * checkerboard(side)
    raise ValueError(f"no such style: {style}")


def paint(scene: Scene, side: int = SIDE, style: str = "solid") -> NDArray[np.float32]:
    """The drawing of a scene, (side, side, 3) in [0, 255]."""
    mask = coverage_of(scene, side, style)[..., None]
    ink, ground = (np.array(COLOURS[name]) for name in (scene.colour, scene.background))
    return np.asarray(ground + mask * (ink - ground), dtype=np.float32)


def _article(rng: Rng, noun: str) -> str:
    if rng.random() < 0.3:
        return ""
    return "an " if noun[0] in "aeiou" else "a "


def caption_of(scene: Scene, rng: Rng, background_named: bool) -> str:
    """One of the ways to type the scene; the size is named in six captions of ten."""
    size = f"{_pick(rng, SIZE_WORDS[scene.size])} " if rng.random() < 0.6 else ""
    colour = "" if rng.random() < 0.03 else f"{scene.colour} "
    noun = f"{size}{colour}{scene.shape}"
    opening = _pick(rng, OPENINGS)
    caption = f"{opening}{_article(rng, noun)}{noun}"
    if not background_named:
        return caption
    return f"{caption} {_pick(rng, BACKGROUNDS).format(scene.background)}".replace(" ,", ",")


def unconditional_caption(rng: Rng) -> str:
    """A caption that says nothing: mostly empty, now and then a habitual negative prompt."""
    return _pick(rng, NEGATIVES) if rng.random() < 0.15 else ""


def sample_drawing(rng: Rng) -> tuple[Scene, str]:
    """A scene and its caption; three captions of ten leave the background to the default."""
    background_named = rng.random() < 0.7
    scene = sample_scene(rng, background_named)
    return scene, caption_of(scene, rng, background_named)
