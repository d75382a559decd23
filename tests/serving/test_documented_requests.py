"""The requests in the documents are what the server takes.

Every `curl` that asks a server of one's own is run against one on `shapes`, as it stands. Bodies
for models that are not on this machine, and those that stand alone, are checked as far as no model
is needed; then `shapes` draws what it can of them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdbento.catalog.specs import catalogued
from sdbento.jobs.formats.inputs import read_input
from sdbento.request.schema import GenerateRequest
from sdbento.request.settle import check_fields
from tests.support.images import base64, gradient
from tests.support.server import ROOT, Server

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN = re.compile(r"(?:http://)?(?:localhost|HOST):3000")
BEGIN = re.compile(r"^(?:until )?curl\b")
OF_OTHERS = {"model", "lora", "controlnet", "refiner", "width", "height", "num_images"}
ENDLESS = "/batch"  # events until the client leaves
CURL_TIMEOUT = 28  # the exit status of a curl whose --max-time is over
SPECS = {name.casefold(): spec for spec in catalogued() for name in spec.names}
NOT_HERE = "$"  # a variable of the shell: an address or a key of RunPod's


def blocks(path: Path, language: str) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)


def commands(block: str) -> Iterator[str]:
    """Each command of a block of bash: quotes may hold line breaks, and a backslash joins lines."""
    command = ""
    for line in block.splitlines():
        command += line
        try:
            shlex.split(command, comments=True)
        except ValueError:  # a quote is still open
            command += "\n"
            continue
        if command.endswith("\\"):
            command = command[:-1]
            continue
        yield command.strip()
        command = ""


CURLS = [
    pytest.param(command, id=f"{path.name}: {command[:60]}")
    for path in DOCUMENTS
    for block in blocks(path, "bash")
    for command in commands(block)
    if BEGIN.match(command)
]
BODIES = [
    pytest.param(body, id=f"{path.name}: {body[:60]}")
    for path in DOCUMENTS
    for block in blocks(path, "json")
    for body in re.split(r"\n(?=\{)", block)
    if '"prompt"' in body and '"event"' not in body  # which is an answer
]


def body_of(command: str) -> dict[str, Any] | None:
    words = shlex.split(command, comments=True)
    for option, value in pairwise(words):
        if option in ("-d", "--data"):
            return dict(json.loads(value))
    return None


def is_for_embedded(body: dict[str, Any]) -> bool:
    return body.get("model", "shapes") in ("shapes", "emoji") and NOT_HERE not in json.dumps(body)


def check(body: dict[str, Any]) -> None:
    """Raises what the server would answer to such a body, as far as no model is needed for it."""
    if "input" in body:
        read_input(body["input"])
        return
    request = GenerateRequest.model_validate(body)
    check_fields(request, SPECS[(request.model or "sdxl").casefold()])


def for_shapes(body: dict[str, Any]) -> dict[str, Any]:
    """The same without what is a model of its own, and at the size of `shapes`: what is left are
    samplers, steps, guidance, images and passes, in the combination that the document shows."""
    kept = {name: value for name, value in body.items() if name not in OF_OTHERS}
    image = base64(gradient(64, 64))
    return kept | {name: image for name in ("image", "mask_image") if name in body}


def test_documents_have_requests() -> None:
    assert len(CURLS) > 10 and len(BODIES) > 20


@pytest.mark.parametrize("command", CURLS)
def test_a_documented_command_works(server: Server, tmp_path: Path, command: str) -> None:
    body = body_of(command)
    if body is not None and not is_for_embedded(body):
        check(body)
        return
    if not OWN.search(command):  # of RunPod's platform
        assert body is None or "input" in body or "api.runpod.ai" in command
        if body is not None:
            check(body)
        return
    Image.new("RGB", (128, 128), "white").save(tmp_path / "in.png")
    Image.new("L", (128, 128), 255).save(tmp_path / "mask.png")
    small = command.replace("512", "128")  # a size that `shapes` is quick at
    own = OWN.sub(server.url, small)
    if ENDLESS in own:
        own = own.replace("curl ", "curl --max-time 2 ", 1)
    elif "-sf" not in own:
        own = own.replace("curl ", "curl --fail-with-body ", 1)
    ran = subprocess.run(
        ["bash", "-c", own],
        cwd=tmp_path,
        env=os.environ | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ran.returncode == (CURL_TIMEOUT if ENDLESS in own else 0), ran.stdout + ran.stderr
    assert ran.stdout or "-o " in command or command.startswith("until"), "nothing was answered"
    for name in re.findall(r"-o (\S+\.png)", command):
        Image.open(tmp_path / name).load()


@pytest.mark.parametrize("text", BODIES)
def test_a_documented_body_is_taken(server: Server, text: str) -> None:
    body = json.loads(text)
    check(body)
    if "input" not in body:
        answer = server.client.post("/txt2img", json=for_shapes(body))
        assert answer.status_code == 200, answer.text


def test_a_wrong_body_is_noticed() -> None:
    with pytest.raises(ValueError, match="stepz"):
        check({"prompt": "a", "stepz": 3})
