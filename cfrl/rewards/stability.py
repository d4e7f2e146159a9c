"""Rewards of the potential itself: how far above the hull, how far from equilibrium, how stiff under strain."""

from __future__ import annotations

from typing import Any

import numpy as np

from cfrl.rewards.context import Inputs, Scored
from cfrl.rewards.registry import register_reward

GPA_PER_EV_A3 = 160.21766208
BEST = -0.05  # eV/atom; about a potential's error: what lies deeper below a hull is more likely wrong than new
WORST = 1.0  # eV/atom; nothing is learned from how much more hopeless than hopeless a crystal is
# What is left to fall when a relaxation is cut short, in units of its last fall: mean, and how far that errs. Fitted to
# 2,300 of the crystals of `small`, each relaxed to the end: after 4 evaluations they say with ROC AUC 0.93 which
# will be within 0.1 eV/atom of the hull, the energy alone 0.90.
LEFT, ERRS = 0.7, 1.5
STRAIN = 0.01  # of each length; energies of crystals are parabolic there, and float32 noise is far below


@register_reward(
    "ehull",
    unit="eV/atom",
    goal="min",
    needs=("energy", "hull"),
    spread=True,
    caution=1.0,
    minimum=BEST,
    maximum=WORST,
)
def ehull(crystals: Any, structures: list[Any], inputs: Inputs) -> Scored:
    """Energy above the convex hull of known phases, after `--relax-steps` of relaxation.

    The spread is what the reference may lack: how much lower its hull is to be expected with all compounds known.
    """
    result = inputs.context.hull.e_above_hull(crystals, inputs.evaluation.energy).credible()
    failed = inputs.evaluation.status
    return Scored(result.e_above_hull, [a or b for a, b in zip(failed, result.status, strict=True)], result.doubt)


@register_reward(
    "sun",
    needs=("energy", "hull", "known"),
    parts=("stable", "novel", "e_above_hull"),
    minimum=0.0,
    maximum=1.0,
)
def sun(crystals: Any, structures: list[Any], inputs: Inputs, *, within: float = 0.1, sure: float = 0.03) -> Scored:
    """Stable and novel (unique is the diversity filter's part): the probability that a crystal of an unknown formula
    will, relaxed to the end, lie within `within` eV/atom of the hull, where the judge errs by `sure` eV/atom (standard
    deviation) and the hull is too high by what its reference is expected to lack. 0 for known formulas (`--known`).

    "stable" is the probability alone, "novel" 1 or 0, "e_above_hull" in eV/atom.
    """
    result = inputs.context.hull.e_above_hull(crystals, inputs.evaluation.energy).credible()
    status = [a or b for a, b in zip(inputs.evaluation.status, result.status, strict=True)]
    stable = chance(result.e_above_hull + result.doubt, inputs.relaxed.fall, within, sure)
    novel = ~inputs.context.known.holds(crystals.formulas())
    parts = {"stable": stable, "novel": novel.astype(float), "e_above_hull": result.e_above_hull}
    return Scored(stable * novel, status, parts=parts)


def chance(e_above_hull: np.ndarray, fall: np.ndarray, within: float = 0.1, sure: float = 0.03) -> np.ndarray:
    """Probability (n,) that crystals end within `within` of the hull, relaxed to the end; NaN where it is unknown.

    Args:
        e_above_hull: (n,) eV/atom, where the relaxation was cut short.
        fall: (n,) eV/atom by which the energy fell last.
        sure: standard deviation of the judge's error, eV/atom.
    """
    from scipy.special import ndtr

    fall = np.nan_to_num(fall)
    return ndtr((within - (e_above_hull - LEFT * fall)) / (sure + ERRS * fall))


@register_reward("force", unit="eV/A", goal="min", needs=("forces", "stress"), parts=("atoms", "cell"))
def force(crystals: Any, structures: list[Any], inputs: Inputs) -> Scored:
    """Force and stress of the unrelaxed crystal: the larger of the largest force on an atom and on the cell.

    The force on the cell is its largest principal stress times (volume per atom)^(2/3): what pulls at one atom's
    share of a face. Both vanish in a relaxed crystal.
    """
    result = inputs.drawn
    atoms = np.array([np.linalg.norm(f, axis=1).max(initial=0.0) for f in result.forces])
    area = np.array([(s.volume / len(s)) ** (2 / 3) for s in structures])
    stress = np.nan_to_num(0.5 * (result.stress + result.stress.transpose(0, 2, 1)))
    cell = np.where(result.ok, np.abs(np.linalg.eigvalsh(stress)).max(1, initial=0.0) * area, np.nan)
    return Scored(np.maximum(atoms, cell), result.status, parts={"atoms": atoms, "cell": cell})


def strained_bulk_modulus(structures: list[Any], potential: Any) -> Scored:
    """K = -V dp/dV (GPa) by central difference of the pressure; the atoms keep their fractional coordinates."""
    pressures, volumes, failed = [], [], [""] * len(structures)
    for strain in (-STRAIN, STRAIN):
        scaled = [s.copy() for s in structures]
        for structure in scaled:
            structure.scale_lattice(structure.volume * (1 + strain) ** 3)
        result = potential.compute(scaled, stress=True)
        pressures.append(-np.trace(result.stress, axis1=1, axis2=2) / 3)
        volumes.append(np.array([s.volume for s in scaled]))
        failed = [a or b for a, b in zip(failed, result.status, strict=True)]
    volume = np.array([s.volume for s in structures])
    modulus = -volume * (pressures[1] - pressures[0]) / (volumes[1] - volumes[0])
    return Scored(modulus * GPA_PER_EV_A3, failed)
