"""The implied reward: what a tuned model, taken at its word, says that any crystal earns.

At the optimum of KL-regularised tuning r(C) = beta (log policy/base + log Z), one Z for all crystals that compete with
each other: those of a space group and, where the shares of kinds are held, of a kind. A run knows every Z: the baseline
that it takes off the scores is a running estimate of beta log Z. The model's file keeps them (docs/retrieval.md).
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.kinds import CLASSES, cells, num_cells
from cfrl.crystals.wyckoff import NUM_SPACE_GROUPS

IMPLIED = "implied_reward"
GROUPS, KINDS = "log_z_space_group", "log_z_kind"  # tensors beside the weights


@dataclass
class ImpliedReward:
    """log Z = space_group[G] + kind[cell], nats, up to a constant.

    names: the marginals that were held, some of `CLASSES`.
    space_group: (231,) float64.
    kind: (cells,) float64, by the joint kind in `names`.
    unit: what a nat is in units of the reward, beta times the scale of the reward.
    """

    names: tuple[str, ...]
    space_group: Tensor
    kind: Tensor
    unit: float

    def __call__(self, crystals: CrystalBatch, log_ratio: np.ndarray) -> np.ndarray:
        """Reward (n,) of crystals with these log policy/base (n,), in units of the reward, up to a constant."""
        group = self.space_group.numpy()[crystals.space_group.cpu().numpy()]
        return self.unit * (log_ratio + group + self.kind.numpy()[cells(crystals, self.names)])

    def header(self) -> dict[str, str]:
        """What the header of a model file tells of it."""
        return {IMPLIED: json.dumps({"names": self.names, "unit": self.unit})}

    def tensors(self) -> dict[str, Tensor]:
        """What stands beside the weights."""
        return {GROUPS: self.space_group, KINDS: self.kind}

    @classmethod
    def of_file(cls, header: dict[str, str], tensors: dict[str, Tensor]) -> ImpliedReward | None:
        """What a model file tells; None where it tells nothing. Raises ValueError, KeyError where it is damaged."""
        if IMPLIED not in header:
            return None
        told = json.loads(header[IMPLIED])
        names, unit = tuple(told["names"]), float(told["unit"])
        group, kind = tensors[GROUPS].double(), tensors[KINDS].double()
        if not set(names) <= set(CLASSES) or not np.isfinite(unit):
            raise ValueError(f"{IMPLIED} of unknown kinds or unit")
        if group.shape != (NUM_SPACE_GROUPS + 1,) or kind.shape != (num_cells(names),):
            raise ValueError(f"{IMPLIED} of other sizes")
        if not torch.isfinite(kind).all() or torch.isnan(group).any():
            raise ValueError(f"{IMPLIED} is not finite")
        return cls(names, group, kind, unit)
