"""The table of a screening: one row per crystal, what is known of each, and what it comes to.

Definitions of the rates are here (`summarise`), because papers differ in them. Where the values come from:
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

from cfrl.config import nearest
from cfrl.crystal import reduced_formula
from cfrl.errors import UserError
from cfrl.files import atomic_file
from cfrl.hull import ReferenceHull
from cfrl.rewards.expression import Expression, Term

if TYPE_CHECKING:
    from pymatgen.core import Structure

    from cfrl.stages import Record

ALIASES = {"ehull": "e_above_hull"}
METASTABLE = 0.1  # eV/atom above the hull
Z95 = 1.959964  # standard deviations of a normal distribution that hold 95%

TEXT = ("id", "formula", "fingerprint", "duplicate_of", "known_as", "hull_status", "status")
WHOLE = (
    *("num_atoms", "wanted_space_group", "space_group", "space_group_relaxed", "num_references", "relax_steps"),
    *("no_overlap", "charge_neutral", "valid", "as_wanted", "unique", "novel", "converged"),
    *("stable", "metastable", "sun", "meta_sun", "candidate"),
)
# What a stage may fill, in the order of the columns. Flags are 0 or 1; NaN is unknown. Units: README.
COLUMNS = (
    *("id", "formula", "num_atoms", "wanted_space_group", "space_group", "as_wanted", "fingerprint"),
    *("shortest_distance", "no_overlap", "volume_per_atom", "density", "charge_neutral", "valid"),
    *("unique", "duplicate_of", "novel", "known_as"),
    *("converged", "relax_steps", "rmsd", "volume_change", "space_group_relaxed"),
    *("energy_per_atom", "max_force", "e_above_hull", "num_references", "hull_status"),
    *("stable", "metastable", "sun", "meta_sun", "candidate", "status"),
)


class Table:
    """Columns of n rows: float64 with NaN for unknown, or strings (`TEXT`).

    `status` is "" as long as a crystal goes on, else the reason why it does not. `energy_scale` is the potential
    that the energies come from.
    """

    energy_scale = ""

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
        self["unique"][:] = self["valid"][:] = 0.0
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

    def judge_stability(self, hull: ReferenceHull, structures: Sequence[Structure]) -> None:
        """Energy above the hull of every crystal that has an energy. A duplicate is as stable as its original."""
        rows = np.nonzero(np.isfinite(self["energy_per_atom"]))[0]
        compositions = [structures[row].composition for row in rows]
        found = hull.e_above_hull(compositions, self["energy_per_atom"][rows]).credible()
        self["e_above_hull"][rows] = found.e_above_hull
        self["num_references"][rows] = found.num_references
        self["hull_status"][rows] = found.status
        place = {name: row for row, name in enumerate(self["id"])}
        own = np.array([place.get(name, row) for row, name in enumerate(self["duplicate_of"])], dtype=np.int64)
        distance = self["e_above_hull"][own]
        known = np.isfinite(distance)
        self["stable"][known] = distance[known] <= 0
        self["metastable"][known] = distance[known] <= METASTABLE
        new = (self["unique"] == 1) & (self["novel"] == 1) & known
        if np.isfinite(self["novel"]).any():
            self["sun"][:] = new & (distance <= 0)
            self["meta_sun"][:] = new & (distance <= METASTABLE)

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
        """Rows, best first, (n,). Candidates, which are valid, no duplicates, and satisfy the condition, come first.

        Unknown values come last.
        """
        fits = np.array([not status for status in self["status"]]) & (self.values(condition) == 1)
        self["candidate"][:] = fits
        value = self.values(rank)
        return np.lexsort((np.arange(len(self)), np.where(np.isnan(value), np.inf, value), ~fits))

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
class Summary:
    """What a screening comes to. `failures` counts the statuses of crystals that did not reach the end."""

    crystals: int
    rates: list[Rate]
    averages: list[Average]
    failures: dict[str, int]
    warning: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


DEFINITIONS = {
    "valid": "readable, no atoms closer than --min-distance, possible volume and density; says nothing of symmetry",
    "valid, no overlap": "valid, and all distances above 0.7 of the sum of the covalent radii (Cordero et al. 2008)",
    "valid, charge neutral": "valid, and the composition passes SMACT's test (both validities of Xie et al. 2022)",
    "space group as wanted": "of the valid crystals that should have a space group, those in which exactly it is found",
    "unique": "valid, and StructureMatcher (its defaults) finds no earlier equal, before and after the relaxation",
    "novel": "valid, and equal to no crystal of --known, neither before nor after the relaxation",
    "stable": "on the reference hull or below it (energy above hull <= 0); a duplicate counts as its original",
    "metastable": "energy above hull <= 0.1 eV/atom; a duplicate counts as its original",
    "S.U.N.": "stable (<= 0 eV/atom), unique and novel",
    "meta-S.U.N.": "metastable (<= 0.1 eV/atom), unique and novel: what Zeni et al. 2025 (MatterGen) call S.U.N.",
}


def summarise(table: Table, hull: ReferenceHull | None) -> Summary:
    """Counts with their meaning; shares are of all crystals of the input, also the unreadable ones.

    What was not looked at (novelty, stability) is left out.
    """
    valid = table["valid"] == 1
    wanted = valid & np.isfinite(table["as_wanted"])
    chosen = {
        "valid": valid,
        "valid, no overlap": valid & (table["no_overlap"] == 1),
        "valid, charge neutral": valid & (table["charge_neutral"] == 1),
        "space group as wanted": wanted & (table["as_wanted"] == 1),
        "unique": table["unique"] == 1,
        "novel": table["novel"] == 1,
        "stable": table["stable"] == 1,
        "metastable": table["metastable"] == 1,
        "S.U.N.": table["sun"] == 1,
        "meta-S.U.N.": table["meta_sun"] == 1,
    }
    totals = {name: len(table) for name in chosen} | {"space group as wanted": int(wanted.sum())}
    left_out = {"novel"} if not table.has("novel") else set()
    left_out |= {"stable", "metastable"} if not table.has("stable") else set()
    left_out |= {"S.U.N.", "meta-S.U.N."} if not table.has("sun") else set()
    rates = [
        rate(name, int(mask.sum()), totals[name])
        for name, mask in chosen.items()
        if totals[name] and name not in left_out
    ]
    columns = [("e_above_hull", "eV/atom"), ("rmsd", "angstrom"), ("volume_change", "of the volume")]
    averages = [_average(name, unit, table[name]) for name, unit in columns if table.has(name)]
    failures = Counter(_kind(status) for status in table["status"] if status)
    warning = hull.mismatch(table.energy_scale) if hull and table.energy_scale else ""
    return Summary(len(table), rates, averages, dict(failures.most_common(20)), warning)


def _kind(status: str) -> str:
    """A status without the particulars of its crystal."""
    return "duplicate" if status.startswith("duplicate of") else re.sub(r"\d+(\.\d+)?", "x", status)


def _average(name: str, unit: str, values: np.ndarray) -> Average:
    values = values[np.isfinite(values)]
    return Average(name, unit, float(values.mean()), float(np.median(values)), len(values))


def rate(name: str, count: int, total: int) -> Rate:
    """With Wilson's interval, which stays within 0 and 1 also for few crystals."""
    share = count / total
    middle = (share + Z95**2 / (2 * total)) / (1 + Z95**2 / total)
    half = Z95 / (1 + Z95**2 / total) * math.sqrt(share * (1 - share) / total + (Z95 / (2 * total)) ** 2)
    return Rate(name, count, total, share, max(middle - half, 0.0), min(middle + half, 1.0), DEFINITIONS[name])
