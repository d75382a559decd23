"""How the command line talks to a person: one line at a time, on stderr."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import click

from sdbento.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

# Of commands that ask a server.
url_option = click.option(
    "--url", default="http://localhost:3000", show_default=True, help="Address of the server."
)
key_option = click.option("--key", help="API key, if the server has keys.")


def say(text: str) -> None:
    """One line on stderr, apart from the output that was asked for."""
    click.echo(f"sdbento: {text}", err=True)


def keep_quiet(settings: Settings) -> None:
    """Leave the terminal to the progress bar, unless the log level is DEBUG."""
    if settings.log_level == "DEBUG":
        logging.basicConfig(level=logging.DEBUG)
    else:
        logging.disable(logging.ERROR)


def progress_bar(console: Console) -> Progress:
    """What is done, a bar, and how long it has taken; nothing where there is no terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console, disable=not console.is_terminal)
