"""nginx and Caddy, configured as the documents say, in front of a real server."""

from __future__ import annotations

import os
import re
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.server import (
    QUICK,
    ROOT,
    START_LIMIT,
    Server,
    alike,
    assert_error,
    free_port,
    pixels,
    post,
)

REQUIRED = "REQUIRE_PROXIES"  # set where these tests must not be skipped
NAME = "sd.localhost"  # instead of the documents' name, which a server without keys would refuse
# nginx's own defaults lie in folders of the system.
NGINX = """
daemon off; {user} pid {folder}/pid; error_log {folder}/errors; events {{}}
http {{ access_log off; {paths}
{servers} }}
"""
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def block(document: str, language: str) -> str:
    text = (ROOT / document).read_text(encoding="utf-8")
    [found] = re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return str(found)


def replaced(text: str, **values: str) -> str:
    """Every pattern must be there, so that a document that changes is not tested half."""
    for pattern, value in values.items():
        text, number = re.subn(PATTERNS[pattern], value, text)
        assert number, pattern
    return text


PATTERNS = {
    "upstreams": r"(?:server 127\.0\.0\.1:300\d; ?)+",
    "upstream": r"127\.0\.0\.1:3000",
    "http": r"listen 80\b",
    "https": r"listen 443\b",
    "name": r"sd\.example\.com(?=[;\s])",
    "certificate": r"/etc/letsencrypt/\S+/fullchain\.pem",
    "key": r"/etc/letsencrypt/\S+/privkey\.pem",
}


def certificate(folder: Path) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={NAME}"]
    command += ["-addext", f"subjectAltName=DNS:{NAME}", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def nginx(folder: Path, servers: str) -> list[str]:
    paths = " ".join(f"{name}_temp_path {folder}/{name};" for name in TEMPORARY)
    user = "user root;" if os.geteuid() == 0 else ""
    text = NGINX.format(folder=folder, user=user, paths=paths, servers=servers)
    (folder / "nginx.conf").write_text(text)
    return ["nginx", "-e", str(folder / "errors"), "-c", str(folder / "nginx.conf")]


@contextmanager
def running(command: list[str], folder: Path, port: int) -> Iterator[None]:
    if shutil.which(command[0]) is None or shutil.which("openssl") is None:
        missing = "the machine has no nginx, caddy or openssl (Debian: apt-get install nginx-light)"
        pytest.fail(missing) if os.environ.get(REQUIRED) else pytest.skip(missing)
    environment = os.environ | {"HOME": str(folder), "XDG_DATA_HOME": str(folder)}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        give_up = time.monotonic() + START_LIMIT
        while not answers(port):
            assert process.poll() is None and time.monotonic() < give_up, folder
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)


def answers(port: int) -> bool:
    try:
        httpx.get(f"http://127.0.0.1:{port}", trust_env=False)
    except httpx.ConnectError:
        return False
    except httpx.TransportError:  # it does not answer to this name
        pass
    return True


def client(port: int, folder: Path | None = None, name: str = NAME) -> httpx.Client:
    """Asks for `name` on loopback: httpx would not find it in any DNS."""
    scheme = "https" if folder else "http"
    verify = ssl.create_default_context(cafile=str(folder / "cert.pem")) if folder else True

    def to_name(request: httpx.Request) -> None:
        request.headers["Host"] = name
        request.extensions["sni_hostname"] = name

    return httpx.Client(
        base_url=f"{scheme}://127.0.0.1:{port}",
        verify=verify,
        trust_env=False,
        timeout=100.0,
        event_hooks={"request": [to_name]},
    )


def passes(asked: httpx.Client, server: Server) -> None:
    """Images, events and bodies go through; what is wrong with a request the server says."""
    answer = asked.post("/txt2img", json=QUICK)
    assert answer.status_code == 200, answer.text
    assert alike(pixels(answer.content), pixels(post(server, "/txt2img", **QUICK).content))
    with asked.stream("POST", "/generate_stream", json=QUICK) as stream:
        events = [line for line in stream.iter_lines() if line.startswith("event: ")]
    assert events.count("event: step") == QUICK["num_inference_steps"]
    assert_error(asked.post("/txt2img", json={"prompt": "a" * 2_000_000}), 422, param="prompt")


def test_nginx_before_several_servers(server: Server, tmp_path: Path) -> None:
    port, own = free_port(), server.url.removeprefix("http://")
    text = block("docs/deploy.md", "nginx")
    text = replaced(text, upstreams=f"server {own};", http=f"listen 127.0.0.1:{port}")
    with running(nginx(tmp_path, text), tmp_path, port), client(port) as asked:
        passes(asked, server)


def test_nginx_with_tls(server: Server, tmp_path: Path) -> None:
    port, plain, own = free_port(), free_port(), server.url.removeprefix("http://")
    certificate(tmp_path)
    text = replaced(
        block("docs/security.md", "nginx"),
        certificate=str(tmp_path / "cert.pem"),
        key=str(tmp_path / "key.pem"),
        upstream=own,
        http=f"listen 127.0.0.1:{plain}",
        https=f"listen 127.0.0.1:{port}",
        name=NAME,
    )
    with running(nginx(tmp_path, text), tmp_path, plain):
        with client(port, tmp_path) as asked:
            passes(asked, server)
        for wrong in (client(port, tmp_path, "other.localhost"), client(plain)):
            with wrong, pytest.raises(httpx.TransportError):
                wrong.get("/livez")


def test_caddy(server: Server, tmp_path: Path) -> None:
    """Over plain HTTP: for TLS it would ask for a certificate."""
    port, own = free_port(), server.url.removeprefix("http://")
    text = block("docs/security.md", "caddyfile")
    text = replaced(text, upstream=own, name=f"http://{NAME}:{port}")
    (tmp_path / "Caddyfile").write_text("{\n\tadmin off\n}\n" + text)
    command = ["caddy", "run", "--config", str(tmp_path / "Caddyfile")]
    with running(command, tmp_path, port), client(port) as asked:
        passes(asked, server)
