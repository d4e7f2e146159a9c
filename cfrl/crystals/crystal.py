"""CrystalBatch: the one data type that every stage passes on.

A crystal is its space group, its symmetry-inequivalent sites (Wyckoff letter, element, fractional coordinate of the
representative) and its conventional cell. This file slices, joins and measures such batches. Other files of the room do
the rest: symmetry.py the work on tensors, canonical.py other descriptions of a crystal, conversion.py the way to and
from pymatgen, display.py what a notebook shows; files are read and written in cfrl/io.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from cfrl.crystals import canonical, symmetry
from cfrl.crystals.analysis import MAX_SITES
from cfrl.crystals.elements import COVALENT_RADII, FORMULA_RANK, MASSES, SYMBOLS
from cfrl.crystals.wyckoff import normalizer_tables

if TYPE_CHECKING:
    from ase import Atoms
    from pymatgen.core import Structure

DALTON_PER_CUBIC_ANGSTROM = 1.66053906660  # in g/cm^3
MIN_VOLUME_PER_ATOM = 0.1  # angstrom^3; below it a cell is degenerate, not dense
_PAIRS_PER_CHUNK = 200_000  # bounds the memory of shortest_distances
_SAME_CELL = 13  # of the 27 images of an atom
_NAMED = 6  # properties that a repr lists


@dataclass
class CrystalBatch:
    """A batch of n crystals with up to s sites, padded at the end.

    space_group (n,) int64: 1..230.
    wyckoff (n, s) int64: 1 = 'a', ..., 26 = 'z', 27 = 'A'; 0 = empty.
    species (n, s) int64: atomic numbers; 0 = empty.
    frac_coords (n, s, 3): the representative of each orbit, on the first coordinate triplet of its Wyckoff
        position; 0 where empty.
    lattice (n, 6): a, b, c (angstrom), alpha, beta, gamma (degrees) of the conventional cell.
    ids: n names, or None.
    properties: name -> (n,) float64, NaN = unknown.

    Sites are ordered by Wyckoff letter, then x, y, z. Several orbits may share a letter.
    """

    space_group: Tensor
    wyckoff: Tensor
    species: Tensor
    frac_coords: Tensor
    lattice: Tensor
    ids: list[str] | None = None
    properties: dict[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        shown = [f"{f} ({g})" for f, g in zip(self[:3].formulas(), self.space_group[:3].tolist(), strict=True)]
        shown += ["..."] if len(self) > len(shown) else []
        names = [*self.properties][:_NAMED] + (["..."] if len(self.properties) > _NAMED else [])
        known = f"; {', '.join(names)}" if names else ""
        return f"CrystalBatch({len(self)} crystal{'s' * (len(self) != 1)}: {', '.join(shown)}{known})"

    def _repr_html_(self) -> str:
        """For notebooks: a table, the first structures drawn."""
        from cfrl.crystals import display

        return display.html(self)

    def __post_init__(self) -> None:
        n, s = self.wyckoff.shape
        shapes = {
            "space_group": (n,),
            "species": (n, s),
            "frac_coords": (n, s, 3),
            "lattice": (n, 6),
        }
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has shape {tuple(getattr(self, name).shape)}, expected {shape}")
        if self.ids is not None and len(self.ids) != n:
            raise ValueError(f"{len(self.ids)} ids for {n} crystals")
        for name, values in self.properties.items():
            if values.shape != (n,):
                raise ValueError(f"property {name} has shape {tuple(values.shape)}, expected {(n,)}")

    # ---- batch ----

    def __len__(self) -> int:
        return len(self.space_group)

    def __getitem__(self, index: int | slice | Tensor | np.ndarray | Sequence[int]) -> CrystalBatch:
        """Rows by slice, index or mask; an integer gives a batch of one."""
        if isinstance(index, (int, np.integer)):
            index = range(len(self))[index]  # raises IndexError, so that iteration ends
            index = slice(index, index + 1)
        if not isinstance(index, slice):
            index = index.copy() if isinstance(index, np.ndarray) else index  # it may be read-only, or run backwards
            index = torch.as_tensor(index, device=self.device)
            index = index if index.dtype == torch.bool else index.long()
        ids = None if self.ids is None else np.array(self.ids, dtype=object)
        if ids is not None:
            ids = ids[index if isinstance(index, slice) else index.cpu().numpy()].tolist()
        return self._map(lambda tensor: tensor[index], ids)

    def _map(self, function: Callable[[Tensor], Tensor], ids: list[str] | None) -> CrystalBatch:
        """The same function on every tensor, properties included."""
        return CrystalBatch(
            function(self.space_group),
            function(self.wyckoff),
            function(self.species),
            function(self.frac_coords),
            function(self.lattice),
            ids,
            {name: function(values) for name, values in self.properties.items()},
        )

    @property
    def device(self) -> torch.device:
        return self.wyckoff.device

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> CrystalBatch:
        """Move to a device; dtype applies to coordinates and lattice (properties stay float64)."""
        moved = self._map(lambda tensor: tensor.to(device=device), self.ids)
        if dtype is None:
            return moved
        return replace(moved, frac_coords=moved.frac_coords.to(dtype), lattice=moved.lattice.to(dtype))

    def trim(self) -> CrystalBatch:
        """Without the padding that no crystal needs."""
        sites = int(self.num_sites.max()) if len(self) else 0
        return self._pad(sites)

    def _pad(self, sites: int) -> CrystalBatch:
        """With exactly this many site columns."""
        extra = sites - self.wyckoff.shape[1]
        pad = torch.nn.functional.pad
        return replace(
            self,
            wyckoff=pad(self.wyckoff, (0, extra)),
            species=pad(self.species, (0, extra)),
            frac_coords=pad(self.frac_coords, (0, 0, 0, extra)),
        )

    @staticmethod
    def cat(batches: Iterable[CrystalBatch]) -> CrystalBatch:
        """One batch after the other, padded to the longest.

        Properties that a batch lacks are NaN there; ids are kept when every batch has them.
        """
        batches = list(batches)
        if not batches:
            return CrystalBatch.empty()
        sites = max(batch.wyckoff.shape[1] for batch in batches)
        padded = [batch._pad(sites) for batch in batches]
        names = dict.fromkeys(name for batch in batches for name in batch.properties)
        unknown = [torch.full((len(batch),), torch.nan, dtype=torch.float64, device=batch.device) for batch in batches]
        has_ids = all(batch.ids is not None for batch in batches)
        return CrystalBatch(
            torch.cat([batch.space_group for batch in padded]),
            torch.cat([batch.wyckoff for batch in padded]),
            torch.cat([batch.species for batch in padded]),
            torch.cat([batch.frac_coords for batch in padded]),
            torch.cat([batch.lattice for batch in padded]),
            [name for batch in batches for name in batch.ids] if has_ids else None,
            {k: torch.cat([b.properties.get(k, nan) for b, nan in zip(batches, unknown, strict=True)]) for k in names},
        )

    @staticmethod
    def empty(sites: int = 0, dtype: torch.dtype = torch.float32) -> CrystalBatch:
        """A batch of no crystals."""
        none = torch.zeros(0, dtype=torch.long)
        return CrystalBatch(
            none,
            torch.zeros(0, sites, dtype=torch.long),
            torch.zeros(0, sites, dtype=torch.long),
            torch.zeros(0, sites, 3, dtype=dtype),
            torch.zeros(0, 6, dtype=dtype),
        )

    # ---- what a crystal is ----

    @property
    def num_sites(self) -> Tensor:
        """Symmetry-inequivalent sites, (n,)."""
        return (self.wyckoff > 0).sum(-1)

    @property
    def multiplicity(self) -> Tensor:
        """Atoms per conventional cell of each site, (n, s)."""
        return symmetry.multiplicity(self.space_group, self.wyckoff)

    @property
    def num_atoms(self) -> Tensor:
        """Atoms in the conventional cell, (n,)."""
        return self.multiplicity.sum(-1)

    def atoms(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Every atom of the conventional cells: frac_coords (N, 3); atomic number, crystal, site, each (N,)."""
        frac, crystal, site = symmetry.expand_orbits(self.space_group, self.wyckoff, self.frac_coords)
        return frac, self.species[crystal, site], crystal, site

    def lattice_matrix(self) -> Tensor:
        """Lattice vectors as rows, (n, 3, 3), angstrom."""
        return symmetry.lattice_matrix(self.lattice)

    def volumes(self) -> Tensor:
        """Volume of the conventional cell, (n,), angstrom^3."""
        return torch.linalg.det(self.lattice_matrix()).abs()

    def densities(self) -> Tensor:
        """Mass density, (n,), g/cm^3."""
        masses = torch.tensor(MASSES, dtype=self.lattice.dtype, device=self.device)
        mass = (masses[self.species] * self.multiplicity).sum(-1)
        return mass * DALTON_PER_CUBIC_ANGSTROM / self.volumes()

    def formulas(self) -> list[str]:
        """Reduced formulas in order of electronegativity, such as BaTiO3; polyanions are not grouped."""
        return [
            reduced_formula(species, counts)
            for species, counts in zip(self.species.tolist(), self.multiplicity.tolist(), strict=True)
        ]

    def shortest_distances(self) -> Tensor:
        """Shortest distance between two atoms, periodic images included, (n,), angstrom.

        Every representative against every atom of its crystal in 27 cells: exact whenever the result is
        below the smallest height of the cell, else an upper bound. Infinite for a crystal without atoms.
        """
        return self._nearest()[0]

    def closest_contacts(self) -> Tensor:
        """Smallest distance of two atoms over the sum of their covalent radii (Cordero et al. 2008), (n,).

        Exact or not as `shortest_distances`.
        """
        return self._nearest()[1]

    def site_contacts(self, site: int | Tensor) -> Tensor:
        """As `closest_contacts`, but between the atoms of one site and all; infinite where it is empty.

        Args:
            site: 0 to S - 1, the same of all crystals or (n,).
        """
        return self._nearest(site)[1]

    def _nearest(self, site: int | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What `shortest_distances` and `closest_contacts` tell; with a site, of its atoms alone."""
        frac, number, crystal, _ = self.atoms()
        radius = torch.tensor(COVALENT_RADII, device=self.device, dtype=frac.dtype)[number]
        matrix = self.lattice_matrix()
        steps = torch.tensor([-1, 0, 1], device=self.device, dtype=frac.dtype)
        images = torch.cartesian_prod(steps, steps, steps) @ matrix  # (n, 27, 3)
        squared, scaled = torch.full((2, len(self)), torch.inf, dtype=frac.dtype, device=self.device)
        for mine, theirs in zip(*(pair.split(_PAIRS_PER_CHUNK) for pair in self._pairs(site)), strict=True):
            delta = frac[theirs] - frac[mine]
            delta = torch.einsum("pi,pij->pj", delta - delta.round(), matrix[crystal[mine]])
            distance = (delta[:, None] + images[crystal[mine]]).square().sum(-1)  # (p, 27)
            distance[mine == theirs, _SAME_CELL] = torch.inf  # an atom and itself
            nearest = distance.amin(-1)
            squared.scatter_reduce_(0, crystal[mine], nearest, "amin")
            scaled.scatter_reduce_(0, crystal[mine], nearest / (radius[mine] + radius[theirs]).square(), "amin")
        return squared.sqrt(), scaled.sqrt()

    def _pairs(self, only: int | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The representative of every (or one) site with all atoms of its crystal: two lists, rows of `atoms`."""
        crystal, column = self.multiplicity.nonzero(as_tuple=True)  # one entry per site
        in_site = self.multiplicity[crystal, column]
        representative = in_site.cumsum(0) - in_site
        if only is not None:
            asked = column == torch.as_tensor(only, device=self.device).expand(len(self))[crystal]
            crystal, representative = crystal[asked], representative[asked]
        in_crystal = self.num_atoms
        site = torch.repeat_interleave(in_crystal[crystal])  # one entry per pair
        first_pair = in_crystal[crystal].cumsum(0) - in_crystal[crystal]
        first_atom = in_crystal.cumsum(0) - in_crystal
        others = (first_atom[crystal] - first_pair)[site] + torch.arange(len(site), device=self.device)
        return representative[site], others

    def possible_cells(self) -> Tensor:
        """Cells that exist in three dimensions and have room for their atoms, (n,) bool."""
        lengths, angles = self.lattice[:, :3], self.lattice[:, 3:]
        half_sum = angles.sum(-1, keepdim=True) / 2
        return (
            self.lattice.isfinite().all(-1)
            & (lengths > 0).all(-1)
            & ((angles > 0) & (angles < 180) & (angles < half_sum)).all(-1)
            & (angles.sum(-1) < 360)
            & (self.volumes() > MIN_VOLUME_PER_ATOM * self.num_atoms)
        )

    def valid(self, min_distance: float = 0.5, min_contact: float = 0.0) -> Tensor:
        """Geometrically possible, (n,) bool: existing Wyckoff positions, a real cell, no atoms too close.

        Says nothing of stability, nor of chemistry.

        Args:
            min_distance: angstrom; atoms nearer than this are too close.
            min_contact: the same, in sums of covalent radii.
        """
        occupied = self.wyckoff > 0
        sites = (occupied == (self.multiplicity > 0)).all(-1) & (occupied == (self.species > 0)).all(-1)
        good = self.possible_cells() & sites & (self.num_sites > 0) & self.frac_coords.isfinite().all(-1).all(-1)
        index = good.nonzero()[:, 0]
        distance, contact = self[index]._nearest()
        good[index] = (distance >= min_distance) & (contact >= min_contact)
        return good

    def num_descriptions(self, mirror: bool = False) -> Tensor:
        """How many ways, (n,), there are to describe each crystal by other origins and axes of its group.

        Args:
            mirror: count those of its mirror image (the same energy, the other hand) too.
        """
        t = normalizer_tables(self.device)
        return (t.count if mirror else t.proper_count)[self.space_group]

    def described_as(self, choice: Tensor) -> CrystalBatch:
        """The same crystals from other origins and axes.

        Letters, representatives, order of sites and, where axes are exchanged, the lattice change together.

        Args:
            choice: (n,) which description: 0 = as they are, ..., below `num_descriptions`.
        """
        return canonical.described_as(self, choice)

    def canonical(self) -> CrystalBatch:
        """The same crystals, each in the one of its descriptions that comes first.

        By letters, then elements, then coordinates (to 1e-3), in the order of the sites, then a, b, c; along polar axes
        only those compete whose origin is at an anchor (see canonical.py). So the input's origin and axes no longer
        matter: a model has one thing to learn where it would have several, and gives a crystal one probability.
        Triclinic and monoclinic cells are kept. Those of `from_structures` are moyo's, which do not depend on the cell
        that came in, unless their shape has more symmetry than the crystal: then they can be turned.
        """
        return canonical.canonical(self)

    # ---- to and from other libraries; conversion.py, which builds on this class, does the work ----

    @staticmethod
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
        """Find the symmetry of pymatgen structures with moyo.

        Args:
            structures: n of them.
            symprec: angstrom.
            ids, properties: n names, and name -> (n,) numbers; those of structures that are left out go with them.
            errors: "raise", or "skip": leave out structures that cannot be described (disordered, too many sites, no
                symmetry found).
            dropped: receives row -> reason of those that are left out.
            dtype: of coordinates and lattice.
            max_sites: inequivalent sites that there may be.

        Raises:
            SymmetryError: errors is "raise", and there is such a structure.
        """
        from cfrl.crystals import conversion

        return conversion.from_structures(structures, symprec, ids, properties, errors, dropped, dtype, max_sites)

    def to_structures(self) -> list[Structure]:
        """Conventional cells as pymatgen structures; `structure.properties` holds space group and id."""
        from cfrl.crystals import conversion

        return conversion.to_structures(self)

    @staticmethod
    def from_atoms(atoms: Sequence[Atoms], symprec: float = 0.01, **kwargs: Any) -> CrystalBatch:
        """As `from_structures`, for periodic ASE atoms."""
        from pymatgen.io.ase import AseAtomsAdaptor

        return CrystalBatch.from_structures([AseAtomsAdaptor.get_structure(a) for a in atoms], symprec, **kwargs)

    def to_atoms(self) -> list[Atoms]:
        """Conventional cells as ASE atoms."""
        from cfrl.crystals import conversion

        return conversion.to_atoms(self)


def reduced_formula(species: list[int], counts: list[int]) -> str:
    """Such as BaTiO3, from atomic numbers and how many atoms each stands for; zeros are left out."""
    amounts: Counter[str] = Counter()
    for number, count in zip(species, counts, strict=True):
        if number and count:
            amounts[SYMBOLS[number]] += count
    divisor = gcd(*amounts.values()) or 1
    parts = sorted(amounts.items(), key=lambda item: FORMULA_RANK[item[0]])
    return "".join(f"{symbol}{amount // divisor if amount != divisor else ''}" for symbol, amount in parts)
