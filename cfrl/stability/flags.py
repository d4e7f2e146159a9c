"""What makes a crystal suspect, however well it ranks. Pure functions, for screening and for rewards.

An optimiser, and a ranking, find whatever a potential, a reference or a predictor gets wrong. Each flag closes one such
way to a prize that is none; `FLAGS` says which.
"""

from __future__ import annotations

import numpy as np

from cfrl.settings import parse_names

TOO_DEEP = -0.1  # eV/atom; twice the error of a potential; a phase so far below a full hull would be a sensation
FEW_REFERENCES = 12  # phases in the chemical system, elements included
MOST_VOLUME = 2.0  # times, either way; what a relaxation changes more was no crystal of this kind
MOST_MOVED = 3.0  # angstrom, RMSD; about the distance of neighbours: the atoms have changed places
OVERLAP = 0.7  # of the sum of two covalent radii; nearer atoms are in no known crystal
APART = 1.5  # sums of covalent radii to the nearest atom; 1.4 at most in 99.9% of the Materials Project's crystals

# name -> what it says; and what an optimiser gains without it
FLAGS = {
    "far_below_hull": "more than 0.1 eV/atom below the hull: the reference or the potential is at fault",
    "sparse_reference": "fewer than 12 reference phases in its chemical system: the hull is too high there",
    "noble_gas": "holds a noble gas: few compounds are known, so any bond that a potential invents looks stable",
    "radioactive": "holds Tc, Pm, Po or a heavier element but Th and U: little data to learn from, and of no use",
    "element": "one element alone: stable by definition, so the shortest way to a low energy above hull",
    "not_neutral": "oxidation states do not balance (alloys aside): predictors know few such crystals",
    "exploded": "volume changed more than twofold, atoms moved by 3 A (RMSD), or one is 1.5 sums of covalent radii "
    "from its nearest neighbour: a potential knows nothing of free atoms, and few of them make a large cell cheap",
}


def check_flags(text: str) -> list[str]:
    """The flags of a list such as "noble_gas,element". Raises UserError for a name that is none."""
    return list(parse_names(text, FLAGS, "--allow", "flag"))


def hull_flags(e_above_hull: np.ndarray, num_references: np.ndarray) -> dict[str, np.ndarray]:
    """far_below_hull, sparse_reference, (n,) bool, from what `ReferenceHull.e_above_hull` found (not `credible`).

    Args:
        e_above_hull: (n,) eV/atom; NaN, where it is unknown, is not below.
        num_references: (n,) phases in each crystal's chemical system.
    """
    return {"far_below_hull": e_above_hull < TOO_DEEP, "sparse_reference": num_references < FEW_REFERENCES}


def relaxation_flags(volume_change: np.ndarray, rmsd: np.ndarray, isolation: np.ndarray) -> dict[str, np.ndarray]:
    """exploded, (n,) bool; NaN, where something is unknown, counts as sound.

    A crystal that is not yet converged is no such case: its energy can only fall, so nothing is gained by it.

    Args:
        volume_change: (n,) relative to the start.
        rmsd: (n,) angstrom.
        isolation: (n,) largest distance of an atom to its nearest neighbour, in sums of covalent radii.
    """
    ratio = 1 + volume_change
    return {"exploded": (ratio > MOST_VOLUME) | (ratio < 1 / MOST_VOLUME) | (rmsd > MOST_MOVED) | (isolation >= APART)}
