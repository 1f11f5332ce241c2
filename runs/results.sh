#!/usr/bin/env bash
# The tables of docs/results.md: every method on the shipped pair, greedy and at T=1, other libraries in the same run. A quarter of
# an hour on four quiet cores. Each run has a folder in runs/out/results. llama.cpp takes part where `make peers` was run.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
pair=models/pysource
peers=transformers,transformers+draft
[ -x .venv-peers/bin/llama-server ] || [ -n "${GLIDECAPE_PEERS:-}" ] && peers+=,llama.cpp
methods=plain,lookup,vanilla,nocross:glide,noglimpse:glide,glide,glide+cape,glide+svip@threshold=0.45
methods+=,glide+cape+svip@threshold=0.45,glide+beam,eagle+chain,eagle@top=4@total=12,medusa@top=4@total=12
# SVIP by level, the three ways to read a frontier's entropy.
for over in best mean min; do methods+=,eagle+svip@top=4@total=12@threshold=0.45@over=$over; done
common=(--target "$pair/target" --methods "$methods" --peers "$peers" --draft-length 5 --cape-bins small
    --suite own,stdlib:400 --prompt-tokens 192 --limit "${LIMIT:-8}" --threads "${THREADS:-4}" --repeats "${REPEATS:-2}"
    --draft "glide=$pair/glide" --draft "noglimpse=$pair/glide-no-glimpse" --draft "nocross=$pair/glide-no-cross"
    --draft "vanilla=$pair/lm" --draft "eagle=$pair/eagle" --draft "medusa=$pair/medusa")
bench() { "$bin"/glidecape bench "${common[@]}" "${@:2}" --out "runs/out/results/$1"; }

bench t0 --temperature 0 --looping 4
bench t1 --temperature 1

"$bin"/python runs/tables.py runs/out/results/t0 runs/out/results/t1 > runs/out/results/tables.md
"$bin"/python runs/picture.py runs/out/results/t0 runs/out/results/t1 docs/speed.svg
"$bin"/glidecape report runs/out/results/t0 runs/out/results/t1 --out runs/out/results
