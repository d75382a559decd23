"""The edges that the ControlNet of `emoji` follows.

Apart from effects.py, because a machine that only trains the model may lack OpenCV.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdbento.images.preprocessors import canny


def edges_of(images: Tensor) -> Tensor:
    """White edges on black, (n, 1, side, side) bytes, of pictures (n, 3, side, side) in [-1, 1]."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    found = [np.asarray(canny(Image.fromarray(image)))[..., 0] for image in pixels]
    return torch.from_numpy(np.stack(found))[:, None]
