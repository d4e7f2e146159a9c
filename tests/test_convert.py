"""`cfrl convert`: whatever goes out comes back the same."""

from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from cfrl.commands.convert import convert
from cfrl.errors import UserError
from cfrl.io.datasets import load_dataset, read_structures
from cfrl.io.storage import write_crystals


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    crystals = load_dataset("prototypes")
    path = tmp_path_factory.mktemp("source") / "some.h5"
    write_crystals(path, crystals[crystals.num_atoms <= 24][:12])
    return path


def densities(path):
    structures, ids, _, dropped = read_structures(str(path))
    assert not dropped
    return {name: (s.composition.reduced_formula, s.volume / len(s)) for name, s in zip(ids, structures, strict=True)}


@pytest.mark.parametrize("ending", ["a.cif", "a.extxyz", "a.json", "a.csv", "a.zip", "a.h5", "folder"])
@pytest.mark.parametrize("cell", ["as-is", "primitive", "conventional"])
def test_there_and_back(source, tmp_path, ending, cell):
    """Same crystals, in any cell: formula and volume per atom by name."""
    path = convert(str(source), str(tmp_path / ending), cell)
    convert(str(path), str(tmp_path / "back.csv"))
    before, after = densities(source), densities(tmp_path / "back.csv")
    if ending in ("a.zip", "folder"):  # CIFs there are named after their crystals
        after = {name.removesuffix("-1"): value for name, value in after.items()}
    if ending == "a.cif":
        after = dict(zip(before, after.values(), strict=True))
    assert [formula for formula, _ in after.values()] == [before[name][0] for name in after] or ending == "folder"
    for name, (_, volume) in after.items():
        assert volume == pytest.approx(before[name][1], rel=2e-3)


def test_primitive_cells_have_fewer_atoms(source, tmp_path):
    sizes = {}
    for cell in ("primitive", "conventional"):
        structures, *_ = read_structures(str(convert(str(source), str(tmp_path / f"{cell}.json"), cell)))
        sizes[cell] = np.array([len(structure) for structure in structures])
    ratio = sizes["conventional"] / sizes["primitive"]
    assert set(ratio.tolist()) <= {1.0, 2.0, 3.0, 4.0}
    assert ratio.max() == 2


def test_cifs_name_their_symmetry(source, tmp_path):
    text = convert(str(source), str(tmp_path / "a.cif")).read_text()
    numbers = [int(line.split()[1]) for line in text.splitlines() if "_symmetry_Int_Tables_number" in line]
    assert numbers == load_dataset(source).space_group.tolist()


def test_what_is_lost_is_said(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "broken.cif").write_text("data_x\n_cell_length_a 1\n")
    convert(str(load_one(tmp_path)), str(tmp_path / "in" / "good.cif"))
    said = StringIO()
    convert(str(tmp_path / "in"), str(tmp_path / "out.json"), console=Console(file=said, width=200))
    assert "1 crystals" in said.getvalue()
    assert "left out: broken" in said.getvalue()


def load_one(folder):
    write_crystals(folder / "one.h5", load_dataset("prototypes")[:1])
    return folder / "one.h5"


def test_bad_outputs(source, tmp_path):
    with pytest.raises(UserError, match=r"cannot tell the format from '\.xyzz'"):
        convert(str(source), str(tmp_path / "a.xyzz"))
    with pytest.raises(UserError, match=r"a \.vasp file holds one crystal, and there are 12"):
        convert(str(source), str(tmp_path / "a.vasp"))
    convert(str(load_one(tmp_path)), str(tmp_path / "one.vasp"))
    assert len(read_structures(str(tmp_path / "one.vasp"))[0]) == 1
