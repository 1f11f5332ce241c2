#!/usr/bin/env bash
# Every table of docs/results.md, about a quarter of an hour on four quiet cores. JSON goes to runs/out/results.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
pair=models/pysource
common=(--target "$pair/target" --prompts evaluation/prompts/python.jsonl --prompt-tokens 192 --threads "${THREADS:-4}"
    --draft "glide=$pair/glide" --draft "nocross=$pair/glide-no-cross" --draft "vanilla=$pair/lm")
all=plain,vanilla,glide,nocross:glide,glide+cape,glide+svip,glide+cape+svip
ours=plain,glide,glide+cape,glide+svip,glide+cape+svip
bench() { "$bin"/glidecape bench "${common[@]}" "${@:2}" --out "runs/out/results/$1.json"; }

# What fits this CPU: short drafts, few siblings.
bench small-t1 --methods $ours --temperature 1 --draft-length 3 --cape-bins small --repeats 2 --limit 16
bench small-t0 --methods $ours --temperature 0 --draft-length 5 --cape-bins small --repeats 2 --limit 16
# The papers' settings: alpha at gamma 5, the paper's bins.
bench paper-t0 --methods $all --temperature 0 --draft-length 5 --repeats 1
bench paper-t1 --methods $all --temperature 1 --draft-length 5 --repeats 1
