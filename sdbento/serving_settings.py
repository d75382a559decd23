"""The settings of serving itself, whichever door a request comes through.

The first five names and defaults are those of the RunPod worker's page; ours start with SDBENTO_.
Read by `settings`, like those of the doors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

Precision = Literal["fp16", "bf16", "fp32"]
Device = Literal["auto", "cpu", "cuda"]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]


def variable(name: str) -> Any:
    """The environment variable of a field, beside the field's own name for keyword and YAML use."""
    return AliasChoices(name, name.removeprefix("SDBENTO_").lower())


class ServingSettings(BaseSettings):
    """Models, limits, pictures, LoRAs."""

    # Case-sensitive, lest the field names, which YAML uses, match a stranger's DEVICE or LOG_LEVEL.
    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, case_sensitive=True
    )

    sd_model: str = Field(
        "stabilityai/stable-diffusion-xl-base-1.0",
        min_length=1,
        validation_alias=variable("SD_MODEL"),
        description="Default model: a catalogue name, a Hub id, a diffusers folder "
        "or a .safetensors file",
    )
    precision: Precision = Field(
        "fp16",
        validation_alias=variable("PRECISION"),
        description="fp16, bf16 or fp32; a CPU always computes in fp32",
    )
    enable_xformers: bool = Field(
        True,
        validation_alias=variable("ENABLE_XFORMERS"),
        description="Use xformers attention where it is installed and a GPU is there, else SDPA",
    )
    compile: bool = Field(
        False,
        validation_alias=variable("SDBENTO_COMPILE"),
        description="Compile UNets with torch.compile: faster steps, for minutes of a first start; "
        "later ones take what SDBENTO_COMPILE_DIR has",
    )
    compile_dir: Path = Field(
        Path("compiled"),
        validation_alias=variable("SDBENTO_COMPILE_DIR"),
        description="Folder of what SDBENTO_COMPILE compiled; keep it between starts",
    )
    max_queue_size: int = Field(
        100,
        ge=1,
        le=100_000,
        validation_alias=variable("MAX_QUEUE_SIZE"),
        description="Requests that may wait; one more is answered 429 with Retry-After",
    )
    max_batch_size: int = Field(
        4,
        ge=1,
        le=256,
        validation_alias=variable("MAX_BATCH_SIZE"),
        description="Images that may share one UNet call (a guided image takes two rows of it)",
    )
    device: Device = Field(
        "auto",
        validation_alias=variable("SDBENTO_DEVICE"),
        description="auto (a GPU where there is one), cpu or cuda",
    )
    memory_gb: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        validation_alias=variable("SDBENTO_MEMORY_GB"),
        description="Memory that resident models may take together; unset: 85% of the GPU's "
        "memory, or 60% of the machine's on a CPU",
    )
    models_dir: Path = Field(
        Path("models"),
        validation_alias=variable("SDBENTO_MODELS_DIR"),
        description="Folder whose diffusers folders and .safetensors files are models by their "
        "name",
    )
    allow_any_model: bool = Field(
        True,
        validation_alias=variable("SDBENTO_ALLOW_ANY_MODEL"),
        description="Let requests name Hub ids and paths that are neither the default model, nor "
        "in the catalogue, nor in the models folder",
    )
    offline: bool = Field(
        False,
        validation_alias=variable("SDBENTO_OFFLINE"),
        description="Never contact the Hub: only models that are on this machine",
    )
    prefer_cache: bool = Field(
        False,
        validation_alias=variable("SDBENTO_PREFER_CACHE"),
        description="Use what the Hub cache has without asking the Hub for something newer; the "
        "RunPod worker always does, and a server that has SDBENTO_RUNPOD_VOLUME",
    )
    max_pixels: int = Field(
        2048 * 2048,
        ge=64 * 64,
        validation_alias=variable("SDBENTO_MAX_PIXELS"),
        description="Largest width x height of a request",
    )
    lora_dir: Path = Field(
        Path("loras"),
        validation_alias=variable("SDBENTO_LORA_DIR"),
        description="Folder whose LoRA files (.safetensors, also in subfolders) are known by their "
        "name",
    )
    max_loras: int = Field(
        32,
        ge=1,
        le=10_000,
        validation_alias=variable("SDBENTO_MAX_LORAS"),
        description="LoRAs a model keeps in memory; the least recently used make room",
    )
    allow_lora_hub: bool = Field(
        True,
        validation_alias=variable("SDBENTO_ALLOW_LORA_HUB"),
        description="Let requests name LoRAs on the Hub: `org/repo` or `org/repo/file`",
    )
    allow_lora_urls: bool = Field(
        False,
        validation_alias=variable("SDBENTO_ALLOW_LORA_URLS"),
        description="Let requests name LoRAs by https URL",
    )
    embeddings_dir: Path = Field(
        Path("embeddings"),
        validation_alias=variable("SDBENTO_EMBEDDINGS_DIR"),
        description="Folder of textual inversions (.safetensors), each a word in prompts by its "
        "name",
    )
    allow_private_urls: bool = Field(
        False,
        validation_alias=variable("SDBENTO_ALLOW_PRIVATE_URLS"),
        description="Fetch images also from private and loopback addresses, and over http",
    )
    fetch_timeout: float = Field(
        20.0,
        gt=0,
        le=600,
        allow_inf_nan=False,
        validation_alias=variable("SDBENTO_FETCH_TIMEOUT"),
        description="Seconds that fetching one image may take",
    )
    max_image_bytes: int = Field(
        20 * 1024 * 1024,
        ge=1024,
        validation_alias=variable("SDBENTO_MAX_IMAGE_BYTES"),
        description="Largest image file that a request may bring or name",
    )
    max_body_bytes: int = Field(
        32 * 1024 * 1024,
        ge=1024,
        validation_alias=variable("SDBENTO_MAX_BODY_BYTES"),
        description="Largest request body",
    )
    request_timeout: float = Field(
        600.0,
        gt=0,
        le=3600,
        allow_inf_nan=False,
        validation_alias=variable("SDBENTO_REQUEST_TIMEOUT"),
        description="Seconds a request may take where it does not set its own `timeout`",
    )
    num_threads: int = Field(
        0,
        ge=0,
        le=1024,
        validation_alias=variable("SDBENTO_NUM_THREADS"),
        description="CPU threads that the engine computes with; 0: one a core",
    )
    log_level: LogLevel = Field(
        "INFO",
        validation_alias=variable("SDBENTO_LOG_LEVEL"),
        description="DEBUG, INFO, WARNING or ERROR",
    )
