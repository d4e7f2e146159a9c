"""Can the charges of a composition balance? One answer for rewards and for screening."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

Balance = Literal["neutral", "alloy", "element", "not neutral"]

METALLOIDS = {"Ge", "Sb"}  # SMACT counts them as metals, yet they are the anions of salts such as Mg2Ge and GaSb

MOST_ELEMENTS = 8  # SMACT tries all states of all elements, which takes hours for 13; known crystals have at most 7


@lru_cache(maxsize=65536)
def charge_balance(formula: str) -> Balance:
    """What a composition is: neutral, an alloy, an element alone, or not neutral.

    neutral: common oxidation states balance, cations less electronegative than anions (SMACT with its Pauling test,
        Davies et al. 2019; states of the ICSD). One state an element: mixed valence, as in Fe3O4, does not balance. Of
        the Materials Project's binaries and ternaries that are no alloys 86% are neutral.
    alloy: metals among themselves. They are not asked for a balance, which says nothing of them: rare negative states
        would make TiAl and Ti3Al neutral and Ti2Al not. With a metalloid they are neutral where they balance.
    element: one element alone, whose charge is nothing to speak of.
    not neutral: everything else; what has more than `MOST_ELEMENTS` is never called neutral.
    """
    from smact import metals
    from smact.screening import smact_validity

    symbols = set(re.findall("[A-Z][a-z]?", formula))
    if len(symbols) == 1:
        return "element"
    metallic = symbols <= {*metals, "Pm"}  # which SMACT's list of metals lacks
    if metallic and not symbols & METALLOIDS:
        return "alloy"
    try:
        if len(symbols) <= MOST_ELEMENTS and smact_validity(formula, include_alloys=False):
            return "neutral"
    except (KeyError, TypeError, ValueError):  # an element without data
        return "not neutral"
    return "alloy" if metallic else "not neutral"
