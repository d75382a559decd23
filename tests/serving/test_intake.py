"""What the whole server does with requests that are too much, on every door."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest

from sdbento.doors.network.parsers import LARGE_BODY
from tests.support.bounded import HANG, answer
from tests.support.images import base64, gradient
from tests.support.server import QUICK, Server, post

MANY: dict[str, Any] = {f"k{i}": i for i in range(100_000)}
DOORS = [
    "/generate",
    "/txt2img",
    "/run",
    "/v1/images/generations",
    "/v1/images/edits",
    "/sdapi/v1/txt2img",
    "/sdapi/v1/options",
]


def raw(server: Server, sent: bytes) -> bytes:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 60) as client:
        client.sendall(sent)
        return answer(client)


@pytest.mark.parametrize("path", DOORS)
def test_more_values_or_depth_than_is_read_are_refused_by_every_door(
    server: Server, path: str
) -> None:
    for body, limit in ((json.dumps(MANY), "at most 20000"), ("[" * 1000, "at most 64 deep")):
        response = server.client.post(path, content=body)
        assert response.status_code == 413 and limit in response.text


@pytest.mark.parametrize("path", DOORS)
def test_a_body_is_not_unpacked(server: Server, path: str) -> None:
    response = server.client.post(path, content=b"{}", headers={"content-encoding": "gzip"})
    assert response.status_code == 415 and "gzip" in response.text


@pytest.mark.parametrize("field", ["lora", "controlnet", "refiner"])
@pytest.mark.parametrize("text", ["[" * 200_000, "[" * 600 + "]" * 600, json.dumps(MANY)])
def test_fields_of_forms_are_read_as_far(server: Server, field: str, text: str) -> None:
    for path, name in (("/generate", field), ("/v1/images/edits", f"{field}[x]")):
        files: dict[str, Any] = {"prompt": (None, "x"), "image": ("x.png", b"x")}
        files[name] = (None, text)
        assert server.client.post(path, files=files).status_code == 413
    inside = {"prompt": "x", field: text}
    assert server.client.post("/v1/images/generations", json=inside).status_code == 413


def test_prompts_full_of_punctuation_are_drawn(server: Server) -> None:
    text = "(red:1.1), [blue], {x}: " * 9
    assert post(server, **QUICK | {"prompt": text, "negative_prompt": text}).status_code == 200


def test_a_body_that_no_route_reads_is_not_looked_at(server: Server) -> None:
    body = json.dumps(MANY)
    assert server.client.post("/nowhere", content=body).status_code == 404
    assert server.client.request("GET", "/models", content=body).status_code == 200
    assert server.client.post("/livez", content=body).status_code == 405


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"a" * 9000), b"414"),
        (b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 1000 + b"\r\n", b"431"),
        (b"GET /livez HTTP/1.1\r\nX: %s" % (b"a" * 1_000_000), b"431"),
        (b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n", b"413"),
    ],
)
def test_heads_have_limits(server: Server, sent: bytes, expected: bytes) -> None:
    assert raw(server, sent).split()[1] == expected


def test_a_client_may_wait_until_its_body_is_wanted(server: Server) -> None:
    body = json.dumps(QUICK).encode()
    head = b"POST /txt2img HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 60) as client:
        client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body))
        assert client.recv(100).startswith(b"HTTP/1.1 100")
        client.sendall(body)
        assert answer(client).startswith(b"HTTP/1.1 200")


def test_a_path_cannot_forge_a_line_of_the_log(server: Server) -> None:
    server.client.get("/x%0d%0a2026-01-01T00:00:00 [INFO] forged%1b[2J")
    give_up = time.monotonic() + HANG
    while "[INFO] forged" not in (log := server.log.read_text(encoding="utf-8")):
        assert time.monotonic() < give_up  # the line is written after the answer
    assert "/x\\r\\n2026-01-01T00:00:00 [INFO] forged\\u001b[2J" in log
    assert "\n2026-01-01T00:00:00 [INFO] forged" not in log


def test_a_large_image_passes_though_large_bodies_are_parsed_elsewhere(server: Server) -> None:
    image = base64(gradient(1024, 1024))
    assert len(image) > LARGE_BODY
    fields = QUICK | {"image": image, "width": 64, "height": 64, "strength": 0.5}
    assert post(server, **fields).status_code == 200
