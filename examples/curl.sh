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

ask /txt2img --output apple.png \
    --data '{"prompt": "a red apple on a blue background", "seed": 3}'
echo "one image: $(wc -c <apple.png) bytes"

ask /img2img --output orange.png \
    --form image=@apple.png --form prompt="an orange" --form strength=0.9
echo "another one out of it: $(wc -c <orange.png) bytes"

echo "as it is made:"
ask /generate_stream --no-buffer --data '{"prompt": "a birthday cake", "num_inference_steps": 5}' |
    sed -n 's/^event: //p' | uniq -c
