"""The same checks everywhere: `make check`, the hooks before a commit, continuous integration."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def make_recipe(word: str) -> list[str]:
    """The commands of a make target, as they are typed in the repository's folder."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(rf"^{word}:.*\n((?:\t.*\n)+)", text, re.MULTILINE)
    assert recipe is not None
    return [
        line.strip().removeprefix("@").replace("$(BIN)", ".venv/bin")
        for line in recipe[1].splitlines()
    ]


def test_the_hooks_run_what_make_check_runs() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    [repository] = config["repos"]
    assert repository["repo"] == "local"  # nothing to download
    assert [hook["entry"] for hook in repository["hooks"]] == make_recipe("check")


def test_hooks_check_all_files_whatever_was_changed() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    for hook in config["repos"][0]["hooks"]:
        assert hook["language"] == "system"
        assert hook["pass_filenames"] is False


def test_continuous_integration_runs_the_targets_of_make() -> None:
    lines = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    words = [line for line in lines if line.startswith("make")]
    checks = ["make check", "make docs", "make docs-check", "make docs-fuzz-short"]
    assert words == ["make .venv/bin/helm", *checks, "make test", "make test-long"]
