"""The Hub, on loopback: lists repositories and sends files, or goes wrong on purpose."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

from sdbento.catalog.folder import list_files
from tests.support.serve_in_thread import serve_in_thread

CHUNK = 65536
_API = re.compile(r"/api/models/([^/]+/[^/]+?)(/revision/[^/]+)?(/tree/[^/]+)?")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Sent:
    """What is sent as a file: its content, then zeros up to `size`; announced as `announced`."""

    content: bytes = b""
    size: int | None = None
    announced: int | None = None
    hold: threading.Event | None = None  # no more than half is sent before it is set
    rate: int | None = None  # bytes a second

    @property
    def num_bytes(self) -> int:
        return len(self.content) if self.size is None else self.size

    @property
    def blob(self) -> str:
        return hashlib.sha256(self.content + str(self.num_bytes).encode()).hexdigest()


@dataclass
class Repository:
    files: dict[str, Sent]
    revision: str = "1" * 40
    status: int = 200  # answered to whoever asks for the list of its files


@dataclass
class Faults:
    """`status`: answered to everything whose path has `where` in it, `times` times."""

    status: int = 0
    where: str = ""
    times: int = 1_000_000


class FakeHub(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Answering)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.faults = Faults()
        self.asked: list[str] = []  # method and path
        self.sent: dict[str, int] = {}  # bytes, by path
        self.under_way: set[str] = set()  # paths

    def add(self, name: str, folder: Path | None = None, **files: Sent | bytes) -> Repository:
        """A repository with the files of a folder, and others; `__` in their names is a slash."""
        content = {
            path: Sent(file.read_bytes())
            for path, file in (list_files(folder) if folder is not None else {}).items()
        }
        for path, sent in files.items():
            content[path.replace("__", "/")] = sent if isinstance(sent, Sent) else Sent(sent)
        self.repositories[name] = Repository(content)
        return self.repositories[name]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is nothing to report."""


class _Answering(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        faults = self.server.faults
        if faults.status and faults.where in path and faults.times > 0:
            faults.times -= 1
            self._answer(faults.status, b"{}")
        elif match := _API.fullmatch(path):
            self._answer_api(match[1], is_tree=match[3] is not None)
        elif match := _FILE.fullmatch(path):
            self._answer_file(match[1], match[3])
        else:
            self._answer(404, b"{}")

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _answer_api(self, name: str, is_tree: bool) -> None:
        repository = self.server.repositories.get(name)
        if repository is None:
            self._answer(404, b"{}", X_Error_Code="RepoNotFound")
            return
        if is_tree and repository.status != 200:
            self._answer(repository.status, b"{}")
            return
        entries = [
            {
                "type": "file",
                "path": path,
                "size": sent.num_bytes if sent.announced is None else sent.announced,
                "oid": sent.blob[:40],
                "lfs": {"oid": sent.blob, "size": sent.num_bytes, "pointerSize": 130},
            }
            for path, sent in repository.files.items()
        ]
        siblings = [{"rfilename": path} for path in repository.files]
        info = {"id": name, "sha": repository.revision, "siblings": siblings}
        self._answer(200, json.dumps(entries if is_tree else info).encode())

    def _answer_file(self, name: str, path: str) -> None:
        repository = self.server.repositories.get(name)
        sent = repository.files.get(path) if repository is not None else None
        if repository is None or sent is None:
            code = "RepoNotFound" if repository is None else "EntryNotFound"
            self._answer(404, b"{}", X_Error_Code=code)
            return
        self.send_response(200)
        self.send_header("ETag", f'"{sent.blob}"')
        self.send_header("X-Repo-Commit", repository.revision)
        self.send_header("Content-Length", str(sent.num_bytes))
        self.end_headers()
        if self.command == "GET":
            self.server.under_way.add(f"{name}/{path}")
            try:
                self._send(f"{name}/{path}", sent)
            finally:
                self.server.under_way.discard(f"{name}/{path}")

    def _send(self, path: str, sent: Sent) -> None:
        done = 0
        with suppress(OSError):
            while done < sent.num_bytes:
                if sent.hold is not None and done >= sent.num_bytes // 2:
                    self._wait(sent.hold)
                chunk = sent.content[done : done + CHUNK] or bytes(CHUNK)
                chunk = chunk[: sent.num_bytes - done]
                self.wfile.write(chunk)
                done += len(chunk)
                self.server.sent[path] = self.server.sent.get(path, 0) + len(chunk)
                if sent.rate is not None:
                    time.sleep(len(chunk) / sent.rate)

    def _wait(self, event: threading.Event) -> None:
        """Until it is set, or the client has hung up."""
        self.connection.settimeout(0.05)
        while not event.is_set():
            with suppress(TimeoutError):
                if not self.connection.recv(1):
                    raise ConnectionResetError
        self.connection.settimeout(None)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def fake_hub(port: int = 0) -> Iterator[FakeHub]:
    with serve_in_thread(FakeHub(port)) as hub:
        yield hub


def use(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process, and those that it starts, ask `hub`, and keep files in `cache`."""
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "2")
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
