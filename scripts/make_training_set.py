"""The crystals that the embedded model learns from: python scripts/make_training_set.py ../shared/data train.h5

Materials Project crystals (mp_20, mpts_52 below 0.1 eV/atom), the elements, pymatgen's prototypes, and of the mixed
databases what CHGNet puts within 0.1 eV/atom of the hull of mp_energies. Validation is a tenth of mp_20; nothing that
looks like one of its crystals (formula, space group, number of sites) stays among the others.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from cfrl.config import DataConfig
from cfrl.crystals.crystal import CrystalBatch
from cfrl.io.datasets import load_dataset
from cfrl.io.importing import assign_splits, read_files
from cfrl.io.storage import SPLITS, write_crystals
from cfrl.potentials import load_potential
from cfrl.stability.hull import ReferenceHull

NEAR_HULL = 0.1  # eV/atom
ELEMENTS_BELOW = 0.3  # eV/atom; high-pressure polymorphs beyond it are no use
KEPT = ("e_above_hull", "formation_energy_per_atom", "band_gap")


def read(path: Path) -> CrystalBatch:
    imported = read_files([str(path)], DataConfig())
    crystals = imported.crystals
    numbers = {name: imported.columns[name] for name in KEPT if name in imported.columns}
    crystals.properties = {name: torch.as_tensor(np.asarray(values, float)) for name, values in numbers.items()}
    return crystals


def near_hull_by_chgnet(crystals: CrystalBatch, energies: Path) -> CrystalBatch:
    energy = load_potential("chgnet").compute(crystals).energy
    distance = ReferenceHull.load(energies).e_above_hull(crystals, energy).e_above_hull
    return crystals[torch.as_tensor(np.nan_to_num(distance, nan=np.inf) < NEAR_HULL)]


def looks(crystals: CrystalBatch) -> list[tuple[str, int, int]]:
    return list(zip(crystals.formulas(), crystals.space_group.tolist(), crystals.num_sites.tolist(), strict=True))


def main(folder: Path, output: Path) -> None:
    mp_20 = read(folder / "mp_20.csv.gz")
    held_back = torch.as_tensor(assign_splits(mp_20, DataConfig().validation) == SPLITS["validation"])
    validation = mp_20[held_back]
    mpts_52 = read(folder / "mpts_52.csv.gz")
    elements = read(folder / "elements.csv.gz")
    others = [
        mpts_52[mpts_52.properties["e_above_hull"] < NEAR_HULL],
        elements[elements.properties["e_above_hull"] < ELEMENTS_BELOW],
        near_hull_by_chgnet(read(folder / "mixed_databases.csv.gz"), folder / "mp_energies.csv.gz"),
        load_dataset("prototypes"),
    ]
    seen = set(looks(validation))
    others = [part[torch.tensor([look not in seen for look in looks(part)])] for part in others]
    train = CrystalBatch.cat([mp_20[~held_back], *others])
    both = CrystalBatch.cat([train, validation])
    split = [SPLITS["train"]] * len(train) + [SPLITS["validation"]] * len(validation)
    write_crystals(output, both, split=split, attrs={"source": "scripts/make_training_set.py"})
    print(f"{output}: {len(train)} crystals to train on, {len(validation)} to validate")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
