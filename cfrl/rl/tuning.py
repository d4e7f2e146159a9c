"""The state of a fine-tuning run: what changes from step to step, and how it is kept on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cfrl.config import FinetuneConfig
from cfrl.crystals.crystal import CrystalBatch
from cfrl.errors import UserError
from cfrl.io.storage import append_crystals, read_columns
from cfrl.model.files import load_model, model_path, save_model
from cfrl.model.sampler import sampler_options, space_group_prior
from cfrl.model.transformer import FACTORS, CrystalTransformer
from cfrl.rewards import Reward
from cfrl.rl.policy import GroupBaseline, floored_log_prob
from cfrl.rl.rollouts import Memory
from cfrl.runs.devices import choose_device
from cfrl.runs.folder import RunFolder
from cfrl.untrusted import fitting

STATES = ("model", "prior", "optimiser", "memory", "baseline")  # of the state, what keeps its own
NUMBERS = ("beta", "scale", "step", "seconds")
# The settings that a score depends on.
SCORING = {"reward", "caution", "potential", "hull", "rollouts", "standardize", "scale_crystals"}


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

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """(n,) space groups, on the CPU."""
        shares = self.log_prob().detach().exp().cpu()
        return torch.multinomial(shares, n, replacement=True, generator=generator)

    def effective(self) -> float:
        """exp(entropy): how many groups are in use."""
        log_prob = self.log_prob().detach()[self.groups]
        return float(torch.exp(-(log_prob.exp() * log_prob).sum()))


class Tuning:
    """Weights, space-group shares, optimiser, memory, baseline, beta, scale of the reward, steps and seconds so far.

    The model stays in evaluation mode: with dropout the policy that is updated would not be the one that drew.

    Raises:
        UserError: no such model, device, element, space group or penalty.
    """

    def __init__(self, config: FinetuneConfig) -> None:
        self.settings = config.plain()
        device = choose_device(config.device)
        self.base = load_model(config.model, device).requires_grad_(False)
        self.model = load_model(config.model, device)
        self.options = sampler_options(config)
        shares = space_group_prior(self.model, config.space_group, self.options.max_atoms)
        self.prior = SpaceGroupPrior(shares, config.learn_space_groups, config.space_group_floor).to(device)
        groups = [{"params": list(self.model.parameters()), "lr": config.lr, "peak": config.lr}]
        if config.learn_space_groups:
            rate = config.space_group_lr
            groups.append({"params": [self.prior.logits], "lr": rate, "peak": rate})
        self.optimiser = torch.optim.Adam(groups)
        diversity = None if config.rollouts else config.diversity
        kept = config.replay_size if config.replay else 0
        self.memory = Memory(config.penalty, diversity, config.diversity_window, kept)
        self.header = {"base_model": str(model_path(config.model).resolve()) if config.model else "default"}
        told = ("reward", "algorithm", "space_group", "elements")
        self.header |= {name: getattr(config, name) or "" for name in told}
        self.beta, self.step, self.seconds = config.beta, 0, 0.0
        self.baseline = GroupBaseline(config.baseline_decay)
        self.scale: float | None = None

    # ---- likelihoods: (n, 5) float64, the four factors of log P(C | G), and log P(G) where that is tuned ----

    def nuclei(self, crystals: CrystalBatch) -> dict[str, Tensor]:
        """What top-p keeps now, choice by choice: a step compares policies within it, else ratios are 0 or infinite."""
        return self.model.nuclei(crystals, self.options)

    def log_probs(self, crystals: CrystalBatch, nuclei: dict[str, Tensor]) -> Tensor:
        """Under the policy within `nuclei`, with gradients."""
        scores = self.model.log_prob(crystals, self.options, nuclei=nuclei)
        return self._columns(scores, crystals, self.prior.log_prob())

    @torch.no_grad()
    def log_probs_and_entropies(
        self, crystals: CrystalBatch, nuclei: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Under the policy within `nuclei`, and the entropy (n,) of each factor along the crystals."""
        scores = self.model.log_prob(crystals, self.options, entropy=True, nuclei=nuclei)
        entropies = {name: scores[f"entropy/{name}"] for name in FACTORS}
        return self._columns(scores, crystals, self.prior.log_prob()), entropies

    @torch.no_grad()
    def log_probs_base(self, crystals: CrystalBatch) -> Tensor:
        """Under the starting model; not cut to its own nucleus, which the policy may well leave."""
        scores = self.base.log_prob(crystals, replace(self.options, top_p=1.0))
        return self._columns(scores, crystals, self.prior.base)

    def _columns(self, scores: dict[str, Tensor], crystals: CrystalBatch, group_log_prob: Tensor) -> Tensor:
        group = group_log_prob[crystals.space_group.to(group_log_prob.device)]
        group = group if self.prior.learn else torch.zeros_like(group)
        return torch.stack([*(scores[name].double() for name in FACTORS), group], 1)

    # ---- files ----

    def save_model(self, path: Path) -> None:
        """Write the policy as a model file."""
        save_model(self.policy(), path, {**self.header, "step": str(self.step)})

    def policy(self) -> CrystalTransformer:
        """A copy of the policy, with the learned shares of the space groups."""
        model = CrystalTransformer(self.model.config).to(self.model.device).eval()
        model.load_state_dict(self.model.state_dict())
        if self.prior.learn:
            model.space_group_log_prob.copy_(self.prior.log_prob().detach())
        return model

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        parts = {name: getattr(self, name).state_dict() for name in STATES}
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
            parts -= {"baseline"}
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
        if self.settings["target_kl"] and "beta" not in changed:  # it has been adapted
            self.beta = state["beta"]


class RunLog:
    """Metrics, rollouts and checkpoints of a run, so ordered that a kill between any two writes does no harm.

    Rows of rollouts wait in memory and are written right before the checkpoint that knows of them. If a kill comes
    between, the steps that are done again give the same rows, and are not written twice.
    """

    def __init__(self, run: RunFolder, tuning: Tuning, reward: Reward | None = None) -> None:
        self.run, self.tuning, self.reward = run, tuning, reward
        self.path = run.path / "rollouts.h5"
        self.waiting: list[tuple[CrystalBatch, list[str]]] = []
        self.written = self.saved = 0  # the last step of the rollouts, and of the checkpoint

    def restore(self) -> None:
        """Go on from the run's checkpoint, if there is one."""
        state = self.run.load_checkpoint()
        if state is not None:
            with fitting(self.run.path / "checkpoint.pt"):
                self.tuning.load_state_dict(state)
                if self.reward is not None and "reward" not in self.tuning.changed(state):
                    self.reward.load_state_dict(state["reward"])
        self.saved = self.tuning.step
        self.run.truncate(self.tuning.step)
        if self.path.exists():
            self.written = int(read_columns(self.path, ["step"])["step"].max(initial=0))

    def add(self, crystals: CrystalBatch, status: list[str], metrics: dict[str, float]) -> None:
        """One step."""
        self.run.log(self.tuning.step, metrics)
        if self.tuning.step > self.written:
            self.waiting.append((crystals, status))

    def save(self) -> None:
        """Rollouts, checkpoint, model file."""
        if self.waiting:
            status = [reason for _, part in self.waiting for reason in part]
            crystals = CrystalBatch.cat(part for part, _ in self.waiting)
            append_crystals(self.path, crystals, columns={"status": status})
            self.written = self.tuning.step
            self.waiting.clear()
        state = self.tuning.state_dict()
        if self.reward is not None:
            state["reward"] = self.reward.state_dict()
        self.run.save_checkpoint(state)
        self.saved = self.tuning.step
        if self.tuning.step:  # a run that failed at once leaves no model that later commands would take for tuned
            self.tuning.save_model(self.run.path / "model.safetensors")
