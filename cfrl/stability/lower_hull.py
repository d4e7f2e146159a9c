"""The lower convex hull of one chemical system.

A convex function is the maximum of its supporting planes: the hull is kept as the planes of its facets, and a lookup is
one matrix product.
"""

from __future__ import annotations

import numpy as np

from cfrl.crystals.elements import SYMBOLS

FLAT = 1e-6  # eV/atom; a formation energy above -FLAT cannot lower a hull
MAX_FACET_ELEMENTS = 6  # the facets of larger systems are so many that a linear program is quicker


class LowerHull:
    """Lower convex hull of the phases of one chemical system of k elements.

    elements: k atomic numbers. num_references, num_compounds: phases, and compositions that are no element.
    doubt: eV/atom, see `expected_gap`. status: "" or which element has no phase of its own; then there is no hull.
    """

    def __init__(self, elements: list[int], points: np.ndarray, energies: np.ndarray) -> None:
        """points: (m, k) atomic fractions; energies: (m,) eV/atom."""
        self.elements = elements
        self.num_references = len(energies)
        compounds = points[points.max(axis=1, initial=0.0) < 1 - 1e-9]
        self.num_compounds = len(np.unique(compounds.round(4), axis=0))  # polymorphs count once
        self.doubt = expected_gap(self.num_compounds, len(self.elements))
        pure = np.where(points > 1 - 1e-9, energies[:, None], np.inf).min(axis=0, initial=np.inf)
        missing = [SYMBOLS[z] for z, energy in zip(self.elements, pure, strict=True) if np.isinf(energy)]
        self.status = f"no reference for element {', '.join(missing)}" if missing else ""
        if missing:
            return
        formation = energies - points @ pure
        low = formation < -FLAT
        self._pure = pure
        self._points, self._formation = points[low], formation[low]
        facets = low.any() and len(pure) <= MAX_FACET_ELEMENTS
        self._planes = self._lower_facets() if facets else None

    def energy(self, points: np.ndarray) -> np.ndarray:
        """(n, k) compositions -> (n,) energy of the hull, eV/atom."""
        if not len(self._formation):
            return points @ self._pure
        if self._planes is not None:
            return points @ self._pure + (points @ self._planes).max(axis=1)
        return points @ self._pure + np.array([self._linear_program(p) for p in points])

    def _lower_facets(self) -> np.ndarray:
        """(k, facets): formation energy on a facet's plane is composition @ column."""
        from scipy.spatial import ConvexHull

        corners = np.eye(len(self._pure))
        compositions = np.concatenate([corners, self._points])
        formation = np.concatenate([np.zeros(len(corners)), self._formation])
        facets = ConvexHull(np.column_stack([compositions[:, 1:], formation])).equations
        slope, normal, offset = facets[:, :-2], facets[:, -2], facets[:, -1]
        lower = normal < -FLAT  # vertical facets bound the system, not the energy
        value_at_corner = np.column_stack([np.zeros(len(facets)), slope]) + offset[:, None]
        return (-value_at_corner[lower] / normal[lower, None]).T

    def _linear_program(self, point: np.ndarray) -> float:
        """Cheapest mixture of phases with this composition: min E.x with sum_i x_i c_i = c, x >= 0."""
        from scipy.optimize import linprog

        phases = np.concatenate([np.eye(len(self._pure)), self._points])
        formation = np.concatenate([np.zeros(len(self._pure)), self._formation])
        return linprog(formation, A_eq=phases.T, b_eq=point, method="highs").fun


def expected_gap(compounds: int, elements: int) -> float:
    """How far a hull is too high on average, eV/atom, where so many compositions of compounds are known.

    0.1 / (x + 0.36), x = compounds for each pair of the elements: fitted (tests/benchmarks/fit_expected_gap.py) to the
    gap between the hull of the 29,511 Materials Project phases near the hull whose compositions the embedded
    reference's own crystals cover and that of all 130,867, at 1,820 crystals of the embedded generator. Binaries with
    0, 1, 2 and 3 or 4 known compounds: 0.28, 0.05, 0.03, 0.01 eV/atom; ternaries with 3 or 4, 5 to 8, 9 to 16: 0.08,
    0.04, 0.02.
    A reference that was filled up from all of the Materials Project has no such gap to it; what that database lacks
    in turn is taken to follow the same rule.
    """
    pairs = elements * (elements - 1) / 2
    return 0.1 / (compounds / pairs + 0.36) if pairs else 0.0
