"""What the operator can configure: every setting with its type, bounds, default and description.

Knows neither where the values come from (`environment` reads them) nor what the hardware can do
(`models/device.py` picks the nearest that is possible, where it cannot do what is asked).
"""

from __future__ import annotations

import re
from base64 import b64decode
from contextlib import suppress
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    SecretStr,
    field_validator,
)

Precision = Literal["fp16", "bf16", "fp32", "fp8"]
Device = Literal["auto", "cpu", "cuda"]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
LogFormat = Literal["text", "json"]
Upload = Literal["oversize", "always"]
JobResults = Literal["folder", "bucket"]

ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@*\s,]+")
HOST = re.compile(r"\*|(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*")
OWNER = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
DATABASES = ("postgresql://", "postgresql+psycopg://", "postgres://", "sqlite:///")


class SettingsError(ValueError):
    """A bad setting. Its text is the one line that the operator reads."""


def _names(variable: str) -> Any:
    """What a setting is called: its environment variable, and the field's name in YAML files."""
    return AliasChoices(variable, variable.removeprefix("SDBENTO_").lower())


class Settings(BaseModel):
    """All settings, as values that never change. `environment.load_settings` makes one.

    The first five variables and their defaults are those of the RunPod worker that sdbento can
    replace; the names of most others begin with SDBENTO_.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    # Models and how they compute.

    sd_model: str = Field(
        "stabilityai/stable-diffusion-xl-base-1.0",
        min_length=1,
        validation_alias=_names("SD_MODEL"),
        description="Default model: a name of the catalogue, a Hub id, a diffusers folder or a "
        ".safetensors file; unset: SDXL base if there is a GPU, else `emoji` (a RunPod worker "
        "always takes SDXL base)",
    )
    precision: Precision = Field(
        "fp16",
        validation_alias=_names("PRECISION"),
        description="fp16, bf16, fp32, or fp8 (the UNet's transformer blocks in fp8, everything "
        "else in bf16; needs an Ada, Hopper or newer GPU); a CPU always computes in fp32",
    )
    enable_xformers: bool = Field(
        True,
        validation_alias=_names("ENABLE_XFORMERS"),
        description="Let xformers compute attention on a GPU, if it is installed and measured to "
        "be faster than torch's own attention (SDPA)",
    )
    cuda_graphs: bool = Field(
        True,
        validation_alias=_names("SDBENTO_CUDA_GRAPHS"),
        description="On a GPU, replay steps as CUDA graphs: it waits less between its kernels, but "
        "each image size takes additional memory",
    )
    compile: bool = Field(
        False,
        validation_alias=_names("SDBENTO_COMPILE"),
        description="Compile UNets with torch.compile: steps are faster, but starts take longer, "
        "the first one most; later ones use what is in SDBENTO_COMPILE_DIR",
    )
    compile_dir: Path = Field(
        Path("compiled"),
        validation_alias=_names("SDBENTO_COMPILE_DIR"),
        description="Folder for compiled UNets; keep it between starts",
    )
    device: Device = Field(
        "auto",
        validation_alias=_names("SDBENTO_DEVICE"),
        description="auto (a GPU if there is one), cpu or cuda",
    )
    gpus: str = Field(
        "",
        pattern=r"^(|all|[1-9]\d?|\d+(,\d+)+|cpu:[1-9]\d?)$",
        validation_alias=_names("SDBENTO_GPUS"),
        description="GPUs to compute on, with an engine process for each: all, how many (2), or "
        "which (0,2); cpu:2 divides a CPU between two. Unset: one device, in the server's process",
    )
    num_threads: int = Field(
        0,
        ge=0,
        le=1024,
        validation_alias=_names("SDBENTO_NUM_THREADS"),
        description="CPU threads that the engine computes with; 0: one for each core",
    )
    memory_gb: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        validation_alias=_names("SDBENTO_MEMORY_GB"),
        description="Memory in GB that all models in memory may take together; unset: 85% of the "
        "GPU's memory, or 60% of the machine's on a CPU",
    )
    models_dir: Path = Field(
        Path("models"),
        validation_alias=_names("SDBENTO_MODELS_DIR"),
        description="Folder with your models, as diffusers folders and .safetensors files; "
        "requests use their names in this folder",
    )
    allow_any_model: bool | None = Field(
        None,
        validation_alias=_names("SDBENTO_ALLOW_ANY_MODEL"),
        description="Let requests use any Hub id and any path, besides the default model, the "
        "catalogue and the models folder; unset: only if nobody but this machine can reach the "
        "server",
    )
    hub_owners: str = Field(
        "",
        validation_alias=_names("SDBENTO_HUB_OWNERS"),
        description="The only owners on the Hub whose models, ControlNets and LoRAs requests may "
        "use, as owner or owner/repo, separated by commas; goes before SDBENTO_ALLOW_ANY_MODEL; "
        "unset: LoRAs of all owners, models as SDBENTO_ALLOW_ANY_MODEL says",
    )
    offline: bool = Field(
        False,
        validation_alias=_names("SDBENTO_OFFLINE"),
        description="Never contact the Hub: use only models that are on this machine",
    )
    prefer_cache: bool = Field(
        False,
        validation_alias=_names("SDBENTO_PREFER_CACHE"),
        description="Use what is in the Hub cache without asking the Hub for newer versions; "
        "always on in the RunPod worker, and in a server with a volume at SDBENTO_RUNPOD_VOLUME",
    )

    # LoRAs and textual inversions.

    lora_dir: Path = Field(
        Path("loras"),
        validation_alias=_names("SDBENTO_LORA_DIR"),
        description="Folder with your LoRA files (.safetensors, also in subfolders); requests use "
        "their names in this folder",
    )
    max_loras: int = Field(
        32,
        ge=1,
        le=10_000,
        validation_alias=_names("SDBENTO_MAX_LORAS"),
        description="LoRAs that a model keeps in memory; a further one replaces the least "
        "recently used",
    )
    allow_lora_hub: bool = Field(
        True,
        validation_alias=_names("SDBENTO_ALLOW_LORA_HUB"),
        description="Let requests use LoRAs on the Hub, as `org/repo` or `org/repo/file`",
    )
    allow_lora_urls: bool = Field(
        False,
        validation_alias=_names("SDBENTO_ALLOW_LORA_URLS"),
        description="Let requests use LoRAs by https URL",
    )
    embeddings_dir: Path = Field(
        Path("embeddings"),
        validation_alias=_names("SDBENTO_EMBEDDINGS_DIR"),
        description="Folder with your textual inversions (.safetensors); the name of each is a "
        "word for prompts",
    )

    # Limits of requests.

    max_queue_size: int = Field(
        100,
        ge=1,
        le=100_000,
        validation_alias=_names("MAX_QUEUE_SIZE"),
        description="Requests that may wait; further ones get a 429 with Retry-After",
    )
    max_batch_size: int = Field(
        4,
        ge=1,
        le=256,
        validation_alias=_names("MAX_BATCH_SIZE"),
        description="Images that may share one UNet call (with guidance, an image takes two rows "
        "of it)",
    )
    request_timeout: float = Field(
        600.0,
        gt=0,
        le=3600,
        allow_inf_nan=False,
        validation_alias=_names("SDBENTO_REQUEST_TIMEOUT"),
        description="Seconds that a request may take if it does not set its own `timeout`",
    )
    stall_seconds: float = Field(
        60.0,
        ge=1,
        le=86400,
        allow_inf_nan=False,
        validation_alias=_names("SDBENTO_STALL_SECONDS"),
        description="Seconds after which a step counts as hanging and the process is replaced; 20 "
        "times what such a step usually takes, if that is longer",
    )
    shutdown_timeout: float = Field(
        20.0,
        ge=0,
        le=3600,
        allow_inf_nan=False,
        validation_alias=_names("SDBENTO_SHUTDOWN_TIMEOUT"),
        description="Seconds after SIGTERM in which requests under way are finished; the others "
        "then get a 503, and at most 8 seconds later the server ends",
    )
    max_timeout: float | None = Field(
        None,
        gt=0,
        le=3600,
        allow_inf_nan=False,
        validation_alias=_names("SDBENTO_MAX_TIMEOUT"),
        description="Longest `timeout` that a request may set; unset: SDBENTO_REQUEST_TIMEOUT. "
        "Jobs of /run have RunPod's executionTimeout instead",
    )
    max_pixels: int = Field(
        2048 * 2048,
        ge=64 * 64,
        validation_alias=_names("SDBENTO_MAX_PIXELS"),
        description="Largest width x height of a request, in pixels",
    )
    max_body_bytes: int = Field(
        32 * 1024 * 1024,
        ge=1024,
        validation_alias=_names("SDBENTO_MAX_BODY_BYTES"),
        description="Largest body of a request, in bytes",
    )
    max_image_bytes: int = Field(
        20 * 1024 * 1024,
        ge=1024,
        validation_alias=_names("SDBENTO_MAX_IMAGE_BYTES"),
        description="Largest image file that a request may contain or name, in bytes",
    )
    fetch_timeout: float = Field(
        20.0,
        gt=0,
        le=600,
        allow_inf_nan=False,
        validation_alias=_names("SDBENTO_FETCH_TIMEOUT"),
        description="Seconds that fetching one image may take",
    )
    allow_private_urls: bool = Field(
        False,
        validation_alias=_names("SDBENTO_ALLOW_PRIVATE_URLS"),
        description="Also fetch images from private and loopback addresses, and over http",
    )

    # The server.

    port: int | None = Field(
        None,
        ge=1,
        le=65535,
        validation_alias=_names("PORT"),
        description="Port that `sdbento serve` listens on; unset: 3000. RunPod's load balancer "
        "sets it",
    )
    port_health: int | None = Field(
        None,
        ge=1,
        le=65535,
        validation_alias=_names("PORT_HEALTH"),
        description="Another port, on which the server answers GET /ping and nothing else",
    )
    public_url: str | None = Field(
        None,
        pattern=r"^https?://[^/\s]+(/[^?#\s]*)?$",
        validation_alias=_names("SDBENTO_PUBLIC_URL"),
        description="What the URLs of images begin with: https://host or https://host/prefix; "
        "unset: the scheme and host of the client's request, which a proxy may have changed",
    )
    url_seconds: PositiveInt = Field(
        3600,
        validation_alias=_names("SDBENTO_URL_SECONDS"),
        description="Seconds for which the URLs of images (`response_format`: url) are valid",
    )
    url_bytes: PositiveInt = Field(
        256 * 1024 * 1024,
        validation_alias=_names("SDBENTO_URL_BYTES"),
        description="Bytes of memory for images that have URLs; when it is full, the oldest "
        "images are dropped early",
    )
    log_level: LogLevel = Field(
        "INFO",
        validation_alias=_names("SDBENTO_LOG_LEVEL"),
        description="DEBUG, INFO, WARNING or ERROR",
    )
    log_format: LogFormat = Field(
        "text",
        validation_alias=_names("SDBENTO_LOG_FORMAT"),
        description="text, or json: each line of the log is one JSON object",
    )
    log_prompts: bool = Field(
        False,
        validation_alias=_names("SDBENTO_LOG_PROMPTS"),
        description="Log the prompts of requests and the URLs of the images that they name, "
        "without passwords and queries",
    )

    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^/\s]+(/\S*)?$",
        validation_alias=_names("SDBENTO_OTLP_ENDPOINT"),
        description="Where traces are sent (OpenTelemetry's OTLP over HTTP), such as "
        "http://localhost:4318/v1/traces; unset: nowhere, unless BentoML's configuration says so",
    )
    trace_rate: float = Field(
        1.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        validation_alias=_names("SDBENTO_TRACE_RATE"),
        description="Share of requests that are traced; a `traceparent` that a request brings "
        "decides for itself",
    )

    # Who may ask.

    api_key: SecretStr | None = Field(
        None,
        validation_alias=_names("SDBENTO_API_KEY"),
        description="A key that every request must bring; if neither this nor SDBENTO_API_KEYS is "
        "set, no key is needed",
    )
    api_keys: Path | None = Field(
        None,
        validation_alias=_names("SDBENTO_API_KEYS"),
        description="File of keys, one for each user, with their limits: `sdbento keys add` "
        "writes it; can be used together with SDBENTO_API_KEY",
    )
    trusted_proxies: str = Field(
        "",
        validation_alias=_names("SDBENTO_TRUSTED_PROXIES"),
        description="Addresses or networks of the proxies in front of the server, separated by "
        "commas: the server takes a client's address from their X-Forwarded-For",
    )
    metrics_public: bool = Field(
        False,
        validation_alias=_names("SDBENTO_METRICS_PUBLIC"),
        description="Answer GET /metrics without a key",
    )
    cors_origins: str = Field(
        "",
        validation_alias=_names("SDBENTO_CORS_ORIGINS"),
        description="Web pages of other hosts that may call the server from a browser: origins "
        "such as https://example.com, separated by commas, or * for all",
    )
    allowed_hosts: str = Field(
        "",
        validation_alias=_names("SDBENTO_ALLOWED_HOSTS"),
        description="Host names under which clients may reach the server, such as sd.example.com "
        "or *.example.com, separated by commas, or * for all; IP addresses, localhost and names "
        "such as *.local always work; unset: any name on a server with keys, otherwise those that "
        "a web page cannot misuse",
    )

    # Durable jobs.

    state_dir: Path = Field(
        Path("state"),
        validation_alias=_names("SDBENTO_STATE_DIR"),
        description="Folder for the jobs of /run and their results, and for what clients of "
        "AUTOMATIC1111's API chose; each server needs its own",
    )
    job_store_url: SecretStr | None = Field(
        None,
        validation_alias=_names("JOB_STORE_URL"),
        description="Address of the jobs' database, postgresql://user:password@host/name or "
        "sqlite:///file; any number of servers may share PostgreSQL, SQLite belongs to one; unset: "
        "SQLite in SDBENTO_STATE_DIR",
    )
    job_results: JobResults = Field(
        "folder",
        validation_alias=_names("SDBENTO_JOB_RESULTS"),
        description="Where the results of jobs are kept: folder (SDBENTO_JOB_RESULTS_DIR) or "
        "bucket (that of the BUCKET_ variables); the same for all servers that share JOB_STORE_URL",
    )
    job_results_dir: Path | None = Field(
        None,
        validation_alias=_names("SDBENTO_JOB_RESULTS_DIR"),
        description="Folder for the results of jobs, which servers that share JOB_STORE_URL must "
        "share as well; unset: SDBENTO_STATE_DIR",
    )
    job_result_seconds: PositiveInt = Field(
        1800,
        validation_alias=_names("SDBENTO_JOB_RESULT_SECONDS"),
        description="Seconds for which the result of a job of /run is kept; that of /runsync is "
        "kept for at most 60",
    )
    max_jobs: PositiveInt = Field(
        1000,
        validation_alias=_names("SDBENTO_MAX_JOBS"),
        description="Unfinished jobs of /run and /runsync; further ones get a 429",
    )

    webhook_secret: SecretStr | None = Field(
        None,
        validation_alias=_names("SDBENTO_WEBHOOK_SECRET"),
        description="Key that webhooks are signed with (standardwebhooks.com): whsec_ and the "
        "base64 of 24 to 64 random bytes; unset: webhooks are not signed",
    )

    # Where results of jobs go.

    upload: Upload = Field(
        "oversize",
        validation_alias=_names("SDBENTO_UPLOAD"),
        description="Which results of jobs are uploaded if a bucket is configured: always, or "
        "oversize (those larger than SDBENTO_RUNPOD_MAX_RUN_BYTES or "
        "SDBENTO_RUNPOD_MAX_RUNSYNC_BYTES)",
    )
    bucket_endpoint_url: str | None = Field(
        None,
        validation_alias=_names("BUCKET_ENDPOINT_URL"),
        description="S3 endpoint that results of jobs are uploaded to; set all four BUCKET_ "
        "variables or none",
    )
    bucket_access_key_id: SecretStr | None = Field(
        None,
        validation_alias=_names("BUCKET_ACCESS_KEY_ID"),
        description="Access key id for that endpoint",
    )
    bucket_secret_access_key: SecretStr | None = Field(
        None,
        validation_alias=_names("BUCKET_SECRET_ACCESS_KEY"),
        description="Secret key for that endpoint",
    )
    bucket_name: str | None = Field(
        None,
        validation_alias=_names("BUCKET_NAME"),
        description="Bucket that results are uploaded to",
    )
    bucket_url_seconds: int = Field(
        604_800,
        ge=60,
        le=604_800,  # what Signature Version 4 allows
        validation_alias=_names("SDBENTO_BUCKET_URL_SECONDS"),
        description="Seconds for which the URLs of uploaded results are valid",
    )

    # The RunPod worker.

    runpod_volume: Path = Field(
        Path("/runpod-volume"),
        validation_alias=_names("SDBENTO_RUNPOD_VOLUME"),
        description="Where RunPod mounts the network volume and cached models; the models, loras, "
        "embeddings and Hub cache on it are used",
    )
    runpod_prefetch: int = Field(
        4,
        ge=0,
        le=1000,
        validation_alias=_names("SDBENTO_RUNPOD_PREFETCH"),
        description="RunPod worker: jobs that it takes beyond MAX_BATCH_SIZE, so that the batch "
        "stays full",
    )
    runpod_drain_seconds: float = Field(
        20.0,
        ge=0,
        le=3600,
        allow_inf_nan=False,
        validation_alias=_names("SDBENTO_RUNPOD_DRAIN_SECONDS"),
        description="RunPod worker: seconds after SIGTERM until it gives up its open request for "
        "jobs; it always finishes the jobs that it has",
    )
    runpod_max_run_bytes: int = Field(
        10_000_000,
        ge=1024,
        validation_alias=_names("SDBENTO_RUNPOD_MAX_RUN_BYTES"),
        description="Largest result of a job of /run, in bytes; a larger one is uploaded, or "
        "refused by a RunPod worker without a bucket",
    )
    runpod_max_runsync_bytes: int = Field(
        20_000_000,
        ge=1024,
        validation_alias=_names("SDBENTO_RUNPOD_MAX_RUNSYNC_BYTES"),
        description="The same for jobs of /runsync",
    )

    @field_validator("public_url", mode="before")
    @classmethod
    def _without_slash(cls, url: object) -> object:
        return url.rstrip("/") if isinstance(url, str) else url

    @field_validator("job_store_url")
    @classmethod
    def _known_database(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None and not url.get_secret_value().startswith(DATABASES):
            raise ValueError(f"must begin with {' or '.join(DATABASES)}")
        return url

    @field_validator("webhook_secret")
    @classmethod
    def _signing_key(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is None:
            return None
        encoded = secret.get_secret_value().removeprefix("whsec_")
        with suppress(ValueError):
            if 24 <= len(b64decode(encoded, validate=True)) <= 64:
                return secret
        raise ValueError("must be whsec_ and the base64 of 24 to 64 bytes")

    @field_validator("api_key")
    @classmethod
    def _not_empty(cls, key: SecretStr | None) -> SecretStr | None:
        """A key that is empty by mistake (`$KEY` is not set) must not open the server to all."""
        if key is None:
            return None
        stripped = key.get_secret_value().strip()  # files of secrets end in a line break
        if not stripped:
            raise ValueError("must not be empty; unset it to serve without a key")
        return SecretStr(stripped)

    @field_validator("api_keys", mode="before")
    @classmethod
    def _is_named(cls, file: object) -> object:
        if file == "":  # as a path it would be the current folder
            raise ValueError("must not be empty; name a file of keys, or unset it")
        return file

    @field_validator("hub_owners")
    @classmethod
    def _are_owners(cls, text: str) -> str:
        owners = [owner.strip() for owner in text.split(",")]
        for owner in filter(None, owners):
            if not OWNER.fullmatch(owner):
                raise ValueError("must be owners or owner/repo, separated by commas")
        return ",".join(filter(None, owners))

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, text: str) -> str:
        origins = [origin.strip().lower().rstrip("/") for origin in text.split(",")]
        for origin in filter(None, origins):
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ValueError("must be origins such as https://example.com, or *")
        return ",".join(filter(None, origins))

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, text: str) -> str:
        parts = filter(None, (part.strip() for part in text.split(",")))
        try:
            return ",".join(str(ip_network(part, strict=False)) for part in parts)
        except ValueError:
            raise ValueError(
                "must be addresses or networks such as 10.0.0.0/8, separated by commas"
            ) from None

    @field_validator("allowed_hosts")
    @classmethod
    def _are_hosts(cls, text: str) -> str:
        hosts = [host.strip().lower().removesuffix(".") for host in text.split(",")]
        for host in filter(None, hosts):
            if not HOST.fullmatch(host):
                raise ValueError(
                    "must be names such as sd.example.com or *.example.com, without a port, or *"
                )
        return ",".join(filter(None, hosts))

    @classmethod
    def variables(cls) -> list[tuple[str, str, str]]:
        """(variable, default, description) of every setting, for the tables of the documents."""
        return [
            (variable_of(name), as_text(field.default), field.description or "")
            for name, field in cls.model_fields.items()
        ]

    def changed(self) -> list[tuple[str, str, str]]:
        """(variable, value, default) of every setting that differs from its default."""
        return [
            (variable_of(name), as_text(getattr(self, name)), as_text(field.default))
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.default
        ]


def variable_of(field: str) -> str:
    """The environment variable of a field."""
    alias = Settings.model_fields[field].validation_alias
    assert isinstance(alias, AliasChoices)
    return str(alias.choices[0])


def as_text(value: object) -> str:
    """A setting's value as people write it. Secrets are shown as asterisks."""
    if value is None:
        return "unset"
    return str(value).lower() if isinstance(value, bool) else str(value)
