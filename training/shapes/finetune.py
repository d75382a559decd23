"""Trains an addition to the packaged model, which itself stays as it is.

The loop shared by train_lora.py and train_controlnet.py. What is added, and where it acts, only
they know; here it is a task that has parameters, a loss and a file to be saved to.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from export import PACKAGED
from train_unet import learning_rate, loss_weights

OUT = Path(__file__).parent / "out"
CHECKPOINT_EVERY = 100
WARMUP = 50


@dataclass(frozen=True)
class Base:
    """The packaged model in float32, frozen, and the loss weights of its timesteps."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler
    weights: Tensor

    @torch.no_grad()
    def context(self, tokens: Tensor) -> Tensor:
        """What the UNet attends to, (n, 77, 96)."""
        states: Tensor = self.text_encoder(tokens).last_hidden_state
        return states


class Task(Protocol):
    """An addition in training."""

    parameters: dict[str, Tensor]
    """What is trained; the optimizer changes it in place."""

    def loss(self, batch: int) -> Tensor:
        """The training loss on a random batch."""

    def save(self, folder: Path) -> None:
        """Writes the addition as diffusers loads it, in float16."""


def load_base() -> Base:
    """The packaged model without its autoencoder."""
    pipeline = StableDiffusionPipeline.from_pretrained(PACKAGED, dtype=torch.float32, vae=None)
    pipeline.unet.requires_grad_(False)
    pipeline.text_encoder.requires_grad_(False)
    return Base(
        unet=pipeline.unet,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        scheduler=pipeline.scheduler,
        weights=loss_weights(pipeline.scheduler),
    )


class Finetuner:
    """A task and its optimizer; `step` is the only counter."""

    def __init__(self, task: Task, peak_rate: float) -> None:
        self.task, self.peak_rate = task, peak_rate
        self.optimizer = torch.optim.AdamW(task.parameters.values(), weight_decay=1e-3)
        self.step = 0

    def advance(self, batch: int, num_steps: int) -> float:
        """One optimizer step; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak_rate * learning_rate(self.step, num_steps, WARMUP)
        loss = self.task.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.task.parameters.values(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, the random state included."""
        return {
            "step": self.step,
            "parameters": self.task.parameters,
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues the run that wrote `state`."""
        self.step = state["step"]
        with torch.no_grad():
            for name, parameter in self.task.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])


def train(tuner: Finetuner, name: str, num_steps: int, batch: int) -> None:
    """Runs to `num_steps`; a checkpoint now and then, at the end the files of the package."""
    checkpoint = OUT / f"{name}.pt"
    if checkpoint.exists():
        tuner.restore(torch.load(checkpoint))
    count = sum(p.numel() for p in tuner.task.parameters.values())
    print(f"{name}: {count / 1e6:.3f} M parameters, from step {tuner.step}", flush=True)
    started, mean_loss = time.monotonic(), 0.0
    while tuner.step < num_steps:
        mean_loss += tuner.advance(batch, num_steps) / CHECKPOINT_EVERY
        if tuner.step % CHECKPOINT_EVERY == 0:
            seconds = time.monotonic() - started
            print(f"step {tuner.step} loss {mean_loss:.4f} {seconds:.0f} s", flush=True)
            mean_loss = 0.0
            torch.save(tuner.state(), checkpoint)
            tuner.task.save(OUT / name)
    tuner.task.save(PACKAGED.with_name(name))
