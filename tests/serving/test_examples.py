"""The examples run as they stand, and so does the Python in the documents."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.server import ROOT, Server

# What each prints, among other lines.
EXAMPLES = {
    "client.py": [
        "two images: seeds [3, 4]",
        "saved as apple-1.png, apple-2.png",
        "another one out of the first: (128, 128)",
        "refused: width should be a multiple of 8; given: 500",
        "100%, ",
        "a preview: (",
        "done: seed 3",
        "a job that goes on without us: IN_QUEUE",
        "its image: seed 3",
        "four at once, which share a batch: seeds [0, 1, 2, 3]",
    ],
    "bentoml_client.py": [
        "another one out of it: (128, 128)",
        "seeds [3, 4]",
        "a stream of 5 steps, done: True",
    ],
    "openai_client.py": [
        "the server's model: shapes",
        "one image: 128x128",
        "another one out of it: 128x128",
        "events: image_generation.partial_image, ",
        "image_generation.completed",
    ],
    "runpod_client.py": ["one image: seed 3", "steps: COMPLETED"],
    "webuiapi_client.py": [
        "one image by shapes: (128, 128), seed 3",
        "another one out of it: (128, 128)",
    ],
    "curl.sh": ["one image: ", "another one out of it: ", "5 step", "1 done"],
}


def run(folder: Path, *command: str) -> str:
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=100,
        cwd=folder,
        env=os.environ | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"},
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_every_example_is_tested() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.*")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(server: Server, tmp_path: Path, name: str) -> None:
    interpreter = [] if name.endswith(".sh") else [sys.executable]
    printed = run(tmp_path, *interpreter, str(ROOT / "examples" / name), server.url)
    for line in EXAMPLES[name]:
        assert line in printed


def python_of(document: str) -> str:
    """The Python in a document that is about our client, one block after the other."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    if document == "README.md":
        blocks = [block for block in blocks if "sdbento.client" in block]
    return "\n".join(blocks)


@pytest.mark.parametrize("document", ["README.md", "docs/client.md"])
def test_the_python_of_the_documents_runs(server: Server, tmp_path: Path, document: str) -> None:
    program = python_of(document).replace("http://localhost:3000", server.url)
    assert server.url in program
    run(tmp_path, sys.executable, "-W", "error", "-c", program)
    assert any(tmp_path.glob("*.png"))


# For `shapes`, which would take long for the sizes of real models.
SMALL = r"(?<![0-9])(?:1024|512)(?![0-9])"
FOR_OTHERS = [
    pytest.param(block, id=f"{path.name}: {block.split()[1]}")
    for path in sorted((ROOT / "docs").glob("*.md"))
    if path.name != "client.md"
    for block in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
]


@pytest.mark.parametrize("program", FOR_OTHERS)
def test_the_python_for_other_clients_runs(server: Server, tmp_path: Path, program: str) -> None:
    """Blocks that go on from another one, such as those with `client` of nowhere, are only read."""
    address = server.url.removeprefix("http://")
    host, _, port = address.partition(":")
    compile(program, "a document", "exec")
    if "3000" not in program:
        return
    program = re.sub(r"(?:HOST|localhost):3000", address, program)
    program = re.sub(
        r'host="(?:HOST|localhost)", port=3000', f'host="{host}", port={port}', program
    )
    program = re.sub(SMALL, "128", program)
    for name in ("cat.png", "mask.png"):
        Image.new("L", (128, 128), 255).save(tmp_path / name)
    run(tmp_path, sys.executable, "-c", program)
