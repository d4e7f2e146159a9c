"""How far the embedded reference hull is from a fuller one, on crystals of the embedded generator and on its phases.

    python tests/benchmarks/bench_references.py ../shared/data/mp_energies.csv.gz [-n 2000] [--relaxed screen.h5]
        [--embedded hull.h5]

Crystals stand as they were drawn, or, with --relaxed, as a screening relaxed them.
"""

import argparse

import numpy as np

from cfrl.io.storage import read_columns, read_crystals
from cfrl.model.files import load_model
from cfrl.model.sampler import sample
from cfrl.potentials import load_potential
from cfrl.stability.hull import ReferenceHull

LOW = 0.1  # eV/atom

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("full")
parser.add_argument("-n", type=int, default=2000)
parser.add_argument("--relaxed", default="", help="screen.h5 of `cfrl screen`")
parser.add_argument("--embedded", default="", help="another reference in the embedded one's place")
given = parser.parse_args()
if given.relaxed:
    crystals, energies = read_crystals(given.relaxed), read_columns(given.relaxed)["energy_per_atom"]
else:
    crystals = sample(load_model(), given.n, seed=0)
    energies = load_potential("chgnet").compute(crystals).energy
embedded, full = (ReferenceHull.load(path).e_above_hull(crystals, energies) for path in (given.embedded, given.full))
known = np.isfinite(embedded.e_above_hull) & np.isfinite(full.e_above_hull)
difference = (embedded.e_above_hull - full.e_above_hull)[known]
print(f"{known.sum()} crystals with a distance to both hulls, of {len(known)}")
print(f"embedded minus full, eV/atom: median {np.median(difference):.3f}, mean {difference.mean():.3f}")
print(f"absolute: median {np.median(abs(difference)):.3f}, 90% below {np.quantile(abs(difference), 0.9):.3f}")
for name, result in (("embedded", embedded), ("full", full)):
    print(f"within {LOW} eV/atom of the {name} hull: {(result.e_above_hull[known] < LOW).mean():.1%}")

print("how much lower the full hull lies, eV/atom, and what the embedded one's doubt expects")
doubt, lower = embedded.doubt[known], -difference
for low, high in ((0, 0.01), (0.01, 0.03), (0.03, 0.1), (0.1, 1)):
    inside = (doubt >= low) & (doubt < high)
    if inside.any():
        print(
            f"  doubt {low} to {high}: {inside.sum()} crystals, {lower[inside].mean():.3f}, {doubt[inside].mean():.3f}"
        )
print(f"  all: {lower.mean():.3f}, {doubt.mean():.3f}")

print("entries of the full reference: their distance to the embedded hull minus that to all entries, eV/atom")
every = ReferenceHull.load(given.full)
every = every[np.arange(len(every))[:: len(every) // 10_000 or 1]]
shares = every._dense()
ours, theirs = (ReferenceHull.load(path).e_above_hull(shares, every.energies) for path in (given.embedded, given.full))
difference = ours.e_above_hull - theirs.e_above_hull
oxide, fluoride = shares[:, 8] > 0, shares[:, 9] > 0
for name, group in (("oxides", oxide), ("fluorides", fluoride & ~oxide), ("others", ~oxide & ~fluoride)):
    part = difference[group & np.isfinite(difference)]
    middle, typical, tail = np.median(part), np.median(abs(part)), (abs(part) > LOW).mean()
    print(f"  {len(part)} {name}: median {middle:.4f}, absolute {typical:.4f}, {tail:.1%} beyond {LOW}")
