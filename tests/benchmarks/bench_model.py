"""Rates of training, log-probability and sampling.

    python tests/benchmarks/bench_model.py [PRESET ...] [--device cuda] [--json FILE]

On the crystals of ../shared/data/mp_20.csv.gz where there are any, else on the prototypes. Weights are random; space
groups are drawn as in the dataset.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cfrl.config import DataConfig, PretrainConfig
from cfrl.crystals.crystal import CrystalBatch
from cfrl.io.datasets import load_dataset
from cfrl.io.importing import read_files
from cfrl.model.sampler import sample
from cfrl.model.training import Trainer, epoch_batches
from cfrl.runs.devices import choose_device

MP_20 = Path(__file__).parents[3] / "shared" / "data" / "mp_20.csv.gz"


def crystals() -> CrystalBatch:
    return read_files([str(MP_20)], DataConfig()).crystals if MP_20.exists() else load_dataset("prototypes")


def seconds(work, device: torch.device) -> float:
    """Wall time of one call after a first that is not counted."""
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def rates(preset: str, data: CrystalBatch, batch_size: int, batches: int, device: torch.device) -> list[float]:
    trainer = Trainer(PretrainConfig(preset=preset, batch_size=batch_size, epochs=1000), data, data[:0], device)
    rows = epoch_batches(data.num_sites, batch_size, 0, 0)[:batches]
    count = sum(map(len, rows))

    def train() -> None:
        for batch in rows:
            trainer._train_step(batch)

    training = count / seconds(train, device)
    model, some = trainer.model.eval(), data[torch.cat(rows)]

    @torch.no_grad()
    def score() -> None:
        model.log_prob(some)

    scoring = count / seconds(score, device)
    n = 2048 if device.type == "cpu" else 8192
    sampling = n / seconds(lambda: sample(model, n, seed=0, keep_invalid=True), device)
    return [training, scoring, sampling]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", default=["alex-20", "small", "default"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--json", type=Path, help="crystals a second by preset: training, log-probability, sampling")
    arguments = parser.parse_args()
    device, data = choose_device(arguments.device), crystals()
    where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    table = Table("preset", "training", "log-probability", "sampling", title=f"crystals/s on {where}")
    told = {}
    for preset in arguments.presets:
        told[preset] = rates(preset, data, arguments.batch_size, arguments.batches, device)
        table.add_row(preset, *(f"{x:.0f}" for x in told[preset]))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(told))
