"""Potentials that want an environment of their own: what to install, what they were trained on, under which licence.

How each is loaded there stands in `worker.py`, under the same name. `cfrl potentials list` shows this table, and what
was measured on this machine. A pin is what was tested, as far as that goes without the network: sevennet's weights
come in its package, and it is tested whole; the others' are downloaded on first use, and up to there they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from cfrl.potentials.scales import OMAT24, RAW

TORCH = "torch>=2.11,<=2.13.0"  # as cfrl's own, so that it need not be installed twice


@dataclass(frozen=True)
class Model:
    """Weights.

    data: what they were trained on. scale: of their energies, as in `scales.py`. licence: of the weights.
    weights: where they come from.
    """

    data: str
    scale: str
    licence: str
    weights: str = "downloaded on first use"


@dataclass(frozen=True)
class Family:
    """A package with one or several models, the first of which is the default.

    pip: what to install.
    """

    pip: tuple[str, ...]
    models: dict[str, Model]

    @property
    def default(self) -> str:
        return next(iter(self.models))


_IN_PACKAGE = "in the package"
_ASL = "Academic Software License (no commercial use)"
_FAIR = "FAIR Chemistry License"
_GATED = "downloaded after signing in at Hugging Face and accepting the licence"

FAMILIES = {
    "sevennet": Family(
        ("sevenn==0.13.0", "e3nn>=0.5,<=0.6.0", TORCH),
        {
            "7net-l3i5": Model("MPtrj", RAW, "MIT", _IN_PACKAGE),
            "7net-0": Model("MPtrj", RAW, "MIT", _IN_PACKAGE),
            "7net-mf-ompa/mpa": Model("OMat24, sAlex, MPtrj", RAW, "MIT"),
            "7net-omat": Model("OMat24", OMAT24, "MIT"),
            "7net-omni/mpa": Model("OMat24, sAlex, MPtrj, MatPES and others", RAW, "MIT"),
        },
    ),
    "orb": Family(
        ("orb-models==0.5.5", TORCH),
        {
            "orb-v3-conservative-inf-mpa": Model("OMat24, Alexandria, MPtrj", RAW, "Apache-2.0"),
            "orb-v3-conservative-inf-omat": Model("OMat24", OMAT24, "Apache-2.0"),
        },
    ),
    "mattersim": Family(
        ("mattersim==1.2.3", TORCH),
        {
            "mattersim-v1.0.0-5M": Model("MatterSim (closed; settings of the Materials Project)", RAW, "MIT"),
            "mattersim-v1.0.0-1M": Model("MatterSim (closed; settings of the Materials Project)", RAW, "MIT"),
        },
    ),
    "fairchem": Family(
        ("fairchem-core==2.24.0",),
        {
            "uma-s-1p1/omat": Model("UMA: OMat24, OMol25, OC20 and others", OMAT24, _FAIR, _GATED),
            "uma-m-1p1/omat": Model("UMA: OMat24, OMol25, OC20 and others", OMAT24, _FAIR, _GATED),
        },
    ),
    "nequip": Family(
        ("nequip==0.19.1", TORCH),
        {
            "NequIP-OAM-L:0.1": Model("OMat24, sAlex, MPtrj", RAW, "CC-BY-4.0"),
            "NequIP-OAM-S:0.1": Model("OMat24, sAlex, MPtrj", RAW, "CC-BY-4.0"),
        },
    ),
    "matgl": Family(
        ("matgl==4.1.2", TORCH),
        {
            "TensorNet-PES-MatPES-PBE-2025.2": Model("MatPES, PBE", "matpes-pbe", "BSD-3-Clause"),
            "TensorNet-PES-MatPES-r2SCAN-2025.2": Model("MatPES, r2SCAN", "matpes-r2scan", "BSD-3-Clause"),
        },
    ),
    "grace": Family(
        ("tensorpotential==0.6.2.1",),
        {
            "GRACE-2L-OAM": Model("OMat24, sAlex, MPtrj", RAW, _ASL),
            "GRACE-1L-OAM": Model("OMat24, sAlex, MPtrj", RAW, _ASL),
            "GRACE-2L-OMAT": Model("OMat24", OMAT24, _ASL),
        },
    ),
}
ASE = "ase"  # anything with an ASE calculator: ase:package.module:factory


def is_outside(name: str) -> bool:
    """Whether a potential of this name runs in an environment of its own."""
    return name.partition(":")[0] in (*FAMILIES, ASE)


def split_name(name: str) -> tuple[str, str]:
    """Family and model: "sevennet" -> ("sevennet", "7net-l3i5"); "ase:a.b:c" -> ("ase", "a.b:c")."""
    family, _, model = name.partition(":")
    return family, model or (FAMILIES[family].default if family in FAMILIES else "")


def known_model(name: str) -> Model | None:
    """What the table says of this potential; None for a file, or a model that it does not name."""
    family, model = split_name(name)
    return FAMILIES[family].models.get(model) if family in FAMILIES else None
