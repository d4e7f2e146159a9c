#!/usr/bin/env bash
# Rebuilds every embedded asset from the development data: bash examples/rebuild_assets.sh ../shared/data
# Steps whose output exists are skipped, and an interrupted training goes on, so it can be run again until it is done.
set -euo pipefail
data=${1:?the folder with mp_20.csv.gz and the others}
work=build/assets
mkdir -p "$work"

[ -f "$work/train.h5" ] || python scripts/make_training_set.py "$data" "$work/train.h5"
[ -f "$work/elements.h5" ] || cfrl data import "$data/elements.csv.gz" -o "$work/elements.h5"

# The generator (20 epochs: about 1 h on 2 cores)
run=$(ls -d "$work"/runs/*-pretrain-train 2>/dev/null | tail -n 1 || true)
if [ -z "$run" ]; then
    (cd "$work" && cfrl pretrain --dataset train.h5 --epochs 20 --lr 1.5e-3)
elif [ ! -f "$run/finished" ]; then
    cfrl pretrain --resume "$run"
fi
run=$(ls -d "$work"/runs/*-pretrain-train | tail -n 1)
cfrl model pack "$run" -o cfrl/assets/default.safetensors \
    --dataset "mp_20, mpts_52, elements, prototypes, mixed databases near the hull"

# The reference hull
[ -f "$work/hull.h5" ] || cfrl data hull "$work/train.h5" "$work/elements.h5" -o "$work/hull.h5"
cp "$work/hull.h5" cfrl/assets/hull.h5

# The predictors
python scripts/train_predictors.py --data "$data"
