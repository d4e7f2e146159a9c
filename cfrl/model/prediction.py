"""The crystals of a formula that a model believes in most: candidates for structure prediction.

Draws under a constraint cover what can meet it; weighed by what they are worth without it they are the model's own
crystals of that formula, G and all. Of many such draws those are picked that come first when each is drawn once, with
probabilities in proportion to the weights (Gumbel's top k; C. Vieira, 2014): likely prototypes come several times, with
coordinates of their own, unlikely ones now and then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfrl.crystals.crystal import CrystalBatch
from cfrl.errors import UserError
from cfrl.model.options import Wishes
from cfrl.model.sampler import PILOTS, seeded, space_group_prior, weighted_draws
from cfrl.model.transformer import CrystalTransformer
from cfrl.model.wishes import sampler_options

TO_CHOOSE_FROM = 8  # draws for each crystal wanted, at least
MIN_DISTANCE = 0.5  # angstrom


def likely_crystals(model: CrystalTransformer, n: int, wishes: Wishes, seed: int = 0) -> CrystalBatch:
    """n crystals, on the CPU, that meet the wishes, as likely as the model finds them, most likely groups first.

    They have a property "log_weight": of the crystal's letters, elements and space group, log P(asked and so) + const.

    Args:
        wishes: with a constraint, such as a formula.

    Raises:
        UserError: what cannot be met, or no draw is a possible crystal.
    """
    options = sampler_options(wishes, model.config.max_sites - 1)
    prior = space_group_prior(model, wishes.space_group, wishes.max_atoms, options.constraint)
    groups, generator = prior.isfinite().nonzero()[:, 0], seeded(model.device, seed)
    # First every group alike, then those that have turned out likely.
    first = groups.repeat_interleave(PILOTS)
    crystals, weights = weighted_draws(model, first, options, generator)
    if (more := n * TO_CHOOSE_FROM - len(first)) > 0:
        believed = (prior[first].double() + weights).softmax(0)
        shares = torch.zeros(len(prior), dtype=torch.float64).index_add(0, first, believed)
        shares = 0.9 * shares + 0.1 * prior.exp().double()  # what four draws have missed may be there yet
        again = torch.multinomial(shares, more, replacement=True, generator=seeded(torch.device("cpu"), seed))
        others, later = weighted_draws(model, again, options, generator)
        crystals, weights = CrystalBatch.cat([crystals, others]), torch.cat([weights, later])
    group = crystals.space_group
    weights = prior[group].double() + weights - torch.bincount(group, minlength=len(prior))[group].log()
    valid = crystals.valid(MIN_DISTANCE).nonzero()[:, 0]
    if not len(valid):
        raise UserError(f"of {len(crystals):,} crystals drawn none is possible (atoms nearer than {MIN_DISTANCE} A)")
    chosen = valid[_first(weights[valid], n, seed)]
    crystals = crystals[chosen].trim()
    crystals.properties = {"log_weight": weights[chosen]}
    return crystals


def _first(log_weights: Tensor, n: int, seed: int) -> Tensor:
    """Up to n rows, drawn one after the other without replacement, in proportion to their weights."""
    noise = torch.empty_like(log_weights).exponential_(generator=seeded(torch.device("cpu"), seed))
    return (log_weights - noise.log()).argsort(descending=True)[:n]
