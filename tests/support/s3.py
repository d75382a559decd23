"""An S3 store on loopback that verifies signatures, those of presigned URLs and of headers.

The verification is written from AWS's documentation ("Authenticating Requests: Using Query
Parameters", "... Using the Authorization Header"), independently of botocore, which signs.
"""

from __future__ import annotations

import hashlib
import hmac
import re
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
        self.modified = "2020-01-01T00:00:00.000Z"  # when all objects were put, as lists say
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
            self.server.objects[path] = (self.headers.get("Content-Type", ""), data)
        self._answer(status)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if "list-type=2" in url.query:
            self._answer(self._judged(), self._listed(url.path, dict(parse_qsl(url.query))))
            return
        found = self.server.objects.get(url.path)
        status = self._judged()
        if status == 200 and found is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        data = found[1] if status == 200 and found else b""
        if part := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            self._answer(206, data[int(part[1]) : int(part[2]) + 1])
            return
        self._answer(status, data)

    def do_DELETE(self) -> None:
        status = self._judged()
        if status == 200:
            self.server.objects.pop(urlsplit(self.path).path, None)
        self._answer(204 if status == 200 else status)

    def _listed(self, bucket: str, query: dict[str, str]) -> bytes:
        prefix = f"{bucket.rstrip('/')}/"
        keys = [path.removeprefix(prefix) for path in self.server.objects]
        items = "".join(
            f"<Contents><Key>{key}</Key><LastModified>{self.server.modified}</LastModified>"
            "<Size>1</Size></Contents>"
            for key in keys
            if key.startswith(query.get("prefix", ""))
        )
        return (
            f"<ListBucketResult><IsTruncated>false</IsTruncated>{items}</ListBucketResult>".encode()
        )

    def _judged(self) -> int:
        query = dict(parse_qsl(urlsplit(self.path).query, keep_blank_values=True))
        if header := self.headers.get("Authorization"):
            parts = dict(re.findall(r"(\w+)=([^,\s]+)", header))
            given, body = parts["Signature"], self.headers["x-amz-content-sha256"]
            names, credential = parts["SignedHeaders"], parts["Credential"]
            time, algorithm = self.headers["x-amz-date"], header.split()[0]
        else:
            given, body = query.pop("X-Amz-Signature", ""), "UNSIGNED-PAYLOAD"
            names, credential = query.get("X-Amz-SignedHeaders", ""), query.get("X-Amz-Credential")
            time, algorithm = query.get("X-Amz-Date", ""), query.get("X-Amz-Algorithm", "")
        if not given or not credential:
            return 403
        request = self._canonical(query, names, body)
        return 200 if given == _signature(request, algorithm, time, credential) else 403

    def _canonical(self, query: dict[str, str], names: str, body: str) -> str:
        canonical_query = "&".join(f"{quote(k, '')}={quote(query[k], '')}" for k in sorted(query))
        headers = "".join(f"{name}:{self.headers[name]}\n" for name in names.split(";"))
        path = urlsplit(self.path).path
        return "\n".join([self.command, path, canonical_query, headers, names, body])

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _signature(request: str, algorithm: str, time: str, credential: str) -> str:
    _, day, region, service, end = credential.rsplit("/", 4)
    scope = f"{day}/{region}/{service}/{end}"
    hashed = hashlib.sha256(request.encode()).hexdigest()
    text = "\n".join([algorithm, time, scope, hashed])
    key = f"AWS4{SECRET}".encode()
    for part in (day, region, service, end, text):
        key = hmac.digest(key, part.encode(), "sha256")
    return key.hex()


@contextmanager
def storing() -> Iterator[Store]:
    with serve_in_thread(Store()) as store:
        yield store
