"""OpenAI's SDK against a running server.

python examples/openai_client.py [http://localhost:3000 [key]]
"""

from __future__ import annotations

import sys
from base64 import b64decode
from pathlib import Path

from openai import OpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:3000"
KEY = sys.argv[2] if len(sys.argv) > 2 else "none"  # the SDK asks for one
PROMPT = "a red apple on a blue background"


def main() -> None:
    client = OpenAI(base_url=f"{URL}/v1", api_key=KEY)
    model = client.models.list().data[0].id
    print(f"the server's model: {model}")

    own = {"seed": 3, "num_inference_steps": 20}  # any field of docs/requests.md
    made = client.images.generate(model=model, prompt=PROMPT, size="auto", extra_body=own)
    assert made.data and made.data[0].b64_json
    Path("apple.png").write_bytes(b64decode(made.data[0].b64_json))
    print(f"one image: {made.size}")

    with Path("apple.png").open("rb") as image:
        edited = client.images.edit(model=model, image=image, prompt="an orange")
    print(f"another one out of it: {edited.size}")

    stream = client.images.generate(
        model=model, prompt=PROMPT, stream=True, partial_images=2, extra_body=own
    )
    print("events:", ", ".join(event.type for event in stream))


if __name__ == "__main__":
    main()
