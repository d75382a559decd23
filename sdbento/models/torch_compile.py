"""torch.compile for UNets, so that no request ever waits for a compiler.

A UNet is compiled while its model is measured, before the server is ready, for any size of images.
Afterwards nothing is compiled any more: a call that no compiled code fits (with a ControlNet, or of
a model that was never measured) runs uncompiled. Calls with LoRAs must go to `forward` itself,
because compiled code runs no hooks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.fx.experimental import _config as symbolic_shapes

from sdbento.environment import use_compile_dir

log = logging.getLogger(__name__)


def enable(unet: torch.nn.Module, folder: Path) -> None:
    """Let calls of `unet` use compiled code; `folder` keeps it from one process to the next."""
    use_compile_dir(folder)
    torch.compiler.set_stance("eager_on_recompile")
    unet.compile(dynamic=True)


@contextmanager
def allowed() -> Iterator[None]:
    """Within this context, calls of UNets that `enable` was given are compiled first.

    If that fails, everything runs uncompiled from then on.
    """
    # Without this, code compiled for a square image fits squares only: torch takes two sizes that
    # are equal at first to be always equal. (The module makes `patch` at run time.)
    any_size = symbolic_shapes.patch(use_duck_shape=False)  # type: ignore[attr-defined]
    try:
        with any_size, torch.compiler.set_stance("default"):
            yield
    except Exception as exc:
        log.error("UNets cannot be compiled here and run uncompiled: %s", exc)
        torch.compiler.set_stance("force_eager")
