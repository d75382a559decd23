"""Which files a model or ControlNet consists of, by the layout in which diffusers saves them.

    model_index.json     lists a model's parts, each a folder:
    unet/                config.json, diffusion_pytorch_model[.fp16].safetensors
    vae/, text_encoder/  likewise, and in SDXL text_encoder_2/
    tokenizer/           tokenizer.json, or vocab.json and merges.txt; tokenizer_config.json
    scheduler/           scheduler_config.json

A ControlNet is a single network: its config.json and its weights lie in the folder itself. Only
configurations, tokenizers and safetensors weights are ever needed. Knows nothing of the Hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sdbento.catalog.families import PICKLED, Kind, refusal
from sdbento.errors import ModelLoadFailed

INDEX = "model_index.json"
UNET = "unet/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
CONFIG = "config.json"
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
HERE = ""  # where a ControlNet's network lies
_SHARD = r"(?:-\d{5}-of-\d{5})?"
_NUM_SHARDS = re.compile(r"-\d{5}-of-(\d{5})")
_WEIGHTS = re.compile(
    rf"(?:diffusion_pytorch_)?model(\.fp16)?{_SHARD}(\.fp16)?\.safetensors(?:\.index(\.fp16)?\.json)?"
)


@dataclass(frozen=True)
class Layout:
    """The parts of one model or ControlNet. Paths of files are relative to its folder."""

    kind: Kind
    name: str
    required_configs: tuple[str, ...]
    networks: tuple[str, ...]  # folders with weights
    tokenizers: tuple[str, ...] = ()  # folders

    def weights(self, files: Iterable[str], half: bool) -> list[str]:
        """The safetensors files of every network: fp16 if `half`, or else fp32; where a network has
        only the other, that.

        Raises UnsupportedModel where a network has only pickled weights, ModelLoadFailed where it
        has none.
        """
        files = list(files)
        return [file for network in self.networks for file in self._weights(network, files, half)]

    def configs(self, files: Iterable[str]) -> list[str]:
        """The configurations and the files of the tokenizers."""
        folders = tuple(f"{tokenizer}/" for tokenizer in self.tokenizers)
        return [
            file
            for file in files
            if file in self.required_configs
            or (file.startswith(folders) and file.endswith((".json", ".txt")))
        ]

    def check_configs(self, files: Iterable[str]) -> None:
        """Raises ModelLoadFailed where `files` lack what a part is made from.

        Without this check transformers makes an empty tokenizer of a folder without a vocabulary,
        and every prompt gives the same image.
        """
        files = set(files)
        needed = [*self.required_configs]
        for tokenizer in self.tokenizers:
            whole = f"{tokenizer}/tokenizer.json" in files
            parts = () if whole else ("vocab.json", "merges.txt")
            needed += [f"{tokenizer}/{part}" for part in (*parts, "tokenizer_config.json")]
        if missing := [file for file in needed if file not in files]:
            raise ModelLoadFailed(f"{self.kind} {self.name} lacks {', '.join(missing)}")

    def _weights(self, network: str, files: list[str], half: bool) -> list[str]:
        prefix = f"{network}/" if network else ""
        names = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
        if network == HERE:  # a `model.safetensors` beside a ControlNet belongs to something else
            names = [name for name in names if "/" not in name and not name.startswith("model.")]
        variants: dict[bool, list[str]] = {True: [], False: []}  # by whether it is fp16
        for name in names:
            if match := _WEIGHTS.fullmatch(name):
                variants[any(match.groups())].append(prefix + name)
        if found := variants[half] or variants[not half]:
            self._check_shards(network, found)
            return found
        if any(name.endswith(PICKLED) for name in names):
            owner = f"its {network}" if network else "it"
            reason = f"{owner} has pickled weights only; safetensors are needed"
            raise refusal(self.name, reason, self.kind)
        missing = f"the weights of its {network}" if network else "its weights"
        raise ModelLoadFailed(f"{self.kind} {self.name}: {missing} are not there")

    def _check_shards(self, network: str, files: list[str]) -> None:
        """Raises ModelLoadFailed where weights are in several files and some are missing, as when a
        download was interrupted."""
        counts = [int(match[1]) for file in files if (match := _NUM_SHARDS.search(file))]
        if counts and len(counts) != counts[0]:
            owner = f"its {network}" if network else "it"
            found = f"{len(counts)} of {counts[0]} files of weights"
            raise ModelLoadFailed(f"{self.kind} {self.name}: {owner} has {found}")


def model_layout(name: str, index: Mapping[str, Any]) -> Layout:
    """Of a model, whose `model_index.json` lists its parts."""
    networks = tuple(network for network in NETWORKS if any(index.get(network) or ()))
    tokenizers = tuple(tokenizer for tokenizer in TOKENIZERS if any(index.get(tokenizer) or ()))
    configs = (INDEX, SCHEDULER, *(f"{network}/{CONFIG}" for network in networks))
    return Layout("model", name, configs, networks, tokenizers)


def controlnet_layout(name: str) -> Layout:
    return Layout("ControlNet", name, (CONFIG,), (HERE,))
