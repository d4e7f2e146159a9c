"""Holding what is not asked for: the shares of the kinds of crystals (`crystals/kinds.py`) that the policy draws.

A reward that some kind earns more easily pulls the policy towards that kind. Two things stop it. Each kind has a
baseline of its own (`policy.Baseline`), so that none is better than another on average. And the policy pays for the
divergence of its marginals from the target, sum_f KL(policy(f) || target(f)), f = number of elements, anion, number of
sites: a crystal's part of it is log(share / target) of its classes, so that what has become rare earns a premium.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.kinds import CLASSES, cells, kinds, num_cells
from cfrl.errors import UserError, nearest
from cfrl.settings import parse_names

AUTO = "auto"
MEMORY = 0.95  # decay of the counts, per step
DOUBT = 20.0  # crystals of the target that the counts start from: a class seen twice or not at all is no evidence


class Hold:
    """The marginals that are held, where they are, and what they should be.

    Args:
        names: some of `CLASSES`; none: nothing is held.
        strength: what one nat costs, in units of the reward.
        wishes: (class, share) that differ from the starting model's, such as ("oxide", 0.5).

    Raises:
        UserError: no such marginal or class, or shares that do not fit.
    """

    def __init__(self, names: Sequence[str], strength: float, wishes: Sequence[tuple[str, float]] = ()) -> None:
        self.names, self.strength, self.wishes = tuple(names), strength, tuple(wishes)
        self.target: dict[str, np.ndarray] = {}
        self.count: dict[str, np.ndarray] = {}

    def aim(self, crystals: CrystalBatch) -> None:
        """The target: the shares among these crystals of the starting model, and the user's wishes.

        They are those that no guard stops: a kind that earns nothing, such as elements alone, need not be kept.
        """
        labels = kinds(crystals)
        for name in self.names:
            count = np.bincount(labels[name], minlength=len(CLASSES[name])) + 0.5
            share = count / count.sum()
            self.target[name] = _wished(share, CLASSES[name], self.wishes)
            self.count[name] = DOUBT * self.target[name]

    def update(self, crystals: CrystalBatch) -> None:
        """Take note of what a step has drawn, whatever it earned: drawing what earns nothing is the easiest way out."""
        labels = kinds(crystals)
        for name in self.target:
            new = np.bincount(labels[name], minlength=len(CLASSES[name]))
            self.count[name] = MEMORY * self.count[name] + (1 - MEMORY) * DOUBT * self.target[name] + new

    def pull(self, crystals: CrystalBatch) -> Tensor:
        """What each crystal earns for its kind, in units of the reward: -strength sum_f log(share / target), (n,)."""
        return self.pulls()[self.cells(crystals)]

    def pulls(self) -> Tensor:
        """`pull` of every joint kind, (num_cells,) float64."""
        total = np.zeros(1)
        for name in self.names:
            each = np.zeros(len(CLASSES[name]))
            if name in self.target:
                count = self.count[name] + DOUBT * self.target[name]
                each = -np.log(count / count.sum() / self.target[name])
            total = (total[:, None] + each).ravel()
        return self.strength * torch.from_numpy(total)

    def cells(self, crystals: CrystalBatch) -> Tensor:
        """The joint kind of each crystal in what is held, (n,) int64 below `num_cells`."""
        return torch.from_numpy(cells(crystals, self.names))

    @property
    def num_cells(self) -> int:
        """How many joint kinds there are."""
        return num_cells(self.names)

    def divergence(self) -> dict[str, float]:
        """KL(policy || target) in nats of each marginal that is held."""
        found = {}
        for name, target in self.target.items():
            share = self.count[name] / self.count[name].sum()
            found[name] = float((share * np.log(np.maximum(share, 1e-12) / target)).sum())
        return found

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Tensors."""
        return {part: {k: torch.from_numpy(v) for k, v in getattr(self, part).items()} for part in ("target", "count")}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Go on from there, as far as the same marginals are held."""
        for part in ("target", "count"):
            setattr(self, part, {k: v.numpy() for k, v in state[part].items() if k in self.names})


def parse_hold(text: str | None) -> tuple[str, ...]:
    """Names of marginals, of a list such as "elements,anion", or "auto": all. Raises UserError."""
    if text == AUTO:
        return tuple(CLASSES)
    return parse_names(text, CLASSES, "hold", "kind")


def parse_shares(text: str | None) -> tuple[tuple[str, float], ...]:
    """ "oxide=0.5,halide=0.1" -> (class, share). Raises UserError."""
    wishes = []
    known = [label for labels in CLASSES.values() for label in labels]
    for part in filter(None, re.split(r"\s*,\s*", (text or "").strip())):
        name, _, number = (piece.strip() for piece in part.partition("="))
        if name not in known:
            raise UserError(
                f"share {name}: there is no such class{nearest(name, known)}; there are: {', '.join(known)}"
            )
        try:
            share = float(number)
        except ValueError:
            share = np.nan
        if not 0 < share < 1:
            raise UserError(f"share {part}: give a fraction between 0 and 1, such as {name}=0.5")
        wishes.append((name, share))
    return tuple(wishes)


def _wished(share: np.ndarray, labels: tuple[str, ...], wishes: Sequence[tuple[str, float]]) -> np.ndarray:
    """Shares with some set to what is wished, the others in their proportions."""
    wished = {labels.index(name): value for name, value in wishes if name in labels}
    rest, left = [k for k in range(len(labels)) if k not in wished], 1 - sum(wished.values())
    if left < 0 or (not rest and left > 1e-6) or (rest and left <= 0):
        raise UserError(f"the shares wished of {', '.join(labels)} do not add up to 1")
    out = share.copy()
    for k, value in wished.items():
        out[k] = value
    out[rest] *= left / share[rest].sum() if rest else 1.0
    return out
