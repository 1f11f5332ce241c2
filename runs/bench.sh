#!/usr/bin/env bash
# `make bench`: the shipped pair on our own prompts and Python's own library, greedy and at T=1, about ten minutes on four
# cores. `make bench-all` (argument "all"): every suite, hours; LIMIT, LOOPING (prompts a category) and REPEATS make it shorter. The
# page is OUT/report.html; a stopped run goes on.
#
#   THREADS=4 OUT=runs/out/bench SUITES_DIR=../shared/data/eval PAIR=models/pysource runs/bench.sh [all]
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
pair=${PAIR:-models/pysource}
suites_dir=${SUITES_DIR:-../shared/data/eval}
commit=$(git describe --always --dirty --exclude='*' 2>/dev/null || echo local)

methods=plain,lookup,vanilla,nocross:glide,glide,glide+beam,glide+cape,glide+svip,glide+cape+svip,eagle+chain,eagle@top=4@total=12
# SVIP's threshold is fitted on cuts of the library that are not tested.
common=("$pair/target" --methods "$methods" --threads "${THREADS:-0}" --draft-length 4 --cape-bins small
    --svip-fit stdlib:1-40 --prompt-tokens 192)
for draft in glide=glide nocross=glide-no-cross vanilla=lm eagle=eagle; do
    common+=(--draft "${draft%%=*}=$pair/${draft#*=}")
done
suite=own,stdlib:41-300
size=(--limit 5 --looping 2 --repeats 2 --watch 2)
out=${OUT:-runs/out/bench}
if [ "${1:-}" = all ]; then
    out=${OUT:-runs/out/bench-all}
    size=(--limit "${LIMIT:-8}" --looping "${LOOPING:-4}" --repeats "${REPEATS:-3}" --watch 2)
    if [ -d "$suites_dir" ]; then
        suite=$suite,spec_bench,glide:80,humaneval,mt_bench,gsm8k:80
        common+=(--suites "$suites_dir")
    else
        echo "no evaluation sets at $suites_dir: only our own prompts and Python's library are measured" >&2
    fi
fi
for temperature in 0 1; do
    "$bin"/glidecape bench "${common[@]}" "${size[@]}" --suite "$suite" --temperature "$temperature" \
        --output "$out/$commit/t$temperature"
done
"$bin"/glidecape report "$out/$commit/t0" "$out/$commit/t1" --output "$out"
