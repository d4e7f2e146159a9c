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
from cfrl.crystals.symmetry import places, project_coords
from cfrl.crystals.wyckoff import tables

FAR = 3.0  # sums of covalent radii; whatever is farther away counts as there
# Shells of neighbours, by their distance in sums of covalent radii: bonds are at 1, what does not bind beyond 1.5
_CENTRES = (0.3, 0.5, 0.7, 0.85, 1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.3)
_WIDTHS = (0.2, 0.2, 0.15, 0.1, 0.1, 0.1, 0.12, 0.18, 0.22, 0.25, 0.3)
SURROUNDINGS = 2 + 2 * len(_CENTRES)  # numbers that describe them
_TOUCHING = 0.01  # angstrom; nearer is the same
_OVERLAP = 0.05  # the logarithm of a distance goes no further


def surroundings(crystals: CrystalBatch, crystal: Tensor, site: Tensor, axis: Tensor, values: Tensor) -> Tensor:
    """(E, k, `SURROUNDINGS`): what k places of each of E sites have near, of earlier sites and of their own images.

    Distances are in sums of covalent radii: the shortest and its logarithm; then the logarithm of one more than the
    number of atoms in each of a set of soft shells, and the same with atoms weighted by how much their
    electronegativity differs. Only the eight nearest cells are looked at. Gradients flow to the values.

    Args:
        crystal, site: (E,) which site of which crystal.
        axis: (E,) 0, 1 or 2: the coordinate that is not known; those after it must follow from it.
        values: (E, k) what it might be, fractional.
    """
    with torch.autocast(values.device.type, enabled=False):  # distances need their digits
        here = _places(crystals, crystal, site, axis, values)  # (E, k, 3)
        row, other, triplet = _earlier_atoms(crystals, crystal, site)  # (P,) each
        there = _atoms(crystals, crystal[row], other, triplet, other == site[row], here[row])  # (P, k, 3)
        mine, theirs = crystals.species[crystal, site][row], crystals.species[crystal[row], other]
        radius, charge = _table(COVALENT_RADII, values), _table(electronegativities(), values)
        cells = crystals.lattice_matrix().to(values.dtype).nan_to_num(0, 0, 0)  # those that cannot be are drawn, too
        distance = _distances(there - here[row], cells[crystal[row]]) / (radius[mine] + radius[theirs])[:, None]
        itself = (other == site[row]) & (triplet == 0)
        distance = distance.clamp(max=FAR).masked_fill(itself[:, None], FAR)  # (P, k)
        nearest = torch.full_like(values, FAR).scatter_reduce(0, row[:, None].expand_as(distance), distance, "amin")
        shells = torch.exp(-((distance.unsqueeze(-1) - _table(_CENTRES, values)) / _table(_WIDTHS, values)).square())
        shells = shells * (distance < FAR).unsqueeze(-1)
        polar = shells * (charge[mine] - charge[theirs]).abs()[:, None, None]
        counts = values.new_zeros(*values.shape, 2 * len(_CENTRES)).index_add(0, row, torch.cat([shells, polar], -1))
        return torch.cat([torch.stack([nearest, nearest.clamp(min=_OVERLAP).log()], -1), (1 + counts).log()], -1)


def _atoms(crystals: CrystalBatch, crystal: Tensor, site: Tensor, triplet: Tensor, own: Tensor, here: Tensor) -> Tensor:
    """(P, k, 3) of P atoms by crystal, site and triplet, (P,) each; images of the places `here` (P, k, 3) if `own`."""
    t = tables(here.device)
    representative = crystals.frac_coords[crystal, site].to(here.dtype).unsqueeze(1)  # (P, 1, 3)
    representative = torch.where(own[:, None, None], here, representative)
    operation = t.offset[crystals.space_group[crystal], crystals.wyckoff[crystal, site]] + triplet
    rotation, translation = t.rotations[operation].to(here.dtype), t.translations[operation].to(here.dtype)
    return representative @ rotation.mT + translation.unsqueeze(1)


def _places(crystals: CrystalBatch, crystal: Tensor, site: Tensor, axis: Tensor, values: Tensor) -> Tensor:
    """(E, k, 3) the representative of each site with these values of one coordinate; tied ones follow."""
    letter = crystals.wyckoff[crystal, site].unsqueeze(1).expand_as(values)
    coords = crystals.frac_coords[crystal, site].to(values.dtype).unsqueeze(1)  # (E, 1, 3)
    asked = torch.arange(3, device=axis.device) == axis[:, None, None]
    return project_coords(crystals.space_group[crystal], letter, torch.where(asked, values.unsqueeze(-1), coords))


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
        shortest, nearest = images[0].square().sum(0), torch.zeros_like(delta[..., 0], dtype=torch.long)  # (P, k)
        for number, image in enumerate(images[1:], 1):  # one bit of the number for each edge
            squared = image.square().sum(0)
            nearest.masked_fill_(squared < shortest, number)
            shortest = torch.minimum(shortest, squared)
        stepped = (nearest.unsqueeze(-1) >> torch.arange(3, device=nearest.device)) & 1  # (P, k, 3)
    vector = torch.einsum("pki,pij->jpk", delta - whole + stepped * steps, matrix)
    return vector.square().sum(0).clamp(min=_TOUCHING**2).sqrt()


def _table(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    return _on_device(numbers, like.device).to(like.dtype)


@cache
def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, device=device)
