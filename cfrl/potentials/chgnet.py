"""CHGNet (Deng et al., Nat. Mach. Intell. 5, 1031 (2023)) behind the common interface.

The weights come inside the chgnet package, so this potential works offline. Energies are on the scale of
the Materials Project (GGA/GGA+U with the MP2020 corrections).
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import torch

from cfrl.errors import UserError
from cfrl.potentials.base import MIN_DISTANCE, Evaluation, Potential, UnusableCrystal

VERSIONS = ("0.3.0", "0.2.0", "r2scan")
# MPtrj, the training set, holds no Po, At, Rn, Fr or Ra: their embeddings exist but were never trained.
ELEMENTS = frozenset(range(1, 95)) - frozenset(range(84, 89))
GPA_PER_EV_A3 = 160.21766208  # CHGNet's own constant
POOLING = ("mean", "std", "min", "max")


class CHGNetPotential(Potential):
    """CHGNet with its pretrained weights.

    Features: for two layers (the atoms' features before the last convolution, which predict magnetic moments,
    and the final normalised ones, which predict energies) the mean, standard deviation, minimum and maximum
    over the atoms of 64 numbers each: `features.reshape(n, 2, 4, 64)`. They do not depend on the choice of
    cell.
    """

    def __init__(self, version: str, device: torch.device) -> None:
        """Raises UserError if the version is unknown or chgnet is not installed."""
        if version not in VERSIONS:
            raise UserError(f"unknown CHGNet version {version!r}: there are {', '.join(VERSIONS)}")
        try:
            from chgnet.model import CHGNet
        except ImportError as error:
            raise UserError("the CHGNet potential needs the package: pip install chgnet") from error
        with contextlib.redirect_stdout(io.StringIO()):  # CHGNet prints its number of parameters
            model = CHGNet.load(model_name=version, use_device=str(device), verbose=False)
        self.model = model.eval().requires_grad_(False)
        self.name = f"chgnet-{version}"
        self.elements = ELEMENTS
        self.cutoff = float(model.graph_converter.atom_graph_cutoff)
        self.feature_version = f"{self.name}/layers-3-4/{'-'.join(POOLING)}"
        self.feature_size = 2 * len(POOLING) * model.atom_fea_dim
        self.max_atoms = 256 if device.type == "cpu" else 8192
        self.device = device

    def prepare(self, structure: Any) -> Any:
        centers, neighbours, images, distances = structure.get_neighbor_list(self.cutoff)
        if len(distances) and distances.min() < MIN_DISTANCE:
            raise UnusableCrystal(f"atoms closer than {MIN_DISTANCE} A")
        if len(np.unique(centers)) < len(structure):
            raise UnusableCrystal(f"an atom has no neighbour within {self.cutoff:g} A")
        return self.model.graph_converter(structure)

    def evaluate(self, graphs: list[Any], forces: bool, stress: bool, features: bool) -> Evaluation:
        task = "e" + "f" * (forces or stress) + "s" * stress
        final = []
        hook = self.model.readout_norm.register_forward_hook(lambda module, inputs, output: final.append(output))
        try:
            with torch.set_grad_enabled(forces or stress):
                out = self.model([g.to(self.device) for g in graphs], task=task, return_atom_feas=features)
        finally:
            hook.remove()
        atoms = [len(g.atomic_number) for g in graphs]
        return Evaluation(
            energy=_numpy(out["e"]).astype(np.float64),
            status=[""] * len(graphs),
            forces=[_numpy(f) for f in out["f"]] if forces else None,
            stress=np.stack([_numpy(s) / GPA_PER_EV_A3 for s in out["s"]]) if stress else None,
            features=self._pool(out["atom_fea"], final[0].split(atoms)) if features else None,
        )

    @staticmethod
    def _pool(*layers: tuple[torch.Tensor, ...]) -> np.ndarray:
        pooled = [
            torch.cat([torch.cat([f.mean(0), f.std(0, correction=0), f.amin(0), f.amax(0)]) for f in crystal])
            for crystal in zip(*layers, strict=True)
        ]
        return _numpy(torch.stack(pooled))


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
