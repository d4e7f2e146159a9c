"""Hashes of the formulas that the embedded generator learnt from: python scripts/make_known.py train.h5

Writes cfrl/assets/known.npy: hashes, not data. `train.h5` is of make_training_set.py; validation included.
"""

import sys

from cfrl.crystals.known import EMBEDDED, KnownFormulas
from cfrl.io.storage import read_crystals

if __name__ == "__main__":
    known = KnownFormulas.of(read_crystals(sys.argv[1]).formulas())
    known.save(EMBEDDED)
    print(f"{EMBEDDED}: {len(known)} formulas")
