"""VASP: vasprun.xml, read by pymatgen, and OUTCAR, read by ASE."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from cfrl.io.formats.calculation import calculation_entry, folder_name, mechanics
from cfrl.io.formats.entry import Entry
from cfrl.untrusted import one_line

_KBAR = 0.1  # GPa
_PBE = ("PBE", "PE")  # what pymatgen calls GGA where the INCAR names it
_UNCONVERGED = "not converged: the electronic steps ran out"


def read_vasprun(content: bytes, name: str) -> Iterator[Entry]:
    """The end of the run, with energy, forces, gap, dielectric tensor and what corrections depend on."""
    from pymatgen.io.vasp.outputs import Vasprun

    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing POTCARs, and of what is not converged, which is told below
            path = Path(folder) / "vasprun.xml"
            path.write_bytes(content)
            run = Vasprun(path, parse_dos=False, parse_eigen=True, parse_potcar_file=False)
            if not run.converged_electronic:
                yield Entry(name, 1, folder_name(name), "unreadable", _UNCONVERGED)
                return
            values = _run_values(run)
    except Exception as error:  # pymatgen raises anything on what is cut off
        yield Entry(name, 1, folder_name(name), "unreadable", f"unparsable: no finished vasprun.xml: {one_line(error)}")
        return
    yield calculation_entry(name, run.final_structure, values)


def _run_values(run: Any) -> dict[str, float | str]:
    step, atoms = run.ionic_steps[-1], len(run.final_structure)
    hubbards = {symbol: u for symbol, u in run.hubbards.items() if u}
    functional = run.run_type.removesuffix("+U")
    run_type = ("GGA" if functional in _PBE else functional) + ("+U" if hubbards else "")
    stress = np.array(step["stress"]) * _KBAR if "stress" in step else None
    values: dict[str, float | str] = {
        "energy_per_atom": run.final_energy / atoms,
        "energy_scale": scale_of(run_type),
        **mechanics(np.array(step["forces"]) if "forces" in step else None, stress),
        "converged": float(run.converged_ionic),
        "run_type": run_type,
        "hubbards": " ".join(f"{symbol} {u:g}" for symbol, u in hubbards.items()),
        "potcars": ", ".join(run.potcar_symbols),
    }
    if run.eigenvalues:
        values["band_gap"] = float(run.eigenvalue_band_properties[0])
    if len(run.epsilon_static):
        electronic = np.trace(run.epsilon_static) / 3
        values["eps_electronic"] = float(electronic)
        if len(run.epsilon_ionic):
            values["eps_total"] = float(electronic + np.trace(run.epsilon_ionic) / 3)
    return values


def scale_of(run_type: str) -> str:
    """ "mp-raw" for PBE(+U), to which MP2020 corrections may apply; else the functional's own name in small letters."""
    return "mp-raw" if run_type in ("GGA", "GGA+U") else run_type.lower()


_TITEL = re.compile(r"^\s*TITEL\s*=\s*(.+?)\s*$", re.M)
_SWITCH = r"^\s*{}\s*=\s*(\S+)"
_U = re.compile(r"U \(eV\)\s+for each species LDAUU =([-\d. ]+)")
_J = re.compile(r"J \(eV\)\s+for each species LDAUJ =([-\d. ]+)")


def read_outcar(text: TextIO, name: str) -> Iterator[Entry]:
    """The end of the run, with energy (sigma -> 0), forces and stress."""
    import ase.io
    from ase.units import GPa
    from pymatgen.io.ase import AseAtomsAdaptor

    content = text.read()
    if "aborting loop because EDIFF is reached" not in content:
        yield Entry(name, 1, folder_name(name), "unreadable", _UNCONVERGED)
        return
    try:
        with tempfile.TemporaryDirectory() as folder:  # ASE looks for a CONTCAR beside it
            path = Path(folder) / "OUTCAR"
            path.write_text(content, encoding="utf-8")
            atoms = ase.io.read(path, format="vasp-out", index=-1)
        structure = AseAtomsAdaptor.get_structure(atoms)
        results = atoms.calc.results
    except Exception as error:  # ase raises anything on what is cut off
        yield Entry(name, 1, folder_name(name), "unreadable", f"unparsable: no finished OUTCAR: {one_line(error)}")
        return
    stress = -atoms.get_stress(voigt=False) / GPa if "stress" in results else None
    hubbards = _hubbards(content)
    run_type = _run_type(content) + ("+U" if hubbards else "")
    values = {
        "energy_per_atom": atoms.get_potential_energy() / len(atoms),
        "energy_scale": scale_of(run_type),
        **mechanics(results.get("forces"), stress),
        "run_type": run_type,
        "hubbards": hubbards,
        "potcars": ", ".join(dict.fromkeys(_TITEL.findall(content))),
    }
    if "IBRION" in content and not re.search(r"NSW\s*=\s*0\b", content):
        values["converged"] = float("reached required accuracy" in content)
    yield calculation_entry(name, structure, values)


def _run_type(content: str) -> str:
    meta, gga = (re.search(_SWITCH.format(tag), content, re.M) for tag in ("METAGGA", "GGA"))
    if meta and meta[1] not in ("--", "F", "NONE"):
        return meta[1].upper()
    if gga and gga[1] not in ("--", "PE"):
        return gga[1].upper()
    hybrid = re.search(_SWITCH.format("LHFCALC"), content, re.M)
    if hybrid and hybrid[1].startswith("T"):
        return "hybrid"
    return "GGA" if "PAW_PBE" in content else "LDA"


def _hubbards(content: str) -> str:
    """U - J in eV by element, as pymatgen has it of a vasprun.xml."""
    u, j = _U.search(content), _J.search(content)
    if not u:
        return ""
    symbols = [titel.split()[1].partition("_")[0] for titel in _TITEL.findall(content)]
    us = [float(word) for word in u[1].split()]
    js = [float(word) for word in j[1].split()] if j else [0.0] * len(us)
    found = zip(symbols, us, js, strict=False)
    return " ".join(f"{symbol} {a - b:g}" for symbol, a, b in found if a - b)
