#!/usr/bin/env bash
# The papers' studies on the shipped pair, and other libraries beside it: about an hour on four quiet cores. JSON and Markdown go to
# runs/out/measure. llama.cpp takes part where `make peers` was run. `runs/measure.sh svip` runs one of them.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
out=runs/out/measure
pair=models/pysource
common=(--target "$pair/target" --draft "glide=$pair/glide" --draft "vanilla=$pair/lm" --threads "${THREADS:-4}")
wanted() { [ -z "$only" ] || [ "$only" = "$1" ]; }
only=${1:-}
measure() { ! wanted "$1" || "$bin"/glidecape measure "$1" "${common[@]}" "${@:2}" --out "$out/$1.json"; }

measure cape --use glide --temperature 0,1 --limit 8
measure svip --methods vanilla,glide,glide+cape --lengths 1-16 --temperature 0,1 --limit 8
measure batch --methods vanilla,glide,glide+cape,glide+cape+svip --svip-threshold 0.45 --limit 8
measure context --methods vanilla,glide,glide+cape,glide+cape+svip --svip-threshold 0.45
measure long --methods glide,glide+cape,glide+cape+svip --svip-threshold 0.45
if wanted peers; then
    peers=transformers,transformers+lookup,transformers+draft
    [ -x .venv-peers/bin/llama-server ] || [ -n "${GLIDECAPE_PEERS:-}" ] && peers+=,llama.cpp,llama.cpp+draft
    for temperature in 0 1; do
        "$bin"/glidecape bench "${common[@]}" --methods plain,lookup,vanilla,glide,glide+cape,glide+cape+svip@threshold=0.45 \
            --suite own,stdlib:400 --prompt-tokens 192 --cape-bins small --limit 8 --looping 0 --watch 0 --repeats 2 \
            --temperature $temperature --peers $peers --out "$out/peers-t$temperature"
    done
fi
