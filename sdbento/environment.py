"""Reads the settings and explains what is wrong with them. Nothing else looks at os.environ.

Priority: explicit arguments (CLI) > environment > YAML file named by SDBENTO_CONFIG > default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from sdbento.settings import LogFormat, Settings, SettingsError, as_text, variable_of

CONFIG_FILE = "SDBENTO_CONFIG"
SUPERVISOR = "_SDBENTO_SUPERVISOR"  # not for operators: a process tells it to those that it starts


class _Variables(EnvSettingsSource):
    """Those that are not empty: web forms and Compose's `${NAME}` give "" for what nobody has set.

    Variables of keys are not passed over, so that one that is empty by mistake is refused and does
    not open the server to all.
    """

    def __call__(self) -> dict[str, Any]:
        given = super().__call__()
        return {name: value for name, value in given.items() if value != "" or name in _KEYS}


_KEYS = {variable_of("api_key"), variable_of("api_keys")}


class _LoadedSettings(BaseSettings, Settings):
    """Settings that pydantic-settings fills from the sources."""

    # Fields can be given by name, which YAML files do. Without regard to case, the variables
    # DEVICE and LOG_LEVEL of other programs would be taken for the fields `device`, `log_level`.
    model_config = SettingsConfigDict(case_sensitive=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        sources: list[PydanticBaseSettingsSource] = [init_settings, _Variables(settings_cls)]
        if path := os.environ.get(CONFIG_FILE):
            sources.append(_yaml_source(settings_cls, path))
        return tuple(sources)


def load_settings(**overrides: Any) -> Settings:
    """The settings from all sources; `overrides` (by field name) win where they are not None.

    Raises SettingsError with one line that names variable, value and what is allowed.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return _LoadedSettings(**given)
    except ValidationError as error:
        raise SettingsError(_explain(error)) from None


def load_log_format() -> LogFormat:
    """How lines of the log are written, also those that tell of a bad setting."""
    try:
        return load_settings().log_format
    except SettingsError:
        return "json" if os.environ.get(variable_of("log_format")) == "json" else "text"


def unknown_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
    """SDBENTO_ variables that no setting reads; most likely they are misspelt."""
    known = {CONFIG_FILE, *(variable_of(name) for name in Settings.model_fields)}
    return sorted(name for name in environment if name.startswith("SDBENTO_") and name not in known)


def child_environment(settings: Settings, **defaults: str) -> dict[str, str]:
    """The variables with which a child process, in whatever folder, loads these same settings.

    `defaults` are for variables of other programs; those that are set already win.
    """
    own = {variable_of(name): _as_variable(value) for name, value in settings if value is not None}
    return {**defaults, **os.environ, **own, CONFIG_FILE: ""}


def environment_on_gpu(gpu: int | None) -> dict[str, str]:
    """The variables of a process that computes on this one of the GPUs that this process sees;
    None: on none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in visible.split(",")] if visible else None
    chosen = "" if gpu is None else names[gpu] if names else str(gpu)
    return {**os.environ, "CUDA_VISIBLE_DEVICES": chosen}


def use_hub_cache(folder: Path) -> None:
    """Let huggingface_hub keep its files in `folder`, unless the operator has chosen another one.

    Call it before huggingface_hub is imported, which is when the variable is read.
    """
    if not {"HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"} & os.environ.keys():
        os.environ["HF_HUB_CACHE"] = str(folder)


def use_compile_dir(folder: Path) -> None:
    """Let torch.compile keep its work in `folder`. Unlike the Hub's, its variable is read anew
    each time, so this may be called at any time."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.absolute())


def terminal_variables() -> dict[str, str]:
    """What the terminal says of itself."""
    names = ("TERM", "TERM_PROGRAM", "KITTY_WINDOW_ID", "TMUX")
    return {name: os.environ[name] for name in names if name in os.environ}


def note_supervisor() -> None:
    """Let the processes that this one starts know that it is their supervisor."""
    os.environ[SUPERVISOR] = str(os.getpid())


def supervisor() -> int:
    """The id of the process that has called `note_supervisor`, or else of the present parent."""
    return int(os.environ.get(SUPERVISOR, os.getppid()))


def _yaml_source(settings_cls: type[BaseSettings], path: str) -> YamlConfigSettingsSource:
    if not Path(path).is_file():
        raise SettingsError(f"{CONFIG_FILE}={path!r}: no such file")
    try:
        return YamlConfigSettingsSource(settings_cls, yaml_file=path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"{CONFIG_FILE}={path!r}: not YAML: {reason}") from None
    except (TypeError, ValueError):
        raise SettingsError(
            f"{CONFIG_FILE}={path!r}: must be a mapping of settings to values"
        ) from None


def _as_variable(value: object) -> str:
    """A setting as a variable's text. Relative paths become absolute, for a child that runs in
    another folder."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, str) and "/" in value and Path(value).exists():
        value = Path(value)
    return str(value.absolute()) if isinstance(value, Path) else as_text(value)


# pydantic's errors quote the input, which SecretStr has no say in.
_SECRETS = {
    variable_of(name)
    for name, field in Settings.model_fields.items()
    if SecretStr in get_args(field.annotation)
}


def _explain(error: ValidationError) -> str:
    names = {name: variable_of(name) for name in Settings.model_fields}
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
