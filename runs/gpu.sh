#!/usr/bin/env bash
# What to measure when a GPU is at hand, in one go, the most valuable first; a table comes last. Step `correct` passed on an H200 in
# float32; NO OTHER STEP HAS RUN ON A GPU AS IT IS HERE (dev/LOG.md, 27 November, fourth and fifth session).
#
#   runs/gpu.sh                        all steps, about 25 minutes
#   runs/gpu.sh correct widened        only these; STEPS below has their names
#   DEVICE=cpu TOY=1 runs/gpu.sh       every command at toy size, to try the script
#   DRY_RUN=1 runs/gpu.sh              print the commands
#
# Results go to OUT as JSON. A step that fails is named in the end, and the others go on. PYTHON has PyTorch and this package's
# other requirements; the package itself is taken from src, so nothing must be installed. LIMIT_S ends a command.
# The widened pair is the small pair's function in a large shape: its cost is that of the shape, its acceptance the small pair's,
# and a good part of its weights are zeros, which draw less power.
set -uo pipefail
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda}
out=${OUT:-runs/out/gpu}
python=${PYTHON:-python3}
STEPS="correct train widened limit launches scale"
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
steps=${*:-$STEPS}
failed=()

run() {
    if [ -n "${DRY_RUN:-}" ]; then
        printf '%q ' "$@" && echo
        return
    fi
    echo "$ $*" >&2
    timeout "${LIMIT_S:-600}" "$@" || failed+=("$*")
}
glidecape() { run "$python" -m glidecape "$@"; }
wanted() { [[ " $steps " == *" $1 "* ]]; }
drafts() { # of the pair in folder $1: options of bench and certify
    echo "--draft glide=$1/glide --draft vanilla=$1/lm --draft eagle=$1/eagle"
}
bench() {
    # shellcheck disable=SC2046
    glidecape bench "$1/target" $(drafts "$1") --device "$device" --prompt-tokens 192 --looping 0 --watch 0 "${size[@]}" "${@:2}"
}

shipped=models/pysource
trained=$out/ship
large=$out/large
shape=(--shape 7b)
minutes=4 tokens=2e7 size=(--suite own,stdlib:41-300 --limit 4 --repeats 2)
batches="1 4 16 64" contexts="512 4096 7936"
cells=(--nodes 1,2,4,8,16,32,64 --batch 1,4,16,64 --context 512,2048,4096,8192)
if [ -n "${TOY:-}" ]; then
    shape=(--shape 300m --width 768 --layers 9 --heads 12 --kv-heads 12 --ffn 1024)
    minutes=0.2 tokens=5e3 size=(--suite stdlib:8 --limit 1 --repeats 1 --max-new-tokens 16)
    batches="1 2" contexts="256"
    cells=(--nodes 1,2 --batch 1,2 --context 256,512 --seconds 0.01)
fi
[ -n "${DRY_RUN:-}" ] || mkdir -p "$out"

# 1. Every method emits plain decoding's tokens, in both precisions, greedily and with a seed.
if wanted correct; then
    for dtype in float32 bfloat16; do
        for temperature in 0 1; do
            # shellcheck disable=SC2046
            glidecape certify $shipped/target $(drafts $shipped) --device "$device" --dtype $dtype --temperature $temperature \
                --max-new-tokens 64 --output "$out/certify-$dtype-t$temperature.json" --json
        done
    done
fi

# 2. A better pair to ship, of the Python sources on this machine: a target, and drafts on equal tokens. It comes back in pieces.
if wanted train; then
    glidecape data pysource --output "$out/corpus" --hold-out rich,networkx
    glidecape train-target --data "$out/corpus" --output "$trained/target" --layers 8 --minutes $minutes --device "$device"
    for draft in glide glide-no-cross eagle lm; do
        glidecape train "$trained/target" --data "$out/corpus" --output "$trained/$draft" --kind $draft --tokens $tokens --length 320 \
            --rows 32 --optimizer muon --device "$device"
    done
    if [ -f "$trained/lm/model.safetensors" ]; then
        for temperature in 0 1; do
            bench "$trained" --methods plain,vanilla,glide,eagle+chain --temperature $temperature --output "$out/trained-t$temperature"
        done
        tar -c --exclude training.pt -C "$out" ship | gzip | split -b 15m - "$out/ship.tar.gz."
    fi
fi

# 3. A pair in Llama-7B's shape: the better one, if it is there.
pair=$shipped
[ ! -f "$trained/lm/model.safetensors" ] || pair=$trained
if wanted widened || wanted limit; then
    [ -d "$large" ] || run "$python" runs/widen.py "$large" "${shape[@]}" --target "$pair/target" --draft "glide=$pair/glide" \
        --draft "eagle=$pair/eagle" --draft "lm=$pair/lm"
fi
if wanted widened; then
    for temperature in 0 1; do
        bench "$large" --dtype bfloat16 --temperature $temperature --peers transformers,transformers+lookup \
            --methods plain,lookup,vanilla,glide,glide+cape,glide+cape+svip,glide+auto,eagle@top=4@total=12 --cape-bins paper --output "$out/widened-t$temperature"
    done
fi

# 4. How far a forward is from the time that reading its bytes takes.
if wanted limit; then
    for model in "$pair" "$large"; do
        run "$python" runs/curves.py --target "$model/target" --device "$device" --dtype bfloat16 --compile on "${cells[@]}" \
            --output "$out/curves-$(basename "$model").json"
    done
fi

# 5. Launches and waits of a round.
if wanted launches; then
    run "$python" runs/launches.py --target "$pair/target" --draft "$pair/glide" --device "$device" --compile on --method plain --method glide \
        --method glide+cape+svip --output "$out/launches.json"
fi

# 6. Batches and contexts; a cell that does not fit the memory fails, and is named.
if wanted scale; then
    for batch in $batches; do
        for context in $contexts; do
            bench "$pair" --dtype bfloat16 --batch "$batch" --limit "$batch" --context "$context" --methods plain,glide,glide+cape+svip,glide+auto --cape-bins paper --peers "" \
                --output "$out/scale-$batch-$context"
        done
    done
fi

[ -z "${DRY_RUN:-}" ] || exit 0
rm -rf "$large"
for folder in "$out"/trained-t* "$out"/widened-t* "$out"/scale-*; do
    [ ! -f "$folder/summary.json" ] || "$python" runs/tables.py "$folder"
done | tee "$out/tables.md"
for command in ${failed[@]+"${failed[@]}"}; do echo "FAILED: $command"; done
[ ${#failed[@]} -eq 0 ]
