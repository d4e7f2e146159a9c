"""The table of a screening: one row per crystal, what is known of each, and which come first.

Where the values come from: `pipeline.py`. What they come to: `tally.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cfrl.crystals.crystal import reduced_formula
from cfrl.errors import UserError, nearest
from cfrl.rewards.expression import Expression, Term
from cfrl.stability.flags import FLAGS, hull_flags, relaxation_flags
from cfrl.stability.hull import ReferenceHull
from cfrl.tables import write_csv

if TYPE_CHECKING:
    from pymatgen.core import Structure

    from cfrl.screening.stages import Record

ALIASES = {"ehull": "e_above_hull"}

# Columns of what is asked by flags; there where it was.
DESCRIBED = (
    *("dimensionality", "oxidation_states", "hhi_production", "hhi_reserve"),
    *("largest_sphere", "free_sphere"),
)
ELASTIC = ("lowest_stiffness", "mechanically_stable", "bulk_modulus_vrh", "shear_modulus_vrh", "elastic_status")
PHONONS = ("lowest_frequency", "dynamically_stable", "phonon_status")
PARENT = "parent"  # id of the crystal whose imaginary mode led to this one

TEXT = (
    *("id", "formula", "fingerprint", "duplicate_of", "known_as", "hull_status", "judge_status", "flags", "status"),
    *("oxidation_states", "elastic_status", "phonon_status", PARENT),
)
WHOLE = (
    *("num_atoms", "wanted_space_group", "space_group", "space_group_relaxed", "num_references", "relax_steps"),
    *("no_overlap", "charge_neutral", "alloy", "valid", "as_wanted", "unique", "novel", "new_formula", "converged"),
    *("stable", "metastable", "sun", "meta_sun", *FLAGS, "flagged", "held_back", "candidate"),
    *(f"lemat_{name}" for name in ("charge", "distances", "plausible", "valid", "unique", "novel", "sun", "msun")),
    *("dimensionality", "mechanically_stable", "dynamically_stable"),
    *("judge_stable", "judge_metastable"),
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
# What a second judge adds: its energy (eV/atom), its distance to the hull, and why it could say nothing.
JUDGED = ("judge_energy_per_atom", "judge_e_above_hull", "judge_stable", "judge_metastable", "judge_status")


class Table:
    """Columns of n rows: float64 with NaN for unknown, or strings (`TEXT`).

    `status` is "" as long as a crystal goes on, else the reason why it does not. `energy_scale` is the potential
    that the energies come from, `stability` whether it was judged, `need_both` whether by two who must agree.
    """

    energy_scale = ""
    stability = False
    need_both = False

    def __init__(
        self,
        ids: Sequence[str],
        structures: Sequence[Structure],
        problems: Sequence[str],
        columns: Mapping[str, np.ndarray],
        prefix: str = "input_",
    ) -> None:
        """`structures` are those of the first rows, `problems` the reasons why the others have none.

        `columns` that stood beside the crystals go along, `prefix` before their names.
        """
        n = len(ids)
        self.columns: dict[str, np.ndarray] = {name: _blank(name, n) for name in COLUMNS}
        self["id"][:] = ids
        self["status"][len(structures) :] = [f"unreadable: {problem}" for problem in problems]
        self["valid"][:] = 0.0
        for row, structure in enumerate(structures):
            numbers = [site.specie.Z for site in structure if site.is_ordered]
            self["formula"][row] = reduced_formula(numbers, [1] * len(numbers))
            self["num_atoms"][row] = len(structure)
            self["wanted_space_group"][row] = structure.properties.get("space_group", np.nan)
        for name, values in columns.items():
            self.columns[f"{prefix}{name}"] = values.astype(object if values.dtype.kind not in "biuf" else np.float64)

    def __len__(self) -> int:
        return len(self["id"])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def going_on(self, items: Mapping[int, Any]) -> dict[int, Any]:
        """Those of the items whose row has no status yet."""
        return {row: item for row, item in items.items() if not self["status"][row]}

    def fill(self, records: Mapping[int, Record], suffix: str = "", status: str = "status") -> None:
        """Take over what records say in columns of the table.

        `suffix` is added to their names; `status` is the column of theirs: any but the table's own drops no crystal.
        """
        for row, record in records.items():
            for name, value in record.items():
                column = status if name == "status" else name + suffix
                if column in self.columns:
                    self[column][row] = value if value is not None else np.nan

    def add_columns(self, names: Iterable[str]) -> None:
        """Columns of numbers, or of texts (`TEXT`), before the status."""
        status = self.columns.pop("status")
        self.columns |= {name: _blank(name, len(self)) for name in names} | {"status": status}

    def extend(self, other: Table) -> None:
        """More rows; what the other table has no column for stays blank."""
        for name, values in self.columns.items():
            blank = np.full(len(other), "" if values.dtype == object else np.nan, dtype=values.dtype)
            self.columns[name] = np.concatenate([values, other.columns.get(name, blank)])

    def only(self, rows: np.ndarray) -> Table:
        """These rows, (n,) bool, as a table."""
        part = copy(self)
        part.columns = {name: values[rows] for name, values in self.columns.items()}
        return part

    def column(self, name: str) -> np.ndarray:
        """A column that may not be there; then all is unknown."""
        return self.columns.get(name, _blank(name, len(self)))

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

    def judge_stability(self, hull: ReferenceHull, structures: Mapping[int, Structure], threshold: float) -> None:
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
        own = self._originals()
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

    def _originals(self) -> np.ndarray:
        """(n,) the row that each is a duplicate of; its own where it is none."""
        place = {name: row for row, name in enumerate(self["id"])}
        return np.array([place.get(name, row) for row, name in enumerate(self["duplicate_of"])], dtype=np.int64)

    def note_second_opinion(
        self, hull: ReferenceHull, structures: Mapping[int, Structure], records: Mapping[int, Record], threshold: float
    ) -> None:
        """What another potential says of some rows: the columns `JUDGED`. A duplicate is as stable as its original.

        Args:
            records: its energies and statuses, by row.
            threshold: eV/atom above the hull, as in `judge_stability`.
        """
        rows = list(records)
        energy = np.array([records[row].get("energy_per_atom", np.nan) for row in rows], dtype=np.float64)
        found = hull.e_above_hull([structures[row].composition for row in rows], energy).credible()
        self["judge_energy_per_atom"][rows] = energy
        self["judge_e_above_hull"][rows] = found.e_above_hull
        self["judge_status"][rows] = [
            records[row]["status"] or reason for row, reason in zip(rows, found.status, strict=True)
        ]
        distance = self["judge_e_above_hull"][self._originals()]
        known = np.isfinite(distance)
        self["judge_stable"][known] = distance[known] <= 0
        self["judge_metastable"][known] = distance[known] <= threshold

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

        A candidate got through all stages, is not known, metastable (by both judges if they must agree), mechanically
        and dynamically stable (each where it was looked at), satisfies the condition and has no flag. What only its
        flags keep from being one is held back, also what lies so far below the hull that no distance is given.
        """
        sound = self["status"] == ""
        fits = sound & (self["novel"] != 0) & (self.values(condition) == 1)
        fits &= (self.column("mechanically_stable") != 0) & (self.column("dynamically_stable") != 0)
        near = self["metastable"] == 1 if self.stability else sound
        if self.need_both:
            near &= self["judge_metastable"] == 1
        flagged = self["flagged"] == 1
        self["candidate"][:] = fits & near & ~flagged
        self["held_back"][:] = fits & (near | (self["far_below_hull"] == 1)) & flagged
        value = self.values(rank)
        group = np.where(flagged, 2, np.where(self["candidate"] == 1, 0, 1))
        return np.lexsort((np.arange(len(self)), np.where(np.isnan(value), np.inf, value), group))

    # ---- output ----

    def has(self, name: str) -> bool:
        """Whether there is this column, and a value in it."""
        values = self.column(name)
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
        write_csv(path, {name: [self.text(name, row) for row in order] for name in self.columns})


def _blank(name: str, n: int) -> np.ndarray:
    return np.full(n, "", dtype=object) if name in TEXT else np.full(n, np.nan)


def expression(text: str, flag: str) -> Expression:
    """A formula of columns. Raises UserError that names the flag it came from."""
    try:
        return Expression(text)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error
