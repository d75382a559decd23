"""Fetches Swagger UI, which shows GET /docs, into the package: python -m tools.swagger_ui

To take another version, change both constants; `npm view swagger-ui-dist@VERSION dist.integrity`
prints the second. The version lies beside the files. Apache-2.0, as sdbento itself.
"""

from __future__ import annotations

from pathlib import Path

from tools import npm

VERSION = "5.35.0"
SHA512 = "U06rpMtW9V3XPGOBeamTUSr0Z09jMX4IJuANpE/EZbAhw0G8CgwrzU4YmXkn/h0wCDNsXdGarTNNHC3sU8yVUQ=="
FILES = (
    "swagger-ui-bundle.js",
    "swagger-ui-bundle.js.LICENSE.txt",
    "swagger-ui.css",
    "LICENSE",
    "NOTICE",
)
STATIC = Path(__file__).parents[1] / "sdbento/doors/docs/static"


def main() -> None:
    for name, data in zip(FILES, npm.files("swagger-ui-dist", VERSION, SHA512, FILES), strict=True):
        (STATIC / name).write_bytes(data)
    (STATIC / "VERSION").write_text(f"swagger-ui-dist {VERSION}\n")


if __name__ == "__main__":
    main()
