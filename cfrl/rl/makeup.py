"""What a model's crystals are made of: shares of kinds, of guarded crystals, of repeats.

Beside a gain it says whether the crystals became better or only easier.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.fingerprint import fingerprints, prototypes
from cfrl.crystals.kinds import CLASSES, kinds, shares
from cfrl.rewards.guards import GUARDS

MAKEUP = "makeup.csv"  # of a run folder
FEWEST = 10  # crystals of a kind before tuning; what fewer become is chance
OTHERS = ("unique", "prototypes", "without a score")


def makeup(crystals: CrystalBatch, status: Sequence[str]) -> dict[str, float]:
    """Shares among n crystals, by what they are shares of, such as "anion: oxide", "guard: element" and "unique".

    "prototypes" is the number of different ones over n.

    Args:
        status: n strings as in `Rollout`: "" where a crystal has a score.
    """
    n, found = max(len(crystals), 1), {}
    for name, labels in kinds(crystals).items():
        parts = zip(CLASSES[name], shares(labels, name), strict=True)
        found |= {f"{name}: {label}": float(share) for label, share in parts}
    met = [reason for reason in status if reason.startswith("guard: ")]
    found |= {f"guard: {name}": met.count(f"guard: {name}") / n for name in GUARDS if f"guard: {name}" in met}
    found["without a score"] = sum(bool(reason) for reason in status) / n
    found["unique"] = len(set(fingerprints(crystals))) / n
    found["prototypes"] = len(set(prototypes(crystals))) / n
    return found


def halved(shares: dict[str, tuple[float, float]], n: int) -> list[str]:
    """Kinds, among shares before and after, of which less than half is left.

    Not guards, nor elements alone, which a guard stops; nor kinds with fewer than `FEWEST` of n crystals before.
    """
    kinds = [name for name in shares if name.partition(":")[0] in CLASSES and name != "elements: 1 element"]
    return [name for name in kinds if shares[name][0] * n >= FEWEST and shares[name][1] < shares[name][0] / 2]


def compared(before: dict[str, float], after: dict[str, float]) -> dict[str, np.ndarray]:
    """Two of `makeup` as a table: columns "share_of", "before" and "after"."""
    names = [name for name in {**before, **after} if name not in OTHERS] + list(OTHERS)
    return {
        "share_of": np.array(names, dtype=object),
        "before": np.array([before.get(name, 0.0) for name in names]),
        "after": np.array([after.get(name, 0.0) for name in names]),
    }
