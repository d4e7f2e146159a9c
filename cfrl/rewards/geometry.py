"""Rewards that need nothing but the crystal: density, volume, room for the atoms, and whether it is new."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from cfrl.crystals.distances import closest_contact
from cfrl.crystals.fingerprint import fingerprints
from cfrl.rewards.context import Inputs
from cfrl.rewards.registry import register_reward


@register_reward("density", unit="g/cm3")
def density(crystals: Any, structures: list[Any]) -> np.ndarray:
    """Mass density."""
    return crystals.densities().double().numpy()


@register_reward("volume_per_atom", unit="A3/atom", goal="min")
def volume_per_atom(crystals: Any, structures: list[Any]) -> np.ndarray:
    """Volume per atom."""
    return (crystals.volumes().double() / crystals.num_atoms).numpy()


@register_reward("contact", unit="sum of covalent radii")
def contact(crystals: Any, structures: list[Any], *, limit: float = 0.75) -> np.ndarray:
    """Smallest distance of two atoms over the sum of their covalent radii, at most `limit`: atoms kept apart."""
    return np.array([closest_contact(structure, limit) for structure in structures])


@register_reward("novelty", needs=("dataset",))
def novelty(
    crystals: Any,
    structures: list[Any],
    inputs: Inputs,
    *,
    level: Literal["structure", "formula", "system"] = "structure",
) -> np.ndarray:
    """1 if the dataset holds no crystal alike, else 0; alike in structure (formula, space group and Wyckoff
    sequence), in reduced formula, or in chemical system.
    """
    memo, key = inputs.context.memo, ("novelty", level)
    if key not in memo:
        memo[key] = set(_labels(inputs.context.dataset, level))
    return np.array([label not in memo[key] for label in _labels(crystals, level)], dtype=float)


def _labels(crystals: Any, level: str) -> list[str]:
    if level == "structure":
        return fingerprints(crystals)
    if level == "formula":
        return crystals.formulas()
    return [" ".join(map(str, sorted({z for z in row if z}))) for row in crystals.species.tolist()]
