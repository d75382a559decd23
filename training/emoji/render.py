"""Fetches the icons of four npm packages and renders them: `python -m training.emoji.render`.

The packages are pinned, and npm checks their hashes. Only this file needs npm, resvg and a
network. Left out are flags, skin tones, and icons that the packages themselves hide.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image

from training.emoji.captions import COLOURS
from training.emoji.icons import OUT, SIDE, Icon, write

PACKAGES = {
    "3d": "@iconify-json/fluent-emoji@1.2.7",  # MIT
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",  # MIT
    "noto": "@iconify-json/noto@1.2.9",  # Apache-2.0
    "twemoji": "@iconify-json/twemoji@1.2.5",  # CC BY 4.0
}
WORDS = "emojibase-data@17.0.0"  # MIT; its tags are the keywords of Unicode's CLDR
COMMONEST = 16
"""A keyword that more emoji have than this ("face", "animal") names none of them."""

Json = dict[str, Any]


def fetch(package: str, files: tuple[str, ...]) -> list[Json]:
    """JSON files of an npm package, each parsed."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", "--pack-destination", folder, package]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as members:
            return [json.load(_member(members, file)) for file in files]


def _member(archive: tarfile.TarFile, file: str) -> io.BufferedReader:
    content = archive.extractfile(f"package/{file}")
    if content is None:
        raise FileNotFoundError(f"{file} is no file of the package")
    return content  # type: ignore[return-value]


def synonyms(emoji: list[Json]) -> dict[str, tuple[str, ...]]:
    """By the name of an emoji, keywords that few others have and that are no colours."""
    common = Counter(tag for row in emoji for tag in row.get("tags", ()))
    common.update(dict.fromkeys(COLOURS, COMMONEST))
    return {
        words(row["label"]): tuple(
            tag for tag in row.get("tags", ()) if common[tag] <= COMMONEST and tag != row["label"]
        )
        for row in emoji
    }


def words(name: str) -> str:
    """The name of an icon or an emoji in plain words: "red-apple" is "red apple"."""
    return " ".join(re.findall(r"[a-z0-9]+", name.lower()))


def is_wanted(name: str, names: Mapping[str, Json]) -> bool:
    """Whether an icon is neither a flag nor one of several skin tones."""
    tone = re.search(r"-(?:medium-)?(?:light|medium|dark)$", name)
    has_tones = tone is not None and f"{name[: tone.start()]}-medium-dark" in names
    is_flag = name.startswith("flag-") and name != "flag-in-hole"
    return not (is_flag or has_tones or "skin-tone" in name or names[name].get("hidden"))


def svg_of(icon: Json, collection: Json) -> str:
    """An icon of an iconify collection as a whole document."""
    width, height = (
        icon.get(key, collection.get(key, collection.get("height", 16)))
        for key in ("width", "height")
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' viewBox="0 0 {width} {height}" width="{SIDE}" height="{SIDE}">{icon["body"]}</svg>'
    )


def render(svg: str) -> Image.Image:
    """An SVG as an RGBA picture of SIDE x SIDE pixels."""
    content = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE))
    picture = Image.open(io.BytesIO(content)).convert("RGBA")
    return picture if picture.size == (SIDE, SIDE) else picture.resize((SIDE, SIDE))


def rendered(
    style: str, collection: Json, known: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[Icon, Image.Image]]:
    """All wanted icons of a collection."""
    icons = collection["icons"]
    for name in sorted(icons):
        if is_wanted(name, icons):
            plain = words(name)
            icon = Icon(style, plain, known.get(plain, ()))
            yield icon, render(svg_of(icons[name], collection))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT / "icons.zip")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    (emoji,) = fetch(WORDS, ("en/data.json",))
    known = synonyms(emoji)  # type: ignore[arg-type]
    icons: list[tuple[Icon, Image.Image]] = []
    for style, package in PACKAGES.items():
        (collection,) = fetch(package, ("icons.json",))
        icons += rendered(style, collection, known)
        print(f"{len(icons)} icons after {package}", flush=True)
    write(options.out, icons)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
