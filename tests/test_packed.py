"""Crystals in little memory: the same ones come out."""

import torch

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.packed import PackedCrystals
from cfrl.io.datasets import load_dataset


def same(one: CrystalBatch, two: CrystalBatch) -> bool:
    names = ("space_group", "wyckoff", "species", "frac_coords", "lattice")
    pairs = [(getattr(one, name), getattr(two, name)) for name in names]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def test_rows_come_back_in_any_order_without_needless_padding():
    crystals = load_dataset("prototypes")
    packed = PackedCrystals([crystals[:10], crystals[10:11], crystals[:0], crystals[11:]])
    assert len(packed) == len(crystals)
    rows = torch.randperm(len(crystals), generator=torch.Generator().manual_seed(0))
    for some in (rows, rows[:1], rows[:0], torch.tensor([3, 3, 0])):
        wanted = crystals[some]
        assert same(packed[some], wanted.trim())
    back = list(packed.batches(100))
    assert [len(batch) for batch in back[:-1]] == [100] * (len(crystals) // 100)
    assert same(CrystalBatch.cat(back), crystals.trim())
    assert PackedCrystals.of(packed) is packed


def test_they_need_little_memory():
    crystals = load_dataset("prototypes").canonical()
    packed = PackedCrystals([crystals])
    small = sum(x.nbytes for x in vars(packed).values())
    large = sum(getattr(crystals, name).nbytes for name in ("wyckoff", "species", "frac_coords", "lattice"))
    assert small / len(packed) < 150
    assert small < large / 4


def test_none():
    packed = PackedCrystals([])
    assert len(packed) == 0
    assert sum(map(len, packed.batches())) == 0
    assert len(packed[torch.arange(0)]) == 0
