"""AUTOMATIC1111's "infotext": how an image was made, as a text that other programs read too.

    a cat <lora:sketch:0.8>
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 42, Size: 512x768, ...

Source: `create_infotext` and `parse_generation_parameters` of the web UI (modules/processing.py,
modules/infotext_utils.py). Knows nothing of requests, and of files: `codec` embeds it in them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

NEGATIVE = "Negative prompt:"
MIN_PAIRS = 3  # with fewer, the web UI takes the last line for a part of the prompt
MAX_PAIRS_CHARS = 8 * 1024  # a longer last line is a part of the prompt, too; ours are shorter
# The web UI's expression, but linear in the length of a line: names have no more than 64 letters.
# It takes about 0.7 us a letter at worst, in which no other thread of this process runs: for as
# long as Python lets any thread run.
_PAIR = re.compile(r'(\w[\w \-/]{1,63}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def write(prompt: str, negative_prompt: str | None, pairs: Iterable[tuple[str, object]]) -> str:
    """The infotext with these prompts and, in its last line, these names and values."""
    lines = [prompt]
    if negative_prompt:
        lines.append(f"{NEGATIVE} {negative_prompt}")
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in pairs))
    return "\n".join(lines)


def read(infotext: str) -> dict[str, str]:
    """What an infotext says, by its names for it, "Prompt" and "Negative prompt" first."""
    *lines, last = (line.strip() for line in infotext.strip().split("\n"))
    pairs = _PAIR.findall(last) if len(last) <= MAX_PAIRS_CHARS else []
    if len(pairs) < MIN_PAIRS:
        lines, pairs = [*lines, last], []
    start = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    prompts = {"Prompt": "\n".join(lines[:start])}
    if start < len(lines):
        negative = "\n".join(lines[start:]).removeprefix(NEGATIVE)
        prompts["Negative prompt"] = negative.strip()
    return prompts | {name: _unquoted(value) for name, value in pairs}


def _quoted(text: str) -> str:
    """As the web UI quotes, and also what would be read as another text without quotes."""
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n"]|^\s|\s$', text) else text


def _unquoted(text: str) -> str:
    if not (text.startswith('"') and text.endswith('"')):
        return text
    try:
        value = str(json.loads(text))
    except ValueError:
        return text
    return value.encode("utf-8", "replace").decode()  # JSON may hold half of a surrogate pair
