#!/usr/bin/env bash
# Puts what the checks on a GPU need of the reference data into gpu_pack/, and with `train` training images into
# gpu_pack_train_1/ and gpu_pack_train_2/, for a machine that has this repository and nothing beside it. Git ignores
# them. Each of them travels with the repository, so that both together stay below MOST MiB.
#     bash tests/gpu/pack.sh [train]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
shared=${FRUGALSR_SHARED:-../shared} most=${MOST:-63}
mib=$((1 << 20))

size_of() { find "$@" -type f -printf '%s\n' | awk '{ sum += $1 } END { printf "%d", sum }'; }
say() { printf '%-20s %6.1f MiB, %d files\n' "$1" "$(awk "BEGIN { print $(size_of "$1") / $mib }")" "$(find "$1" -type f | wc -l)"; }

own=$(git ls-files -z --cached --others --exclude-standard | xargs -0 -r stat -c %s 2>/dev/null | awk '{ sum += $1 } END { print sum }')
room=$((most * mib - own))
[ "$room" -lt $((55 * mib)) ] || room=$((55 * mib))

if [ "${1:-}" != train ]; then
    rm -rf gpu_pack
    mkdir -p gpu_pack/reference/{golden,manifests} gpu_pack/benchmark/{Urban100,B100}/HR
    cp "$shared"/reference/{check,weights}.py gpu_pack/reference
    names=$(sed -n 's/^ "\([^"]*\)".*/\1/p' src/model/networks.json)
    for name in $names; do
        for scale in 2 3 4; do
            [ ! -e "$shared/reference/golden/${name}_x$scale.npz" ] || {
                cp "$shared/reference/golden/${name}_x$scale.npz" gpu_pack/reference/golden
                cp "$shared/reference/manifests/${name}_x$scale.json" gpu_pack/reference/manifests
            }
        done
    done
    cp -r "$shared/benchmark/Set5" gpu_pack/benchmark
    for image in Urban100/HR/img001.png Urban100/HR/img004.png B100/HR/101085.png; do
        cp "$shared/benchmark/$image" "gpu_pack/benchmark/${image%/*}"
    done
    chmod -R u+w gpu_pack
    say gpu_pack
else
    # SR291 and as many of W216 as there is room for, every second one and so on: neighbours are crops of one photograph.
    rm -rf gpu_pack_train_1 gpu_pack_train_2
    mkdir -p gpu_pack_train_1/HR gpu_pack_train_2/HR
    cp "$shared"/train/SR291/HR/* gpu_pack_train_1/HR
    left=("$((room - $(size_of gpu_pack_train_1)))" "$room")
    mapfile -t images < <(find "$shared/train/W216/HR" -type f | sort | awk '{ print (NR * 89) % 216, $0 }' | sort -n | cut -d ' ' -f 2-)
    for image in "${images[@]}"; do
        size=$(stat -c %s "$image")
        for i in 0 1; do
            if [ "$size" -lt "${left[i]}" ]; then
                cp "$image" "gpu_pack_train_$((i + 1))/HR"
                left[i]=$((left[i] - size))
                break
            fi
        done
    done
    chmod -R u+w gpu_pack_train_1 gpu_pack_train_2
    say gpu_pack_train_1
    say gpu_pack_train_2
fi
printf 'The repository itself has %.1f MiB; what is carried with it may have %.1f MiB.\n' \
    "$(awk "BEGIN { print $own / $mib }")" "$(awk "BEGIN { print $room / $mib }")"
