"""Markov chains over crystals: moves that leave pi(C) ~ p(C) exp(tilt(C)) as it is, p the model's own distribution.

p(C) = P(G) P(C | G) is what the sampler draws from. A move proposes a crystal C' by some q(C' | C) and tells

    log ratio = log p(C') + log q(C | C') - log p(C) - log q(C' | C),

whereupon C' is taken with probability min(1, exp(log ratio + tilt(C') - tilt(C))) (Metropolis and Hastings). What the
model itself proposes cancels out of the ratio, so that most of it is zero. Nothing here knows where a tilt comes from;
`rl/steering.py` makes it of a reward.

Crystals carry the properties "log_prob/<factor>" that `draw` gives them. A chain's sites stand in the order drawn: the
model's probability is that of the sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cfrl.crystals.crystal import CrystalBatch
from cfrl.model.distributions import SamplerOptions
from cfrl.model.drawing import Given, draw
from cfrl.model.transformer import CrystalTransformer

Proposal = tuple[CrystalBatch, Tensor]  # n crystals, and the log ratios (n,) float64
Move = Callable[["Prior", CrystalBatch, torch.Generator], Proposal]


@dataclass(frozen=True)
class Prior:
    """What crystals are drawn from: space groups by their shares, then the model's choices.

    model: in evaluation mode. options: masks and temperature. groups: (231,) log shares by number.
    """

    model: CrystalTransformer
    options: SamplerOptions
    groups: Tensor

    def draw(self, space_group: Tensor, generator: torch.Generator, given: Given | None = None) -> CrystalBatch:
        """One crystal for each space group (n,)."""
        return draw(self.model, space_group, self.options, generator, given)

    def space_groups(self, n: int, generator: torch.Generator) -> Tensor:
        """(n,) by their shares."""
        shares = self.groups.to(self.model.device).exp()
        return torch.multinomial(shares, n, replacement=True, generator=generator)


# ---- moves -----------------------------------------------------------------------------------------------------------


def fresh(prior: Prior, crystals: CrystalBatch, generator: torch.Generator) -> Proposal:
    """Another crystal altogether, space group and all."""
    new = prior.draw(prior.space_groups(len(crystals), generator), generator)
    return new, torch.zeros(len(new), dtype=torch.float64, device=new.device)


def regrow(prior: Prior, crystals: CrystalBatch, generator: torch.Generator) -> Proposal:
    """The first k sites stay, k = 0..n at random; all that follows is drawn anew.

    Where coordinates follow the letters and elements of all sites, these alone stay.
    The model's probabilities cancel; left is that of choosing k, 1 / (n + 1) here and 1 / (n' + 1) on the way back.
    """
    choices = crystals.num_sites + 1  # (B,)
    kept = (_uniform(choices, generator) * choices).long()
    placed = kept if prior.model.config.order == "site" else torch.zeros_like(kept)
    new = prior.draw(crystals.space_group, generator, Given(crystals, kept, kept, placed))
    return new, (choices.double() / (new.num_sites + 1)).log()


def coordinates(prior: Prior, crystals: CrystalBatch, generator: torch.Generator) -> Proposal:
    """Letters and elements stay; coordinates and lattice are drawn anew, each as the model draws it at its place.

    Letters and elements then have other probabilities, given what stands before them: that is the ratio.
    """
    new = prior.draw(crystals.space_group, generator, Given.composition(crystals))
    return new, _gain(new, crystals, ("wyckoff", "species"))


def lattice(prior: Prior, crystals: CrystalBatch, generator: torch.Generator) -> Proposal:
    """All sites stay; the lattice is drawn anew.

    Where it comes before the coordinates, these then have other probabilities.
    """
    new = _in_new_cell(prior, crystals, generator)
    return new, _gain(new, crystals, ("coords",))


def site(prior: Prior, crystals: CrystalBatch, generator: torch.Generator) -> Proposal:
    """Another element at one site, as the model chooses it there, and another lattice."""
    choice = torch.zeros_like(crystals.wyckoff, dtype=torch.bool)
    choice.scatter_(1, _one_of(crystals.wyckoff > 0, generator)[:, None], True)  # (B, S)
    return _substitute(prior, crystals, choice, choice, generator)


def element(prior: Prior, crystals: CrystalBatch, generator: torch.Generator) -> Proposal:
    """One element of the crystal, wherever it stands, for one that is not in it, and another lattice.

    The model chooses it, as it does at the first of these sites.
    """
    alike = crystals.species[:, :, None] == crystals.species[:, None]  # (B, S, S)
    repeated = alike.tril(-1).any(2)  # (B, S) the element stands at an earlier site too
    occupied = crystals.wyckoff > 0
    chosen = _one_of(occupied & ~repeated, generator)  # (B,)
    there = alike[torch.arange(len(chosen), device=chosen.device), chosen] & occupied
    return _substitute(prior, crystals, there, occupied, generator)


MOVES: dict[str, Move] = {move.__name__: move for move in (fresh, regrow, coordinates, lattice, site, element)}


@torch.no_grad()
def _substitute(
    prior: Prior, crystals: CrystalBatch, where: Tensor, barred: Tensor, generator: torch.Generator
) -> Proposal:
    """The element at all sites of `where` (B, S), one and the same, becomes another; the lattice is drawn anew.

    Drawn from the model's distribution at the first of the sites, without the elements that stand at the sites
    `barred` (B, S) now: on the way back, those that stand there then.
    """
    rows, first = torch.arange(len(crystals), device=crystals.device), where.int().argmax(1)  # (B,) each
    of = prior.model.distributions(crystals, prior.options)["species"]
    log_probs = of.log_probs[rows, first].double()  # (B, 119)
    old = crystals.species[rows, first]  # (B,)
    forward = _without(log_probs, crystals.species, barred)
    chosen = torch.multinomial(forward.exp(), 1, generator=generator)[:, 0]  # (B,)
    changed = replace(crystals, species=torch.where(where, chosen[:, None], crystals.species))
    backward = _without(log_probs, changed.species, barred)
    new = _in_new_cell(prior, changed, generator)
    proposed = backward[rows, old] - forward[rows, chosen]
    return new, _gain(new, crystals, ("wyckoff", "species", "coords")) + proposed


def _without(log_probs: Tensor, species: Tensor, barred: Tensor) -> Tensor:
    """Log-probabilities (B, 119) given that it is none of the elements (B, S) at the sites barred (B, S)."""
    out = torch.zeros_like(log_probs, dtype=torch.bool).scatter(1, species * barred, True)  # 0 is no element
    return log_probs.masked_fill(out, -torch.inf).log_softmax(1)


def _in_new_cell(prior: Prior, crystals: CrystalBatch, generator: torch.Generator) -> CrystalBatch:
    sites = crystals.num_sites
    return prior.draw(crystals.space_group, generator, Given(crystals, sites + 1, sites, sites))


def _gain(new: CrystalBatch, old: CrystalBatch, factors: tuple[str, ...]) -> Tensor:
    """(n,) by how much the log-probability of these factors has grown."""
    return sum(new.properties[f"log_prob/{name}"] - old.properties[f"log_prob/{name}"] for name in factors)


def _one_of(marks: Tensor, generator: torch.Generator) -> Tensor:
    """(n,) one of the columns marked in (n, k) bool, all alike."""
    return torch.multinomial(marks.double(), 1, generator=generator)[:, 0]


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers in [0, 1), float64."""
    return torch.rand(like.shape, dtype=torch.float64, device=generator.device, generator=generator).to(like.device)


# ---- chains ----------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """How often each move was proposed and how often taken."""

    proposed: Counter[str] = field(default_factory=Counter)
    taken: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, taken: Tensor) -> None:
        """One proposal for each chain, (n,) bool."""
        self.proposed[name] += len(taken)
        self.taken[name] += int(taken.sum())

    def rates(self) -> dict[str, float]:
        """Share taken, by move."""
        return {name: self.taken[name] / n for name, n in self.proposed.items()}


Tilt = Callable[[CrystalBatch], Tensor]  # (n,) float64 of n crystals on the CPU; -inf where there must be none


def accept(log_odds: Tensor, generator: torch.Generator) -> Tensor:
    """(n,) bool: proposals are taken with probability min(1, exp(log odds)); where that is -inf or NaN, never."""
    return _uniform(log_odds, generator).log() < log_odds


def chosen(new: CrystalBatch, old: CrystalBatch, taken: Tensor) -> CrystalBatch:
    """New crystals where they are taken, (n,) bool, else the old ones."""
    return CrystalBatch.cat([old, new])[torch.arange(len(old)) + len(old) * taken.cpu()].trim()


def walk(
    prior: Prior,
    crystals: CrystalBatch,
    tilt: Tilt,
    steps: int,
    generator: torch.Generator,
    weights: Mapping[str, float],
    tally: Tally,
) -> tuple[CrystalBatch, Tensor, Tensor]:
    """`steps` moves of each chain, which leave p(C) exp(tilt(C)) as it is.

    Which move it is, is drawn by `weights` anew at each step, the same for all chains. So the walk as a whole is
    reversible, and may itself propose to chains of another tilt r: its end C' is taken with probability
    min(1, exp(r(C') - r(C) - tilt(C') + tilt(C))), and r is asked of the end alone (surrogate transition, J. S. Liu,
    Monte Carlo Strategies in Scientific Computing, 2001, sec. 9.4.3; with one step it is delayed acceptance).

    Returns:
        The crystals, by how much the tilt of each has risen, (n,), and which have moved at all, (n,) bool.
    """
    names, shares = list(weights), torch.tensor(list(weights.values()), dtype=torch.float64, device=generator.device)
    start = now = tilt(crystals)
    moved = torch.zeros(len(crystals), dtype=torch.bool)
    for _ in range(steps):
        name = names[int(torch.multinomial(shares, 1, generator=generator))]
        new, log_ratio = MOVES[name](prior, crystals, generator)
        there = tilt(new)
        taken = accept(log_ratio.cpu() + there - now, generator)
        tally.add(name, taken)
        crystals, now, moved = chosen(new, crystals, taken), torch.where(taken, there, now), moved | taken
    return crystals, now - start, moved
