"""The embedded dataset `grown` of what `cfrl data grow` has made: make_grown.py grown.h5

Writes cfrl/assets/grown.h5: the crystals that are near the hull still, now that later finds have lowered it, but for
formulas of the real training set (with the prototypes, which may not have been named to `data grow`).
"""

import sys
from dataclasses import replace

import numpy as np

from cfrl.assets import ASSETS
from cfrl.io.catalogue import STRUCTURE_TYPES
from cfrl.io.datasets import load_dataset
from cfrl.io.storage import read_columns, read_crystals, write_crystals

WITHIN = 0.1  # eV/atom

if __name__ == "__main__":
    crystals, columns = read_crystals(sys.argv[1]), read_columns(sys.argv[1], ["parent", "judge"])
    near = (crystals.properties["e_above_hull"] <= WITHIN).numpy()
    near &= ~np.isin(crystals.formulas(), load_dataset(STRUCTURE_TYPES).formulas())
    kept = replace(crystals[near], ids=None)  # texts are not compressed
    attrs = {"source": "cfrl data grow", "judge": ", ".join(sorted(set(columns["judge"])))}
    write_crystals(ASSETS / "grown.h5", kept, columns={"parent": columns["parent"][near]}, attrs=attrs)
    print(f"{ASSETS / 'grown.h5'}: {near.sum():,} of {len(crystals):,} crystals")
