"""Fetches Preact and htm, of which the page at / is made: python -m tools.web_libraries

To take another version, change it and its hash, which `npm view NAME@VERSION dist.integrity`
prints. The versions and licences lie beside the files: MIT (Preact) and Apache-2.0 (htm).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tools import npm

VENDOR = Path(__file__).parents[1] / "sdbento/doors/web/static/vendor"


@dataclass(frozen=True)
class Library:
    """A package on npm; `files` by their names there, with the names that they have here."""

    name: str
    version: str
    sha512: str
    files: dict[str, str]


LIBRARIES = (
    Library(
        "preact",
        "11.2.0",
        "/HfHI/7N84e6GrWBJ3J280z3mLaRJiDcSvj/A+y/4AbLnND/1UlGHe1sR6oYuTGwId0nP7dqDU9OnLxMPZ7xBg==",
        {
            "dist/preact.mjs": "preact.js",
            "hooks/dist/hooks.mjs": "hooks.js",
            "LICENSE": "preact.LICENSE",
        },
    ),
    Library(
        "htm",
        "3.1.1",
        "983Vyg8NwUE7JkZ6NmOqpCZ+sh1bKv2iYTlUkzlWmA5JD2acKoxd4KVxbMmxX/85mtfdnDmTFoNKcg5DGAvxNQ==",
        {"dist/htm.module.js": "htm.js", "LICENSE": "htm.LICENSE"},
    ),
)


def main() -> None:
    VENDOR.mkdir(exist_ok=True)
    for library in LIBRARIES:
        found = npm.files(library.name, library.version, library.sha512, library.files)
        for name, data in zip(library.files.values(), found, strict=True):
            (VENDOR / name).write_bytes(_for_browsers(data))
    versions = [f"{library.name} {library.version}\n" for library in LIBRARIES]
    (VENDOR / "VERSION").write_text("".join(versions))


def _for_browsers(module: bytes) -> bytes:
    """A browser finds modules by their addresses only; and their source maps are not here."""
    lines = module.replace(b'from"preact"', b'from"./preact.js"').splitlines(keepends=True)
    return b"".join(line for line in lines if not line.startswith(b"//# sourceMappingURL"))


if __name__ == "__main__":
    main()
