"""The Python client of BentoML against a running server.

python examples/bentoml_client.py [http://localhost:3000]
"""

from __future__ import annotations

import sys
from pathlib import Path

import bentoml

URL = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:3000"


def main() -> None:
    prompt = "a red apple on a blue background"
    with bentoml.SyncHTTPClient(URL) as client:
        image = client.txt2img(prompt=prompt, seed=3)
        print(f"one image, a PIL image: {image.size}")
        image.save("apple.png")
        source = Path("apple.png")  # the client sends files by their paths
        again = client.img2img(prompt="an orange", image=source, strength=0.9)
        print(f"another one out of it: {again.size}")
        answer = client.generate(prompt=prompt, seed=3, num_images=2)
        print(f"two images: seeds {answer['seeds']}, {answer['timings']['total']:.2f} s")
        stream = "".join(client.generate_stream(prompt=prompt, num_inference_steps=5))
        print(f"a stream of {stream.count('event: step')} steps, done: {'event: done' in stream}")


if __name__ == "__main__":
    main()
