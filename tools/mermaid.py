"""Fetches Mermaid, which draws the diagrams of the documentation: python tools/mermaid.py FOLDER

The site then loads nothing from another host. `npm view mermaid@VERSION dist.integrity` prints the
hash of another version. MIT.
"""

from __future__ import annotations

import base64
import hashlib
import io
import sys
import tarfile
import urllib.request
from pathlib import Path

VERSION = "12.3.0"
SHA512 = "4113TdXeLAsMruJ79OpFL5O8+LTFXhQqZ260rF3tgUmiNAtRm4Uume04I+65PRN6yZ69J4f8rVYWW8zRk65UYw=="
URL = f"https://registry.npmjs.org/mermaid/-/mermaid-{VERSION}.tgz"
FILE = "mermaid.min.js"


def main() -> None:
    with urllib.request.urlopen(URL, timeout=120) as answer:
        archive = answer.read()
    digest = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if digest != SHA512:
        raise SystemExit(f"{URL} is not what it was: sha512-{digest}")
    with tarfile.open(fileobj=io.BytesIO(archive)) as package:
        file = package.extractfile(f"package/dist/{FILE}")
        assert file is not None
        (Path(sys.argv[1]) / FILE).write_bytes(file.read())


if __name__ == "__main__":
    main()
