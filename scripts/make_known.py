"""Hashes of the formulas that the embedded generators learnt from: make_known.py train.h5 cfrl/assets/grown.h5

Writes cfrl/assets/known.npy: hashes, not data. `train.h5` is of make_training_set.py; validation included.
"""

import sys

from cfrl.crystals.known import EMBEDDED, KnownFormulas
from cfrl.io.storage import read_crystals

if __name__ == "__main__":
    known = KnownFormulas.of(formula for path in sys.argv[1:] for formula in read_crystals(path).formulas())
    known.save(EMBEDDED)
    print(f"{EMBEDDED}: {len(known)} formulas")
