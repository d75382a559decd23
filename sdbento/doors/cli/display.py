"""What a terminal shows while images are made: a bar, the first image as it forms, and the end.

Nothing at all where stderr is no terminal.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING

from PIL import Image
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from sdbento.doors.cli.output import progress_bar
from sdbento.doors.cli.terminal import COLUMNS, Protocol, blocks, escape_sequence

if TYPE_CHECKING:
    from sdbento.engine.handle import Stepped

MARGIN = 4  # lines of the terminal that a picture leaves free


class Display:
    """One request's. `protocol` None: no pictures."""

    def __init__(self, protocol: Protocol | None, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._protocol = protocol
        self._bar = progress_bar(self._console)
        self._steps: list[int] = []

    @property
    def shows_pictures(self) -> bool:
        return self._protocol is not None and self._console.is_terminal

    @contextmanager
    def running(self, what: str, num_images: int) -> Iterator[None]:
        """Show a bar, and what `step` brings, until the block ends."""
        self._steps = [0] * num_images
        self._task = self._bar.add_task(what, total=None)
        if not self._console.is_terminal:
            yield
            return
        with Live(self._bar, console=self._console, transient=self.shows_pictures) as self._live:
            yield

    def step(self, event: Stepped) -> None:
        self._steps[event.image] = event.step
        text = f"step {min(self._steps)} of {event.num_steps}"
        total = event.num_steps * len(self._steps)
        self._bar.update(self._task, description=text, completed=sum(self._steps), total=total)
        if self.shows_pictures and event.preview is not None and event.image == 0:
            self._live.update(Group(self._blocks(event.preview), self._bar))

    def show(self, data: str) -> None:
        """The finished image, an image file in base64."""
        if self._protocol is None or not self._console.is_terminal:
            return
        with Image.open(BytesIO(b64decode(data))) as image:
            if self._protocol == "blocks":
                self._console.print(self._blocks(image))
            else:
                columns, _ = self._room
                self._console.file.write(escape_sequence(image, self._protocol, columns))
                self._console.file.flush()

    @property
    def _room(self) -> tuple[int, int]:
        """Columns and lines for a picture."""
        width, height = self._console.size
        return min(COLUMNS, width), max(1, height - MARGIN)

    def _blocks(self, image: Image.Image) -> Text:
        return blocks(image, *self._room)
