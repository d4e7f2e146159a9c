"""CHGNet (Deng et al., Nat. Mach. Intell. 5, 1031 (2023)) behind the common interface.

The weights come inside the chgnet package, so this potential works offline. Energies are on the scale of
the Materials Project (GGA/GGA+U with the MP2020 corrections). The network is CHGNet's own, layer by layer; it
runs on graphs folded by symmetry (folded.py), which gives the same numbers for a fraction of the work.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cfrl.errors import UserError
from cfrl.potentials.base import POOLING, Evaluation, Potential, pool_features
from cfrl.potentials.cells import SymmetricCell
from cfrl.potentials.folded import FoldedGraph, fold
from cfrl.potentials.gated import Gated, Part
from cfrl.potentials.scales import CORRECTED

SCALES = {"0.3.0": CORRECTED, "0.2.0": CORRECTED, "r2scan": "r2scan"}  # of the training data of each version
# MPtrj, the training set, holds no Po, At, Rn, Fr or Ra: their embeddings exist but were never trained.
ELEMENTS = frozenset(range(1, 95)) - frozenset(range(84, 89))


class CHGNetPotential(Potential[FoldedGraph]):
    """CHGNet with its pretrained weights.

    Features: for two layers (the atoms' features before the last convolution, which predict magnetic moments,
    and the final ones, which predict energies) the mean, standard deviation, minimum and maximum
    over the atoms of 64 numbers each: `features.reshape(n, 2, 4, 64)`. They do not depend on the choice of
    cell.
    """

    def __init__(self, version: str, device: torch.device, symmetry: bool = True) -> None:
        """Loads the weights.

        Args:
            version: one of SCALES.
            symmetry: False evaluates whole cells: slower, for comparison.

        Raises:
            UserError: the version is unknown, or chgnet is not installed.
        """
        if version not in SCALES:
            raise UserError(f"unknown CHGNet version {version!r}: there are {', '.join(SCALES)}")
        try:
            from chgnet.model import CHGNet
        except ImportError as error:
            raise UserError("the CHGNet potential needs the package: pip install chgnet") from error
        with contextlib.redirect_stdout(io.StringIO()):  # CHGNet prints its number of parameters
            model = CHGNet.load(model_name=version, use_device=str(device), verbose=False)
        self.model = model.eval().requires_grad_(False)
        self.layers = Layer.of(self.model)
        self.name = self.name_of(version)
        self.training_scale = self.scale_of(version)
        self.elements = ELEMENTS
        self.cutoff = float(model.graph_converter.atom_graph_cutoff)
        self.feature_version = f"{self.name}/layers-3-4/{'-'.join(POOLING)}"
        self.feature_layers = 2
        self.feature_size = self.feature_layers * len(POOLING) * model.atom_fea_dim
        self.max_atoms = 512 if device.type == "cpu" else 16384
        self.device = device
        self.symmetry = symmetry

    @staticmethod
    def name_of(version: str) -> str:
        return f"chgnet-{version}"

    @staticmethod
    def scale_of(version: str) -> str:
        return SCALES.get(version, "")

    def prepare(self, cell: SymmetricCell) -> FoldedGraph:
        cell = cell if self.symmetry else cell.without_symmetry()
        return fold(cell, self.cutoff, self.model.graph_converter.bond_graph_cutoff)

    def evaluate(self, graphs: list[FoldedGraph], forces: bool, stress: bool, features: bool) -> Evaluation:
        batch = _Batch(graphs, self.device)
        with torch.set_grad_enabled(forces or stress):
            batch.frac.requires_grad_(forces)
            batch.strain.requires_grad_(stress)
            energy, layers = self._forward(batch)
            wanted = [batch.frac] * forces + [batch.strain] * stress
            gradients = list(torch.autograd.grad(energy.sum(), wanted)) if wanted else []
        atoms = np.array([len(g.cell) for g in graphs])
        return Evaluation(
            energy=_numpy(energy) / atoms,
            status=[""] * len(graphs),
            forces=_forces(graphs, atoms, _numpy(gradients.pop(0))) if forces else None,
            stress=_stress(graphs, _numpy(gradients.pop(0))) if stress else None,
            features=np.concatenate([batch.pool(layer) for layer in layers], 1) if features else None,
        )

    def _forward(self, batch: _Batch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Energy of each whole cell (n,) in eV, float64, and the features of orbits in the last two layers."""
        model = self.model
        vector = batch.edge_vectors()
        length = vector.norm(dim=1, keepdim=True)
        bond_length = length[batch.bond_edge, 0]
        basis = model.bond_basis_expansion.rbf_expansion_ag(bond_length)
        atom = model.atom_embedding(batch.number - 1)
        bond = model.bond_embedding(basis)
        atom_weight = model.bond_weights_ag(basis)[batch.bond] * batch.count
        near = model.bond_weights_bg(model.bond_basis_expansion.rbf_expansion_bg(bond_length[batch.near]))
        bond_weight = near[batch.angle_bond] * near[batch.angle_other] * batch.angle_count
        direction = vector / length
        angle = model.angle_embedding(model.angle_basis_expansion(*direction[batch.angle_edges]))

        for layer in self.layers:
            atom = layer.convolve_atoms(batch, atom, bond, atom_weight)
            if layer.bonds is not None:
                bond = layer.convolve_bonds(batch, atom, bond, angle, bond_weight)
                magnetic = atom
            if layer.angles is not None:
                angle = layer.update_angles(batch, atom, bond, angle)
        if model.readout_norm is not None:  # 0.2.0 has none
            atom = model.readout_norm(atom)
        reference = model.composition_model.fc.weight[0][batch.number - 1]
        energy = (model.mlp(atom)[:, 0].double() + reference.double()) * batch.size
        return energy.new_zeros(batch.n).index_add(0, batch.orbit_cell, energy), (magnetic, atom)


@dataclass
class Layer:
    """Updates of atoms, bonds and angles, in this order; the last layer has only the first, the one before two."""

    atoms: Gated
    atoms_out: nn.Module
    bonds: Gated | None = None
    bonds_out: nn.Module | None = None
    angles: Gated | None = None

    @classmethod
    def of(cls, model: nn.Module, gated: Callable[[nn.Module, int], Gated] = Gated) -> list[Layer]:
        """Those of a CHGNet; `gated` makes a gated perceptron and the number of its parts into a function of these."""
        layers = [cls(gated(layer.twoBody_atom, 3), layer.mlp_out) for layer in model.atom_conv_layers]
        for layer, of in zip(layers, model.bond_conv_layers, strict=False):
            layer.bonds, layer.bonds_out = gated(of.twoBody_bond, 4), of.mlp_out
        for layer, of in zip(layers[:-2], model.angle_layers, strict=False):  # nothing reads the angles of a later one
            layer.angles = gated(of.twoBody_bond, 4)
        return layers

    def convolve_atoms(self, batch: _Batch, atom: Tensor, bond: Tensor, weight: Tensor) -> Tensor:
        messages = self.atoms([(atom, batch.source), (bond, batch.bond), (atom, batch.target)])
        return atom + self.atoms_out(torch.zeros_like(atom).index_add(0, batch.source, messages * weight))

    def convolve_bonds(self, batch: _Batch, atom: Tensor, bond: Tensor, angle: Tensor, weight: Tensor) -> Tensor:
        """Only bonds that have angles hear anything, but for the constant that version 0.2.0 adds to all."""
        messages = self.bonds(_corner(batch, atom, bond, angle))
        heard = bond.new_zeros(len(batch.near), bond.shape[1]).index_add(0, batch.angle_bond, messages * weight)
        (out,) = [layer for layer in self.bonds_out.layers if isinstance(layer, nn.Linear)]
        bond = bond if out.bias is None else bond + out.bias
        return bond.index_add(0, batch.near, heard @ out.weight.T)

    def update_angles(self, batch: _Batch, atom: Tensor, bond: Tensor, angle: Tensor) -> Tensor:
        return angle + self.angles(_corner(batch, atom, bond, angle))


def _corner(batch: _Batch, atom: Tensor, bond: Tensor, angle: Tensor) -> list[Part]:
    """What a message of an angle is made of: its two bonds, itself, and the atom between."""
    near = bond[batch.near]
    return [(near, batch.angle_bond), (near, batch.angle_other), (angle, None), (atom, batch.angle_center)]


class _Batch:
    """Folded graphs joined: indices count through the batch, weights are columns.

    near: the bonds that have angles; `angle_bond` and `angle_other` count among these.
    """

    def __init__(self, graphs: list[FoldedGraph], device: torch.device) -> None:
        self.n = len(graphs)
        self._graphs, self._device = graphs, device
        atoms = [len(g.cell) for g in graphs]
        self.frac = self._float([g.cell.frac for g in graphs])
        self.lattice = self._float([g.cell.matrix[None] for g in graphs])
        self.strain = torch.zeros_like(self.lattice)
        self.number = self._join("number")
        self.size = self._join("size")
        self.orbit_cell = self._repeat([len(g) for g in graphs])
        self.edge_cell = self._repeat([len(g.center) for g in graphs])
        self.center = self._join("center", atoms)
        self.neighbour = self._join("neighbour", atoms)
        self.translation = self._float([g.translation for g in graphs])
        orbits = [len(g) for g in graphs]
        self.source = self._join("source", orbits)
        self.target = self._join("target", orbits)
        self.angle_center = self._join("angle_center", orbits)
        edges = [len(g.center) for g in graphs]
        self.bond_edge = self._join("bond_edge", edges)
        self.angle_edges = self._join("angle_edges", edges)
        bonds = [len(g.bond_edge) for g in graphs]
        self.bond = self._join("bond", bonds)
        ends = torch.stack([self._join("angle_bond", bonds), self._join("angle_other", bonds)])
        self.near, (self.angle_bond, self.angle_other) = torch.unique(ends, return_inverse=True)
        self.count = self._join("count")[:, None]
        self.angle_count = self._join("angle_count")[:, None]

    def _join(self, name: str, sizes: list[int] | None = None) -> Tensor:
        parts = [getattr(g, name) for g in self._graphs]
        if sizes is not None:
            parts = [p + o for p, o in zip(parts, np.cumsum([0, *sizes]), strict=False)]
        return torch.from_numpy(np.concatenate(parts, axis=-1)).to(self._device)

    def _float(self, parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.float32)).to(self._device)

    def _repeat(self, sizes: list[int]) -> Tensor:
        return torch.from_numpy(np.repeat(np.arange(self.n), sizes)).to(self._device)

    def pool(self, layer: Tensor) -> np.ndarray:
        return _numpy(pool_features(layer, self.orbit_cell, self.size, self.n))

    def edge_vectors(self) -> Tensor:
        """(e, 3) from center to neighbour, angstrom."""
        lattice = self.lattice + self.lattice @ self.strain
        steps = self.frac[self.neighbour] + self.translation - self.frac[self.center]
        return (steps[:, None] @ lattice[self.edge_cell])[:, 0]


def _forces(graphs: list[FoldedGraph], atoms: np.ndarray, gradient: np.ndarray) -> list[np.ndarray]:
    """dE/dfrac of the folded energy -> forces on all atoms of each cell, eV/angstrom."""
    parts = np.split(gradient, np.cumsum(atoms)[:-1])
    return [
        -g.cell.unfold_gradient(part) @ np.linalg.inv(g.cell.matrix).T for g, part in zip(graphs, parts, strict=True)
    ]


def _stress(graphs: list[FoldedGraph], gradient: np.ndarray) -> np.ndarray:
    return np.stack([g.cell.unfold_strain(part) / g.cell.volume for g, part in zip(graphs, gradient, strict=True)])


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()
