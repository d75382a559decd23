"""An nginx from the machine's own installation, on loopback, before several servers."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

PROGRAM = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
START_LIMIT = 20.0  # seconds

# As docs/fleet.md has it, but for times that fit a test.
CONFIGURATION = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    upstream sdbento {{ least_conn; {servers} }}
    server {{
        listen 127.0.0.1:{port};
        client_max_body_size 32m;
        location / {{
            proxy_pass http://sdbento;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
            proxy_buffering off;
            proxy_connect_timeout 2s;
            proxy_read_timeout 20s;
            proxy_next_upstream error timeout http_503;
        }}
    }}
}}
"""


def is_installed() -> bool:
    return PROGRAM is not None


@contextmanager
def nginx(folder: Path, port: int, servers: Sequence[int]) -> Iterator[str]:
    """Its URL; `servers` are the ports that it passes requests on to."""
    assert PROGRAM is not None
    folder.mkdir()
    names = " ".join(
        f"server 127.0.0.1:{server} max_fails=1 fail_timeout=2s;" for server in servers
    )
    configuration = folder / "nginx.conf"
    configuration.write_text(CONFIGURATION.format(folder=folder, servers=names, port=port))
    process = subprocess.Popen([PROGRAM, "-p", str(folder), "-c", str(configuration)])
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_it_answers(url, process)
        yield url
    finally:
        process.terminate()
        process.wait()


def _wait_until_it_answers(url: str, process: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + START_LIMIT
    while time.monotonic() < give_up and process.poll() is None:
        with suppress(httpx.TransportError):
            httpx.get(url, trust_env=False, timeout=START_LIMIT)
            return
        time.sleep(0.05)
    raise RuntimeError("nginx has not started")
