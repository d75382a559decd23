"""The engine's thread never waits for the device: on a device whose tensors have no values.

Torch's meta device stands for the GPU. Whatever would wait for a GPU is visible before it reaches
the device: copies from memory that is not pinned, or without `non_blocking`, and reading a value.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sdbento.models.device
from sdbento.engine.trajectory import Stage, StepPlan, Trajectory
from sdbento.environment import load_settings
from sdbento.models.pipeline import ControlNet, Pipeline
from sdbento.prompts.encoder import Conditioning, PromptEncoder
from sdbento.runner.torch_runner import TorchRunner
from tests.support.graphs import fake_graphs
from tests.support.images import data_uri, gradient, half_mask
from tests.support.loras import make_lora, save_peft
from tests.support.oracle import tiny_control, tiny_model, trajectories_of

META = torch.device("meta")
BASE: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 6, "seed": 7}
READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim"}
COPIES = {"_to_copy", "copy_"}


@dataclass
class Watch(TorchDispatchMode):
    """Notes what would wait for the device, and every copy to it that does not."""

    pinned: set[int] = field(default_factory=set)
    stalls: list[str] = field(default_factory=list)
    uploads: int = 0

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode also operators that consist of others come here
            if (made := func.decompose(*args, **kwargs)) is not NotImplemented:
                return made
        name = func.__name__.partition(".")[0]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(tensor.device == META for tensor in tensors)
        if name in READS and on_device:
            self.stalls.append(name)
            return torch.ones(()).item() if name == "_local_scalar_dense" else torch.zeros(0)
        if name in COPIES:
            return self._copy(name, func, args, kwargs)
        on_host = any(tensor.device != META and tensor.dim() for tensor in tensors)
        if on_device and on_host:
            self.stalls.append(f"{name} of tensors on both sides")
        return func(*args, **kwargs)

    def _copy(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        if name == "copy_":
            target, source = args[0].device, args[1]
        else:
            target, source = torch.device(kwargs.get("device") or args[0].device), args[0]
        if target == source.device or not source.dim():
            return func(*args, **kwargs)
        host = args[0] if source.device == META else source
        waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        known = name == "copy_" or source.device != META
        if waits or not known or host.untyped_storage().data_ptr() not in self.pinned:
            self.stalls.append(f"{name} from {source.device} to {target}")
        self.uploads += target == META
        if source.device == META:
            return args[0].fill_(1) if name == "copy_" else torch.ones(source.shape)
        return func(*args, **kwargs)


@dataclass
class WatchLiterals(TorchFunctionMode):
    """Numbers that are put on the device one tensor at a time; the other mode sees no such copy."""

    stalls: list[str]

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in (torch.tensor, Tensor.new_tensor) and made.device == META:
            self.stalls.append(func.__name__)
        return made


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    with watch, WatchLiterals(watch.stalls):
        yield


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Not entered. Memory from `host_tensor` counts as pinned."""
    watch, kept = Watch(), list[Tensor]()
    make = sdbento.models.device.host_tensor

    def host_tensor(*args: Any) -> Tensor:
        kept.append(make(*args))  # lest its address is used again
        watch.pinned.add(kept[-1].untyped_storage().data_ptr())
        return kept[-1]

    for module in ("models.device", "runner.numbers", "runner.torch_runner"):
        monkeypatch.setattr(f"sdbento.{module}.host_tensor", host_tensor)
    return watch


class KnownPrompts(PromptEncoder):
    """Text encoders run once a prompt, on the host: transformers looks at the values of masks."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[Any, Conditioning] = {}

    def encode(self, pipeline: Pipeline, prompt: Any, num_chunks: int, adapters: Any = ()) -> Any:
        key = prompt, num_chunks, bool(adapters)
        if key not in self._known:
            made = super().encode(cpu_model(pipeline.spec.name), prompt, num_chunks, ())
            pooled = None if made.pooled is None else made.pooled.to(META)
            self._known[key] = Conditioning(made.embeds.to(META), pooled)
        return self._known[key]


_models: dict[str, Pipeline] = {}


def cpu_model(name: str) -> Pipeline:
    return _models[name]


@cache
def models(kind: str) -> tuple[Pipeline, Pipeline]:
    """On the CPU, where requests are built, and on the device."""
    pipeline = tiny_model(kind)
    _models[pipeline.spec.name] = pipeline
    parts = copy.deepcopy(pipeline.pipe)
    parts.unet.to(META)
    parts.vae.to(META)
    return pipeline, replace(pipeline, pipe=parts, device=META)


def on_device(trajectories: list[Trajectory], device: Pipeline) -> list[Trajectory]:
    for trajectory in trajectories:
        trajectory.passes = tuple(_moved(one, device) for one in trajectory.passes)
    return trajectories


def _moved(one: Any, device: Pipeline) -> Any:
    controls = tuple(
        replace(control, network=_network(control.network)) for control in one.inputs.controls
    )
    adapters = tuple(
        replace(used, adapter=replace(used.adapter, parts=_parts(used.adapter.parts)))
        for used in one.inputs.adapters
    )
    inputs = replace(one.inputs, controls=controls, adapters=adapters)
    return replace(one, pipeline=device, inputs=inputs)


@cache
def _network(network: ControlNet) -> ControlNet:
    module = copy.deepcopy(network.module).to(META)
    return replace(network, module=module, device=META)


def _parts(parts: Any) -> Any:
    return {
        part: {
            name: replace(layer, down=layer.down.to(META), up=layer.up.to(META))
            for name, layer in layers.items()
        }
        for part, layers in parts.items()
    }


PICTURE: dict[str, Any] = {"image": data_uri(gradient()), "strength": 0.9}
KINDS: dict[str, list[dict[str, Any]]] = {
    "txt2img": [BASE],
    "guided and not": [BASE, {**BASE, "guidance_scale": 1.0}, {**BASE, "guidance_rescale": 0.5}],
    "stochastic": [{**BASE, "scheduler": name} for name in ("Euler a", "DPM++ 2M SDE", "Euler")],
    "img2img": [{**BASE, **PICTURE}],
    "inpaint": [{**BASE, **PICTURE, "mask_image": data_uri(half_mask())}, BASE],
    "lora": [
        {**BASE, "lora": {"model_id": "a", "weight": 0.5}},
        BASE,
        {**BASE, "lora": {"model_id": "a"}},
    ],
    "controlnet": [
        {**BASE, "controlnet": {"type": "canny", "image": data_uri(gradient())}},
        BASE,
    ],
    "DeepCache": [{**BASE, "deep_cache_interval": 2, "guidance_scale": s} for s in (1.0, 5.0)],
    "merged tokens": [{**BASE, "token_merging_ratio": 0.5}, {**BASE, "token_merging_ratio": 0.5}],
    "prompt editing": [{**BASE, "prompt": "a [cat:dog:0.5]"}, BASE],
}


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    save_peft("sd15", make_lora("sd15"), folder / "a.safetensors")
    return folder


def trajectories(kind: str, asked: list[dict[str, Any]], lora_folder: Path) -> list[Trajectory]:
    host, device = models(kind)
    made = [
        trajectories_of(
            host,
            controlnets=[tiny_control("sd15")] if "controlnet" in fields else [],
            settings=load_settings(lora_dir=lora_folder),
            **fields,
        )[0]
        for fields in asked
    ]
    return on_device(made, device)


def run(runner: TorchRunner, stage: Stage, members: list[Trajectory]) -> None:
    runner.launch(StepPlan(stage, members[0].key, tuple(members))).wait()
    if stage is Stage.STEP:
        for member in members:
            member.step += 1


@pytest.mark.parametrize("asked", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("graphs", [None, fake_graphs], ids=["eager", "graphs"])
def test_no_stage_of_any_kind_of_image_waits_for_the_device(
    asked: list[dict[str, Any]], graphs: Any, watch: Watch, lora_folder: Path
) -> None:
    members = trajectories("sd15", asked, lora_folder)
    members[0].preview_every = 2
    runner = TorchRunner(KnownPrompts(), graphs and graphs())
    run(runner, Stage.PREPARE, members)  # encodes the prompts
    with watching(watch):
        run(runner, Stage.PREPARE, members)
        for _ in range(3):
            run(runner, Stage.STEP, members)
        run(runner, Stage.DECODE, members)
    assert watch.stalls == []
    assert all(member.image is not None for member in members)
    assert members[0].preview is not None


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd15-inpaint"])
def test_a_step_takes_one_copy(kind: str, watch: Watch, lora_folder: Path) -> None:
    fields = {**BASE, "scheduler": "DPM++ 2M"}
    members = trajectories(kind, [{**fields, "seed": seed} for seed in range(3)], lora_folder)
    runner = TorchRunner(KnownPrompts())
    run(runner, Stage.PREPARE, members)
    with watching(watch):
        for _ in range(4):
            run(runner, Stage.STEP, members)
    assert watch.uploads == 4


def test_the_watch_notices_what_waits() -> None:
    """What a step used to do."""
    watch = Watch()
    value = torch.zeros(3, device=META)
    with watching(watch):
        value.new_tensor([1.0, 2.0, 3.0])
        torch.tensor([1, 2]).to(META)
        torch.tensor([1, 2]).to(META, non_blocking=True)
        bool(value.sum() > 0)
        torch.empty(3).copy_(value)
    assert len(watch.stalls) == 5
