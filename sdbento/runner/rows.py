"""What the UNet reads beside latents and timestep: of one row, and of all rows of a call.

It is on the device from the beginning of a pass to its end. The rows of a call are put together
only where they are others than those of the call before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sdbento.models.pipeline import Pipeline


@dataclass(frozen=True, eq=False)
class Row:
    """One row. Compared by identity: it does not change while its prompt lasts."""

    embeds: Tensor  # [1, 77 * chunks, D]
    pooled: Tensor | None = None  # [1, P], SDXL
    time_ids: Tensor | None = None  # [1, 6], SDXL; 5 for its refiner
    # [1, 1 + C, h, w], what a 9-channel UNet reads after the latents: mask and masked image
    mask_channels: Tensor | None = None


@dataclass(frozen=True, eq=False)
class StackedRows:
    """The same of R rows, in their order."""

    embeds: Tensor
    pooled: Tensor | None
    time_ids: Tensor | None
    mask_channels: Tensor | None

    @property
    def added_conditioning(self) -> dict[str, Tensor] | None:
        """SDXL's `added_cond_kwargs`; None for the other families."""
        if self.pooled is None or self.time_ids is None:
            return None
        return {"text_embeds": self.pooled, "time_ids": self.time_ids}

    def select(self, index: Tensor) -> StackedRows:
        """The rows of `index`, in its order."""
        return self._each(lambda part: part.index_select(0, index))

    def padded(self, num_rows: int) -> StackedRows:
        """Memory for `num_rows` rows of this kind, filled with zeros."""
        return self._each(lambda part: part.new_zeros(num_rows, *part.shape[1:]))

    def copy_(self, rows: StackedRows) -> None:
        """Overwrite the first rows."""
        for own, other in zip(self, rows, strict=True):
            if own is not None and other is not None:
                own[: len(other)].copy_(other)

    def _each(self, make: Callable[[Tensor], Tensor]) -> StackedRows:
        embeds, *others = (None if part is None else make(part) for part in self)
        assert embeds is not None
        return StackedRows(embeds, *others)

    def __iter__(self) -> Iterator[Tensor | None]:
        return iter((self.embeds, self.pooled, self.time_ids, self.mask_channels))


def stack(rows: Sequence[Row]) -> StackedRows:
    """Put rows of one model and size together."""
    return StackedRows(
        torch.cat([row.embeds for row in rows]),
        _cat([row.pooled for row in rows]),
        _cat([row.time_ids for row in rows]),
        _cat([row.mask_channels for row in rows]),
    )


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


class RowStacker:
    """Remembers the rows of each model's last call."""

    def __init__(self) -> None:
        self._last: WeakKeyDictionary[Pipeline, tuple[tuple[Row, ...], StackedRows]] = (
            WeakKeyDictionary()
        )

    def stack(self, pipeline: Pipeline, rows: tuple[Row, ...]) -> StackedRows:
        last = self._last.get(pipeline)
        if last is None or last[0] != rows:
            last = self._last[pipeline] = rows, stack(rows)
        return last[1]
