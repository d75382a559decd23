"""Fetches Swagger UI, which shows GET /docs, into the package: python -m tools.swagger_ui

To take another version, change both constants; `npm view swagger-ui-dist@VERSION dist.integrity`
prints the second. The version lies beside the files. Apache-2.0, as sdbento itself.
"""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile
from pathlib import Path

import httpx

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
URL = f"https://registry.npmjs.org/swagger-ui-dist/-/swagger-ui-dist-{VERSION}.tgz"


def main() -> None:
    archive = httpx.get(URL, timeout=60).raise_for_status().content
    digest = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if digest != SHA512:
        raise SystemExit(f"{URL} is not what it was: sha512-{digest}")
    with tarfile.open(fileobj=io.BytesIO(archive)) as package:
        for name in FILES:
            file = package.extractfile(f"package/{name}")
            assert file is not None
            (STATIC / name).write_bytes(file.read())
    (STATIC / "VERSION").write_text(f"swagger-ui-dist {VERSION}\n")


if __name__ == "__main__":
    main()
