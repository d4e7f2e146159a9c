"""Crystals from and to the objects of other libraries: pymatgen structures, ASE atoms, what moyo found.

These are the functions behind `CrystalBatch.from_structures` and its like; files are the work of cfrl/io.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike

from cfrl.crystals import symmetry
from cfrl.crystals.analysis import MAX_SITES, AsymmetricUnit, analyse
from cfrl.crystals.canonical import with_representatives
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.elements import SYMBOLS
from cfrl.crystals.symmetry import SymmetryError

if TYPE_CHECKING:
    from ase import Atoms
    from pymatgen.core import Structure


def from_units(
    units: Sequence[AsymmetricUnit],
    ids: Sequence[str] | None = None,
    properties: Mapping[str, ArrayLike] | None = None,
    dropped: dict[int, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> CrystalBatch:
    """A batch of what `analyse` found, each crystal in its canonical description.

    Args:
        units: n of them.
        ids, properties: n names, and name -> (n,) numbers.
        dropped: receives row -> reason of units whose points do not fit their letters; these are left out.
        dtype: of coordinates and lattice.

    Raises:
        SymmetryError: there is such a unit, and no `dropped`.
    """
    n, s = len(units), max((len(unit.wyckoff) for unit in units), default=0)
    wyckoff, species = np.zeros((2, n, s), dtype=np.int64)
    points, lattice = np.zeros((n, s, 3)), np.zeros((n, 6))
    for i, unit in enumerate(units):
        sites = len(unit.wyckoff)
        wyckoff[i, :sites], species[i, :sites], points[i, :sites] = unit[1:4]
        lattice[i] = unit.lattice
    batch = CrystalBatch(
        torch.tensor([unit.space_group for unit in units], dtype=torch.long),
        torch.from_numpy(wyckoff),
        torch.from_numpy(species),
        torch.from_numpy(points),
        torch.from_numpy(lattice),
        None if ids is None else list(ids),
        {name: torch.as_tensor(values, dtype=torch.float64) for name, values in (properties or {}).items()},
    )
    batch, distance = with_representatives(batch)
    off = (distance > symmetry.ON_POSITION).any(-1)
    reason = "symmetry not consistent: an atom lies off its Wyckoff position"
    if off.any() and dropped is None:
        raise SymmetryError(f"structure {int(off.nonzero()[0])}: {reason}")
    if off.any():
        dropped.update(dict.fromkeys(off.nonzero()[:, 0].tolist(), reason))
        batch = batch[~off]
    batch = batch.canonical()
    coords = symmetry.project_coords(batch.space_group, batch.wyckoff, batch.frac_coords.to(dtype))
    return replace(batch, frac_coords=coords, lattice=batch.lattice.to(dtype))


def from_structures(
    structures: Sequence[Structure],
    symprec: float = 0.01,
    ids: Sequence[str] | None = None,
    properties: Mapping[str, ArrayLike] | None = None,
    errors: Literal["raise", "skip"] = "raise",
    dropped: dict[int, str] | None = None,
    dtype: torch.dtype = torch.float32,
    max_sites: int = MAX_SITES,
) -> CrystalBatch:
    """See `CrystalBatch.from_structures`."""
    units, rows, reasons = [], [], {}
    for row, structure in enumerate(structures):
        try:
            units.append(_analyse_structure(structure, symprec, max_sites))
            rows.append(row)
        except SymmetryError as error:
            if errors == "raise":
                raise SymmetryError(f"structure {row}: {error}") from error
            reasons[row] = str(error)
    off: dict[int, str] = {}
    batch = from_units(
        units,
        None if ids is None else [ids[row] for row in rows],
        {name: torch.as_tensor(values)[rows] for name, values in (properties or {}).items()},
        None if errors == "raise" else off,
        dtype,
    )
    if dropped is not None:
        dropped.update(reasons | {rows[i]: reason for i, reason in off.items()})
    return batch


def to_structures(crystals: CrystalBatch) -> list[Structure]:
    """See `CrystalBatch.to_structures`."""
    from pymatgen.core import Element, Lattice, Structure

    elements = {z: Element(SYMBOLS[z]) for z in crystals.species.unique().tolist() if z}
    structures = []
    for i, (matrix, frac, numbers) in enumerate(_cells(crystals)):
        properties = {"space_group": int(crystals.space_group[i])}
        if crystals.ids is not None:
            properties["id"] = crystals.ids[i]
        species = [elements[z] for z in numbers.tolist()]
        structures.append(Structure(Lattice(matrix), species, frac, properties=properties))
    return structures


def to_atoms(crystals: CrystalBatch) -> list[Atoms]:
    """See `CrystalBatch.to_atoms`."""
    from ase import Atoms

    return [
        Atoms(numbers=numbers, scaled_positions=frac, cell=matrix, pbc=True)
        for matrix, frac, numbers in _cells(crystals)
    ]


def _cells(crystals: CrystalBatch) -> Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each crystal the lattice matrix (3, 3), fractional coordinates (N, 3), float64, and atomic numbers (N,)."""
    crystals = crystals.to("cpu", torch.float64)
    frac, numbers, _, _ = crystals.atoms()
    ends = crystals.num_atoms.cumsum(0).tolist()[:-1]
    cells = np.split(frac.numpy(), ends), np.split(numbers.numpy(), ends)
    return zip(crystals.lattice_matrix().numpy(), *cells, strict=True) if len(crystals) else iter(())


def _analyse_structure(structure: Structure, symprec: float, max_sites: int) -> AsymmetricUnit:
    if not structure.is_ordered:
        raise SymmetryError("disordered: a site is shared or partly occupied")
    numbers = [site.specie.Z for site in structure]
    if not all(isinstance(z, int) and 0 < z < len(SYMBOLS) for z in numbers):
        raise SymmetryError("a site holds something that is not an element")
    return analyse(structure.lattice.matrix, structure.frac_coords, np.array(numbers), symprec, max_sites)
