"""What the stages share: training for a given time, learning rates that follow it, checkpoints.

A machine may be lent by the minute, so the time is given and the number of steps follows.
"""

from __future__ import annotations

import contextlib
import math
import time
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from training.emoji.icons import OUT

WARMUP = 0.04
LAST_RATE = 0.01
AT_AN_END = ("embedding", "conv_in", "conv_out")
"""Parts of names: what turns tokens, timesteps and latents into features, and back."""
REPORT_EVERY = 20  # steps; the device is waited for only then


@dataclass(frozen=True)
class Budget:
    """How long a stage trains. `min_steps` are made even if there is no time for them."""

    seconds: float
    min_steps: int = 2
    checkpoint_seconds: float = 90.0


def rate_at(progress: float) -> float:
    """Part of the peak rate: a linear warm-up, then a cosine down to LAST_RATE."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return min(1.0, (progress + 0.001) / WARMUP) * (LAST_RATE + (1 - LAST_RATE) * cosine)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def autocast(device: str) -> contextlib.AbstractContextManager[None]:
    """bf16 where the device multiplies it faster than float32: on a GPU and on some CPUs."""
    if device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.autocast(device, torch.bfloat16)
    return contextlib.nullcontext()


def memory_format(device: str) -> torch.memory_format:
    """Of pictures and convolutions; on a CPU, group norms in channels-last order are slow."""
    return torch.channels_last if device == "cuda" else torch.contiguous_format


def arguments(purpose: str | None, minutes: float, batch: int | None = None) -> ArgumentParser:
    """What every script that trains can be told: --out, --minutes, --batch, --device.

    batch: without one, that of the scale.
    """
    parser = ArgumentParser(description=purpose)
    parser.add_argument("--out", type=Path, default=OUT, help="where all stages work")
    parser.add_argument("--minutes", type=float, default=minutes)
    parser.add_argument("--batch", type=int, default=batch, help="samples a step")
    parser.add_argument("--device", default=default_device())
    return parser


def save(path: Path, state: Any) -> None:
    """Writes a checkpoint; whoever is killed here leaves the one before."""
    beside = path.with_suffix(".new")
    torch.save(state, beside)
    beside.rename(path)


def take_start(network: nn.Module, path: Path) -> None:
    """The network takes the weights that an earlier run brought back, if there are any."""
    if path.exists():
        network.load_state_dict(torch.load(path))
        print(f"{path.name}: goes on from an earlier run", flush=True)


class KernelMuon(Muon):
    """Muon (Jordan et al. 2024), which takes a convolution's kernel for a matrix with a row for
    each channel that it makes. Kernels have to be in channels-last order."""

    def __init__(self, parameters: list[nn.Parameter], rate: float) -> None:
        self.own = parameters
        self.matrices = [nn.Parameter(as_matrix(parameter.detach())) for parameter in parameters]
        for parameter, matrix in zip(parameters, self.matrices, strict=True):
            if parameter.data_ptr() != matrix.data_ptr():
                raise ValueError("a kernel is not in channels-last order")
        as_adam = "match_rms_adamw"  # updates of the size that AdamW's have
        super().__init__(self.matrices, rate, weight_decay=1e-3, adjust_lr_fn=as_adam)

    def step(self) -> None:  # type: ignore[override]
        for parameter, matrix in zip(self.own, self.matrices, strict=True):
            matrix.grad = None if parameter.grad is None else as_matrix(parameter.grad)
        super().step()  # type: ignore[no-untyped-call]


def as_matrix(kernel: Tensor) -> Tensor:
    """(out, in, h, w) as (out, h x w x in), a view if that is how it lies in memory."""
    return kernel if kernel.ndim == 2 else kernel.permute(0, 2, 3, 1).flatten(1)


def optimizers_of(
    networks: nn.Module, peak_rate: float, matrix_rate: float | None
) -> list[Optimizer]:
    """AdamW; with a `matrix_rate`, Muon for matrices and kernels that are not at either end.

    A peak rate is the `initial_lr` of its groups.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in networks.named_parameters():
        if not parameter.requires_grad:
            continue
        at_an_end = any(part in name for part in AT_AN_END)
        by_muon = matrix_rate is not None and parameter.ndim in (2, 4) and not at_an_end
        (matrices if by_muon else others).append(parameter)
    on_gpu = others[0].is_cuda
    optimizers: list[Optimizer] = [
        AdamW(others, peak_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=on_gpu or None)
    ]
    if matrix_rate is not None:
        optimizers.append(KernelMuon(matrices, matrix_rate))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["initial_lr"] = group["lr"]
    return optimizers


class Training:
    """Networks, their moving averages, the optimizers, and how far along they are.

    What needs no gradient is not trained.
    `progress` goes from 0 to 1 over one schedule of the learning rate. A run that was cut off
    goes on with the rest of its schedule; one that had finished begins another.
    """

    def __init__(
        self,
        networks: nn.Module,
        peak_rate: float,
        path: Path,
        decay: float,
        matrix_rate: float | None = None,
    ) -> None:
        self.networks, self.path, self.decay = networks, path, decay
        self.parameters = [p for p in networks.parameters() if p.requires_grad]
        self.averages = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizers = optimizers_of(networks, peak_rate, matrix_rate)
        self.step, self.progress, self.samples = 0, 0.0, 0
        if path.exists():
            self._restore(torch.load(path, map_location=self.parameters[0].device))

    def _restore(self, state: dict[str, Any]) -> None:
        self.step, self.samples = state["step"], state["samples"]
        self.progress = state["progress"] if state["progress"] < 1 else 0.0
        self.networks.load_state_dict(state["networks"])
        torch._foreach_copy_(self.averages, state["averages"])
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)

    def checkpoint(self) -> None:
        state = {name: getattr(self, name) for name in ("step", "progress", "samples", "averages")}
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        save(self.path, state | {"networks": self.networks.state_dict(), "optimizers": optimizers})

    def run(self, loss_of: Callable[[], Tensor], batch: int, budget: Budget) -> None:
        """Trains until the time is over, reports now and then, and leaves a checkpoint."""
        began, first_progress = time.monotonic(), self.progress
        last_step = self.step + budget.min_steps
        self._advance(loss_of, batch).item()  # compiles; no part of the schedule
        started = saved = time.monotonic()
        seconds = max(budget.seconds - (started - began), 0.01)
        while self.progress < 1 or self.step < last_step:
            loss = self._advance(loss_of, batch)
            if self.step % REPORT_EVERY and self.step > last_step:
                continue
            value, now = loss.item(), time.monotonic()
            part = min(1.0, (now - started) / seconds)
            self.progress = first_progress + (1 - first_progress) * part
            if self.step % (10 * REPORT_EVERY) == 0 or self.progress >= 1:
                print(self._report(value, now - began), flush=True)
            if now - saved > budget.checkpoint_seconds:
                self.checkpoint()
                saved = now
        self.checkpoint()

    def _report(self, loss: float, seconds: float) -> str:
        return f"step {self.step} samples {self.samples} loss {loss:.4f} {seconds:.0f} s"

    def _advance(self, loss_of: Callable[[], Tensor], batch: int) -> Tensor:
        loss = loss_of()
        self.networks.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate_at(self.progress)
            optimizer.step()
        self.step += 1
        self.samples += batch
        decay = min(self.decay, self.step / (9 + self.step))
        current = [parameter.detach() for parameter in self.parameters]
        torch._foreach_lerp_(self.averages, current, 1 - decay)
        return loss.detach()

    def use_averages(self) -> None:
        """The networks take over their averages; for what follows the training."""
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.averages, strict=True):
                parameter.copy_(average)
