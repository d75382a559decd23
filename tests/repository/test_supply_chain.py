"""What is installed: its hashes, licences, vulnerabilities, and the list of it all."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from packaging.requirements import Requirement

import sdbento
from tools import audit, install, licences, lock, sbom

ROOT = Path(__file__).parents[2]


def test_all_licences_are_allowed_or_exceptions_with_a_reason() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert list(licences.problems(licences.pinned(text))) == []


@pytest.mark.parametrize(
    ("licence", "allowed"),
    [
        ("MIT", True),
        ("Apache-2.0 OR BSD-3-Clause", True),
        ("GPL-3.0-only OR MIT", True),
        ("MIT AND GPL-3.0-only", False),
        ("AGPL-3.0-or-later", False),
        ("GNU General Public License v3 (GPLv3)", False),
        ("MIT-like, but no commercial use", False),
        ("", False),
    ],
)
def test_licences_are_judged_by_all_their_parts(licence: str, allowed: bool) -> None:
    assert licences.is_allowed(licence) is allowed


def test_a_package_without_a_licence_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "metadata", lambda name: None)
    monkeypatch.setattr(licences, "licence_of", lambda package: "")
    assert "thing: it states no licence" in list(licences.problems(["thing"]))


FLAW = {"id": "PYSEC-2026-1", "fix_versions": ["1.1"], "aliases": []}


def test_a_known_vulnerability_is_told_with_the_version_that_lacks_it() -> None:
    report = [{"name": "thing", "version": "1.0", "vulns": [FLAW]}]
    assert audit.problems(report) == ["thing 1.0: PYSEC-2026-1; fixed in 1.1"]


@pytest.mark.parametrize("vulnerable", [False, True])
def test_an_audit_holds_for_a_day_if_nothing_was_found(
    vulnerable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def ask(pins: list[str]) -> audit.Report:
        asked.append(len(pins))
        flaws = [FLAW] if vulnerable else []
        return [{"name": pin, "version": "1", "vulns": flaws} for pin in pins]

    monkeypatch.setattr(audit, "ask", ask)
    monkeypatch.setattr(audit, "KEPT", tmp_path / "audited")
    assert [audit.main(), audit.main()] == [int(vulnerable)] * 2
    assert len(asked) == (4 if vulnerable else 2) and asked[1] > 100


def test_an_audit_that_could_not_be_made_says_so_and_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "ask", lambda pins: [])
    monkeypatch.setattr(audit, "KEPT", tmp_path / "audited")
    assert audit.main() == 0
    assert "nothing was audited" in capsys.readouterr().out
    assert not audit.KEPT.exists()


@pytest.mark.parametrize(
    ("stderr", "status"),
    [
        ("requests.exceptions.ConnectionError: Max retries exceeded", 0),
        ("requests.exceptions.SSLError: certificate verify failed", 0),
        ("ERROR: Tip: your network may be blocking this service", 0),
        ("pip-audit: error: argument -f: invalid choice", 1),
        ("ERROR: invalid requirement", 1),
    ],
)
def test_an_audit_fails_and_says_why_unless_there_is_no_network(
    stderr: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "bin" / "pip-audit"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\necho '{stderr}' >&2\nexit 1\n")
    command.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(command.with_name("python")))
    monkeypatch.setattr(audit, "KEPT", tmp_path / "audited")
    if status == 0:
        assert audit.main() == 0
    else:
        with pytest.raises(SystemExit, match=stderr[:20]):
            audit.main()
    assert not audit.KEPT.exists()


def test_a_lock_keeps_the_hashes_of_builds_that_only_some_machines_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "test.lock"
    monkeypatch.setattr(lock, "hashes_of", lambda versions: {("torch", "2.0"): {"sha256:aa"}})
    lock.write(path, "# header\n", {"torch": "2.0"}, {("torch", "2.0"): {"sha256:bb"}})
    lock.write(path, "# header\n", {"torch": "2.0"}, {})
    assert path.read_text() == (
        "# header\ntorch==2.0 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\n"
    )


def test_the_list_of_packages_is_valid_and_has_all_that_the_image_installs(tmp_path: Path) -> None:
    path = tmp_path / "sbom.json"
    sbom.write(ROOT / "requirements-gpu.lock", path)
    found = json.loads(path.read_text(encoding="utf-8"))
    assert list(cyclonedx_schema(found["specVersion"]).iter_errors(found)) == []
    assert found["metadata"]["component"]["version"] == sdbento.__version__
    names = (f"requirements{kind}.lock" for kind in ("", "-cuda", "-gpu"))
    pins = "".join((ROOT / name).read_text(encoding="utf-8") for name in names)
    listed = {f"{one['name']}=={one['version']}" for one in found["components"]}
    assert listed == set(re.findall(r"^[\w.-]+==[\w.]+", pins, re.MULTILINE))
    assert all(one["purl"].startswith("pkg:pypi/") for one in found["components"])


def cyclonedx_schema(version: str) -> jsonschema_rs.Validator:
    folder = resources.files("cyclonedx.schema._res")

    def schema(url: str) -> Any:
        return json.loads((folder / url.rpartition("/")[2]).read_text(encoding="utf-8"))

    bom = schema(f"bom-{version}.SNAPSHOT.schema.json")
    return jsonschema_rs.validator_for(bom, retriever=schema)


def test_the_cpu_build_of_torch_is_asked_for_with_the_hashes_of_the_lock() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    pin = install.cpu_torch(text)
    assert pin.replace("+cpu", "", 1) in text
    assert pin.startswith(f"torch=={metadata.version('torch').partition('+')[0]}+cpu \\\n")


def test_what_builds_the_documentation_is_pinned_with_hashes() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    text = lock.DOCS.read_text(encoding="utf-8")
    pins = {name: (version, hashes) for name, version, hashes in lock.PIN.findall(text)}
    assert len(pins) == text.count("==")
    assert all("--hash=sha256:" in hashes for _, hashes in pins.values())
    for wanted in map(Requirement, groups["dependency-groups"]["docs"]):
        assert wanted.specifier.contains(pins[wanted.name][0])
