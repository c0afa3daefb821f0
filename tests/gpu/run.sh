#!/usr/bin/env bash
# Everything that needs a CUDA device: tests, what fits, the verification grid, seconds per step, profiles.
# Run from the repository root: tests/gpu/run.sh [--dry-run] [FOLDER [PART...]]
# FOLDER is profiles/ if not given. Parts: tests fits grid seconds profiles; all but profiles if none is named.
# --dry-run takes small models on the CPU through grid and profiles, in a minute or two.
# A part that fails or runs out of time does not stop the others; the exit code says whether one did. The grid goes
# on where it ended when it is run again; of it, what is missing is measured.
set -u

dry=
[ "${1:-}" = --dry-run ] && dry=1 && shift
out=${1:-profiles}
[ $# -gt 0 ] && shift
python=${PYTHON:-python}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" KINETO_LOG_LEVEL=9 TOKENIZERS_PARALLELISM=false
failed=()
mkdir -p "$out"

if [ -n "$dry" ]; then
    device=cpu kind=cpu
    parts=(grid profiles)
else
    device=$("$python" -c '
import re, torch
print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))') || {
        echo "No CUDA device can be used." >&2
        exit 2
    }
    kind=cuda
    parts=(tests fits grid seconds)
fi
[ $# -gt 0 ] && parts=("$@")
echo "Device: $device"

part() { # part NAME SECONDS COMMAND...: an interrupted profile or grid still has written what it has
    local name=$1 limit=$2 begin=$SECONDS
    shift 2
    echo "== $name"
    timeout --signal=INT --kill-after=5 "$limit" "$@" || failed+=("$name")
    echo "== $name: $((SECONDS - begin)) s"
}

profile() { # profile NAME SECONDS CHECKPOINT MODEL OPTIONS...
    local name=$1 limit=$2 checkpoint=$3 model=$4 groupings=(--grouping all-layer --grouping best:4)
    shift 4
    [ "$checkpoint" = blocks ] && groupings+=(--grouping layer-wise)
    part "$name, checkpoint $checkpoint" "$limit" "$python" -m groupsearch profile "$model" "$@" \
        "${groupings[@]}" --device "$kind" --verify measure --checkpoint "$checkpoint" \
        --output "$out/$name-$device-checkpoint-$checkpoint.json" --force
}

profiles() {
    if [ -n "$dry" ]; then
        profile digits-vit 120 none digits-vit --batch-size 16 --setting blocks=2
        return
    fi
    for checkpoint in blocks none; do
        limit=$([ "$checkpoint" = blocks ] && echo 60 || echo 40)
        profile hf-gpt2-b16-t512 "$limit" "$checkpoint" hf:gpt2 --batch-size 16 --setting sequence_length=512
        profile hf-roberta-base-b32-t256 "$limit" "$checkpoint" hf:roberta-base --batch-size 32 \
            --setting sequence_length=256
        profile hf-vit-base-b64 "$limit" "$checkpoint" hf:google/vit-base-patch16-224 --batch-size 64
    done
}

grid() { # of several parts it has what the others leave of nine and a half minutes; alone, nine minutes
    local limit=290 options=(--device cuda --fresh) file=grid-$device
    case "${PYTORCH_ALLOC_CONF:-}${PYTORCH_CUDA_ALLOC_CONF:-}" in
    *expandable_segments:True*) file+=-expandable ;; # other blocks, other numbers
    esac
    [ ${#parts[@]} -eq 1 ] && limit=540
    [ -n "$dry" ] && limit=540 && options=(--device cpu --small --models gpt2 digits-cnn --random 1)
    part grid "$limit" "$python" -m tests.gpu.grid "$out/$file.json" "${options[@]}" --seconds $((limit - 20))
}

for name in "${parts[@]}"; do
    case $name in
    tests) part tests 170 "$python" -m pytest tests/gpu -m gpu --ignore=tests/gpu/test_fit.py -q -rA \
        --durations=10 -p no:cacheprovider ;;
    fits) part "what fits" 50 "$python" -m pytest tests/gpu/test_fit.py -m gpu -n 0 -q -rA --durations=10 \
        -p no:cacheprovider ;;
    grid) grid ;;
    seconds) part "seconds per step" 45 "$python" -m tests.benchmarks.bench_step --device cuda \
        --output "$out/step-$device.json" ;;
    profiles) profiles ;;
    *)
        echo "Expected parts among tests, fits, grid, seconds and profiles, found $name." >&2
        exit 2
        ;;
    esac
done

if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "All parts done; documents are in $out."
