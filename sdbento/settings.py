"""What the operator configures, read once: the only module that looks at the environment.

Priority: explicit arguments (CLI) > environment > YAML file named by SDBENTO_CONFIG > default.
Knows nothing of what the hardware can do: `pipelines` turns a wish into the nearest right thing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import AliasChoices, Field, PositiveInt, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    YamlConfigSettingsSource,
)

from sdbento.serving_settings import ServingSettings, variable

DATABASES = ("postgresql://", "postgresql+psycopg://", "postgres://", "sqlite:///")


class SettingsError(ValueError):
    """A bad setting; its text is the one line that the operator reads."""


class Settings(ServingSettings):
    """All settings: those of serving, and of the doors that need some.

    `load` is the way to make one: it turns a bad value into one clear line.
    """

    bucket_endpoint_url: str | None = Field(
        None,
        validation_alias=variable("BUCKET_ENDPOINT_URL"),
        description="RunPod worker: S3 address that results above the payload limit are uploaded "
        "to; all four BUCKET_ variables or none",
    )
    bucket_access_key_id: SecretStr | None = Field(
        None,
        validation_alias=variable("BUCKET_ACCESS_KEY_ID"),
        description="RunPod worker: key id for that address",
    )
    bucket_secret_access_key: SecretStr | None = Field(
        None,
        validation_alias=variable("BUCKET_SECRET_ACCESS_KEY"),
        description="RunPod worker: secret key for that address",
    )
    bucket_name: str | None = Field(
        None,
        validation_alias=variable("BUCKET_NAME"),
        description="RunPod worker: bucket that results go to",
    )
    bucket_url_seconds: int = Field(
        604_800,
        ge=60,
        le=604_800,  # what Signature Version 4 allows
        validation_alias=variable("SDBENTO_BUCKET_URL_SECONDS"),
        description="RunPod worker: seconds for which the URLs of uploaded results work",
    )
    runpod_max_run_bytes: int = Field(
        10_000_000,
        ge=1024,
        validation_alias=variable("SDBENTO_RUNPOD_MAX_RUN_BYTES"),
        description="RunPod worker: largest result of a job that came through /run",
    )
    runpod_max_runsync_bytes: int = Field(
        20_000_000,
        ge=1024,
        validation_alias=variable("SDBENTO_RUNPOD_MAX_RUNSYNC_BYTES"),
        description="RunPod worker: largest result of a job that came through /runsync",
    )
    runpod_prefetch: int = Field(
        4,
        ge=0,
        le=1000,
        validation_alias=variable("SDBENTO_RUNPOD_PREFETCH"),
        description="RunPod worker: jobs taken beyond MAX_BATCH_SIZE, so that the batch stays full",
    )
    runpod_drain_seconds: float = Field(
        20.0,
        ge=0,
        le=3600,
        allow_inf_nan=False,
        validation_alias=variable("SDBENTO_RUNPOD_DRAIN_SECONDS"),
        description="RunPod worker: seconds after SIGTERM until its open request for jobs is given "
        "up; jobs under way are always finished",
    )
    runpod_volume: Path = Field(
        Path("/runpod-volume"),
        validation_alias=variable("SDBENTO_RUNPOD_VOLUME"),
        description="Where RunPod mounts the network volume and the models that it cached; its "
        "models, loras, embeddings and Hub cache are used",
    )
    port: int | None = Field(
        None,
        ge=1,
        le=65535,
        validation_alias=variable("PORT"),
        description="Port that `sdbento serve` listens on; RunPod's load balancer sets it",
    )
    port_health: int | None = Field(
        None,
        ge=1,
        le=65535,
        validation_alias=variable("PORT_HEALTH"),
        description="A port of its own for GET /ping, where it is not to be asked for on PORT",
    )
    state_dir: Path = Field(
        Path("state"),
        validation_alias=variable("SDBENTO_STATE_DIR"),
        description="Folder of the jobs of /run and their results; one server a folder",
    )
    job_store_url: SecretStr | None = Field(
        None,
        validation_alias=variable("JOB_STORE_URL"),
        description="Address of the jobs' database, postgresql://user:password@host/name or "
        "sqlite:///file; one server a database; unset: SQLite in SDBENTO_STATE_DIR",
    )
    job_result_seconds: PositiveInt = Field(
        1800,
        validation_alias=variable("SDBENTO_JOB_RESULT_SECONDS"),
        description="Seconds for which the result of a job of /run is kept; /runsync: at most 60",
    )
    max_jobs: PositiveInt = Field(
        1000,
        validation_alias=variable("SDBENTO_MAX_JOBS"),
        description="Unfinished jobs of /run and /runsync; one more is answered 429",
    )

    @field_validator("job_store_url")
    @classmethod
    def _known_database(cls, url: SecretStr | None) -> SecretStr | None:
        if url is None or not url.get_secret_value():  # forms send what is not filled in as ""
            return None
        if not url.get_secret_value().startswith(DATABASES):
            raise ValueError(f"must begin with {' or '.join(DATABASES)}")
        return url

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        sources = [init_settings, env_settings]
        if path := os.environ.get("SDBENTO_CONFIG"):
            sources.append(_yaml_source(settings_cls, path))
        return tuple(sources)

    @classmethod
    def load(cls, **overrides: Any) -> Settings:
        """Read all sources; `overrides` (by field name) win where they are not None.

        Raises SettingsError with one line that names variable, value and what is allowed.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        try:
            return cls(**given)
        except ValidationError as error:
            raise SettingsError(_explain(error)) from None

    @classmethod
    def variables(cls) -> list[tuple[str, str, str]]:
        """(variable, default, description) of every setting, for the README's table."""
        return [
            (_env_name(name), _show(field.default), field.description or "")
            for name, field in cls.model_fields.items()
        ]

    def changed(self) -> list[tuple[str, str, str]]:
        """(variable, value, default) of every setting that differs from its default."""
        return [
            (_env_name(name), _show(getattr(self, name)), _show(field.default))
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.default
        ]

    def environment(self, **defaults: str) -> dict[str, str]:
        """The environment in which a child, whatever its folder, reads these very settings."""
        own = {_env_name(name): _absolute(value) for name, value in self if value is not None}
        return {**defaults, **os.environ, **own, "SDBENTO_CONFIG": ""}


def unknown_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
    """SDBENTO_ variables that no setting reads: misspelt ones, most likely."""
    known = {"SDBENTO_CONFIG", *(_env_name(name) for name in Settings.model_fields)}
    return sorted(name for name in environment if name.startswith("SDBENTO_") and name not in known)


def use_hub_cache(folder: Path) -> None:
    """Let huggingface_hub keep its files in `folder`, where the operator names no other one.

    It reads the variable when it is imported: to be called before that.
    """
    if not {"HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"} & os.environ.keys():
        os.environ["HF_HUB_CACHE"] = str(folder)


def use_compile_dir(folder: Path) -> None:
    """Let torch.compile keep its work in `folder`; it reads the variable each time."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.absolute())


def _yaml_source(settings_cls: type[BaseSettings], path: str) -> YamlConfigSettingsSource:
    if not Path(path).is_file():
        raise SettingsError(f"SDBENTO_CONFIG={path!r}: no such file")
    try:
        return YamlConfigSettingsSource(settings_cls, yaml_file=path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"SDBENTO_CONFIG={path!r}: not YAML: {reason}") from None
    except (TypeError, ValueError):
        raise SettingsError(
            f"SDBENTO_CONFIG={path!r}: must be a mapping of settings to values"
        ) from None


def _env_name(field: str) -> str:
    alias = Settings.model_fields[field].validation_alias
    assert isinstance(alias, AliasChoices)
    return str(alias.choices[0])


# Their values are never shown; SecretStr sees to it everywhere but in complaints.
_SECRETS = {"BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY", "JOB_STORE_URL"}


def _show(value: object) -> str:
    if value is None:
        return "unset"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _absolute(value: object) -> str:
    """A setting as a variable's text; what is a path here stays that path in other folders."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, str) and "/" in value and Path(value).exists():
        value = Path(value)
    return str(value.absolute()) if isinstance(value, Path) else _show(value)


def _explain(error: ValidationError) -> str:
    names = {name: _env_name(name) for name in Settings.model_fields}
    lines = []
    for item in error.errors():
        place = str(item["loc"][0])
        if item["type"] == "extra_forbidden":
            lines.append(f"{place} is not a setting; known: {', '.join(names)}")
            continue
        name = names.get(place, place)
        problem = item["msg"].removeprefix("Value error, ")
        problem = problem[:1].lower() + problem[1:]
        given = "***" if name in _SECRETS else repr(item["input"])
        lines.append(f"{name}={given}: {problem}")
    return "; ".join(lines)
