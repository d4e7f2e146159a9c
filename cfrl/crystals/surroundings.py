"""What stands around the places that a site could take in a crystal that is being built, site after site.

The cell is known, and so are the earlier sites with all their atoms; of the site itself all coordinates but one.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.descriptors import electronegativities
from cfrl.crystals.elements import COVALENT_RADII
from cfrl.crystals.symmetry import places
from cfrl.crystals.wyckoff import tables

FAR = 3.0  # sums of covalent radii; whatever is farther away counts as there
SURROUNDINGS = 5  # numbers that describe them
_TOUCHING = 0.01  # angstrom; nearer is the same
_ALIKE = 0.5  # elements whose electronegativities differ by no more are
_BOND = 0.15  # width of what counts as a bond about the sum of the covalent radii, in such sums
_MOST_BONDS, _USUAL_BONDS = 12, 4


def surroundings(crystals: CrystalBatch, crystal: Tensor, site: Tensor, axis: Tensor, values: Tensor) -> Tensor:
    """Of k places for each of E sites, (E, k, 5): distances to atoms of earlier sites and to the site's own images.

    Distances are in sums of covalent radii: the shortest, its logarithm, the shortest to an atom of like
    electronegativity; then how many bonds there are, in units of `_USUAL_BONDS`, and the same weighted by the
    difference of the electronegativities. Only the eight nearest cells are looked at. Gradients flow to the values.

    Args:
        crystal, site: (E,) which site of which crystal.
        axis: (E,) 0, 1 or 2: the coordinate that is not known; those after it must follow from it.
        values: (E, k) what it might be, fractional.
    """
    group = crystals.space_group[crystal]
    here = _places(crystals, crystal, site, axis, values)  # (E, k, 3)
    row, other, triplet = _earlier_atoms(crystals, crystal, site)  # (P,) each
    own = other == site[row]
    t = tables(values.device)
    there = crystals.frac_coords[crystal[row], other].to(values.dtype).unsqueeze(1)  # (P, 1, 3)
    there = torch.where(own[:, None, None], here[row], there)  # (P, k, 3) representatives of their sites
    operation = t.offset[group[row], crystals.wyckoff[crystal[row], other]] + triplet
    there = there @ t.rotations[operation].to(values.dtype).mT + t.translations[operation].to(values.dtype).unsqueeze(1)
    mine, theirs = crystals.species[crystal, site][row], crystals.species[crystal[row], other]
    radius, charge = _table(COVALENT_RADII, values), _table(electronegativities(), values)
    distance = _distances(there - here[row], crystals.lattice_matrix().to(values.dtype)[crystal[row]])  # (P, k)
    distance = (distance / (radius[mine] + radius[theirs])[:, None]).nan_to_num(FAR).clamp(max=FAR)
    distance = distance.masked_fill((own & (triplet == 0))[:, None], FAR)  # an atom and itself
    polarity = (charge[mine] - charge[theirs]).abs()[:, None]
    bonds = torch.exp(-((distance - 1) / _BOND).square())

    def least(lengths: Tensor) -> Tensor:
        return torch.full_like(values, FAR).scatter_reduce_(0, row[:, None].expand_as(lengths), lengths, "amin")

    def total(amounts: Tensor) -> Tensor:
        return torch.zeros_like(values).index_add_(0, row, amounts).clamp(max=_MOST_BONDS) / _USUAL_BONDS

    nearest, alike = least(distance), least(distance.masked_fill(polarity > _ALIKE, FAR))
    return torch.stack([nearest, nearest.clamp(min=0.05).log(), alike, total(bonds), total(bonds * polarity)], -1)


def _places(crystals: CrystalBatch, crystal: Tensor, site: Tensor, axis: Tensor, values: Tensor) -> Tensor:
    """(E, k, 3) the representative of each site with these values of one coordinate; tied ones follow."""
    t = tables(values.device)
    group, letter = crystals.space_group[crystal], crystals.wyckoff[crystal, site]
    coords = crystals.frac_coords[crystal, site].to(values.dtype).unsqueeze(1)  # (E, 1, 3)
    asked = torch.arange(3, device=axis.device) == axis[:, None, None]
    coords = torch.where(asked, values.unsqueeze(-1), coords)  # (E, k, 3)
    free = t.free[group, letter].unsqueeze(1)  # (E, 1, 3)
    matrix, shift = (table[group, letter].to(values.dtype) for table in (t.project_matrix, t.project_shift))
    return torch.where(free, coords, coords.masked_fill(~free, 0) @ matrix.mT + shift.unsqueeze(1))


def _earlier_atoms(crystals: CrystalBatch, crystal: Tensor, site: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every atom of the sites up to and with each of E sites: which of the E, its site, its triplet; (P,) each."""
    multiplicity = crystals.multiplicity[crystal]  # (E, S)
    sites = torch.arange(multiplicity.shape[1], device=site.device)
    row, other = (sites <= site[:, None]).nonzero(as_tuple=True)
    count = multiplicity[row, other]
    return row.repeat_interleave(count), other.repeat_interleave(count), places(count)


def _distances(delta: Tensor, matrix: Tensor) -> Tensor:
    """(P, k) shortest lengths of fractional vectors (P, k, 3) and their images in cells (P, 3, 3), angstrom."""
    with torch.no_grad():  # which image it is: whole numbers, through which no gradient flows
        whole = delta.round()
        steps = torch.where(delta > whole, -1.0, 1.0).to(delta.dtype)  # (P, k, 3)
        edges = steps.movedim(-1, 0).unsqueeze(1) * matrix.permute(1, 2, 0).unsqueeze(-1)  # (3, 3, P, k)
        images = [torch.einsum("pki,pij->jpk", delta - whole, matrix)]
        for edge in edges:
            images += [image + edge for image in images]
        nearest = torch.stack([image.square().sum(0) for image in images]).argmin(0)  # (P, k) one bit for each edge
        stepped = (nearest.unsqueeze(-1) >> torch.arange(3, device=nearest.device)) & 1  # (P, k, 3)
    vector = torch.einsum("pki,pij->jpk", delta - whole + stepped * steps, matrix)
    return vector.square().sum(0).clamp(min=_TOUCHING**2).sqrt()


def _table(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    return _on_device(numbers, like.device).to(like.dtype)


@cache
def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, device=device)
