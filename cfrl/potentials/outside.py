"""A potential that lives in another environment, behind the common interface.

Crystals go to its worker process in batches, reduced by their centring translations; energies, forces and stress come
back. A worker that dies or hangs is started anew, and the crystals that it left are asked one by one: only one that
costs two workers is given up, with the reason as its status.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cfrl.crystals.elements import SYMBOLS
from cfrl.errors import UserError
from cfrl.potentials.base import Evaluation, Potential
from cfrl.potentials.cells import SymmetricCell, primitive
from cfrl.potentials.environments import find, look
from cfrl.potentials.families import ASE, known_model, split_name
from cfrl.potentials.process import Worker, WorkerFault

STARTING = 900.0  # seconds until a worker must be ready: it may have to download its weights
GIVEN_UP = 5  # crystals in a row that the worker died on, after which it is the worker's fault
CUTOFF = 6.0  # angstrom, of a potential that does not tell its own


@dataclass
class _Reduced:
    """A cell without its centring: matrix (3, 3), frac and numbers of its r atoms; which one each of N atoms is."""

    matrix: np.ndarray
    frac: np.ndarray
    numbers: np.ndarray
    orbit: np.ndarray


class OutsidePotential(Potential[_Reduced]):
    """A potential of `families.py`, or any ASE calculator. It has no features, so that no predictor learns from it."""

    feature_version = ""
    feature_size = 0

    def __init__(self, name: str, device: torch.device) -> None:
        """Starts the worker, which loads the model.

        Args:
            name: such as "sevennet:7net-l3i5" or "ase:package.module:factory".

        Raises:
            UserError: it was not added, or cannot be loaded.
        """
        self._full = name
        environment = find(name)
        self._command = environment.command(split_name(name)[1], str(device))
        self.patience = environment.patience
        self._worker: Worker | None = None
        self._lost = 0  # crystals in a row
        hello = self._started().hello
        self.name = self.name_of(name)
        self.training_scale = self.scale_of(name)
        self.elements = frozenset(hello.get("elements") or range(1, len(SYMBOLS)))
        self.cutoff = float(hello.get("cutoff") or CUTOFF)
        self.max_atoms = 128 if device.type == "cpu" else 4096
        self.device = device

    @staticmethod
    def name_of(version: str) -> str:
        return "-".join(split_name(version)).replace(":", ".")

    @staticmethod
    def scale_of(version: str) -> str:
        if split_name(version)[0] == ASE:
            environment = look(version)
            return environment.scale if environment else ""
        model = known_model(version)
        return model.scale if model else ""

    def close(self) -> None:
        """End the worker; it is started again when it is needed."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    def prepare(self, cell: SymmetricCell) -> _Reduced:
        matrix, first, orbit = primitive(cell)
        frac = cell.frac[first] @ cell.matrix @ np.linalg.inv(matrix)
        return _Reduced(matrix, frac, cell.numbers[first], orbit)

    def evaluate(self, graphs: list[_Reduced], forces: bool, stress: bool, features: bool) -> Evaluation:
        if features:
            raise UserError(f"{self.name} gives energies, forces and stress, but no features to learn from")
        part = self.blank([g.orbit for g in graphs], forces, stress, False)
        for row, (status, found) in enumerate(self._answers(graphs, {"forces": forces, "stress": stress})):
            part.status[row] = status or _misshapen(found, graphs[row], forces, stress)
            if part.status[row]:
                continue
            part.energy[row] = found["energy"] / len(graphs[row].numbers)
            if forces:
                part.forces[row] = found["forces"][graphs[row].orbit]
            if stress:
                part.stress[row] = found["stress"]
        return part

    def _answers(self, graphs: list[_Reduced], wanted: dict[str, bool]) -> list[tuple[str, dict[str, np.ndarray]]]:
        """Status and arrays for each crystal; all at once, and one by one after the worker was lost."""
        answers: list[tuple[str, dict[str, np.ndarray]]] = []
        alone = False
        while len(answers) < len(graphs):
            asked = graphs[len(answers) :][: 1 if alone else None]
            came, fault = self._ask(asked, wanted)
            answers += came
            self._lost = 0 if came else self._lost
            if fault and alone:
                self._lost += 1
                answers.append((f"the worker was lost: {fault}", {}))
            if self._lost >= GIVEN_UP:
                raise UserError(
                    f"{self._full}: the worker was lost on {GIVEN_UP} crystals in a row: {fault}; "
                    f"is it whole? cfrl potentials add {self._full}"
                )
            alone = alone or bool(fault)
        return answers

    def _ask(self, graphs: list[_Reduced], wanted: dict[str, bool]) -> tuple[list[tuple[str, Any]], WorkerFault | None]:
        """The answers that came, and what kept the others from coming."""
        arrays = {
            "atoms": np.array([len(g.numbers) for g in graphs]),
            "matrix": np.stack([g.matrix for g in graphs]),
            "numbers": np.concatenate([g.numbers for g in graphs]),
            "frac": np.concatenate([g.frac for g in graphs]),
        }
        came: list[tuple[str, Any]] = []
        worker = self._started()
        try:
            for header, found in worker.ask(wanted, arrays, len(graphs), self.patience):
                came.append((str(header.get("status", "")), found))
        except WorkerFault as fault:
            self.close()
            return came, fault
        except BaseException:  # Ctrl-C: what the worker still has to say is not for the next question
            self.close()
            raise
        return came, None

    def _started(self) -> Worker:
        if self._worker is None:
            try:
                self._worker = Worker(self._command, STARTING)
            except WorkerFault as fault:
                raise UserError(f"{self._full}: its worker does not start: {fault}; {self._remedy()}") from fault
            problem = self._worker.hello.get("error")
            if problem:
                self.close()
                raise UserError(f"{self._full} cannot be loaded ({problem}); {self._remedy()}")
        return self._worker

    def _remedy(self) -> str:
        model = known_model(self._full)
        if model and "download" in model.weights:
            return f"its weights are {model.weights}, which takes the network once"
        if split_name(self._full)[0] == ASE:
            return f"name the Python that has it: cfrl potentials add {self._full} --python PATH"
        return f"a name of its package, or a file? Make the environment anew: cfrl potentials add {self._full} --again"


def _misshapen(found: dict[str, np.ndarray], graph: _Reduced, forces: bool, stress: bool) -> str:
    """What is wrong with the arrays of an answer, or ""."""
    shapes: dict[str, tuple[int, ...]] = {"energy": ()}
    shapes |= {"forces": (len(graph.numbers), 3)} if forces else {}
    shapes |= {"stress": (3, 3)} if stress else {}
    wrong = [name for name, shape in shapes.items() if name not in found or found[name].shape != shape]
    return f"the potential gave {', '.join(wrong)} of another shape" if wrong else ""
