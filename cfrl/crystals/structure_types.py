"""Structure types: crystals that differ in their elements, and somewhat in the cell, and in nothing else.

Most new compounds crystallise in a known type. Which type a formula takes is told by the elements that are known in it:
how readily each is replaced by the one that would take its place (see `substitution`). That is how Hautier et al.
(Inorg. Chem. 50, 656 (2011)) predict compounds.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch

from cfrl.assets import ASSETS
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.substitution import rescaled

EMBEDDED = ASSETS / "structure_types.npz"  # of the crystals that the embedded generator learnt from
# What crystals of a type may differ by: sites, in (volume per atom)^(1/3); lengths, relative at equal volume; degrees.
SITES, LENGTHS, ANGLES = 0.2, 0.1, 5.0
_ARRAYS = ("space_group", "wyckoff", "species", "frac_coords", "lattice")


@dataclass(frozen=True)
class StructureTypes:
    """T types and K crystals known in them.

    crystals: (T,) an example of each, in its canonical description.
    known: (K, e) atomic numbers of the elements of each known crystal, in the order of `kinds`; 0: none.
    type_of: (K,) the type of each known crystal.
    """

    crystals: CrystalBatch
    known: np.ndarray
    type_of: np.ndarray

    def __len__(self) -> int:
        return len(self.crystals)

    @classmethod
    def of(cls, crystals: CrystalBatch) -> StructureTypes:
        """The types of known crystals; the first of each is the example."""
        crystals = crystals.canonical()
        kinds = _kinds(crystals.species.numpy())
        known = np.zeros((len(crystals), kinds.max(initial=-1) + 1), dtype=np.uint8)
        rows, sites = np.nonzero(kinds >= 0)
        known[rows, kinds[rows, sites]] = crystals.species.numpy()[rows, sites]
        first = np.arange(len(crystals))  # of the type of each crystal
        alike = defaultdict(list)
        for row, key in enumerate(zip(crystals.space_group.tolist(), crystals.wyckoff.tolist(), kinds, strict=True)):
            alike[key[0], tuple(key[1]), key[2].tobytes()].append(row)
        for rows in map(np.array, alike.values()):
            for example, members in _clusters(crystals[rows]):
                first[rows[members]] = rows[example]
        examples, type_of = np.unique(first, return_inverse=True)
        return cls(replace(crystals[examples], properties={}, ids=None), known, type_of)

    @classmethod
    @cache
    def embedded(cls) -> StructureTypes:
        """Those of the crystals that the embedded generator learnt from."""
        return cls.read(EMBEDDED)

    @classmethod
    def read(cls, path: Path) -> StructureTypes:
        """From a file of `write`."""
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        known, type_of = arrays.pop("known"), arrays.pop("type_of")
        return cls(CrystalBatch(**{name: torch.from_numpy(array) for name, array in arrays.items()}), known, type_of)

    def write(self, path: Path) -> None:
        """As a compressed .npz file."""
        arrays = {name: getattr(self.crystals, name).numpy() for name in _ARRAYS}
        np.savez_compressed(path, **arrays, known=self.known, type_of=self.type_of.astype(np.uint16))

    def sketches(self) -> CrystalBatch:
        """(K,) the known crystals, as far as is known of them: the example of the type with the crystal's own elements.

        Letters and elements are the crystal's, positions and cell nearly so.
        """
        examples = self.crystals[self.type_of.astype(np.int64)]
        kinds = self.kinds[self.type_of]
        species = np.where(kinds >= 0, np.take_along_axis(self.known, kinds.clip(min=0), 1), 0)
        crystals = rescaled(examples, torch.from_numpy(species).to(examples.species))
        return replace(crystals, ids=[f"{kind}-{row}" for row, kind in enumerate(self.type_of.tolist())])

    @cached_property
    def kinds(self) -> np.ndarray:
        """(T, s): which sites share an element: 0, 1, ... in the order of the sites; -1: no site."""
        return _kinds(self.crystals.species.numpy())

    @cached_property
    def amounts(self) -> np.ndarray:
        """(T, e): atoms of each kind, least whole numbers; 0: no such kind."""
        amounts = np.zeros((len(self), self.known.shape[1]), dtype=np.int64)
        rows, sites = np.nonzero(self.kinds >= 0)
        np.add.at(amounts, (rows, self.kinds[rows, sites]), self.crystals.multiplicity.numpy()[rows, sites])
        return amounts // np.gcd.reduce(amounts, axis=1, keepdims=True)

    def with_formula(
        self, elements: Sequence[int], amounts: Sequence[int], table: np.ndarray
    ) -> tuple[CrystalBatch, np.ndarray]:
        """Crystals of a formula, of all types that can hold it, elements in every order; and how likely each is.

        That is the sum over the crystals known in the type of the probability that each element of it is replaced by
        the one in its place, up to a factor.

        Args:
            elements, amounts: (e,) of the formula, least whole numbers.
            table: (119, 119), see `substitution.replacement_table`.
        """
        rows, species, weights = [np.zeros(0, dtype=np.int64)], [np.zeros((0, self.kinds.shape[1]))], [np.zeros(0)]
        for row, order, weight in self._placed(np.array(elements), np.array(amounts), table):
            rows.append(row)
            species.append(np.where(self.kinds[row] >= 0, order[self.kinds[row]], 0))
            weights.append(weight)
        parents = self.crystals[np.concatenate(rows)]
        placed = torch.from_numpy(np.concatenate(species)).to(parents.species)
        return rescaled(parents, placed).canonical(), np.concatenate(weights)

    def _placed(
        self, elements: np.ndarray, amounts: np.ndarray, table: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each order of the elements: types that hold it so, the elements by kind, how likely each is."""
        count = len(elements)
        if count > self.amounts.shape[1]:
            return
        fits = (np.sort(self.amounts, 1)[:, -count:] == np.sort(amounts)).all(1) & ((self.amounts > 0).sum(1) == count)
        types, members = fits.nonzero()[0], fits[self.type_of].nonzero()[0]
        for order in map(list, itertools.permutations(range(count))):
            rows = types[(self.amounts[types, :count] == amounts[order]).all(1)]
            if len(rows):
                likely = table[self.known[members, :count], elements[order]].prod(1)
                weights = np.bincount(self.type_of[members], likely, len(self))
                yield rows, elements[order], weights[rows]


def _kinds(species: np.ndarray) -> np.ndarray:
    kinds = np.full(species.shape, -1)
    for row, numbers in enumerate(species.tolist()):
        seen: dict[int, int] = {}
        for site, number in enumerate(numbers):
            if number:
                kinds[row, site] = seen.setdefault(number, len(seen))
    return kinds


def _clusters(crystals: CrystalBatch) -> Iterator[tuple[int, np.ndarray]]:
    """Rows of those within the tolerances of the first that is in no cluster yet: (it, all of them)."""
    size = crystals.volumes() ** (1 / 3)
    unit = size / crystals.num_atoms ** (1 / 3)
    lengths, angles = crystals.lattice[:, :3], crystals.lattice[:, 3:]
    shape, left = lengths.log() - size.log()[:, None], torch.ones(len(crystals), dtype=torch.bool)
    while left.any():
        first = int(left.nonzero()[0, 0])
        moved = crystals.frac_coords - crystals.frac_coords[first]
        moved = ((moved - moved.round()) * lengths[first]).norm(dim=-1).amax(1) / unit[first]
        near = (moved < SITES) & ((shape - shape[first]).abs().amax(1) < LENGTHS)
        near &= ((angles - angles[first]).abs().amax(1) < ANGLES) & left
        near[first] = True
        left &= ~near
        yield first, near.nonzero()[:, 0].numpy()
