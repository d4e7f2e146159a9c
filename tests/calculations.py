"""Files as DFT codes write them, made here of a structure and numbers: what `cfrl data import` reads back."""

from collections.abc import Sequence

import numpy as np
from pymatgen.core import Structure

HARTREE, BOHR = 27.211386245988, 0.529177210903


def vasprun(
    structure: Structure,
    energy: float,
    *,
    gap: float = 0.0,
    hubbards: Sequence[float] = (),
    potcars: Sequence[str] = (),
    metagga: str = "",
    force: float = 0.01,
    stress: float = 5.0,
    epsilon: float | None = None,
    steps: int = 3,
) -> str:
    """vasprun.xml of a relaxation that ended by itself.

    energy: eV of the cell. stress: kbar, on the diagonal. epsilon: electronic; the ions add as much.
    steps: electronic ones, of 60 at most.
    """
    symbols = [site.specie.symbol for site in structure]
    kinds = list(dict.fromkeys(symbols))
    potcars = potcars or [f"PAW_PBE {symbol} 08Apr2002" for symbol in kinds]
    incar = '<i type="string" name="ALGO">Fast</i><i name="ENCUT">520.0</i>'
    if hubbards:
        us = " ".join(f"{u:.4f}" for u in hubbards)
        zeros = " ".join("0.0000" for _ in hubbards)
        incar += f'<i type="logical" name="LDAU">T</i><v name="LDAUU">{us}</v><v name="LDAUJ">{zeros}</v>'
    if metagga:
        incar += f'<i type="string" name="METAGGA">{metagga}</i>'
    if epsilon is not None:
        incar += '<i type="logical" name="LEPSILON">T</i>'
    electronic = "".join(
        f'<scstep><energy><i name="e_fr_energy">{energy:.8f}</i><i name="e_wo_entrp">{energy:.8f}</i>'
        f'<i name="e_0_energy">{energy:.8f}</i></energy></scstep>'
        for _ in range(steps)
    )
    if epsilon is not None:  # steps of the linear response have further terms
        electronic += electronic[: len(electronic) // steps].replace("</energy>", '<i name="PAWPSDC">0.0</i></energy>')
    tensor = "" if epsilon is None else "".join(_tensor(name, epsilon) for name in ("epsilon", "epsilon_ion"))
    bands = "".join(
        f'<set comment="kpoint {k}">' + "".join(f"<r>{e:.4f} {full:.4f}</r>" for e, full in levels) + "</set>"
        for k, levels in enumerate(_levels(gap), 1)
    )
    return f"""<?xml version="1.0" encoding="ISO-8859-1"?>
<modeling>
 <generator><i name="program" type="string">vasp</i><i name="version" type="string">5.4.4</i>
  <i name="date" type="string">2026 01 01</i><i name="time" type="string">00:00:00</i></generator>
 <incar>{incar}</incar>
 <kpoints><generation param="Gamma"><v type="int" name="divisions">1 1 1</v></generation>
  <varray name="kpointlist"><v>0.0 0.0 0.0</v><v>0.5 0.5 0.5</v></varray>
  <varray name="weights"><v>0.5</v><v>0.5</v></varray></kpoints>
 <parameters><separator name="electronic"><i type="int" name="NELM">60</i><i type="int" name="NSW">99</i>
  <i type="int" name="IBRION">2</i><i type="int" name="ISPIN">1</i><i type="string" name="GGA">PE</i>
  <i type="logical" name="LHFCALC">F</i><i name="AEXX">0.0</i><i name="HFSCREEN">0.0</i></separator></parameters>
 <atominfo><atoms>{len(symbols)}</atoms><types>{len(kinds)}</types>
  <array name="atoms"><dimension dim="1">ion</dimension><field type="string">element</field>
   <field type="int">atomtype</field>
   <set>{"".join(f"<rc><c>{s}</c><c>{kinds.index(s) + 1}</c></rc>" for s in symbols)}</set></array>
  <array name="atomtypes"><dimension dim="1">type</dimension><field type="int">atomspertype</field>
   <field type="string">element</field><field>mass</field><field>valence</field>
   <field type="string">pseudopotential</field>
   <set>{"".join(_kind(symbols.count(s), s, p) for s, p in zip(kinds, potcars, strict=True))}</set></array></atominfo>
 {_positions("initialpos", structure)}
 <calculation>{electronic}{_positions(None, structure)}
  <varray name="forces">{_rows([[force, 0, 0]] + [[0, 0, 0]] * (len(symbols) - 1))}</varray>
  <varray name="stress">{_rows(np.eye(3) * stress)}</varray>{tensor}
  <energy><i name="e_fr_energy">{energy:.8f}</i><i name="e_wo_entrp">{energy:.8f}</i>
   <i name="e_0_energy">{energy:.8f}</i></energy>
  <eigenvalues><array><dimension dim="1">band</dimension><dimension dim="2">kpoint</dimension>
   <dimension dim="3">spin</dimension><field>eigene</field><field>occ</field>
   <set><set comment="spin 1">{bands}</set></set></array></eigenvalues>
  <dos><i name="efermi">0.0</i></dos>
 </calculation>
 {_positions("finalpos", structure)}
</modeling>
"""


def _levels(gap: float) -> list[list[tuple[float, float]]]:
    """Energies (eV) and occupations of four bands at two k-points; without a gap they cross the Fermi level."""
    if gap:
        first = [(-2.0, 1.0), (0.0, 1.0), (gap + 0.5, 0.0), (gap + 2.0, 0.0)]
        return [first, [(-2.5, 1.0), (-0.5, 1.0), (gap, 0.0), (gap + 3.0, 0.0)]]
    return [[(-2.0, 1.0), (0.6, 0.0), (1.5, 0.0), (4.0, 0.0)], [(-2.5, 1.0), (-0.3, 1.0), (0.8, 1.0), (3.0, 0.0)]]


def _kind(count: int, symbol: str, potcar: str) -> str:
    return f"<rc><c>{count}</c><c>{symbol}</c><c>1.0</c><c>1.0</c><c>{potcar}</c></rc>"


def _rows(values: Sequence[Sequence[float]] | np.ndarray) -> str:
    return "".join("<v>" + " ".join(f"{x:.10f}" for x in row) + "</v>" for row in values)


def _tensor(name: str, value: float) -> str:
    return f'<varray name="{name}">{_rows(np.eye(3) * value)}</varray>'


def _positions(name: str | None, structure: Structure) -> str:
    named = f' name="{name}"' if name else ""
    return (
        f'<structure{named}><crystal><varray name="basis">{_rows(structure.lattice.matrix)}</varray>'
        f'</crystal><varray name="positions">{_rows(structure.frac_coords)}</varray></structure>'
    )


def outcar(structure: Structure, energy: float, *, u: float = 0.0, stress: float = 5.0, converged: bool = True) -> str:
    """OUTCAR of a relaxation, as far as ASE needs it.

    energy: eV of the cell. u: eV on the first kind of atoms. stress: kbar, on the diagonal.
    """
    symbols = [site.specie.symbol for site in structure]
    kinds = list(dict.fromkeys(symbols))
    lines = [" vasp.6.3.0 20Jan22"]
    lines += [f" POTCAR:    PAW_PBE {symbol} 08Apr2002" for symbol in [*kinds, *kinds]]
    lines += [f"   TITEL  = PAW_PBE {symbol} 08Apr2002" for symbol in kinds]
    lines += ["   ions per type =   " + " ".join(str(symbols.count(symbol)) for symbol in kinds)]
    lines += ["   NSW    =     99    number of steps for IOM", "   IBRION =      2    ionic relax"]
    lines += ["   ISPIN  =      1    spin polarized calculation?", "   LHFCALC =     F    Hartree Fock is set to"]
    lines += ["   GGA     =    PE    GGA type", "   METAGGA=      F    MetaGGA"]
    if u:
        zeros = " ".join("0.0" for _ in kinds[1:])
        lines += [f"   U (eV)           for each species LDAUU =   {u:.1f} {zeros}"]
        lines += ["   J (eV)           for each species LDAUJ =   " + " ".join("0.0" for _ in kinds)]
    lines += ["--------------------------------------- Iteration      1(   1)  -------------------------"]
    if converged:
        lines += ["------------------------ aborting loop because EDIFF is reached ------------------------"]
    lines += ["  FORCE on cell =-STRESS in cart. coord.  units (eV):"]
    lines += ["  Direction    XX          YY          ZZ          XY          YZ          ZX"]
    lines += ["  in kB   " + " ".join(f"{x:11.5f}" for x in (stress, stress, stress, 0, 0, 0))]
    lines += ["  external pressure =        5.00 kB  Pullay stress =        0.00 kB"]
    lines += [
        "      direct lattice vectors                 reciprocal lattice vectors",
        *(" ".join(f"{x:14.9f}" for x in (*row, 0, 0, 0)) for row in structure.lattice.matrix),
        "",
    ]
    lines += [" POSITION                                       TOTAL-FORCE (eV/Angst)", " " + "-" * 83]
    lines += [" ".join(f"{x:13.7f}" for x in (*xyz, 0.02, 0, 0)) for xyz in structure.cart_coords]
    lines += [" " + "-" * 83, "", "  FREE ENERGIE OF THE ION-ELECTRON SYSTEM (eV)"]
    lines += ["  ---------------------------------------------------", f"  free  energy   TOTEN  = {energy:18.8f} eV"]
    lines += ["", f"  energy  without entropy= {energy:16.8f}  energy(sigma->0) = {energy:16.8f}", ""]
    lines += [" reached required accuracy - stopping structural energy minimisation"]
    return "\n".join(lines) + "\n"


def espresso(structure: Structure, energy: float, *, prefix: str = "pwscf", gap: float = 0.0, done: bool = True) -> str:
    """The XML of pw.x after a vc-relax, in Hartree and bohr.

    energy: eV of the cell. gap: eV. done: whether the electronic steps converged.
    """
    cell = structure.lattice.matrix / BOHR
    atoms = "".join(
        f'<atom name="{site.specie.symbol}" index="{i}">{_words(site.coords / BOHR)}</atom>'
        for i, site in enumerate(structure, 1)
    )
    bands = "".join(
        f"<ks_energies><k_point weight='1.0'>0 0 0</k_point><eigenvalues size='4'>"
        f"{_words([e / HARTREE for e, _ in levels])}</eigenvalues><occupations size='4'>"
        f"{_words([full for _, full in levels])}</occupations></ks_energies>"
        for levels in _levels(gap)
    )
    axes = "".join(f"<a{i}>{_words(row)}</a{i}>" for i, row in enumerate(cell, 1))
    force = np.zeros((len(structure), 3))
    force[0, 0] = 0.02 * BOHR / HARTREE  # 0.02 eV/angstrom
    stress = np.eye(3) * -0.5 / 29421.02648438959  # 0.5 GPa of compression, in Ha/bohr^3 and of QE's sign
    flag = "true" if done else "false"
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<qes:espresso xmlns:qes="http://www.quantum-espresso.org/ns/qes/qes-1.0" Units="Hartree atomic units">
 <input><control_variables><prefix>{prefix}</prefix></control_variables></input>
 <output>
  <convergence_info><scf_conv><convergence_achieved>{flag}</convergence_achieved></scf_conv>
   <opt_conv><convergence_achieved>true</convergence_achieved></opt_conv></convergence_info>
  <atomic_structure nat="{len(structure)}" alat="{cell[0, 0]:.10f}">
   <atomic_positions>{atoms}</atomic_positions><cell>{axes}</cell></atomic_structure>
  <dft><functional>PBE</functional></dft>
  <total_energy><etot>{energy / HARTREE:.12f}</etot></total_energy>
  <band_structure>{bands}</band_structure>
  <forces rank="2">{_words(force.ravel())}</forces><stress rank="2">{_words(stress.ravel())}</stress>
 </output>
</qes:espresso>
"""


def _words(values: Sequence[float]) -> str:
    return " ".join(f"{x:.12e}" for x in values)
