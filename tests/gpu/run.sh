#!/usr/bin/env bash
# What only a GPU can show, in steps: check (tests/gpu), speed (latency, training step, attention), train (a run). A
# step that fails or runs out of time does not keep the next one from running. OUT gets what all of them print as
# log.txt, and figures: at most eight files.
#     bash tests/gpu/run.sh OUT [--rehearse] [--train_seconds N] [check|speed|train ...]
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
root=$PWD

usage() {
    echo "Usage: run.sh OUT [--rehearse] [--train_seconds N] [check|speed|train ...]" >&2
    exit 2
}

out='' rehearse=0 train_seconds=${TRAIN_SECONDS:-240} steps=()
while [ $# -gt 0 ]; do
    case $1 in
        --rehearse) rehearse=1 ;;
        --train_seconds) [ $# -gt 1 ] || usage; train_seconds=$2; shift ;;
        check | speed | train) steps+=("$1") ;;
        -*) usage ;;
        *) [ -z "$out" ] || usage; out=$1 ;;
    esac
    shift
done
[ -n "$out" ] || usage
[ ${#steps[@]} -gt 0 ] || steps=(check speed train)
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2

python=${PYTHON:-}
if [ -z "$python" ]; then
    python=$root/.venv/bin/python
    "$python" -c 'import torch' 2>/dev/null || python=python3
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1 MPLCONFIGDIR=$work/matplotlib
limit_check=${CHECK_SECONDS:-180} limit_speed=${SPEED_SECONDS:-300}
if [ "$rehearse" = 1 ]; then
    export FRUGALSR_REHEARSE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    limit_check=${CHECK_SECONDS:-1500} limit_speed=${SPEED_SECONDS:-600}
fi

# Runs a command until the time of its step is up; then it and its children are ended, first in good order.
limited() {
    local left=$((deadline - SECONDS))
    [ "$left" -gt 0 ] || { echo "No time is left for: $*"; return 124; }
    timeout --signal=TERM --kill-after=10 "$left" "$@" </dev/null
}

# One process for each group of checks, side by side: each builds networks on the host for most of its time.
check() {
    local groups=('test_parity and outputs' 'test_parity and not outputs' 'not test_parity')
    local i one status=5 pids=() # 5: no test was selected
    [ "$rehearse" = 0 ] || groups=('test_parity or not test_parity')
    rm -f "$out/check.jsonl"
    for i in "${!groups[@]}"; do
        FRUGALSR_GPU_SECONDS=$limit_check FRUGALSR_GPU_JSON=$out/check.jsonl limited "$python" -m pytest tests/gpu \
            tests/model/ops/test_layer_norm.py tests/model/ops/triton/test_kept_attention.py \
            -k "(${groups[i]})${CHECK_ONLY:+ and ($CHECK_ONLY)}" -vv -s -rfEs --tb=short --durations=25 \
            -p no:cacheprovider --basetemp="$work/tests$i" >"$work/check$i.txt" 2>&1 &
        pids+=($!)
    done
    for i in "${!groups[@]}"; do
        wait "${pids[i]}"
        one=$?
        if [ "$one" = 0 ]; then
            [ "$status" != 5 ] || status=0
        elif [ "$one" != 5 ]; then
            status=$one
        fi
        cat "$work/check$i.txt"
    done
    return "$status"
}

speed() {
    local small=() status=0
    [ "$rehearse" = 0 ] || small=(--rehearse)
    export PYTHONPATH=$root/src
    # The last networks are the heavy ones: what has been measured until the time is up stays.
    limited "$python" tests/gpu/measure_latency.py "$out/latency.json" --seconds 200 "${small[@]}" || status=$?
    limited "$python" tests/gpu/measure_step.py "$out/step.json" "${small[@]}" || status=$?
    limited "$python" tests/gpu/measure_attention.py "$out/attention.json" "${small[@]}" || status=$?
    return "$status"
}

# Goes on from models/ASID_x2.pt with the images of pack.sh, and brings the run back: --load continues it elsewhere.
train() {
    local status file options=(--model ASID --scale 2 --pre_train ASID_x2.pt --data_train SR291+W216 --sampling area)
    options+=(--dir_data "$work/data" --data_test Set5 --patch_size 128 --batch_size 32 --amp bf16 --n_threads 12)
    options+=(--lr 5e-4 --warmup 300 --weight_ema 0.999 --epochs 1000 --test_every 1000 --max_time "$((train_seconds - 30))")
    mkdir -p "$work"/data/{SR291,W216}/HR "$work/data/benchmark"
    if [ "$rehearse" = 1 ]; then
        options=(--model EDSR-baseline --n_resblocks 1 --n_feats 8 --epochs 1 --test_every 2 --batch_size 2 --cpu)
        options+=(--patch_size 48 --data_train Sample --data_test Sample --dir_data "$work/data" --scale 4 --n_threads 0)
    else
        for file in gpu_pack_train_*/HR/*; do
            case $file in
                *.webp) ln -s "$root/$file" "$work/data/W216/HR" ;;
                *) ln -s "$root/$file" "$work/data/SR291/HR" ;;
            esac
        done
        cp -r gpu_pack/benchmark/Set5 "$work/data/benchmark"
    fi
    limited "$python" src/main.py "${options[@]}" --save_dir "$work" --save train
    status=$?
    tar -cf "$out/train.tar" -C "$work/train" state.pt model/model_latest.pt metrics.jsonl config.txt log.txt
    return $status
}

about='import sys, torch; cuda = torch.cuda.is_available()
print("Python", sys.version.split()[0], "torch", torch.__version__, torch.cuda.get_device_name() if cuda else "no GPU")'
{
    "$python" -c "$about" 2>&1 | tail -1
    nvidia-smi --query-gpu=driver_version,clocks.max.sm,power.limit,memory.total --format=csv,noheader 2>/dev/null
} | tee "$out/summary.txt"

# What the step at hand has printed.
printed() { tail -c +$((before + 1)) "$out/log.txt"; }

failed=0
rm -f "$out/log.txt"
for step in "${steps[@]}"; do
    limit=limit_$step start=$SECONDS
    [ "$step" != train ] || limit_train=$train_seconds
    deadline=$((SECONDS + ${!limit}))
    printf '\n##### %s\n' "$step" >>"$out/log.txt"
    before=$(stat -c %s "$out/log.txt")
    "$step" >>"$out/log.txt" 2>&1 # a file and no pipe, which a program left over would keep open
    status=$?
    [ "$status" = 0 ] || failed=1
    case $status in
        0) said='passed' ;;
        124 | 137) said="out of time (${!limit} s)" ;;
        *) said="failed with status $status" ;;
    esac
    {
        echo "$step: $said, $((SECONDS - start)) s"
        if [ "$step" = check ]; then
            for outcome in passed failed skipped; do
                echo "  $outcome: $(grep -c "\"what\": \"test\".*\"outcome\": \"$outcome\"" "$out/check.jsonl")"
            done
            printed | grep -aE '(passed|failed|skipped|deselected|error|no tests).* in [0-9.]+s' | tail -3 | tr -d =
            printed | grep -aE '^(FAILED|ERROR) ' | cut -c 1-300
        elif [ "$status" != 0 ]; then
            printed | tail -n 5 | cut -c 1-300
        fi
    } | tee -a "$out/summary.txt"
done
echo "Files in $out: $(cd "$out" && ls | tr '\n' ' ')" | tee -a "$out/summary.txt"
exit $failed
