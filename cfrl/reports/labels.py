"""What quantities, crystals and numbers are called on pages and figures."""

from __future__ import annotations

import math
import re
from typing import Any

from markupsafe import Markup

from cfrl.crystals import display

# What quantities are called on axes and in tables; others go by their own name.
LABELS = {
    "ehull": "energy above hull (eV/atom)",
    "e_above_hull": "energy above hull (eV/atom)",
    "judge_e_above_hull": "above hull, second judge (eV/atom)",
    "judge_status": "second judge",
    "band_gap": "band gap (eV)",
    "gap": "band gap (eV)",
    "dielectric": "dielectric constant",
    "eps_total": "dielectric constant",
    "eps_electronic": "electronic dielectric constant",
    "formation_energy_per_atom": "formation energy (eV/atom)",
    "formation_energy": "formation energy (eV/atom)",
    "bulk_modulus": "bulk modulus (GPa)",
    "shear_modulus": "shear modulus (GPa)",
    "density": "density (g/cm³)",
    "force": "largest force (eV/Å)",
    "energy": "energy (eV/atom)",
    "critic": "critic's word",
    "implied_reward": "implied reward (up to a constant)",
    "log_ratio": "log-likelihood ratio (nats)",
    "log_ratio_per_site": "log-likelihood ratio per site (nats)",
    "log_ratio_joint": "log-likelihood ratio with space group (nats)",
    "log_prob": "log P tuned (nats)",
    "log_prob_base": "log P base (nats)",
    "space_group": "space group",
    "rmsd": "RMSD of the relaxation (Å)",
    "volume_change": "relative change of volume",
    "energy_per_atom": "energy (eV/atom)",
    "max_force": "largest force (eV/Å)",
    "num_references": "references in the system",
    "known_as": "known as",
    "lowest_stiffness": "lowest eigenvalue of the stiffness (GPa)",
    "bulk_modulus_vrh": "bulk modulus (GPa), elastic tensor",
    "shear_modulus_vrh": "shear modulus (GPa), elastic tensor",
    "lowest_frequency": "lowest frequency (THz)",
}


def label(name: str) -> str:
    """A quantity's name with its unit."""
    whole, _, part = name.rpartition("/")
    if part in ("spread", "std"):
        return f"spread of {label(whole)}"
    return LABELS.get(part, part.replace("_", " "))


def name_alone(name: str) -> str:
    """`label` without the unit."""
    return re.sub(r" \([^()]*\)$", "", label(name))


def title(name: str) -> str:
    """`label` with a capital."""
    text = label(name)
    return text[:1].upper() + text[1:]


def slug(name: str) -> str:
    """Fit for a file's name and an HTML id."""
    return re.sub(r"\W+", "-", name).strip("-").lower()


def number_text(value: Any) -> str:
    """For reading."""
    if isinstance(value, str):
        return value
    if value is None or not math.isfinite(value):
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", "−")
    return (f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}").replace("-", "−")


def chance_text(p: float) -> str:
    """The probability that chance alone does as well."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def subscripts(formula: str) -> Markup:
    """BaTiO3 -> BaTiO<sub>3</sub>."""
    return Markup(display.subscripts(formula))


def space_group_symbol(number: int) -> Markup:
    """Such as `P2<sub>1</sub>/m`; bars stand above their digits."""
    return Markup(display.space_group_symbol(number))
