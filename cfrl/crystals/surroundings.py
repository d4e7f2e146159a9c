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


class Surroundings:
    """What places of E sites have near, of earlier sites and of their own images: asked for any values of a coordinate.

    Args:
        crystal, site: (E,) which site of which crystal.
        axis: (E,) 0, 1 or 2: the coordinate that is not known; those after it must follow from it.
        dtype: of the values.
    """

    def __init__(self, crystals: CrystalBatch, crystal: Tensor, site: Tensor, axis: Tensor, dtype: torch.dtype) -> None:
        t, self.axis = tables(site.device), axis
        self.group, self.letter = crystals.space_group[crystal], crystals.wyckoff[crystal, site]  # (E,)
        self.coords = crystals.frac_coords[crystal, site].to(dtype)  # (E, 3)
        self.row, other, triplet = _earlier_atoms(crystals, crystal, site)  # (P,) each
        mine = crystal[self.row]  # (P,) so all that follows
        self.own = other == site[self.row]
        self.itself = self.own & (triplet == 0)
        self.representative = crystals.frac_coords[mine, other].to(dtype)  # (P, 3)
        operation = t.offset[crystals.space_group[mine], crystals.wyckoff[mine, other]] + triplet
        self.rotation, self.translation = t.rotations[operation].to(dtype), t.translations[operation].to(dtype)
        here, there = crystals.species[mine, site[self.row]], crystals.species[mine, other]
        radius, charge = (_on_device(x, site.device).to(dtype) for x in (COVALENT_RADII, electronegativities()))
        self.reach, self.polarity = radius[here] + radius[there], (charge[here] - charge[there]).abs()
        cells = crystals.lattice_matrix().to(dtype).nan_to_num(0, 0, 0)  # those that cannot be are drawn, too
        self.cell = cells[mine]  # (P, 3, 3)

    def __call__(self, values: Tensor) -> Tensor:
        """(E, k, `SURROUNDINGS`) of fractional coordinates (E, k), to which gradients flow.

        Distances are in sums of covalent radii: the shortest and its logarithm; then the logarithm of one more than the
        number of atoms in each of a set of soft shells, and the same with atoms weighted by how much their
        electronegativity differs. Only the eight nearest cells are looked at.
        """
        with torch.autocast(values.device.type, enabled=False):  # distances need their digits
            here = self._places(values)[self.row]  # (P, k, 3)
            there = torch.where(self.own[:, None, None], here, self.representative.unsqueeze(1))
            there = there @ self.rotation.mT + self.translation.unsqueeze(1)
            distance = _distances(there - here, self.cell) / self.reach[:, None]
            distance = distance.clamp(max=FAR).masked_fill(self.itself[:, None], FAR)  # (P, k)
            row, far = self.row[:, None].expand_as(distance), torch.full_like(values, FAR)
            nearest = far.scatter_reduce(0, row, distance, "amin")
            centres, widths = (_on_device(numbers, values.device).to(values.dtype) for numbers in (_CENTRES, _WIDTHS))
            shells = torch.exp(-((distance.unsqueeze(-1) - centres) / widths).square())
            shells = shells * (distance < FAR).unsqueeze(-1)
            both = torch.cat([shells, shells * self.polarity[:, None, None]], -1)
            counts = values.new_zeros(*values.shape, 2 * len(_CENTRES)).index_add(0, self.row, both)
            return torch.cat([torch.stack([nearest, nearest.clamp(min=_OVERLAP).log()], -1), (1 + counts).log()], -1)

    def _places(self, values: Tensor) -> Tensor:
        """(E, k, 3) the representative of each site with these values of one coordinate; tied ones follow."""
        asked = torch.arange(3, device=values.device) == self.axis[:, None, None]
        coords = torch.where(asked, values.unsqueeze(-1), self.coords.unsqueeze(1))
        return project_coords(self.group, self.letter.unsqueeze(1).expand_as(values), coords)


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


@cache
def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, device=device)
