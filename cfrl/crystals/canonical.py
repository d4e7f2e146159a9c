"""The descriptions of one crystal: other origins and axes of its space group, and the one of them that comes first.

These are the functions behind `CrystalBatch.described_as` and `CrystalBatch.canonical`. The operations that lead from
one description to another are tables (`wyckoff.NormalizerTables`); shifts along polar axes are endless, and fixed by
anchoring the origin at an atom.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfrl.crystals import symmetry
from cfrl.crystals.elements import SYMBOLS
from cfrl.crystals.wyckoff import NUM_LETTERS, tables

if TYPE_CHECKING:
    from cfrl.crystals.crystal import CrystalBatch

_AT_ONCE = 256  # crystals; bounds the memory of `canonical`


def described_as(crystals: CrystalBatch, choice: Tensor) -> CrystalBatch:
    """See `CrystalBatch.described_as`."""
    return with_representatives(_transformed(crystals, choice))[0]


def canonical(crystals: CrystalBatch) -> CrystalBatch:
    """See `CrystalBatch.canonical`."""
    n, device = len(crystals), crystals.device
    if n > _AT_ONCE:
        parts = torch.arange(n, device=device).split(_AT_ONCE)
        return crystals.cat([canonical(crystals[rows]) for rows in parts])
    if not crystals.wyckoff.numel():
        return crystals
    count = crystals.num_descriptions()
    crystal = torch.repeat_interleave(count)  # (r,) which crystal each description is of
    choice = symmetry.places(count)  # (r,)
    # Letters alone decide most cases, and are had without moving an atom.
    letters = symmetry.described_letters(crystals.space_group[crystal], crystals.wyckoff[crystal], choice)
    first = _first_of_each(crystal, letters.sort(-1).values, n)
    crystal, choice = crystal[first], choice[first]
    anchored, row = _anchored(_transformed(crystals[crystal], choice))
    crystal, described = crystal[row], with_representatives(anchored)[0]
    first = _first_of_each(crystal, _order_key(described), n)
    # Where several are equal, any will do.
    row = torch.empty(n, dtype=torch.long, device=device)
    row[crystal[first]] = first.nonzero()[:, 0]
    return described[row]


def with_representatives(crystals: CrystalBatch) -> tuple[CrystalBatch, Tensor]:
    """With each orbit's canonical representative and ordered sites; and how far each site was off, (n, s)."""
    coords, distance = symmetry.representatives(crystals.space_group, crystals.wyckoff, crystals.frac_coords)
    order = symmetry.sort_sites(crystals.wyckoff, coords)  # (n, s)
    ordered = replace(
        crystals,
        wyckoff=crystals.wyckoff.gather(1, order),
        species=crystals.species.gather(1, order),
        frac_coords=coords.take_along_dim(order[..., None], 1),
    )
    return ordered, distance


def _transformed(crystals: CrystalBatch, choice: Tensor) -> CrystalBatch:
    """As `described_as`, but with any point of each orbit and the sites in their old places."""
    wyckoff, points, lattice = symmetry.transform_sites(
        crystals.space_group, crystals.wyckoff, crystals.frac_coords, crystals.lattice, choice
    )
    return replace(crystals, wyckoff=wyckoff, frac_coords=points, lattice=lattice)


def _anchored(crystals: CrystalBatch) -> tuple[CrystalBatch, Tensor]:
    """Each crystal with each of its anchors in turn at 0 along polar axes, and which crystal each row (r,) is.

    Anchors are all atoms of one element on one letter: of the kind with the fewest sites, then the first letter,
    then the smallest atomic number. A crystal without polar axes stays as it is, once.
    """
    t = tables(crystals.device)
    axes = t.polar[crystals.space_group]  # (n, 3)
    polar = axes.any(-1)
    row, site = (_anchors(crystals) & polar[:, None]).nonzero(as_tuple=True)
    # The atoms of a site differ by few shifts along polar axes: only those matter, not the atoms.
    count = t.polar_count[crystals.space_group[row]]
    origin = (crystals.frac_coords[row, site] * axes[row]).repeat_interleave(count, 0)  # (r, 3)
    row = row.repeat_interleave(count)
    shift = t.polar_shifts[t.polar_offset[crystals.space_group[row]] + symmetry.places(count)]  # (r, 3)
    moved = crystals.frac_coords[row] + (shift.to(origin) - origin)[:, None]  # (r, s, 3)
    still = (~polar).nonzero()[:, 0]
    row = torch.cat([still, row])
    return replace(crystals[row], frac_coords=torch.cat([crystals.frac_coords[still], moved])), row


def _anchors(crystals: CrystalBatch) -> Tensor:
    """(n, s) bool: the sites whose atoms are anchors."""
    kind = crystals.wyckoff * len(SYMBOLS) + crystals.species  # in the order of letters, then atomic numbers
    sites = (kind[:, :, None] == kind[:, None]).sum(-1)
    rank = (sites * NUM_LETTERS * len(SYMBOLS) + kind).where(crystals.wyckoff > 0, torch.iinfo(torch.long).max)
    return rank == rank.amin(1, keepdim=True)


def _order_key(crystals: CrystalBatch) -> Tensor:
    """Integers by which descriptions of one crystal are compared from left to right, (n, 5 s + 3)."""
    coords = symmetry.steps(crystals.frac_coords, 1000) % 1000
    lengths = symmetry.steps(crystals.lattice[:, :3], 1000)
    return torch.cat([crystals.wyckoff, crystals.species, coords.flatten(1), lengths], 1)


def _first_of_each(crystal: Tensor, key: Tensor, n: int) -> Tensor:
    """(r,) bool: the rows of key (r, k) that are lexicographically smallest among those of the same crystal (r,)."""
    smallest = torch.ones_like(crystal, dtype=torch.bool)
    for column in key.unbind(1):
        rows = smallest.nonzero()[:, 0]
        if len(rows) == n:
            break
        least = torch.full((n,), torch.iinfo(torch.long).max, device=key.device)
        least.scatter_reduce_(0, crystal[rows], column[rows], "amin")
        smallest[rows] = column[rows] == least[crystal[rows]]
    return smallest
