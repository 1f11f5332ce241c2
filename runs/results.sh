#!/usr/bin/env bash
# Every table of docs/results.md, about twenty minutes on four quiet cores. JSON goes to runs/out/results.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
pair=models/pysource
common=(--target "$pair/target" --prompts evaluation/prompts/python.jsonl --prompt-tokens 192 --threads "${THREADS:-4}"
    --draft "glide=$pair/glide" --draft "nocross=$pair/glide-no-cross" --draft "vanilla=$pair/lm")
methods=plain,vanilla,glide,nocross:glide,glide+cape,glide+svip,glide+cape+svip
for temperature in 1 0; do
    "$bin"/glidecape bench "${common[@]}" --methods $methods --temperature $temperature --draft-length 5 --repeats 2 \
        --out "runs/out/results/paper-bins-t$temperature.json"
    "$bin"/glidecape bench "${common[@]}" --methods plain,glide,glide+cape --temperature $temperature --draft-length 4 --repeats 2 \
        --cape-bins small --out "runs/out/results/small-bins-t$temperature.json"
done
