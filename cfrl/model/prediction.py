"""Candidates for the structure of a formula: the prototypes that a model believes in, each with coordinates of its own.

A prototype is a space group with the letters and elements of its sites. Draws under the constraint find what there can
be; how likely the model finds a prototype is what its letters and elements are worth without the constraint, times
P(G): log P(asked and so), the same up to a constant for all of a formula. Candidates are then given out one by one,
each to the prototype where it adds most to the chance that one of them is the true structure.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from heapq import heapify, heapreplace

import torch
from torch import Tensor

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.fingerprint import fingerprints
from cfrl.crystals.wyckoff import tables
from cfrl.errors import UserError
from cfrl.model.distributions import SamplerOptions
from cfrl.model.options import Wishes
from cfrl.model.sampler import Given, draw, pilots, seeded, space_group_prior, weighted_draws
from cfrl.model.transformer import CrystalTransformer
from cfrl.model.wishes import sampler_options

EXPLORED = 8  # draws for each crystal wanted, in groups that have turned out likely
EXPLORED_AT_LEAST = 400
ROUNDS = 2  # of them, so that the second knows what the first has found
TRIES = 4  # draws of the coordinates of a candidate, since not all are possible
MIN_DISTANCE = 0.5  # angstrom
# That a candidate of the right prototype relaxes to the true structure: without free coordinates only the cell is open.
CHANCE_FIXED, CHANCE_FREE = 0.95, 0.6


def likely_crystals(model: CrystalTransformer, n: int, wishes: Wishes, seed: int = 0) -> CrystalBatch:
    """Up to n crystals, on the CPU, that meet the wishes, of the prototypes that the model finds likely; those first.

    They have a property "log_weight": of the crystal's prototype, log P(asked and so) + const.

    Args:
        wishes: with a constraint, such as a formula.

    Raises:
        UserError: what cannot be met, or no draw is a possible crystal.
    """
    options = sampler_options(wishes, model.config.max_sites - 1)
    prior = space_group_prior(model, wishes.space_group, wishes.max_atoms, options.constraint)
    crystals, scores = _explore(model, n, options, prior, seed)
    names = fingerprints(crystals)
    mass, chance = _masses(crystals, names, scores), _chances(crystals, names)
    prototypes = list(mass)
    wanted = shared_out([mass[name] for name in prototypes], [chance[name] for name in prototypes], n)
    again = _more(model, crystals, names, dict(zip(prototypes, wanted, strict=True)), options, seed)
    crystals, names = CrystalBatch.cat([crystals, again]), names + fingerprints(again)
    found = defaultdict(list)
    for row in _possible(crystals):
        found[names[row]].append(row)
    if not found:
        raise UserError(f"of {len(crystals):,} crystals drawn none is possible (atoms nearer than {MIN_DISTANCE} A)")
    prototypes = sorted(found, key=mass.get, reverse=True)
    numbers = [len(found[name]) for name in prototypes]
    counts = shared_out([mass[name] for name in prototypes], [chance[name] for name in prototypes], n, numbers)
    chosen = [row for name, count in zip(prototypes, counts, strict=True) for row in found[name][:count]]
    crystals = crystals[chosen].trim()
    crystals.properties = {"log_weight": torch.tensor([math.log(mass[names[row]]) for row in chosen])}
    return crystals


def shared_out(
    mass: Sequence[float], chance: Sequence[float], n: int, at_most: Sequence[int] | None = None
) -> list[int]:
    """How many of n candidates each prototype gets, so that the chance that one of them is the truth is greatest.

    Sum over prototypes of mass (1 - (1 - chance)^count); each candidate adds less than the one before, so that giving
    each to where it adds most is the best there is.

    Args:
        mass: of each prototype, above 0. chance: of one candidate of it to be the truth if its prototype is.
        at_most: how many each can have; None: any number.
    """
    counts = [0] * len(mass)
    gains = [(-m * c, i) for i, (m, c) in enumerate(zip(mass, chance, strict=True)) if at_most is None or at_most[i]]
    heapify(gains)
    for _ in range(n if gains else 0):
        gain, i = gains[0]
        counts[i] += 1
        left = at_most is None or counts[i] < at_most[i]
        heapreplace(gains, (gain * (1 - chance[i]) if left else math.inf, i))
        if gains[0][0] == math.inf:
            break
    return counts


def _explore(
    model: CrystalTransformer, n: int, options: SamplerOptions, prior: Tensor, seed: int
) -> tuple[CrystalBatch, Tensor]:
    """Draws of all groups that can hold it, most of those that turn out likely; log P(asked and so) of each, (m,)."""
    groups, generator = prior.isfinite().nonzero()[:, 0], seeded(model.device, seed)
    chooser = seeded(torch.device("cpu"), seed)
    crystals, weights = weighted_draws(model, groups.repeat_interleave(pilots(prior)), options, generator)
    for _ in range(ROUNDS if len(groups) > 1 else 1):
        group = crystals.space_group
        believed = prior[group].double() + weights - torch.bincount(group, minlength=len(prior))[group].log()
        shares = torch.zeros(len(prior), dtype=torch.float64).index_add(0, group, believed.softmax(0))
        shares = 0.9 * shares + 0.1 * prior.exp().double()  # what few draws have missed may be there yet
        more = max(EXPLORED * n, EXPLORED_AT_LEAST) // ROUNDS
        again = torch.multinomial(shares, more, replacement=True, generator=chooser)
        others, later = weighted_draws(model, again, options, generator)
        crystals, weights = CrystalBatch.cat([crystals, others]), torch.cat([weights, later])
    # A weight is the model's probability over the constrained one.
    drawn = sum(crystals.properties[f"log_prob/{name}"].double() for name in ("wyckoff", "species"))
    return crystals, prior[crystals.space_group].double() + drawn + weights


def _masses(crystals: CrystalBatch, names: Sequence[str], scores: Tensor) -> dict[str, float]:
    """How likely each prototype is, up to a factor that all share.

    A prototype may be written in several ways, which add up. What a way is worth depends a little on the coordinates
    that were drawn between its letters: the mean over its draws.
    """
    relative = (scores - scores.max()).exp().tolist()
    ways: dict[str, dict[tuple, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, *way, value in zip(names, crystals.wyckoff.tolist(), crystals.species.tolist(), relative, strict=True):
        ways[name][tuple(map(tuple, way))].append(value)
    tiny = 1e-300  # of what is hopeless, so that it has an order and a logarithm
    return {name: max(sum(sum(x) / len(x) for x in way.values()), tiny) for name, way in ways.items()}


def _chances(crystals: CrystalBatch, names: Sequence[str]) -> dict[str, float]:
    free = tables().free[crystals.space_group[:, None], crystals.wyckoff].any(-1).any(-1)  # letter 0 has none
    return {
        name: CHANCE_FREE if any_free else CHANCE_FIXED for name, any_free in zip(names, free.tolist(), strict=True)
    }


def _more(
    model: CrystalTransformer,
    crystals: CrystalBatch,
    names: Sequence[str],
    wanted: dict[str, int],
    options: SamplerOptions,
    seed: int,
) -> CrystalBatch:
    """Draws of the coordinates and cell of prototypes of which there are fewer possible crystals than are wanted."""
    missing, first = dict(wanted), {}
    for row in _possible(crystals):
        missing[names[row]] -= 1
    for row, name in enumerate(names):
        first.setdefault(name, row)
    rows = [first[name] for name, count in missing.items() for _ in range(TRIES * max(count, 0))]
    if not rows:
        return crystals[[]]
    given = crystals[rows].to(model.device)
    sites = given.num_sites
    free = replace(options, constraint=None)
    letters_and_elements = Given(given, sites + 1, sites, torch.zeros_like(sites))
    return draw(model, given.space_group, free, seeded(model.device, seed), letters_and_elements).to("cpu")


def _possible(crystals: CrystalBatch) -> list[int]:
    """Rows without atoms too near, those with the likeliest coordinates and cells first."""
    likely = sum(crystals.properties[f"log_prob/{name}"] for name in ("coords", "lattice"))
    order = likely.argsort(descending=True)
    return order[crystals.valid(MIN_DISTANCE)[order]].tolist()
