#!/usr/bin/env bash
# Every table of docs/results.md, about half an hour on four quiet cores. Each run has a folder in runs/out/results.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
pair=models/pysource
common=(--target "$pair/target" --suite own,stdlib:400 --prompt-tokens 192 --limit "${LIMIT:-24}"
    --threads "${THREADS:-4}" --repeats "${REPEATS:-2}"
    --draft "glide=$pair/glide" --draft "nocross=$pair/glide-no-cross" --draft "vanilla=$pair/lm")
bench() { "$bin"/glidecape bench "${common[@]}" "${@:2}" --out "runs/out/results/$1"; }

# gamma 5, few siblings: every method on the same prompts.
all=plain,vanilla,glide,nocross:glide,glide+cape,glide+svip,glide+cape+svip
bench g5-t0 --methods $all --temperature 0 --draft-length 5 --cape-bins small --looping 8
bench g5-t1 --methods $all --temperature 1 --draft-length 5 --cape-bins small
# gamma 4, a looser threshold, and the beam: what suits a small target on a CPU.
ours=plain,glide,glide+cape,glide+cape+svip,glide+beam
bench g4-t0 --methods $ours --temperature 0 --draft-length 4 --cape-bins small --svip-threshold 0.45 --looping 0 --watch 0
bench g4-t1 --methods $ours --temperature 1 --draft-length 4 --cape-bins small --svip-threshold 0.45 --watch 0
# The paper's bins.
bench paper-t0 --methods plain,glide,glide+cape --temperature 0 --draft-length 5 --looping 0 --repeats 1 --watch 0
bench paper-t1 --methods plain,glide,glide+cape --temperature 1 --draft-length 5 --repeats 1 --watch 0

"$bin"/python runs/tables.py runs/out/results/*/ > runs/out/results/tables.md
"$bin"/python runs/picture.py runs/out/results/g5-t0 runs/out/results/g4-t1 docs/speed.svg
"$bin"/glidecape report runs/out/results/g5-t0 runs/out/results/g5-t1 --out runs/out/results
