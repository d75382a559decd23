"""What a section receives: the device, the time that is left, and the log for its rows."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping

import torch

from bench.gpu.rows import Kind, Label, Log
from bench.gpu.sections import Options

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
RESERVE = 2.0  # seconds at the end of a section in which nothing new starts


class NoTimeLeft(Exception):
    """The section's time is up; parts that have not started are left out."""


class Bench:
    """One section under way."""

    def __init__(self, log: Log, section: str, options: Options, seconds: float) -> None:
        self.section = section
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.log = log
        self._deadline = time.monotonic() + seconds

    @property
    def toy(self) -> bool:
        return self.options.toy

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def precision(self) -> str:
        """A CPU always computes in fp32, as the server does there."""
        return self.options.precision if self.on_gpu else "fp32"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def images(self) -> list[int]:
        """Image counts to measure: 1, 2, 4, 8."""
        most = 2 if self.toy and not self.on_gpu else self.options.max_images
        return [2**i for i in range(most.bit_length()) if 2**i <= most]

    @property
    def repeats(self) -> int:
        return 2 if self.toy else 10

    def left(self) -> float:
        """Seconds until this section is ended from outside."""
        return self._deadline - time.monotonic()

    def row(self, figures: Mapping[str, Label], **labels: Label) -> None:
        self.log.add(self.section, Kind.FIGURES, labels, figures)

    def note(self, text: str, **labels: Label) -> None:
        self.log.add(self.section, Kind.NOTE, labels, text=text)

    def needs_cuda(self, **labels: Label) -> bool:
        """Whether there is no GPU; if so, a row notes it."""
        if not self.on_gpu:
            self.note("needs CUDA", **labels)
        return not self.on_gpu

    def part(self, seconds: float = 0.0, /, **labels: Label) -> Part:
        """A part that may fail without harm to the next. Not begun where less than `seconds` are
        left: then NoTimeLeft ends the section, so parts come by value."""
        return Part(self, seconds, labels)


class Part:
    """`with bench.part(...)`: an error in it becomes a row."""

    def __init__(self, bench: Bench, seconds: float, labels: dict[str, Label]) -> None:
        self._bench = bench
        self._labels = labels
        self._needed = RESERVE if bench.toy else RESERVE + seconds

    def __enter__(self) -> None:
        left = self._bench.left()
        if left < self._needed:
            self._bench.note(f"left out: {left:.0f} s were left", **self._labels)
            raise NoTimeLeft

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> bool:
        bench, failed = self._bench, isinstance(error, Exception)
        if isinstance(error, Exception) and not isinstance(error, NoTimeLeft):
            traceback.print_exception(error)
            where = "".join(traceback.format_exception(error, limit=-3))[-900:]
            bench.log.add(
                bench.section, Kind.FAILURE, self._labels, {"where": where}, one_line(error)
            )
            traceback.clear_frames(error.__traceback__)  # and the tensors that they hold
        if bench.on_gpu:
            torch.cuda.empty_cache()
        return failed and not isinstance(error, NoTimeLeft)


def one_line(error: BaseException) -> str:
    """An error as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:600]
