#!/usr/bin/env bash
# The studies of docs/drafts.md: studies of one thread each, side by side; TOKENS a row (default 1e6; 4e6 is better). About five
# hours on four quiet cores at 1e6. Restartable: what is done is left as it is. `runs/studies.sh learns made` runs only those.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
out=runs/out/studies
tokens=${TOKENS:-1e6}
pair=models/pysource
data=(--data corpus --tokens "$tokens" --length 320 --rows 8 --threads 1)
export OMP_NUM_THREADS=1
wanted() { [ -z "$only" ] || [[ " $only " == *" $1 "* ]]; }
only="$*"
study() {
    ! wanted "$1" || [ -f "$out/$1/study.json" ] ||
        "$bin"/glidecape study "${target:-$pair/target}" "${data[@]}" --output "$out/$1" --prompts 24 "${@:2}"
}
bench() {
    "$bin"/glidecape bench --suite own,stdlib:60 --prompt-tokens 128 --max-new-tokens 64 --limit "${LIMIT:-16}" --looping 0 --repeats 1 --watch 0 \
        --peers "" --temperature "$1" --threads 1 "${@:2}"
}

# What the draft sees of its target: seeds as far as there is time.
study sees --base max_lag:6,glimpse:off,read:last,window:0 --factor cross --row joined=glimpse:on --row alone=glimpse:on,kind:glide-no-cross \
    --seeds "${SEEDS:-0,1,2}" &
# How it learns.
study learns --base max_lag:6,glimpse:off,read:last,window:0 --factor loss --factor lags --factor max-lag &
# What it is made of.
study made --base max_lag:6,glimpse:off,read:last,window:0 --factor layers --factor width --factor norm --factor embedding --row window-64=window:64 \
    --factor draft-vocab &
# Where it looks.
study reads --base max_lag:6,glimpse:off,read:last,window:0 --factor read --row read-three-quarters=read:5 --row read-5+7=read:5+7 &
wait

# Independent drafts, a small one and a large one.
study lms --base kind:lm,width:0.25 --row large=kind:lm,width:1,layers:4 &
# A draft trained beside its target, of 4 M parameters, and one trained afterwards.
if wanted beside; then
    [ -f "$out/small/model.safetensors" ] || "$bin"/glidecape train-target "${data[@]}" --output "$out/small" --layers 4 --width 256 \
        --ffn 704 --heads 4 --kv-heads 4 --long-share 0 --with-draft --draft-recipe max_lag:6,muon:true
fi
target=$out/small study after --base max_lag:6 --factor cross
if wanted beside; then
    for temperature in 0 1; do
        bench $temperature "$out/small" --draft "beside=$out/small/draft" --draft "after=$out/after/seed-0/baseline" \
            --methods plain,beside:glide,after:glide --output "$out/beside-t$temperature"
    done
fi
wait

# The shipped drafts on copies of their target: trained further on other code, and in 8 bits (where torchao is installed).
if wanted changed; then
    if [ -d "${SHARED:-../shared}/data/train" ]; then
        [ -f "$out/tuned/model.safetensors" ] || "$bin"/glidecape train-target --start-from $pair/target \
            --data "${SHARED:-../shared}/data/train/code_docstring.jsonl.gz" --output "$out/tuned" --tokens 3e5 --rate 1e-3 --length 320 --rows 8 \
            --long-share 0 --threads 1
    fi
    for temperature in 0 1; do
        for copy in full tuned int8; do
            where=$pair/target more=()
            [ $copy != tuned ] || where=$out/tuned
            [ $copy != int8 ] || more=(--quantize int8)
            [ -d "$where" ] && { [ $copy != int8 ] || "$bin"/python -c "import torchao"; } || continue
            bench $temperature "$where" --draft glide=$pair/glide-last --draft nocross=$pair/glide-no-cross --draft eagle=$pair/eagle \
                --methods plain,glide,nocross:glide,eagle+chain ${more[@]+"${more[@]}"} --output "$out/changed-$copy-t$temperature"
        done
    done
fi

# The defaults at 4 M tokens against what they replaced; and how acceptance grows, from 1 M to 16 M.
study top --tokens 4e6 --factor cross --factor norm --row read-last=read:last --row window-all=window:0 --row glimpse-on=glimpse:on \
    --seeds "${SEEDS:-0,1,2}" &
study few --tokens 1e6 --factor embedding --row adamw=muon:false --seeds 0 &
study more --tokens 16e6 --seeds 0 &
! wanted rule || wait
# Shared noise or the residual rule, with those three drafts.
if wanted rule; then
    for rule in noise residual; do
        "$bin"/glidecape bench $pair/target --draft "s0=$out/top/seed-0/baseline" --draft "s1=$out/top/seed-1/baseline" \
            --draft "s2=$out/top/seed-2/baseline" --methods plain,s0:glide,s1:glide,s2:glide,s0:glide+cape,s1:glide+cape,s2:glide+cape \
            --temperature 1 --sampling $rule --suite own,stdlib:60 --prompt-tokens 128 --max-new-tokens 96 --limit 16 --repeats 1 \
            --watch 0 --peers "" --threads 1 --output "$out/rule-$rule"
    done
fi
# Text of the corpus, or what the target makes of its openings.
if wanted text; then
    "$bin"/glidecape regenerate $pair/target --data corpus --output "$out/text/regenerated.jsonl" --limit 4000 --prompt-tokens 64 \
        --max-new-tokens 256 --batch 16 --threads 1
    for text in corpus "$out/text/regenerated.jsonl"; do
        name=$(basename "$text" .jsonl)
        [ -f "$out/text-$name/card.json" ] || "$bin"/glidecape train $pair/target --data "$text" --output "$out/text-$name" \
            --tokens "$tokens" --length 320 --rows 8 --optimizer muon --threads 1 --compile
    done
    for temperature in 0 1; do
        bench $temperature $pair/target --draft "corpus=$out/text-corpus" --draft "regenerated=$out/text-regenerated" \
            --methods plain,corpus:glide,regenerated:glide --output "$out/text-t$temperature"
    done
fi
wait

# Targets of about 4, 11 and 25 M parameters and as many layers, 2 M tokens each, the largest 3 M.
size() {
    wanted "size-$1" || return 0
    [ -f "$out/target-$1/model.safetensors" ] || "$bin"/glidecape train-target --data corpus --output "$out/target-$1" --layers 8 \
        --width "$2" --ffn "$3" --heads "$4" --kv-heads "$4" --tokens "${5:-2e6}" --length 512 --rows 8 --long-share 0 --threads 1
    target=$out/target-$1 study "size-$1" --factor cross
}
size 4m 192 528 3 &
size 11m 320 880 5 &
size 25m 512 1152 8 3e6 &
wait
