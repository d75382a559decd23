"""The bento: built by `bentoml build`, and served from what was built."""

from __future__ import annotations

import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from tests.support.server import ROOT, serving


@pytest.mark.long
def test_a_bento_can_be_built_and_serves_an_image(tmp_path: Path) -> None:
    home = tmp_path / "bentoml"
    home.mkdir()
    environment = os.environ | {"BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "1"}
    built = subprocess.run(
        [sys.executable, "-m", "bentoml", "build", "--output", "tag"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert built.returncode == 0, built.stderr
    [source] = home.glob("bentos/sdbento/*/src")
    contents = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert {
        "service.py",
        "configs/models.yaml",
        "sdbento/bundled/shapes/unet/config.json",
    } <= contents
    assert not any(part in name for name in contents for part in ("tests/", "training/", "bench/"))
    with serving(tmp_path, target="sdbento:latest", cwd=tmp_path) as server:
        server.wait_until_ready()
        fields = {"prompt": "a red circle", "num_inference_steps": 4}
        answer = server.client.post("/txt2img", json=fields)
        assert Image.open(BytesIO(answer.content)).size == (128, 128)
