#!/usr/bin/env bash
# Rebuilds every embedded asset from the development data: bash examples/rebuild_assets.sh ../shared/data
# Steps whose output exists are skipped, and an interrupted training goes on, so it can be run again until it is done.
set -euo pipefail
data=${1:?the folder with mp_20.csv.gz and the others}
work=build/assets
mkdir -p "$work"

[ -f "$work/train.h5" ] || python scripts/make_training_set.py "$data" "$work/train.h5"
for name in elements mpts_52 mixed_databases elasticity dielectric; do
    [ -f "$work/$name.h5" ] || cfrl data import "$data/$name.csv.gz" -o "$work/$name.h5"
done

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

# The reference hull, of all that there is (about 10 min)
[ -f "$work/hull.h5" ] || cfrl data hull "$work"/{train,elements,mpts_52,mixed_databases,elasticity,dielectric}.h5 \
    -o "$work/hull.h5"
cp "$work/hull.h5" cfrl/assets/hull.h5

# The predictors
python scripts/train_predictors.py --data "$data"
