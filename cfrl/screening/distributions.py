"""How varied a set of crystals is, and how far its distributions lie from those of another set.

Definitions and bins of LeMat-GenBench (arXiv:2512.04562; `diversity_metric.py`, `distribution_utils.py`). Cells are
counted as they are given: a supercell has more sites and a larger volume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cfrl.crystals.crystal import CrystalBatch

if TYPE_CHECKING:
    from pymatgen.core import Structure

NUM_ELEMENTS, NUM_GROUPS = 118, 230
LAST_GROUP = (2, 15, 74, 142, 167, 194, 230)  # of each crystal system, triclinic first
BIN, PACKING_BIN = 0.5, 0.05  # of densities (g/cm^3) and lengths (angstrom), and of packing factors
SIGMA = 1.0  # of the Gaussian kernel, in the unit of each quantity


@dataclass(frozen=True)
class Sample:
    """What the distributions are of: n crystals.

    space_group: (n,) 1..230
    atoms: (n, 118) of each element in the cell
    volume: (n,) angstrom^3, of the cell
    density: (n,) g/cm^3
    """

    space_group: np.ndarray
    atoms: np.ndarray
    volume: np.ndarray
    density: np.ndarray

    @staticmethod
    def of(structures: Sequence[Structure], space_groups: Sequence[int]) -> Sample:
        """Of n structures, as they stand."""
        atoms = np.zeros((len(structures), NUM_ELEMENTS))
        for row, structure in zip(atoms, structures, strict=True):
            np.add.at(row, np.array(structure.atomic_numbers) - 1, 1)
        volume, density = ([getattr(s, name) for s in structures] for name in ("volume", "density"))
        return Sample(np.array(space_groups, dtype=np.int64), atoms, np.array(volume), np.array(density))

    @staticmethod
    def of_crystals(crystals: CrystalBatch) -> Sample:
        """Of the conventional cells of n crystals."""
        atoms = np.zeros((len(crystals), NUM_ELEMENTS + 1))
        rows = np.arange(len(crystals))[:, None]
        np.add.at(atoms, (rows, crystals.species.numpy()), crystals.multiplicity.numpy())
        volume, density = crystals.volumes().double().numpy(), crystals.densities().double().numpy()
        return Sample(crystals.space_group.numpy(), atoms[:, 1:], volume, density)

    @property
    def shares(self) -> dict[str, np.ndarray]:
        """Distributions of what is counted: space groups, crystal systems, atoms by element, elements present."""
        systems = np.searchsorted(LAST_GROUP, self.space_group)
        counts = {
            "SpaceGroup": np.bincount(self.space_group - 1, minlength=NUM_GROUPS),
            "CrystalSystem": np.bincount(systems, minlength=len(LAST_GROUP)),
            "CompositionCounts": self.atoms.sum(0),
            "Composition": (self.atoms > 0).sum(0),
        }
        return {name: count / count.sum() for name, count in counts.items()}

    @property
    def quantities(self) -> dict[str, np.ndarray]:
        """(n,) of what is measured, by the names that the benchmark gives them."""
        per_volume = self.atoms.sum(1) / self.volume
        return {"Volume": self.volume, "Density(g/cm^3)": self.density, "Density(atoms/A^3)": per_volume}


# ---- how varied ----


def entropy(counts: np.ndarray) -> float:
    """Shannon's, in nats, of a histogram."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def vendi_score(counts: np.ndarray) -> float:
    """How many kinds there are in effect: exp(entropy).

    That is the Vendi score (Friedman and Dieng 2023) where two crystals of a kind are alike and others not at all.
    """
    return float(np.exp(entropy(counts)))


def diversity(sample: Sample, structures: Sequence[Structure]) -> dict[str, float]:
    """Figures of diversity of n crystals; `structures` are those of the sample.

    For elements (each atom counts), space groups and numbers of sites: Vendi score and entropy (nats), and the share
    of the 118 elements and 230 space groups that occur. "size, entropy": that of histograms of density, a, b, c and
    packing factor, averaged, over log2 n (as the benchmark has it: nats over bits).
    """
    sizes = sample.atoms.sum(1).astype(int)
    counts = {
        "elements": sample.atoms.sum(0),
        "space groups": np.bincount(sample.space_group),
        "sites": np.bincount(sizes),
    }
    found: dict[str, float] = {}
    for name, count in counts.items():
        found |= {f"{name}, Vendi score": vendi_score(count), f"{name}, entropy": entropy(count)}
    found["elements, coverage"] = float((counts["elements"] > 0).sum() / NUM_ELEMENTS)
    found["space groups, coverage"] = float((counts["space groups"] > 0).sum() / NUM_GROUPS)
    found["sites, mean"] = float(sizes.mean())
    lengths = np.array([structure.lattice.abc for structure in structures]).T // BIN
    packing = np.array([packing_factor(structure) for structure in structures]) // PACKING_BIN
    entropies = [
        entropy(np.unique(binned, return_counts=True)[1]) for binned in (sample.density // BIN, *lengths, packing)
    ]
    if len(structures) > 1:
        found["size, entropy"] = float(np.mean(entropies) / np.log2(len(structures)))
    return found


def packing_factor(structure: Structure) -> float:
    """Volume of spheres of covalent radii over that of the cell, at most 1; what is beyond curium counts as this."""
    from pymatgen.analysis.molecule_structure_comparator import CovalentRadius

    known = CovalentRadius.radius
    radii = np.array([known.get(site.specie.symbol, known["Cm"]) for site in structure])
    return min(float(4 / 3 * np.pi * (radii**3).sum() / structure.volume), 1.0)


# ---- how far from another set ----


def jensen_shannon(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The distance (root of the divergence, in nats) of two distributions over the same kinds."""
    from scipy.spatial.distance import jensenshannon

    return float(jensenshannon(ours, theirs))


def mmd(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Squared maximum mean discrepancy of n and m numbers by a Gaussian kernel of width 1, each with itself too."""

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        rows = (np.exp(-((x - b) ** 2) / (2 * SIGMA**2)).mean() for x in a)  # a row at a time: m^2 would not fit
        return float(np.mean(list(rows)))

    return mean(ours, ours) + mean(theirs, theirs) - 2 * mean(ours, theirs)


def frechet(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Squared Frechet distance of normal distributions with the means and covariances of (n, d) and (m, d) numbers.

    |mu - mu'|^2 + tr(C + C' - 2 (C C')^(1/2)); the last trace is the sum of the roots of the eigenvalues of
    C^(1/2) C' C^(1/2), which is symmetric.
    """
    first, second = np.cov(ours, rowvar=False), np.cov(theirs, rowvar=False)
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    shift = ours.mean(0) - theirs.mean(0)
    return float(shift @ shift + np.trace(first) + np.trace(second) - 2 * cross)
