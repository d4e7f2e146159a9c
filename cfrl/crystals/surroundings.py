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
_NOTHING = 80.0  # exp of minus this is as good as 0, and five times as quick as where a float ends
_BEYOND = 1e3  # of every shell
_MIDDLE = 1.3  # of the distances that matter: squares around it lose no digits


class Surroundings:
    """What places of E sites have near, of earlier sites and of their own images: asked for any values of a coordinate.

    Args:
        crystal, site: (E,) which site of which crystal.
        axis: (E,) 0, 1 or 2: the coordinate that is not known; those after it must follow from it.
        dtype: of the values.
    """

    def __init__(self, crystals: CrystalBatch, crystal: Tensor, site: Tensor, axis: Tensor, dtype: torch.dtype) -> None:
        t = tables(site.device)
        row, other, triplet = _earlier_atoms(crystals, crystal, site)  # (P,) each
        mine = crystal[row]  # (P,) so all that follows
        own = other == site[row]
        operation = t.offset[crystals.space_group[mine], crystals.wyckoff[mine, other]] + triplet
        rotation, translation = t.rotations[operation].to(dtype), t.translations[operation].to(dtype)
        start, step = _line(crystals, crystal, site, axis, dtype)  # (E, 3): where the site is, start + value * step
        others = crystals.frac_coords[mine, other].to(dtype)
        there = torch.where(own[:, None], start[row], others)
        moves = torch.where(own[:, None], step[row], 0)
        self.row, self.itself = row, own & (triplet == 0)
        self.start = _applied(rotation, there) + translation - start[row]  # from the site to the atom, fractional
        self.step = _applied(rotation, moves) - step[row]
        here, there = crystals.species[mine, site[row]], crystals.species[mine, other]
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
            start, step = (x.T.unsqueeze(-1) for x in (self.start, self.step))  # (3, P, 1)
            distance = _distances(torch.addcmul(start, step, values[self.row]), self.cell) / self.reach[:, None]
            distance = distance.clamp(max=FAR).masked_fill(self.itself[:, None], FAR)  # (P, k)
            row, far = self.row[:, None].expand_as(distance), torch.full_like(values, FAR)
            nearest = far.scatter_reduce(0, row, distance, "amin")
            shells = _shells(distance)  # (P, s, k)
            none = values.new_zeros(len(values), *shells.shape[1:])
            kinds = (shells, shells * self.polarity[:, None, None])
            counts = torch.cat([none.index_add(0, self.row, each) for each in kinds], 1).mT  # (E, k, 2 s)
            return torch.cat([torch.stack([nearest, nearest.clamp(min=_OVERLAP).log()], -1), (1 + counts).log()], -1)


def _line(
    crystals: CrystalBatch, crystal: Tensor, site: Tensor, axis: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Where each site's representative is when one coordinate is 0, and how it moves with it; (E, 3) each.

    Coordinates that are tied to that one move with it.
    """
    group, letter = crystals.space_group[crystal], crystals.wyckoff[crystal, site]
    coords = crystals.frac_coords[crystal, site].to(dtype).scatter(1, axis[:, None], 0)
    start = project_coords(group, letter[:, None], coords[:, None]).squeeze(1)
    matrix = tables(site.device).project_matrix[group, letter].to(dtype)  # (E, 3, 3)
    return start, matrix.take_along_dim(axis[:, None, None], 2).squeeze(2)


def _applied(rotation: Tensor, vectors: Tensor) -> Tensor:
    return (rotation * vectors.unsqueeze(1)).sum(-1)


def _shells(distance: Tensor) -> Tensor:
    """(P, s, k): how much each of (P, k) distances is in each shell; none that is `FAR` is in any."""
    centres, widths = (_on_device(x, distance.device).to(distance.dtype) for x in (_CENTRES, _WIDTHS))
    near, centres = distance.masked_fill(distance >= FAR, _BEYOND) - _MIDDLE, centres - _MIDDLE
    # -((d - c) / w)^2 as a polynomial of d: a product of matrices takes a third of the time of each step in turn
    slopes = torch.stack([-1 / widths.square(), 2 * centres / widths.square()], 1)  # (s, 2)
    powers = torch.stack([near.square(), near], 1)  # (P, 2, k)
    exponent = slopes @ powers - (centres / widths).square()[:, None]
    return exponent.clamp(min=-_NOTHING).exp()


def _earlier_atoms(crystals: CrystalBatch, crystal: Tensor, site: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every atom of the sites up to and with each of E sites: which of the E, its site, its triplet; (P,) each."""
    multiplicity = crystals.multiplicity[crystal]  # (E, S)
    sites = torch.arange(multiplicity.shape[1], device=site.device)
    row, other = (sites <= site[:, None]).nonzero(as_tuple=True)
    count = multiplicity[row, other]
    return row.repeat_interleave(count), other.repeat_interleave(count), places(count)


def _distances(delta: Tensor, matrix: Tensor) -> Tensor:
    """(P, k) shortest lengths of fractional vectors (3, P, k) and their images in cells (P, 3, 3), angstrom."""
    with torch.no_grad():  # which image it is: whole numbers, through which no gradient flows
        whole = delta.round()
        rest = delta - whole
        steps = torch.where(rest > 0, -1.0, 1.0).to(delta.dtype)  # (3, P, k) a cell towards the origin, along each axis
        image = _nearest_image(rest, steps, matrix @ matrix.mT)
        whole -= image * steps
    vector = torch.einsum("ipk,pij->jpk", delta - whole, matrix)
    return vector.square().sum(0).clamp(min=_TOUCHING**2).sqrt()


def _nearest_image(rest: Tensor, steps: Tensor, metric: Tensor) -> Tensor:
    """(3, P, k), 0 or 1: the axes along which to go a step from vectors (3, P, k), so that they get shortest.

    By the metric G (P, 3, 3), |x + sum s_i a_i|^2 - |x|^2 = sum (2 s_i x G_i + G_ii) + 2 sum of pairs s_i s_j G_ij.
    """
    alone = 2 * steps * torch.einsum("ipk,pij->jpk", rest, metric) + metric.diagonal(dim1=1, dim2=2).T.unsqueeze(-1)
    gains = [torch.zeros_like(rest[0])]
    for axis in range(3):
        for number, gain in enumerate(list(gains)):  # one bit of the number for each axis
            for other in range(axis):
                if number >> other & 1:
                    gain = gain + 2 * steps[axis] * steps[other] * metric[:, axis, other, None]
            gains.append(gain + alone[axis])
    least, best = gains[0], torch.zeros_like(rest[0], dtype=torch.uint8)
    for number, gain in enumerate(gains[1:], 1):
        best.masked_fill_(gain < least, number)
        least = torch.minimum(least, gain)
    return torch.stack([best >> axis & 1 for axis in range(3)])


@cache
def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, device=device)
