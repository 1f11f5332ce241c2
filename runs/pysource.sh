#!/usr/bin/env bash
# The shipped pair, from nothing but installed Python packages. Restartable: every step goes on where it stopped.
# About two hours on four quiet cores. THREADS, MINUTES, DRAFT_TOKENS and ROOTS (folders of Python packages, separated by
# spaces) may be set, and HOLD_OUT (packages, joined by commas; the shipped pair's were rich,networkx,flask); the weights land in
# models/pysource.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
out=runs/out/pysource
threads=${THREADS:-4}
minutes=${MINUTES:-75}
tokens=${DRAFT_TOKENS:-3.2e6}
roots=()
for root in ${ROOTS:-}; do roots+=(--root "$root"); done

[ -f corpus/train.bin ] || "$bin"/glidecape data pysource --output corpus ${roots[@]+"${roots[@]}"} \
    --hold-out "${HOLD_OUT:-rich,networkx}"
[ -f "$out/target/model.safetensors" ] || "$bin"/glidecape train-target --data corpus --output "$out/target" --layers 8 \
    --minutes "$minutes" --compile --threads "$threads"
# One thread each, side by side: single-threaded runs get further together than one with all threads.
draft() {
    [ -f "$out/$1/card.json" ] || "$bin"/glidecape train "$out/target" --data corpus --output "$out/$1" \
        --tokens "$tokens" --length 320 --rows 8 --optimizer muon --threads 1 "${@:2}"
}
draft glide --kind glide --max-lag 16 --compile &
draft glide-last --kind glide --read last --window 0 --max-lag 6 &
draft glide-no-cross --kind glide-no-cross --window 0 --max-lag 6 &
wait
draft eagle --kind eagle &
draft lm --kind lm &
draft medusa --kind medusa --max-lag 5 --tokens 1.6e6 &
wait
mkdir -p models/pysource
for part in target glide glide-last glide-no-cross eagle medusa lm; do
    mkdir -p "models/pysource/$part"
    find "$out/$part" -maxdepth 1 -type f ! -name training.pt -exec cp {} "models/pysource/$part/" \;
done
