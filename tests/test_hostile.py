"""Files that are broken or made to harm: each is refused in one line that names it, soon, and with little memory."""

import gzip
import os
import pickle
import re
import resource
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from pymatgen.core import Lattice, Structure
from safetensors.torch import load_file, save_file

from cfrl.config import DataConfig, SampleConfig, resolve
from cfrl.crystals.crystal import CrystalBatch
from cfrl.errors import UserError
from cfrl.io import datasets as data
from cfrl.io import readers, storage
from cfrl.io.formats.entry import Unusable
from cfrl.model.files import load_model
from cfrl.model.published import read_checkpoint
from cfrl.runs.folder import RunFolder
from cfrl.stability.hull import ReferenceHull
from cfrl.untrusted import read_json
from tests.tiny import base_model

ONE = DataConfig(workers=1)
CIF = """data_x
_symmetry_space_group_name_H-M 'P 1'
{parameters}
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_Int_Tables_number 1
loop_
 _symmetry_equiv_pos_site_id
 _symmetry_equiv_pos_as_xyz
  1 'x, y, z'
loop_
 _atom_site_type_symbol
 _atom_site_label
 _atom_site_symmetry_multiplicity
 _atom_site_fract_x
 _atom_site_fract_y
 _atom_site_fract_z
 _atom_site_occupancy
{atoms}
"""
ATOM = "  Na  Na0  1  0.1  0.2  0.3  1"
LENGTHS = [f"_cell_length_{axis} {value}" for axis, value in zip("abc", (4, 5, 6), strict=True)]


def cif(parameters: list[str] = LENGTHS, atoms: str = ATOM) -> str:
    return CIF.format(parameters="\n".join(parameters), atoms=atoms)


def refusal(path: Path, config: DataConfig = ONE) -> str:
    """The one line that an import says of a file, or the reason why its only row was dropped."""
    told = None
    try:
        imported = data.read_files([str(path)], config)
    except UserError as error:
        told = str(error)
    if told is None:
        assert len(imported.crystals) == 0
        return imported.dropped[0].reason
    assert len(told.splitlines()) == 1
    assert path.name in told
    return told


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    structures = [
        Structure.from_spacegroup("Fm-3m", Lattice.cubic(a), ["Na", "Cl"], [[0] * 3, [0.5] * 3]) for a in (5, 6)
    ]
    storage.write_crystals(tmp_path / "edited.h5", CrystalBatch.from_structures(structures))
    return tmp_path / "edited.h5"


# ---- weights -----------------------------------------------------------------------------------------------------


class EvilType:
    """A dtype whose state makes object pointers of the file's bytes."""

    def __reduce__(self):
        return np.dtype, ("f8", False, True), (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 63)


class Array:
    def __init__(self, kind, shape=(1,), bytes_=b"A" * 8):
        self.state = (1, shape, kind, False, bytes_)

    def __reduce__(self):
        return np.core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), self.state


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("array", "message"),
    [
        (Array(EvilType()), "not of plain numbers"),
        (Array(np.dtype("O")), "not of plain numbers"),
        (Array(np.dtype("f8"), (10**12,)), "its bytes do not fill"),
        (Array(np.dtype("f8"), (10**9, 0), b""), "its bytes do not fill"),
        (Array(np.dtype("f8"), (1,), np.float64(np.nan).tobytes()), "holds NaN or infinity"),
    ],
    ids=["pointers", "objects", "more than it holds", "zero strides", "NaN"],
)
def test_arrays_in_pickles_are_plain_numbers(tmp_path, array, message):
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"params": {"linear": {"w": array}}}))
    with pytest.raises(UserError, match=rf"bad\.pkl: .*{message}"):
        read_checkpoint(tmp_path / "bad.pkl")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    path = base_model(tmp_path / "model.safetensors")
    header, tensors = _header(path), load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[name][0, 0] = value
    save_file(tensors, path, header)
    with pytest.raises(UserError, match=rf"model\.safetensors: {name} holds NaN or infinity"):
        load_model(path)


def test_a_checkpoint_that_is_not_finite_is_refused(tmp_path):
    run = RunFolder.create("sample", "x", SampleConfig(), tmp_path)
    torch.save({"model": {"w": torch.tensor([1.0, torch.nan])}, "step": 1}, run.path / "checkpoint.pt")
    with pytest.raises(UserError, match=r"checkpoint\.pt: model\.w holds NaN"):
        run.load_checkpoint()


def _header(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        return file.metadata()


# ---- HDF5 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("space_group", 0, "space group"),
        ("space_group", 231, "space group"),
        ("species", 200, "atomic number"),
        ("lattice", np.nan, "cell"),
        ("frac_coords", np.inf, "coordinate"),
        ("split", 9, "split"),
    ],
)
def test_edited_numbers_are_dropped_on_import_and_refused_on_use(dataset, name, value, message):
    with h5py.File(dataset, "r+") as file:
        (found,) = [file[place] for place in _datasets(file) if place.rpartition("/")[2] == name]
        found[(-1, *(0,) * (found.ndim - 1))] = value  # sites lie flat, the last ones are of the second crystal
    with pytest.raises(UserError, match=rf"edited\.h5: row 2: .*{message}"):
        storage.read_crystals(dataset)
    imported = data.read_files([str(dataset)], ONE)
    assert [(row.row, message in row.reason) for row in imported.dropped] == [(2, True)]
    assert len(imported.crystals) == 1


def _datasets(file: h5py.File) -> list[str]:
    found: list[str] = []
    file.visititems(lambda place, item: found.append(place) if isinstance(item, h5py.Dataset) else None)
    return found


@pytest.mark.parametrize("way", ["external", "soft", "elsewhere", "virtual", "claims"])
def test_hdf5_that_leads_elsewhere_or_claims_too_much_is_refused(dataset, tmp_path, way):
    (tmp_path / "secret").write_bytes(bytes(1000))
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["x"] = np.zeros(2)
    with h5py.File(dataset, "r+") as file:
        place = next(place for place in _datasets(file) if place.endswith("space_group"))
        kind, shape = file[place].dtype, file[place].shape
        del file[place]
        if way == "external":
            file.create_dataset(place, shape, kind, external=[(str(tmp_path / "secret"), 0, 1000)])
        elif way == "soft":
            file[place] = h5py.SoftLink("/somewhere")
        elif way == "elsewhere":
            file[place] = h5py.ExternalLink("other.h5", "/x")
        elif way == "virtual":
            layout = h5py.VirtualLayout(shape, kind)
            layout[:] = h5py.VirtualSource("other.h5", "x", shape)
            file.create_virtual_dataset(place, layout)
        else:
            file.create_dataset(place, (10**12,), kind, chunks=(1 << 16,), compression="gzip")
    message = "claims more data" if way == "claims" else "is a link|in another file"
    with pytest.raises(UserError, match=rf"edited\.h5: .*({message})"):
        storage.read_crystals(dataset)


def test_files_cut_anywhere_are_told(dataset, tmp_path):
    whole = dataset.read_bytes()
    model = base_model(tmp_path / "model.safetensors").read_bytes()
    for part in (0, 7, 100, 0.3, 0.9):
        for name, content, read in (
            ("cut.h5", whole, storage.read_crystals),
            ("cut.h5", whole, ReferenceHull.load),
            ("cut.safetensors", model, load_model),
        ):
            path = tmp_path / name
            path.write_bytes(content[: part if isinstance(part, int) else int(part * len(content))])
            with pytest.raises(UserError) as caught:
                read(path)
            assert name in str(caught.value)
            assert len(str(caught.value).splitlines()) == 1


def test_a_header_longer_than_the_file(tmp_path):
    (tmp_path / "a.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match=r"a\.safetensors"):
        load_model(tmp_path / "a.safetensors")


# ---- text --------------------------------------------------------------------------------------------------------


def test_deep_nesting_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("deep.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"deep\.json"):
        read_json("deep.json")
    Path("cfrl.toml").write_text("[sample]\nn = " + "[" * 100_000)
    with pytest.raises(UserError, match=r"cfrl\.toml: cannot be read as TOML"):
        resolve(SampleConfig)


def test_cell_parameters_are_read_by_name():
    """In the order c, b, a; the fast path and pymatgen agree."""
    for order in (LENGTHS, LENGTHS[::-1], [LENGTHS[1], LENGTHS[2], LENGTHS[0]]):
        cell = readers.parse("cif", cif(order))
        assert np.linalg.norm(cell.lattice, axis=1) == pytest.approx([4, 5, 6])


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_cell_without_all_its_parameters_is_refused(missing):
    with pytest.raises(Unusable, match="unparsable"):
        readers.parse("cif", cif([line for i, line in enumerate(LENGTHS) if i != missing]))


def test_more_atoms_than_a_crystal_can_have(tmp_path):
    points = np.random.default_rng(0).random((12_000, 3))
    atoms = "\n".join(f"  Na  Na{i}  1  {x:.5f}  {y:.5f}  {z:.5f}  1" for i, (x, y, z) in enumerate(points))
    (tmp_path / "many.cif").write_text(cif([f"_cell_length_{axis} 90" for axis in "abc"], atoms))
    assert "too many atoms" in refusal(tmp_path / "many.cif")


@pytest.mark.parametrize("count", ["999999999", "5000"])
def test_a_count_of_atoms_that_is_not_true(tmp_path, count):
    (tmp_path / "a.extxyz").write_text(
        f'{count}\nLattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3\nNa 0 0 0\n'
    )
    assert "too many atoms" in refusal(tmp_path / "a.extxyz")


@pytest.mark.parametrize("lattice", ["9000 0 0 0 0.02 0 0 0 0.02", "4 0 0 4.0000001 0.0000001 0 0 0 4"])
def test_needles_and_plates_end(tmp_path, lattice):
    """moyo may hang or abort on them; that costs a row, and some seconds."""
    atoms = "\n".join(f"Na {x:.4f} 0.001 0.002" for x in np.linspace(0, 3.5, 5))
    (tmp_path / "a.extxyz").write_text(f'5\nLattice="{lattice}" Properties=species:S:1:pos:R:3\n{atoms}\n')
    start = time.monotonic()
    assert refusal(tmp_path / "a.extxyz")
    assert time.monotonic() - start < 60


# ---- what is no file, or unfolds without end -----------------------------------------------------------------------


def test_devices_and_pipes_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.cif")
    os.symlink("/dev/zero", tmp_path / "zero.cif")
    os.symlink("/dev/zero", tmp_path / "zero.h5")
    for name in ("pipe.cif", "zero.cif", "zero.h5"):
        assert "is a device or pipe" in refusal(tmp_path / name)
    with pytest.raises(UserError, match="is a device or pipe"):
        read_json("/dev/zero")


@pytest.mark.parametrize("kind", ["gz", "zip"])
def test_a_bomb_is_refused_with_the_setting_that_allows_more(tmp_path, kind):
    path = tmp_path / f"bomb.csv.{kind}" if kind == "gz" else tmp_path / "bomb.zip"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if kind == "gz":
        with gzip.open(path, "wb") as file:
            file.writelines([b"cif\n"] + [b" " * (1 << 20)] * 200)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("a.csv", b"cif\n" + b" " * (200 << 20))
    told = refusal(path)
    assert re.search(r"unfolds into more than .* raise max_ratio = 200|larger than field limit", told)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 1000
    small = replace(ONE, max_file_gb=0.001)
    assert "raise max_file_gb" in refusal(path, small)
