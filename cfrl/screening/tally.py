"""The table of a screening: one row per crystal, what is known of each, and what it comes to.

Definitions of the rates are here (`Judgement`), because papers differ in them. Where the values come from:
`screen.py`.
"""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cfrl.crystals.crystal import reduced_formula
from cfrl.errors import UserError, nearest
from cfrl.files import atomic_file
from cfrl.rewards.expression import Expression, Term
from cfrl.stability.flags import FLAGS, hull_flags, relaxation_flags
from cfrl.stability.hull import ReferenceHull

if TYPE_CHECKING:
    from pymatgen.core import Structure

    from cfrl.screening.stages import Record

ALIASES = {"ehull": "e_above_hull"}

TEXT = ("id", "formula", "fingerprint", "duplicate_of", "known_as", "hull_status", "flags", "status")
WHOLE = (
    *("num_atoms", "wanted_space_group", "space_group", "space_group_relaxed", "num_references", "relax_steps"),
    *("no_overlap", "charge_neutral", "alloy", "valid", "as_wanted", "unique", "novel", "new_formula", "converged"),
    *("stable", "metastable", "sun", "meta_sun", *FLAGS, "flagged", "held_back", "candidate"),
)
# What a stage may fill, in the order of the columns. Yes and no are 1 and 0; NaN is unknown.
COLUMNS = (
    *("id", "formula", "num_atoms", "wanted_space_group", "space_group", "as_wanted", "fingerprint"),
    *("shortest_distance", "no_overlap", "isolation", "volume_per_atom", "density"),
    *("charge_neutral", "alloy", "valid"),
    *("unique", "duplicate_of", "novel", "known_as", "new_formula"),
    *("converged", "relax_steps", "rmsd", "volume_change", "isolation_relaxed", "space_group_relaxed"),
    *("energy_per_atom", "max_force", "e_above_hull", "num_references", "hull_status"),
    *("stable", "metastable", "sun", "meta_sun", *FLAGS, "flags", "flagged", "held_back", "candidate", "status"),
)


class Table:
    """Columns of n rows: float64 with NaN for unknown, or strings (`TEXT`).

    `status` is "" as long as a crystal goes on, else the reason why it does not. `energy_scale` is the potential
    that the energies come from, `stability` whether it was judged.
    """

    energy_scale = ""
    stability = False

    def __init__(
        self,
        ids: Sequence[str],
        structures: Sequence[Structure],
        problems: Sequence[str],
        columns: Mapping[str, np.ndarray],
    ) -> None:
        """`structures` are those of the first rows, `problems` the reasons why the others have none."""
        n = len(ids)
        self.columns: dict[str, np.ndarray] = {
            name: np.full(n, "", dtype=object) if name in TEXT else np.full(n, np.nan) for name in COLUMNS
        }
        self["id"][:] = ids
        self["status"][len(structures) :] = [f"unreadable: {problem}" for problem in problems]
        self["valid"][:] = 0.0
        for row, structure in enumerate(structures):
            numbers = [site.specie.Z for site in structure if site.is_ordered]
            self["formula"][row] = reduced_formula(numbers, [1] * len(numbers))
            self["num_atoms"][row] = len(structure)
            self["wanted_space_group"][row] = structure.properties.get("space_group", np.nan)
        for name, values in columns.items():
            self.columns[f"input_{name}"] = values.astype(object if values.dtype.kind not in "biuf" else np.float64)

    def __len__(self) -> int:
        return len(self["id"])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def going_on(self, items: Mapping[int, Any]) -> dict[int, Any]:
        """Those of the items whose row has no status yet."""
        return {row: item for row, item in items.items() if not self["status"][row]}

    def fill(self, records: Mapping[int, Record], suffix: str = "") -> None:
        """Take over what records say in columns of the table; `suffix` is added to their names."""
        for row, record in records.items():
            for name, value in record.items():
                column = name if name == "status" else name + suffix
                if column in self.columns:
                    self[column][row] = value if value is not None else np.nan

    def add_columns(self, names: Iterable[str]) -> None:
        """Columns of numbers, before the status."""
        status = self.columns.pop("status")
        self.columns |= {name: np.full(len(self), np.nan) for name in names} | {"status": status}

    def note_valid(self) -> None:
        """Everything that has no status after the checks is valid."""
        self["valid"][:] = self["status"] == ""
        wanted = np.isfinite(self["wanted_space_group"])
        self["as_wanted"][wanted] = (self["wanted_space_group"] == self["space_group"])[wanted]

    def note_scale(self, records: Mapping[int, Record]) -> None:
        self.energy_scale = next((r["energy_scale"] for r in records.values() if "energy_scale" in r), "")

    def note_duplicate(self, row: int, original: int) -> None:
        self["unique"][row] = 0.0
        self["duplicate_of"][row] = self["id"][original]
        self["status"][row] = f"duplicate of {self['id'][original]}"

    def note_novel(self, rows: Sequence[int]) -> None:
        """Novel until `note_known` says otherwise; what was known before it was relaxed stays known."""
        unknown = [row for row in rows if np.isnan(self["novel"][row])]
        self["novel"][unknown] = 1.0

    def note_known(self, row: int, name: str) -> None:
        self["novel"][row] = 0.0
        self["known_as"][row] = name

    def note_new_formulas(self, known: Iterable[str], references: Iterable[ReferenceHull]) -> None:
        """Which formulas are neither among those of known crystals nor those of a reference phase."""
        rows = np.nonzero(self["formula"] != "")[0]
        formulas, known = self["formula"][rows].tolist(), set(known)
        found = np.array([formula in known for formula in formulas], dtype=bool)
        for reference in references:
            found |= reference.knows(formulas)
        self["new_formula"][rows] = ~found

    def judge_stability(self, hull: ReferenceHull, structures: Sequence[Structure], threshold: float) -> None:
        """Energy above the hull of every crystal that has an energy. A duplicate is as stable as its original.

        `threshold`: eV/atom above the hull up to which a crystal is metastable.
        """
        self.stability = True
        rows = np.nonzero(np.isfinite(self["energy_per_atom"]))[0]
        compositions = [structures[row].composition for row in rows]
        found = hull.e_above_hull(compositions, self["energy_per_atom"][rows])
        for name, flag in hull_flags(found.e_above_hull, found.num_references).items():
            self[name][rows] = flag
        found = found.credible()
        self["e_above_hull"][rows] = found.e_above_hull
        self["num_references"][rows] = found.num_references
        self["hull_status"][rows] = found.status
        place = {name: row for row, name in enumerate(self["id"])}
        own = np.array([place.get(name, row) for row, name in enumerate(self["duplicate_of"])], dtype=np.int64)
        for name in hull_flags(np.empty(0), np.empty(0)):
            self[name][:] = self[name][own]
        distance = self["e_above_hull"][own]
        known = np.isfinite(distance)
        self["stable"][known] = distance[known] <= 0
        self["metastable"][known] = distance[known] <= threshold
        new = (self["unique"] == 1) & (self["novel"] == 1) & known
        if np.isfinite(self["novel"]).any():
            self["sun"][:] = new & (distance <= 0)
            self["meta_sun"][:] = new & (distance <= threshold)

    def note_flags(self, allowed: Iterable[str]) -> None:
        """What is suspect of each crystal (flags.py); `allowed` flags keep their columns but hold nothing back."""
        relaxed = np.isfinite(self["isolation_relaxed"])
        isolation = np.where(relaxed, self["isolation_relaxed"], self["isolation"])
        known = np.isfinite(isolation)
        found = relaxation_flags(self["volume_change"], self["rmsd"], isolation)
        for name, flag in found.items():
            self[name][known] = flag[known]
        counted = [name for name in FLAGS if name not in set(allowed)]
        self["flags"][:] = [", ".join(name for name in counted if self[name][row] == 1) for row in range(len(self))]
        self["flagged"][:] = self["flags"] != ""

    # ---- ranking ----

    def check_names(self, *expressions: Expression) -> None:
        """Raises UserError for a name that is no column."""
        known = {**self.columns, **ALIASES}
        for term in (term for e in expressions for term in e.terms):
            if term.parameters or term.name not in known or term.name in TEXT:
                numbers = ", ".join(name for name in known if name not in TEXT)
                raise UserError(f"'{term}' is no column of numbers{nearest(term.name, known)}; there are: {numbers}")

    def values(self, formula: Expression) -> np.ndarray:
        """An expression of columns, (n,)."""
        return formula(
            {term: self[ALIASES.get(term.name, term.name)] for term in formula.terms} or {Term("n"): self["id"]}
        )

    def order(self, rank: Expression, condition: Expression) -> np.ndarray:
        """Rows, best first, (n,): candidates, then the others, flagged ones last. Unknown values come last.

        A candidate got through all stages, is not known, metastable (each where it was looked at), satisfies the
        condition and has no flag. What only its flags keep from being one is held back, also what lies so far below
        the hull that no distance is given.
        """
        sound = self["status"] == ""
        fits = sound & (self["novel"] != 0) & (self.values(condition) == 1)
        near = self["metastable"] == 1 if self.stability else sound
        flagged = self["flagged"] == 1
        self["candidate"][:] = fits & near & ~flagged
        self["held_back"][:] = fits & (near | (self["far_below_hull"] == 1)) & flagged
        value = self.values(rank)
        group = np.where(flagged, 2, np.where(self["candidate"] == 1, 0, 1))
        return np.lexsort((np.arange(len(self)), np.where(np.isnan(value), np.inf, value), group))

    # ---- output ----

    def has(self, name: str) -> bool:
        """Whether any row has a value in this column."""
        values = self[name]
        return bool((values != "").any() if name in TEXT else np.isfinite(values).any())

    def text(self, name: str, row: int, digits: int = 6) -> str:
        """A value for people and for CSV; "" for unknown."""
        value = self[name][row]
        if isinstance(value, str):
            return value
        if math.isnan(value):
            return ""
        return str(int(value)) if name in WHOLE else f"{value:.{digits}g}"

    def write_csv(self, path: Path, order: Iterable[int]) -> None:
        with atomic_file(path) as temp, temp.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.columns)
            writer.writerows([self.text(name, row) for name in self.columns] for row in order)


def expression(text: str, flag: str) -> Expression:
    """A formula of columns. Raises UserError that names the flag it came from."""
    try:
        return Expression(text)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error


# ---- counts ----


@dataclass(frozen=True)
class Rate:
    """`count` of `total` crystals; `low` to `high` is the 95% confidence interval of the share (Wilson 1927)."""

    name: str
    count: int
    total: int
    share: float
    low: float
    high: float
    definition: str


@dataclass(frozen=True)
class Average:
    """Of a column, over the `count` crystals that have a value."""

    name: str
    unit: str
    mean: float
    median: float
    count: int


@dataclass(frozen=True)
class Judgement:
    """By what stability and novelty were judged: an energy above hull means nothing without it.

    reference: the hull, "" if none. judge: the potential, and on which geometry. threshold: eV/atom, of metastable.
    known: the sets of known crystals. formulas: where known formulas were looked up. Both "" if none.
    """

    reference: str
    judge: str
    threshold: float
    known: str
    formulas: str

    def __str__(self) -> str:
        sentences = []
        if self.reference:
            sentences.append(
                f"Stable: on or below the hull of {self.reference} by {self.judge}; metastable: at most "
                f"{self.threshold:g} eV/atom above it; no DFT was run."
            )
        if self.known:
            sentences.append(f"Novel: no equal in {self.known}.")
        if self.formulas:
            sentences.append(f"New formula: not one of {self.formulas}.")
        return " ".join(sentences)

    def definitions(self) -> dict[str, str]:
        """What each rate means."""
        above = f"above the hull of {self.reference} by {self.judge}"
        stable, metastable = f"at most 0 eV/atom {above}", f"at most {self.threshold:g} eV/atom {above}"
        new, unflagged = f"unique, and novel against {self.known}", f"without a flag ({', '.join(FLAGS)})"
        return {
            "valid": "readable, no atoms closer than --min-distance, possible volume and density, of any symmetry",
            "valid, no overlap": "valid, and no distance below 0.7 of the sum of covalent radii (Cordero et al. 2008)",
            "valid, charge neutral": "valid, and oxidation states balance, cations less electronegative than anions "
            "(SMACT with its Pauling test); neither alloys nor elements alone",
            "valid, alloy": "valid, and metals among themselves, of which no balance is asked",
            "valid, element alone": "valid, and of one element",
            "space group as wanted": "of the valid crystals that should have a space group: exactly it is found",
            "unique": "valid, and StructureMatcher (its defaults) finds no earlier equal, before and after relaxation",
            "novel": f"valid, and no equal in {self.known}, neither before nor after relaxation",
            "new formula": f"readable, and of a reduced formula that is not one of {self.formulas}",
            "stable": f"{stable}; a duplicate counts as its original",
            "metastable": f"{metastable}; a duplicate counts as its original",
            "S.U.N.": f"{stable}; {new}",
            "S.U.N., unflagged": f"S.U.N. {unflagged}",
            "meta-S.U.N.": f"{metastable}; {new}",
            "meta-S.U.N., unflagged": f"meta-S.U.N. {unflagged}",
        }


@dataclass(frozen=True)
class Summary:
    """What a screening comes to.

    judgement: in words
    funnel: condition -> how many crystals satisfy it and all before it
    flags: flag -> how many crystals have it, and how many it holds back that else were candidates
    by_elements: "1", "2" and ">=3" elements -> how many crystals there are, and how many are what
    failures: statuses of crystals that did not reach the end, or have no distance to the hull -> how many
    """

    crystals: int
    judgement: str
    rates: list[Rate]
    funnel: dict[str, int]
    flags: dict[str, dict[str, int]]
    by_elements: dict[str, dict[str, int]]
    averages: list[Average]
    failures: dict[str, int]
    warning: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# A rate is given where this column was filled; the others always are.
_COLUMN_OF = {
    "unique": "unique",
    "novel": "novel",
    "new formula": "new_formula",
    "stable": "stable",
    "metastable": "stable",
    "S.U.N.": "sun",
    "S.U.N., unflagged": "sun",
    "meta-S.U.N.": "sun",
    "meta-S.U.N., unflagged": "sun",
}


def summarise(table: Table, hull: ReferenceHull | None, judgement: Judgement) -> Summary:
    """Counts with their meaning; shares are of all crystals of the input, also the unreadable ones.

    What was not looked at (novelty, stability) is left out.
    """
    chosen = _conditions(table)
    totals = dict.fromkeys(chosen, len(table))
    totals["space group as wanted"] = int(np.isfinite(table["as_wanted"][chosen["valid"]]).sum())
    definitions = judgement.definitions()
    rates = [
        rate(name, int(mask.sum()), totals[name], definitions[name])
        for name, mask in chosen.items()
        if totals[name] and table.has(_COLUMN_OF.get(name, "id"))
    ]
    columns = [("e_above_hull", "eV/atom"), ("rmsd", "angstrom"), ("volume_change", "of the volume")]
    reasons = Counter(_kind(a or b) for a, b in zip(table["status"], table["hull_status"], strict=True) if a or b)
    return Summary(
        crystals=len(table),
        judgement=str(judgement),
        rates=rates,
        funnel=_funnel(table, judgement.threshold),
        flags=_flag_counts(table),
        by_elements=_by_elements(table, chosen),
        averages=[_average(name, unit, table[name]) for name, unit in columns if table.has(name)],
        failures=dict(reasons.most_common(20)),
        warning=hull.mismatch(table.energy_scale) if hull and table.energy_scale else "",
    )


def _conditions(table: Table) -> dict[str, np.ndarray]:
    """Name of a rate -> which crystals count, (n,) bool."""
    valid, unflagged = table["valid"] == 1, table["flagged"] == 0
    sun, meta_sun = table["sun"] == 1, table["meta_sun"] == 1
    return {
        "valid": valid,
        "valid, no overlap": valid & (table["no_overlap"] == 1),
        "valid, charge neutral": valid & (table["charge_neutral"] == 1),
        "valid, alloy": valid & (table["alloy"] == 1),
        "valid, element alone": valid & (table["element"] == 1),
        "space group as wanted": valid & (table["as_wanted"] == 1),
        "unique": table["unique"] == 1,
        "novel": table["novel"] == 1,
        "new formula": table["new_formula"] == 1,
        "stable": table["stable"] == 1,
        "metastable": table["metastable"] == 1,
        "S.U.N.": sun,
        "S.U.N., unflagged": sun & unflagged,
        "meta-S.U.N.": meta_sun,
        "meta-S.U.N., unflagged": meta_sun & unflagged,
    }


def _funnel(table: Table, threshold: float) -> dict[str, int]:
    """How many crystals are left after each condition that was looked at."""
    conditions = {
        "all": np.ones(len(table), dtype=bool),
        "valid": table["valid"] == 1,
        "unique": table["unique"] == 1,
        "novel": table["novel"] != 0,
        f"within {threshold:g} eV/atom": table["metastable"] == 1,
        "unflagged": table["flagged"] == 0,
        "candidates": table["candidate"] == 1,
        "stable": table["stable"] == 1,
    }
    for name in ("unique", "novel"):
        if not table.has(name):
            del conditions[name]
    if not table.stability:
        del conditions[f"within {threshold:g} eV/atom"], conditions["stable"]
    left = np.logical_and.accumulate(list(conditions.values())).sum(1)
    return dict(zip(conditions, left.tolist(), strict=True))


def _flag_counts(table: Table) -> dict[str, dict[str, int]]:
    held_back = table["held_back"] == 1
    having = {name: table[name] == 1 for name in FLAGS}
    return {
        name: {"crystals": int(mask.sum()), "held back": int((mask & held_back).sum())} for name, mask in having.items()
    }


def _by_elements(table: Table, conditions: Mapping[str, np.ndarray]) -> dict[str, dict[str, int]]:
    """What the rates of stability are for crystals of so many elements: elements alone are stable by definition."""
    number = np.array([len(re.findall("[A-Z]", formula)) for formula in table["formula"]])
    shown = [name for name, column in _COLUMN_OF.items() if name != "unique" and table.has(column)]
    groups = {"1": number == 1, "2": number == 2, ">=3": number >= 3}
    return {
        label: {"crystals": int(rows.sum())} | {name: int((conditions[name] & rows).sum()) for name in shown}
        for label, rows in groups.items()
    }


def _kind(status: str) -> str:
    """A status without the particulars of its crystal."""
    return "duplicate" if status.startswith("duplicate of") else re.sub(r"\d+(\.\d+)?", "x", status)


def _average(name: str, unit: str, values: np.ndarray) -> Average:
    values = values[np.isfinite(values)]
    return Average(name, unit, float(values.mean()), float(np.median(values)), len(values))


def rate(name: str, count: int, total: int, definition: str = "") -> Rate:
    """With Wilson's interval, which stays within 0 and 1 also for few crystals."""
    from scipy.stats import binomtest

    interval = binomtest(count, total).proportion_ci(method="wilson")
    return Rate(name, count, total, count / total, float(interval.low), float(interval.high), definition)
