"""MACE (Batatia et al., NeurIPS 2022; foundation models arXiv 2401.00096) behind the common interface.

A `.model` file is a pickled module. It is read with torch's restricted unpickler, which is told the classes
that MACE models are made of; anything else in the file is refused. Cells are reduced by their centring
translations before the model sees them: equivariant features do not allow more (see cells.py).
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cfrl.errors import UserError
from cfrl.potentials.base import POOLING, Evaluation, Potential, pool_features
from cfrl.potentials.cells import SymmetricCell, neighbours
from cfrl.potentials.scales import RAW

# Trained on raw energies of MPtrj (and, mpa, of Alexandria's same settings). OMat24 and MatPES, which the others
# know, took other pseudopotentials or functionals: the corrections do not fit them.
TRAINED_ON_MPTRJ = {
    *("small", "medium", "large", "small-0b", "medium-0b", "small-0b2", "medium-0b2", "large-0b2", "medium-0b3"),
    "medium-mpa-0",
}
MODEL_PACKAGES = ("mace.modules.", "e3nn.o3.", "e3nn.nn.", "e3nn.math.", "torch.nn.modules.")
HARMLESS = {
    "builtins.slice",
    "torch.fx._symbolic_trace.Tracer",
    *(f"torch.nn.functional.{name}" for name in ("silu", "tanh", "gelu", "relu", "softplus", "sigmoid")),
    *(f"torch.{name}" for name in ("tanh", "sigmoid", "relu", "abs")),
}
TRACED = "torch.fx.graph_module.reduce_graph_module"
TRACED_CALLS = {"einsum", "tensordot", "reshape", "permute", "transpose", "mul", "add", "sum", "contiguous"}
TRACED_SYNTAX = (
    *(ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Assign, ast.Return, ast.Expr, ast.Call),
    *(ast.keyword, ast.Attribute, ast.Name, ast.Constant, ast.Tuple, ast.List, ast.Load, ast.Store),
    *(ast.UnaryOp, ast.USub, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div),
)


@dataclass
class _Graph:
    """A cell reduced by its centring: r atoms, e edges neighbour -> atom, `copies` times in the whole cell."""

    cell: SymmetricCell
    orbit: np.ndarray  # (N,) reduced atom of each atom
    first: np.ndarray  # (r,) an atom of each
    edges: np.ndarray  # (2, e) from neighbour to atom
    shift: np.ndarray  # (e, 3) lattice vectors, possibly centring ones, to be added to the edge
    copies: int


class MACEPotential(Potential[_Graph]):
    """A MACE model. Features: the invariant descriptors of all layers, pooled over the atoms (POOLING).

    Of a model with several heads the one called "default" is used, else the last.
    """

    def __init__(self, model: str, device: torch.device) -> None:
        """Loads the weights.

        Args:
            model: name of a MACE-MP foundation model, or path of a `.model` file.

        Raises:
            UserError: it does not exist, cannot be read, or mace-torch is not installed.
        """
        if not model:
            raise UserError("which MACE model? Use mace:medium-mpa-0 or mace:PATH.model")
        if model.endswith(".model") and not Path(model).is_file():
            raise UserError(f"no such MACE model file: {model}")
        with imported_mace():
            path = Path(model) if Path(model).is_file() else _foundation_model(model)
            network = load_mace_model(path)
        self.model = network.to(device, torch.float32).eval().requires_grad_(False)
        numbers = network.atomic_numbers.tolist()
        self._index = np.full(max(numbers) + 1, -1)
        self._index[numbers] = np.arange(len(numbers))
        self.name = self.name_of(model)
        self.training_scale = self.scale_of(model)
        self.elements = frozenset(numbers)
        self.cutoff = float(network.r_max)
        self.max_atoms = 128 if device.type == "cpu" else 4096
        self.device = device
        heads = [str(head).lower() for head in getattr(network, "heads", ["default"])]
        self._head = heads.index("default") if "default" in heads else len(heads) - 1
        irreps = network.products[0].linear.irreps_out
        self._layers = {"num_layers": int(network.num_interactions), "l_max": irreps.lmax}
        self._layers["num_features"] = irreps.dim // (irreps.lmax + 1) ** 2
        invariant = self._layers["num_layers"] * self._layers["num_features"]
        self.feature_size = len(POOLING) * invariant
        self.feature_version = f"{self.name}/invariants-{invariant}/{'-'.join(POOLING)}"

    @staticmethod
    def name_of(version: str) -> str:
        return f"mace-{Path(version).stem if version.endswith('.model') or Path(version).is_file() else version}"

    @staticmethod
    def scale_of(version: str) -> str:
        return RAW if version in TRAINED_ON_MPTRJ and not Path(version).is_file() else ""

    def prepare(self, cell: SymmetricCell) -> _Graph:
        cell = cell.translations_only()
        first, size, orbit = cell.orbits()
        atom, neighbour, translation, distance = neighbours(cell, first, self.cutoff)
        inside = distance < self.cutoff
        atom, neighbour, translation = atom[inside], neighbour[inside], translation[inside]
        source = orbit[neighbour]
        shift = cell.frac[first[source]] - cell.frac[neighbour] - translation
        return _Graph(cell, orbit, first, np.stack([source, atom]), shift, int(size[0]))

    def evaluate(self, graphs: list[_Graph], forces: bool, stress: bool, features: bool) -> Evaluation:
        batch = self._batch(graphs)
        with torch.set_grad_enabled(forces or stress):
            out = self.model(batch, compute_force=forces, compute_stress=stress)
        atoms = np.array([len(g.first) for g in graphs])
        return Evaluation(
            energy=_numpy(out["energy"]) / atoms,
            status=[""] * len(graphs),
            forces=self._forces(graphs, atoms, _numpy(out["forces"])) if forces else None,
            stress=self._stress(graphs, _numpy(out["stress"])) if stress else None,
            features=self._features(out["node_feats"], batch["batch"], len(graphs)) if features else None,
        )

    def _batch(self, graphs: list[_Graph]) -> dict[str, torch.Tensor]:
        """What a MACE model reads: all graphs as one, in float32."""
        atoms = [len(g.first) for g in graphs]
        start = np.cumsum([0, *atoms])
        index = self._index[np.concatenate([g.cell.numbers[g.first] for g in graphs])]
        cells = np.stack([g.cell.matrix for g in graphs])
        arrays = {
            "positions": np.concatenate([(g.cell.frac @ g.cell.matrix)[g.first] for g in graphs]),
            "node_attrs": np.eye(len(self.elements))[index],
            "unit_shifts": np.concatenate([g.shift for g in graphs]),
            "shifts": np.concatenate([g.shift @ g.cell.matrix for g in graphs]),
            "cell": cells.reshape(-1, 3),
            "edge_index": np.concatenate([g.edges + s for g, s in zip(graphs, start, strict=False)], 1),
            "batch": np.repeat(np.arange(len(graphs)), atoms),
            "ptr": start,
            "head": np.full(len(graphs), self._head),
        }
        tensors = {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}
        return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}

    @staticmethod
    def _forces(graphs: list[_Graph], atoms: np.ndarray, forces: np.ndarray) -> list[np.ndarray]:
        parts = np.split(forces, np.cumsum(atoms)[:-1])
        return [part[g.orbit] for g, part in zip(graphs, parts, strict=True)]

    @staticmethod
    def _stress(graphs: list[_Graph], stress: np.ndarray) -> np.ndarray:
        """The model divides the energy of the reduced cell by the volume of the whole one."""
        return stress * np.array([g.copies for g in graphs])[:, None, None]

    def _features(self, nodes: torch.Tensor, crystal: torch.Tensor, n: int) -> np.ndarray:
        from mace.modules.utils import extract_invariant

        invariant = extract_invariant(nodes, **self._layers)
        return _numpy(pool_features(invariant, crystal, torch.ones_like(crystal), n))


def load_mace_model(path: Path) -> torch.nn.Module:
    """Read a `.model` file without running code from it, except the einsums that MACE itself stores as code.

    Raises:
        UserError: the file holds anything that a MACE model does not need.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_resolve(name), name) for name in names]):
            model = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch tells corrupt, foreign and forbidden content in many ways
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{path}: not a MACE model that can be read safely ({reason})") from error
    if not (isinstance(model, torch.nn.Module) and hasattr(model, "r_max")):
        raise UserError(f"{path}: holds a {type(model).__name__}, not a MACE model")
    return model


def _resolve(name: str) -> Callable[..., object]:
    """The class of this name if MACE models are made of such. Raises ValueError if not."""
    if name == TRACED:
        return _traced_module
    module, _, attribute = name.rpartition(".")
    if name.startswith(MODEL_PACKAGES) or name in HARMLESS:
        found = getattr(importlib.import_module(module), attribute)
        if name in HARMLESS or (isinstance(found, type) and issubclass(found, (torch.nn.Module, tuple))):
            return found
    raise ValueError(f"{name} has no place in a MACE model")


def _traced_module(body: dict[str, object], import_block: str) -> torch.nn.Module:
    """torch.fx's own loader executes stored source; only tensor contractions may pass."""
    from torch.fx.graph_module import reduce_graph_module

    for node in ast.walk(ast.parse(body["_code"])):
        called = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
        if not isinstance(node, TRACED_SYNTAX) or (isinstance(node, ast.Call) and called not in TRACED_CALLS):
            raise ValueError(f"stored code with {ast.unparse(node)[:80]!r}")
        if isinstance(node, ast.FunctionDef) and (node.decorator_list or node.args.defaults):
            raise ValueError("stored code with decorators")
    return reduce_graph_module({**body, "_tracer_cls": None}, "import torch\n")


@contextlib.contextmanager
def imported_mace() -> Iterator[None]:
    """mace on import makes torch.load unsafe for the whole process; undo that. Its chatter goes to stderr.

    Raises:
        UserError: mace-torch is not installed.
    """
    variable = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("mace.modules")
            yield
    except ImportError as error:
        raise UserError("the MACE potential needs the package: pip install mace-torch") from error
    finally:
        os.environ.pop(variable, None)
        if before is not None:
            os.environ[variable] = before


def _foundation_model(name: str) -> Path:
    from mace.calculators.foundations_models import download_mace_mp_checkpoint, mace_mp_urls

    if name not in mace_mp_urls:
        raise UserError(f"no MACE model {name!r}: neither a file nor one of {', '.join(mace_mp_urls)}")
    try:
        return Path(download_mace_mp_checkpoint(name))
    except (OSError, RuntimeError) as error:
        raise UserError(f"MACE model {name!r} could not be downloaded: {error}") from error


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()
