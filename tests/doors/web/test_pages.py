"""The files of pages, without a server."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest
from starlette.requests import Request

from sdbento.doors.web.page import FILES, PAGE, PUBLIC_PREFIXES, STATIC
from sdbento.doors.web.pages import POLICY, Files, page
from sdbento.errors import NotFound

MAX_BYTES = 200_000
MAX_LINES = 150
MAX_FILES = 12  # of a folder, as of a package
OURS = [path for path in STATIC.rglob("*.js") if path.parent.name != "vendor"]


def asked(name: str, **headers: str) -> Request:
    raw = [(key.replace("_", "-").encode(), value.encode()) for key, value in headers.items()]
    return Request({"type": "http", "method": "GET", "path": f"/web/{name}", "headers": raw})


def test_a_browser_that_has_a_file_does_not_ask_for_it_again() -> None:
    first = FILES.answer(FILES.version, "main.js", asked("main.js"))
    assert first.status_code == 200
    assert first.headers["content-type"] == "text/javascript; charset=utf-8"
    assert first.headers["x-content-type-options"] == "nosniff"
    assert first.headers["cache-control"] == "public, max-age=31536000, immutable"
    has_it = asked("main.js", if_none_match=first.headers["etag"])
    assert FILES.answer(FILES.version, "main.js", has_it).status_code == 304
    assert page("").headers["cache-control"] == "no-cache"


def test_a_file_is_compressed_for_whoever_takes_that() -> None:
    plain = FILES.answer(FILES.version, "main.js", asked("main.js"))
    packed = FILES.answer(FILES.version, "main.js", asked("main.js", accept_encoding="br, gzip"))
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert plain.headers["vary"] == packed.headers["vary"] == "Accept-Encoding"
    assert packed.headers["content-type"] == plain.headers["content-type"]
    assert len(packed.body) < len(plain.body)
    assert gzip.decompress(bytes(packed.body)) == plain.body


def test_whatever_changes_in_a_file_changes_all_addresses(tmp_path: Path) -> None:
    (tmp_path / "a.js").write_text("1")
    (tmp_path / "b.md").write_text("1")  # is not served
    first = Files(tmp_path)
    assert Files(tmp_path).version == first.version
    (tmp_path / "a.js").write_text("2")
    second = Files(tmp_path)
    assert second.version != first.version
    with pytest.raises(NotFound):
        second.answer(first.version, "a.js", asked("a.js"))


def test_the_page_names_addresses_that_are_served() -> None:
    named = re.findall(r'(?:href|src)="web/(.*?)/(.*?)"', PAGE)
    assert {version for version, _ in named} == {FILES.version}
    assert {"main.js", "styles/base.css"} <= {name for _, name in named}
    for version, name in named:
        assert FILES.answer(version, name, asked(name)).status_code == 200


@pytest.mark.parametrize("name", ["index.html", "vendor/VERSION", "../page.py", "/etc/passwd", ""])
def test_no_other_file_is_served(name: str) -> None:
    with pytest.raises(NotFound, match="has no file"):
        FILES.answer(FILES.version, name, asked(name))


def test_every_folder_of_the_page_is_open() -> None:
    top = f"/web/{FILES.version}/"
    assert {f"{top}{path.relative_to(STATIC).parent}/" for path in OURS} <= {
        f"{top}./",
        *PUBLIC_PREFIXES,
    }
    assert top in PUBLIC_PREFIXES


def test_the_policy_allows_this_server_and_nothing_that_is_written_into_the_page() -> None:
    sources = set(POLICY.replace(";", "").split()) - {"data:", "blob:"}
    assert not {source for source in sources if "." in source or ":" in source or "*" in source}
    assert "default-src 'none'" in POLICY and "unsafe" not in POLICY
    assert not re.search(r"<style|<script>|style=|\son\w+=|//", PAGE)


def test_the_page_is_small_and_so_are_its_modules() -> None:
    assert sum(path.stat().st_size for path in STATIC.rglob("*") if path.is_file()) < MAX_BYTES
    for path in OURS:
        assert len(path.read_text().splitlines()) <= MAX_LINES, path
    for folder in {path.parent for path in OURS}:
        assert len([*folder.glob("*.js")]) <= MAX_FILES, folder


@pytest.mark.parametrize("module", OURS, ids=lambda path: str(path.relative_to(STATIC)))
def test_modules_import_what_is_there(module: Path) -> None:
    assert "web/" not in module.read_text(), "the version is missing"
    for name in re.findall(r'^import .*?from "(.+?)";', module.read_text(), re.M | re.S):
        assert name.startswith(".") and (module.parent / name).is_file(), name
