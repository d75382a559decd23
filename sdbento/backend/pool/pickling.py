"""Pickles messages, with images and tensors beside the pickle: large ones would else be copied
while the interpreter's lock is held, and the event loop would stand still."""

from __future__ import annotations

import copyreg
import io
import pickle
from typing import Any

import torch
from PIL import Image

Buffer = bytes | memoryview
LAYERS = {"1", "L", "RGB", "RGBA"}  # modes of which the pixels are all there is


def dumps(message: object) -> list[Buffer]:
    """The pickle of a message, and the buffers that belong to it. It is not to be changed while
    these are in use."""
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    pickler = pickle.Pickler(file, 5, buffer_callback=buffers.append)
    pickler.dispatch_table = copyreg.dispatch_table.copy() | {
        torch.Tensor: _reduce_tensor,
        Image.Image: _reduce_image,
    }
    pickler.dump(message)
    return [file.getbuffer(), *(buffer.raw() for buffer in buffers)]


def loads(parts: list[Buffer]) -> Any:
    """The message that `dumps` made the parts of."""
    return pickle.loads(parts[0], buffers=parts[1:])


def _reduce_tensor(tensor: torch.Tensor) -> tuple[Any, ...]:
    return torch.from_numpy, (tensor.contiguous().numpy(),)


def _reduce_image(image: Image.Image) -> Any:
    if image.mode not in LAYERS:
        return image.__reduce_ex__(5)
    return Image.frombytes, (image.mode, image.size, pickle.PickleBuffer(image.tobytes()))
