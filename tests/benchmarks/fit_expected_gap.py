"""Fits `expected_gap` (lower_hull.py): how much a hull falls at crystals of the embedded model, once all is known.

    python tests/benchmarks/fit_expected_gap.py mp_energies.csv.gz DATASET... [-n 2000]

The little that is known: those phases of the full reference that are elements or whose composition a dataset has, near
their own hull. The gap between the two hulls is fitted by a / (x + b), x = known compounds for each pair of elements.
"""

import argparse
from itertools import pairwise

import numpy as np
from scipy.optimize import curve_fit

from cfrl.crystals.compositions import fractions
from cfrl.io.datasets import load_dataset
from cfrl.model.files import load_model
from cfrl.model.sampler import sample
from cfrl.stability.hull import ReferenceHull, _equally_many_elements, _sparse
from cfrl.stability.lower_hull import expected_gap

NEAR_HULL = 0.05  # eV/atom, as in the embedded reference
BINS = (0, 1, 2, 3, 5, 9, 17, 33, 10_000)  # known compounds

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("full")
parser.add_argument("datasets", nargs="+")
parser.add_argument("-n", type=int, default=2000)
given = parser.parse_args()

full = ReferenceHull.load(given.full)
covered = {row.tobytes() for name in given.datasets for row in fractions(load_dataset(name))[0].round(4)}
shares = full._dense()
known = (shares == 1).any(1) | np.array([row.tobytes() in covered for row in shares.round(4)])
little = full[known].near_hull(NEAR_HULL)
print(f"{known.sum():,} of {len(full):,} phases are covered, {len(little):,} of them near their hull")

crystals = sample(load_model(), given.n, seed=0)
nothing = np.zeros(len(crystals))
low, high = (hull.e_above_hull(crystals, nothing) for hull in (full, little))
shares = fractions(crystals)[0]
compounds, elements = np.zeros(len(crystals), dtype=int), (shares > 0).sum(1)
for rows in _equally_many_elements(shares):
    compounds[rows] = little._rivals(_sparse(shares[rows])[0])[1].count_compounds(len(rows))
pairs = elements * (elements - 1) / 2
usable = np.isfinite(low.e_above_hull) & np.isfinite(high.e_above_hull) & (elements > 1)
gap = (low.e_above_hull - high.e_above_hull)[usable]
pairs, elements, compounds = pairs[usable], elements[usable], compounds[usable]
print(f"{usable.sum()} crystals of more than one element; the gap is {gap.mean():.3f} eV/atom on average")

(a, b), _ = curve_fit(lambda x, a, b: a / (x + b), compounds / pairs, gap, p0=(0.1, 0.25))
print(f"fit: {a:.3f} / (x + {b:.3f})")
for k in sorted(set(elements.tolist())):
    for least, most in pairwise(BINS):
        inside = (elements == k) & (compounds >= least) & (compounds < most)
        if inside.sum() >= 10:
            fit = a / (compounds[inside] / pairs[inside] + b)
            present = expected_gap(compounds[inside], k).mean()
            print(
                f"  {k} elements, {least} to {most - 1} compounds: {inside.sum()} crystals, "
                f"gap {gap[inside].mean():.3f}, fitted {fit.mean():.3f}, expected_gap {present:.3f}"
            )
