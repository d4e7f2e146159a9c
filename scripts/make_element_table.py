"""Writes cfrl/assets/elements.csv: element properties that the model's descriptors need, taken from pymatgen.

Run: python scripts/make_element_table.py
"""

import csv
import math
from pathlib import Path

from pymatgen.core import Element

OUTPUT = Path(__file__).parents[1] / "cfrl" / "assets" / "elements.csv"
SHELLS = "spdf"
LAST = 103  # no data beyond lawrencium


def valence(element: Element) -> list[int]:
    """Electrons in the s, p, d, f shells outside the noble-gas core; a closed d or f shell below p counts too."""
    if element.Z <= 2:
        return [element.Z, 0, 0, 0]
    noble = max(z for z in (2, 10, 18, 36, 54, 86) if z < element.Z)
    core = {(n, shell) for n, shell, _ in Element.from_Z(noble).full_electronic_structure}
    counts = dict.fromkeys(SHELLS, 0)
    for n, shell, electrons in element.full_electronic_structure:
        if (n, shell) not in core:
            counts[shell] += electrons
    return [counts[shell] for shell in SHELLS]


def row(z: int) -> dict[str, object]:
    element = Element.from_Z(z)
    s, p, d, f = valence(element)
    return {
        "number": z,
        "period": element.row,
        "group": element.group,
        "electronegativity": element.X if not math.isnan(element.X) else "",
        "radius": float(element.atomic_radius_calculated or element.atomic_radius or "nan"),
        "ionization_energy": element.ionization_energy or "",
        "electron_affinity": element.data.get("Electron affinity") or "",
        "mendeleev": element.mendeleev_no or "",
        "s": s,
        "p": p,
        "d": d,
        "f": f,
        "oxidation_states": " ".join(str(int(state)) for state in element.common_oxidation_states),
    }


if __name__ == "__main__":
    rows = [row(z) for z in range(1, LAST + 1)]
    with OUTPUT.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
