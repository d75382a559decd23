"""DeepCache (Ma et al. 2023): some steps compute only the outermost blocks of a UNet.

What the deep blocks make changes little from one step to the next. So a whole step keeps what the
last up block reads from below (the features), and in the shallow steps that follow only the first
down block and the last up block are computed, with these features between them. Knows neither steps
nor trajectories.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def kept_features(unet: Any) -> Iterator[list[Tensor]]:
    """Inside the `with` block every call of `unet.forward` appends its features, [R, C, h, w]."""
    kept: list[Tensor] = []

    def keep(_block: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append(kwargs["hidden_states"])

    handle = unet.up_blocks[-1].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield kept
    finally:
        handle.remove()


def shallow(unet: Any, features: Tensor) -> Any:
    """A UNet that computes the outermost blocks of `unet` around `features`, [R, C, h, w].

    It is called as `unet` is, with the R rows that the features are of, in their order. Its blocks
    are those of `unet`, with whatever hooks they have.
    """
    first = _replaced(unet.down_blocks[0], downsamplers=None)  # its output is not read
    return _replaced(
        unet,
        down_blocks=nn.ModuleList([first]),
        mid_block=_Kept(features),
        up_blocks=nn.ModuleList([unet.up_blocks[-1]]),
    )


class _Kept(nn.Module):
    """Stands where the deep blocks were."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features

    def forward(self, _hidden_states: Tensor, _time_embedding: Tensor) -> Tensor:
        return self.features


def _replaced(module: nn.Module, **parts: nn.Module | None) -> nn.Module:
    """`module` with other parts; the rest is shared, and `module` stays as it is."""
    other = copy.copy(module)
    other._modules = {**module._modules, **parts}
    return other
