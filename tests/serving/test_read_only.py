"""The server where it may write to nothing but the volumes of its pod, as the chart demands."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.server import QUICK, ROOT, Server, free_port, post

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount"),
]
PLACE = "/mnt"  # where the volumes are that would need a folder of their own in /
# Mounts are made read-only for this process and its children alone.
SCRIPT = """
set -e
mount --make-rprivate /
for path in / "$ROOT" "$(dirname "$(readlink -f "$(command -v python)")")"; do
  mount -o remount,bind,ro "$(findmnt -n -o TARGET -T "$path")"
done
for path in $TEMPORARY; do mkdir -p "$path"; mount -t tmpfs tmpfs "$path"; done
cd /
if touch "$ROOT/written" 2>/dev/null; then exit 1; fi
exec "$ROOT/scripts/entrypoint" serve
"""


def moved(path: str) -> str:
    return path if path.startswith(("/tmp", "/dev")) else PLACE + path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    text = (ROOT / "configs/kubernetes/sdbento.yaml").read_text(encoding="utf-8")
    manifests = {one["kind"]: one for one in yaml.safe_load_all(text) if one}
    [container] = manifests["Deployment"]["spec"]["template"]["spec"]["containers"]
    folders = [PLACE, *(moved(mount["mountPath"]) for mount in container["volumeMounts"])]
    port, log = free_port(), tmp_path_factory.mktemp("server") / "server.log"
    environment = {
        name: moved(value)
        for name, value in manifests["ConfigMap"]["data"].items()
        if value.startswith("/")
    } | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "ROOT": str(ROOT),
        "TEMPORARY": " ".join(folders),
        "BENTOML_HOST": "127.0.0.1",
        "PORT": str(port),
        "SD_MODEL": "shapes",
    }
    command = ["unshare", "--mount", "bash", "-c", SCRIPT]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def test_it_makes_images_does_jobs_and_ends(server: Server) -> None:
    assert post(server, "/txt2img", **QUICK).headers["content-type"] == "image/png"
    assert post(server, "/runsync", input=QUICK).json()["status"] == "COMPLETED"
    assert server.stop() == 0
    assert "Read-only file system" not in server.log.read_text()
