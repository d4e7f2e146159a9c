"""The structure types of the crystals that the embedded generator learnt from: make_structure_types.py train.h5

Writes cfrl/assets/structure_types.npz: an example of each type, and the elements that are known in it. `train.h5` is of
make_training_set.py; its validation crystals are left out, so that predictions can be tested on them.
"""

import sys

from cfrl.crystals.structure_types import EMBEDDED, StructureTypes
from cfrl.io.datasets import load_dataset

if __name__ == "__main__":
    types = StructureTypes.of(load_dataset(sys.argv[1], split="train"))
    types.write(EMBEDDED)
    print(f"{EMBEDDED}: {len(types)} types of {len(types.type_of)} crystals")
