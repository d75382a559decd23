"""webuiapi, a client of AUTOMATIC1111's web UI, against a running server.

python examples/webuiapi_client.py [http://localhost:3000 [key]]
"""

from __future__ import annotations

import sys
from urllib.parse import urlsplit

import webuiapi

URL = urlsplit(sys.argv[1] if len(sys.argv) > 1 else "http://localhost:3000")
KEY = sys.argv[2] if len(sys.argv) > 2 else None
PROMPT = "a red apple on a blue background"


def main() -> None:
    api = webuiapi.WebUIApi(host=URL.hostname, port=URL.port, use_https=URL.scheme == "https")
    if KEY:
        api.set_auth("", KEY)  # the user's name does not matter

    made = api.txt2img(prompt=PROMPT, seed=3, steps=20, width=128, height=128)
    made.image.save("apple.png")
    print(f"one image by {made.info['sd_model_name']}: {made.image.size}, seed {made.info['seed']}")

    again = api.img2img(
        [made.image], prompt="an orange", seed=3, denoising_strength=0.9, width=128, height=128
    )
    print(f"another one out of it: {again.image.size}")


if __name__ == "__main__":
    main()
