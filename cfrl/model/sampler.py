"""What users call to generate crystals: it chooses space groups and seeds, and draws impossible crystals again.

`drawing.py` is the plain sampler, whose crystals follow exactly the distribution that `log_prob` scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.wyckoff import NUM_SPACE_GROUPS, tables
from cfrl.errors import UserError
from cfrl.model.constraints import Constraint
from cfrl.model.distributions import SamplerOptions
from cfrl.model.drawing import Given, draw
from cfrl.model.options import Wishes
from cfrl.model.threads import side_by_side
from cfrl.model.transformer import CrystalTransformer
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
GEOMETRIES = 4  # of the same letters and elements; then these too are drawn again, or atoms may overlap


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
    shares: Tensor | None = None,
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
        shares: `space_group_shares` of these wishes, if they were asked before: a constraint takes thousands of draws.
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
    shares = (space_group_shares(model, asked, options) if shares is None else shares).exp().cpu()  # (231,)
    seed = ranks.gather(seeded(shares.device, seed).initial_seed())[0]  # one for all, where it is by chance
    generator = seeded(shares.device, random_seed(seed))
    batches, found, lot, drawn = [], 0, 0, 0
    while found < n:
        missing = n - found if wanted is None else max(n - found, LOT)
        size = draw_size or quickest(model.device, missing)
        lots = torch.multinomial(shares, missing, True, generator=generator).split(size)

        def drawn_lot(number: int, lots: Sequence[Tensor] = lots, before: int = lot) -> CrystalBatch:
            of_lot = seeded(model.device, random_seed(seed, before + number))
            return _draw_valid(model, lots[number], options, keep_invalid, min_distance, min_contact, of_lot)

        mine = side_by_side(drawn_lot, range(ranks.rank, len(lots), ranks.size), model.device, processes=True)
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
    min_distance: float,
    min_contact: float,
    generator: torch.Generator,
) -> CrystalBatch:
    """One crystal of each group, as `sample` says.

    What is invalid is so by its geometry, mostly, and the more easily the larger it is: if it were drawn again as a
    whole, small cells would be more frequent than the model has them. So letters and elements stay at first. Where
    atoms overlap but are no nearer than the smallest distance, they stay for good.
    """
    missing, draws, given = torch.arange(len(groups)), 0, None
    if min_contact and model.config.order == "composition":  # what overlaps is seen as it is drawn
        given = Given.nothing(groups.to(model.device), min_contact)
    order, batches = [], []
    while len(missing):
        draws += 1
        drawn = draw(model, groups[missing], options, generator, given)
        batch, last = drawn.to("cpu"), draws % GEOMETRIES == 0
        valid = batch.valid(min_distance)
        batch.properties["valid"] = valid.double()
        batch.properties["draws"] = torch.full((len(batch),), float(draws), dtype=torch.float64)
        if keep_invalid or draws == MAX_DRAWS:
            keep = torch.ones_like(valid)
        else:
            keep = batch.valid(min_distance, min_contact) if min_contact and not last else valid
        order.append(missing[keep])
        batches.append(batch[keep])
        missing = missing[~keep]
        given = None if last else Given.composition(drawn[~keep.to(drawn.device)], min_contact)
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
    for part in groups.split(quickest(model.device, len(groups))):
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
