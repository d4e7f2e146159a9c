"""Many crystals in little memory: a million for training take some 150 MB, where a `CrystalBatch` takes a gigabyte."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from cfrl.crystals.crystal import CrystalBatch


class PackedCrystals:
    """n crystals, their sites end to end, letters and elements in a byte each; without ids and properties.

    space_group: (n,) uint8. counts: (n,) uint8, sites of each. Rows by index, (k,), come as a `CrystalBatch` without
    more padding than they need.
    """

    def __init__(self, batches: Iterable[CrystalBatch]) -> None:
        parts = [_packed(batch) for batch in batches] or [_packed(CrystalBatch.empty())]
        columns = (torch.cat(column) for column in zip(*parts, strict=True))
        self.space_group, self.counts, self._wyckoff, self._species, self._frac_coords, self._lattice = columns
        self._begin = self.counts.long().cumsum(0) - self.counts  # (n,)

    @classmethod
    def of(cls, crystals: CrystalBatch | PackedCrystals) -> PackedCrystals:
        """The same, or packed."""
        return crystals if isinstance(crystals, cls) else cls([crystals])

    def __len__(self) -> int:
        return len(self.space_group)

    def __getitem__(self, rows: Tensor) -> CrystalBatch:
        counts = self.counts[rows].long().unsqueeze(1)  # (k, 1)
        slot = torch.arange(int(counts.max()) if len(rows) else 0)
        there = slot < counts  # (k, s)
        sites = (self._begin[rows].unsqueeze(1) + slot)[there]

        def padded(column: Tensor) -> Tensor:
            found = column.new_zeros(*there.shape, *column.shape[1:])
            found[there] = column[sites]
            return found

        letters, elements = (padded(column).long() for column in (self._wyckoff, self._species))
        space_group, coords = self.space_group[rows].long(), padded(self._frac_coords)
        return CrystalBatch(space_group, letters, elements, coords, self._lattice[rows])

    def batches(self, size: int = 4096) -> Iterator[CrystalBatch]:
        """All of them, in their order."""
        for rows in torch.arange(len(self)).split(size):
            yield self[rows]


def _packed(crystals: CrystalBatch) -> tuple[Tensor, ...]:
    there = crystals.wyckoff > 0  # (n, s)
    return (
        crystals.space_group.byte(),
        there.sum(1).byte(),
        crystals.wyckoff[there].byte(),
        crystals.species[there].byte(),
        crystals.frac_coords[there],
        crystals.lattice,
    )
