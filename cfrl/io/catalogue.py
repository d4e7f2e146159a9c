"""Datasets by name: where their HDF5 files lie, and the three that are always there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cfrl import __version__
from cfrl.assets import ASSETS
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.structure_types import StructureTypes
from cfrl.errors import UserError, nearest
from cfrl.files import cache_folder
from cfrl.io import fetch, storage
from cfrl.io.options import ImportOptions
from cfrl.io.splits import assign_splits
from cfrl.tables import distinct

PROTOTYPES = "prototypes"  # pymatgen's
STRUCTURE_TYPES = "structure-types"  # of the crystals that the embedded generator learnt from
GROWN = "grown"  # near the hull and unknown: what `cfrl data grow` has made for this package (assets/grown.md)

HDF5 = (".h5", ".hdf5")


def dataset_path(name: str | Path) -> Path:
    """The HDF5 file of a dataset: "prototypes", "structure-types", "grown", a fetched name, or an `.h5` file itself.

    Raises:
        UserError: there is none; a structure file has to be imported first.
    """
    path = Path(name)
    if str(name) == GROWN and not path.exists():
        return ASSETS / "grown.h5"
    if str(name) in _MADE and not path.exists():
        return _made(str(name))
    if path.suffix in HDF5:
        return path
    if path.exists():
        raise UserError(f"{name}: is not a dataset yet; make one of it: cfrl data import {name} -o {path.stem}.h5")
    if path.suffix or len(path.parts) > 1:
        raise UserError(f"{name}: no such file")
    prepared = prepared_path(str(name))
    if prepared.exists():
        return prepared
    if str(name) in fetch.SOURCES:
        raise UserError(f"the dataset '{name}' is not on this machine; get it with: cfrl data fetch {name}")
    known = [*_MADE, GROWN, *sorted(fetch.SOURCES)]
    raise UserError(
        f"no dataset named '{name}' is known or fetched{nearest(str(name), known)} (known: {', '.join(known)})"
    )


def is_dataset(name: str | Path) -> bool:
    """Whether `dataset_path` knows what this is; else it is a file or folder of structures."""
    return Path(name).suffix in HDF5 or not Path(name).exists()


def at_hand(name: str | Path) -> bool:
    """Whether a dataset of this name, or such structures, are on this machine."""
    try:
        return not is_dataset(name) or dataset_path(name).is_file()
    except UserError:
        return False


def prepared_path(name: str) -> Path:
    return cache_folder() / f"{name}.h5"


def _made(name: str) -> Path:
    """The file of one of `_MADE` in the cache folder, written at the first call."""
    path = prepared_path(f"{name}-{__version__}")
    if path.exists():
        try:
            storage.describe(path)
            return path
        except UserError:  # damaged, or of an older schema: made again below
            pass
    crystals, columns, source = _MADE[name]()
    split = assign_splits(crystals, ImportOptions().validation)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_crystals(path, crystals, columns=columns, split=split, attrs={"source": source})
    except (OSError, UserError) as error:
        raise UserError(f"{path}: cannot be written; set CFRL_CACHE to a folder of yours") from error
    return path


def _prototypes() -> tuple[CrystalBatch, dict[str, list[str]], str]:
    """pymatgen's AFLOW prototypes."""
    from pymatgen.analysis.prototypes import AFLOW_PROTOTYPE_LIBRARY

    structures = [prototype["snl"].structure for prototype in AFLOW_PROTOTYPE_LIBRARY]
    ids = distinct((prototype["tags"]["aflow"] for prototype in AFLOW_PROTOTYPE_LIBRARY), "-")
    dropped: dict[int, str] = {}
    crystals = CrystalBatch.from_structures(structures, ids=ids, errors="skip", dropped=dropped)
    tags = [prototype["tags"] for i, prototype in enumerate(AFLOW_PROTOTYPE_LIBRARY) if i not in dropped]
    columns = {name: [str(tag[name]) for tag in tags] for name in ("mineral", "pearson", "strukturbericht")}
    return crystals, columns, "pymatgen, AFLOW prototypes"


def _structure_types() -> tuple[CrystalBatch, dict[str, list[str]], str]:
    """25,844 known crystals: of each its letters and elements, positions and cell from another of its type."""
    crystals = StructureTypes.embedded().sketches()
    return crystals, {}, "structure types of Materials Project, Alexandria, OQMD, JARVIS"


_MADE: dict[str, Callable[[], tuple[CrystalBatch, dict[str, list[str]], str]]] = {
    PROTOTYPES: _prototypes,
    STRUCTURE_TYPES: _structure_types,
}
