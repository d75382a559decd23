#!/bin/sh
# curl against a running server.
#
# examples/curl.sh [http://localhost:3000 [key]]
set -eu

url=${1:-http://localhost:3000}
ask() { # one call: the path, then curl's own options
    path=$1
    shift
    curl --silent --show-error --fail-with-body ${key:+--header "Authorization: Bearer $key"} \
        "$url$path" "$@"
}
key=${2:-}

ask /txt2img --output triangle.png \
    --data '{"prompt": "a green triangle on a white background", "seed": 3}'
echo "one image: $(wc -c <triangle.png) bytes"

ask /img2img --output square.png \
    --form image=@triangle.png --form prompt="a red square" --form strength=0.9
echo "another one out of it: $(wc -c <square.png) bytes"

echo "as it is made:"
ask /generate_stream --no-buffer --data '{"prompt": "a white ring", "num_inference_steps": 5}' |
    sed -n 's/^event: //p' | uniq -c
