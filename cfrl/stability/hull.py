"""Energy above the convex hull, for many compositions at once.

A `ReferenceHull` is a list of known phases: composition and energy per atom. Only phases within a crystal's
chemical system count (`lower_hull.py` has the hull itself). Crystals that are asked about are not added to it, so a
distance may be negative: that crystal would be a new stable phase.

Where the energies come from is not its business; `cfrl data hull` makes references with a potential.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cfrl.assets import ASSETS
from cfrl.crystals.compositions import fractions
from cfrl.crystals.elements import SYMBOLS
from cfrl.errors import UserError
from cfrl.stability.lower_hull import FLAT, Rivals, expected_gap, lower_hull
from cfrl.stability.phases import read_phases
from cfrl.untrusted import open_hdf5

VERSION = 1
DEFAULT_HULL = ASSETS / "hull.h5"
CREDIBLE = -1.0  # eV/atom; below it a potential has failed, or the reference lacks the compounds of the system
ABSURD = 1000.0  # eV/atom; no energy of a phase in any convention
SUM_OF_SHARES = 1e-3  # how far the fractions of a phase may add up to something else than 1
SAME = 1e-6  # of an atomic fraction; cells of hundreds of atoms differ by more
_CHUNK = 512  # compositions at once: some hundred phases compete with each
SUBSETS_LIMIT = 12  # elements; beyond, scanning all systems is quicker than looking up every subset
SAME_SCALE = {"chgnet-0.3.0": "mp2020", "chgnet-0.2.0": "mp2020"}  # names in older files


@dataclass
class HullResult:
    """Distances for n crystals, in the order they came.

    e_above_hull: (n,) float64, eV/atom, NaN where there is a status
    status: n strings, "" or the reason why there is no distance
    num_references: (n,) int64, reference phases in the crystal's chemical system, elements included
    doubt: (n,) float64, eV/atom, how much lower the hull of a complete reference is to be expected there
    """

    e_above_hull: np.ndarray
    status: list[str]
    num_references: np.ndarray
    doubt: np.ndarray

    def credible(self) -> HullResult:
        """The same without distances below CREDIBLE, which get a status: an optimiser would hunt for such faults."""
        absurd = np.nan_to_num(self.e_above_hull) < CREDIBLE
        status = [
            f"{-distance:.1f} eV/atom below the hull: its energy, or the reference, must be at fault" if bad else reason
            for distance, bad, reason in zip(self.e_above_hull, absurd, self.status, strict=True)
        ]
        return replace(self, e_above_hull=np.where(absurd, np.nan, self.e_above_hull), status=status)


class ReferenceHull:
    """Known phases and the hulls between them.

    numbers: (m, w) uint8 atomic numbers of each phase, 0 = padding
    fractions: (m, w) float64 atomic fractions, 0 = padding
    energies: (m,) float64 eV/atom
    energy_scale: "mp2020", or the potential that has a scale of its own (potentials/scales.py); energies of crystals
        must be on the same scale
    """

    def __init__(
        self, numbers: np.ndarray, fractions: np.ndarray, energies: np.ndarray, energy_scale: str = "unknown"
    ) -> None:
        self.numbers = np.asarray(numbers, dtype=np.uint8)
        self.fractions = np.asarray(fractions, dtype=np.float64)
        self.energies = np.asarray(energies, dtype=np.float64)
        self.energy_scale = energy_scale
        self._systems = _group_by_system(self.numbers)
        self._lowest = _lowest_phases(self.numbers, self.fractions, self.energies)

    def __len__(self) -> int:
        return len(self.energies)

    def __repr__(self) -> str:
        return f"ReferenceHull({len(self)} phases, {len(self.elements)} elements, {self.energy_scale})"

    def __getitem__(self, rows: np.ndarray) -> ReferenceHull:
        """Some of the phases, by index or mask."""
        return ReferenceHull(self.numbers[rows], self.fractions[rows], self.energies[rows], self.energy_scale)

    def add(self, compositions: Any, energies: Sequence[float] | np.ndarray) -> None:
        """More phases, in place: what is asked from now on competes with them.

        Args:
            compositions, energies: as in `e_above_hull`, on this reference's scale.
        """
        numbers, shares = _sparse(fractions(compositions)[0])
        width = max(self.numbers.shape[1], numbers.shape[1])
        for system, rows in _group_by_system(numbers).items():
            own = self._systems.get(system, np.empty(0, dtype=np.int64))
            self._systems[system] = np.append(own, len(self) + rows)
        self.numbers = np.concatenate([_widened(self.numbers, width), _widened(numbers, width)])
        self.fractions = np.concatenate([_widened(self.fractions, width), _widened(shares, width)])
        self.energies = np.append(self.energies, np.asarray(energies, dtype=np.float64))
        self._lowest = _lowest_phases(self.numbers, self.fractions, self.energies)

    @property
    def elements(self) -> list[int]:
        """Atomic numbers that have an elemental reference."""
        return sorted(m.bit_length() - 1 for m in self._systems if m.bit_count() == 1)

    @classmethod
    def from_compositions(
        cls, compositions: Any, energies: Sequence[float], energy_scale: str = "unknown"
    ) -> ReferenceHull:
        """From anything `fractions` reads and eV/atom. Raises UserError for an unreadable composition."""
        dense, status = fractions(compositions)
        bad = next((row for row, reason in enumerate(status) if reason), None)
        if bad is not None:
            raise UserError(f"reference phase {bad + 1}: {status[bad]}")
        return cls(*_sparse(dense), np.asarray(energies), energy_scale)

    @classmethod
    def load(cls, path: str | Path | None = None, energy_scale: str | None = None) -> ReferenceHull:
        """Read a reference: HDF5 of `save`, CSV with formula and energy_per_atom, or a JSON entry list.

        Without a path: the embedded reference (energies by CHGNet). A CSV with a column `scale` is of the Materials
        Project ("mp2020"); energies carried over from another functional ("r2scan-shifted") count only for
        compositions that have no other ("gga").
        CSV and JSON (Materials Project or Alexandria ComputedEntry, a list or {"entries": [...]}) may be
        compressed (.gz, .bz2). `energy_scale` overrides the file's own. Raises UserError for a file that is
        missing, unreadable or empty, naming the row at fault.
        """
        path = Path(path or DEFAULT_HULL)
        if not path.is_file():
            raise UserError(f"{path}: no such hull reference (settings hull and fill)")
        hull = cls._load_hdf5(path) if path.suffix in (".h5", ".hdf5") else cls._from_phases(path)
        if not len(hull):
            raise UserError(f"{path}: no reference phases in it")
        absurd = np.flatnonzero(~(np.abs(hull.energies) <= ABSURD))
        if len(absurd):
            raise UserError(f"{path}: phase {absurd[0] + 1}: an energy of {hull.energies[absurd[0]]:g} eV/atom")
        hull.energy_scale = energy_scale or hull.energy_scale
        return hull

    @classmethod
    def _load_hdf5(cls, path: Path) -> ReferenceHull:
        with open_hdf5(path) as file:
            if file.attrs.get("format") != "cfrl-hull":
                raise UserError(f"{path}: not a reference hull (`cfrl data hull` makes one)")
            numbers, fractions, energies = (file[name][:] for name in ("numbers", "fractions", "energies"))
            scale = str(file.attrs["energy_scale"])
        shapes = numbers.shape == fractions.shape == (len(energies), *numbers.shape[1:2])
        kinds = numbers.dtype.kind in "iu" and fractions.dtype.kind == energies.dtype.kind == "f"
        if not (shapes and kinds and energies.ndim == 1):
            raise UserError(f"{path}: is damaged: its datasets are not those of a reference hull")
        elements = ((numbers >= 0) & (numbers < len(SYMBOLS)) & ((numbers > 0) == (fractions > 0))).all(1)
        wrong = np.flatnonzero(~(elements & (np.abs(fractions.sum(1) - 1) < SUM_OF_SHARES)))
        if len(wrong):
            raise UserError(f"{path}: phase {wrong[0] + 1}: its elements and fractions are no composition")
        return cls(numbers, fractions, energies, energy_scale=scale)

    @classmethod
    def _from_phases(cls, path: Path) -> ReferenceHull:
        phases = read_phases(path)
        try:
            hull = cls.from_compositions(phases.compositions, phases.energies, phases.energy_scale)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        carried = np.array(phases.carried_over, dtype=bool)
        return hull[~carried].filled(hull[carried]) if carried.any() else hull

    def save(self, path: str | Path, attrs: Mapping[str, Any] | None = None) -> None:
        """Write HDF5: datasets numbers (m, w), fractions (m, w), energies (m,) in eV/atom, and attributes.

        Attributes: format, version, energy_scale, and `attrs` (say where the phases come from).
        """
        import h5py

        with h5py.File(path, "w") as file:
            file.attrs.update({"format": "cfrl-hull", "version": VERSION, "energy_scale": self.energy_scale})
            file.attrs.update(attrs or {})
            for name in ("numbers", "fractions", "energies"):
                file.create_dataset(name, data=getattr(self, name), compression="gzip", shuffle=True)

    def near_hull(self, cutoff: float) -> ReferenceHull:
        """Only the phases at most `cutoff` eV/atom above the hull, and every element's ground state."""
        distance = self.e_above_hull(self._dense(), self.energies).e_above_hull
        return self[distance <= cutoff + FLAT]

    def filled(self, other: ReferenceHull, tolerance: float = np.inf) -> ReferenceHull:
        """With those phases of `other` whose composition this one lacks.

        For a reference with few compounds, whose gaps would make unstable crystals look stable. The scales should be
        close to each other; the energy scale stays this one's.

        tolerance: eV/atom. What makes a phase of this reference rise farther above the hull contradicts it, and is
            left out: one wrong energy among many otherwise spoils all systems that it is part of.
        """
        own = {row.tobytes() for row in self._dense().round(4)}
        new = np.array([row.tobytes() not in own for row in other._dense().round(4)], dtype=bool)
        width = max(self.numbers.shape[1], other.numbers.shape[1])
        numbers, fractions = (
            np.concatenate([_widened(a, width), _widened(b[new], width)])
            for a, b in ((self.numbers, other.numbers), (self.fractions, other.fractions))
        )
        hull = ReferenceHull(numbers, fractions, np.append(self.energies, other.energies[new]), self.energy_scale)
        return hull if np.isinf(tolerance) else hull._agreeing(self, tolerance)

    def _agreeing(self, own: ReferenceHull, tolerance: float) -> ReferenceHull:
        """Without what contradicts `own`, this reference's first phases."""
        hull, shares = self, own._dense()
        allowed = own.e_above_hull(shares, own.energies).e_above_hull + tolerance
        rows = np.arange(len(own))
        while True:
            raised = hull.e_above_hull(shares[rows], own.energies[rows]).e_above_hull > allowed[rows]
            rows = rows[raised]  # the hull only rises from now on: the others stay where they are
            mixtures = [phases[phases >= len(own)] for phases in map(hull._mixture, shares[rows])]
            at_fault = {hull._deepest(phases, own) for phases in mixtures if len(phases)}
            if not at_fault:
                return hull
            hull = hull[np.setdiff1d(np.arange(len(hull)), list(at_fault))]

    def _deepest(self, rows: np.ndarray, other: ReferenceHull) -> int:
        """Which of these phases lies deepest below the hull of the other reference."""
        part = self[rows]
        return int(rows[other.e_above_hull(part._dense(), part.energies).e_above_hull.argmin()])

    def _mixture(self, shares: np.ndarray) -> np.ndarray:
        """Rows of the phases whose mixture is the hull at a composition, (119,)."""
        from scipy.optimize import linprog

        elements = np.nonzero(shares)[0]
        rows = self._rows(sum(1 << int(z) for z in elements))
        points = self._points(rows, elements.tolist())
        amounts = linprog(self.energies[rows], A_eq=points.T, b_eq=shares[elements], method="highs").x
        return rows[amounts > FLAT]

    def _dense(self) -> np.ndarray:
        dense = np.zeros((len(self), len(SYMBOLS)))
        np.add.at(dense, (np.arange(len(self))[:, None], self.numbers), self.fractions)
        return dense

    def mismatch(self, energy_scale: str) -> str:
        """Why energies of that scale do not fit this reference, or "" if they do."""
        if SAME_SCALE.get(energy_scale, energy_scale) == SAME_SCALE.get(self.energy_scale, self.energy_scale):
            return ""
        reference = "of unknown origin" if self.energy_scale == "unknown" else f"on the scale {self.energy_scale}"
        return (
            f"energies are on the scale {energy_scale}, the reference is {reference}: "
            "distances to the hull also hold the difference between the two"
        )

    def e_above_hull(self, compositions: Any, energies: Sequence[float] | np.ndarray) -> HullResult:
        """Energy above the hull of the reference phases, eV/atom; negative below it.

        compositions: a CrystalBatch, pymatgen structures or compositions, formulas, or an (n, 119) array of
            amounts by atomic number
        energies: (n,) eV/atom; NaN gives a status
        """
        dense, status = fractions(compositions)
        energies = np.asarray(energies, dtype=np.float64)
        distance = np.full(len(dense), np.nan)
        count = np.zeros(len(dense), dtype=np.int64)
        doubt = np.full(len(dense), np.nan)
        for row in np.nonzero(~np.isfinite(energies))[0]:
            status[row] = status[row] or "no energy"
        for rows in _equally_many_elements(dense):
            elements, shares = _sparse(dense[rows])
            count[rows], rivals = self._rivals(elements)
            doubt[rows] = expected_gap(rivals.count_compounds(len(rows)), elements.shape[1])
            energy, missing = lower_hull(shares, elements, rivals)
            distance[rows] = energies[rows] - energy
            for row, reason in zip(rows, missing, strict=True):
                status[row] = status[row] or reason
        distance[[bool(reason) for reason in status]] = np.nan
        return HullResult(distance, status, count, doubt)

    def knows(self, compositions: Any) -> np.ndarray:
        """Whether each composition is that of a reference phase, (n,) bool; read as in `e_above_hull`."""
        dense, _ = fractions(compositions)
        known = np.zeros(len(dense), dtype=bool)
        for system, rows in _group_rows(dense).items():
            elements = _elements(system)
            points, own = self._points(self._rows(system), elements), dense[rows][:, elements]
            known[rows] = [bool((np.abs(points - point).max(1, initial=0.0) < SAME).any()) for point in own]
        return known

    def _rivals(self, elements: np.ndarray) -> tuple[np.ndarray, Rivals]:
        """How many phases lie within each of n chemical systems, atomic numbers (n, k), and the lowest ones."""
        n, k = elements.shape
        systems = _system_masks(elements)
        within = {system: self._rows(system) for system in set(systems)}
        count = np.array([len(within[system]) for system in systems])
        lowest = {system: rows[self._lowest[rows]] for system, rows in within.items()}
        rows = np.concatenate([lowest[system] for system in systems])
        owner = np.repeat(np.arange(n), [len(lowest[system]) for system in systems])
        column = np.full((n, len(SYMBOLS)), k)
        column[np.arange(n)[:, None], elements] = np.arange(k)
        points = np.zeros((len(rows), k + 1))  # what pads a row goes into the last column
        points[np.arange(len(rows))[:, None], column[owner[:, None], self.numbers[rows]]] = self.fractions[rows]
        return count, Rivals(owner, points[:, :k], self.energies[rows])

    def _rows(self, system: int) -> np.ndarray:
        """The reference phases within a chemical system."""
        rows = [self._systems[s] for s in self._subsystems(_elements(system), system)]
        return np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)

    def _points(self, rows: np.ndarray, elements: list[int]) -> np.ndarray:
        """Compositions (m, k) of phases in their chemical system."""
        column = np.zeros(len(SYMBOLS), dtype=np.int64)
        column[elements] = np.arange(len(elements))
        points = np.zeros((len(rows), len(elements)))
        np.add.at(points, (np.arange(len(rows))[:, None], column[self.numbers[rows]]), self.fractions[rows])
        return points

    def _subsystems(self, elements: list[int], system: int) -> Iterable[int]:
        if len(elements) > SUBSETS_LIMIT:
            return (s for s in self._systems if s & system == s)
        bits = [1 << z for z in elements]
        subsets = (sum(c) for k in range(1, len(bits) + 1) for c in itertools.combinations(bits, k))
        return (s for s in subsets if s in self._systems)


def _lowest_phases(numbers: np.ndarray, fractions: np.ndarray, energies: np.ndarray) -> np.ndarray:
    """(m,) bool: one phase of each composition, the lowest."""
    weights = np.random.default_rng(0).integers(1 << 62, size=len(SYMBOLS))
    key = (np.rint(fractions / SAME).astype(np.int64) * weights[numbers]).sum(axis=1)  # in any order of the elements
    order = np.lexsort((energies, key))
    lowest = np.zeros(len(key), dtype=bool)
    lowest[order[np.unique(key[order], return_index=True)[1]]] = True
    return lowest


def _widened(array: np.ndarray, width: int) -> np.ndarray:
    return np.pad(array, ((0, 0), (0, width - array.shape[1])))


def _sparse(dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(m, 119) -> atomic numbers (m, w) and fractions (m, w), each row's elements first, then zeros."""
    width = max(int((dense > 0).sum(axis=1).max(initial=0)), 1)
    numbers = np.argsort(dense <= 0, axis=1, kind="stable")[:, :width]
    values = np.take_along_axis(dense, numbers, axis=1)
    return np.where(values > 0, numbers, 0).astype(np.uint8), values


def _system_masks(numbers: np.ndarray) -> list[int]:
    """A chemical system as an integer with one bit per element, for each row of atomic numbers."""
    numbers = numbers.astype(np.uint64)
    one = np.uint64(1)
    low = np.where((numbers > 0) & (numbers < 64), one << (numbers % 64), 0).astype(np.uint64)
    high = np.where(numbers >= 64, one << (numbers % 64), 0).astype(np.uint64)
    low, high = np.bitwise_or.reduce(low, axis=1), np.bitwise_or.reduce(high, axis=1)
    return [int(a) | int(b) << 64 for a, b in zip(low, high, strict=True)]


def _group_by_system(numbers: np.ndarray) -> dict[int, np.ndarray]:
    groups: dict[int, list[int]] = {}
    for row, system in enumerate(_system_masks(numbers)):
        groups.setdefault(system, []).append(row)
    return {system: np.array(rows) for system, rows in groups.items()}


def _equally_many_elements(dense: np.ndarray) -> Iterable[np.ndarray]:
    """Rows of compositions (n, 119) with the same number of elements, at most _CHUNK at once; none without elements."""
    size = (dense > 0).sum(axis=1)
    for k in np.unique(size[size > 0]):
        rows = np.flatnonzero(size == k)
        yield from np.split(rows, range(_CHUNK, len(rows), _CHUNK))


def _group_rows(dense: np.ndarray) -> dict[int, list[int]]:
    """Rows of each chemical system; rows without a composition are in none."""
    groups = _group_by_system(_sparse(dense)[0]) if len(dense) else {}
    groups.pop(0, None)
    return {system: rows.tolist() for system, rows in groups.items()}


def _elements(system: int) -> list[int]:
    return [z for z in range(1, len(SYMBOLS)) if system >> z & 1]
