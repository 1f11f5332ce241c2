#!/usr/bin/env bash
# The papers' studies on the shipped pair: about an hour on four quiet cores. JSON and Markdown go to runs/out/measure.
# `runs/measure.sh svip batch` runs only those.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
out=runs/out/measure
pair=models/pysource
common=("$pair/target" --draft "glide=$pair/glide" --draft "vanilla=$pair/lm" --draft "eagle=$pair/eagle"
    --threads "${THREADS:-4}")
wanted() { [ -z "$only" ] || [[ " $only " == *" $1 "* ]]; }
only="$*"
measure() { ! wanted "$1" || "$bin"/glidecape measure "$1" "${common[@]}" "${@:2}" --output "$out/$1.json"; }

measure cape --use glide --temperature 0,1 --limit 8
measure svip --methods vanilla,glide,glide+cape,eagle@top=4@total=12,eagle+chain --lengths 1-8,10,12,16 --temperature 0,1 --limit 8
measure auto --use glide --temperature 0,1 --limit 8 --repeats 3
measure batch --methods vanilla,glide,glide+cape,glide+cape+svip --svip-threshold 0.6 --limit 8
measure context --methods vanilla,glide,glide+cape,glide+cape+svip --svip-threshold 0.6
measure long --methods glide,glide+cape,glide+cape+svip --svip-threshold 0.6
