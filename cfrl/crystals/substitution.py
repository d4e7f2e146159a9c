"""New crystals from known ones: elements exchanged for such as take their places in nature.

How likely is told by data: which ions of the ICSD's compounds replace which (Hautier et al., Inorg. Chem. 50, 656
(2011), the table is pymatgen's). Only ions of equal charge are counted, so that charges which balanced still do.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import cache

import numpy as np
import torch

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.elements import ATOMIC_NUMBERS, NUM_ELEMENTS

UNSEEN = 1e-6  # probability of an exchange that the data have not seen
_TRIES = 100  # for one crystal, until an element changes and no two become one


def substitution_table() -> np.ndarray:
    """(119, 119) probability that the element of a row is replaced by that of a column; its own: that it stays.

    Rows of elements that are in none of the data are zero. It takes some seconds.
    """
    from pymatgen.core.structure_prediction.substitution_probability import SubstitutionProbability

    data = SubstitutionProbability()
    by_charge = defaultdict(list)
    for ion in data.species:
        by_charge[ion.oxi_state].append(ion)
    joint = np.zeros((NUM_ELEMENTS, NUM_ELEMENTS))
    for ions in by_charge.values():
        for one in ions:
            for other in ions:
                if data.get_lambda(one, other) > data.alpha:  # seen, not only possible
                    joint[ATOMIC_NUMBERS[one.symbol], ATOMIC_NUMBERS[other.symbol]] += data.prob(one, other)
    return joint / np.maximum(joint.sum(1, keepdims=True), 1e-300)


@cache
def replacement_table() -> np.ndarray:
    """`substitution_table` for what must not be ruled out: every exchange is possible, and every element can stay."""
    table = substitution_table()
    np.fill_diagonal(table, np.where(table.any(1), table.diagonal(), 1))
    return table + UNSEEN


def substitute(crystals: CrystalBatch, table: np.ndarray, rng: np.random.Generator) -> CrystalBatch:
    """The crystals with at least one element of each exchanged, their cells scaled to the new sizes of the atoms.

    Each element stays or goes as the table says, conditioned on one going and on no two becoming the same. What cannot
    be changed so is left out. Positions stay; lengths of the cell follow the mean covalent radius.

    Args:
        table: (119, 119), see `substitution_table`; of a row only the proportions count.

    Returns:
        At most as many crystals, with the ids of those that they come from.
    """
    cumulative = table.cumsum(1)
    species, rows = crystals.species.numpy().copy(), []
    for row, numbers in enumerate(species):
        old = np.unique(numbers[numbers > 0])
        new = _exchanged(old, cumulative, rng)
        if new is not None:
            sites = numbers > 0
            species[row, sites] = new[np.searchsorted(old, numbers[sites])]
            rows.append(row)
    return rescaled(crystals, torch.from_numpy(species))[rows]


def rescaled(crystals: CrystalBatch, species: torch.Tensor) -> CrystalBatch:
    """The crystals with other elements (n, s), lengths of the cell following the mean covalent radius."""
    changed = replace(crystals, species=species, properties={})
    lengths = torch.ones(len(crystals), 6, dtype=crystals.lattice.dtype)
    lengths[:, :3] = (_mean_radius(changed) / _mean_radius(crystals)).to(lengths)[:, None]
    return replace(changed, lattice=crystals.lattice * lengths)


def _exchanged(old: np.ndarray, cumulative: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    if not (cumulative[old, -1] > 0).all():
        return None
    for _ in range(_TRIES):
        new = (cumulative[old] < rng.random(len(old))[:, None] * cumulative[old, -1:]).sum(1)
        if (new != old).any() and len(np.unique(new)) == len(new):
            return new
    return None


def _mean_radius(crystals: CrystalBatch) -> torch.Tensor:
    """(n,) angstrom, over the atoms of each crystal; covalent radii of Cordero et al. 2008."""
    from ase.data import covalent_radii

    radii = torch.from_numpy(covalent_radii[:NUM_ELEMENTS])[crystals.species]
    return (radii * crystals.multiplicity).sum(1) / crystals.num_atoms
