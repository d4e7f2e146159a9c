"""The state of a fine-tuning run: what changes from step to step, and how it is kept on disk."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.fingerprint import fingerprints
from cfrl.crystals.kinds import CLASSES, without_lanthanide_swaps
from cfrl.errors import UserError
from cfrl.model.implied import ImpliedReward
from cfrl.model.sampler import space_group_shares
from cfrl.model.transformer import FACTORS, CrystalTransformer
from cfrl.model.wishes import sampler_options
from cfrl.rewards.guards import LANTHANIDE_SWAP, heeded
from cfrl.rl.critic import Critic
from cfrl.rl.hold import AUTO, Hold, parse_hold, parse_shares
from cfrl.rl.options import TuningOptions
from cfrl.rl.policy import Baseline, floored_log_prob
from cfrl.rl.rollouts import Memory
from cfrl.runs.ranks import ALONE, Ranks
from cfrl.settings import parse_names

# Columns of the log-probabilities of a step, (n, 5): the factors of log P(C | G), and log P(G).
CRYSTAL, SPACE_GROUP = slice(0, len(FACTORS)), len(FACTORS)
STATES = ("model", "prior", "optimiser", "memory", "baseline", "hold", "critic")  # of the state, what keeps its own
NUMBERS = ("beta", "scale", "step", "seconds")
Settled = TypeVar("Settled", bound=TuningOptions)
# The settings that a score depends on.
SCORING = {"reward", "caution", "potential", "hull", "rollouts", "standardize", "scale_crystals"}


def parse_factors(text: str) -> tuple[str, ...]:
    """ "wyckoff,species" -> names of factors. Raises UserError."""
    names = parse_names(text, FACTORS, "factors", "factor")
    if not names:
        raise UserError(f"factors: name some of {', '.join(FACTORS)}")
    return names


def settled(options: Settled, needs: Collection[str]) -> Settled:
    """Options with what is left to `auto` settled for a reward with these needs.

    How near to the hull a crystal lies is no matter of its kind, so all kinds are held; a property such as a band gap
    is one of its chemistry. For the same reason a critic, which sees letters and elements, knows 40 to 70% of the
    variance of a band gap, the more the more were scored; of the distance to the hull within a kind it knows too little
    to learn from.
    """
    hull = "hull" in needs
    hold = (",".join(CLASSES) if hull else "elements,sites") if options.hold == AUTO else options.hold
    critic = ("off" if hull else "on") if options.critic == AUTO else options.critic
    return replace(options, hold=hold, critic=critic)


class SpaceGroupPrior(nn.Module):
    """P(G), fixed or tuned: floor * base + (1 - floor) * softmax(logits) over the groups that may occur.

    Args:
        base_log_prob: (231,) the starting shares; -inf for groups that may not occur.
        learn: whether the logits are tuned.
        floor: part of its starting share that every group keeps.
    """

    def __init__(self, base_log_prob: Tensor, learn: bool, floor: float) -> None:
        super().__init__()
        self.learn, self.floor = learn, floor
        self.register_buffer("groups", base_log_prob.isfinite().nonzero()[:, 0])
        self.register_buffer("base", base_log_prob.double())
        self.logits = nn.Parameter(self.base[self.groups], requires_grad=learn)

    def log_prob(self) -> Tensor:
        """(231,) float64."""
        if not self.learn:
            return self.base
        tuned = floored_log_prob(self.logits, self.base[self.groups], self.floor)
        return torch.full_like(self.base, -torch.inf).index_put((self.groups,), tuned)

    def sample(self, n: int, generator: torch.Generator, repeats: int = 1) -> Tensor:
        """(n,) space groups, on the CPU, each that is drawn so many times in a row."""
        shares = self.log_prob().detach().exp().cpu()
        drawn = torch.multinomial(shares, math.ceil(n / repeats), replacement=True, generator=generator)
        return drawn.repeat_interleave(repeats)[:n]

    def effective(self) -> float:
        """exp(entropy): how many groups are in use."""
        log_prob = self.log_prob().detach()[self.groups]
        return float(torch.exp(-(log_prob.exp() * log_prob).sum()))


class Tuning:
    """Weights, space-group shares, optimiser, memory, baseline, beta, scale of the reward, steps and seconds so far.

    The model stays in evaluation mode: with dropout the policy that is updated would not be the one that drew.

    Args:
        model: to tune; it is changed, a copy of it stays.
        options: sizes, objective, limits.
        offline: learn from crystals that were drawn before.
        settings: all that the run was asked for, by name; a checkpoint keeps it. None: the options.
        ranks: the processes that share the work; each holds the same state.
        real: crystals that `options.anchor` holds the model to.

    Raises:
        UserError: no such element, space group or penalty, or an anchor that the objective or the crystals are not for.
    """

    def __init__(
        self,
        model: CrystalTransformer,
        options: TuningOptions,
        offline: bool = False,
        settings: Mapping[str, Any] | None = None,
        ranks: Ranks = ALONE,
        real: CrystalBatch | None = None,
    ) -> None:
        if options.anchor and options.algorithm == "vargrad":
            raise UserError("anchor: vargrad's optimum is pi_base exp(r / beta), of no data; give --algorithm ppo")
        if options.anchor and not (real is not None and len(real)):
            raise UserError("anchor: there are no real crystals; name a dataset that has a training split: --dataset")
        if options.algorithm == "vargrad" and not options.kl_weight:
            raise UserError("beta: vargrad regresses to pi_base exp(r / beta); give more than 0, or --algorithm ppo")
        self.options, self.settings, self.ranks = options, dict(settings or options.plain()), ranks
        self.real = real if options.anchor else None
        self.base = copy.deepcopy(model).requires_grad_(False)
        self.model, device = model.requires_grad_(True), model.device
        self.sampler = sampler_options(options, model.config.max_sites - 1, options.temperature, options.top_p)
        shares = space_group_shares(self.model, options, self.sampler)
        self.prior = SpaceGroupPrior(shares, options.learn_space_groups, options.space_group_floor).to(device)
        groups = [{"params": list(self.model.parameters()), "lr": options.lr, "peak": options.lr}]
        if options.learn_space_groups:
            rate = options.space_group_lr
            groups.append({"params": [self.prior.logits], "lr": rate, "peak": rate})
        self.optimiser = torch.optim.Adam(groups)
        diversity = None if offline else options.diversity
        best = options.algorithm != "vargrad"
        self.critic = Critic(options.seed) if options.criticised and not offline else None
        kept, balanced = options.replayed[1], self.critic is not None
        self.memory = Memory(options.penalty, diversity, options.window, kept, best, balanced)
        moved = (*parse_factors(options.factors), "space_group")
        self.learned = torch.tensor([name in moved for name in (*FACTORS, "space_group")], device=device)  # (5,)
        self.beta, self.step, self.seconds = options.kl_weight, 0, 0.0
        self.hold = Hold(parse_hold(options.hold), options.hold_strength, parse_shares(options.share))
        self.baseline = Baseline(options.baseline_decay, self.hold.num_cells)
        self.scale: float | None = None

    def keys(self, crystals: CrystalBatch) -> list[str]:
        """What makes crystals repeats of each other, n strings: the fingerprint, whichever lanthanide is in it."""
        swaps = LANTHANIDE_SWAP in heeded(self.options.allow)
        return fingerprints(without_lanthanide_swaps(crystals) if swaps else crystals)

    # ---- likelihoods: (n, 5) float64, the four factors of log P(C | G), and log P(G) where that is tuned ----

    def nuclei(self, crystals: CrystalBatch) -> dict[str, Tensor]:
        """What top-p keeps now, choice by choice: a step compares policies within it, else ratios are 0 or infinite."""
        return self.model.nuclei(crystals, self.sampler)

    def log_probs(self, crystals: CrystalBatch, nuclei: dict[str, Tensor]) -> Tensor:
        """Under the policy within `nuclei`, with gradients."""
        scores = self.model.log_prob(crystals, self.sampler, nuclei=nuclei)
        return self._columns(scores, crystals, self.prior.log_prob())

    @torch.no_grad()
    def log_probs_and_entropies(
        self, crystals: CrystalBatch, nuclei: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Under the policy within `nuclei`, and the entropy (n,) of each factor along the crystals."""

        def share(rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
            within = {name: kept[rows] for name, kept in nuclei.items()}
            scores = self.model.log_prob(crystals[rows], self.sampler, entropy=True, nuclei=within)
            entropies = {name: scores[f"entropy/{name}"].cpu() for name in FACTORS}
            return self._columns(scores, crystals[rows], self.prior.log_prob()).cpu(), entropies

        parts, device = self.ranks.shared(share, len(crystals)), self.model.device
        entropies = {name: torch.cat([part[name] for _, part in parts]).to(device) for name in FACTORS}
        return torch.cat([columns for columns, _ in parts]).to(device), entropies

    @torch.no_grad()
    def log_probs_base(self, crystals: CrystalBatch) -> Tensor:
        """Under the starting model; not cut to its own nucleus, which the policy may well leave."""

        def share(rows: slice) -> Tensor:
            scores = self.base.log_prob(crystals[rows], replace(self.sampler, top_p=1.0))
            return self._columns(scores, crystals[rows], self.prior.base).cpu()

        return torch.cat(self.ranks.shared(share, len(crystals))).to(self.model.device)

    def _columns(self, scores: dict[str, Tensor], crystals: CrystalBatch, group_log_prob: Tensor) -> Tensor:
        group = group_log_prob[crystals.space_group.to(group_log_prob.device)]
        group = group if self.prior.learn else torch.zeros_like(group)
        return torch.stack([*(scores[name].double() for name in FACTORS), group], 1)

    # ---- files ----

    def policy(self) -> CrystalTransformer:
        """A copy of the policy, with the learned shares of the space groups."""
        model = CrystalTransformer(self.model.config).to(self.model.device).eval()
        model.load_state_dict(self.model.state_dict())
        if self.prior.learn:
            model.space_group_log_prob.copy_(self.prior.log_prob().detach())
        return model

    def implied_reward(self) -> ImpliedReward | None:
        """What the policy says that any crystal earns; None where it is not regressed to the optimum."""
        if self.options.algorithm != "vargrad" or self.scale is None:
            return None
        baseline, pulls = self.baseline, self.hold.pulls()
        groups, kinds = baseline.space_groups(), baseline.kinds()
        if self.prior.learn:  # one baseline for all, and the space group is the policy's choice too
            prior = (self.prior.log_prob() - self.prior.base).detach().cpu().nan_to_num(0.0)
            groups, kinds = self.beta * prior, torch.full_like(kinds, baseline.mean or 0.0)
        return ImpliedReward(
            self.hold.names, groups / self.beta, (kinds - pulls) / self.beta, float(self.beta * self.scale)
        )

    def critic_tensors(self) -> dict[str, Tensor]:
        """What the model's file keeps of the critic."""
        return self.critic.tensors(self.scale) if self.critic is not None and self.critic.taught else {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        kept = {name: getattr(self, name) for name in STATES}
        parts = {name: part.state_dict() for name, part in kept.items() if part is not None}
        return parts | {name: getattr(self, name) for name in NUMBERS} | {"settings": self.settings}

    def changed(self, state: dict[str, Any]) -> set[str]:
        """Settings of this object that differ from those that a state was made with (old states do not tell)."""
        before = state.get("settings", {})
        return {name for name, value in self.settings.items() if before.get(name, value) != value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Where settings differ, this object's count, and what the others have shaped is left out.

        Raises:
            UserError: the state is of a model of another shape.
        """
        changed, parts = self.changed(state), set(STATES)
        peaks = [group["peak"] for group in self.optimiser.param_groups]
        same_groups = torch.equal(state["prior"]["base"].cpu(), self.prior.base.cpu())
        if not same_groups or len(state["optimiser"]["param_groups"]) != len(peaks):
            parts -= {"prior", "optimiser"}
        if changed & SCORING:
            parts -= {"baseline", "critic"}
        # one of an older version holds fewer, and this run may have no critic
        parts &= {name for name in state if getattr(self, name, None) is not None}
        try:
            for name in parts:
                getattr(self, name).load_state_dict(state[name])
        except RuntimeError as error:
            raise UserError("the checkpoint holds a model of another shape than --model names") from error
        for group, peak in zip(self.optimiser.param_groups, peaks, strict=True):
            group["peak"] = peak
        self.step, self.seconds = state["step"], state["seconds"]
        if changed & SCORING:
            self.memory.forget_scores()
        else:
            self.scale = state["scale"]
        if self.options.target_kl and "beta" not in changed:  # it has been adapted
            self.beta = state["beta"]
