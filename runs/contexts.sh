#!/usr/bin/env bash
# Acceptance by context length (docs/drafts.md, "Long contexts"): of the shipped draft, and of small drafts trained on windows of 256
# tokens with positions from zero and with anchor-offset positions. About 25 minutes on two quiet cores. Restartable: what is done
# is left as it is. TOKENS and SEEDS of the small drafts may be set, and PROMPTS.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
out=runs/out/contexts
pair=models/pysource
prompts=${PROMPTS:-16}
export OMP_NUM_THREADS=1
measure() {
    [ -f "$out/$1/done" ] && return
    "$bin"/python runs/contexts.py measure $pair/target --output "$out/$1" --prompts "$prompts" "${@:2}"
    touch "$out/$1/done"
}

measure shipped --draft glide=$pair/glide &
[ -f $out/text.jsonl ] || "$bin"/python runs/contexts.py text $out/text.jsonl
drafts=()
for seed in ${SEEDS:-0}; do
    for positions in zero anchor-offset; do
        [ -f "$out/$positions-$seed/card.json" ] || "$bin"/glidecape train $pair/target --data $out/text.jsonl \
            --output "$out/$positions-$seed" --positions $positions --tokens "${TOKENS:-3e5}" --length 256 --rows 8 \
            --optimizer muon --threads 1 --eval-prompts 0 --seed "$seed"
        drafts+=(--draft "$positions-$seed=$out/$positions-$seed")
    done
done
measure positions "${drafts[@]}"
wait
