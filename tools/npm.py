"""Files of packages on npm, for scripts that copy them into ours. Packages are pinned by hash."""

from __future__ import annotations

import base64
import hashlib
import io
import ssl
import tarfile
from collections.abc import Iterable, Iterator

import httpx

REGISTRY = "https://registry.npmjs.org"


def files(name: str, version: str, sha512: str, paths: Iterable[str]) -> Iterator[bytes]:
    """The files at `paths` in a package. `npm view NAME@VERSION dist.integrity` prints its hash."""
    url = f"{REGISTRY}/{name}/-/{name.rpartition('/')[2]}-{version}.tgz"
    trusted = ssl.create_default_context()  # what the machine trusts, as npm does
    archive = httpx.get(url, timeout=60, verify=trusted).raise_for_status().content
    digest = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if digest != sha512:
        raise SystemExit(f"{url} is not what it was: sha512-{digest}")
    with tarfile.open(fileobj=io.BytesIO(archive)) as package:
        for path in paths:
            file = package.extractfile(f"package/{path}")
            assert file is not None
            yield file.read()
