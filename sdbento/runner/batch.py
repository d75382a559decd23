"""The images of one step as the host knows them: whose rows they are, and their numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sdbento.engine.trajectory import BatchKey, Trajectory
from sdbento.models.pipeline import Pipeline
from sdbento.runner.numbers import Layout, Numbers, host_numbers
from sdbento.runner.rows import Row
from sdbento.runner.state import state_of
from sdbento.runner.step import Guidance
from sdbento.runner.unet.call import is_plain


@dataclass(frozen=True, eq=False)
class Batch:
    """A UNet call and what surrounds it. Its first rows are those of the images with their prompts,
    in order; the rows with the negative prompts of guided images follow."""

    pipeline: Pipeline
    key: BatchKey
    num_slots: int
    rows: tuple[Row, ...]
    guidance: Guidance
    write: Callable[[Numbers], None]  # its numbers, into fields of zeros
    owners: tuple[Trajectory, ...] = ()  # of the rows; none of random rows

    @property
    def is_plain(self) -> bool:
        """Whether the UNet call consists of nothing but the UNet."""
        return is_plain(self.owners)

    def numbers(self, layout: Layout) -> Numbers:
        """On the host; `layout` may have room for more rows, images and slots than there are."""
        numbers = host_numbers(layout, self.pipeline.device)
        self.write(numbers)
        return numbers


def batch_of(trajectories: Sequence[Trajectory]) -> Batch:
    """The next step of trajectories that share a key."""
    guided = [trajectory for trajectory in trajectories if trajectory.rows == 2]
    rows = [state_of(trajectory).row(trajectory.step) for trajectory in trajectories]
    rows += [state_of(trajectory).negative_row(trajectory.step) for trajectory in guided]
    return Batch(
        pipeline=trajectories[0].pipeline,
        key=trajectories[0].key,
        num_slots=max(trajectory.inputs.table.num_slots for trajectory in trajectories),
        rows=tuple(rows),
        guidance=Guidance(
            guided=bool(guided),
            rescaled=any(trajectory.inputs.guidance_rescale > 0 for trajectory in guided),
        ),
        write=lambda numbers: _write(numbers, trajectories),
        owners=(*trajectories, *guided),
    )


def random_batch(pipeline: Pipeline, key: BatchKey, row: Row, num_rows: int) -> Batch:
    """Unguided images in the middle of their way, for measuring."""

    def write(numbers: Numbers) -> None:
        numbers.timesteps.fill_(500.0)
        numbers.input_scale.fill_(1.0)
        torch.arange(num_rows, out=numbers.image_of_row[:num_rows])

    guidance = Guidance(guided=False, rescaled=False)
    return Batch(pipeline, key, 1, (row,) * num_rows, guidance, write)


def _write(numbers: Numbers, trajectories: Sequence[Trajectory]) -> None:
    timesteps, scales = numbers.timesteps.numpy(), numbers.input_scale.numpy()
    images, negatives = numbers.image_of_row.numpy(), numbers.negative_row.numpy()
    guidance, rescale = numbers.guidance_scale.numpy(), numbers.guidance_rescale.numpy()
    matrices = numbers.matrices.numpy()
    row = len(trajectories)  # the first with a negative prompt
    for i, trajectory in enumerate(trajectories):
        table, step = trajectory.inputs.table, trajectory.step
        timesteps[i], scales[i] = table.timesteps.numpy()[step], table.input_scale.numpy()[step]
        images[i] = negatives[i] = i
        guidance[i] = 1.0
        slots = table.num_slots
        matrices[i, :slots, : slots + 1] = table.matrices.numpy()[step]
        if trajectory.rows == 2:
            timesteps[row], scales[row], images[row] = timesteps[i], scales[i], i
            negatives[i] = row
            guidance[i] = trajectory.inputs.guidance_scale
            rescale[i] = trajectory.inputs.guidance_rescale
            row += 1
