"""What shells complete when Tab is pressed: commands, options, and the names of models.

click writes the scripts; this says how they are printed, and which models there are.
"""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from sdbento.environment import load_settings
from sdbento.settings import SettingsError

VARIABLE = "_SDBENTO_COMPLETE"  # by which the scripts ask this command; click derives it as well
SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a script for completion with the Tab key.

    \b
    In ~/.bashrc:                    eval "$(sdbento completion bash)"
    In ~/.zshrc:                     eval "$(sdbento completion zsh)"
    In ~/.config/fish/config.fish:   sdbento completion fish | source
    """
    root = context.find_root()
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(root.command, {}, "sdbento", VARIABLE).source())


def model_names(_: click.Context, __: click.Parameter, begun: str) -> list[str]:
    """The models of the catalogue and of the models folder whose names begin so."""
    from sdbento.catalog.lookup import Catalog

    try:
        specs = Catalog(load_settings()).list()
    except SettingsError:
        return []
    return [name for spec in specs for name in spec.names if name.startswith(begun)]
