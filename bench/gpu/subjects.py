"""Full-size SDXL and SD 1.5 with random weights, for the stock pipeline and for this engine.

Speed does not depend on the values of weights. Text encoders are left out: prompts are random
embeddings, the same for both sides.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from bench.gpu.bench import Bench
from bench.gpu.timing import Marks
from sdbento.catalog.families import Family
from sdbento.catalog.specs import ModelSpec
from sdbento.engine.inputs import FromNoise, PassInputs, SizeConditioning
from sdbento.engine.trajectory import BatchKey, Pass, Stage, StepPlan, Trajectory
from sdbento.lora.hooks import WeightedAdapter
from sdbento.models.device import choose_vae_dtype
from sdbento.models.pipeline import Pipeline
from sdbento.prompts.encoder import Conditioning, PromptEncoder
from sdbento.prompts.tokens import TokenizedPrompt
from sdbento.runner.graphs import Graphs
from sdbento.runner.state import state_of
from sdbento.runner.torch_runner import TorchRunner
from sdbento.samplers.compile import compile_table
from sdbento.samplers.scheduler import SamplerSpec, build_scheduler

CONFIGS = Path(__file__).parent.parent / "configs"
GUIDANCE = 7.5
TOY = {"norm_num_groups": 4, "layers_per_block": 1}


@dataclass(frozen=True)
class Subject:
    """A model with random weights and the text embeddings that stand for its prompts."""

    name: str
    pipeline: Pipeline  # as the engine would have it
    stock: Any  # the stock pipeline, of the same UNet, with a VAE that it can decode with
    prompt: Conditioning
    negative: Conditioning
    side: int
    steps: int
    tflop_per_row: float

    @property
    def key(self) -> BatchKey:
        return BatchKey(self.name, self.side // 8, self.side // 8)


class FixedPrompts(PromptEncoder):
    """Stands in for the text encoders, which are no part of a step."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self._subject = subject

    def encode(
        self,
        pipeline: Pipeline,
        prompt: TokenizedPrompt,
        num_chunks: int,
        adapters: Sequence[WeightedAdapter] = (),
    ) -> Conditioning:
        return self._subject.negative if prompt.is_absent else self._subject.prompt


def build(name: str, bench: Bench, dtype: torch.dtype | None = None) -> Subject:
    """`name`: a file of bench/configs. On the bench's device, in its precision."""
    dtype, device = dtype or bench.dtype, bench.device
    config = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    if bench.toy:
        _shrink(config)
    torch.manual_seed(0)
    # Compilers refuse weights that were made in inference mode.
    with torch.inference_mode(False), torch.device(device):
        unet = UNet2DConditionModel(**config["unet"]).to(dtype).eval().requires_grad_(False)
        vae = AutoencoderKL(**config["vae"]).eval().requires_grad_(False)
    spec = _spec(name, config)
    vae_dtype = choose_vae_dtype(spec, bool(vae.config.force_upcast), dtype)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    stock_vae = _vae_for_stock(vae, dtype)
    vae.to(vae_dtype)
    if device.type == "cuda":
        vae.to(memory_format=torch.channels_last)  # as the server has it
    pipe = _pipe(spec.family, unet, vae, scheduler)
    return Subject(
        name,
        Pipeline(spec, pipe, device, dtype, vae_dtype, 0),
        _pipe(spec.family, unet, stock_vae, copy.deepcopy(scheduler)),
        prompt=_text(config, dtype, device, seed=1),
        negative=_text(config, dtype, device, seed=2),
        side=config["side"],
        steps=config["steps"],
        tflop_per_row=config["tflop_per_row"],
    )


def _shrink(config: dict[str, Any]) -> None:
    """The same kinds of blocks, one of each, and narrow."""
    unet = config["unet"]
    unet |= {**TOY, "block_out_channels": [8, 16], "attention_head_dim": 2}
    for blocks in ("down_block_types", "up_block_types"):
        unet[blocks] = [unet[blocks][0], unet[blocks][-1]]
    if "transformer_layers_per_block" in unet:
        unet["transformer_layers_per_block"] = 1
    config["vae"] |= {**TOY, "block_out_channels": [4, 8, 8, 8]}
    config |= {"side": 64, "steps": 3, "tflop_per_row": 0.0}


def _spec(name: str, config: dict[str, Any]) -> ModelSpec:
    return ModelSpec(
        name=name,
        family=Family.SD15 if config["pooled_width"] is None else Family.SDXL,
        sources=(),
        width=config["side"],
        height=config["side"],
        num_inference_steps=config["steps"],
        guidance_scale=GUIDANCE,
        sampler=None,
        memory_gb=1.0,
    )


def _vae_for_stock(vae: Any, dtype: torch.dtype) -> Any:
    """The stock SDXL pipeline hands its VAE latents of the UNet's precision, and would otherwise
    turn it to fp32: careful users choose a VAE that is made for fp16."""
    own = copy.deepcopy(vae).to(dtype)
    own.register_to_config(force_upcast=False)
    return own


def _pipe(family: Family, unet: Any, vae: Any, scheduler: Any) -> Any:
    empty = {"text_encoder": None, "tokenizer": None, "unet": unet, "vae": vae}
    if family is Family.SDXL:
        empty |= {"text_encoder_2": None, "tokenizer_2": None}
        pipe = StableDiffusionXLPipeline(**empty, scheduler=scheduler, add_watermarker=False)
    else:
        pipe = StableDiffusionPipeline(
            **empty,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _text(
    config: dict[str, Any], dtype: torch.dtype, device: torch.device, seed: int
) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(1, 77, config["text_width"], generator=generator).to(device, dtype)
    pooled = None
    if config["pooled_width"]:
        pooled = torch.randn(1, config["pooled_width"], generator=generator).to(device, dtype)
    return Conditioning(embeds, pooled)


def stock_images(
    subject: Subject,
    seeds: Sequence[int],
    steps: int,
    output_type: str = "latent",
    sampler: str = "Euler",
    marks: Marks | None = None,
) -> Any:
    """Guided images by one call of the stock pipeline; `marks` are taken after each step."""
    extra: dict[str, Any] = {}
    if subject.prompt.pooled is not None and subject.negative.pooled is not None:
        extra["pooled_prompt_embeds"] = subject.prompt.pooled.repeat(len(seeds), 1)
        extra["negative_pooled_prompt_embeds"] = subject.negative.pooled.repeat(len(seeds), 1)
    if marks is not None:
        extra["callback_on_step_end"] = marks.after_step
    subject.stock.scheduler = build_scheduler(
        SamplerSpec(sampler), subject.pipeline.scheduler_config
    )
    return subject.stock(
        prompt_embeds=subject.prompt.embeds.repeat(len(seeds), 1, 1),
        negative_prompt_embeds=subject.negative.embeds.repeat(len(seeds), 1, 1),
        **extra,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        height=subject.side,
        width=subject.side,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type=output_type,
    ).images


def trajectory(
    subject: Subject, seed: int, steps: int, sampler: str = "Euler", *, guided: bool = True
) -> Trajectory:
    """One image as the engine takes it."""
    size = SizeConditioning((subject.side, subject.side), (0, 0), (subject.side, subject.side))
    table = compile_table(SamplerSpec(sampler), subject.pipeline.scheduler_config, steps)
    prompt, absent = TokenizedPrompt(()), TokenizedPrompt((), is_absent=True)
    prompts, negative_prompts = ((0, prompt),), ((0, absent),)
    inputs = PassInputs(
        prompts, negative_prompts, GUIDANCE, 0.0, table, size, size, start=FromNoise()
    )
    guided_steps = range(table.num_steps if guided else 0)
    one = Pass(subject.key, table.num_steps, guided_steps, inputs, subject.pipeline)
    return Trajectory((one,), seed)


class EngineRun:
    """The engine's runner on a batch that stays together; the last `unguided` images are without
    guidance."""

    def __init__(
        self,
        subject: Subject,
        seeds: Sequence[int],
        steps: int,
        graphs: Graphs | None = None,
        unguided: int = 0,
    ) -> None:
        self._runner = TorchRunner(FixedPrompts(subject), graphs)
        self.trajectories = tuple(
            trajectory(subject, seed, steps, guided=i < len(seeds) - unguided)
            for i, seed in enumerate(seeds)
        )
        self._execute(Stage.PREPARE)

    def step(self) -> None:
        self._execute(Stage.STEP)
        for one in self.trajectories:
            one.step += 1

    def latents(self) -> torch.Tensor:
        """[B, C, h, w] after all steps."""
        while self.trajectories[0].stage is Stage.STEP:
            self.step()
        return torch.stack([state_of(one).slots[0] for one in self.trajectories])

    def _execute(self, stage: Stage) -> None:
        self._runner.launch(StepPlan(stage, self.trajectories[0].key, self.trajectories)).wait()


def unet_inputs(subject: Subject, rows: int) -> dict[str, Any]:
    """Random inputs of one UNet call, as the runner makes them; latents in the order of memory that
    the UNet's weights have. All calls have the same arguments, lest a compiler compile again."""
    pipeline, side = subject.pipeline, subject.side // 8
    channels = int(pipeline.unet.config.in_channels)
    generator = torch.Generator().manual_seed(rows)
    latents = torch.randn(rows, channels, side, side, generator=generator)
    if pipeline.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last):
        latents = latents.to(memory_format=torch.channels_last)
    inputs: dict[str, Any] = {
        "sample": latents.to(pipeline.device, pipeline.dtype),
        "timestep": torch.linspace(900, 100, rows, device=pipeline.device),
        "encoder_hidden_states": subject.prompt.embeds.repeat(rows, 1, 1),
        "added_cond_kwargs": None,
        "return_dict": False,
    }
    if subject.prompt.pooled is not None:
        sizes = [subject.side, subject.side, 0, 0, subject.side, subject.side]
        time_ids = torch.tensor([sizes] * rows, dtype=pipeline.dtype, device=pipeline.device)
        inputs["added_cond_kwargs"] = {
            "text_embeds": subject.prompt.pooled.repeat(rows, 1),
            "time_ids": time_ids,
        }
    return inputs
