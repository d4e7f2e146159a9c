"""Interatomic potentials by name: `load_potential("chgnet")`, `load_potential("mace:medium-mpa-0")`."""

from __future__ import annotations

import torch

from cfrl.errors import UserError
from cfrl.potentials.base import Evaluation, Potential

__all__ = ["Evaluation", "Potential", "load_potential"]


def load_potential(name: str = "chgnet", device: str | torch.device | None = None) -> Potential:
    """Load a potential.

    name: "chgnet" (0.3.0, its weights come with its package), "chgnet:0.2.0", "mace:medium-mpa-0" (a MACE
    foundation model, downloaded on first use) or "mace:PATH.model" (a local file).
    device: "cpu", "cuda", ...; the GPU if there is one when None.
    Raises UserError for a name, version or file that does not exist, and for a package that is missing.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    family, _, version = name.partition(":")
    if family == "chgnet":
        from cfrl.potentials.chgnet import CHGNetPotential

        return CHGNetPotential(version or "0.3.0", device)
    if family == "mace":
        from cfrl.potentials.mace import MACEPotential

        return MACEPotential(version, device)
    raise UserError(f"unknown potential {name!r}: use chgnet, chgnet:0.2.0, mace:NAME or mace:PATH.model")
