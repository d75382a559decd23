"""An S3 store on loopback that accepts only presigned URLs, and verifies them.

The verification is written from AWS's documentation ("Authenticating Requests: Using Query
Parameters"), independently of botocore, which signs.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, quote, urlsplit

from tests.support.serve_in_thread import serve_in_thread

SECRET = "hush"


class Store(ThreadingHTTPServer):
    """Answers with `statuses` in turn, then 200 or 403; `objects` by path, as (type, data)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.statuses: list[int] = []
        self.num_puts = 0
        self.objects: dict[str, tuple[str, bytes]] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Store

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.num_puts += 1
        status = self.server.statuses.pop(0) if self.server.statuses else self._judged()
        if status == 200:
            path = urlsplit(self.path).path
            self.server.objects[path] = (self.headers["Content-Type"], data)
        self._answer(status)

    def do_GET(self) -> None:
        found = self.server.objects.get(urlsplit(self.path).path)
        status = self._judged()
        self._answer(status, found[1] if status == 200 and found else b"")

    def _judged(self) -> int:
        query = dict(parse_qsl(urlsplit(self.path).query))
        given = query.pop("X-Amz-Signature", "")
        return 200 if given and given == self._signature(query) else 403

    def _signature(self, query: dict[str, str]) -> str:
        signed = query["X-Amz-SignedHeaders"].split(";")
        canonical_query = "&".join(f"{quote(k, '')}={quote(query[k], '')}" for k in sorted(query))
        headers = "".join(f"{name}:{self.headers[name]}\n" for name in signed)
        path, names = urlsplit(self.path).path, ";".join(signed)
        request = "\n".join(
            [self.command, path, canonical_query, headers, names, "UNSIGNED-PAYLOAD"]
        )
        _, day, region, service, end = query["X-Amz-Credential"].rsplit("/", 4)
        scope = f"{day}/{region}/{service}/{end}"
        hashed = hashlib.sha256(request.encode()).hexdigest()
        text = "\n".join([query["X-Amz-Algorithm"], query["X-Amz-Date"], scope, hashed])
        key = f"AWS4{SECRET}".encode()
        for part in (day, region, service, end, text):
            key = hmac.digest(key, part.encode(), "sha256")
        return key.hex()

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def storing() -> Iterator[Store]:
    with serve_in_thread(Store()) as store:
        yield store
