"""Draws a recorded batch as an animated SVG: a column for each UNet call, a row for each image.

At the end of its row stands the image that was made. The drawing is a picture by itself: without
animations, as for those who want no motion, everything is shown.
Light and dark follow the browser.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

TITLE = "Requests join and leave the batch between two denoising steps"
SUBTITLE = (
    "A recording of GET /batch. A column is one UNet call; the numbers are the steps of each image."
)
WIDTH = 840
LEFT, TOP = 252, 62  # where the columns begin
ROW, CELL = 44, 24  # heights, and of a step's box
PICTURE = 38  # the side of a picture that is done
FOOT = 40
SECONDS = 14.0  # of the animation, and
PAUSE = 4.0  # in which all of it stays
COLOURS = ("#d1453b", "#2c8a4b", "#2f6fd0", "#b97a08", "#8250c4", "#0f8a8a")
STYLE = """
  text { font: 13.5px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #24292f; }
  .soft { fill: #57606a; font-size: 12px; }
  .title { font-size: 15px; font-weight: 600; }
  .step { fill: #fff; font-size: 11px; font-weight: 600; text-anchor: middle; }
  .card { fill: #ffffff; stroke: #d0d7de; }
  .lane { fill: #f1f3f6; }
  .end { text-anchor: end; }
  .now { fill: none; stroke: #24292f; stroke-width: 1.5; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .soft { fill: #9aa4b0; }
    .step { fill: #fff; }
    .card { fill: #0f141b; stroke: #30363d; }
    .lane { fill: #1b222c; }
    .now { stroke: #e6edf3; }
  }
"""


@dataclass(frozen=True)
class Call:
    """A UNet call that ended at `at` seconds, and its images: request, image, steps done."""

    at: float
    rows: int
    seconds: float
    images: list[tuple[int, int, int]]


@dataclass(frozen=True)
class Request:
    number: int
    prompt: str
    sampler: str
    loras: list[str]
    num_steps: int
    num_images: int
    pictures: list[str] = field(default_factory=list)
    """What came of each image, as data URIs."""

    @property
    def what(self) -> str:
        return self.prompt + "".join(f" + LoRA {name}" for name in self.loras)

    @property
    def how(self) -> str:
        return f"{self.num_steps} steps, {self.sampler}"


@dataclass(frozen=True)
class Recording:
    """All UNet calls of a while, and the requests in them."""

    calls: list[Call]
    requests: list[Request]

    def as_json(self) -> str:
        calls = ",\n  ".join(json.dumps(asdict(call)) for call in self.calls)
        requests = ",\n  ".join(json.dumps(asdict(request)) for request in self.requests)
        return f'{{"requests": [\n  {requests}],\n "calls": [\n  {calls}]}}'

    @classmethod
    def from_json(cls, text: str) -> Recording:
        told: dict[str, Any] = json.loads(text)
        calls = [
            Call(**{**call, "images": [tuple(one) for one in call["images"]]})
            for call in told["calls"]
        ]
        return cls(calls, [Request(**request) for request in told["requests"]])


def drawn(recording: Recording) -> str:
    """The SVG."""
    return _Drawing(recording).svg()


class _Drawing:
    def __init__(self, recording: Recording) -> None:
        self._calls = recording.calls
        self._requests = {request.number: request for request in recording.requests}
        self._rows = {
            (request.number, image): row
            for row, (request, image) in enumerate(
                (request, image)
                for request in recording.requests
                for image in range(request.num_images)
            )
        }
        self._column = min(24.0, (WIDTH - LEFT - PICTURE - 24) / len(self._calls))
        self._bottom = TOP + ROW * len(self._rows)
        self._height = self._bottom + FOOT
        self._times = self._shares_of_time()

    def svg(self) -> str:
        parts = [
            f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{self._height - 1}" '
            'rx="10"/>',
            f'<text class="title" x="20" y="28">{escape(TITLE)}</text>',
            f'<text class="soft" x="20" y="46">{escape(SUBTITLE)}</text>',
            *(self._lane(number, image) for number, image in self._rows),
            *(self._call(index) for index in range(len(self._calls))),
            f'<text class="soft end" x="{WIDTH - 20}" y="{self._bottom + 24}">'
            f"{self._saving()}</text>",
        ]
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self._height}" '
            f'width="{WIDTH}" height="{self._height}" role="img" aria-labelledby="t d">\n'
            f'<title id="t">{escape(TITLE)}</title>\n'
            f'<desc id="d">{escape(self._description())}</desc>\n'
            f"<style>{STYLE}{self._motion()}</style>\n" + "\n".join(parts) + "\n</svg>\n"
        )

    def _saving(self) -> str:
        num_steps = sum(len(call.images) for call in self._calls)
        return f"{len(self._calls)} calls; one image after the other: {num_steps}"

    def _description(self) -> str:
        sentences = []
        for request in self._requests.values():
            first, last = self._span(request.number)
            sentences.append(
                f"{request.what} ({request.how}) takes part from call {first + 1} to {last + 1}."
            )
        return " ".join(sentences)

    def _span(self, number: int, image: int | None = None) -> tuple[int, int]:
        """The first and the last call in which a request, or one of its images, takes part."""
        indices = [
            index
            for index, call in enumerate(self._calls)
            if any(one[0] == number and image in (None, one[1]) for one in call.images)
        ]
        return indices[0], indices[-1]

    def _shares_of_time(self) -> list[float]:
        """When each call ends, in percent of the animation."""
        began = self._calls[0].at - self._calls[0].seconds
        whole = self._calls[-1].at - began
        return [100 * SECONDS / (SECONDS + PAUSE) * (one.at - began) / whole for one in self._calls]

    def _motion(self) -> str:
        """A column appears when its call ends; its frame is there until the next one appears."""
        rules = []
        for index, (at, end) in enumerate(zip(self._times, [*self._times[1:], 99.5], strict=True)):
            rules += [
                f"@keyframes c{index} {{ {_hidden_until(at)} "
                f"{at + 0.4:.2f}%, 99.5% {{ opacity: 1 }} 100% {{ opacity: 0 }} }}",
                f"@keyframes f{index} {{ {_hidden_until(at)} {at + 0.01:.2f}%, {end:.2f}% "
                f"{{ opacity: 1 }} {end + 0.01:.2f}%, 100% {{ opacity: 0 }} }}",
                f".c{index} {{ animation-name: c{index} }}",
                f".f{index} {{ animation-name: f{index} }}",
            ]
        joined = "\n    ".join(rules)
        return (
            "  .frame { opacity: 0; }\n"
            "  @media (prefers-reduced-motion: no-preference) {\n"
            f"    .call, .frame {{ animation: {SECONDS + PAUSE:g}s linear infinite; }}\n"
            f"    {joined}\n  }}\n"
        )

    def _lane(self, number: int, image: int) -> str:
        request, y = self._requests[number], self._y(number, image)
        several = f", image {image + 1} of {request.num_images}" if request.num_images > 1 else ""
        width = self._column * len(self._calls)
        return (
            f'<rect class="lane" x="{LEFT}" y="{y}" width="{width:.1f}" height="{CELL}" rx="5"/>'
            f'<rect x="20" y="{y}" width="4" height="{CELL}" rx="2" fill="{self._colour(number)}"/>'
            f'<text x="32" y="{y + 9}">{escape(request.what)}</text>'
            f'<text class="soft" x="32" y="{y + 23}">{escape(request.how)}{several}</text>'
        )

    def _call(self, index: int) -> str:
        """What appears with a UNet call: its boxes, who joins with it, and what is done by it."""
        x = LEFT + index * self._column
        shown = [self._box(x, *one) for one in self._calls[index].images]
        for number, image in self._rows:
            first, last = self._span(number, image)
            y = self._y(number, image) + 16
            if index == first and index > 2:
                shown.append(f'<text class="soft end" x="{x - 5:.1f}" y="{y}">joins</text>')
            if index == last:
                shown.append(self._picture(x + self._column + 4, number, image))
        frame = self._frame(x, index)
        return f'<g class="call c{index}">{"".join(shown)}</g><g class="frame f{index}">{frame}</g>'

    def _picture(self, x: float, number: int, image: int) -> str:
        pictures = self._requests[number].pictures
        if image >= len(pictures):
            return ""
        y = self._y(number, image) + (CELL - PICTURE) // 2
        return (
            f'<image href="{pictures[image]}" x="{x:.1f}" y="{y}" '
            f'width="{PICTURE}" height="{PICTURE}"/>'
        )

    def _frame(self, x: float, index: int) -> str:
        call, bottom = self._calls[index], self._bottom
        images = f"{len(call.images)} image{'s' * (len(call.images) > 1)}"
        text = f"UNet call {index + 1}: {images}, {call.rows} rows"
        return (
            f'<rect class="now" x="{x - 1:.1f}" y="{TOP - 5}" width="{self._column + 1:.1f}" '
            f'height="{bottom - TOP + 2}" rx="6"/>'
            f'<text x="{LEFT}" y="{bottom + 24}">{text}</text>'
        )

    def _box(self, x: float, number: int, image: int, step: int) -> str:
        y, width = self._y(number, image), self._column - 1.5
        return (
            f'<rect x="{x + 0.5:.1f}" y="{y}" width="{width:.1f}" height="{CELL}" rx="4" '
            f'fill="{self._colour(number)}"/>'
            f'<text class="step" x="{x + 0.5 + width / 2:.1f}" y="{y + 16}">{step}</text>'
        )

    def _y(self, number: int, image: int) -> int:
        return TOP + ROW * self._rows[number, image]

    def _colour(self, number: int) -> str:
        return COLOURS[list(self._requests).index(number) % len(COLOURS)]


def _hidden_until(at: float) -> str:
    return f"0%, {at:.2f}% {{ opacity: 0 }}"
