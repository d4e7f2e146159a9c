#!/usr/bin/env bash
# Rebuilds every embedded asset from the development data: bash examples/rebuild_assets.sh ../shared/data
# Steps whose output exists are skipped, and an interrupted training or hull goes on, so it can be run again until it is
# done. Times: wall clock of each step for the shipped files, one of two hyperthreads of one x86-64 core, other work beside.
set -euo pipefail
data=${1:?the folder with mp_20.csv.gz and the others}
work=build/assets
mkdir -p "$work"

# The training set (1.7 min)
[ -f "$work/train.h5" ] || python scripts/make_training_set.py "$data" "$work/train.h5"
for name in elements mpts_52 mixed_databases elasticity dielectric; do
    [ -f "$work/$name.h5" ] || cfrl data import "$data/$name.csv.gz" -o "$work/$name.h5"
done

# The structure types of its crystals (15 s)
python scripts/make_structure_types.py "$work/train.h5"

# The small generator: 20 epochs (60 min), 22 more from there with less dropout (68 min), and a tuning against overlaps (27 min)
train() { # NAME COMMAND OPTION...: a training in the folder NAME, or what is left of it
    local folder=$work/$1 command=$2 run
    shift 2
    mkdir -p "$folder"
    run=$(find "$folder" -maxdepth 2 -name "*-$command-*" | sort | tail -n 1)
    if [ -z "$run" ]; then
        (cd "$folder" && cfrl "$command" "$@")
    elif [ ! -f "$run/finished" ]; then
        (cd "$folder" && cfrl "$command" --resume "${run#"$folder"/}")
    fi
}
trained() { realpath "$work/$1"/runs/*; } # NAME: the run folder of a finished training
train first pretrain --dataset ../train.h5 --preset small --epochs 20 --lr 1.5e-3
train second pretrain --dataset ../train.h5 --preset small --epochs 22 --lr 1e-3 --dropout 0.1 --keep last \
    --init "$(trained first)"
train third finetune --reward contact --model "$(trained second)" --beta 0.5 --lr 6e-5 -n 256 --steps 150 \
    --algorithm ppo --epochs 2 --batch-size 64 --factors wyckoff,species,coords,lattice --hold "" --allow all \
    --diversity 0 --seed 1 --evaluate 0
cfrl model pack "$(trained third)" -o cfrl/assets/small.safetensors \
    --dataset "mp_20, mpts_52, elements, prototypes, mixed databases near the hull"

# The same, tuned for new compounds near the hull (52 min; it ends by the clock, so that no two are alike)
[ -f "$work/known.h5" ] || cfrl data import "$data"/{mp_20,mpts_52,mixed_databases}.csv.gz -o "$work/known.h5"
train fourth finetune --reward sun --model small --known ../known.h5 \
    --hull "$(realpath "$data/mp_energies.csv.gz")" --steps 1000 --time-limit 52 --evaluate 0
cfrl model pack "$(trained fourth)" -o cfrl/assets/stable.safetensors \
    --dataset "mp_20, mpts_52, elements, prototypes, mixed databases near the hull"

# The grown dataset: crystals of our own near the hull (2 cores: 4,000 to 9,000 an hour). The embedded one took six rounds, of which
# the third and fourth drew from the default as it was by then
[ -f "$work/grown.h5" ] || cfrl data grow -o "$work/grown.h5" --model stable --known "$work/known.h5" \
    --hull "$data/mp_energies.csv.gz" --lots 32 --balance 0.4 --substitute 0.3 --seed 11 -n 12000
python scripts/make_grown.py "$work/grown.h5"
python scripts/make_known.py "$work/train.h5" cfrl/assets/grown.h5 # what the generators learnt from

# The default generator, as two processes on two cores (torchrun --nproc-per-node 2 -m cfrl for cfrl) about three hours. The
# embedded weights came by a longer way, while the network was being found (cfrl/assets/default.md); this one has not been run
train fifth pretrain --dataset ../train.h5,grown --weights 1,1 --preset default --epochs 40 --lr 1.2e-3 --weight-decay 0.1 \
    --dropout 0.15 --exchange 0.6
train sixth pretrain --dataset ../train.h5,grown --weights 1,1 --preset default --epochs 3 --lr 2e-4 --warmup 50 --weight-decay 0.1 \
    --dropout 0.2 --keep last --init "$(trained fifth)"
cfrl model pack "$(trained sixth)" -o cfrl/assets/default.safetensors \
    --dataset "mp_20, mpts_52, elements, prototypes, mixed databases near the hull, grown"

# The reference hull, of all that there is: energies of 53,533 crystals (14 min), relaxation of 28,116 (71 min)
[ -f "$work/hull.h5" ] || cfrl data hull "$work"/{train,elements,mpts_52,mixed_databases,elasticity,dielectric}.h5 \
    -o "$work/hull.h5" --relax --fill "$data/mp_energies.csv.gz"
cp "$work/hull.h5" cfrl/assets/hull.h5

# The predictors (7 min)
python scripts/train_predictors.py --data "$data"
