"""ControlNet residuals of the rows of one UNet call. Runs on the engine's thread.

A ControlNet runs on its own rows only. Its residuals, times each row's scale, are added to those
rows; all other rows get zeros, which is what a UNet without a ControlNet adds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sdbento.engine.inputs import within
from sdbento.engine.trajectory import Trajectory
from sdbento.models.acceleration.attention import using
from sdbento.models.device import upload
from sdbento.models.pipeline import ControlNet
from sdbento.runner.rows import StackedRows
from sdbento.runner.state import state_of


@dataclass(frozen=True, eq=False)
class Residuals:
    """What is added to the UNet's skip connections and to its middle block, all rows."""

    down: list[torch.Tensor]
    middle: torch.Tensor


@dataclass(frozen=True, eq=False)
class _Use:
    """One ControlNet on one row."""

    row: int
    image: torch.Tensor
    scale: float


def compute_residuals(
    owners: Sequence[Trajectory],
    rows: StackedRows,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
) -> Residuals | None:
    """`owners[i]` is the trajectory that row i of `latents` [R, C, h, w] belongs to."""
    total: Residuals | None = None
    for network, uses in _uses(owners).items():
        index = upload([use.row for use in uses], torch.int64, network.device)
        residuals = _run(network, uses, rows.select(index), latents[index], timesteps[index])
        scale = upload([use.scale for use in uses], network.dtype, network.device)
        scaled = [residual * scale[:, None, None, None] for residual in residuals]
        if total is None:
            zeros = [r.new_zeros(len(owners), *r.shape[1:]) for r in residuals]
            total = Residuals(zeros[:-1], zeros[-1])
        for sum_, residual in zip([*total.down, total.middle], scaled, strict=True):
            sum_.index_add_(0, index, residual.to(sum_.dtype))
    return total


def _uses(owners: Sequence[Trajectory]) -> dict[ControlNet, list[_Use]]:
    uses: dict[ControlNet, list[_Use]] = defaultdict(list)
    for row, owner in enumerate(owners):
        for control, image in zip(owner.inputs.controls, state_of(owner).controls, strict=True):
            if within(owner.step, owner.current.num_steps, control.start, control.end):
                uses[control.network].append(_Use(row, image, control.scale))
    return uses


def _run(
    network: ControlNet,
    uses: Sequence[_Use],
    rows: StackedRows,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
) -> list[torch.Tensor]:
    """The network's residuals for the rows that use it, the middle block's last."""
    with using(network.attention):
        down, middle = network.module(
            latents.to(network.dtype),
            timesteps,
            encoder_hidden_states=rows.embeds,
            controlnet_cond=torch.cat([use.image for use in uses]),
            added_cond_kwargs=rows.added_conditioning,
            return_dict=False,
        )
    return [*down, middle]
