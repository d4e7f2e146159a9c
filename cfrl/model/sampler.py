"""Draws crystals from the transformer, one token at a time for a whole batch.

`draw` is the plain sampler: what it returns follows exactly the distribution that `log_prob` scores. `sample` is what
users call: it also chooses space groups, seeds, and draws impossible crystals again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.symmetry import constrain_lattice
from cfrl.crystals.wyckoff import NUM_SPACE_GROUPS, tables
from cfrl.errors import UserError
from cfrl.model.constraints import Constraint
from cfrl.model.distributions import SamplerOptions
from cfrl.model.layers import KeyValueCache
from cfrl.model.network import unscale_lattice
from cfrl.model.options import Wishes
from cfrl.model.threads import side_by_side
from cfrl.model.transformer import FACTORS, CrystalTransformer
from cfrl.model.transformer import draw_size as quickest
from cfrl.model.wishes import (
    UNIFORM,
    AllOf,
    InRange,
    SpaceGroups,
    Wanted,
    sampler_options,
    space_group_numbers,
    wishes_of,
)
from cfrl.runs.ranks import ALONE, Ranks

PILOTS = 4  # draws of each space group that tell how likely it meets what is asked
RARE = 0.002  # of a group that the model itself draws less often one has to do: half of them, 7% of what it draws
PILOT_SEED = 0
LOT = 64  # crystals drawn at least, where not all are wanted: few take as long as one
RAREST = 1000  # draws a crystal that is wanted, on average; where it takes more, there may be none
MAX_DRAWS = 50  # of one crystal, before an invalid one is handed out as it is
PLACES = 8  # tried of a site, in which its atoms may overlap with earlier ones
GEOMETRIES = 4  # of the same letters and elements; then these too are drawn again, or atoms may overlap


@dataclass
class Given:
    """What `draw` feeds to the model in place of drawing it: the first tokens of each kind of n given crystals.

    crystals: n.
    letters, species, coords: (n,) of how many sites; one letter more than there are sites is the stop.
    min_contact: coordinates are drawn up to `PLACES` times, until in the cell of the given crystal no atom of the site
        overlaps with an earlier one: is nearer than this, in sums of covalent radii. 0: once.
    """

    crystals: CrystalBatch
    letters: Tensor
    species: Tensor
    coords: Tensor
    min_contact: float = 0.0

    @classmethod
    def composition(cls, crystals: CrystalBatch, min_contact: float = 0.0) -> Given:
        """Letters, elements and where to stop; coordinates and cell are drawn."""
        sites = crystals.num_sites
        return cls(crystals, sites + 1, sites, torch.zeros_like(sites), min_contact)

    def of(self, kind: str, value: Tensor, rows: Tensor, site: int, drawn: Tensor) -> Tensor:
        """(B,) what stands at a site of these rows: `value` (n, s) where it is given, else what was drawn."""
        fed = getattr(self, kind)[rows] > site
        return torch.where(fed, value[rows, site], drawn) if site < value.shape[1] else drawn.masked_fill(fed, 0)

    def angle(self, rows: Tensor, site: int, axis: int, drawn: Tensor) -> Tensor:
        """(B,) as `of`, of a coordinate, 2 pi (x - 1/2)."""
        known = 2 * math.pi * (self.crystals.frac_coords[..., axis].to(drawn.dtype) - 0.5)  # (n, s)
        return self.of("coords", known, rows, site, drawn)


@torch.no_grad()
def draw(
    model: CrystalTransformer,
    space_group: Tensor,
    options: SamplerOptions | None = None,
    generator: torch.Generator | None = None,
    given: Given | None = None,
) -> CrystalBatch:
    """One crystal per entry of `space_group` (n,), as the model writes it: nothing rejected, nothing re-sorted.

    Args:
        generator: on the model's device; None: torch's global one, which other threads may draw from too.
        given: on the model's device, what is not drawn; the log-probability counts it all the same.

    Returns:
        Batch on the model's device, with properties "log_prob" (log P(C | G) under `options`, nats) and
        "log_prob/<factor>".

    Raises:
        NotFinite: the model's probabilities are not.
    """
    options = options or SamplerOptions()
    device, n, S = model.device, len(space_group), model.config.max_sites - 1
    t = tables(device)
    group = space_group.to(device)
    wyckoff = torch.zeros(n, S, dtype=torch.long, device=device)
    species = torch.zeros_like(wyckoff)
    frac_coords = torch.zeros(n, S, 3, dtype=model.dtype, device=device)
    lattice = torch.zeros(n, 6, dtype=model.dtype, device=device)
    log_prob = {name: torch.zeros(n, dtype=torch.float64, device=device) for name in FACTORS}

    # Crystals that are finished leave the batch: `rows` says which one each running sequence is.
    rows = torch.arange(n, device=device)  # (B,), and so are group, letter and atoms
    atoms = torch.zeros_like(rows)
    cache = KeyValueCache(model.config.num_layers)
    features = letter = None
    constraint = options.constraint
    state = constraint.start(n, device) if constraint else torch.zeros(n, 0, dtype=torch.long, device=device)

    def advance(token: Tensor) -> Tensor:
        return model.transform(token, cache)[:, 0]  # (B, d)

    for site in range(S + 1):
        if site == S:
            letter = torch.zeros_like(rows)  # no room for more: the stop is no choice
        else:
            if features is None:
                logits = model.first_wyckoff_logits(group)  # (B, 28)
            else:
                logits = model.wyckoff_logits(features.unsqueeze(1), group)[:, 0]
            wished = constraint.letters(state, group) if constraint else None
            distribution = model.wyckoff_distribution(logits, group, letter, atoms, options, wished=wished)
            letter = distribution.sample(generator)
            letter = given.of("letters", given.crystals.wyckoff, rows, site, letter) if given else letter
            log_prob["wyckoff"][rows] += distribution.log_prob(letter)
        features = advance(model.embed_wyckoff(group[:, None], letter[:, None]))

        stopped = letter == 0
        if stopped.any():
            done = rows[stopped]
            distribution = model.lattice_distribution(features[stopped], group[stopped], options)
            scaled = distribution.sample(generator)  # (those that stopped, 6)
            log_prob["lattice"][done] = distribution.log_prob(scaled).double()
            lattice[done] = unscale_lattice(scaled.to(model.dtype), atoms[stopped])
            running = ~stopped
            rows, group, letter, atoms, features, state = (
                x[running] for x in (rows, group, letter, atoms, features, state)
            )
            if not len(rows):
                break
            cache.select(running)

        atoms = atoms + t.multiplicity[group, letter]
        wished = constraint.species(state, group, letter) if constraint else None
        distribution = model.species_distribution(features, options, wished=wished)
        element = distribution.sample(generator)
        element = given.of("species", given.crystals.species, rows, site, element) if given else element
        log_prob["species"][rows] += distribution.log_prob(element)
        if constraint:
            state = constraint.after(state, group, letter, element)
        wyckoff[rows, site], species[rows, site] = letter, element
        features = advance(model.embed_species(group[:, None], element[:, None]))

        begin, where = cache.length, (group, letter, rows, features)
        place = partial(_place, model, site=site, options=options, generator=generator, given=given)
        coords, nats, features = place(*where, cache)
        if given and given.min_contact:
            sites = (table[rows, : site + 1] for table in (wyckoff, species, frac_coords))
            cells = CrystalBatch(group, *sites, given.crystals.lattice[rows])
            clash = _overlap(cells, coords, given.min_contact) & t.free[group, letter].any(1)
            # Other places for its atoms: the cache of these sequences is rewound, and several are tried at once.
            tried = clash.nonzero()[:, 0].repeat_interleave(PLACES)
            if len(tried):
                part = cache.first(begin, tried, room=3)
                others = place(*(x[tried] for x in where), part)
                clash = _overlap(cells[tried], others[0], given.min_contact)
                first = clash.view(-1, PLACES).int().argmin(1) + torch.arange(0, len(tried), PLACES, device=device)
                for old, new in zip((coords, nats, features), others, strict=True):
                    old[tried[first]] = new[first]
                cache.put(tried[first], part, first, begin)
        frac_coords[rows, site] = coords
        log_prob["coords"][rows] += nats

    properties = {"log_prob": sum(log_prob.values()), **{f"log_prob/{name}": x for name, x in log_prob.items()}}
    lattice = constrain_lattice(space_group.to(device), lattice)
    return CrystalBatch(space_group.to(device), wyckoff, species, frac_coords, lattice, properties=properties).trim()


def _place(
    model: CrystalTransformer,
    group: Tensor,
    letter: Tensor,
    rows: Tensor,
    features: Tensor,
    cache: KeyValueCache,
    site: int,
    options: SamplerOptions,
    generator: torch.Generator | None,
    given: Given | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The coordinates of a site, (B, 3), their log-probability (B,), and the features (B, d) after their three tokens.

    Args:
        rows: which of the crystals these are. features: of the token before.
    """
    t = tables(group.device)
    free = t.free[group, letter]  # (B, 3)
    matrix = t.project_matrix[group, letter].to(model.dtype)  # (B, 3, 3)
    shift = t.project_shift[group, letter].to(model.dtype)  # (B, 3)
    coords = torch.zeros(len(group), 3, dtype=model.dtype, device=group.device)
    nats = torch.zeros(len(group), dtype=torch.float64, device=group.device)
    for axis in range(3):
        if free[:, axis].any():
            distribution = model.coordinate_distribution(features, options)
            angle = distribution.sample(generator)  # (B,)
            angle = given.angle(rows, site, axis, angle) if given else angle
            nats += distribution.log_prob(angle).masked_fill(~free[:, axis], 0)
            coords[:, axis] = angle / (2 * math.pi) + 0.5
        # A tied coordinate follows from the free ones before it.
        tied = (matrix[:, axis] * coords).sum(-1) + shift[:, axis]
        coords[:, axis] = torch.where(free[:, axis], coords[:, axis], tied) % 1
        features = model.transform(model.embed_coordinate(axis, group[:, None], coords[:, axis : axis + 1]), cache)[
            :, 0
        ]
    return coords, nats, features


def _overlap(crystals: CrystalBatch, coords: Tensor, min_contact: float) -> Tensor:
    """(n,) whether atoms of the last site, at these coordinates (n, 3), are nearer than this to any atom."""
    crystals.frac_coords[:, -1] = coords
    return crystals.site_contacts(crystals.wyckoff.shape[1] - 1) < min_contact


@torch.no_grad()
def sample(
    model: CrystalTransformer,
    n: int,
    *,
    space_group: SpaceGroups = None,
    elements: str | Iterable[str | int] | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
    keep_invalid: bool = False,
    min_distance: float = 0.5,
    min_contact: float = 0.0,
    draw_size: int | None = None,
    wanted: Wanted | None = None,
    progress: Callable[[int], None] | None = None,
    ranks: Ranks = ALONE,
    **wishes: Any,
) -> CrystalBatch:
    """Generates n crystals.

    Args:
        model: from `load_model`.
        space_group: which ones; see `space_group_prior`.
        elements: symbols or atomic numbers that may occur; None: all.
        temperature, top_p: see `SamplerOptions`.
        seed: same seed and device, same crystals, however many processes draw; None: other crystals each time.
        keep_invalid: hand out impossible crystals too; else their coordinates and cell are drawn again, and where this
            does not help, all but the space group.
        min_distance: angstrom; see `CrystalBatch.valid`.
        min_contact: sums of covalent radii; where atoms are nearer, coordinates and cell are drawn again, each site
            where there is room, up to `GEOMETRIES` times.
        draw_size: crystals drawn at once; None: what goes quickest on the model's device.
        wanted: which of n crystals to keep, (n,) bool, such as a `Refusal`; in place of the others, others are drawn,
            space group and all.
        progress: called with the number of crystals finished so far.
        ranks: the processes that share the drawing; all get all crystals.
        wishes: other fields of `Wishes`, such as formula="LiMn2O4", system="Li-Mn-O", num_atoms="4-20".

    Returns:
        CrystalBatch on the CPU with properties "log_prob" (log P(C | G) of the sampler that drew it, in nats, before
        any rejection), "valid" (0 or 1) and "draws" (how often this crystal was drawn).

    Raises:
        UserError: a space group, element, limit or wish that leaves nothing to draw, or a damaged model.
    """
    asked = wishes_of(space_group=space_group, elements=elements, **wishes)
    options = sampler_options(asked, model.config.max_sites - 1, temperature, top_p)
    wanted = AllOf.of(wanted, InRange.of(asked))
    model_was_training = model.training
    model.eval()
    shares = space_group_shares(model, asked, options).exp().cpu()  # (231,)
    seed = ranks.gather(seeded(shares.device, seed).initial_seed())[0]  # one for all, where it is by chance
    generator = seeded(shares.device, random_seed(seed))
    batches, found, lot, drawn = [], 0, 0, 0
    while found < n:
        missing = n - found if wanted is None else max(n - found, LOT)
        lots = torch.multinomial(shares, missing, True, generator=generator).split(draw_size or quickest(model.device))

        def drawn_lot(number: int, lots: Sequence[Tensor] = lots, before: int = lot) -> CrystalBatch:
            of_lot = seeded(model.device, random_seed(seed, before + number))
            return _draw_valid(model, lots[number], options, keep_invalid, (min_distance, min_contact), of_lot)

        mine = side_by_side(drawn_lot, range(ranks.rank, len(lots), ranks.size), model.device)
        for first, own in zip_longest(range(0, len(lots), ranks.size), mine):
            own = own if wanted is None or own is None else own[torch.from_numpy(wanted(own))]
            for batch, groups in zip(ranks.gather(own), lots[first:], strict=False):
                drawn += len(groups)
                batches.append(batch[: n - found])
                found += len(batches[-1])
            if progress is not None:
                progress(found)
        lot += len(lots)
        if found < n:
            require_common(found, drawn, f"ask for less ({wanted})")
    model.train(model_was_training)
    crystals = CrystalBatch.cat(batches)
    crystals.properties = {name: crystals.properties[name] for name in ("log_prob", "valid", "draws") if n}
    return crystals


def require_common(found: int, drawn: int, remedy: str) -> None:
    """Raises UserError where so few of the draws are wanted that there may be none."""
    if found * RAREST < drawn - RAREST:
        raise UserError(f"of {drawn:,} draws only {found} were not refused: {remedy}")


def _draw_valid(
    model: CrystalTransformer,
    groups: Tensor,
    options: SamplerOptions,
    keep_invalid: bool,
    apart: tuple[float, float],
    generator: torch.Generator,
) -> CrystalBatch:
    """One crystal of each group, valid by `CrystalBatch.valid(*apart)`.

    What is invalid is so by its geometry, mostly, and the more easily the larger it is: if it were drawn again as a
    whole, small cells would be more frequent than the model has them. So letters and elements stay at first. Where
    atoms overlap but are no nearer than the smallest distance, they stay for good.
    """
    missing, draws, given = torch.arange(len(groups)), 0, None
    order, batches = [], []
    while len(missing):
        draws += 1
        drawn = draw(model, groups[missing], options, generator, given)
        batch, last = drawn.to("cpu"), draws % GEOMETRIES == 0
        valid = batch.valid(apart[0])
        batch.properties["valid"] = valid.double()
        batch.properties["draws"] = torch.full((len(batch),), float(draws), dtype=torch.float64)
        keep = torch.ones_like(valid) if keep_invalid or draws == MAX_DRAWS else valid if last else batch.valid(*apart)
        order.append(missing[keep])
        batches.append(batch[keep])
        missing = missing[~keep]
        given = None if last else Given.composition(drawn[~keep.to(drawn.device)], apart[1])
    return CrystalBatch.cat(batches)[torch.cat(order).argsort()]


def space_group_shares(model: CrystalTransformer, wishes: Wishes, options: SamplerOptions) -> Tensor:
    """(231,) normalised log-probabilities of the space groups, given what is asked.

    Under a constraint P(G | asked) ~ P(G) P(asked | G).

    Args:
        options: of `sampler_options(wishes, ...)`.

    Raises:
        UserError: no such group, or none in which crystals can be as asked.
    """
    prior = space_group_prior(model, wishes.space_group, wishes.max_atoms, options.constraint)
    groups = prior.isfinite().nonzero()[:, 0]
    if options.constraint is None or wishes.space_group == UNIFORM or len(groups) == 1:
        return prior
    return prior.index_add(0, groups, evidence(model, groups, pilots(prior), options).to(prior.dtype)).log_softmax(0)


def pilots(prior: Tensor) -> Tensor:
    """(g,) how many pilots to draw of each possible group, given their log-probabilities (231,)."""
    return torch.where(prior[prior.isfinite()].exp() < RARE, 1, PILOTS)


def evidence(model: CrystalTransformer, groups: Tensor, counts: Tensor, options: SamplerOptions) -> Tensor:
    """(g,) log of the probability that what the model draws in each of these space groups meets the constraint.

    Args:
        groups: (g,). counts: (g,) how many draws tell.
    """
    group = torch.arange(len(groups)).repeat_interleave(counts)
    _, weights = weighted_draws(model, groups[group], options, seeded(model.device, PILOT_SEED))
    table = torch.full((len(groups), int(counts.max())), -torch.inf, dtype=weights.dtype)
    table[group, torch.cat([torch.arange(int(count)) for count in counts])] = weights
    return table.logsumexp(1) - counts.log()


def weighted_draws(
    model: CrystalTransformer, groups: Tensor, options: SamplerOptions, generator: torch.Generator
) -> tuple[CrystalBatch, Tensor]:
    """A crystal of each space group (n,) under the constraint, and the logs of their importance weights, (n,).

    A weight is what the letters and elements are worth to the model without the constraint, over what they are worth
    with it: weighted so, the crystals are draws of the model's that happen to meet the constraint, and the mean of the
    weights is the probability that a draw does.
    """
    free = replace(options, elements=None, max_atoms=None, favour=(), constraint=None)
    parts, weights = [], []
    for part in groups.split(quickest(model.device)):
        crystals = draw(model, part, options, generator)
        with torch.no_grad():
            scores = model.log_prob(crystals, free)
        drawn = crystals.properties
        weights.append(sum(scores[name].double() - drawn[f"log_prob/{name}"] for name in ("wyckoff", "species")).cpu())
        parts.append(crystals.to("cpu"))
    return CrystalBatch.cat(parts), torch.cat(weights)


def space_group_prior(
    model: CrystalTransformer,
    space_group: SpaceGroups = None,
    max_atoms: int | None = None,
    constraint: Constraint | None = None,
) -> Tensor:
    """(231,) normalised log-probabilities by number: the model's own, over the groups that are wanted and possible.

    Groups that the training data lacks share evenly when only such groups are asked for.

    Args:
        space_group: a caller's or a setting's wish, the same for sampling, tuning and retrieval. None or "": as the
            model was trained. "uniform": the groups it was trained on, all alike. Numbers, such as 225, [221, 225] or
            "221,225": only these, in proportion to their shares in training.
        max_atoms: largest conventional cell; None: no limit.
        constraint: what crystals must meet; None: nothing.

    Raises:
        UserError: no such group, or nothing fits into any of them.
    """
    wanted = torch.zeros(NUM_SPACE_GROUPS + 1, dtype=torch.bool)
    wanted[space_group_numbers(space_group)] = True
    if max_atoms is not None:
        multiplicity = tables().multiplicity
        smallest = multiplicity.masked_fill(multiplicity == 0, 1000).amin(1)
        wanted &= smallest <= max_atoms
    if not wanted.any():
        raise UserError(f"no Wyckoff position of these space groups fits into {max_atoms} atoms; raise --max-atoms")
    if constraint is not None:
        possible = wanted & constraint.feasible()
        if not possible.any():
            raise UserError(constraint.why_not(wanted.nonzero()[:, 0].tolist()))
        wanted = possible
    prior = model.space_group_log_prob.detach().cpu().masked_fill(~wanted, -torch.inf)
    if prior.isinf().all():
        prior = torch.zeros(NUM_SPACE_GROUPS + 1).masked_fill(~wanted, -torch.inf)
    if isinstance(space_group, str) and space_group == UNIFORM:
        prior = prior.masked_fill(prior.isfinite(), 0.0)
    return prior.log_softmax(0)


def seeded(device: torch.device, seed: int | None) -> torch.Generator:
    """A random state of its own, so that drawing neither depends on nor disturbs anyone else's; None: by chance."""
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def random_seed(*numbers: int) -> int:
    """A seed that is a function of these numbers, and of their order, alone."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
