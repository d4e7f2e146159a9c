"""Rewards of learnt predictors (properties.py): band gap, dielectric constant, bulk modulus, and users' own.

Each has a caution of one spread: what is highest among predictions is so in part by error, and tuning seeks it.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from cfrl.rewards.context import Inputs, Scored
from cfrl.rewards.predictors import load_predictor
from cfrl.rewards.registry import RewardInfo, register_reward
from cfrl.rewards.stability import strained_bulk_modulus

LEAST = {"band_gap": 0.0, "eps_total": 1.0, "eps_electronic": 1.0, "bulk_modulus": 0.0}
DIELECTRIC = {"total": "eps_total", "electronic": "eps_electronic"}


@register_reward(
    "band_gap", unit="eV", needs=("features",), predictors=("band_gap",), spread=True, caution=1.0, minimum=0.0
)
def band_gap(crystals: Any, structures: list[Any], inputs: Inputs) -> Scored:
    """Band gap (PBE, as in the Materials Project; 0 for metals)."""
    return _predicted(inputs, "band_gap")


@register_reward(
    "dielectric",
    needs=("features",),
    predictors=tuple(DIELECTRIC.values()),
    spread=True,
    caution=1.0,
    minimum=1.0,
)
def dielectric(
    crystals: Any, structures: list[Any], inputs: Inputs, *, kind: Literal["total", "electronic"] = "total"
) -> Scored:
    """Dielectric constant, polycrystalline average; of insulators, as all training data are."""
    return _predicted(inputs, DIELECTRIC[kind])


@register_reward(
    "dielectric_bandgap",
    unit="eV",
    needs=("features",),
    predictors=("band_gap", *DIELECTRIC.values()),
    parts=("band_gap", "dielectric"),
    spread=True,
    caution=1.0,
    minimum=0.0,
)
def dielectric_bandgap(
    crystals: Any, structures: list[Any], inputs: Inputs, *, kind: Literal["total", "electronic"] = "total"
) -> Scored:
    """Dielectric constant times band gap, a figure of merit of gate dielectrics. kind=total takes the static constant,
    of electrons and ions, which sets the capacitance of a gate; kind=electronic that of the electrons alone.

    Both are in use as the target of this tuning: the first version of the code of arXiv 2504.02367 takes the total
    constant, the present text of the paper the electronic one, `dielectric_bandgap(kind=electronic)`.
    """
    gap, gap_spread, status = inputs.predict("band_gap")
    eps, eps_spread, _ = inputs.predict(DIELECTRIC[kind])
    spread = np.sqrt((gap * eps_spread) ** 2 + (eps * gap_spread) ** 2 + (gap_spread * eps_spread) ** 2)
    return Scored(gap * eps, status, spread, {"band_gap": gap, "dielectric": eps})


@register_reward(
    "bulk_modulus",
    unit="GPa",
    needs=("features",),
    predictors=("bulk_modulus",),
    spread=True,
    caution=1.0,
    minimum=0.0,
)
def bulk_modulus(
    crystals: Any, structures: list[Any], inputs: Inputs, *, method: Literal["predictor", "strain"] = "predictor"
) -> Scored:
    """Bulk modulus: predicted, or from the potential's pressure under strain (method=strain; no spread)."""
    if method == "predictor":
        return _predicted(inputs, "bulk_modulus")
    scored = strained_bulk_modulus(inputs.relaxed.structures, inputs.context.potential)
    scored.spread = np.zeros(len(structures))
    return scored


@register_reward(
    "in_range",
    needs=("features",),
    predictors=("band_gap", *DIELECTRIC.values(), "bulk_modulus"),
    minimum=0.0,
    maximum=1.0,
)
def in_range(
    crystals: Any,
    structures: list[Any],
    inputs: Inputs,
    *,
    of: Literal["band_gap", "eps_total", "eps_electronic", "bulk_modulus"] = "band_gap",
    low: float = 0.0,
    high: float = math.inf,
) -> Scored:
    """Probability that a predicted property lies between two values, in_range(of=band_gap, low=1, high=1.8), where the
    predictor errs by its spread. For a range that is narrow beside the spread no caution would leave anything.
    """
    from scipy.special import ndtr

    mean, spread, status = inputs.predict(of)
    below = 0.0 if low <= LEAST[of] else ndtr((low - mean) / spread)  # nothing lies below the least that there can be
    return Scored(ndtr((high - mean) / spread) - below, status)


def predictor_reward(path: str) -> RewardInfo:
    """The reward ``property:FILE``. Raises UserError if the file is no predictor."""
    header = load_predictor(path).header

    def predict(crystals: Any, structures: list[Any], inputs: Inputs) -> Scored:
        return _predicted(inputs, path)

    return RewardInfo(
        f"property:{path}",
        predict,
        f"{header['target']}, learnt from {header['rows']} crystals",
        header["unit"],
        needs=("features",),
        predictors=(path,),
        spread=True,
        caution=1.0,
        minimum=0.0 if header["log"] or header["zero"] is not None else float("-inf"),
    )


def _predicted(inputs: Inputs, name: str) -> Scored:
    mean, spread, status = inputs.predict(name)
    return Scored(mean, status, spread)
