"""Interatomic potentials by name: `load_potential("chgnet")`, `load_potential("sevennet:7net-l3i5")`."""

from __future__ import annotations

import torch

from cfrl.errors import UserError
from cfrl.potentials.base import Evaluation, Potential
from cfrl.potentials.families import is_outside
from cfrl.potentials.scales import RAW, split_scale

__all__ = ["Evaluation", "Potential", "energy_scale", "full_name", "load_potential", "model_name"]


def load_potential(name: str = "chgnet", device: str | torch.device | None = None) -> Potential:
    """Load a potential.

    Args:
        name: "chgnet" (0.3.0, its weights come with its package), "chgnet:0.2.0", "mace:medium-mpa-0" (a MACE
            foundation model, downloaded on first use) or "mace:PATH.model" (a local file). What a file was trained on
            it does not say: "mace:PATH.model@mp-raw" declares uncorrected Materials Project energies, which then get
            the MP2020 corrections, and "@mp2020" corrected ones (scales.py). "sevennet:7net-l3i5" and others
            (families.py), or "ase:package.module:factory", live in an environment of their own, which `cfrl potentials
            add` has made.
        device: "cpu", "cuda", ...; None: the GPU if there is one.

    Raises:
        UserError: no such name, version, scale or file, or a package is missing.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name, scale = split_scale(name)
    adapter, version = _adapter(name)
    potential = adapter(version, device)
    potential.training_scale = scale or potential.training_scale
    return potential


def full_name(name: str) -> str:
    """The name with its scale where corrections are due, so that energies with and without them never mix."""
    bare, scale = split_scale(name)
    adapter, version = _adapter(bare)
    return f"{bare}@{RAW}" if not scale and adapter.scale_of(version) == RAW else name


def model_name(name: str) -> str:
    """The name of the model itself, with its version, known without loading it."""
    adapter, version = _adapter(split_scale(name)[0])
    return adapter.name_of(version)


def energy_scale(name: str) -> tuple[str, str]:
    """The name without a declared scale, and the scale of the energies it gives, known without loading it."""
    name, declared = split_scale(name)
    adapter, version = _adapter(name)
    return name, adapter.result_scale(declared or adapter.scale_of(version), adapter.name_of(version))


def _adapter(name: str) -> tuple[type[Potential], str]:
    family, _, version = name.partition(":")
    if family == "chgnet":
        from cfrl.potentials.chgnet import CHGNetPotential

        return CHGNetPotential, version or "0.3.0"
    if family == "mace":
        from cfrl.potentials.mace import MACEPotential

        return MACEPotential, version
    if is_outside(name):
        from cfrl.potentials.environments import find
        from cfrl.potentials.outside import OutsidePotential

        find(name)
        return OutsidePotential, name
    raise UserError(
        f"unknown potential {name!r}: use chgnet, chgnet:0.2.0, mace:NAME or mace:PATH.model; `cfrl potentials list` "
        "shows those that can be added"
    )
