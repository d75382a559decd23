"""`sdbento generate`: names and formats of files, those that cannot be written, and the report."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path

import click
import pytest

from sdbento.doors.cli.generate import build_request, output_paths, write_images
from sdbento.errors import InvalidParameter
from sdbento.request.schema import GenerateResponse, Timings


def response(num_images: int = 1) -> GenerateResponse:
    return GenerateResponse(
        images=[b64encode(b"image %d" % i).decode() for i in range(num_images)],
        seeds=list(range(7, 7 + num_images)),
        infotexts=["x"] * num_images,
        model="shapes",
        parameters={},
        timings=Timings(queued=0, denoising=1, decoding=0.25, total=1.25),
        warnings=["the size was changed"],
    )


def test_one_image_keeps_the_name() -> None:
    assert output_paths(Path("a/b.png"), 1) == [Path("a/b.png")]


def test_images_are_written_and_reported_with_their_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "out.png", response(2))
    assert (tmp_path / "out-2.png").read_bytes() == b"image 1"
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1] == f"{tmp_path / 'out-2.png'}: shapes, seed 8, 1.2 s"
    assert printed.err == "sdbento: the size was changed\n"


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "out.png").mkdir()
    with pytest.raises(click.ClickException, match=r"cannot write .*out\.png: Is a directory"):
        write_images(tmp_path / "out.png", response())


def test_the_format_is_that_of_the_name_and_files_become_base64(tmp_path: Path) -> None:
    (tmp_path / "in.png").write_bytes(b"bytes")
    request = build_request(tmp_path / "out.JPG", {"prompt": "x", "image": tmp_path / "in.png"})
    assert request.output_format == "jpeg"
    assert request.image == b64encode(b"bytes").decode()


@pytest.mark.parametrize("name", ["out.gif", "out", "no/such/folder/out.png"])
def test_a_name_that_cannot_be_used_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(click.BadParameter):
        build_request(tmp_path / name, {"prompt": "x"})


def test_a_bad_field_is_refused_as_by_every_other_door(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="width should be a multiple of 8; given: 513"):
        build_request(tmp_path / "out.png", {"prompt": "x", "width": 513})
