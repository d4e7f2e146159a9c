"""XML of DFT codes: VASP's vasprun.xml, and what pw.x of Quantum ESPRESSO writes (PREFIX.xml, data-file-schema.xml)."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import TextIO

import numpy as np

from cfrl.io.formats.calculation import calculation_entry, folder_name, mechanics
from cfrl.io.formats.entry import Entry, Unusable
from cfrl.io.formats.vasp import read_vasprun
from cfrl.untrusted import one_line

HARTREE, BOHR = 27.211386245988, 0.529177210903  # eV, angstrom (CODATA 2018)
_GPA = 160.2176634  # of eV/angstrom^3
_SURE = 1e-3  # of an occupation (0 to 1); cold smearing overshoots a little
_START = 4096  # bytes that tell whose file it is


def read(text: TextIO, name: str) -> Iterator[Entry]:
    """The end of a calculation."""
    content = text.buffer.read()  # as bytes: the file says itself how it is encoded
    start = content[:_START]
    if b"<modeling" in start:
        yield from read_vasprun(content, name)
        return
    if b"espresso" not in start:
        reason = "unparsable: neither a vasprun.xml nor the XML of Quantum ESPRESSO"
        yield Entry(name, 1, folder_name(name), "unreadable", reason)
        return
    try:
        yield _espresso(ET.fromstring(content), name)
    except Unusable as error:
        yield Entry(name, 1, folder_name(name), "unreadable", str(error))
    except (ET.ParseError, AttributeError, TypeError, ValueError, KeyError) as error:
        reason = f"unparsable: no finished calculation of Quantum ESPRESSO: {one_line(error)}"
        yield Entry(name, 1, folder_name(name), "unreadable", reason)


def _espresso(root: ET.Element, name: str) -> Entry:
    """Units of the file are Hartree and bohr."""
    from pymatgen.core import Lattice, Structure

    output = root.find("output")
    if output is None:
        raise Unusable("unparsable: no finished calculation of Quantum ESPRESSO: it has no output")
    if output.findtext("convergence_info/scf_conv/convergence_achieved", "true").strip() != "true":
        raise Unusable("not converged: the electronic steps ran out")
    cell = output.find("atomic_structure/cell")
    matrix = BOHR * np.array([_numbers(cell.findtext(axis)) for axis in ("a1", "a2", "a3")])
    atoms = output.findall("atomic_structure/atomic_positions/atom")
    symbols = [re.sub(r"\d.*|_.*", "", atom.get("name")).capitalize() for atom in atoms]
    positions = BOHR * np.array([_numbers(atom.text) for atom in atoms])
    structure = Structure(Lattice(matrix), symbols, positions, coords_are_cartesian=True)
    forces, stress = (output.findtext(tag) for tag in ("forces", "stress"))
    forces = None if forces is None else _numbers(forces).reshape(-1, 3) * HARTREE / BOHR
    stress = None if stress is None else -_numbers(stress).reshape(3, 3) * HARTREE / BOHR**3 * _GPA
    functional = (output.findtext("dft/functional") or "unknown").strip().lower()
    plus_u = output.find("dft/dftU") is not None
    values = {
        "energy_per_atom": HARTREE * float(output.findtext("total_energy/etot")) / len(atoms),
        "energy_scale": f"qe-{functional}" + ("+u" if plus_u else ""),
        **mechanics(forces, stress),
        "run_type": functional.upper() + ("+U" if plus_u else ""),
        "band_gap": _gap(output),
    }
    relaxed = output.findtext("convergence_info/opt_conv/convergence_achieved")
    if relaxed is not None:
        values["converged"] = float(relaxed.strip() == "true")
    prefix = (root.findtext("input/control_variables/prefix") or "").strip()
    return calculation_entry(name, structure, values, "" if prefix in ("", "pwscf") else prefix)


def _gap(output: ET.Element) -> float:
    """eV, from the bands at the k-points of the run; levels that are filled in part make a metal. NaN: no bands."""
    filled, empty = [], []
    for k in output.findall("band_structure/ks_energies"):
        energies, occupations = (_numbers(k.findtext(tag)) for tag in ("eigenvalues", "occupations"))
        filled.append(energies[occupations > _SURE].max(initial=-np.inf))
        empty.append(energies[occupations < 1 - _SURE].min(initial=np.inf))
    if not filled or not np.isfinite([max(filled), min(empty)]).all():
        return float("nan")
    return max(0.0, HARTREE * float(min(empty) - max(filled)))


def _numbers(text: str) -> np.ndarray:
    return np.array(text.split(), dtype=np.float64)
