"""torch.compile for UNets, so that no request ever waits for a compiler.

A UNet is compiled while its model is measured, before the server is ready, for any size of images.
Afterwards nothing is compiled any more: a call that fits nothing compiled (with a ControlNet, of a
model that was never measured) runs as it is. Calls with LoRAs must go to `forward` itself: what is
compiled has no hooks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.fx.experimental import _config as symbolic_shapes

from sdbento.settings import use_compile_dir

log = logging.getLogger(__name__)


def enable(unet: torch.nn.Module, folder: Path) -> None:
    """Let calls of `unet` use what is compiled for them; `folder` keeps it between processes."""
    use_compile_dir(folder)
    torch.compiler.set_stance("eager_on_recompile")
    unet.compile(dynamic=True)


@contextmanager
def allowed() -> Iterator[None]:
    """Calls in here are compiled first, where that was enabled. Where it fails nothing ever is."""
    # Else what is compiled for a square fits squares only. The module makes `patch` at run time.
    any_size = symbolic_shapes.patch(use_duck_shape=False)  # type: ignore[attr-defined]
    try:
        with any_size, torch.compiler.set_stance("default"):
            yield
    except Exception as exc:
        log.error("UNets cannot be compiled here, they run as they are: %s", exc)
        torch.compiler.set_stance("force_eager")
