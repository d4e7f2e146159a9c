"""Elastic tensors of crystals: strained cells, atoms relaxed in them, stresses by a potential.

Strains, their reduction by symmetry and the fit are pymatgen's. A crystal is mechanically stable if all eigenvalues of
its stiffness matrix are positive (Born's criterion, necessary and sufficient for any symmetry: Mouhat, Coudert, Phys.
Rev. B 90, 224104, 2014).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cfrl.potentials import Potential
from cfrl.potentials.cells import UnusableCrystal
from cfrl.potentials.relax import relax

if TYPE_CHECKING:
    from pymatgen.analysis.elasticity import DeformedStructureSet
    from pymatgen.core import Structure

GPA = 160.21766208  # of eV/angstrom^3
STRAIN = 0.02  # either way; CHGNet's stresses are wavy below (docs/phonons.md)
FMAX, STEPS = 0.005, 200  # eV/angstrom; of the crystal before, and of the atoms in a strained cell


@dataclass
class Elasticity:
    """stiffness: (6, 6) GPa, Voigt's notation, in the crystal's own axes, as pymatgen's; moduli: Hill's means, GPa."""

    stiffness: np.ndarray
    bulk_modulus: float
    shear_modulus: float

    @property
    def lowest(self) -> float:
        """GPa, the lowest eigenvalue of the stiffness matrix."""
        return float(np.linalg.eigvalsh(self.stiffness).min())


def compute_elasticity(structures: list[Structure], potential: Potential) -> list[Elasticity | Exception]:
    """Of each crystal the elastic tensor with relaxed atoms, or the error why there is none. All in one batch."""
    found: list[Elasticity | Exception | None] = [None] * len(structures)
    start = relax(structures, potential, fmax=FMAX, steps=STEPS)
    sets: dict[int, DeformedStructureSet] = {}
    for row, structure in enumerate(start.structures):
        try:
            if start.status[row] or not start.converged[row]:
                raise UnusableCrystal(start.status[row] or f"not relaxed to {FMAX:g} eV/A within {STEPS} steps")
            sets[row] = _strained(structure)
        except Exception as error:  # pymatgen meets crystals that nobody thought of
            found[row] = error
    cells = [cell for row in sets for cell in (start.structures[row], *sets[row])]
    relaxed = relax(cells, potential, fmax=FMAX, steps=STEPS, cell=False)
    ends = [end or cell for end, cell in zip(relaxed.structures, cells, strict=True)]
    result = potential.compute(ends, stress=True)
    first = 0
    for row, strained in sets.items():
        part = slice(first, first + 1 + len(strained))
        first = part.stop
        try:
            if reason := next(filter(None, [*relaxed.status[part], *result.status[part]]), ""):
                raise UnusableCrystal(f"a strained cell: {reason}")
            found[row] = _fit(strained, GPA * result.stress[part])
        except Exception as error:
            found[row] = error
    return found


def _strained(structure: Structure) -> DeformedStructureSet:
    from pymatgen.analysis.elasticity import DeformedStructureSet

    amounts = (-STRAIN, STRAIN)
    return DeformedStructureSet(structure, norm_strains=amounts, shear_strains=amounts, symmetry=True)


def _fit(strained: DeformedStructureSet, stress: np.ndarray) -> Elasticity:
    """Of the stresses (1 + k, 3, 3), GPa, of the crystal and of its k strained cells."""
    from pymatgen.analysis.elasticity import ElasticTensor, Stress

    strains, stresses = [], []
    for deformation, value in zip(strained.deformations, stress[1:] - stress[0], strict=True):
        strain, seen = deformation.green_lagrange_strain, Stress(value)
        for operation in (None, *strained.sym_dict[deformation]):
            strains.append(strain.transform(operation) if operation else strain)
            stresses.append(seen.transform(operation) if operation else seen)
    with warnings.catch_warnings():  # about tensors that are not quite symmetric
        warnings.simplefilter("ignore")
        tensor = ElasticTensor.from_independent_strains(strains, stresses)
        tensor = tensor.voigt_symmetrized.fit_to_structure(strained.undeformed_structure)
        moduli = float(tensor.k_vrh), float(tensor.g_vrh)
    stiffness = np.array(tensor.voigt)
    if not np.isfinite(stiffness).all():
        raise UnusableCrystal("the stresses give no elastic tensor")
    return Elasticity(stiffness, *moduli)
