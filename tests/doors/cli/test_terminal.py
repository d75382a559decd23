"""Pictures in a terminal: which protocol, and that each carries the pixels."""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from io import BytesIO, StringIO

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from sdbento.doors.cli.display import Display
from sdbento.doors.cli.terminal import (
    KITTY_CHUNK,
    Protocol,
    blocks,
    escape_sequence,
    protocol_named,
)
from sdbento.engine.handle import Stepped
from tests.support.images import gradient


def pixels(image: Image.Image) -> NDArray[np.int16]:
    return np.asarray(image.convert("RGB"), np.int16)


@pytest.mark.parametrize(
    ("variables", "protocol"),
    [
        ({}, "blocks"),
        ({"TERM": "xterm-256color"}, "blocks"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm"),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "foot-extra"}, "sixel"),
        ({"TERM_PROGRAM": "iTerm.app", "TMUX": "/tmp/tmux"}, "blocks"),
        ({"TERM": "screen-256color", "KITTY_WINDOW_ID": "1"}, "blocks"),
    ],
)
def test_a_terminal_is_known_by_what_it_says_of_itself(
    variables: dict[str, str], protocol: Protocol
) -> None:
    assert protocol_named("auto", variables) == protocol
    assert protocol_named("sixel", variables) == "sixel"
    assert protocol_named("none", variables) is None


def test_a_block_shows_two_pixels_one_above_the_other() -> None:
    image = Image.new("RGB", (2, 2))
    image.putdata([(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 8, 7)])
    text = blocks(image, columns=2, lines=9)
    assert text.plain == "▀▀\n"
    styles = [str(span.style) for span in text.spans]
    assert styles == ["#ff0000 on #0000ff", "#00ff00 on #090807"]


@pytest.mark.parametrize("size", [(300, 20), (20, 300), (128, 128)])
def test_blocks_fit_into_the_room_and_keep_the_proportions(size: tuple[int, int]) -> None:
    lines = blocks(Image.new("RGB", size), columns=40, lines=10).plain.splitlines()
    assert len(lines) <= 10
    assert len(lines[0]) <= 40
    assert len(lines[0]) / (2 * len(lines)) == pytest.approx(size[0] / size[1], rel=0.5)


def test_iterm_gets_the_picture_as_a_file() -> None:
    image = gradient(40, 30)
    match = re.fullmatch(
        r"\x1b\]1337;File=inline=1;width=20;preserveAspectRatio=1:(.+)\a\n",
        escape_sequence(image, "iterm", 20),
    )
    assert match is not None
    assert (pixels(Image.open(BytesIO(b64decode(match[1])))) == pixels(image)).all()


def test_kitty_gets_the_picture_in_pieces() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    sequence = escape_sequence(Image.fromarray(noise), "kitty", 20)
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", sequence)
    assert [keys for keys, _ in pieces] == [
        "a=T,f=100,c=20,q=2,m=1",
        *["m=1"] * (len(pieces) - 2),
        "m=0",
    ]
    assert all(len(data) <= KITTY_CHUNK for _, data in pieces)
    data = b64decode("".join(data for _, data in pieces))
    assert (pixels(Image.open(BytesIO(data))) == noise).all()


def decoded(sixels: str) -> NDArray[np.int16]:
    """The pixels of a Sixel sequence, read as a terminal reads it."""
    head, _, body = sixels.partition('"')
    assert head == "\033P0;1q"
    size, *_ = re.findall(r"^1;1;(\d+);(\d+)", body)
    width, height = map(int, size)
    drawn = np.full((height, width, 3), -1, np.int16)
    palette: dict[int, list[int]] = {}
    colour, x, y = 0, 0, 0
    token = r"#(\d+);2;(\d+);(\d+);(\d+)|#(\d+)|(?:!(\d+))?([?-~])|(\$)|(-)"
    commands = body.removeprefix(f"1;1;{width};{height}").removesuffix("\033\\\n")
    for match in re.finditer(token, commands):
        number, red, green, blue, chosen, times, bits, home, down = match.groups()
        if number:
            palette[int(number)] = [int(part) * 255 // 100 for part in (red, green, blue)]
        elif chosen:
            colour = int(chosen)
        elif home:
            x = 0
        elif down:
            x, y = 0, y + 6
        else:
            end = x + int(times or 1)
            for row in range(6):
                if (ord(bits) - 63) >> row & 1:
                    drawn[y + row, x:end] = palette[colour]
            x = end
    return drawn


@pytest.mark.parametrize("size", [(40, 30), (7, 13), (1, 1)])
def test_a_sixel_terminal_draws_the_picture(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (200, 30, 90))
    image.paste((10, 220, 40), (0, 0, max(1, size[0] // 2), max(1, size[1] // 2)))
    drawn = decoded(escape_sequence(image, "sixel", 20))
    assert np.abs(drawn - pixels(image)).max() <= 4  # colours are percentages


def encoded(image: Image.Image) -> str:
    file = BytesIO()
    image.save(file, "png")
    return b64encode(file.getvalue()).decode()


def shown(protocol: Protocol | None, *, is_terminal: bool = True) -> str:
    """What is written while an image is made and when it is finished."""
    file = StringIO()
    console = Console(
        file=file, force_terminal=is_terminal, color_system="truecolor", width=80, height=30
    )
    display = Display(protocol, console)
    with display.running("loading", 1):
        display.step(Stepped(0, 1, 2, 0.1, Image.new("RGB", (8, 8), (1, 2, 3))))
        display.step(Stepped(0, 2, 2, 0.0))
    display.show(encoded(Image.new("RGB", (8, 8), (4, 5, 6))))
    return file.getvalue()


def test_the_image_is_shown_as_it_forms_and_when_it_is_finished() -> None:
    written = shown("blocks")
    preview, finished = "38;2;1;2;3;48;2;1;2;3", "38;2;4;5;6;48;2;4;5;6"
    assert 0 < written.index(preview) < written.index(finished)
    assert "step 2 of 2" in written


def test_a_protocol_is_for_the_finished_image() -> None:
    written = shown("iterm")
    assert "38;2;1;2;3;48;2;1;2;3" in written
    assert written.count("\033]1337;") == 1


def test_without_pictures_there_is_a_bar_and_without_a_terminal_nothing() -> None:
    assert "▀" not in shown(None)
    assert "step 2 of 2" in shown(None)
    assert shown("blocks", is_terminal=False) == ""
