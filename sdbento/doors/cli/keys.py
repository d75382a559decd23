"""`sdbento keys`: who may use the server. Changes the file that a running server reads again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sdbento.access import entries
from sdbento.doors.cli.output import say
from sdbento.environment import load_settings
from sdbento.settings import SettingsError

file_option = click.option(
    "--file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file of keys.  [default: SDBENTO_API_KEYS]",
)


@click.group()
def keys() -> None:
    """Add, list and remove the keys of users.

    They are in the file that --file or SDBENTO_API_KEYS names.
    """


@keys.command()
@click.argument("name")
@click.option(
    "--requests-per-minute",
    type=click.IntRange(1, entries.MAX_RATE),
    help="Requests that the user may send in a minute; no limit if left out.",
)
@click.option(
    "--images-at-once",
    type=click.IntRange(1),
    help="Images of the user that may be unfinished; no limit if left out.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    help="A model that the user may use; can be repeated; all if left out.",
)
@click.option("--password", is_flag=True, help="Ask for a password instead of making a key.")
@file_option
def add(
    name: str, password: bool, models: tuple[str, ...], file: Path | None, **limits: Any
) -> None:
    """Make a key for the user NAME, and print it.

    It cannot be printed again: only its hash is kept.
    """
    file = _file(file)
    chosen = (
        click.prompt("Password", hide_input=True, confirmation_prompt=True) if password else None
    )
    key = entries.add(file, name, chosen, models=list(models) or None, **limits)
    say(f"{name} can use the server now; {file} has the hash of the key")
    if key is not None:
        click.echo(key)


@keys.command("list")
@file_option
def list_keys(file: Path | None) -> None:
    """List the users and their limits."""
    for entry in entries.read(_file(file)):
        limits = entry.model_dump(exclude={"name", "hash"}, exclude_none=True)
        parts = ["password" if entry.is_password else "key"]
        parts += [f"{limit}={_text(value)}" for limit, value in limits.items()]
        click.echo(f"{entry.name:<24} {'  '.join(parts)}")


@keys.command()
@click.argument("name")
@file_option
def remove(name: str, file: Path | None) -> None:
    """Remove the key of the user NAME.

    Running servers notice it within seconds.
    """
    entries.remove(_file(file), name)
    say(f"{name} cannot use the server any more")


def _file(given: Path | None) -> Path:
    """Raises SettingsError if neither the option nor the setting names a file."""
    if (file := given or load_settings().api_keys) is None:
        raise SettingsError("which file? Set SDBENTO_API_KEYS, for the server too, or give --file")
    return file


def _text(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)
