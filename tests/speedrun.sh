#!/usr/bin/env bash
# The yardstick of training: ASID x2 on two CPU cores, from nothing to 36.8 dB on Set5. Prints steps, and minutes of
# training without the tests.
#     bash tests/speedrun.sh DATA [options of src/main.py]
# DATA holds SR291 and benchmark/Set5. The run stops when the goal is reached; given again, the command continues one that
# was cut off. In the environment: GOAL in dB; OUT, the folder for the run (default: experiment); PYTHON.
set -euo pipefail
[ $# -gt 0 ] || { echo "Usage: speedrun.sh DATA [options of src/main.py]" >&2; exit 2; }
data=$1 root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
shift

recipe='--optimizer MUON --patch_size 64 --batch_size 8 --sampling area --lr 1.5e-3 --warmup 100 --weight_ema 0.995 --schedule cosine --decay_unit steps --epochs 9 --test_every 250'

goal=${GOAL:-36.8} out=${OUT:-$root/experiment} python=${PYTHON:-$root/.venv/bin/python}
run=$out/speedrun

# Says after how many steps and minutes the goal was reached; fails if it was not.
reached() {
    "$python" - "$run/metrics.jsonl" "$goal" <<'PYTHON'
import json, sys
from pathlib import Path

path, goal, seconds = Path(sys.argv[1]), float(sys.argv[2]), 0.0
for line in path.read_text().splitlines() if path.is_file() else ():
    record = json.loads(line)
    seconds += record['seconds']
    psnr = record['test']['Set5']['psnr'] or 0.0
    if psnr >= goal:
        print(f'Reached {goal:g} dB on Set5 ({psnr:.2f}): {record["step"]} steps, {seconds / 60:.1f} minutes')
        sys.exit(0)
sys.exit(1)
PYTHON
}

if reached; then exit; fi
what=(--load speedrun)
# shellcheck disable=SC2206  # the options are words on purpose
[ -e "$run/state.pt" ] || what=(--save speedrun --model ASID --scale 2 --data_train SR291 --data_test Set5 $recipe)
OMP_NUM_THREADS=2 "$python" "$root/src/main.py" "${what[@]}" --cpu --n_threads 0 --dir_data "$data" --save_dir "$out" \
    "$@" &
trap 'kill -TERM $! 2>/dev/null || true' INT TERM
while sleep 1 && kill -0 $! 2>/dev/null; do
    if reached >/dev/null; then
        kill -TERM $! 2>/dev/null || true # it saves, and ends
        break
    fi
done
wait $!
reached || { echo "$goal dB on Set5 not reached; see $run/log.txt." >&2; exit 1; }
