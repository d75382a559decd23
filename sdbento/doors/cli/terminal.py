"""Pictures in a terminal: by the protocol that it has for them, or else as coloured half blocks.

Protocols: iTerm2's inline images, Kitty's graphics, Sixel. Which one a terminal has is known from
what it says of itself in the environment; one that says nothing gets blocks, which all can show.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import Literal, get_args

import numpy as np
from PIL import Image
from rich.color import Color
from rich.style import Style
from rich.text import Text

Protocol = Literal["iterm", "kitty", "sixel", "blocks"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)

UPPER_HALF = "▀"
COLUMNS = 64  # of a picture, where the terminal is as wide
KITTY_CHUNK = 4096  # characters of base64 in one escape sequence, at most
SIXEL_COLOURS = 256
SIXEL_WIDTH = 512  # pixels; a terminal that scrolls cannot take back a picture that is too large
BAND = 6  # rows of pixels that one line of sixels has


def protocol_of(variables: Mapping[str, str]) -> Protocol:
    """What the terminal with these environment variables understands.

    Inside tmux and screen, which let no protocol through, these are blocks.
    """
    program, terminal = variables.get("TERM_PROGRAM", ""), variables.get("TERM", "")
    if "TMUX" in variables or terminal.startswith("screen"):
        return "blocks"
    if program in ("iTerm.app", "WezTerm") or "mintty" in program:
        return "iterm"
    if "KITTY_WINDOW_ID" in variables or terminal in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    if terminal.startswith(("foot", "mlterm", "yaft")):
        return "sixel"
    return "blocks"


def protocol_named(name: str, variables: Mapping[str, str]) -> Protocol | None:
    """`auto`: what the terminal understands; `none`: None."""
    if name == "auto":
        return protocol_of(variables)
    return next((protocol for protocol in PROTOCOLS if protocol == name), None)


def blocks(image: Image.Image, columns: int, lines: int) -> Text:
    """At most `columns` by `lines` characters, each of which shows two pixels, one above the
    other."""
    scale = min(columns / image.width, 2 * lines / image.height)
    width, height = max(1, round(image.width * scale)), max(1, round(image.height * scale / 2))
    pixels = np.asarray(image.convert("RGB").resize((width, 2 * height), Image.Resampling.BOX))
    text = Text(no_wrap=True, end="")
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        for above, below in zip(upper, lower, strict=True):
            text.append(UPPER_HALF, Style(color=_colour(above), bgcolor=_colour(below)))
        text.append("\n")
    return text


def _colour(pixel: np.ndarray) -> Color:
    red, green, blue = pixel.tolist()
    return Color.from_rgb(red, green, blue)


def escape_sequence(image: Image.Image, protocol: Protocol, columns: int) -> str:
    """What a terminal that understands `protocol`, which is not blocks, shows as the picture."""
    match protocol:
        case "iterm":
            return _iterm(image, columns)
        case "kitty":
            return "".join(_kitty(image, columns))
        case "sixel":
            return "".join(_sixel(image))
        case "blocks":
            raise ValueError("blocks are text")


def _png(image: Image.Image) -> str:
    file = BytesIO()
    image.convert("RGB").save(file, "png")
    return b64encode(file.getvalue()).decode("ascii")


def _iterm(image: Image.Image, columns: int) -> str:
    """https://iterm2.com/documentation-images.html"""
    return f"\033]1337;File=inline=1;width={columns};preserveAspectRatio=1:{_png(image)}\a\n"


def _kitty(image: Image.Image, columns: int) -> Iterator[str]:
    """https://sw.kovidgoyal.net/kitty/graphics-protocol/: a=T shows it at once, f=100 is a PNG, c
    are its columns, q=2 asks for no answer, m says whether there is more to come."""
    data = _png(image)
    chunks = [data[i : i + KITTY_CHUNK] for i in range(0, len(data), KITTY_CHUNK)]
    for i, chunk in enumerate(chunks):
        first = f"a=T,f=100,c={columns},q=2," if i == 0 else ""
        yield f"\033_G{first}m={int(i + 1 < len(chunks))};{chunk}\033\\"
    yield "\n"


def _sixel(image: Image.Image) -> Iterator[str]:
    """DEC STD 070: bands of six rows; for each colour of a band, a character a column, whose bits
    are the rows that have that colour."""
    image = image.convert("RGB")
    image.thumbnail((SIXEL_WIDTH, SIXEL_WIDTH))
    reduced = image.quantize(SIXEL_COLOURS)
    palette = np.reshape(reduced.getpalette() or [], (-1, 3)) * 100 // 255
    pixels = np.asarray(reduced)
    yield f'\033P0;1q"1;1;{reduced.width};{reduced.height}'
    for number, (red, green, blue) in enumerate(palette.tolist()):
        yield f"#{number};2;{red};{green};{blue}"
    for top in range(0, len(pixels), BAND):
        band = pixels[top : top + BAND]
        weights = 1 << np.arange(len(band))[:, None]
        for number in np.unique(band):
            bits = ((band == number) * weights).sum(axis=0)
            yield f"#{number}{_run_lengths(bits)}$"  # $: back to the start of the line
        yield "-"  # to the next line
    yield "\033\\\n"


def _run_lengths(bits: np.ndarray) -> str:
    """The columns of one colour; `!5~` is five times the same one."""
    ends = np.flatnonzero(np.append(np.diff(bits) != 0, True)) + 1
    starts = np.append(0, ends[:-1])
    runs = zip((ends - starts).tolist(), bits[starts].tolist(), strict=True)
    return "".join(
        f"!{length}{chr(63 + value)}" if length > 3 else chr(63 + value) * length
        for length, value in runs
    )
