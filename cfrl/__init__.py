"""cfrl: a crystal-generating transformer, tuned by reinforcement learning.

The public names load on first use, so that `import cfrl` and `cfrl --help` do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.2.0"

_PUBLIC = {
    "CrystalBatch": "cfrl.crystals.crystal",
    "CrystalTransformer": "cfrl.model.transformer",
    "load_model": "cfrl.model.files",
    "save_model": "cfrl.model.files",
    "sample": "cfrl.rl.steering",
    "SamplerOptions": "cfrl.model.distributions",
    "read_crystals": "cfrl.io.storage",
    "write_crystals": "cfrl.io.storage",
    "pretrain": "cfrl.model.training",
    "finetune": "cfrl.rl.loop",
    "Tuned": "cfrl.rl.loop",
    "steer": "cfrl.rl.steering",
    "screen": "cfrl.screening.pipeline",
    "retrieve": "cfrl.screening.retrieval",
    "relax": "cfrl.potentials.relax",
    "Hull": "cfrl.stability.hull",
    "load_dataset": "cfrl.io.datasets",
    "register_reward": "cfrl.rewards",
    "build_reward": "cfrl.rewards",
    "UserError": "cfrl.errors",
}
_RENAMED = {"Hull": "ReferenceHull", "retrieve": "rank"}
_MODULES = {
    "symmetry": "cfrl.crystals.symmetry",
    "model": "cfrl.model",
    "rewards": "cfrl.rewards",
    "potentials": "cfrl.potentials",
}

__all__ = [*_PUBLIC, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), _RENAMED.get(name, name))
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module 'cfrl' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
