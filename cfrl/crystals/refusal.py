"""What is not handed out: crystals whose composition alone says that they are no discovery.

A third of what the model `small` draws has a formula that is known, a fifth is an element alone or has charges that do
not balance. No network need learn to avoid that: a draw that meets one of these guards is thrown away and drawn anew,
at 500 a second. What is left follows the model's distribution, conditioned; its log-probability stays the model's,
lower by the same log P(not refused) for all crystals.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.elements import ATOMIC_NUMBERS
from cfrl.crystals.known import KnownFormulas
from cfrl.crystals.oxidation import charge_balance
from cfrl.settings import parse_names

KNOWN = "known"
NOBLE_GASES = frozenset((2, 10, 18, 36, 54, 86, 118))
RADIOACTIVE = frozenset((43, 61, *range(84, 119))) - {90, 92}  # thorium and uranium are handled as minerals
REFUSED = ("known", "element", "noble_gas", "not_neutral", "radioactive")  # what a formula is enough to tell


class Refusal:
    """The guards of a composition.

    Args:
        names: some of `REFUSED`.
        known: the formulas that "known" means; None: those that the embedded generator learnt from.

    Attributes:
        met: how many of the crystals asked about met each guard.
        asked: how many that were.
    """

    def __init__(self, names: Iterable[str], known: KnownFormulas | None = None) -> None:
        asked = set(names)
        self.names = tuple(name for name in REFUSED if name in asked)
        self.known = known
        self.met: Counter[str] = Counter()
        self.asked = 0

    def reasons(self, formulas: Sequence[str]) -> list[str]:
        """The guard that each of n formulas meets first, or ""; one that is known meets no other."""
        status = np.full(len(formulas), "", dtype=object)
        found = composition_flags(formulas) if set(self.names) - {KNOWN} else {}
        for name in reversed(self.names):
            if name == KNOWN:
                self.known = KnownFormulas.embedded() if self.known is None else self.known
            status[self.known.holds(formulas) if name == KNOWN else found[name]] = name
        return status.tolist()

    def __call__(self, crystals: CrystalBatch) -> np.ndarray:
        """Whether each crystal may be handed out, (n,) bool."""
        reasons = self.reasons(crystals.formulas())
        self.asked += len(reasons)
        self.met.update(filter(None, reasons))
        return np.array([not reason for reason in reasons], dtype=bool)

    def __str__(self) -> str:
        """Such as "47% of the draws were refused (known 32%, not_neutral 9%, element 6%)"."""
        asked = max(self.asked, 1)
        parts = ", ".join(f"{name} {count / asked:.0%}" for name, count in self.met.most_common())
        return f"{self.met.total() / asked:.0%} of {self.asked:,} draws were refused" + (f" ({parts})" if parts else "")


def parse_refused(text: str) -> tuple[str, ...]:
    """Names of a list such as "known,not_neutral", or "all" or "none". Raises UserError."""
    if text in ("all", "none", ""):
        return REFUSED if text == "all" else ()
    return parse_names(text, REFUSED, "refuse", "guard")


def composition_flags(formulas: Sequence[str]) -> dict[str, np.ndarray]:
    """noble_gas, radioactive, element, not_neutral of n formulas (see `FLAGS`); each (n,) bool."""
    elements = [{ATOMIC_NUMBERS[symbol] for symbol in re.findall("[A-Z][a-z]?", formula)} for formula in formulas]
    balance = [charge_balance(formula) for formula in formulas]
    return {
        "noble_gas": _each(bool(numbers & NOBLE_GASES) for numbers in elements),
        "radioactive": _each(bool(numbers & RADIOACTIVE) for numbers in elements),
        "element": _each(kind == "element" for kind in balance),
        "not_neutral": _each(kind == "not neutral" for kind in balance),
    }


def _each(values: Iterable[bool]) -> np.ndarray:
    return np.fromiter(values, dtype=bool)
