"""torch.compile for UNets, so that no request ever waits for a compiler.

A UNet is compiled while its model is measured, before the server is ready: for images of the
model's own size and prompts of one chunk, and for any number of rows. Afterwards nothing is
compiled any more. Calls of any other kind (other sizes, longer prompts, with ControlNets, or of a
model that was never measured) run uncompiled. Calls with LoRAs must go to the UNet's `forward`
itself, because compiled code runs no hooks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdbento.environment import use_compile_dir
from sdbento.errors import is_sick

log = logging.getLogger(__name__)

Backend = str | Callable[..., Any]

TYPICAL_ROWS = 8  # four guided images: the compiler chooses its kernels by them


class CompiledUnet:
    """Stands in the UNet's place for calls: those that it was compiled for run compiled.

    `folder` keeps what is compiled from one process to the next.
    """

    def __init__(self, unet: Any, folder: Path, backend: Backend = "inductor") -> None:
        use_compile_dir(folder)
        self._unet = unet
        self._compiled: Callable[..., Any] = torch.compile(unet.forward, backend=backend)
        self._most_rows: dict[tuple[object, ...], int] = {}  # by what else tells calls apart
        self._compiling = False

    def compile(self, call: Callable[[int], object], max_rows: int) -> None:
        """Compile what `call(rows)` asks of the UNet, for 1 to `max_rows` rows; takes minutes.

        What cannot be compiled runs uncompiled. Raises what a GPU that has failed reports.
        """
        self._compiling = True
        try:
            for rows in _row_counts(max_rows):
                call(rows)
        except torch.OutOfMemoryError:
            most = max(self._most_rows.values(), default=0)
            log.warning("out of memory: the UNet runs compiled for up to %d rows", most)
        except Exception as error:
            if is_sick(error):
                raise
            log.error("the UNet cannot be compiled here and runs uncompiled: %s", error)
            self._most_rows.clear()
        finally:
            self._compiling = False

    def __call__(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **others: Any
    ) -> Any:
        """As the UNet's own call; `timestep` has an element a row, `return_dict` is False."""
        text = encoder_hidden_states
        if others.get("down_block_additional_residuals") is not None:
            return self._unet.forward(sample, timestep, text, **others)
        # The same arguments in every call: code that was compiled without one does not fit with it.
        others = {name: others.get(name) for name in ("added_cond_kwargs", "return_dict")}
        # Compiled code is made for one order in memory.
        sample = sample.contiguous(memory_format=_order(self._unet.conv_in.weight))
        rows = len(sample)
        kind = rows > 1, sample.shape[1:], text.shape[1:]
        most = self._most_rows.get(kind, 0)
        if self._compiling:
            _let_rows_vary(sample, timestep, text, *_added(others))
            output = self._compiled(sample, timestep, text, **others)
            self._most_rows[kind] = max(rows, most)
            return output
        if rows > most:
            return self._unet.forward(sample, timestep, text, **others)
        # The stance is the whole process's, so it is taken for this call only. It is a safeguard:
        # should torch take this call for a new one all the same, nobody waits for a compiler.
        with torch.compiler.set_stance("eager_on_recompile"):
            return self._compiled(sample, timestep, text, **others)


def _row_counts(max_rows: int) -> list[int]:
    """The typical number first; the others show whether the code fits these as well."""
    first = min(TYPICAL_ROWS, max_rows)
    others = {*(2**i for i in range(max_rows.bit_length())), max_rows} - {first}
    return [first, *sorted(others)]


def _let_rows_vary(*tensors: Tensor) -> None:
    """Have code compiled for any number of rows but one, for which torch makes code of its own."""
    for tensor in tensors:
        if len(tensor) > 1:
            torch._dynamo.mark_dynamic(tensor, 0)


def _added(others: dict[str, Any]) -> list[Tensor]:
    """SDXL's conditioning beside the text."""
    return [*(others.get("added_cond_kwargs") or {}).values()]


def _order(weight: Tensor) -> torch.memory_format:
    last = weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
