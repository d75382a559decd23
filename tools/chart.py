"""Renders configs/kubernetes from charts/sdbento, with helm: python -m tools.chart

Everything about Kubernetes is written in the chart, once. These manifests are for those who do not
use helm.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHART, MANIFESTS = ROOT / "charts/sdbento", ROOT / "configs/kubernetes"
NAMESPACE = "sdbento"
HEADER = "# Written by `make chart` from charts/sdbento. Change that instead.\n"
KEYS = "keys.existingSecret=sdbento-keys"  # a key that helm draws would be in the repository
RENDERED = {
    "sdbento.yaml": [],
    "scaledobject.yaml": ["autoscaling.trigger=prometheus"],
    "podmonitor.yaml": ["podMonitor.enabled=true"],
}


def program(name: str) -> str | None:
    """The path of helm or kubectl: the one that tools.helm fetched, or else the machine's."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def run(name: str, *arguments: str) -> str:
    """What it prints. Raises CalledProcessError, with what it says in `stderr`."""
    path = program(name)
    if path is None:
        raise SystemExit(f"{name} is missing: `make .venv/bin/helm` fetches it, or install it")
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def render(name: str) -> str:
    """The text of a file of RENDERED. With values of its own it has the chart's template alone."""
    chosen = [option for value in (KEYS, *RENDERED[name]) for option in ("--set", value)]
    if RENDERED[name]:
        chosen += ["--show-only", f"templates/{name}"]
    made = run("helm", "template", "sdbento", str(CHART), "-n", NAMESPACE, *chosen)
    return HEADER + re.sub(r"\n+(---\n|\Z)", r"\n\1", made)  # helm 4 adds empty lines, helm 3 none


def main() -> None:
    for name in RENDERED:
        (MANIFESTS / name).write_text(render(name), encoding="utf-8")


if __name__ == "__main__":
    main()
