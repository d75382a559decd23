"""The memory that decoded images take, of which each caller leaves room for others.

A file of a few bytes may hold millions of pixels, and images wait in memory for the rest of their
request. So they are counted before they are decoded, and for as long as they live.
"""

from __future__ import annotations

from collections import deque
from threading import Lock
from weakref import finalize

from PIL import Image

from sdbento.access.caller import Caller, current_caller
from sdbento.access.limits import Places
from sdbento.images import codec
from sdbento.settings import Settings

MAX_BYTES = 2 << 30  # of all images that came with requests; more where one may be half of that
PIXEL_BYTES = 4  # PIL takes as many for RGB as for RGBA
RETRY_AFTER = 5.0  # seconds in which some images will have been resized or put back


class ImageMemory:
    """Counts decoded images. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        largest = PIXEL_BYTES * codec.PIXELS_FACTOR * settings.max_pixels
        what = "the memory for images that come with requests"
        self._places = Places(max(MAX_BYTES, 2 * largest), what, f"{what} is used up")
        self._lock = Lock()
        # Images may end at any moment, in any thread, even in one that holds the lock.
        self._ended: deque[tuple[str | None, int]] = deque()

    @property
    def num_bytes(self) -> int:
        with self._lock:
            self._forget_ended()
            return self._places.total

    def decode(self, data: bytes, param: str) -> Image.Image:
        """As `codec.decode`; the image is counted as the present caller's as long as it lives.

        Raises Overloaded and LimitReached, before a pixel is decoded, where there is no room.
        """
        caller, counted = current_caller(), 0

        def make_room(num_pixels: int) -> None:
            nonlocal counted
            self._take(caller, PIXEL_BYTES * num_pixels)
            counted = PIXEL_BYTES * num_pixels

        try:
            image = codec.decode(data, self._settings, param=param, make_room=make_room)
        except BaseException:
            self._ended.append((caller.owner, counted))
            raise
        self._end_with(image, caller, counted)
        return image

    def count(self, holder: object, num_bytes: int) -> None:
        """Count what was made of decoded images as well, as long as its `holder` lives. There is
        always room for it: its request has waited already."""
        caller = current_caller()
        with self._lock:
            self._places.change(caller.owner, num_bytes)
        self._end_with(holder, caller, num_bytes)

    def _take(self, caller: Caller, num_bytes: int) -> None:
        with self._lock:
            self._forget_ended()
            if not self._places.has_room(caller, num_bytes):
                refusal = self._places.refusal(caller)
                refusal.retry_after = RETRY_AFTER
                raise refusal
            self._places.change(caller.owner, num_bytes)

    def _end_with(self, holder: object, caller: Caller, num_bytes: int) -> None:
        finalize(holder, self._ended.append, (caller.owner, num_bytes)).atexit = False

    def _forget_ended(self) -> None:
        while self._ended:
            owner, num_bytes = self._ended.popleft()
            self._places.change(owner, -num_bytes)
