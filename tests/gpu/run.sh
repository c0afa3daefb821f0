#!/usr/bin/env bash
# Everything that a CUDA device has to answer, in parts of known length; see README.md beside this file.
# Run from the repository root: tests/gpu/run.sh [--dry-run] [FOLDER [PART...]]
# FOLDER is profiles/ if not given. All parts in this order if none is named, but for profiles:
#   checks grid expandable half seconds slack more profiles
# Every part writes as it goes and goes on where it ended when it is run again. One that fails or runs out of time
# does not stop the others; the exit code says whether one failed. --dry-run takes small models on the CPU through the
# whole order, in a minute or two. PYTHON names the interpreter, python3 if not set.
set -u

dry=
[ "${1:-}" = --dry-run ] && dry=1 && shift
out=${1:-profiles}
[ $# -gt 0 ] && shift
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" KINETO_LOG_LEVEL=9 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
failed=()
mkdir -p "$out"

if [ -n "$dry" ]; then
    device=cpu kind=cpu
else
    kind=cuda
    device=$("$python" -c '
import re, torch
print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))') || {
        echo "No CUDA device can be used by $python." >&2
        exit 2
    }
fi
parts=(checks grid expandable half seconds slack more)
[ $# -gt 0 ] && parts=("$@")
echo "Device: $device; documents go to $out."

part() { # part NAME SECONDS MODULE OUTPUT ARGUMENTS...
    local name=$1 limit=$2 module=$3 file=$out/$4 begin=$SECONDS
    shift 4
    echo "== $name, $limit s at most"
    timeout --signal=INT --kill-after=5 "$limit" "$python" -W default -m "$module" "$file" --device "$kind" "$@" ||
        failed+=("$name")
    echo "== $name: $((SECONDS - begin)) s, $file"
}

timed() { # timed NAME SECONDS AUTOCAST MODELS...: the benchmark takes its document by name
    local name=$1 limit=$2 autocast=$3 begin=$SECONDS
    shift 3
    echo "== $name, $limit s at most"
    timeout --signal=INT --kill-after=5 "$limit" "$python" -W default -m benchmarks.bench_step \
        --output "$out/step-$device.json" --device "$kind" --autocast "$autocast" --models "$@" \
        --rounds "$([ -n "$dry" ] && echo 1 || echo 10)" || failed+=("$name")
    echo "== $name: $((SECONDS - begin)) s, $out/step-$device.json"
}

profiles() {
    local model
    for model in hf:gpt2 hf:google/vit-base-patch16-224; do
        echo "== profile of $model, 60 s at most"
        timeout --signal=INT --kill-after=5 60 "$python" -m groupsearch profile "$model" --batch-size 16 \
            --grouping all-layer --grouping best:4 --device "$kind" --verify measure --checkpoint blocks \
            --output "$out/$(basename "$model")-$device-checkpoint-blocks.json" --force || failed+=("profile of $model")
    done
}

run() { # the parts on a card
    case $1 in
    checks) part checks 125 tests.gpu.checks "checks-$device.jsonl" --seconds 110 ;;
    grid) part grid 390 tests.gpu.grid "grid-$device.json" --seconds 365 --fresh --random 2 \
        --models "GPT-2 small" "ViT-B/16" "ResNet-50 with GroupNorm" ;;
    expandable) PYTORCH_ALLOC_CONF=expandable_segments:True PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True part \
        expandable 345 tests.gpu.grid "grid-$device-expandable.json" --seconds 320 --random 2 \
        --models "GPT-2 small" "ViT-B/16" "ResNet-50 with GroupNorm" ;;
    half) part half 165 tests.gpu.grid "grid-$device.json" --seconds 145 --random 0 --autocast bfloat16 \
        --models "GPT-2 small" "ViT-B/16" ;;
    seconds)
        timed "seconds, float32" 75 none hf:gpt2 hf:google/vit-base-patch16-224
        timed "seconds, bfloat16" 75 bfloat16 hf:gpt2 hf:google/vit-base-patch16-224
        ;;
    slack) PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True part \
        slack 200 tests.gpu.slack "slack-$device.jsonl" --seconds 180 ;;
    more) part more 450 tests.gpu.grid "grid-$device.json" --seconds 425 --random 2 \
        --models "Llama 3.2 1B" "T5 base" "Whisper small encoder" "RoBERTa base" ;;
    profiles) profiles ;;
    esac
}

rehearse() { # the same order with small models on the CPU
    case $1 in
    checks) part checks 150 tests.gpu.checks "checks-$device.jsonl" \
        --only noise deviation precision storages "sums of tied" "one step of training, checkpoint n" ;;
    grid) part grid 150 tests.gpu.grid "grid-$device.json" --small --random 0 --models digits-cnn --seconds 4 ;;
    expandable) PYTORCH_ALLOC_CONF=expandable_segments:True part \
        expandable 150 tests.gpu.grid "grid-$device-expandable.json" --small --random 0 --models gpt2 --seconds 1 ;;
    half) part half 150 tests.gpu.grid "grid-$device.json" --small --random 0 --autocast bfloat16 --models vit \
        --seconds 1 ;;
    seconds) timed seconds 150 none digits-vit ;;
    slack) part slack 150 tests.gpu.slack "slack-$device.jsonl" --small --memory 3MiB ;;
    more) part more 150 tests.gpu.grid "grid-$device.json" --small --random 0 --models vit --seconds 1 ;;
    profiles) profiles ;;
    esac
}

for name in "${parts[@]}"; do
    case $name in
    checks | grid | expandable | half | seconds | slack | more | profiles) ;;
    *)
        echo "Expected parts among checks, grid, expandable, half, seconds, slack, more and profiles, found $name." >&2
        exit 2
        ;;
    esac
done
for name in "${parts[@]}"; do
    if [ -n "$dry" ]; then rehearse "$name"; else run "$name"; fi
done

if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "All parts done; documents are in $out."
