"""Valid inputs that cases damage: made once, before the first child, and only read from then on."""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter

from cfrl.commands.finetune import finetune
from cfrl.config import FinetuneConfig
from cfrl.crystals.crystal import CrystalBatch
from cfrl.io.storage import write_crystals
from cfrl.model.transformer import CrystalTransformer
from cfrl.settings import to_toml
from cfrl.stability.hull import ReferenceHull
from tests.test_model import TINY
from tests.test_published import published_layout
from tests.tiny import base_model


@cache
def structures() -> list[Structure]:
    """Of seven systems, 1 to 8 atoms."""
    rng = np.random.default_rng(0)
    low = Lattice.from_parameters(4.1, 5.3, 6.7, 81, 97, 103)
    monoclinic = Lattice.monoclinic(5.1, 5.2, 5.3, 99)
    return [
        Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]),
        Structure.from_spacegroup(
            "Pm-3m", Lattice.cubic(3.9), ["Ca", "Ti", "O"], [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0]]
        ),
        Structure.from_spacegroup(
            "P6_3mc", Lattice.hexagonal(3.25, 5.2), ["Zn", "O"], [[1 / 3, 2 / 3, 0], [1 / 3, 2 / 3, 0.382]]
        ),
        Structure.from_spacegroup(
            "P4_2/mnm", Lattice.tetragonal(4.6, 2.96), ["Ti", "O"], [[0, 0, 0], [0.305, 0.305, 0]]
        ),
        Structure.from_spacegroup("P2_1/c", monoclinic, ["Hf", "O"], [[0.28, 0.04, 0.21], [0.07, 0.33, 0.34]]),
        Structure(Lattice.orthorhombic(3.1, 4.7, 8.3), ["Li", "Fe", "P"], [[0, 0, 0], [0.5, 0.5, 0.3], [0, 0.5, 0.7]]),
        Structure(low, ["Mg", "Si", "S", "F"], rng.random((4, 3)) * 0.2 + np.eye(4, 3) * 0.5),
        Structure(Lattice.cubic(2.87), ["Fe"], [[0, 0, 0]]),
    ]


def cif(structure: Structure, symmetry: bool = False) -> str:
    """As pymatgen writes it: all atoms, or the asymmetric unit and operations."""
    return str(CifWriter(structure, symprec=0.01 if symmetry else None))


@dataclass
class Seeds:
    """Paths of valid files; `run` is a fine-tuning run of one step, `published` a pickle of JAX weights."""

    model: Path
    published: Path
    dataset: Path
    hull: Path
    run: Path


def make(folder: Path) -> Seeds:
    """All of them, in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model = base_model(folder / "tiny.safetensors")
    crystals = CrystalBatch.from_structures(structures())
    n = len(crystals)
    columns = {"band_gap": np.linspace(0, 5, n), "note": [f"row {i}" for i in range(n)]}
    write_crystals(folder / "known.h5", crystals, columns=columns, split=np.arange(n) % 3)
    ReferenceHull.from_compositions(
        ["Na", "Cl", "NaCl", "Ti", "O", "TiO2", "Zn", "ZnO"], [-1.3, -1.8, -3.4, -7.8, -4.9, -8.9, -1.2, -4.3], "mp2020"
    ).save(folder / "hull.h5")
    torch.manual_seed(0)
    (folder / "epoch_000007.pkl").write_bytes(
        pickle.dumps({"params": published_layout(CrystalTransformer(TINY)), "opt_state": None})
    )
    run = finetune(tuning(model), root=folder / "runs", quiet=True)
    return Seeds(model, folder / "epoch_000007.pkl", folder / "known.h5", folder / "hull.h5", run.path)


def tuning(model: Path) -> FinetuneConfig:
    """One step of four crystals: a tenth of a second."""
    return FinetuneConfig(
        reward="density",
        model=str(model),
        steps=1,
        n=4,
        batch_size=4,
        scale_crystals=4,
        min_distance=0.0,
        evaluate=0,
        plots=False,
        max_atoms=8,
        elements="Na,Cl,O",
        device="cpu",
    )


def toml_of(section: str, settings: object) -> str:
    return to_toml({section: settings}, comments=False)


def records() -> list[dict]:
    """Computed entries, as databases give them."""
    return [
        {"material_id": f"m-{i}", "structure": s.as_dict(), "energy": -3.0 * len(s), "data": {"band_gap": 1.0}}
        for i, s in enumerate(structures()[:3])
    ]


def texts() -> dict[str, str]:
    """File name -> content, of every text format that is read."""
    from ase.io import write
    from pymatgen.io.ase import AseAtomsAdaptor

    found, frames = {}, io.StringIO()
    for i, s in enumerate(structures()):
        found[f"plain{i}.cif"], found[f"unit{i}.cif"] = cif(s), cif(s, symmetry=True)
        found[f"cell{i}.vasp"] = s.to(fmt="poscar")
        found[f"one{i}.json"] = json.dumps(s.as_dict())
    atoms = [AseAtomsAdaptor.get_atoms(s, msonable=False) for s in structures()[:3]]
    for frame in atoms:
        frame.info = {"material_id": "m", "energy": -1.5}
    write(frames, atoms, format="extxyz")
    found["frames.extxyz"] = frames.getvalue()
    found["blocks.cif"] = "\n".join(cif(s) for s in structures()[:3])
    found["entries.json"] = json.dumps({"entries": records()})
    found["list.json"] = json.dumps(records())
    rows = [f'm-{i},{i / 2},"{cif(s)}"' for i, s in enumerate(structures()[:4])]
    found["table.csv"] = "\n".join(["material_id,band_gap,cif", *rows]) + "\n"
    quoted = [f'm-{i},"' + json.dumps(s.as_dict()).replace('"', '""') + '"' for i, s in enumerate(structures()[:2])]
    found["dicts.csv"] = "\n".join(["id,structure", *quoted]) + "\n"
    return found
