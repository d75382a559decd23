"""`make docs-fuzz`: schemathesis against a server on `shapes`, by the server's own document.

It makes requests out of the OpenAPI document: the examples, the edges of every field, random ones
that fit and that do not, and calls that follow one another. What is answered must be described
there, and nothing may be answered with 500; 503 and 504 are described. Not checked is that all
that fits is accepted: no schema knows which fields go together, and what a model or sampler can do.
ARGS goes to schemathesis; `--phases coverage`, the edges, takes most of the time.

The module is also read by schemathesis itself, for the functions that are marked as hooks.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import schemathesis

from tests.support.server import ROOT, serving

# Less work than the document allows, so that a machine without a GPU is soon done.
MOST = dict.fromkeys(("num_images", "n", "batch_size", "n_iter"), 1)
MOST |= dict.fromkeys(("num_inference_steps", "steps", "hr_second_pass_steps"), 2)
CONFIG = Path(__file__).with_suffix(".toml")
UNCHECKED = "positive_data_acceptance,not_a_server_error"


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    body = case.body if isinstance(case.body, dict) else {}
    for fields in (body, body.get("input")):
        if isinstance(fields, dict):
            for name, most in MOST.items():
                if type(fields.get(name)) is int and fields[name] > most:
                    fields[name] = most


@schemathesis.check
def no_internal_error(context: Any, response: Any, case: Any) -> None:
    assert response.status_code != 500, response.text


def main() -> int:
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), SDBENTO_MAX_PIXELS="65536", SDBENTO_REQUEST_TIMEOUT="20") as server,
    ):
        server.wait_until_ready()
        program = str(Path(sys.executable).with_name("schemathesis"))
        command = [program, "--config-file", str(CONFIG), "run", f"{server.url}/docs.json"]
        command += ["--max-examples", "10", "--seed", "1"]
        command += ["--request-timeout", "60", "--exclude-checks", UNCHECKED, *sys.argv[1:]]
        environment = os.environ | {"SCHEMATHESIS_HOOKS": "tests.fuzz", "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=environment, cwd=folder).returncode  # it leaves a cache


if __name__ == "__main__":
    sys.exit(main())
