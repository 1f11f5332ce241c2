#!/usr/bin/env bash
# Every table of docs/drafts.md. One thread each, three at a time; TOKENS a row (default 1e6; 4e6 is better), about two hours on
# four quiet cores. Restartable: a study goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
out=runs/out/studies
tokens=${TOKENS:-1e6}
study() {
    [ -f "$out/$1/study.json" ] || "$bin"/glidecape study --target models/pysource/target --data corpus --out "$out/$1" \
        --tokens "$tokens" --length 320 --rows 8 --threads 1 --base max_lag:6,glimpse:off --prompts 24 "${@:2}"
}
# What the draft sees of its target; three seeds.
study sees --factor cross --row joined=glimpse:on --row alone=glimpse:on,kind:glide-no-cross --seeds 0,1,2 &
# How it learns.
study learns --factor loss --factor lags --factor max-lag &
# What it is made of.
study made --factor read --row read-5+7=read:5+7 --factor layers --factor width --factor norm --factor embedding \
    --factor window --factor draft-vocab &
wait
