"""One interface for every interatomic potential: many crystals in, energies, forces, stress and features out.

This file owns what all potentials share: batching by atoms, building graphs while the
model works, halving batches when memory runs out, and confining a failure to the crystal that caused it.
What a graph is and how a model reads it is left to the adapters (chgnet.py, mace.py, outside.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import torch

from cfrl.errors import UserError
from cfrl.potentials.cells import SymmetricCell, UnusableCrystal
from cfrl.potentials.scales import CORRECTED, RAW, mp2020_correction

if TYPE_CHECKING:
    from pymatgen.core import Structure

    from cfrl.crystals.crystal import CrystalBatch

    Crystal = Structure | SymmetricCell

Graph = TypeVar("Graph")  # what a model makes of a crystal; each adapter has its own
POOLING = ("mean", "std", "min", "max")
MAX_ENERGY = 100.0  # eV/atom; beyond any crystal, only extrapolation gives it


@dataclass
class Evaluation:
    """Results for n crystals, in the order they came. A failed crystal has NaN values and a status.

    energy: (n,) float64, eV/atom
    status: n strings, "" where the crystal was evaluated, else the reason why not
    forces: n arrays (atoms, 3), eV/angstrom, or None if not asked for
    stress: (n, 3, 3), eV/angstrom^3, positive under tension (dE/dstrain / volume), or None
    features: (n, d), the potential's own description of the crystal, or None
    correction: (n,) eV/atom, what of the energy the model did not give (scales.py), or None
    """

    energy: np.ndarray
    status: list[str]
    forces: list[np.ndarray] | None = None
    stress: np.ndarray | None = None
    features: np.ndarray | None = None
    correction: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.status)

    @property
    def ok(self) -> np.ndarray:
        """(n,) bool: the crystals that were evaluated."""
        return np.array([not reason for reason in self.status], dtype=bool)

    @property
    def uncorrected(self) -> np.ndarray:
        """(n,) eV/atom: the model's own energy."""
        return self.energy if self.correction is None else self.energy - self.correction

    def __getitem__(self, index: slice | np.ndarray | Sequence[int]) -> Evaluation:
        rows = np.arange(len(self))[index]
        return Evaluation(
            energy=self.energy[rows],
            status=[self.status[i] for i in rows],
            forces=None if self.forces is None else [self.forces[i] for i in rows],
            stress=None if self.stress is None else self.stress[rows],
            features=None if self.features is None else self.features[rows],
            correction=None if self.correction is None else self.correction[rows],
        )

    @staticmethod
    def cat(parts: Sequence[Evaluation]) -> Evaluation:
        """Join evaluations that asked for the same quantities."""
        first = parts[0]
        return Evaluation(
            energy=np.concatenate([p.energy for p in parts]),
            status=[s for p in parts for s in p.status],
            forces=None if first.forces is None else [f for p in parts for f in p.forces],
            stress=None if first.stress is None else np.concatenate([p.stress for p in parts]),
            features=None if first.features is None else np.concatenate([p.features for p in parts]),
            correction=None if first.correction is None else np.concatenate([p.correction for p in parts]),
        )


class Potential(ABC, Generic[Graph]):
    """A machine-learned interatomic potential.

    name: e.g. "chgnet-0.3.0"
    training_scale: what it was trained on, "mp2020", "mp-raw" or another (scales.py); "" where nobody says
    elements: atomic numbers that the potential was trained on
    cutoff: angstrom, radius of the neighbour list
    feature_version: model and layout of the feature vector; predictors store it and refuse another
    feature_layers: of the network that the feature vector speaks of, each with its `POOLING`
    max_atoms: atoms per batch; halved for good when memory runs out
    """

    name: str
    training_scale: str
    elements: frozenset[int]
    cutoff: float
    feature_version: str
    feature_size: int
    feature_layers: int = 1
    max_atoms: int
    device: torch.device

    @staticmethod
    @abstractmethod
    def name_of(version: str) -> str:
        """The name of this version."""

    @staticmethod
    @abstractmethod
    def scale_of(version: str) -> str:
        """The training scale of this version, known without loading it."""

    @staticmethod
    def result_scale(training_scale: str, name: str) -> str:
        """The scale of the energies that `compute` gives."""
        return CORRECTED if training_scale == RAW else training_scale or name

    @property
    def energy_scale(self) -> str:
        """The scale of the energies that `compute` gives; "mp2020", or one of its own."""
        return self.result_scale(self.training_scale, self.name)

    @abstractmethod
    def prepare(self, cell: SymmetricCell) -> Graph:
        """The model's graph of one checked crystal. Raises UnusableCrystal with the reason."""

    @abstractmethod
    def evaluate(self, graphs: list[Graph], forces: bool, stress: bool, features: bool) -> Evaluation:
        """Run the model once on a batch of graphs."""

    def compute(
        self,
        structures: CrystalBatch | Iterable[Crystal],
        forces: bool = False,
        stress: bool = False,
        features: bool = False,
        progress: Callable[[int], None] | None = None,
        corrected: bool = True,
    ) -> Evaluation:
        """Evaluate n crystals of mixed sizes.

        Never raises because of a crystal: what cannot be evaluated gets NaN and a status.

        Args:
            structures: n pymatgen structures, SymmetricCells or a CrystalBatch.
            forces, stress, features: what is wanted beside energies.
            progress: called with the number of crystals done so far.
            corrected: False leaves energies as the model gives them: a relaxation must, as corrections jump where a
                bond O-O is counted no more.
        """
        structures = structures.to_structures() if hasattr(structures, "to_structures") else list(structures)
        result = self.blank(structures, forces, stress, features)
        for done, batch in self._batches(structures, result.status):
            self._run(batch, result)
            if progress is not None:
                progress(done)
        if corrected:
            self.correct(structures, result)
        return result

    def correct(self, structures: Sequence[Crystal], result: Evaluation) -> None:
        """Adds the MP2020 corrections to the energies where the model was trained without them."""
        if self.training_scale != RAW:
            return
        result.correction = np.full(len(result), np.nan)
        for row in np.flatnonzero(result.ok):
            crystal = structures[row]
            try:
                structure = crystal.structure() if isinstance(crystal, SymmetricCell) else crystal
                result.correction[row] = mp2020_correction(structure)
            except Exception as error:  # pymatgen's rules meet crystals that nobody thought of
                result.status[row] = f"no MP2020 correction: {_describe(error)}"
        result.energy = result.energy + result.correction

    def embeddings(self, features: np.ndarray) -> np.ndarray:
        """Of feature vectors (n, d) the mean over atoms in the last layer, (n, d / layers / 4)."""
        return features.reshape(len(features), self.feature_layers, len(POOLING), -1)[:, -1, POOLING.index("mean")]

    def blank(
        self, structures: Sequence[Crystal], forces: bool = False, stress: bool = False, features: bool = False
    ) -> Evaluation:
        """An evaluation to be filled in: NaN, no status."""
        n = len(structures)
        return Evaluation(
            energy=np.full(n, np.nan),
            status=[""] * n,
            forces=[np.full((len(s), 3), np.nan) for s in structures] if forces else None,
            stress=np.full((n, 3, 3), np.nan) if stress else None,
            features=np.full((n, self.feature_size), np.nan) if features else None,
        )

    def _batches(self, structures: list[Crystal], status: list[str]) -> Iterator[tuple[int, list[tuple[int, Graph]]]]:
        """Yield (crystals done after this batch, [(row, graph), ...]); the next graphs are built meanwhile."""
        chunks = self._chunks(structures)
        with ThreadPoolExecutor(1) as worker:
            ahead = worker.submit(self._graphs, structures, next(chunks, []), status)
            for rows in chunks:
                batch, ahead = ahead.result(), worker.submit(self._graphs, structures, rows, status)
                yield rows[0], batch
            yield len(structures), ahead.result()

    def _chunks(self, structures: list[Crystal]) -> Iterator[list[int]]:
        """Consecutive rows that together have at most `max_atoms` atoms (or one crystal)."""
        rows, atoms = [], 0
        for row, structure in enumerate(structures):
            if rows and atoms + len(structure) > self.max_atoms:
                yield rows
                rows, atoms = [], 0
            rows.append(row)
            atoms += len(structure)
        if rows:
            yield rows

    def _graphs(self, structures: list[Crystal], rows: list[int], status: list[str]) -> list[tuple[int, Graph]]:
        batch = []
        for row in rows:
            try:
                crystal = structures[row]
                cell = crystal if isinstance(crystal, SymmetricCell) else SymmetricCell.of(crystal)
                cell.check(self.elements, self.cutoff)
                batch.append((row, self.prepare(cell)))
            except UnusableCrystal as reason:
                status[row] = str(reason)
            except Exception as error:  # a crystal that no one thought of must not end the run
                status[row] = f"no graph: {_describe(error)}"
        return batch

    def _run(self, batch: list[tuple[int, Graph]], result: Evaluation) -> None:
        """Evaluate a batch; when that fails, halve it until the crystal at fault stands alone."""
        if not batch:
            return
        try:
            with subnormals_flushed():
                part = self.evaluate(
                    [graph for _, graph in batch],
                    result.forces is not None,
                    result.stress is not None,
                    result.features is not None,
                )
        except UserError:  # the potential itself is of no use any more
            raise
        except Exception as error:  # whatever a model raises belongs to one crystal, or to memory
            no_memory = _out_of_memory(error)
            if len(batch) == 1:
                result.status[batch[0][0]] = "out of memory" if no_memory else f"failed: {_describe(error)}"
                return
        else:
            self._store(part, [row for row, _ in batch], result)
            return
        if no_memory:  # outside the handler: its traceback would keep the tensors alive
            self.max_atoms = max(self.max_atoms // 2, 1)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        half = len(batch) // 2
        self._run(batch[:half], result)
        self._run(batch[half:], result)

    @staticmethod
    def _store(part: Evaluation, rows: list[int], result: Evaluation) -> None:
        for i, row in enumerate(rows):
            result.status[row] = part.status[i] or _implausible(part, i)
            if result.status[row]:
                continue
            result.energy[row] = part.energy[i]
            if result.forces is not None:
                result.forces[row] = part.forces[i]
            if result.stress is not None:
                result.stress[row] = part.stress[i]
            if result.features is not None:
                result.features[row] = part.features[i]


@contextmanager
def subnormals_flushed() -> Iterator[None]:
    """Takes numbers below 1e-38 for zero meanwhile, in this thread.

    Activations of a far negative input and cutoff functions near their end are such numbers, and each costs a CPU a
    hundred cycles: a quarter of the time of a CHGNet.
    """
    before = float(torch.tensor(1e-40) * 1) == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def pool_features(layer: torch.Tensor, crystal: torch.Tensor, size: torch.Tensor, n: int) -> torch.Tensor:
    """Features of atoms to those of n crystals, the four of POOLING after one another.

    Args:
        layer: (r, f) features.
        crystal, size: (r,) of each row the number of its crystal, and how many atoms of it the row stands for.

    Returns:
        (n, 4 f).
    """
    index = crystal[:, None].expand_as(layer)  # (r, f)
    zeros = layer.new_zeros(n, layer.shape[1])  # (n, f)
    size = size[:, None].to(layer)  # (r, 1)
    atoms = zeros.scatter_add(0, index, size.expand_as(layer))
    mean = zeros.scatter_add(0, index, size * layer) / atoms  # (n, f)
    variance = zeros.scatter_add(0, index, size * (layer - mean[crystal]) ** 2) / atoms
    variance = variance.clamp(min=1e-12)  # the root has no gradient at 0
    low, high = (zeros.scatter_reduce(0, index, layer, r, include_self=False) for r in ("amin", "amax"))
    return torch.cat([mean, variance.sqrt(), low, high], 1)


def _implausible(part: Evaluation, i: int) -> str:
    """Why a computed value cannot be true, or ""."""
    values = [part.energy[i]]
    values += [] if part.forces is None else [part.forces[i]]
    values += [] if part.stress is None else [part.stress[i]]
    values += [] if part.features is None else [part.features[i]]
    if not all(np.isfinite(v).all() for v in values):
        return "the potential gave NaN or infinity"
    if abs(part.energy[i]) > MAX_ENERGY:
        return f"implausible energy {part.energy[i]:.3g} eV/atom"
    return ""


def _out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "not enough memory" in text


def _describe(error: Exception) -> str:
    first_line = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first_line}"[:200]
