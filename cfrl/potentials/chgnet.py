"""CHGNet (Deng et al., Nat. Mach. Intell. 5, 1031 (2023)) behind the common interface.

The weights come inside the chgnet package, so this potential works offline. Energies are on the scale of
the Materials Project (GGA/GGA+U with the MP2020 corrections). The network is CHGNet's own, layer by layer; it
runs on graphs folded by symmetry (folded.py), which gives the same numbers for a fraction of the work.
"""

from __future__ import annotations

import contextlib
import io

import numpy as np
import torch
from torch import Tensor, nn

from cfrl.errors import UserError
from cfrl.potentials.base import POOLING, Evaluation, Potential, pool_features
from cfrl.potentials.cells import SymmetricCell
from cfrl.potentials.folded import FoldedGraph, fold
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
        bond_weight = model.bond_weights_bg(model.bond_basis_expansion.rbf_expansion_bg(bond_length))
        bond_weight = bond_weight[batch.angle_bond] * bond_weight[batch.angle_other] * batch.angle_count
        direction = vector / length
        angle = model.angle_embedding(model.angle_basis_expansion(*direction[batch.angle_edges]))

        for convolve, convolve_bonds, update_angles in zip(
            model.atom_conv_layers, model.bond_conv_layers, model.angle_layers, strict=False
        ):
            atom = _convolve(convolve, batch, atom, bond, atom_weight)
            corner = [batch.angle_bond, batch.angle_other, batch.angle_center]
            inputs = torch.cat([bond[corner[0]], bond[corner[1]], angle, atom[corner[2]]], 1)
            update = convolve_bonds.twoBody_bond(inputs) * bond_weight
            bond = bond + convolve_bonds.mlp_out(torch.zeros_like(bond).index_add(0, corner[0], update))
            inputs = torch.cat([bond[corner[0]], bond[corner[1]], angle, atom[corner[2]]], 1)
            angle = angle + update_angles.twoBody_bond(inputs)
        magnetic = atom
        atom = _convolve(model.atom_conv_layers[-1], batch, atom, bond, atom_weight)
        if model.readout_norm is not None:  # 0.2.0 has none
            atom = model.readout_norm(atom)
        reference = model.composition_model.fc.weight[0][batch.number - 1]
        energy = (model.mlp(atom)[:, 0].double() + reference.double()) * batch.size
        return energy.new_zeros(batch.n).index_add(0, batch.orbit_cell, energy), (magnetic, atom)


class _Batch:
    """Folded graphs joined: indices count through the batch, weights are columns."""

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
        self.angle_bond = self._join("angle_bond", bonds)
        self.angle_other = self._join("angle_other", bonds)
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


def _convolve(layer: nn.Module, batch: _Batch, atom: Tensor, bond: Tensor, weight: Tensor) -> Tensor:
    messages = layer.twoBody_atom(torch.cat([atom[batch.source], bond[batch.bond], atom[batch.target]], 1))
    return atom + layer.mlp_out(torch.zeros_like(atom).index_add(0, batch.source, messages * weight))


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
