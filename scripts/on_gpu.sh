#!/usr/bin/env bash
# All that a machine with a GPU is wanted for, in 40 minutes: bash scripts/on_gpu.sh RESULTS [WHEELS]
# Tests, rates, profiles, a pretraining and a tuning. A step that is in RESULTS is skipped, and one that is cut short goes on or begins
# anew, so that a machine lent for some minutes at a time gets through. WHEELS: a folder of packages that the machine
# lacks (pip download chgnet pymatgen moyopy ... --no-deps -d WHEELS); without chgnet what needs a potential is left out.
# At its end RESULTS/results.json: the device, and of each step its command, seconds and figures.
# DEVICE=cpu SCALE=small goes through it on a CPU in some minutes, to see that it runs.
set -euo pipefail
results=$(realpath -m "${1:?a folder for the results}") wheels=${2:-}
device=${DEVICE:-cuda}
if [ "${SCALE:-full}" = small ]; then batch=16 batches=2 relaxed=4 minutes=0.2 preset=default; else batch=512 batches=32 relaxed=1000 minutes=8 preset=alex-20; fi
mkdir -p "$results"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
[ -z "$wheels" ] || pip install -q --no-index --no-deps "$wheels"/*.whl
has() { python -c "import $1" 2>/dev/null; }

step() { # NAME COMMAND...: its output goes to NAME.txt, what became of it to NAME.step
    local name=$1 began=$SECONDS
    shift
    [ -f "$results/$name.step" ] && return
    echo "== $name: $*"
    if "$@" > "$results/$name.txt" 2>&1; then
        printf '%s\n%s\n' "$((SECONDS - began))" "$*" > "$results/$name.step"
    else
        tail -n 20 "$results/$name.txt"
        echo "== $name failed; run this again to try again" >&2
    fi
}
run_in() { # FOLDER ARGUMENTS...: a command of cfrl in a folder of its own, or what is left of it
    local folder=$results/$1
    mkdir -p "$folder/runs"
    shift
    if [ -n "$(ls "$folder/runs")" ]; then set -- "$1" --resume last; fi
    (cd "$folder" && timeout --signal INT "${minutes}m" python -m cfrl "$@") || [ $? -eq 124 ] # Ctrl-C after so many minutes
}
profile() { python - "$device" "$batch" <<'PY'
import sys

import torch
from torch.profiler import ProfilerActivity, profile

import cfrl
from cfrl.config import PretrainConfig
from cfrl.model.sampler import draw
from cfrl.model.training import Trainer

device, batch = torch.device(sys.argv[1]), int(sys.argv[2])
model = cfrl.load_model(device=device)
groups = torch.arange(1, 231, device=device).repeat(max(batch // 8, 1))
crystals = draw(model, groups)
trainer = Trainer(PretrainConfig(batch_size=batch, epochs=1), crystals.to("cpu"), crystals[:0].to("cpu"), device, init=model)
rows = torch.arange(batch)
works = {
    "drawing": lambda: draw(model, groups),
    "log-probability": lambda: model.log_prob(crystals),
    "training step": lambda: trainer._train_step(rows),
}
kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
for name, work in works.items():
    work()
    with profile(activities=kinds) as told:
        work()
    print(f"\n{name}\n", told.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=25))
PY
}

step tests python -m pytest -q -m gpu tests/test_gpu.py
step model python tests/benchmarks/bench_model.py --device "$device" --batch-size "$batch" --batches "$batches" --json "$results/model.json"
step roofline python tests/benchmarks/bench_roofline.py --draws "$batch" --batch-size "$batch"
step profile profile
if has chgnet; then
    step potentials python tests/benchmarks/bench_potentials.py --device "$device" --json "$results/potentials.json"
    step relax python tests/benchmarks/bench_relax.py -n "$relaxed" --own 0 --device "$device" --json "$results/relax.json"
    step finetune run_in finetune finetune --reward sun -n "$batch" --steps 100000 --device "$device" --evaluate 0 --no-plots
fi
step pretrain run_in pretrain pretrain --preset "$preset" --dataset prototypes --epochs 100000 --device "$device"

python - "$results" "$device" <<'PY'
import json
import sys
from pathlib import Path

import torch

folder, device = Path(sys.argv[1]), sys.argv[2]
told = {"device": torch.cuda.get_device_name() if device == "cuda" else device, "torch": torch.__version__, "steps": {}}
for path in sorted(folder.glob("*.step")):
    seconds, command = path.read_text().splitlines()
    figures = path.with_suffix(".json")
    known = json.loads(figures.read_text()) if figures.is_file() else None
    told["steps"][path.stem] = {"command": command, "seconds": int(seconds), "figures": known}
(folder / "results.json").write_text(json.dumps(told, indent=1))
print(f"{folder / 'results.json'}: {len(told['steps'])} steps")
PY
