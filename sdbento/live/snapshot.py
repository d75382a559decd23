"""Makes a snapshot of the running batch: out of the engine's requests and the last UNet calls.

A snapshot has everything in it; what of it a watcher may see is for `privacy` to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isinf

from sdbento.catalog.families import VAE_FACTOR
from sdbento.engine.handle import Handle
from sdbento.engine.trajectory import BatchKey, Owner, Stage, Trajectory
from sdbento.live.batch import Batch, BatchImage, BatchRequest, Lane, Left, Queue, Reason

MAX_WAITING = 100  # requests of which no image has begun; more are only counted


@dataclass(frozen=True)
class About:
    """What whoever submits a request tells of it; the engine passes it on unread."""

    prompt: str = ""
    sampler: str | None = None
    loras: tuple[str, ...] = ()
    num_controlnets: int = 0


@dataclass(frozen=True)
class Snapshot:
    """The batch with all names in it, and the owner of each request, by its number."""

    batch: Batch
    owners: Mapping[int, Owner]


@dataclass(frozen=True)
class Call:
    """The last UNet call of a lane, and how many steps each image had done after it."""

    rows: int
    seconds: float
    steps_done: Mapping[Trajectory, int]


@dataclass(frozen=True)
class Member:
    """An image that took part in its lane's last call."""

    handle: Handle
    image: int


Members = Mapping[Trajectory, Member]


def lane_of(key: BatchKey) -> BatchKey:
    """Whole and shallow steps of DeepCache are one lane: images go from one to the other."""
    return replace(key, shallow=False) if key.shallow else key


def members_of(handles: Sequence[Handle], calls: Mapping[BatchKey, Call]) -> Members:
    """The images that took part in their lane's last call and go on with the next."""
    return {
        trajectory: Member(handle, image)
        for handle, image, trajectory in _begun(handles)
        if trajectory.stage is Stage.STEP and trajectory in _steps_in(calls, trajectory)
    }


def queue_of(handles: Sequence[Handle], ends: Mapping[int, float]) -> Queue:
    """`ends`: seconds until each request is done, by its number."""
    images = [one for handle in handles for one in handle.trajectories]
    begun = [one for one in images if _has_begun(one)]
    return Queue(
        preparing=0,  # these are not the engine's
        requests=len(handles),
        images=len(images) - sum(one.finished for one in begun),
        waiting=len(images) - len(begun),
        eta=_seconds(max((ends.get(handle.number, inf) for handle in handles), default=0.0)),
    )


def lanes_of(
    handles: Sequence[Handle],
    calls: Mapping[BatchKey, Call],
    current: BatchKey | None,
    before: Members,
) -> tuple[Lane, ...]:
    """All lanes with images that have begun; `before`: who took part in the last snapshot."""
    images: dict[BatchKey, list[BatchImage]] = {}
    for handle, index, trajectory in _begun(handles):
        steps_done = _steps_in(calls, trajectory).get(trajectory)
        image = BatchImage(
            request=handle.number,
            image=index,
            step=trajectory.steps_done if steps_done is None else steps_done,
            num_steps=trajectory.steps_in_all,
            rows=0 if steps_done is None else _rows_at(trajectory, steps_done - 1),
            joined=steps_done is not None and trajectory not in before,
        )
        images.setdefault(lane_of(trajectory.key), []).append(image)
    return tuple(_lane(key, calls.get(key), key == current, images[key]) for key in images)


def requests_of(
    handles: Sequence[Handle], ends: Mapping[int, float], now: float
) -> Iterator[BatchRequest]:
    """Those that have begun, and the first of those that have not."""
    num_waiting = 0
    for handle in handles:
        if not any(_has_begun(one) for one in handle.trajectories):
            num_waiting += 1
            if num_waiting > MAX_WAITING:
                continue
        yield _request(handle, ends.get(handle.number, inf), now)


def left_since(before: Members, members: Members) -> Iterator[Left]:
    """Who took part before, and does so no more."""
    for trajectory, member in before.items():
        if trajectory not in members:
            yield Left(member.handle.number, member.image, _reason(trajectory, member.handle))


def _begun(handles: Sequence[Handle]) -> Iterator[tuple[Handle, int, Trajectory]]:
    for handle in handles:
        for index, trajectory in enumerate(handle.trajectories):
            if _has_begun(trajectory) and not trajectory.finished:
                yield handle, index, trajectory


def _has_begun(trajectory: Trajectory) -> bool:
    """Cheap, since it is asked of every image in the queue."""
    return trajectory.step > 0 or trajectory.state is not None or trajectory.pass_index > 0


def _steps_in(calls: Mapping[BatchKey, Call], trajectory: Trajectory) -> Mapping[Trajectory, int]:
    """Steps done by those who took part in the last call of the trajectory's lane."""
    call = calls.get(lane_of(trajectory.key))
    return {} if call is None else call.steps_done


def _rows_at(trajectory: Trajectory, step: int) -> int:
    """The UNet rows of a step, counted over all passes."""
    for one in trajectory.passes:
        if step < one.num_steps:
            return one.rows_at(step)
        step -= one.num_steps
    return 0


def _lane(key: BatchKey, call: Call | None, is_current: bool, images: list[BatchImage]) -> Lane:
    return Lane(
        model=key.model,
        width=key.latent_width * VAE_FACTOR,
        height=key.latent_height * VAE_FACTOR,
        text_chunks=key.text_chunks,
        token_merging_ratio=key.token_merging_ratio,
        rows=None if call is None else call.rows,
        seconds=None if call is None else round(call.seconds, 5),
        current=is_current,
        images=tuple(images),
    )


def _request(handle: Handle, end: float, now: float) -> BatchRequest:
    about = handle.about if isinstance(handle.about, About) else About()
    images = handle.trajectories
    begun = [one for one in images if _has_begun(one)]
    return BatchRequest(
        number=handle.number,
        yours=False,  # that depends on who watches
        prompt=about.prompt,
        sampler=about.sampler,
        loras=about.loras,
        num_loras=len(about.loras),
        num_controlnets=about.num_controlnets,
        num_images=len(images),
        num_waiting=len(images) - len(begun),
        num_done=sum(_has_no_step_left(one) for one in begun),
        waited=round(now - handle.submitted, 3),
        eta=_seconds(end),
    )


def _reason(trajectory: Trajectory, handle: Handle) -> Reason:
    if handle.done.done():
        return "ended" if handle.done.exception() is not None else "done"
    return "done" if _has_no_step_left(trajectory) else "paused"


def _has_no_step_left(trajectory: Trajectory) -> bool:
    return trajectory.finished or trajectory.steps_done == trajectory.steps_in_all


def _seconds(seconds: float) -> float | None:
    return None if isinf(seconds) else round(max(0.0, seconds), 3)
