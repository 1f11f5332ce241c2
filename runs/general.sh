#!/usr/bin/env bash
# The general target: another architecture than the shipped pair's (Qwen3's normalised queries and keys, grouped-query, windows),
# on chat, maths, SQL, code, summaries and German-English. Restartable: every step goes on where it stopped.
# Then its tables for docs/results-0.1.md. About two hours on four quiet cores. THREADS, MINUTES, DRAFT_TOKENS and SHARED (the folder that holds data/) may be set.
# Its rows have mixed licences, some non-commercial (runs/general_licences.json): the weights stay in runs/out/general.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
out=runs/out/general
shared=${SHARED:-../shared}/data
threads=${THREADS:-4}
minutes=${MINUTES:-65}
tokens=${DRAFT_TOKENS:-1.5e6}

# What the evaluation suites are about, and bytes at most where there is more than enough of a kind.
mix=(gsm8k spider text2sql_classic:1.5e6 wikisql:1.5e6 code_docstring:5e6
    alpaca_5k alpaca_eval_outputs:5e6 llamafactory_demo lima:1e6 gpteacher:1e6 oasst_valid self_instruct_human
    multi30k_de_en:3e6 tatoeba_de_en wmt_de_en t0_summarization:2e6 cnn_dailymail_small bbc_news_summary:1e6 dialogsum:5e5
    scitldr:1e6 t0_mixture:1e6 fairytale:1e6 medquad:2e6 codealpaca mbpp conala nl2bash:3e5 sgd_dialogues:1e6
    tinystories_small)
sources=()
for one in "${mix[@]}"; do
    name=${one%%:*}
    limit=${one#"$name"}
    sources+=(--source "$shared/train/$name.jsonl.gz$limit")
done

if [ ! -f "$out/corpus/sources.json" ]; then
    if [ ! -d "$shared/train" ]; then
        echo "no training rows at $shared/train: this recipe needs the shared data beside the repository; set SHARED to its folder," \
            "or give rows of your own to 'glidecape data chat'" >&2
        exit 2
    fi
    "$bin"/glidecape data chat --output "$out/corpus" --licences runs/general_licences.json "${sources[@]}"
fi
[ -f "$out/target/model.safetensors" ] || "$bin"/glidecape train-target --data "$out/corpus" --output "$out/target" \
    --architecture qwen3 --window 256 --layers 8 --kv-heads 2 --minutes "$minutes" --compile --threads "$threads" --save-every 120
# One thread each, side by side: single-threaded runs get further together than one with all threads.
draft() {
    [ -f "$out/$1/card.json" ] || "$bin"/glidecape train "$out/target" --data "$out/corpus" --output "$out/$1" \
        --tokens "$tokens" --length 320 --rows 8 --optimizer muon --threads 1 "${@:2}"
}
draft glide --kind glide --glimpse on --max-lag 6 &
draft glide-last --kind glide --read last --window 0 --max-lag 6 &
draft glide-no-cross --kind glide-no-cross --window 0 --max-lag 6 &
draft lm --kind lm --max-lag 6 &
wait
draft eagle --kind eagle

if [ ! -d "$shared/eval" ]; then
    echo "no suites at $shared/eval: the target and its drafts are in $out, without figures" >&2
    exit 2
fi
# Conversations end where the target ends them. SVIP's threshold is fitted on the first rows of Spec-Bench's categories.
suite=spec_bench:4-40,glide_gsm8k:40,glide_finance_alpaca:40,glide_spider:40,glide_code_search_net:40,glide_mt_bench:4-40
methods=plain,vanilla,lookup,nocross:glide,last:glide,glide,glide+cape,glide+svip,glide+cape+svip,eagle+chain,eagle@top=4@total=12
drafts=("$out/target" --threads "$threads")
for draft in glide=glide last=glide-last nocross=glide-no-cross vanilla=lm eagle=eagle; do
    drafts+=(--draft "${draft%%=*}=$out/${draft#*=}")
done
for temperature in 0 1; do
    "$bin"/glidecape bench "${drafts[@]}" --methods "$methods" --suite "$suite" --svip-fit spec_bench:1-3 \
        --suites "$shared/eval" --temperature $temperature --max-new-tokens 96 --draft-length 5 --cape-bins small \
        --limit "${LIMIT:-5}" --looping "${LOOPING:-1}" --repeats "${REPEATS:-3}" --watch 0 --peers transformers,transformers+draft \
        --output "$out/bench-t$temperature"
done
"$bin"/python runs/tables.py --by-category "$out/bench-t0" "$out/bench-t1" > "$out/tables.md"
"$bin"/glidecape measure svip "${drafts[@]}" --methods vanilla,glide,glide+cape,eagle@top=4@total=12 --lengths 1-6 --suite spec_bench:20 \
    --suites "$shared/eval" --prompt-tokens 0 --max-new-tokens 96 --limit 2 --output "$out/svip.json"
"$bin"/glidecape certify "$out/target" --draft "glide=$out/glide" --draft "vanilla=$out/lm"
