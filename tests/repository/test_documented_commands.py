"""The commands and variables that the documents name exist, with the options that they show."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from sdbento.doors.cli.commands import commands
from sdbento.environment import CONFIG_FILE
from sdbento.settings import Settings
from tests.repository.test_readme import DOCUMENTS, ROOT

VARIABLES = {variable for variable, *_ in Settings.variables()} | {CONFIG_FILE}
OWN_NAME = re.compile(r"\b(?:SDBENTO_[A-Z_]*[A-Z]|MAX_[A-Z]+_SIZE|PORT_HEALTH|BUCKET_[A-Z_]+)\b")
# At the beginning, after variables, or after another command.
BEGIN = r"(?:^|&& )(?:[A-Z_]+=(?:\$\([^)]*\)|\S)+ +)*"
COMMAND = re.compile(BEGIN + r"(?:\.venv/bin/)?sdbento (?!needs )([a-z]+\b[^\n`|&;]*)")
MAKE = re.compile(BEGIN + r"make ([a-z-]+)")


def shown(path: Path) -> Iterator[str]:
    """What a document shows of bash: in blocks, and `sdbento ...` or `make ...` in a sentence."""
    text = path.read_text(encoding="utf-8")
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`((?:[A-Z_]+=\S+ )*(?:sdbento|make) [^`\n]+)`", text)


OURS = sorted(
    {
        match[1].partition(" #")[0].strip()
        for path in DOCUMENTS
        for line in shown(path)
        for match in COMMAND.finditer(line)
    }
)
MAKES = sorted({word for path in DOCUMENTS for line in shown(path) for word in MAKE.findall(line)})


def parse(command: str) -> None:
    """Read a command as `sdbento` does, and run nothing. Raises UsageError."""
    group: click.Command = commands
    name: str | None = "sdbento"
    words = [word for word in shlex.split(command) if word not in ("...", "…")]
    while isinstance(group, click.Group) and words:
        name, found, words = group.resolve_command(click.Context(group), words)
        assert name is not None and found is not None
        group = found
    group.make_context(name, words)


@pytest.mark.parametrize("command", OURS)
def test_a_command_of_the_documents_is_understood(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("out.png", "FILE", "in.png"):
        (tmp_path / name).touch()
    try:
        parse(command)
    except click.MissingParameter:  # in a sentence: `sdbento pull` by itself
        assert len(command.split()) <= 2
    except click.exceptions.NoArgsIsHelpError:  # `sdbento keys`
        assert len(command.split()) == 1


def test_a_command_that_does_not_exist_is_noticed() -> None:
    for command in ("fly", "serve --wings", "keys borrow bob"):
        with pytest.raises(click.UsageError):
            parse(command)


@pytest.mark.parametrize("word", MAKES)
def test_a_word_of_make_exists(word: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{word}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_setting_that_is_named_exists(path: Path) -> None:
    named = set(OWN_NAME.findall(path.read_text(encoding="utf-8")))
    assert named - VARIABLES == set()


@pytest.mark.parametrize("name", ["docs/deploy.md", "docs/security.md"])
def test_proxies_let_through_what_the_server_takes(name: str) -> None:
    """As large bodies, for as long, and events at once."""
    text = (ROOT / name).read_text(encoding="utf-8")
    sizes = re.findall(r"client_max_body_size (\d+)m;|max_size (\d+)MiB", text)
    seconds = re.findall(r"proxy_read_timeout (\d+)s;", text)
    assert {int(nginx or caddy) * 2**20 for nginx, caddy in sizes} == {Settings().max_body_bytes}
    assert seconds and all(int(one) > Settings().request_timeout for one in seconds)
    assert text.count("proxy_buffering off;") == len(seconds)


def test_the_command_for_a_secret_of_webhooks_makes_one() -> None:
    text = (ROOT / "docs" / "runpod.md").read_text(encoding="utf-8")
    (program,) = re.findall(r'^python -c "(.*)"$', text, re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert Settings(webhook_secret=done.stdout.strip()).webhook_secret


def test_the_documents_show_commands() -> None:
    assert len(OURS) > 15 and len(MAKES) > 10
