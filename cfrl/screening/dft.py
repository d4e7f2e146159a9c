"""Inputs for DFT: a folder for each candidate, and what they are beside them; folders that replace older ones whole.

The settings are pymatgen's sets of the Materials Project, so that energies fit its hull after its corrections, or
plane waves of Quantum ESPRESSO. Whether a crystal is a metal decides the smearing: the tetrahedron method
(ISMEAR = -5) gives wrong forces for metals, so it is only for crystals that are surely insulators.
Results come back by `cfrl data import` (io/formats/vasp.py, xml.py).
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfrl.errors import UserError
from cfrl.potentials.scales import mp2020_correction
from cfrl.untrusted import one_line, read_json

if TYPE_CHECKING:
    from pymatgen.core import Structure

METAL = 0.05  # eV; a predicted gap below it is none
MP_KSPACING = 0.22  # 1/angstrom, 2 pi included: that of the Materials Project's sets for metals
FALLBACK_CUTOFFS = (90.0, 720.0)  # Ry, wave functions and density: enough for all but a few pseudopotentials
MAGNETIC = 0.5  # starting magnetisation of d and f elements, as a share of their valence electrons


@dataclass(frozen=True)
class Candidate:
    """A crystal that is worth it.

    name: of its folder. id: of its row in the table.
    gap: eV; 0: a metal; None: unknown, and treated as one where it matters.
    """

    name: str
    id: str
    structure: Structure
    gap: float | None = None


def believed_gap(structure: Structure, gap: float, spread: float = 0.0) -> float | None:
    """The gap in eV that settings may rely on: 0 for a metal, None where it is unknown or its sign is not sure.

    gap, spread: eV, mean and standard deviation of a predictor; NaN is unknown.
    """
    if all(element.is_metal for element in structure.composition) or gap < METAL:
        return 0.0
    return gap if gap - (spread if math.isfinite(spread) else 0.0) > METAL else None


@dataclass(frozen=True)
class Kind:
    """A choice of `--dft`.

    write(candidate, folder, pseudos): the files of one crystal.
    about: what it is, for the README. scale: of the energies that come back. corrected: whether MP2020 is due.
    """

    write: Callable[[Candidate, Path, dict[str, Any]], None]
    about: str
    scale: str
    corrected: bool


def read_pseudos(path: str | None) -> dict[str, Any]:
    """The table of a pseudopotential library (the JSON of SSSP), by element; {} without a path.

    Raises:
        UserError: not such a table.
    """
    table = read_json(path) if path else {}
    sound = isinstance(table, dict) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("filename"), str)
        and all(isinstance(entry.get(name), int | float) for name in ("cutoff_wfc", "cutoff_rho"))
        for entry in table.values()
    )
    if not sound or (path and not table):
        raise UserError(
            f"{path}: no table of pseudopotentials; it should be the JSON of an SSSP library: element -> filename, "
            "cutoff_wfc, cutoff_rho (Ry)"
        )
    return table


def write_inputs(candidates: Sequence[Candidate], folder: Path, kind: str, pseudos: dict[str, Any]) -> None:
    """A folder for each candidate, README.md, and inputs.json: name, id, formula, gap, correction, what went wrong.

    Args:
        candidates: crystals; one that a set cannot do (no pseudopotential) is noted, and stops no other.
        folder: exists.
        kind: a key of `KINDS`.
        pseudos: as from `read_pseudos`, for "qe".
    """
    chosen, noted = KINDS[kind], []
    for candidate in candidates:
        note = {"name": candidate.name, "id": candidate.id, "formula": candidate.structure.composition.reduced_formula}
        note |= {"band_gap": candidate.gap, "energy_scale": chosen.scale, "problem": ""}
        if chosen.corrected:
            note["mp2020_correction"] = mp2020_correction(candidate.structure)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of sets, about what is decided here: smearing, POTCARs
                chosen.write(candidate, folder / candidate.name, pseudos)
        except OSError:
            raise
        except Exception as error:  # sets raise anything for elements that they lack
            shutil.rmtree(folder / candidate.name, ignore_errors=True)
            note["problem"] = f"no inputs: {one_line(error)}"
        noted.append(note)
    if kind == "atomate2":
        (folder / "flow.py").write_text(_FLOW, encoding="utf-8")
    (folder / "inputs.json").write_text(json.dumps(noted, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_readme(kind), encoding="utf-8")


# ---- VASP ----


def _write_set(name: str, structure: Structure, folder: Path, **settings: Any) -> None:
    from pymatgen.io.vasp import sets

    inputs = getattr(sets, name)
    missing = [e.symbol for e in structure.composition if e.symbol not in inputs.CONFIG["POTCAR"]]
    if missing:
        raise ValueError(f"{name} has no POTCAR for {', '.join(missing)}")
    inputs(structure, **settings).write_input(folder, potcar_spec=True)


def _smearing(gap: float | None) -> dict[str, Any]:
    """Arguments of a set: tetrahedra, Methfessel-Paxton, or where it is not known a narrow Gaussian, right for both."""
    unknown = {"user_incar_settings": {"SIGMA": 0.05}} if gap is None else {}
    return {"auto_ismear": True, "bandgap": gap} | unknown


def _write_pbe(candidate: Candidate, folder: Path, _: dict[str, Any]) -> None:
    _write_set("MPRelaxSet", _primitive(candidate), folder, **_smearing(candidate.gap))


def _write_scan(candidate: Candidate, folder: Path, _: dict[str, Any]) -> None:
    _write_set("MPScanRelaxSet", _primitive(candidate), folder, **_smearing(candidate.gap))


def _write_dielectric(candidate: Candidate, folder: Path, _: dict[str, Any]) -> None:
    """Relaxation, and for all but metals the response to a field (DFPT), which has a cell of its own afterwards."""
    _write_pbe(candidate, folder / "relax", {})
    if candidate.gap != 0:
        tight = {"ISMEAR": 0, "SIGMA": 0.05, "EDIFF": 1e-6, "ALGO": "Normal"}
        _write_set(
            "MPStaticSet", _primitive(candidate), folder / "dielectric", lepsilon=True, user_incar_settings=tight
        )


def _write_poscar(candidate: Candidate, folder: Path, _: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    _primitive(candidate).to(folder / "POSCAR", fmt="poscar")


def _primitive(candidate: Candidate) -> Structure:
    return candidate.structure.get_primitive_structure()


# ---- Quantum ESPRESSO ----


def _write_espresso(candidate: Candidate, folder: Path, pseudos: dict[str, Any]) -> None:
    """`pw.in` of a relaxation of atoms and cell (PBE)."""
    from ase.io.espresso import write_espresso_in

    structure = _primitive(candidate)
    symbols = [element.symbol for element in structure.composition]
    missing = [symbol for symbol in symbols if pseudos and symbol not in pseudos]
    if missing:
        raise ValueError(f"no pseudopotential of {', '.join(missing)} in the table")
    named = {symbol: pseudos.get(symbol, {}).get("filename", f"{symbol}.upf") for symbol in symbols}
    cutoffs = [(pseudos[s]["cutoff_wfc"], pseudos[s]["cutoff_rho"]) if pseudos else FALLBACK_CUTOFFS for s in symbols]
    metallic = ("marzari-vanderbilt", 0.015) if candidate.gap in (0, None) else ("gaussian", 0.002)
    atoms = structure.to_ase_atoms()
    magnetic = {element.symbol for element in structure.composition if element.block in "df"}
    atoms.set_initial_magnetic_moments([MAGNETIC if symbol in magnetic else 0.0 for symbol in atoms.symbols])
    settings = {
        "control": {
            "calculation": "vc-relax",
            "prefix": candidate.name,
            "outdir": "./out",
            "pseudo_dir": "../pseudo",
            "tprnfor": True,
            "tstress": True,
            "etot_conv_thr": 1e-5 * len(atoms),  # Ry
            "forc_conv_thr": 1e-3,  # Ry/bohr
        },
        "system": {
            "ecutwfc": max(wave for wave, _ in cutoffs),
            "ecutrho": max(density for _, density in cutoffs),
            "occupations": "smearing",
            "smearing": metallic[0],
            "degauss": metallic[1],  # Ry
            "nspin": 2 if magnetic else 1,
        },
        "electrons": {"conv_thr": 1e-10 * len(atoms), "mixing_beta": 0.4},
        "ions": {},
        "cell": {"press_conv_thr": 0.5},  # kbar
    }
    folder.mkdir(parents=True)
    with (folder / "pw.in").open("w", encoding="utf-8") as file:
        spacing = MP_KSPACING / (2 * math.pi)  # ASE's have no 2 pi
        write_espresso_in(file, atoms, settings, named, kspacing=spacing, crystal_coordinates=True)


# ---- what is said of them ----

_FLOW = '''"""Relax and compute the candidates of this folder with atomate2 (pip install 'cfrl[atomate2]').

    python flow.py                     here, one after the other
    from flow import flows             a list of jobflow Flows, to be submitted (jobflow-remote, FireWorks)

Settings are the Materials Project's: PBE (+U), two relaxations and a static calculation.
"""

from pathlib import Path

from atomate2.vasp.flows.mp import MPGGADoubleRelaxStaticMaker
from jobflow import Flow, run_locally
from pymatgen.core import Structure


def flows() -> list[Flow]:
    """One flow for each folder with a POSCAR, named after it."""
    made = []
    for poscar in sorted(Path(__file__).resolve().parent.glob("*/POSCAR")):
        flow = MPGGADoubleRelaxStaticMaker().make(Structure.from_file(poscar))
        flow.name = poscar.parent.name
        made.append(flow)
    return made


if __name__ == "__main__":
    for flow in flows():
        run_locally(flow, root_dir=flow.name, create_folders=True)
'''

_PBE = "PBE (+U for oxides and fluorides of some transition metals) with the Materials Project's settings, MPRelaxSet"

KINDS = {
    "pbe": Kind(_write_pbe, f"VASP: {_PBE}.", "mp-raw", True),
    "scan": Kind(
        _write_scan,
        "VASP: r2SCAN with the Materials Project's settings, MPScanRelaxSet. Start from the WAVECAR of a PBE run.",
        "r2scan",
        False,
    ),
    "dielectric": Kind(
        _write_dielectric,
        f"VASP: {_PBE}, in relax/; then, for all but metals, the dielectric tensor by DFPT (LEPSILON) in dielectric/: "
        "copy relax/CONTCAR over dielectric/POSCAR first.",
        "mp-raw",
        True,
    ),
    "qe": Kind(
        _write_espresso,
        "Quantum ESPRESSO: `pw.x -in pw.in` relaxes atoms and cell with PBE, no +U. Pseudopotentials are looked for in "
        "pseudo/ of this folder; `--pseudos SSSP_1.3.0_PBE_efficiency.json` takes names and cutoffs from the table of "
        "that library, without it they are ELEMENT.upf, with 90 and 720 Ry. d and f elements start ferromagnetic.",
        "qe-pbe",
        False,
    ),
    "atomate2": Kind(
        _write_poscar,
        "atomate2: `python flow.py` relaxes twice and computes, with the Materials Project's settings for PBE.",
        "mp-raw",
        True,
    ),
}


def _readme(kind: str) -> str:
    chosen = KINDS[kind]
    if chosen.corrected:
        fits = (
            "Energies need the MP2020 corrections before they are held against the Materials Project's hull: "
            "`--corrections mp2020` below. `inputs.json` has what they come to with these settings, eV/atom "
            "(`mp2020_correction`)."
        )
        how, hull = "--corrections mp2020 ", "cfrl data hull --add results.h5 -o my_hull.h5\n"
    else:
        fits = (
            f"Energies are on a scale of their own ({chosen.scale}): no correction brings them to the Materials "
            "Project's PBE hull. Put them on one of known phases computed in the same way (`cfrl data hull --add "
            "results.h5 --hull phases.csv`)."
        )
        how = hull = ""
    return (
        f"# DFT inputs of `cfrl screen --dft {kind}`\n\n{chosen.about}\n\n"
        "One folder for each candidate; `inputs.json` lists them: row of the table (`id`), gap in eV that the smearing "
        "relies on (0: metal; null: unknown, so a smearing that is right for metals too), and what could not be "
        f"written.\n\n{fits}\n\n"
        f"Results, once they are there:\n\n```sh\ncfrl data import THIS_FOLDER {how}-o results.h5\n{hull}"
        "cfrl rewards train results.h5 --target band_gap -o gap.safetensors\n```\n"
    )


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """A new folder that takes the place of an old one when the block ends."""
    partial_path = path.with_name(path.name + ".partial")
    shutil.rmtree(partial_path, ignore_errors=True)
    try:
        partial_path.mkdir(parents=True)
        yield partial_path
        shutil.rmtree(path, ignore_errors=True)
        partial_path.rename(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
