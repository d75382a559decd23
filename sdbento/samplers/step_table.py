"""A diffusers scheduler as a table of matrices, so that one matmul advances any sampler.

Nearly every scheduler of Stable Diffusion is an affine state machine. With x the latents, o the
model output, s the scheduler's own memory and n fresh noise, step i is

    [x', s'] = A_i [x, o, s] + c_i n

A_i and c_i are read off the real scheduler by stepping it on basis vectors in float64; after every
step its memory is replaced by basis vectors. No scheduler is reimplemented here. A finished table
must replay a real run of the scheduler before it is used, and so a scheduler that is not affine is
refused.

Knows nothing of sampler names, requests or models.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from sdbento.errors import InvalidParameter, UnsupportedSampler

TOLERANCE = 1e-5  # of the replay; a scheduler that computes in float32 stays below 1e-6

# Columns of a basis vector. A constant, which belongs to none of them, shows in the last.
_LATENTS, _OUTPUT, _MEMORY, _NOISE, _NOTHING = 0, 1, 2, 12, 15
_COLUMNS = 16
_SAMPLES = 64  # random latents that are stepped together with the basis, for the replay


@dataclass(frozen=True, eq=False)
class StepTable:
    """A compiled sampler: n UNet evaluations with S memory slots, all tensors float32 on the CPU.

    Slot 0 is the latents, slots 1..S are the scheduler's memory, zero before the first step.
    A trajectory starts from noise * init_noise_sigma, or with an image x0 from
    x0 * start_signal + noise * start_noise. After step i, x0 * kept_signal[i] + noise *
    kept_noise[i] is as noisy as the latents: inpainting puts it back outside of its mask.
    """

    timesteps: torch.Tensor  # [n], as the UNet reads them
    input_scale: torch.Tensor  # [n], what the latents are multiplied with for the UNet
    matrices: torch.Tensor  # [n, 1+S, 2+S]; columns: latents, model output, memory
    noise: torch.Tensor  # [n, 1+S], coefficients of the last noise that a step draws
    draws: tuple[int, ...]  # [n], number of noises drawn, also of those with coefficients of zero
    draws_in_fp32: bool  # whatever the model computes in; else in the precision of the model
    init_noise_sigma: float
    start_signal: float
    start_noise: float
    kept_signal: torch.Tensor  # [n]
    kept_noise: torch.Tensor  # [n]

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @property
    def num_slots(self) -> int:
        return self.matrices.shape[1]


@dataclass
class _Step:
    """One step as read off, in float64. `rows` are x' and then the memory after the step."""

    timestep: float
    input_scale: float
    rows: torch.Tensor  # [1 + new memory, 2 + old memory]
    noise: torch.Tensor  # [1 + new memory]
    draws: list[torch.Tensor]  # each [_SAMPLES], the noise added to the samples
    draws_in_fp32: bool
    samples: torch.Tensor  # [_SAMPLES], after the step
    kept: tuple[float, float] = (1.0, 0.0)  # signal and noise of add_noise at the next timestep


@dataclass(frozen=True)
class Window:
    """Which part of a schedule is run.

    `start` is the number of steps left out at the beginning, which img2img pipelines compute from
    their strength. The others divide the steps between SDXL's base and refiner: shares of the
    training timesteps, named as in diffusers.
    """

    start: int = 0
    denoising_start: float | None = None
    denoising_end: float | None = None


WHOLE = Window()


def read_table(scheduler: Any, window: Window = WHOLE, eta: float = 0.0) -> StepTable:
    """Compile a scheduler whose timesteps are set and that has not stepped yet.

    The scheduler cannot be used afterwards. `eta` is passed on if its step has that parameter.
    Raises UnsupportedSampler if the scheduler is not affine, InvalidParameter for a window without
    steps, and whatever the scheduler itself raises.
    """
    timesteps = _begin(scheduler, window)
    signal, start_noise = _noising(scheduler, timesteps)
    generator = torch.Generator().manual_seed(0)
    first = float(scheduler.init_noise_sigma) * _randn(generator)
    steps = _read_steps(scheduler, timesteps, first, generator, eta)
    _drop_dead_memory(steps)
    matrices, noise = _pack(steps)
    table = StepTable(
        timesteps=torch.tensor([step.timestep for step in steps]),
        input_scale=torch.tensor([step.input_scale for step in steps]),
        matrices=matrices.float(),
        noise=noise.float(),
        draws=tuple(len(step.draws) for step in steps),
        draws_in_fp32=any(step.draws_in_fp32 for step in steps),
        init_noise_sigma=float(scheduler.init_noise_sigma),
        start_signal=signal,
        start_noise=start_noise,
        kept_signal=torch.tensor([step.kept[0] for step in steps]),
        kept_noise=torch.tensor([step.kept[1] for step in steps]),
    )
    _check_finite(table)
    deviation = _replay(matrices, noise, steps, first)
    if not deviation <= TOLERANCE:
        raise UnsupportedSampler(
            f"{type(scheduler).__name__} with this configuration is not an affine function of "
            f"latents and model output (a replay is off by {deviation:.0e})",
            param="scheduler",
        )
    return table


def _begin(scheduler: Any, window: Window) -> torch.Tensor:
    """Set the scheduler to its first step; the timesteps from there on.

    The index is always set. Schedulers that search for the timestep instead take the second of two
    equal ones, and fail later with an IndexError at the end of their sigmas.
    """
    first, last = _bounds(scheduler, window)
    if not 0 <= first < last:
        raise InvalidParameter(
            f"strength leaves no step to do: it starts at step {first // scheduler.order} "
            f"of {last // scheduler.order}",
            param="strength",
        )
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    timesteps: torch.Tensor = scheduler.timesteps[first:last]
    return timesteps


def _bounds(scheduler: Any, window: Window) -> tuple[int, int]:
    """The first timestep's index, and the one after the last."""
    timesteps = scheduler.timesteps
    first, last = window.start * scheduler.order, len(timesteps)
    if window.denoising_start is not None:
        left = int((timesteps < _cutoff(scheduler, window.denoising_start)).sum())
        if scheduler.order == 2 and left % 2 == 0:
            left += 1  # do not begin between the two halves of a second-order step
        first = len(timesteps) - left
    if window.denoising_end is not None:
        until = _cutoff(scheduler, window.denoising_end)
        last = first + int((timesteps[first:] >= until).sum())
    return first, last


def _cutoff(scheduler: Any, share: float) -> int:
    num_train_timesteps = int(scheduler.config.num_train_timesteps)
    return round(num_train_timesteps - share * num_train_timesteps)


def _noising(scheduler: Any, timesteps: torch.Tensor) -> tuple[float, float]:
    """The factors of image and noise in `add_noise` at the first of `timesteps`."""
    nothing = torch.zeros(_SAMPLES, dtype=torch.float64)
    noisy = scheduler.add_noise(_unit(0, nothing), _unit(1, nothing), timesteps[:1]).flatten()
    return float(noisy[0]), float(noisy[1])


def _read_steps(
    scheduler: Any,
    timesteps: torch.Tensor,
    samples: torch.Tensor,
    generator: torch.Generator,
    eta: float,
) -> list[_Step]:
    options = {"eta": eta} if "eta" in inspect.signature(scheduler.step).parameters else {}
    steps = []
    for i, timestep in enumerate(timesteps):
        step = _read_step(scheduler, timestep, samples, generator, options)
        if len(following := timesteps[i + 1 : i + 2]):
            step.kept = _noising(scheduler, following)
        steps.append(step)
        samples = step.samples
    return steps


def _read_step(
    scheduler: Any,
    timestep: torch.Tensor,
    samples: torch.Tensor,
    generator: torch.Generator,
    options: dict[str, Any],
) -> _Step:
    """Step basis vectors and samples at once, which is possible because schedulers treat every
    element alike."""
    num_memory = _rebase(scheduler)
    latents = _unit(_LATENTS, samples)
    scaled = scheduler.scale_model_input(latents, timestep).flatten()
    output = _unit(_OUTPUT, _stand_in(scaled[_COLUMNS:]))
    with _Draws(generator) as draws:
        advanced = scheduler.step(output, timestep, latents, return_dict=False, **options)[0]
    left = [advanced, *(container[key] for container, key in _memory(scheduler))]
    rows = torch.cat([tensor.double().view(1, -1)[:, :_COLUMNS] for tensor in left])
    last_draw = _NOISE + max(len(draws.samples) - 1, 0)
    unread = torch.cat([rows[:, _NOISE:last_draw], rows[:, last_draw + 1 :]], dim=1)
    if (unread.abs() > 0).any():  # a table holds one noise a step, and no constant
        raise UnsupportedSampler(
            f"{type(scheduler).__name__} adds a constant or several noises in one step",
            param="scheduler",
        )
    return _Step(
        timestep=float(timestep),
        input_scale=float(scaled[_LATENTS]),
        rows=rows[:, : _MEMORY + num_memory],
        noise=rows[:, last_draw],
        draws=draws.samples,
        draws_in_fp32=torch.float32 in draws.dtypes,
        samples=advanced.double().flatten()[_COLUMNS:],
    )


class _Draws(TorchFunctionMode):
    """Replaces torch.randn by basis vectors and known samples, which it keeps.

    The scheduler gets no generator, so that nothing else is random. Active only in the thread that
    entered it: others draw real noise meanwhile.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.samples: list[torch.Tensor] = []
        self.dtypes: set[torch.dtype] = set()  # float64 is that of the latents here
        self._generator = generator

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func is not torch.randn:
            return func(*args, **options)
        column = min(_NOISE + len(self.samples), _NOTHING)
        self.samples.append(_randn(self._generator))
        dtype = options.get("dtype") or torch.get_default_dtype()
        self.dtypes.add(dtype)
        return _unit(column, self.samples[-1]).to(dtype)


def _memory(scheduler: Any) -> list[tuple[Any, Any]]:
    """The places where a scheduler keeps tensors shaped like latents, as (container, key)."""
    attributes = vars(scheduler)
    lists = [value for value in attributes.values() if isinstance(value, list)]
    return [(attributes, key) for key, value in attributes.items() if _like_latents(value)] + [
        (items, i) for items in lists for i, value in enumerate(items) if _like_latents(value)
    ]


def _like_latents(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 4


def _rebase(scheduler: Any) -> int:
    """Replace each tensor of the memory by a basis vector of its own. Returns their number."""
    memory = _memory(scheduler)
    if len(memory) > _NOISE - _MEMORY:
        raise UnsupportedSampler(
            f"{type(scheduler).__name__} keeps more than {_NOISE - _MEMORY} tensors between steps",
            param="scheduler",
        )
    for column, (container, key) in enumerate(memory, start=_MEMORY):
        container[key] = _unit(column, container[key].double().flatten()[_COLUMNS:])
    return len(memory)


def _unit(column: int, samples: torch.Tensor) -> torch.Tensor:
    """A basis vector, followed by the samples, shaped like latents."""
    vector = torch.zeros(_COLUMNS, dtype=torch.float64)
    vector[column] = 1
    return torch.cat([vector, samples]).view(1, -1, 1, 1)


def _drop_dead_memory(steps: Sequence[_Step]) -> None:
    """Keep only the memory that a later step reads. No step reads the last one's."""
    live = [0]
    for step in reversed(steps):
        rows = step.rows[live]
        read: list[int] = rows[:, _MEMORY:].any(dim=0).nonzero().flatten().tolist()
        step.rows = rows[:, [_LATENTS, _OUTPUT, *(_MEMORY + slot for slot in read)]]
        step.noise = step.noise[live]
        live = [0, *(1 + slot for slot in read)]


def _pack(steps: Sequence[_Step]) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices [n, 1+S, 2+S] and noise [n, 1+S], zero where a step has less memory than others."""
    num_slots = max(len(step.rows) for step in steps)
    matrices = torch.zeros(len(steps), num_slots, 1 + num_slots, dtype=torch.float64)
    noise = torch.zeros(len(steps), num_slots, dtype=torch.float64)
    for i, step in enumerate(steps):
        matrices[i, : len(step.rows), : step.rows.shape[1]] = step.rows
        noise[i, : len(step.noise)] = step.noise
    return matrices, noise


def _check_finite(table: StepTable) -> None:
    scalars = torch.tensor([table.init_noise_sigma, table.start_signal, table.start_noise])
    tensors = (table.timesteps, table.input_scale, table.matrices, table.noise, scalars)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise UnsupportedSampler(
            "the sampler divides by zero with this model's noise schedule and number of steps",
            param="scheduler",
        )


def _replay(
    matrices: torch.Tensor, noise: torch.Tensor, steps: Sequence[_Step], first: torch.Tensor
) -> float:
    """Run the samples through the matrices. Returns how far they are at most from where the
    scheduler took them, relative to the largest sample."""
    slots = torch.zeros(matrices.shape[1], _SAMPLES, dtype=torch.float64)
    slots[0] = first
    deviation = torch.zeros((), dtype=torch.float64)
    for matrix, coefficients, step in zip(matrices, noise, steps, strict=True):
        output = _stand_in(slots[:1] * step.input_scale)
        slots = matrix @ torch.cat([slots[:1], output, slots[1:]])
        if step.draws:
            slots += coefficients[:, None] * step.draws[-1]
        difference = (slots[0] - step.samples).abs().max() / step.samples.abs().max()
        deviation = torch.maximum(deviation, difference)
    return float(deviation)


def _randn(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(_SAMPLES, dtype=torch.float64, generator=generator)


def _stand_in(model_input: torch.Tensor) -> torch.Tensor:
    """In place of a model: bounded and nonlinear. It may ignore the timestep."""
    return torch.tanh(0.3 * model_input) + 0.1
