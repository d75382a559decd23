"""How the command line talks to a person: one line at a time, on stderr."""

from __future__ import annotations

import logging

import click

from sdbento.settings import Settings


def say(text: str) -> None:
    """One line on stderr, apart from the output that was asked for."""
    click.echo(f"sdbento: {text}", err=True)


def keep_quiet(settings: Settings) -> None:
    """Leave the terminal to the progress bar, unless the log level is DEBUG."""
    if settings.log_level == "DEBUG":
        logging.basicConfig(level=logging.DEBUG)
    else:
        logging.disable(logging.ERROR)
