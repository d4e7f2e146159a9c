"""What a table of a screening comes to: rates with their definitions, a funnel, averages.

Papers differ in what they call stable, novel or S.U.N.; `Judgement` says what is meant here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from cfrl.crystals.kinds import ANIONS, anion_of
from cfrl.screening.table import PARENT, Table
from cfrl.stability.flags import FLAGS
from cfrl.stability.hull import ReferenceHull


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
    second: another potential with an opinion, "" if none; need_both: whether candidates need that too.
    """

    reference: str
    judge: str
    threshold: float
    known: str
    formulas: str
    second: str = ""
    need_both: bool = True

    def __str__(self) -> str:
        sentences = []
        if self.reference:
            sentences.append(
                f"Stable: on or below the hull of {self.reference} by {self.judge}; metastable: at most "
                f"{self.threshold:g} eV/atom above it; no DFT was run."
            )
        if self.second:
            needed = "candidates need both" if self.need_both else "candidates do not need it"
            sentences.append(f"Second judge of what is metastable: {self.second}; {needed}.")
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
            "mechanically stable": "of the candidates whose elastic tensor was computed: all eigenvalues of the "
            f"stiffness matrix are positive, by {self.judge}",
            "dynamically stable": "of the candidates whose phonons were computed: no frequency imaginary by more than "
            f"--phonon-tolerance, by {self.judge}",
        } | {f"{name}, by both": f"{name}, and {name.split(',')[0]} by {self.second} too" for name in _BY_BOTH}


@dataclass(frozen=True)
class Summary:
    """What a screening comes to.

    judgement: in words
    funnel: condition -> how many crystals satisfy it and all before it
    flags: flag -> how many crystals have it, and how many it holds back that else were candidates
    by_elements: "1", "2" and ">=3" elements -> how many crystals there are, and how many are what
    by_anion: classes of `kinds.ANIONS` -> the same
    followed: of successors along imaginary modes, which no other count has: how many there are, and how many are what
    failures: statuses of crystals that did not reach the end, or have no distance to the hull -> how many
    protocol: figures by a protocol of the field (`protocol.Figures`), if they were asked for
    agreement: of the second judge with the first, see `_agreement`, and opinion the same in words; empty if none was
        asked
    """

    crystals: int
    judgement: str
    rates: list[Rate]
    funnel: dict[str, int]
    flags: dict[str, dict[str, int]]
    by_elements: dict[str, dict[str, int]]
    by_anion: dict[str, dict[str, int]]
    averages: list[Average]
    failures: dict[str, int]
    warning: str
    agreement: dict[str, float]
    opinion: str
    followed: dict[str, int] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# Rates that a second judge is asked about, and the column of its that decides.
_BY_BOTH = {
    "stable": "judge_stable",
    "metastable": "judge_metastable",
    "S.U.N.": "judge_stable",
    "S.U.N., unflagged": "judge_stable",
    "meta-S.U.N.": "judge_metastable",
    "meta-S.U.N., unflagged": "judge_metastable",
}

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
# A rate of those of which it was asked.
_ASKED = {"mechanically stable": "mechanically_stable", "dynamically stable": "dynamically_stable"}
_COLUMN_OF |= {f"{name}, by both": _COLUMN_OF[name] for name in _BY_BOTH}


def summarise(table: Table, hull: ReferenceHull | None, judgement: Judgement) -> Summary:
    """Counts with their meaning; shares are of all crystals of the input, also the unreadable ones.

    What was not looked at (novelty, stability) is left out, and so are successors of unstable crystals.
    """
    followed = table.column(PARENT) != ""
    successors, table = table.only(followed), table.only(~followed)
    chosen = _conditions(table)
    totals = dict.fromkeys(chosen, len(table))
    totals["space group as wanted"] = int(np.isfinite(table["as_wanted"][chosen["valid"]]).sum())
    for name, column in _ASKED.items():
        totals[name] = int(np.isfinite(table.column(column)).sum())
    definitions = judgement.definitions()
    rates = [
        rate(name, int(mask.sum()), totals[name], definitions[name])
        for name, mask in chosen.items()
        if totals[name] and table.has(_COLUMN_OF.get(name, "id"))
    ]
    agreement = _agreement(table, judgement.threshold) if judgement.second else {}
    columns = [("e_above_hull", "eV/atom"), ("rmsd", "angstrom"), ("volume_change", "of the volume")]
    reasons = Counter(_kind(a or b) for a, b in zip(table["status"], table["hull_status"], strict=True) if a or b)
    return Summary(
        crystals=len(table),
        judgement=str(judgement),
        rates=rates,
        funnel=_funnel(table, judgement.threshold),
        flags=_flag_counts(table),
        by_elements=_by_group(table, chosen, _of_elements(table)),
        by_anion=_by_group(table, chosen, _of_anion(table)),
        averages=[_average(name, unit, table[name]) for name, unit in columns if table.has(name)],
        failures=dict(reasons.most_common(20)),
        warning=hull.mismatch(table.energy_scale) if hull and table.energy_scale else "",
        agreement=agreement,
        opinion=_opinion(agreement) if agreement else "",
        followed=_followed(successors) if len(successors) else {},
    )


def _conditions(table: Table) -> dict[str, np.ndarray]:
    """Name of a rate -> which crystals count, (n,) bool."""
    valid, unflagged = table["valid"] == 1, table["flagged"] == 0
    sun, meta_sun = table["sun"] == 1, table["meta_sun"] == 1
    found = {
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
        **{name: table.column(column) == 1 for name, column in _ASKED.items()},
    }
    if "judge_status" in table.columns:
        found |= {f"{name}, by both": found[name] & (table[column] == 1) for name, column in _BY_BOTH.items()}
    return found


def _followed(successors: Table) -> dict[str, int]:
    return {
        "successors": len(successors),
        "dynamically stable": int((successors["dynamically_stable"] == 1).sum()),
        "candidates": int((successors["candidate"] == 1).sum()),
    }


def _agreement(table: Table, threshold: float) -> dict[str, float]:
    """What a second judge says of the crystals that the first finds metastable.

    asked, judged: how many. metastable: by both. stable, stable_both: by the first, by both, of the judged. difference,
    deviation: eV/atom, median of second less first, and of its absolute value; missing if none was judged.
    """
    asked = (table["metastable"] == 1) & (table["status"] == "")
    first, second = table["e_above_hull"], table["judge_e_above_hull"]
    judged = asked & np.isfinite(second)
    difference = (second - first)[judged]
    return {
        "threshold": threshold,
        "asked": int(asked.sum()),
        "judged": int(judged.sum()),
        "metastable": int((judged & (second <= threshold)).sum()),
        "stable": int((judged & (first <= 0)).sum()),
        "stable_both": int((judged & (first <= 0) & (second <= 0)).sum()),
        **({"difference": float(np.median(difference))} if len(difference) else {}),
        **({"deviation": float(np.median(np.abs(difference)))} if len(difference) else {}),
    }


def _opinion(found: Mapping[str, float]) -> str:
    """`_agreement` as a sentence."""
    asked, judged = found["asked"], found["judged"]
    if not judged:
        return f"The second judge could judge none of {asked} crystals."
    unjudged = f" {asked - judged} could not be judged." if asked > judged else ""
    return (
        f"The second judge agrees that {found['metastable']} of {judged} crystals ({found['metastable'] / judged:.0%}) "
        f"are within {found['threshold']:g} eV/atom, and {found['stable_both']} of {found['stable']} on the hull; its "
        f"distances differ by {1000 * found['difference']:+.0f} meV/atom in the median, "
        f"{1000 * found['deviation']:.0f} without the sign.{unjudged}"
    )


def _funnel(table: Table, threshold: float) -> dict[str, int]:
    """How many crystals are left after each condition that was looked at."""
    conditions = {
        "all": np.ones(len(table), dtype=bool),
        "valid": table["valid"] == 1,
        "unique": table["unique"] == 1,
        "novel": table["novel"] != 0,
        f"within {threshold:g} eV/atom": table["metastable"] == 1,
        **({"by both judges": table["judge_metastable"] == 1} if table.need_both else {}),
        "unflagged": table["flagged"] == 0,
        "not mechanically unstable": table.column("mechanically_stable") != 0,
        "not dynamically unstable": table.column("dynamically_stable") != 0,
        "candidates": table["candidate"] == 1,
        "stable": table["stable"] == 1,
    }
    asked = {"unique": "unique", "novel": "novel", "not mechanically unstable": "mechanically_stable"}
    for name, column in (asked | {"not dynamically unstable": "dynamically_stable"}).items():
        if not table.has(column):
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


def _of_elements(table: Table) -> dict[str, np.ndarray]:
    """Crystals of so many elements: elements alone are stable by definition."""
    number = np.array([len(re.findall("[A-Z]", formula)) for formula in table["formula"]])
    return {"1": number == 1, "2": number == 2, ">=3": number >= 3}


def _of_anion(table: Table) -> dict[str, np.ndarray]:
    anions = np.array([anion_of(formula) if formula else "" for formula in table["formula"]])
    return {name: anions == name for name in ANIONS}


def _by_group(
    table: Table, conditions: Mapping[str, np.ndarray], groups: Mapping[str, np.ndarray]
) -> dict[str, dict[str, int]]:
    """What the rates of stability are made of: for each group (n,) bool how many crystals are what."""
    shown = [n for n, column in _COLUMN_OF.items() if n != "unique" and n in conditions and table.has(column)]
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
