"""The same noise in every precision, so that images of two precisions can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

HALF = (torch.float16, torch.bfloat16)


class RoundedNoise(TorchFunctionMode):
    """Inside the `with` block this thread draws half-precision noise in float32, and rounds it.

    torch 2.13 does so by itself. Before, a seed gave unrelated numbers in each precision (seen with
    2.11), and so other images.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        dtype = options.get("dtype")
        if func is not torch.randn or dtype not in HALF:
            return func(*args, **options)
        return func(*args, **options | {"dtype": torch.float32}).to(dtype)
