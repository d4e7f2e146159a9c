"""Rates of screening on this machine.

    python tests/benchmarks/bench_screen.py [--samples 10000] [--known 30000] [--stages 100]

1. Uniqueness and novelty: `--samples` crystals of mp_20 and mpts_52 (a third of them twice, rotated and slightly
   strained) against `--known` of the three Materials Project files, by the stage itself on all cores.
2. Minutes per stage for `--stages` sampled crystals.
"""

import argparse
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console

from cfrl.commands.screen import screen
from cfrl.config import ScreenConfig
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.fingerprint import fingerprints, group_by
from cfrl.io.datasets import load_dataset
from cfrl.model.sampler import sample
from cfrl.runs.engine import LocalEngine
from cfrl.runs.journal import Work
from cfrl.screening.stages import Group, match

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
FILES = ("mp_20", "mpts_52", "mixed_databases")


def matching(num_samples: int, num_known: int, cores: int) -> None:
    crystals = CrystalBatch.cat([load_dataset(DATA / f"{name}.csv.gz") for name in FILES])
    rng = np.random.default_rng(0)
    known = crystals[rng.permutation(len(crystals))[:num_known]]
    samples = crystals[rng.permutation(len(crystals))[: num_samples * 3 // 4]]
    samples = CrystalBatch.cat([samples, samples[: num_samples - len(samples)]])
    structures, others = samples.to_structures(), known.to_structures()
    for structure in structures[-num_samples // 4 :]:
        structure.apply_strain(rng.normal(scale=0.004, size=3))
    begin, processor = time.perf_counter(), _processor_time()
    rows = group_by(range(len(samples)), samples.formulas().__getitem__)
    known_rows = group_by(range(len(known)), known.formulas().__getitem__)
    prints, known_prints = fingerprints(samples), fingerprints(known)
    groups = {
        formula: Group(
            [structures[i] for i in members],
            [prints[i] for i in members],
            [others[i] for i in known_rows.get(formula, ())],
            [known_prints[i] for i in known_rows.get(formula, ())],
        )
        for formula, members in rows.items()
        if len(members) > 1 or formula in known_rows
    }
    with TemporaryDirectory() as folder, LocalEngine(cores) as engine:
        records = Work(Path(folder), engine, "", Console()).run("matching", match, groups, {}, 8).values()
    seconds, processor = time.perf_counter() - begin, _processor_time() - processor
    duplicates = sum(original is not None for record in records for original in record["duplicate_of"])
    novel = len(samples) - sum(hit is not None for record in records for hit in record["known"])
    print(f"{len(samples)} samples against {len(known)} known on {cores} cores: {seconds:.0f} s")
    print(f"{processor:.0f} s of processor time")
    print(f"duplicates {duplicates} (made: {num_samples // 4}), novel {novel}")


def _processor_time() -> float:
    """Of this process and those that it has started and that are done, seconds."""
    return sum(os.times()[:4])


def stages(n: int) -> None:
    from cfrl.io.storage import write_crystals
    from cfrl.model.files import load_model

    with TemporaryDirectory() as folder:
        path = Path(folder) / "samples.h5"
        write_crystals(path, sample(load_model(), n, seed=0))
        config = ScreenConfig(known=[str(DATA / "mp_20.csv.gz")], hull=str(DATA / "mp_energies.csv.gz"))
        screen(str(path), config, output=str(Path(folder) / "run"), console=Console(width=120))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--known", type=int, default=30_000)
    parser.add_argument("--stages", type=int, default=0)
    options = parser.parse_args()
    print(f"load of the machine: {os.getloadavg()[0]:.1f}")
    if options.samples:
        matching(options.samples, options.known, len(os.sched_getaffinity(0)))
    if options.stages:
        stages(options.stages)
