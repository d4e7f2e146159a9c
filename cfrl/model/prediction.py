"""Candidates for the structure of a formula: what a model believes in, and known structure types with other elements.

A prototype is a space group with the letters and elements of its sites. Two guesses say how likely each is, and count
half each. The model's: draws under the constraint find what there can be; how likely the model finds a prototype is
what its letters and elements are worth without the constraint, times P(G): log P(asked and so), the same up to a
constant for all of a formula. Chemistry's: elements replace one another in known crystals (`StructureTypes`).
Candidates are then given out one by one, each to the prototype where it adds most to the chance that one of them is
the true structure; the first of a known type has the coordinates that are known.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush

import numpy as np
import torch
from torch import Tensor

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.fingerprint import fingerprints
from cfrl.crystals.structure_types import StructureTypes
from cfrl.crystals.substitution import replacement_table
from cfrl.crystals.wyckoff import tables
from cfrl.errors import UserError
from cfrl.model.distributions import SamplerOptions
from cfrl.model.drawing import Given, draw
from cfrl.model.options import Wishes
from cfrl.model.sampler import pilots, seeded, space_group_prior, weighted_draws
from cfrl.model.transformer import CrystalTransformer
from cfrl.model.wishes import parse_formula, sampler_options

EXPLORED = 8  # draws for each crystal wanted, in groups that have turned out likely
EXPLORED_AT_LEAST = 400
ROUNDS = 2  # of them, so that the second knows what the first has found
TRIES = 4  # draws of the coordinates of a candidate, since not all are possible
MIN_DISTANCE = 0.5  # angstrom
# That a candidate of the right prototype relaxes to the true structure: without free coordinates only the cell is open.
CHANCE_FIXED, CHANCE_FREE = 0.95, 0.6
ERROR = 0.03  # eV/atom, of a potential between structures of a formula; 0.02 to 0.1 rank as well
KNOWN_FIRST = 1e9  # known coordinates come before all drawn ones, whose log-likelihoods are less
TRUST = 0.5  # power of how likely a prototype is: models are too sure of their first guess


def likely_crystals(
    model: CrystalTransformer, n: int, wishes: Wishes, seed: int = 0, types: StructureTypes | None = None
) -> CrystalBatch:
    """Up to n crystals, on the CPU, that meet the wishes, of prototypes that are likely.

    In the order in which they add to the chance that the true structure is among them.

    They have a property "log_weight": of the crystal's prototype, the log of how likely it is, of all that were found.

    Args:
        wishes: with a constraint, such as a formula.
        types: known structure types, tried where the formula names its elements; None: draws alone.

    Raises:
        UserError: what cannot be met, or no draw is a possible crystal.
    """
    options = sampler_options(wishes, model.config.max_sites - 1)
    prior = space_group_prior(model, wishes.space_group, wishes.max_atoms, options.constraint)
    drawn, scores = _explore(model, n, options, prior, seed)
    known, replaced = _of_known_types(types, wishes, options, prior, model.config.max_sites - 1)
    crystals = CrystalBatch.cat([known, drawn])
    names = fingerprints(crystals)
    chance = _chances(crystals, names)
    mass = _mixed(_masses(drawn, names[len(known) :], scores), _sums(names, replaced))
    valid = crystals.valid(MIN_DISTANCE)
    missing = Counter(shared_out(mass, chance, n)) - Counter(names[row] for row in valid.nonzero()[:, 0].tolist())
    again = _more(model, crystals, names, missing, options, seed)
    crystals, names = CrystalBatch.cat([crystals, again]), names + fingerprints(again)
    valid = torch.cat([valid, again.valid(MIN_DISTANCE)])
    found = defaultdict(list)
    likely = sum(crystals.properties[f"log_prob/{name}"] for name in ("coords", "lattice"))
    likely[: len(known)] = KNOWN_FIRST + replaced.argsort().argsort()
    for row in likely.argsort(descending=True).tolist():
        if valid[row]:
            found[names[row]].append(row)
    if not found:
        raise UserError(f"of {len(crystals):,} crystals drawn none is possible (atoms nearer than {MIN_DISTANCE} A)")
    order = shared_out(mass, chance, n, {name: len(found[name]) for name in mass})
    chosen = [found[name].pop(0) for name in order]
    crystals = crystals[chosen].trim()
    crystals.properties = {"log_weight": torch.tensor([math.log(mass[names[row]]) for row in chosen])}
    return crystals


def likelihoods(log_weight: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """(n,) how likely each of n structures is the true one, if one is: its weight, times what its energy leaves of it.

    Args:
        log_weight: (n,) of their prototypes, before any energy was looked at. energy: (n,) eV/atom, of a potential.
    """
    from scipy.special import softmax

    return softmax(log_weight - energy / ERROR)


def shared_out(
    mass: Mapping[str, float], chance: Mapping[str, float], n: int, at_most: Mapping[str, int] | None = None
) -> list[str]:
    """The prototypes of up to n candidates: of the first k, for each k, the chance that one is the truth is greatest.

    It is the sum over prototypes of mass (1 - (1 - chance)^count); each candidate of a prototype adds less than the one
    before, so that giving each to where it adds most is the best there is.

    Args:
        mass: of each prototype, above 0. chance: of one candidate of it to be the truth if its prototype is.
        at_most: how many each can have; None: any number.
    """
    left = dict.fromkeys(mass, n) if at_most is None else dict(at_most)
    gains = [(-mass[name] * chance[name], name) for name in mass if left[name]]
    heapify(gains)
    order = []
    while gains and len(order) < n:
        gain, name = heappop(gains)
        order.append(name)
        left[name] -= 1
        if left[name]:
            heappush(gains, (gain * (1 - chance[name]), name))
    return order


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


def _of_known_types(
    types: StructureTypes | None, wishes: Wishes, options: SamplerOptions, prior: Tensor, max_sites: int
) -> tuple[CrystalBatch, Tensor]:
    """Crystals of known types that meet the wishes, and how likely each is; none where elements are left open."""
    elements, others, formulas = parse_formula(wishes.formula) if types and wishes.formula else ((), 0, ())
    if others or not formulas:
        return CrystalBatch.empty(), torch.zeros(0, dtype=torch.float64)
    table = replacement_table()
    crystals, weights = zip(*(types.with_formula(elements, amounts, table) for amounts in formulas), strict=True)
    crystals, weights = CrystalBatch.cat(crystals), torch.from_numpy(np.concatenate(weights))
    possible = prior[crystals.space_group].isfinite() & (crystals.num_sites <= max_sites)
    crystals, weights = crystals[possible].trim(), weights[possible]
    meets = options.constraint.met_by(crystals)
    return crystals[meets], weights[meets]


def _mixed(*guesses: Mapping[str, float]) -> dict[str, float]:
    """The mean of those guesses that say anything, each made to sum to 1."""
    mixed: dict[str, float] = defaultdict(float)
    said = [guess for guess in guesses if guess]
    for guess in said:
        total = sum(guess.values())
        for name, value in guess.items():
            mixed[name] += value / total / len(said)
    return mixed


def _sums(names: Sequence[str], values: Tensor) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for name, value in zip(names, values.tolist(), strict=False):  # names of the drawn ones follow
        sums[name] += value
    return sums


def _masses(crystals: CrystalBatch, names: Sequence[str], scores: Tensor) -> dict[str, float]:
    """How likely the model finds each prototype, to the power of the trust in it, up to a factor that all share.

    A prototype may be written in several ways, which add up. What a way is worth depends a little on the coordinates
    that were drawn between its letters: the mean over its draws.
    """
    relative = (scores - scores.max()).exp().tolist()
    ways: dict[str, dict[tuple, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, *way, value in zip(names, crystals.wyckoff.tolist(), crystals.species.tolist(), relative, strict=True):
        ways[name][tuple(map(tuple, way))].append(value)
    tiny = 1e-300  # of what is hopeless, so that it has an order and a logarithm
    return {name: max(sum(sum(x) / len(x) for x in way.values()), tiny) ** TRUST for name, way in ways.items()}


def _chances(crystals: CrystalBatch, names: Sequence[str]) -> dict[str, float]:
    free = tables().free[crystals.space_group[:, None], crystals.wyckoff].any(-1).any(-1)  # letter 0 has none
    return {
        name: CHANCE_FREE if any_free else CHANCE_FIXED for name, any_free in zip(names, free.tolist(), strict=True)
    }


def _more(
    model: CrystalTransformer,
    crystals: CrystalBatch,
    names: Sequence[str],
    missing: Mapping[str, int],
    options: SamplerOptions,
    seed: int,
) -> CrystalBatch:
    """Draws of the coordinates and cell of prototypes, as many as it likely takes for so many possible crystals."""
    first: dict[str, int] = {}
    for row, name in enumerate(names):
        first.setdefault(name, row)
    rows = [first[name] for name, count in missing.items() for _ in range(TRIES * count)]
    if not rows:
        return crystals[[]]
    given = crystals[rows].to(model.device)
    free = replace(options, constraint=None)
    return draw(model, given.space_group, free, seeded(model.device, seed), Given.composition(given)).to("cpu")
