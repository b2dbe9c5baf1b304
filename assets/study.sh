#!/bin/sh
# Makes the runs of study.md, about two hours on two cores: `JOBS=2 sh assets/study.sh FOLDER`
#
# A line of the list is a number of seeds, counted from 0, and flags. A run lies in FOLDER/SEED/FLAGS
# and starts from the base of FOLDER/SEED/default. A command that was stopped continues.
set -eu
if [ $# -gt 1 ]; then                           # FOLDER SEED FLAGS...: a single run
    folder=$1 seed=$2
    shift 2
    out=$folder/$seed/${*:-default}
    [ ! -e "$out/comparison.png" ] || exit 0
    mkdir -p "$out"
    cp "$folder/$seed/default/base-"* "$out" 2> "$out/log.txt" || true
    [ ! -e "$out/checkpoint.pt" ] || set -- --resume
    echo "seed $seed $*"
    OMP_NUM_THREADS=1 python mask_grpo.py --device cpu --seed "$seed" --out "$out" "$@" \
        > "$out/log.txt" 2>&1
    exit
fi
while read -r seeds flags; do
    for seed in $(seq 0 $((seeds - 1))); do
        echo "$seed $flags"
    done
done << LIST | sed 's/ *$//' | xargs -L 1 -P "${JOBS:-1}" sh "$0" "$1"
8
5 --transition=p2
5 --transition=ar
5 --transition=p1_literal
3 --no-divide-by-std
3 --temperature=0
3 --temperature=0 --transition=p2
3 --filter-quantile=0 --updates=93
3 --beta=0.01
3 --beta=0.1
3 --score-steps=6 --reduction=first
3 --score-steps=6 --reduction=last
3 --score-steps=6
3 --score-steps=3
3 --steps=6
3 --inner-epochs=2
8 --group-size=4 --groups=24
3 --group-size=16 --groups=6
3 --lr=5e-4
3 --lr=4.5e-3
3 --updates=108
3 --reward=assets.hacking:recall --measure=correct
3 --reward=assets.hacking:recall --measure=correct --beta=0.1
3 --reward=assets.hacking:recall --measure=correct --beta=1
LIST
