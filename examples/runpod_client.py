"""RunPod's SDK against a running server: only the address is another one.

python examples/runpod_client.py [http://localhost:3000 [key]]
"""

from __future__ import annotations

import sys
from base64 import b64decode
from pathlib import Path

import runpod

URL = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:3000"
KEY = sys.argv[2] if len(sys.argv) > 2 else "none"  # the SDK asks for one
INPUT = {"prompt": "a red apple on a blue background", "seed": 3, "return": "full"}


def main() -> None:
    runpod.api_key, runpod.endpoint_url_base = KEY, f"{URL}/v2"
    endpoint = runpod.Endpoint("any-name")

    output = endpoint.run_sync({"input": INPUT})
    Path("apple.png").write_bytes(b64decode(output["images"][0]))
    print(f"one image: seed {output['seeds'][0]}")

    job = endpoint.run({"input": INPUT})
    events = [event["event"] for event in job.stream()]
    print(f"a job with {events.count('step')} steps: {job.status()}")


if __name__ == "__main__":
    main()
