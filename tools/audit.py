"""Whether a pinned package has a known vulnerability: part of `make check`.

pip-audit asks PyPI about each pin of the locks. An answer holds for a day as long as the locks stay
as they are; it is kept beside the environment. Where PyPI's database cannot be reached, nothing was
audited: that is said, and is no failure. Whatever else keeps pip-audit from an answer is one.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LOCKS = ("requirements.lock", "requirements-dev.lock", "requirements-docs.lock")
KEPT = Path(sys.prefix) / ".audited"
DAY = 24 * 3600.0
PROBE = 1  # pins that are asked about first: without a database each takes its time to fail
IGNORED: dict[str, str] = {}  # ids of vulnerabilities, and why they do no harm here

# What pip-audit, or the traceback that it ends with, says where there is no network, or one that
# shows another certificate than PyPI's.
NO_NETWORK = re.compile(r"(requests|urllib3)\.exceptions\.|your network may be blocking")

Report = list[dict[str, Any]]


class Unreachable(Exception):
    """There is no network."""


def ask(pins: list[str]) -> Report:
    """What pip-audit says of each that the database knows. Raises Unreachable, and SystemExit with
    what pip-audit printed if it failed in another way."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pins.txt"
        path.write_text("\n".join(pins) + "\n", encoding="utf-8")
        command = [str(Path(sys.executable).with_name("pip-audit")), "--disable-pip", "--no-deps"]
        command += ["--format", "json", "--progress-spinner", "off", "--requirement", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
    try:
        found: Report = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        if NO_NETWORK.search(done.stderr):
            raise Unreachable(done.stderr) from None
        sys.exit(f"audit: pip-audit failed:\n{done.stderr}")
    return [one for one in found if "skip_reason" not in one]


def problems(report: Report) -> list[str]:
    return [
        f"{one['name']} {one['version']}: {flaw['id']}; "
        f"fixed in {', '.join(flaw['fix_versions']) or 'no version yet'}"
        for one in report
        for flaw in one["vulns"]
        if flaw["id"] not in IGNORED
    ]


def main() -> int:
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in LOCKS)
    pins = re.findall(r"^[\w.-]+==[^\s\\]+", text, re.MULTILINE)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if KEPT.exists() and time.time() - KEPT.stat().st_mtime < DAY and KEPT.read_text() == digest:
        return 0
    try:
        is_known = ask(pins[:PROBE])  # a mirror without the database knows nothing
    except Unreachable:
        is_known = []
    if not is_known:
        print("audit: PyPI's database of vulnerabilities cannot be reached; nothing was audited")
        return 0
    report = ask(pins)
    found = problems(report)
    for problem in found:
        print(f"audit: {problem}", file=sys.stderr)
    if len(report) < len(pins):
        print(f"audit: {len(pins) - len(report)} of {len(pins)} packages are not known there")
    if not found:
        KEPT.write_text(digest)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
