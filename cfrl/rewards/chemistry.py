"""Rewards of the composition alone: supply risk, price, charge neutrality."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Literal

import numpy as np

from cfrl.crystals.compositions import fractions
from cfrl.crystals.elements import MASSES, SYMBOLS
from cfrl.crystals.oxidation import charge_balance
from cfrl.rewards.context import Scored
from cfrl.rewards.registry import register_reward


@register_reward("hhi", goal="min")
def hhi(crystals: Any, structures: list[Any], *, kind: Literal["reserve", "production"] = "reserve") -> Scored:
    """Supply risk: Herfindahl-Hirschman index, 0 (many sources) to 10,000 (one), by mass (Gaultois et al. 2013)."""
    values = np.array([hhi_of(formula)[kind == "reserve"] for formula in crystals.formulas()])
    return Scored(values, ["no index for some element" if math.isnan(v) else "" for v in values])


@register_reward("cost", unit="$/kg", goal="min")
def cost(crystals: Any, structures: list[Any]) -> Scored:
    """Price of the raw elements (pymatgen's table)."""
    share, _ = fractions(crystals)
    mass = share * np.array(MASSES)
    present = np.nonzero(share.any(0))[0]
    prices = np.array([_price(SYMBOLS[z]) for z in present])
    weights = mass[:, present] / mass.sum(1, keepdims=True)
    values = np.where(weights > 0, weights * prices, 0.0).sum(1)
    return Scored(values, ["no price for some element" if math.isnan(v) else "" for v in values])


@register_reward("charge_neutral")
def charge_neutral(crystals: Any, structures: list[Any], *, alloys: bool = False) -> np.ndarray:
    """1 if oxidation states balance with cations less electronegative than anions (SMACT), else 0, also for metals
    among themselves and an element alone; with alloys=True metals among themselves pass as well.
    """
    passing = {"neutral", "alloy"} if alloys else {"neutral"}
    return np.array([charge_balance(formula) in passing for formula in crystals.formulas()], dtype=float)


@cache
def hhi_of(formula: str) -> tuple[float, float]:
    """Herfindahl-Hirschman indices of production and reserve (pymatgen's table, Gaultois et al. 2013); NaN: none."""
    from pymatgen.analysis.hhi import HHIModel

    production, reserve = HHIModel().get_hhi(formula)
    return (math.nan if production is None else production), (math.nan if reserve is None else reserve)


@cache
def _price(symbol: str) -> float:
    """$/kg of an element."""
    from pymatgen.analysis.cost import CostAnalyzer, CostDBElements

    try:
        return float(CostAnalyzer(CostDBElements()).get_cost_per_kg(symbol))
    except ValueError:
        return math.nan
