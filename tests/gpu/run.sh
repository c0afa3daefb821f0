#!/usr/bin/env bash
# Everything that needs a CUDA device, in one go: tests, the verification grid, seconds per step.
# Run from the repository root: tests/gpu/run.sh [FOLDER], by default profiles/.
# A part that fails or runs out of time does not stop the others; the exit code says whether one did.
set -u

out=${1:-profiles}
python=${PYTHON:-python}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" KINETO_LOG_LEVEL=9 TOKENIZERS_PARALLELISM=false
failed=()
mkdir -p "$out"

device=$("$python" -c '
import re, torch
print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))') || {
    echo "No CUDA device can be used." >&2
    exit 2
}
echo "Device: $device"

part() { # part NAME SECONDS COMMAND...: an interrupted profile still writes what it has
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
        "${groupings[@]}" --device cuda --verify measure --checkpoint "$checkpoint" \
        --output "$out/$name-$device-checkpoint-$checkpoint.json" --force
}

part tests 170 "$python" -m pytest tests/gpu -m gpu --ignore=tests/gpu/test_fit.py -q -rA --durations=10 -p no:cacheprovider
part "what fits" 50 "$python" -m pytest tests/gpu/test_fit.py -m gpu -n 0 -q -rA --durations=10 -p no:cacheprovider
for checkpoint in blocks none; do
    limit=$([ "$checkpoint" = blocks ] && echo 60 || echo 40)
    profile hf-gpt2-b16-t512 "$limit" "$checkpoint" hf:gpt2 --batch-size 16 --setting sequence_length=512
    profile hf-roberta-base-b32-t256 "$limit" "$checkpoint" hf:roberta-base --batch-size 32 --setting sequence_length=256
    profile hf-vit-base-b64 "$limit" "$checkpoint" hf:google/vit-base-patch16-224 --batch-size 64
done
part "seconds per step" 45 "$python" -m tests.benchmarks.bench_step --device cuda \
    --output "$out/step-$device.json"

if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "All parts done; documents are in $out."
