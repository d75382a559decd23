"""Reads an image back: which shape, in which colour and size, on which background.

Knows nothing of the model; pixels in, a verdict out. Colours are compared with the palette, the
shape with a template of every shape that has the area and the centre of mass of the mask.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from draw import COLOURS, RADII, SHAPES, SIDE, Mask, Scene, mask_of

BORDER = 4
MAX_COLOUR_DISTANCE = 60.0
"""In RGB steps; the closest two colours of the palette, yellow and orange, are 73 apart."""
MIN_OVERLAP = 0.75

Pixels = NDArray[np.float32]
Colour = NDArray[np.float32]


@dataclass(frozen=True)
class Verdict:
    """What the image shows; None where it resembles nothing."""

    shape: str | None
    colour: str | None
    background: str | None
    size: str | None
    overlap: float


def nearest_colour(rgb: Colour) -> str | None:
    """The palette's colour closest to `rgb`, None if even that is far."""
    distances = {name: float(np.linalg.norm(rgb - value)) for name, value in COLOURS.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= MAX_COLOUR_DISTANCE else None


def border_colour(image: Pixels) -> Colour:
    """The median colour of the image's four edges."""
    inside = np.zeros(image.shape[:2], dtype=bool)
    inside[BORDER:-BORDER, BORDER:-BORDER] = True
    return np.median(image[~inside], axis=0).astype(np.float32)


def find_ink(image: Pixels, ground: Colour) -> tuple[Colour, Mask] | None:
    """The shape's colour and how much of each pixel it covers; None if the image is plain."""
    differs = np.linalg.norm(image - ground, axis=-1) > MAX_COLOUR_DISTANCE
    if differs.sum() < 0.01 * differs.size:
        return None
    ink = np.median(image[differs], axis=0).astype(np.float32)
    axis = ink - ground
    coverage = (image - ground) @ axis / max(1.0, float(axis @ axis))
    return ink, np.clip((coverage - 0.1) / 0.8, 0, 1).astype(np.float32)


def _moments(mask: Mask) -> tuple[float, float, float]:
    """Area in pixels and centre (x, y), as fractions of the side, of a mask."""
    area = max(1.0, float(mask.sum()))
    places = (np.arange(SIDE) + 0.5) / SIDE
    return area, float(mask.sum(axis=0) @ places) / area, float(mask.sum(axis=1) @ places) / area


@cache
def _unit(shape: str) -> tuple[float, float]:
    """Area in pixels of the shape at radius 1, and how far its centre of mass lies below `cy`."""
    area, _, y = _moments(mask_of(shape, 0.5, 0.5, 0.4))
    return area / 0.4**2, (y - 0.5) / 0.4


def _template(shape: str, mask: Mask) -> tuple[Mask, float]:
    """The shape with the mask's area and centre of mass, and its radius."""
    area, x, y = _moments(mask)
    unit_area, offset = _unit(shape)
    radius = math.sqrt(area / unit_area)
    return mask_of(shape, x, y - offset * radius, radius), radius


def overlap_of(mask: Mask, template: Mask) -> float:
    """Intersection over union of two soft masks."""
    return float(np.minimum(mask, template).sum() / np.maximum(mask, template).sum())


def fit_shape(mask: Mask) -> tuple[str, float, float]:
    """The shape whose template overlaps the mask best, its radius and the overlap."""
    fits = []
    for shape in SHAPES:
        template, radius = _template(shape, mask)
        fits.append((overlap_of(mask, template), shape, radius))
    overlap, shape, radius = max(fits)
    return shape, radius, overlap


def judge(image: Pixels) -> Verdict:
    """The verdict on one image, (128, 128, 3) in [0, 255]."""
    ground = border_colour(image)
    found = find_ink(image, ground)
    if found is None:
        return Verdict(None, None, nearest_colour(ground), None, 0.0)
    ink, mask = found
    shape, radius, overlap = fit_shape(mask)
    size = min(RADII, key=lambda name: abs(RADII[name] - radius))
    shape_or_none = shape if overlap >= MIN_OVERLAP else None
    return Verdict(shape_or_none, nearest_colour(ink), nearest_colour(ground), size, overlap)


def marks(verdict: Verdict, scene: Scene) -> dict[str, bool]:
    """Which aspects of the scene the image got right."""
    aspects = ("background", "colour", "shape", "size")
    return {name: getattr(verdict, name) == getattr(scene, name) for name in aspects}
