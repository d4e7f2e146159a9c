"""How far crystals should be relaxed before they are scored: python tests/benchmarks/bench_relax_steps.py [-n 400]

Crystals of the embedded model; distances to the embedded hull after k evaluations against those of the relaxed
crystals (200 evaluations at most): rate, rank correlation, and whether both lie on the same side of 0.1 eV/atom.
"""

import argparse
import time

import numpy as np
from scipy.stats import spearmanr

import cfrl
from cfrl.potentials import load_potential
from cfrl.potentials.relax import relax
from cfrl.stability.hull import ReferenceHull

NEAR = 0.1  # eV/atom
STEPS = (0, 2, 3, 4, 5, 6, 200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=400)
    n = parser.parse_args().n
    crystals = cfrl.sample(cfrl.load_model(), n=n, seed=11)
    structures, potential, hull = crystals.to_structures(), load_potential("chgnet"), ReferenceHull.load()
    potential.compute(structures[:20])  # the first call compiles
    distance, rate = {}, {}
    for steps in STEPS:
        start = time.perf_counter()
        result = relax(structures, potential, steps=steps) if steps else potential.compute(structures)
        rate[steps] = n / (time.perf_counter() - start)
        distance[steps] = hull.e_above_hull(crystals, result.energy).e_above_hull
    end = distance[STEPS[-1]]
    print(f"{'evaluations':>11} {'per second':>10} {'below 0.1':>9} {'rank correlation':>16} {'same side':>9}")
    for steps, values in distance.items():
        both = np.isfinite(values) & np.isfinite(end)
        near, near_end = values[both] < NEAR, end[both] < NEAR
        correlation = spearmanr(values[both], end[both]).statistic
        print(f"{steps:11} {rate[steps]:10.1f} {near.mean():9.0%} {correlation:16.2f} {(near == near_end).mean():9.0%}")


if __name__ == "__main__":
    main()
