"""A critic: what crystals of given letters and elements earn on average, learnt from those that were scored.

A policy whose letters and elements are tuned, its coordinates and cells held, has its optimum at

    p*(letters, elements) ~ p_base(letters, elements) exp(E[r | letters, elements] / beta),

so that of a reward only this mean counts. One scored crystal is a noisy draw of it. Small networks on statistics of the
elements learn the mean from all crystals that a run has scored; a policy that regresses to their word learns from
every crystal, scored or not, what would take many times as many scores to tell (Rao-Blackwell). They are asked only of
what they go on learning from: each step's crystals are drawn from the policy, scored, and learnt.

They learn a second number beside it, what a crystal is worth at the predictors' word: no spread taken off, and whether
or not it would fall apart. A policy must mind both; a crystal that is known to exist need not. It is what retrieval
ranks by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cfrl.crystals.compositions import fractions
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.descriptors import site_descriptors, space_group_descriptors
from cfrl.model.files import CRITIC
from cfrl.rewards.predictors import Ensemble, composition

MEMBERS, HIDDEN, DROPOUT = 4, 128, 0.5
RATE, DECAY = 1e-3, 0.05  # of AdamW
BATCH = 64  # crystals, for each member others
AVERAGE = 0.95  # decay, per minibatch, of the mean of the weights that answers
CLIP = 5.0  # standard deviations of an input


class Critic:
    """An ensemble that is trained on and on; the moving average of its weights answers.

    Args:
        seed: of weights and of dropout.
        outputs: two; one in files of older versions.
    """

    def __init__(self, seed: int, outputs: int = 2) -> None:
        self.groups, self.sites = space_group_descriptors(), site_descriptors()
        inputs, self.outputs = self.describe(CrystalBatch.empty()).shape[1], outputs
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.ensemble = Ensemble(MEMBERS, inputs, HIDDEN, outputs, DROPOUT)
        self.answering = torch.optim.swa_utils.AveragedModel(
            self.ensemble, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(AVERAGE)
        )
        self.optimiser = torch.optim.AdamW(self.ensemble.parameters(), RATE, weight_decay=DECAY)
        self.centre: tuple[Tensor, Tensor] | None = None  # of the inputs, and their spread

    def learn(self, crystals: CrystalBatch, earned: Tensor, generator: torch.Generator) -> None:
        """One pass over n crystals, each member in its own order.

        Args:
            earned: (n, 2) rewards and worths, in units of the rewards' spread; (n,) where they are the same.
        """
        if not len(crystals):
            return
        x = self.describe(crystals)
        if self.centre is None:
            self.centre = x.mean(0), x.std(0, correction=0).clamp(min=0.05)
        x, y = self._standardised(x), earned.float().view(len(x), -1).expand(-1, self.outputs)
        orders = torch.stack([torch.randperm(len(y), generator=generator) for _ in range(MEMBERS)])
        self.ensemble.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            for rows in orders.split(BATCH, 1):
                loss = F.mse_loss(self.ensemble(x[rows]), y[rows], reduction="none").mean(1).sum()
                self.optimiser.zero_grad(set_to_none=True)
                loss.backward()
                self.optimiser.step()
                self.answering.update_parameters(self.ensemble)

    @property
    def taught(self) -> bool:
        """Whether it has learnt anything."""
        return self.centre is not None

    def __call__(self, crystals: CrystalBatch) -> Tensor:
        """Mean reward (n,) float64 of crystals of these letters and elements, in the units that were learnt."""
        return self._told(crystals)[:, 0]

    def worth(self, crystals: CrystalBatch) -> Tensor:
        """What they are worth, likewise."""
        return self._told(crystals)[:, -1]

    @torch.no_grad()
    def _told(self, crystals: CrystalBatch) -> Tensor:
        x = self._standardised(self.describe(crystals))
        return self.answering.module.eval().on_all(x).double().mean(0)  # (n, outputs)

    def describe(self, crystals: CrystalBatch) -> Tensor:
        """(n, k) float32: mean, deviation, least and largest of the descriptors of the elements, atomic fractions, mean
        of the first descriptors of the sites, those of the space group, and how many sites and atoms there are.
        """
        crystals = crystals.to("cpu")
        amount = crystals.multiplicity * (crystals.species > 0)  # (n, S)
        share = (amount / amount.sum(1, keepdim=True))[..., None].float()
        site = (share * self.sites[crystals.space_group[:, None], crystals.wyckoff]).sum(1)
        size = torch.stack([crystals.num_sites, amount.sum(1)], 1).clamp(min=1).log()
        elements = np.concatenate([composition(crystals)[:, :-1], fractions(crystals)[0]], 1)  # not how many they are
        parts = (torch.from_numpy(elements).float(), site, self.groups[crystals.space_group], size)
        return torch.cat(parts, 1)

    def _standardised(self, x: Tensor) -> Tensor:
        centre, spread = self.centre
        return ((x - centre) / spread).clamp(-CLIP, CLIP)

    def tensors(self, scale: float) -> dict[str, Tensor]:
        """What `word_of` asks of it, to stand beside a model's weights; rewards were learnt in units of `scale`."""
        centre, spread = self.centre
        numbers = {"centre": centre, "spread": spread, "scale": torch.tensor(scale)}
        return {
            f"{CRITIC}{name}": t.detach().clone() for name, t in (self.answering.module.state_dict() | numbers).items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        parts = {name: getattr(self, name).state_dict() for name in ("ensemble", "answering", "optimiser")}
        return parts | {"centre": self.centre}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        if (outputs := state["ensemble"]["biases.2"].shape[-1]) != self.outputs:  # of an older version
            self.__init__(0, outputs)
        for name in ("ensemble", "answering", "optimiser"):
            getattr(self, name).load_state_dict(state[name])
        self.centre = state["centre"]


def word_of(tensors: dict[str, Tensor]) -> Callable[[CrystalBatch], np.ndarray] | None:
    """What crystals are worth, (n,), to the critic whose tensors a model's file keeps. None where there is none.

    Raises KeyError, RuntimeError, ValueError where the file is damaged.
    """
    if not tensors:
        return None
    named = {name.removeprefix(CRITIC): t.float() for name, t in tensors.items()}
    outputs = max(tensor.shape[-1] for name, tensor in named.items() if name.startswith("biases.2"))
    critic, scale = Critic(0, outputs), float(named.pop("scale"))
    critic.centre = named.pop("centre"), named.pop("spread")
    critic.answering.module.load_state_dict(named)
    sizes = {len(critic.ensemble.weights[0][0])}
    if {t.numel() for t in critic.centre} != sizes or not all(torch.isfinite(t).all() for t in tensors.values()):
        raise ValueError("a critic of other sizes, or not finite")
    return lambda crystals: scale * critic.worth(crystals).numpy()
