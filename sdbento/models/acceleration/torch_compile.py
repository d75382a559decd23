"""torch.compile for the blocks that UNets repeat, so that no request ever waits for a compiler.

Blocks that are alike share their code, so this takes a fraction of the time that a whole UNet does.
They are compiled while their model is measured, before the server is ready: for images of the
model's own size and prompts of one chunk, and for any number of rows. Afterwards nothing is
compiled any more. Blocks that are called with anything else (other sizes, longer prompts) run
uncompiled, and so do all blocks of a model that was never measured. Calls with LoRAs must go to the
UNet's `forward` itself, because compiled code runs no hooks.

Blocks around convolutions are left as they are where `channels_last.py` computes them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdbento.environment import use_compile_dir
from sdbento.errors import is_sick
from sdbento.models.acceleration.channels_last import Forward

log = logging.getLogger(__name__)

Backend = str | Callable[..., Any]

BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
MOST_KINDS = 128  # of blocks; torch would stop at 8, and SDXL has 13 kinds of resnets alone
TYPICAL_ROWS = 8  # four guided images: the compiler chooses its kernels by them


class CompiledUnet:
    """Stands in the UNet's place for calls: blocks that fit what was compiled run compiled.

    `folder` keeps what is compiled from one process to the next.
    """

    def __init__(self, unet: Any, folder: Path, backend: Backend = "inductor") -> None:
        use_compile_dir(folder)
        self._unet = unet
        self._blocks: dict[Any, Forward] = {
            block: torch.compile(block.forward, backend=backend)
            for block in unet.modules()
            if type(block).__name__ in BLOCKS and "forward" not in vars(block)
        }
        self._is_compiled = self._is_compiling = False

    def compile(self, call: Callable[[int], object], max_rows: int) -> None:
        """Compile what `call(rows)` asks of the UNet, for 1 to `max_rows` rows; takes long.

        What cannot be compiled runs uncompiled. Raises what a GPU that has failed reports.
        """
        from torch._inductor.virtualized import V  # the compiler, which is slow to import

        from sdbento.models.acceleration.long_rows import LongRows

        self._is_compiled = self._is_compiling = True
        try:
            with (
                torch._dynamo.config.patch(recompile_limit=MOST_KINDS),
                V.set_choices_handler(LongRows()),
            ):
                for rows in _row_counts(max_rows):
                    call(rows)
        except torch.OutOfMemoryError:
            log.warning("out of memory: not all of the UNet's blocks are compiled")
        except Exception as error:
            if is_sick(error):
                raise
            log.error("the UNet cannot be compiled here and runs uncompiled: %s", error)
            self._is_compiled = False
        finally:
            self._is_compiling = False

    def __call__(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **others: Any
    ) -> Any:
        """As the UNet's own call."""
        # Compiled code is made for one order in memory.
        sample = sample.contiguous(memory_format=_order(self._unet.conv_in.weight))
        arguments = sample, timestep, encoder_hidden_states
        if not self._is_compiled:
            return self._unet(*arguments, **others)
        # The stance is the whole process's, so it is taken for this call only. Nobody waits for a
        # compiler: what it was not asked for before runs uncompiled.
        stance = "default" if self._is_compiling else "eager_on_recompile"
        with self._with_compiled_blocks(), torch.compiler.set_stance(stance):
            return self._unet(*arguments, **others)

    @contextmanager
    def _with_compiled_blocks(self) -> Iterator[None]:
        for block, forward in self._blocks.items():
            block.forward = _for_any_rows(forward) if self._is_compiling else forward
        try:
            yield
        finally:
            for block in self._blocks:
                del block.forward  # its class's is back


def _row_counts(max_rows: int) -> list[int]:
    """The typical number first; most others show whether the code fits these as well. For one row
    there is code of its own; only images without guidance come alone, so it is the last."""
    first = min(TYPICAL_ROWS, max_rows)
    others = {*(2**i for i in range(max_rows.bit_length())), max_rows} - {first}
    return [first, *sorted(others, key=lambda rows: (rows == 1, rows))]


def _for_any_rows(forward: Forward) -> Forward:
    """Have it compiled for any number of rows but one, for which torch makes code of its own."""

    def call(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and len(value) > 1:
                torch._dynamo.mark_dynamic(value, 0)
        return forward(*args, **kwargs)

    return call


def _order(weight: Tensor) -> torch.memory_format:
    last = weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
