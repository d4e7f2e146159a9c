"""Hull distances per second: 1,000 compositions against 25,000 and 133,000 Materials Project phases."""

import sys
import time
from pathlib import Path

import numpy as np

from cfrl.crystals.compositions import fractions
from cfrl.stability.hull import ReferenceHull

path = Path(__file__).resolve().parents[3] / "shared" / "data" / "mp_energies.csv.gz"
if not path.is_file():
    sys.exit("needs mp_energies.csv.gz in the shared data folder beside the checkout")

start = time.perf_counter()
full = ReferenceHull.load(path, energy_scale="mp2020")
print(f"reading {len(full):,} phases: {time.perf_counter() - start:.1f} s\n")

rng = np.random.default_rng(0)
rows = rng.permutation(len(full))
queries = rows[:1000]
amounts, energies = full._dense()[queries], full.energies[queries]
print(f"{'references':>10} {'systems':>8} {'per CPU second':>14}")
for size in (25_000, len(full)):
    hull = ReferenceHull(full.numbers[rows[:size]], full.fractions[rows[:size]], full.energies[rows[:size]])
    start = time.process_time()
    hull.e_above_hull(amounts, energies)
    seconds = time.process_time() - start
    systems = len({tuple(np.nonzero(a)[0]) for a in fractions(amounts)[0]})
    print(f"{size:>10,} {systems:>8} {1000 / seconds:>14,.0f}")
