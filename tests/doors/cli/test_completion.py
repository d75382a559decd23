"""Completion, as a shell asks for it: in a real bash where there is one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(sys.executable).parent
ASK = """
PATH="$1:$PATH"
eval "$(sdbento completion bash)"
COMP_WORDS=(sdbento "${@:2}"); COMP_CWORD=$(($# - 1))
_sdbento_completion sdbento
printf '%s\\n' "${COMPREPLY[@]}"
"""


def completed(*words: str, **variables: str) -> list[str]:
    """What bash offers after these words, the last of which is just being typed."""
    done = subprocess.run(
        ["bash", "-c", ASK, "bash", str(FOLDER), *words],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="the machine has no bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["gen"], ["generate"]),
        (["generate", "--num-i"], ["--num-images"]),
        (["generate", "x", "--show", "si"], ["sixel"]),
        (["serve", "--model", "sha"], ["shapes"]),
        (["pull", "stabilityai/sdxl-t"], ["stabilityai/sdxl-turbo"]),
    ],
)
def test_bash_completes(words: list[str], offered: list[str]) -> None:
    assert completed(*words) == offered


@pytest.mark.skipif(shutil.which("bash") is None, reason="the machine has no bash")
def test_a_bad_setting_offers_nothing() -> None:
    assert completed("serve", "--model", "sha", MAX_QUEUE_SIZE="0") == []


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_scripts_too(shell: str) -> None:
    command = [str(FOLDER / "sdbento"), "completion", shell]
    assert "_SDBENTO_COMPLETE" in subprocess.check_output(command, text=True)
