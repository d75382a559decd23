"""`sdbento inspect` on files of ours, of the web UI, and on what is neither."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdbento.doors.cli.commands import commands
from sdbento.errors import InvalidParameter
from sdbento.images.codec import MEDIA_TYPES, encode
from sdbento.images.metadata import Metadata

RED = Image.new("RGB", (16, 8), "red")
INFOTEXT = "a café ☕\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, Seed: 4, Size: 16x8"
PARAMETERS = {"prompt": "a café ☕", "seed": 2**63 - 1}


def inspected(path: Path, *options: str) -> Result:
    return CliRunner().invoke(commands, ["inspect", str(path), *options])


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return tmp_path / "picture"


@pytest.mark.parametrize("output_format", MEDIA_TYPES)
def test_an_image_of_ours(picture: Path, output_format: str) -> None:
    picture.write_bytes(encode(RED, output_format, Metadata(INFOTEXT, PARAMETERS)))
    infotext, parameters = inspected(picture).stdout.rsplit("\n\n", 1)
    assert infotext == INFOTEXT
    assert json.loads(parameters) == PARAMETERS
    whole = json.loads(inspected(picture, "--json").stdout)
    assert whole == {"infotext": INFOTEXT, "parameters": PARAMETERS}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_an_image_of_the_web_ui(picture: Path, suffix: str) -> None:
    path = picture.with_suffix(suffix)
    if suffix == ".png":
        info = PngInfo()
        info.add_text("parameters", INFOTEXT)
        RED.save(path, pnginfo=info)
    else:
        RED.save(path, exif=Metadata(INFOTEXT).as_exif())
    assert inspected(path).stdout == f"{INFOTEXT}\n"
    assert json.loads(inspected(path, "--json").stdout)["parameters"] is None


def test_what_says_nothing_is_an_error(picture: Path) -> None:
    picture.write_bytes(encode(RED, "png"))
    assert "does not say how it was made" in inspected(picture).stderr
    picture.write_bytes(b"no image")
    assert isinstance(inspected(picture).exception, InvalidParameter)
    assert inspected(picture.parent).exit_code == 2
    assert inspected(picture.with_name("missing")).exit_code == 2


def test_a_file_that_may_not_be_read(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture.touch()

    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert "Permission denied" in inspected(picture).stderr


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_no_terminal_obeys_a_file(picture: Path, options: list[str]) -> None:
    hostile = Metadata("red \x1b[31m \x9b2J\nSteps: 1", {"prompt": "\x9b2J \ud800"})
    picture.write_bytes(encode(RED, "png", hostile))
    result = inspected(picture, *options)
    assert result.exit_code == 0
    assert not set("\x1b\x9b") & set(result.stdout)


def test_it_imports_nothing_heavy(picture: Path) -> None:
    picture.write_bytes(encode(RED, "png", Metadata(INFOTEXT)))
    code = (
        "import sys; from sdbento.doors.cli.commands import main; main(sys.argv[1:]);"
        "sys.exit(bool({'torch', 'diffusers', 'bentoml'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code, "inspect", picture], check=True)
