"""From one structure to its space group and the orbits of its atoms, with moyo.

moyopy is imported only by `find_symmetry`. What it finds is plain numpy, cheap to send between processes;
conversion.py makes a batch of many.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cfrl.crystals.symmetry import SymmetryError, letter_index
from cfrl.crystals.wyckoff import arrays

if TYPE_CHECKING:
    from moyopy import Cell, MoyoDataset

MAX_SITES = 20


class OddCellError(SymmetryError):
    """A cell so thin, skewed, dense or large that moyo may work on it for ever, or abort the process."""


class AsymmetricUnit(NamedTuple):
    """Space group and orbits of one crystal, as plain numpy; `conversion.from_units` makes a batch of many."""

    space_group: int
    wyckoff: np.ndarray  # (s,) int64
    species: np.ndarray  # (s,) int64
    points: np.ndarray  # (s, 3) any atom of each orbit, fractional coordinates in the standard setting
    lattice: np.ndarray  # (6,) conventional cell, angstrom and degrees


def analyse(
    lattice: np.ndarray,
    frac_coords: np.ndarray,
    numbers: np.ndarray,
    symprec: float = 0.01,
    max_sites: int = MAX_SITES,
    odd_cells: bool = False,
) -> AsymmetricUnit:
    """Find the space group with moyo and list the orbits in the standard setting.

    Among the equivalent origins and axes of the space group moyo's choice stands. Cheap enough to call per
    structure in worker processes; choosing and ordering the representatives is left to the batch.

    Args:
        lattice: (3, 3) rows in angstrom.
        frac_coords: (N, 3).
        numbers: (N,) atomic numbers.
        symprec: angstrom.
        max_sites: inequivalent sites that there may be.
        odd_cells: this process may hang or die, so odd cells are let through.

    Raises:
        SymmetryError: moyo finds no symmetry, or the crystal has too many sites.
        OddCellError: the cell is odd.
    """
    if len(numbers) == 0:
        raise SymmetryError("no atoms")
    found = find_symmetry(lattice, frac_coords, numbers, symprec, odd_cells)
    orbit_atoms = np.unique(found.orbits)
    if len(orbit_atoms) > max_sites:
        raise SymmetryError(f"too many sites: {len(orbit_atoms)} inequivalent sites, at most {max_sites} fit")
    letters, mapping = found.wyckoffs, found.mapping_std_prim
    wyckoff = np.array([letter_index(letters[i]) for i in orbit_atoms])
    expected, present = arrays()["multiplicity"][found.number, wyckoff].sum(), len(found.std_cell.numbers)
    if expected != present:
        raise SymmetryError(f"symmetry not consistent: {present} atoms for positions of {expected}")
    standing = len(numbers) * abs(np.linalg.det(found.std_linear))
    if abs(standing - present) > 0.5:  # moyo takes atoms closer than symprec for one
        raise SymmetryError(f"atoms at the same place: {standing:.0f} atoms in a cell for {present}")
    basis, primitive = np.array(found.std_cell.basis), found.prim_std_cell
    points = np.array(primitive.positions)[[mapping[i] for i in orbit_atoms]]
    points = points @ np.array(primitive.basis) @ np.linalg.inv(basis)
    species = np.asarray(numbers, dtype=np.int64)[orbit_atoms]
    return AsymmetricUnit(found.number, wyckoff, species, points, _lattice_parameters(found.number, basis))


def find_symmetry(
    lattice: np.ndarray, frac_coords: np.ndarray, numbers: np.ndarray, symprec: float, odd_cells: bool = False
) -> MoyoDataset:
    """What moyo finds of a cell; arguments and errors as for `analyse`."""
    if not odd_cells:
        _refuse_odd_cell(np.asarray(lattice), len(numbers), symprec)
    cell_type, dataset_type = _moyo()
    cell = cell_type(np.asarray(lattice).tolist(), np.asarray(frac_coords).tolist(), np.asarray(numbers).tolist())
    try:
        return dataset_type(cell, symprec=symprec)
    except BaseException as error:  # a panic in moyo's Rust is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise SymmetryError(f"symmetry not found: {error}") from error


def _refuse_odd_cell(lattice: np.ndarray, atoms: int, symprec: float) -> None:
    """The bounds are measured: beyond them are all but 1 in 10,000 of the cells, made to be hard, on which moyo hangs.

    Of 34,000 real crystals none is beyond them at the usual symprec.
    """
    lengths = np.sqrt((lattice * lattice).sum(1))
    volume, least, longest = abs(np.linalg.det(lattice)), lengths.min(), lengths.max()
    sound = volume > 2 * atoms and volume > 0.01 * lengths.prod() and least > 1.2 and atoms <= 1000
    if not (sound and symprec * longest < 0.5 * least):
        raise OddCellError(
            f"symmetry not found: {atoms} atoms in {volume:.3g} cubic angstrom, axes of {least:.3g} to {longest:.3g}"
        )


@cache
def _moyo() -> tuple[type[Cell], type[MoyoDataset]]:
    """moyo's classes, imported when needed; without its remarks on every cell that is not primitive."""
    from moyopy import Cell, MoyoDataset

    logging.getLogger("moyo").setLevel(logging.ERROR)
    return Cell, MoyoDataset


def _lattice_parameters(space_group: int, basis: np.ndarray) -> np.ndarray:
    """a, b, c, alpha, beta, gamma of basis rows, exact where symmetry fixes them."""
    lengths = np.sqrt((basis * basis).sum(1))
    cosines = (basis[[1, 0, 0]] * basis[[2, 2, 1]]).sum(1) / (lengths[[1, 0, 0]] * lengths[[2, 2, 1]])
    parameters = np.concatenate([lengths, np.degrees(np.arccos(cosines))])
    t = arrays()
    angle = t["lattice_angle"][space_group]
    return np.where(np.isnan(angle), parameters[t["lattice_source"][space_group]], angle)
