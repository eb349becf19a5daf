#!/usr/bin/env bash
# bash demo.sh          score bicubic, then super-resolve sample photographs with the weights in models/
# bash demo.sh list     name the published commands
# bash demo.sh NAME     run one of them; what follows NAME is added to its options
# bash demo.sh league   train every light network for an hour and compare them (src/league.py, which has options)
set -euo pipefail
source "$(dirname "$0")/.ci/setup.sh"

names=() about=() options=()
add() {
    names+=("$1") about+=("$2") options+=("$3")
}

lcoan="--model LCoAN --n_resgroups 10 --n_resblocks 4 --reduction 1 --n_feats 128 --n_clusters 128 --window_size 384 \
--ema_decay 0.999 --res_scale 0.1 --rgb_range 1 --n_GPUs 1 --chop --save_results"
train_lcoan="$lcoan --n_threads 8 --save_models --lr 1e-4 --batch_size 16 --data_train DIV2K --data_range 1-800/1-5 \
--data_test Set5"
benchmarks="--test_only --data_test Set5+Set14+B100+Urban100+Manga109 --save_results"
four=${benchmarks/+Manga109/} # those of EDSR's package

add LCoAN_x2 "train LCoAN x2 on DIV2K, as published" \
    "$train_lcoan --scale 2 --patch_size 96 --epochs 1500 --decay 300-600-900-1200 --save LCoAN_x2"
add LCoAN_x4 "train LCoAN x4 from the x2 weights, as published" \
    "$train_lcoan --scale 4 --patch_size 192 --epochs 500 --decay 100-200-300-400 --save LCoAN_x4 --pre_train LCoAN_x2.pt"
# recipe NAME [SCALES]: train by the recipe of that name, from the weights that it starts from
recipe() {
    local scale
    for scale in ${2:-2 3 4}; do
        add "$1_x$scale" "train ${1%-finetune} x$scale by its recipe" "--template $1_x$scale"
    done
}
# weights NAME: its file in models/, with the suffix that it has there
weights() {
    local suffix
    for suffix in pt pth safetensors; do
        if [ -e "$root/models/$1.$suffix" ]; then break; fi
        suffix=pt
    done
    echo "$1.$suffix"
}
# tests NAME...: score weights by the test protocol of the recipe
tests() {
    local name scale
    for name in "$@"; do
        for scale in 2 3 4; do
            add "${name}_x${scale}_test" "score $name x$scale on the benchmarks, by its protocol" \
                "--template ${name}_x$scale $four --pre_train $(weights ${name}_x$scale)"
        done
    done
}
for scale in 2 3 4; do
    add LCoAN_x${scale}_test "score LCoAN x$scale on the benchmarks" \
        "$lcoan $benchmarks --scale $scale --save LCoAN_x${scale}_test --pre_train $(weights LCoAN_x$scale)"
done
recipe LCoAN 3
for net in EDSR-baseline EDSR RCAN NLSN ASID ASID-finetune ASIDd8 ASIDd8-finetune DLGSANet DLGSANet-light DLGSANet-tiny \
    OmniSR OmniSR-DF2K ATD ATD-light CATANet HiT-SRF PFT-light SwinIR-light ESC ESC-light ESC-FP IMDN PAN BSRN; do
    recipe $net
done
recipe ATD-finetune 2
tests EDSR-baseline EDSR RCAN NLSN ASID ASIDd8 DLGSANet DLGSANet-light DLGSANet-tiny ATD ATD-light CATANet HiT-SRF PFT-light \
    OmniSR SwinIR-light ESC ESC-light ESC-FP IMDN PAN BSRN
for scale in 2 3 4; do
    add Bicubic_x${scale}_test "score bicubic x$scale on the benchmarks" "--model Bicubic $four --scale $scale"
done
add costs 'print what every network costs, beside the published figures' '--costs --model all --scale 2+3+4'
add LCoAN-small_x2 "train the small LCoAN x2 on SR291 (ours)" "--template LCoAN-small_x2"
for scale in 2 4; do
    add ASID-photo_x$scale "train ASID x$scale for photographs, from the weights for clean images (ours)" "--template ASID-photo_x$scale"
done
add LCoAN-small_x4 "train the small LCoAN x4 from the x2 weights (ours)" "--template LCoAN-small_x4"

program() {
    set_up "$root/requirements.txt"
    "$root/.venv/bin/python" "$root/src/main.py" "$@"
}

case ${1-} in
'')
    echo '== Bicubic x4 on sample photographs'
    program --test_only --model Bicubic --data_test Sample --scale 4 --save demo_Bicubic_x4
    echo '== ASID x4, trained by this project (models/ASID_x4.md)'
    program --test_only --template ASID_x4 --pre_train "$root/models/ASID_x4.pt" --data_test Sample \
        --save_results --save demo_ASID_x4
    echo "Side by side: $root/experiment/demo_ASID_x4/comparison-Sample.png"
    echo "With sliders: $root/experiment/demo_ASID_x4/report.html"
    ;;
list)
    echo 'bash demo.sh NAME [options of src/main.py, such as --dir_data FOLDER]'
    for i in "${!names[@]}"; do printf '  %-24s %s\n' "${names[i]}" "${about[i]}"; done
    printf '  %-24s %s\n' league 'train every light network for an hour (--minutes) and compare them'
    ;;
league)
    set_up "$root/requirements.txt"
    "$root/.venv/bin/python" "$root/src/league.py" "${@:2}"
    ;;
*)
    for i in "${!names[@]}"; do
        if [ "${names[i]}" = "$1" ]; then
            # shellcheck disable=SC2086  # the options are words on purpose
            program ${options[i]} "${@:2}"
            exit
        fi
    done
    echo "Error: no command $1: bash demo.sh list names them." >&2
    exit 2
    ;;
esac
