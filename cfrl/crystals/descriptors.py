"""Fixed descriptors of elements, space groups and Wyckoff positions, for models that share what they learn.

Each is a table of numbers of order one, indexed as the model's embeddings are. Nothing here is learned; everything
comes from assets/elements.csv and from the symmetry tables.
"""

from __future__ import annotations

import csv
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from cfrl.assets import ASSETS
from cfrl.crystals.elements import NUM_ELEMENTS
from cfrl.crystals.symmetry import CRYSTAL_SYSTEMS
from cfrl.crystals.wyckoff import NUM_LETTERS, NUM_SPACE_GROUPS, tables

ELEMENTS_PATH = ASSETS / "elements.csv"
_SCALARS = ("electronegativity", "radius", "ionization_energy", "electron_affinity", "mendeleev")
_SHELL_SIZES = {"s": 2, "p": 6, "d": 10, "f": 14}
_OXIDATION_STATES = range(-4, 9)
# (determinant, trace) of the ten kinds of crystallographic rotations: 1 2 3 4 6 and -1 m -3 -4 -6
_ROTATION_KINDS = ((1, 3), (1, -1), (1, 0), (1, 1), (1, 2), (-1, -3), (-1, 1), (-1, 0), (-1, -1), (-1, -2))


def _elements() -> list[dict[str, str]]:
    """From hydrogen on."""
    with ELEMENTS_PATH.open(newline="") as file:
        return list(csv.DictReader(file))


def element_descriptors() -> Tensor:
    """(119, k) by atomic number, zero for 0 and beyond lawrencium: period, group, shell fillings, common
    oxidation states, and standardised electronegativity, radius, ionisation energy, electron affinity and
    Mendeleev number (0, the mean, where unknown).
    """
    rows = _elements()
    period = F.one_hot(torch.tensor([int(row["period"]) for row in rows]), 8)[:, 1:]
    group = F.one_hot(torch.tensor([int(row["group"]) for row in rows]), 19)[:, 1:]
    shells = torch.tensor([[int(row[name]) / size for name, size in _SHELL_SIZES.items()] for row in rows])
    states = torch.tensor([[str(n) in row["oxidation_states"].split() for n in _OXIDATION_STATES] for row in rows])
    scalars = torch.tensor([[float(row[name] or "nan") for name in _SCALARS] for row in rows])
    mean = scalars.nanmean(0)
    std = (scalars - mean).square().nanmean(0).sqrt()
    scalars = ((scalars - mean) / std).nan_to_num(0.0)
    table = torch.cat([period, group, shells, states, scalars], 1).float()
    return F.pad(table, (0, 0, 1, NUM_ELEMENTS - 1 - len(rows)))


@cache
def electronegativities() -> tuple[float, ...]:
    """Pauling's, by atomic number, 119 of them; the mean where there is none."""
    known = torch.tensor([float(row["electronegativity"] or "nan") for row in _elements()])
    table = F.pad(known, (1, NUM_ELEMENTS - 1 - len(known)), value=torch.nan)
    return tuple(table.nan_to_num(table.nanmean().item()).tolist())


def space_group_descriptors() -> Tensor:
    """(231, k) by number, row 0 zero: crystal system, centring, order, and the shares of each kind of operation,
    with and without a fractional translation (screw axes and glide planes).
    """
    rows = [torch.zeros(0)]
    for number in range(1, NUM_SPACE_GROUPS + 1):
        rotation, translation = _general_operations(number)
        system = sum(number > end for end in CRYSTAL_SYSTEMS.values())
        kinds = _kinds(rotation)  # (M, 10)
        fractional = (translation % 1 != 0).any(-1, keepdim=True)
        centring = int((kinds[:, 0] > 0).sum())
        rows.append(
            torch.cat(
                [
                    F.one_hot(torch.tensor(system), 7),
                    F.one_hot(torch.tensor(centring - 1), 4),
                    torch.tensor([len(rotation)]).log2() / 4,
                    kinds.mean(0),
                    (kinds * fractional).mean(0),
                ]
            )
        )
    rows[0] = torch.zeros_like(rows[1])
    return torch.stack(rows).float()


def site_descriptors() -> Tensor:
    """(231, 28, k) by space group and letter, zero where there is no such position: multiplicity, free coordinates,
    first triplet, rank of the letter, and the site symmetry (operations of the group that leave the site in place).
    """
    t = tables()
    letters = torch.arange(NUM_LETTERS)
    multiplicity = t.multiplicity.clamp(min=1).float()
    general = multiplicity.amax(1, keepdim=True)
    shift = 2 * torch.pi * t.project_shift.float()
    table = torch.cat(
        [
            multiplicity.log2().unsqueeze(-1) / 4,
            (multiplicity / general).unsqueeze(-1),
            (letters / t.num_letters.clamp(min=1).unsqueeze(-1)).unsqueeze(-1),
            F.one_hot(t.dof, 4),
            t.free,
            t.project_matrix.flatten(-2),
            shift.sin(),
            shift.cos(),
            _site_symmetries(),
        ],
        -1,
    )
    return (table * (t.multiplicity > 0).unsqueeze(-1)).float()


def _site_symmetries() -> Tensor:
    """(231, 28, 11): number of operations of each kind in the site-symmetry group, over 4, and log2 of its order."""
    t = tables()
    # Any point in general position will do: these numbers are no crystallographic fractions.
    parameters = torch.tensor([0.1234, 0.3571, 0.7193], dtype=torch.float64)
    counts = torch.zeros(NUM_SPACE_GROUPS + 1, NUM_LETTERS, len(_ROTATION_KINDS), dtype=torch.float64)
    for number in range(1, NUM_SPACE_GROUPS + 1):
        rotation, translation = _general_operations(number)
        points = t.project_matrix[number] @ parameters + t.project_shift[number]  # (28, 3)
        moved = torch.einsum("mij,lj->mli", rotation, points) + translation.unsqueeze(1)
        gap = moved - points
        stays = ((gap - gap.round()).abs() < 1e-6).all(-1)  # (M, 28)
        counts[number] = stays.double().T @ _kinds(rotation).double()
    order = counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.cat([counts / 4, order.log2()], -1)


def _general_operations(number: int) -> tuple[Tensor, Tensor]:
    """Rotations (M, 3, 3) and translations (M, 3) of a space group, centring included."""
    t = tables()
    general = t.num_letters[number]
    begin = t.offset[number, general]
    operations = slice(begin, begin + t.multiplicity[number, general])
    return t.rotations[operations], t.translations[operations]


def _kinds(rotation: Tensor) -> Tensor:
    """(M, 10) one-hot kind of each rotation matrix (M, 3, 3)."""
    determinant = torch.linalg.det(rotation).round()
    trace = rotation.diagonal(dim1=-2, dim2=-1).sum(-1).round()
    return torch.stack([(determinant == d) & (trace == s) for d, s in _ROTATION_KINDS], -1).float()
