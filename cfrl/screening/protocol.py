"""A screening's crystals by the protocol of the field: LeMat-GenBench (Betala et al. 2025, arXiv:2512.04562).

Valid crystals (`lemat.py`) are matched with each other and with known ones, and judged, as they came and as the
screening has relaxed them. `Figures` is what that comes to; how varied they are is in `distributions.py`. What cannot
be had here as the benchmark has it (its reference of 5.3 million crystals, gated potentials) is said in `instead`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.fingerprint import group_by
from cfrl.errors import UserError
from cfrl.io.datasets import Dataset
from cfrl.model.published import read_arrays
from cfrl.potentials import full_name, model_name
from cfrl.runs.devices import choose_device
from cfrl.runs.journal import Work, digest
from cfrl.screening import distributions, lemat, stages
from cfrl.screening.distributions import Sample
from cfrl.screening.inputs import KnownCrystal
from cfrl.screening.options import ScreeningOptions
from cfrl.screening.table import Table
from cfrl.stability.hull import ReferenceHull
from cfrl.untrusted import read_json

if TYPE_CHECKING:
    from pymatgen.core import Structure

LTOL = 0.1  # of StructureMatcher, whose other tolerances stay as they are (stol 0.3, angle_tol 5)
METASTABLE = 0.1  # eV/atom
COMPARED, EMBEDDED, SEED = 15_000, 2_000, 42  # known crystals whose distributions are taken; and whose embeddings
_CHUNK = {"cpu": 16, "cuda": 512}  # crystals that a worker gets at once
DRAWN, RELAXED = "drawn", "relaxed"  # the geometries
COLUMNS = tuple(
    f"lemat_{name}"
    for name in ("charge", "distances", "plausible", "valid", "unique", "novel", "e_above_hull", "sun", "msun")
)

DEFINITIONS = {
    "charge neutral": "the first of these holds: SMACT's metallicity score is above 0.7; no bond valences; BVAnalyzer "
    "assigns states; common oxidation states balance; others do, the positive ones at the less electronegative",
    "distances": "no two atoms of the cell nearer than 0.5 (0.7 + r_i + r_j) angstrom, r: pymatgen's atomic radii",
    "plausible": "0.01 to 25 g/cm^3, at most 0.5 atoms/angstrom^3, lengths of 1 to 100 angstrom, a space group, a CIF",
    "valid": "all three; only valid crystals count in what follows",
    "unique": f"StructureMatcher(ltol={LTOL}) finds no earlier equal among the valid",
    "novel": f"StructureMatcher(ltol={LTOL}) finds no equal among the known",
    "stable": "at most 0 eV/atom above the hull, in this geometry",
    "metastable": f"above 0, and at most {METASTABLE:g} eV/atom, above the hull, in this geometry",
    "unique, of the stable": "no earlier equal among the stable",
    "unique, of the metastable": "no earlier equal among the metastable",
    "S.U.N.": "stable, unique among the stable, novel",
    "M.S.U.N.": "metastable, unique among the metastable, novel; S.U.N. is not part of it",
    "S.U.N. + M.S.U.N.": "the sum",
}


@dataclass(frozen=True)
class Reference:
    """What crystals are held against.

    known: formula -> known crystals; None: nothing is
    crystals: some of them, for distributions; None as well
    name: of the known crystals
    states, shares, quantities: the benchmark's own tables, where they are at hand (`read_tables`)
    """

    hull: ReferenceHull | None = None
    known: dict[str, list[KnownCrystal]] | None = None
    crystals: CrystalBatch | None = None
    name: str = ""
    states: lemat.States = field(default_factory=dict)
    shares: Mapping[str, np.ndarray] = field(default_factory=dict)
    quantities: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Findings:
    """What was found of n crystals in one geometry.

    charge, distances, plausible: (n,) bool
    space_group: (n,) 0 where none was found
    kind: (n,) row of the first valid crystal that each equals; its own, if none does
    novel: (n,) 1 or 0; NaN where it was not asked
    e_above_hull: (n,) eV/atom; NaN where it is unknown
    embedding: (m, d) of those of the valid that have one
    """

    charge: np.ndarray
    distances: np.ndarray
    plausible: np.ndarray
    space_group: np.ndarray
    kind: np.ndarray
    novel: np.ndarray
    e_above_hull: np.ndarray
    embedding: np.ndarray

    @property
    def valid(self) -> np.ndarray:
        return self.charge & self.distances & self.plausible

    def first(self, rows: np.ndarray) -> np.ndarray:
        """Of the rows (n,) bool those that equal no earlier one of them, (n,) bool."""
        chosen = np.flatnonzero(rows)
        firsts = np.zeros(len(rows), dtype=bool)
        firsts[chosen[np.unique(self.kind[chosen], return_index=True)[1]]] = True
        return firsts

    def conditions(self) -> dict[str, np.ndarray]:
        """Name of a count of `DEFINITIONS` -> which crystals count, (n,) bool; what was not asked is left out."""
        valid = self.valid
        stable = valid & (self.e_above_hull <= 0)
        metastable = valid & (self.e_above_hull > 0) & (self.e_above_hull <= METASTABLE)
        found = {
            "charge neutral": self.charge,
            "distances": self.distances,
            "plausible": self.plausible,
            "valid": valid,
            "unique": self.first(valid),
        }
        asked, judged = np.isfinite(self.novel).any(), np.isfinite(self.e_above_hull).any()
        novel = valid & (self.novel == 1)
        found |= {"novel": novel} if asked else {}
        if judged:
            found |= {"stable": stable, "metastable": metastable}
            found |= {"unique, of the stable": self.first(stable), "unique, of the metastable": self.first(metastable)}
        if asked and judged:
            sun, msun = self.first(stable) & novel, self.first(metastable) & novel
            found |= {"S.U.N.": sun, "M.S.U.N.": msun, "S.U.N. + M.S.U.N.": sun | msun}
        return found


@dataclass(frozen=True)
class Figures:
    """What the protocol comes to.

    crystals: how many were submitted
    counts: geometry -> name of `DEFINITIONS` -> how many crystals
    numbers: geometry -> name -> figure of diversity, distance or energy
    instead: where and why it is not as on the leaderboard, in a sentence
    """

    crystals: int
    counts: dict[str, dict[str, int]]
    numbers: dict[str, dict[str, float]]
    instead: str

    def shares(self, geometry: str) -> dict[str, tuple[int, float, float]]:
        """Name -> count, share of the valid crystals (NaN for the tests of validity), share of all."""
        counts = self.counts[geometry]
        valid, tests = counts["valid"] or math.nan, list(DEFINITIONS)[:4]
        return {
            name: (count, math.nan if name in tests else count / valid, count / self.crystals)
            for name, count in counts.items()
        }

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        shares = {
            geometry: {
                name: {"count": count, "of_valid": None if math.isnan(valid) else valid, "of_all": whole}
                for name, (count, valid, whole) in self.shares(geometry).items()
            }
            for geometry in self.counts
        }
        return {"protocol": "lemat"} | asdict(self) | {"counts": shares, "definitions": DEFINITIONS}


def judge(
    work: Work,
    samples: Sequence[Structure],
    final: Mapping[int, Structure],
    table: Table,
    reference: Reference,
    options: ScreeningOptions,
    total: int,
) -> Figures:
    """The protocol's figures; the table gets its columns (`COLUMNS`), of the crystals as they came.

    Args:
        samples: the crystals that were submitted, the first rows of the table.
        final: row -> crystal at the end of the screening.
        total: how many were submitted, unreadable ones too.
    """
    n = len(table)
    counts, numbers = {}, {}
    theirs = _Theirs.of(work, reference, options)
    for geometry, crystals in geometries(samples, final, table).items():
        if geometry == RELAXED and not options.relax:
            continue
        structures = dict(enumerate(crystals))
        found = _look(work, structures, table["formula"], n, reference, options)
        counts[geometry] = {name: int(mask.sum()) for name, mask in found.conditions().items()}
        numbers[geometry] = _numbers(found, structures, theirs)
        if geometry == DRAWN:
            _note(table, found)
    moved = table["rmsd"][: len(samples)]
    if np.isfinite(moved).any():
        numbers[DRAWN]["RMSD of the relaxation, mean (A)"] = float(np.nanmean(moved))
    return Figures(total, counts, numbers, _instead(reference, theirs, options))


def geometries(
    samples: Sequence[Structure], final: Mapping[int, Structure], table: Table
) -> dict[str, list[Structure]]:
    """The crystals as they came, and relaxed: a duplicate as its original, what was not relaxed as it came."""
    place = {name: row for row, name in enumerate(table["id"])}
    own = [place.get(table["duplicate_of"][row], row) for row in range(len(samples))]
    return {DRAWN: list(samples), RELAXED: [final[row] for row in own]}


def _look(
    work: Work,
    structures: dict[int, Structure],
    formulas: np.ndarray,
    n: int,
    reference: Reference,
    options: ScreeningOptions,
) -> Findings:
    """Tests, matches and energies of crystals in one geometry."""
    of = {"of": digest(structures.values())}
    states = {name: list(values) for name, values in reference.states.items()}
    checked = work.run("lemat-check", partial(lemat.check, states=states), structures, of | {"states": states}, 16)
    tests = {name: np.zeros(n, dtype=bool) for name in ("charge", "distances", "plausible")}
    space_group = np.zeros(n, dtype=np.int64)
    for row, record in checked.items():
        for name, passed in tests.items():
            passed[row] = bool(record.get(name))
        space_group[row] = record.get("space_group", 0)
    valid = {row: structures[row] for row in np.flatnonzero(np.logical_and.reduce(list(tests.values()))).tolist()}
    kind, novel = _match(work, valid, formulas, n, reference.known, of)
    above, embedding = np.full(n, np.nan), np.empty((0, 0))
    if reference.hull is not None and valid:
        records = _embed(work, "lemat-energy", valid, of, options)
        rows = [row for row, record in records.items() if not record["status"]]
        energies = np.array([records[row]["energy_per_atom"] for row in rows])
        if rows:
            above[rows] = reference.hull.e_above_hull([valid[row].composition for row in rows], energies).e_above_hull
        embedding = _stacked(records)
    return Findings(**tests, space_group=space_group, kind=kind, novel=novel, e_above_hull=above, embedding=embedding)


def _match(
    work: Work,
    valid: Mapping[int, Structure],
    formulas: np.ndarray,
    n: int,
    known: dict[str, list[KnownCrystal]] | None,
    of: dict[str, str],
) -> tuple[np.ndarray, np.ndarray]:
    """For each row the first of its kind, (n,), and whether it is novel, (n,)."""
    kind, novel = np.arange(n), np.full(n, np.nan)
    novel[list(valid)] = np.nan if known is None else 1.0
    known = known or {}
    members = group_by(valid, lambda row: formulas[row])
    groups = {
        formula: stages.Group(
            [valid[row] for row in rows],
            [""] * len(rows),
            [crystal.structure for crystal in known.get(formula, ())],
            [crystal.fingerprint for crystal in known.get(formula, ())],
        )
        for formula, rows in members.items()
        if len(rows) > 1 or formula in known
    }
    told = digest(crystal.structure for crystals in known.values() for crystal in crystals)
    settings = of | {"known": told, "ltol": LTOL}
    for formula, record in work.run("lemat-match", partial(stages.match, ltol=LTOL), groups, settings, 8).items():
        if "status" in record:  # its worker was lost
            continue
        for row, original, hit in zip(members[formula], record["duplicate_of"], record["known"], strict=True):
            kind[row] = row if original is None else members[formula][original]
            novel[row] = novel[row] if hit is None else 0.0
    return kind, novel


def _embed(
    work: Work, name: str, structures: Mapping[int, Structure], of: dict[str, str], options: ScreeningOptions
) -> dict[int, stages.Record]:
    embed = partial(stages.embed, potential=options.potential, device=options.device)
    chunk = options.chunk or _CHUNK[choose_device(options.device).type]
    return work.run(name, embed, structures, of | {"potential": full_name(options.potential)}, chunk)


def _stacked(records: Mapping[int, stages.Record]) -> np.ndarray:
    """Embeddings (m, d) of the records that have one."""
    found = [record["embedding"] for record in records.values() if record.get("embedding")]
    return np.array(found) if found else np.empty((0, 0))


def _note(table: Table, found: Findings) -> None:
    """Columns of the table, of the crystals as they came."""
    conditions, valid = found.conditions(), found.valid
    table["lemat_charge"][:], table["lemat_distances"][:] = found.charge, found.distances
    table["lemat_plausible"][:], table["lemat_valid"][:] = found.plausible, valid
    table["lemat_unique"][:] = conditions["unique"]
    table["lemat_novel"][:], table["lemat_e_above_hull"][:] = found.novel, found.e_above_hull
    for column, name in (("lemat_sun", "S.U.N."), ("lemat_msun", "M.S.U.N.")):
        if name in conditions:
            table[column][:] = conditions[name]


# ---- distributions ----


@dataclass(frozen=True)
class _Theirs:
    """What the reference is like: `Sample.shares` and `Sample.quantities`, and embeddings (m, d); empty if unknown."""

    shares: Mapping[str, np.ndarray]
    quantities: Mapping[str, np.ndarray]
    embedding: np.ndarray

    @staticmethod
    def of(work: Work, reference: Reference, options: ScreeningOptions) -> _Theirs:
        crystals, embedding = reference.crystals, np.empty((0, 0))
        if crystals is None:
            return _Theirs(reference.shares, reference.quantities, embedding)
        sample = Sample.of_crystals(crystals)
        if reference.hull is not None:
            some = dict(enumerate(crystals[:EMBEDDED].to_structures()))
            embedding = _stacked(_embed(work, "lemat-known", some, {"of": digest(some.values())}, options))
        return _Theirs(sample.shares | reference.shares, sample.quantities | reference.quantities, embedding)


def _numbers(found: Findings, structures: Mapping[int, Structure], theirs: _Theirs) -> dict[str, float]:
    """Energy, diversity, and distances to the reference, of the valid crystals."""
    rows = np.flatnonzero(found.valid & (found.space_group > 0)).tolist()
    if not rows:
        return {}
    numbers = {}
    above = found.e_above_hull[found.valid & np.isfinite(found.e_above_hull)]
    if len(above):
        numbers["energy above hull, mean (eV/atom)"] = float(above.mean())
    valid = [structures[row] for row in rows]
    sample = Sample.of(valid, found.space_group[rows])
    numbers |= distributions.diversity(sample, valid)
    shares, quantities = sample.shares, sample.quantities
    numbers |= _averaged("JSD", {k: distributions.jensen_shannon(shares[k], of) for k, of in theirs.shares.items()})
    numbers |= _averaged("MMD", {k: distributions.mmd(quantities[k], of) for k, of in theirs.quantities.items()})
    if min(len(found.embedding), len(theirs.embedding)) > 1:
        numbers["Frechet distance"] = distributions.frechet(found.embedding, theirs.embedding)
    return numbers


def _averaged(name: str, parts: dict[str, float]) -> dict[str, float]:
    if not parts:
        return {}
    whole = {f"{name}, average": float(np.mean(list(parts.values())))}
    return whole | {f"{name}, {part}": value for part, value in parts.items()}


def compared(names: Sequence[str]) -> CrystalBatch | None:
    """At most 15,000 crystals of datasets, by chance; None where there is none."""
    sets = [Dataset(name, None) for name in names]
    total = sum(dataset.size for dataset in sets)
    if not total:
        return None
    rows = np.random.default_rng(SEED).permutation(total)[:COMPARED]
    picked, start = [], 0
    for dataset in sets:
        inside = np.sort(rows[(rows >= start) & (rows < start + dataset.size)] - start)
        picked.append(dataset.pick(inside))
        start += dataset.size
    crystals = CrystalBatch.cat(picked)
    return crystals[np.random.default_rng(SEED).permutation(len(crystals))]


def read_tables(folder: str | Path | None) -> dict[str, Any]:
    """The benchmark's own tables, as fields of `Reference`, from its folder `data`: those of them that are there.

    lemat_icsd_oxi_state_mapping.json: oxidation states; *jsdistance_distributions.json: distributions of the reference;
    *mmd_values_15k.pkl: its volumes and densities.

    Raises:
        UserError: no such folder, none of the files in it, or one that is not what its name says.
    """
    if not folder:
        return {}
    folder, tables = Path(folder), {}
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --protocol-data is the folder data/ of lemat-genbench")
    for path in sorted(folder.glob("lemat_icsd_oxi_state_mapping.json")):
        tables["states"] = _checked_states(path)
    for path in sorted(folder.glob("*jsdistance_distributions.json")):
        tables["shares"] = _checked_shares(path)
    for path in sorted(folder.glob("*mmd_values_15k.pkl")):
        values = read_arrays(path)
        names = ("Volume", "Density(g/cm^3)", "Density(atoms/A^3)")
        if not all(name in values and values[name].ndim == 1 for name in names):
            raise UserError(f"{path}: does not hold numbers by the names {', '.join(names)}")
        tables["quantities"] = {name: values[name].astype(np.float64) for name in names}
    if not tables:
        raise UserError(f"{folder}: none of the benchmark's tables is in it (see docs/protocol.md)")
    return tables


def _checked_states(path: Path) -> dict[str, list[int]]:
    found = read_json(path)
    if not isinstance(found, dict) or not all(
        isinstance(states, list) and all(isinstance(state, int) for state in states) for states in found.values()
    ):
        raise UserError(f"{path}: is no table of oxidation states by element")
    return found


def _checked_shares(path: Path) -> dict[str, np.ndarray]:
    found, shares = read_json(path), {}
    sizes = {"SpaceGroup": 230, "CrystalSystem": 7, "CompositionCounts": 118, "Composition": 118}
    for name, size in sizes.items():
        values = found.get(name) if isinstance(found, dict) else None
        if not isinstance(values, dict) or set(values) != {str(i + 1) for i in range(size)}:
            raise UserError(f"{path}: holds no distribution {name} over 1 to {size}")
        shares[name] = np.array([float(values[str(i + 1)]) for i in range(size)])
    return shares


def _instead(reference: Reference, theirs: _Theirs, options: ScreeningOptions) -> str:
    """Where it is not as on the leaderboard, in a sentence."""
    parts = ["there are no energies"]
    if reference.hull is not None:
        judge = model_name(options.potential)
        parts = [
            f"energies are {judge}'s against --hull, there the mean of ORB v3's, MACE-MP's and UMA's, each on its own"
        ]
    bulk = "LeMat-Bulk (5.3 million crystals; here: --known FILE)"
    if reference.known is None:
        parts.append(f"nothing is known, there {bulk}")
    else:
        some = "" if reference.crystals is None else f" ({len(reference.crystals):,} of its crystals for distributions)"
        parts.append(f"known is {reference.name}{some}, there {bulk}")
    if len(theirs.embedding):
        parts.append("the Frechet distance is that of this potential's embeddings, there a mean over three")
    tables = {"states": "oxidation states", "shares": "distributions", "quantities": "volumes and densities"}
    missing = [told for name, told in tables.items() if not getattr(reference, name)]
    if missing:
        parts.append(f"its own tables of {', '.join(missing)} are not at hand (--protocol-data DIR)")
    return f"Not as on the leaderboard: {'; '.join(parts)}."
