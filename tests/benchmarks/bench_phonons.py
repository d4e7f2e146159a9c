"""Phonons and elastic tensors of candidates: minutes, and how many are stable.

    python tests/benchmarks/bench_phonons.py [-n 100] [--phonons 10] [--supercell 10] [--follow] [--dataset prototypes]

Draws `-n` crystals of the embedded model (known formulas and unbalanced charges drawn anew), or takes real ones of a
dataset, screens them, and asks the first candidates. CPU minutes are given beside the clock, since other work on the
machine stretches only the latter.
"""

import argparse
import json
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console

from cfrl.commands.screen import screen
from cfrl.config import ScreenConfig
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.known import KnownFormulas
from cfrl.crystals.refusal import REFUSED, Refusal
from cfrl.io.datasets import load_dataset
from cfrl.io.storage import write_crystals
from cfrl.model.files import load_model
from cfrl.model.sampler import sample
from cfrl.tables import read_csv


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", type=int, default=100, help="crystals drawn")
    parser.add_argument("--phonons", type=int, default=10, help="candidates asked")
    parser.add_argument("--supercell", type=float, default=10.0, help="angstrom")
    parser.add_argument("--follow", action="store_true")
    parser.add_argument("--dataset", help="crystals of this one in place of draws")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        path, run = Path(folder) / "drawn.h5", Path(folder) / "run"
        write_crystals(path, real(args.dataset, args.n) if args.dataset else drawn(args.n))
        config = ScreenConfig(workers=args.workers, report=False)
        screen(str(path), config, output=str(run), console=Console(width=120))
        for name, more in {
            "elastic": {"elastic": True},
            "phonons": {"phonons": args.phonons, "supercell": args.supercell},
            "phonons, followed": {"phonons": args.phonons, "supercell": args.supercell, "follow": True},
        }.items():
            if "followed" not in name or args.follow:
                measure(name, run, ScreenConfig(workers=args.workers, report=False, **more))


def drawn(n: int) -> CrystalBatch:
    return sample(load_model(), n, seed=0, wanted=Refusal(REFUSED, KnownFormulas.embedded()))


def real(dataset: str, n: int) -> CrystalBatch:
    crystals = load_dataset(dataset)
    return crystals[np.random.default_rng(0).permutation(len(crystals))[:n]]


def measure(name: str, run: Path, config: ScreenConfig) -> None:
    """The screening goes on with more to ask: only that is computed."""
    clock, cpu = time.perf_counter(), os.times()
    screen(None, config, resume=run)
    clock, now = time.perf_counter() - clock, os.times()
    used = now.user + now.children_user - cpu.user - cpu.children_user
    table = {key: np.array(column) for key, column in read_csv(run / "table.csv").items()}
    column = "mechanically_stable" if name == "elastic" else "dynamically_stable"
    asked = np.isfinite(table[column].astype(float))
    status = table["elastic_status" if name == "elastic" else "phonon_status"]
    print(
        f"{name}: {clock / 60:.1f} minutes by the clock, {used / 60:.1f} of CPU; {asked.sum()} crystals asked,", end=" "
    )
    print(f"stable {(table[column] == 1).sum()}; said: {[s for s in status if isinstance(s, str) and s]}", flush=True)
    for row in np.flatnonzero(asked):
        low = table["lowest_stiffness" if name == "elastic" else "lowest_frequency"][row]
        print(f"    {table['formula'][row]:16} no. {table['space_group'][row]:<5.0f} {low:8.2f}")
    if followed := json.loads((run / "summary.json").read_text())["followed"]:
        print(f"    {followed}")


if __name__ == "__main__":
    main()
