"""The UNet call of a step: with ControlNets, adapters, merged tokens and DeepCache.

Compiled code runs no hooks, so whatever needs some calls `forward` itself.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sdbento.engine.trajectory import Trajectory
from sdbento.lora.hooks import active_adapters
from sdbento.models.acceleration.attention import using
from sdbento.models.pipeline import Pipeline
from sdbento.runner.controlnets import compute_residuals
from sdbento.runner.rows import StackedRows
from sdbento.runner.state import state_of
from sdbento.runner.unet.deep_cache import kept_features, shallow
from sdbento.runner.unet.token_merging import merged_tokens


def call_unet(
    pipeline: Pipeline,
    owners: Sequence[Trajectory],
    latents: Tensor,
    timesteps: Tensor,
    rows: StackedRows,
) -> Tensor:
    """The model's output for all rows, in float32. `owners` are the trajectories that the rows
    belong to, with their adapters and ControlNets; empty for random rows."""
    residuals = compute_residuals(owners, rows, latents, timesteps)
    if rows.mask_channels is not None:
        latents = torch.cat([latents, rows.mask_channels], dim=1)
    with using(pipeline.attention), _prepared(pipeline, owners) as unet:
        output: Tensor = unet(
            latents.to(pipeline.dtype),
            timesteps,
            rows.embeds,
            added_cond_kwargs=rows.added_conditioning,
            down_block_additional_residuals=residuals and residuals.down,
            mid_block_additional_residual=residuals and residuals.middle,
            return_dict=False,
        )[0]
    return output.float()


def is_plain(owners: Sequence[Trajectory]) -> bool:
    """Whether the call consists of nothing but the UNet."""
    return not any(
        owner.inputs.adapters
        or owner.inputs.controls
        or owner.key.shallow
        or owner.key.token_merging_ratio
        or _keeps(owner)
        for owner in owners
    )


@contextmanager
def _prepared(pipeline: Pipeline, owners: Sequence[Trajectory]) -> Iterator[Any]:
    """What to call, once, in place of the UNet."""
    unet, plain = pipeline.unet, pipeline.compiled or pipeline.unet
    if not owners:
        yield plain
        return
    key, adapters = owners[0].key, [owner.inputs.adapters for owner in owners]
    ratio, size = key.token_merging_ratio, (key.latent_height, key.latent_width)
    with active_adapters(unet, "unet", adapters), merged_tokens(unet, ratio, *size):
        if key.shallow:
            yield shallow(unet, _features(owners))
        elif any(map(_keeps, owners)):
            with kept_features(unet) as kept:
                yield unet.forward
            _keep(kept[0], owners)
        else:
            yield unet.forward if any(adapters) or ratio else plain


def _keeps(owner: Trajectory) -> bool:
    """Whether its next step goes on with this one's features."""
    return owner.current.is_shallow(owner.step + 1)


def _keep(features: Tensor, owners: Sequence[Trajectory]) -> None:
    """Where the rest of the step fails, another try keeps them anew."""
    kept: dict[Trajectory, list[Tensor]] = defaultdict(list)
    for row, owner in zip(features, owners, strict=True):
        if _keeps(owner):
            kept[owner].append(row)
    for owner, rows in kept.items():
        state_of(owner).features = torch.stack(rows)  # not a view, which would keep all rows


def _features(owners: Sequence[Trajectory]) -> Tensor:
    """[R, C, h, w]: what was kept for these rows."""
    num_taken = Counter[Trajectory]()
    rows = []
    for owner in owners:
        kept = state_of(owner).features
        assert kept is not None  # the first step of a pass is never shallow
        rows.append(kept[num_taken[owner]])
        num_taken[owner] += 1
    return torch.stack(rows)
