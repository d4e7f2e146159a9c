"""Write cfrl/assets/letter_maps.json: how other origins and axes of a space group permute its Wyckoff letters.

For each group moyo gives the Euclidean normaliser of a crystal that occupies every position once (and the general
one four times, so that it has no further symmetry): `{"225": ["abcdefghijkl", "bacdefgihjkl"], ...}`, where the
i-th character is the new letter of position i. Groups whose letters never change are left out.

    python scripts/make_letter_maps.py
"""

import json
from pathlib import Path

import torch
from moyopy import Cell, MoyoDataset

from cfrl import symmetry
from cfrl.crystal import CrystalBatch

TARGET = Path(symmetry.__file__).parent / "assets" / "letter_maps.json"


def letter_maps(space_group: int) -> list[str]:
    """Every permutation of the letters, the identity included, sorted."""
    last = int(symmetry.tables().num_letters[space_group])
    wyckoff = torch.tensor([[*range(1, last + 1), last, last, last]])
    sites = wyckoff.shape[1]
    generator = torch.Generator().manual_seed(0)
    group = torch.tensor([space_group])
    lattice = torch.tensor([[20.3, 23.1, 27.7, 83.0, 97.0, 101.0]], dtype=torch.float64)
    crystal = CrystalBatch(
        group,
        wyckoff,
        torch.arange(1, sites + 1)[None],
        torch.rand(1, sites, 3, generator=generator, dtype=torch.float64),
        symmetry.constrain_lattice(group, lattice),
    )
    frac_coords, numbers, _, _ = crystal.atoms()
    cell = Cell(crystal.lattice_matrix()[0].tolist(), frac_coords.tolist(), numbers.tolist())
    found = MoyoDataset(cell, symprec=1e-4)
    assert found.number == space_group, f"made a crystal of group {space_group}, moyo found {found.number}"
    normalizer = found.normalizer_wyckoff_positions()
    permutations = set()
    for _, positions in normalizer.coset_representatives:
        new = {old.letter: p.letter for old, p in zip(normalizer.wyckoffs, positions, strict=True)}
        permutations.add("".join(new[symmetry.letter_name(i)] for i in range(1, last + 1)))
    return sorted(permutations)


if __name__ == "__main__":
    maps = {group: letter_maps(group) for group in range(1, symmetry.NUM_SPACE_GROUPS + 1)}
    text = json.dumps({str(group): m for group, m in maps.items() if len(m) > 1}, indent=0)
    TARGET.write_text(text + "\n", encoding="utf-8")
