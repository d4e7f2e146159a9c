"""Retrieve: which known materials does the tuned model point at, and is it right?

Two ways. By likelihood: log P_tuned(C|G) - log P_base(C|G) of every crystal of a dataset, ranked; at the optimum of
KL-regularised tuning that is reward / beta up to a constant of the space group (docs/retrieval.md). By sampling:
draw from both models and count which crystals of the dataset are met. Labels of the dataset are looked at only
afterwards, when ranking.py holds the ranking against baselines.

Datasets stream by in batches, so they may be larger than the memory. Figures are report.py's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.fingerprint import find_duplicates, find_known, fingerprints
from cfrl.errors import UserError
from cfrl.model.distributions import IMPOSSIBLE, SamplerOptions
from cfrl.model.implied import ImpliedReward
from cfrl.model.transformer import FACTORS, CrystalTransformer
from cfrl.tables import Columns, join, spread_out

RANKINGS = {
    "critic": "critic",
    "reward": "implied_reward",
    "crystal": "log_ratio",
    "site": "log_ratio_per_site",
    "joint": "log_ratio_joint",
}
OWN_COLUMNS = {"id", "rank", "space_group", "sites", "atoms", "log_prob", "log_prob_base", *RANKINGS.values()}
OWN_COLUMNS |= {f"log_ratio/{name}" for name in FACTORS}


def property_column(name: str) -> str:
    """Where `rank` puts a property of the dataset: under its name, or as dataset_NAME beside a column of its own.

    A dataset may well hold such names: what an earlier retrieval has written is one.
    """
    return f"dataset_{name}" if re.sub("^(dataset_)+", "", name) in OWN_COLUMNS else name


# ---- by likelihood -----------------------------------------------------------------------------------------------


@torch.no_grad()
def log_ratios(
    tuned: CrystalTransformer,
    base: CrystalTransformer,
    crystals: CrystalBatch,
    options: SamplerOptions | None = None,
    shares: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Columns:
    """Log-probabilities of n crystals under both models and what they differ by, nats, each (n,) float64.

    "log_ratio" is log P_tuned(C|G) - log P_base(C|G); "log_ratio/<factor>" its four terms; "log_ratio_per_site" the
    mean over sites; "log_ratio_joint" that of P(C, G), for a policy that also learns the space groups.
    NaN where the tuned sampler cannot draw a crystal: it has more sites or atoms than there is room for, an element
    that is left out, a choice outside the nucleus, or, for "log_ratio_joint", a space group that is left out.

    Args:
        options: of the sampler that was tuned. As in tuning, the base model is not cut to a nucleus.
        shares: log-probabilities (231,) of the space groups under both; None: the models' own.
    """
    options = options or SamplerOptions()
    fits = crystals.num_sites < min(tuned.config.max_sites, base.config.max_sites)
    new, old = _by_factor(tuned, crystals[fits], options), _by_factor(base, crystals[fits], replace(options, top_p=1.0))
    possible = (new.sum(1) > IMPOSSIBLE / 2) & (old.sum(1) > IMPOSSIBLE / 2)
    fits[fits.clone()] = possible
    inside, new, old = crystals[fits], new[possible], old[possible]  # (n, 4)
    new_shares, old_shares = shares or (tuned.space_group_log_prob, base.space_group_log_prob)
    prior = (new_shares.cpu() - old_shares.cpu())[inside.space_group]
    ratio = (new - old).sum(1)
    scored = {
        "log_ratio": ratio,
        "log_ratio_per_site": ratio / inside.num_sites,
        "log_ratio_joint": ratio + prior.double(),
        "log_prob": new.sum(1),
        "log_prob_base": old.sum(1),
        **{f"log_ratio/{name}": (new - old)[:, k] for k, name in enumerate(FACTORS)},
    }
    return {name: spread_out(values.numpy(), fits.numpy(), len(crystals)) for name, values in scored.items()}


def _by_factor(model: CrystalTransformer, crystals: CrystalBatch, options: SamplerOptions) -> torch.Tensor:
    scores = model.log_prob(crystals, options)
    return torch.stack([scores[name] for name in FACTORS], 1).double().cpu()


def rank(
    tuned: CrystalTransformer,
    base: CrystalTransformer,
    batches: CrystalBatch | Iterable[CrystalBatch],
    top: int = 100,
    by: str = "crystal",
    options: SamplerOptions | None = None,
    shares: tuple[torch.Tensor, torch.Tensor] | None = None,
    implied: ImpliedReward | None = None,
    critic: Callable[[CrystalBatch], np.ndarray] | None = None,
) -> tuple[Columns, CrystalBatch]:
    """Score a dataset that streams by. Of the crystals themselves only the best `top` so far are kept.

    Scored is a crystal's canonical description, so that its rank does not depend on the origin that a file has chosen.

    Args:
        by: "crystal", "site" or "joint": see `RANKINGS` and `log_ratios`; "reward": by what `implied` makes of the
            ratio.
        options, shares: see `log_ratios`.
        implied: of the tuned model.
        critic: what it was tuned by; "critic" ranks by its word.

    Returns:
        columns in the order of the dataset (those of `log_ratios`, "id", "space_group", "sites", "atoms", the
        dataset's properties, see `property_column`, and "rank", 1 = best, 0 = not ranked), and the best crystals,
        best first.

    Raises:
        UserError: no crystals, or none that the tuned sampler can draw.
    """
    batches = [batches] if isinstance(batches, CrystalBatch) else batches
    parts: list[Columns] = []
    best, best_scores, seen = CrystalBatch.empty(), np.zeros(0), 0
    for crystals in batches:
        named = replace(crystals, ids=crystals.ids or [str(seen + i) for i in range(len(crystals))])
        part = {**_describe(named), **log_ratios(tuned, base, named.canonical(), options, shares)}
        if implied is not None:
            part["implied_reward"] = implied(named, part["log_ratio"])
        if critic is not None:
            part["critic"] = np.where(np.isnan(part["log_ratio"]), np.nan, critic(named))
        scores = np.concatenate([best_scores, part[RANKINGS[by]]])
        keep = descending(scores)[:top]
        keep = keep[np.isfinite(scores[keep])]
        best, best_scores = CrystalBatch.cat([best, named] if len(best) else [named])[keep], scores[keep]
        parts.append(part)
        seen += len(crystals)
    if not parts:
        raise UserError("the dataset holds no crystals")
    columns = join(parts)
    scores = columns[RANKINGS[by]]
    if not np.isfinite(scores).any():
        raise UserError(
            f"none of the dataset's {seen} crystals can be drawn by the run's sampler: too many sites, or left out by "
            "its elements, max_atoms or top_p; give a --dataset that fits the run"
        )
    order = descending(scores)
    columns["rank"] = np.zeros(len(order), dtype=np.int64)
    columns["rank"][order] = np.arange(1, len(order) + 1)
    columns["rank"][~np.isfinite(scores)] = 0
    return columns, best


def _describe(crystals: CrystalBatch) -> Columns:
    return {
        **{property_column(name): values.cpu().numpy() for name, values in crystals.properties.items()},
        "id": np.array(crystals.ids, dtype=object),
        "space_group": crystals.space_group.cpu().numpy(),
        "sites": crystals.num_sites.cpu().numpy(),
        "atoms": crystals.num_atoms.cpu().numpy(),
    }


def descending(scores: np.ndarray) -> np.ndarray:
    """Indices, highest score first, NaN last, ties in their order."""
    return np.argsort(np.where(np.isnan(scores), np.inf, -scores), kind="stable")


# ---- by sampling -------------------------------------------------------------------------------------------------


@dataclass
class Meetings:
    """Known materials met by the samples of two models. A material is what pymatgen's StructureMatcher takes for one.

    tuned, base: the dataset's row that each sample meets, in the order of drawing; -1: none. (n,) int64.
    """

    tuned: np.ndarray
    base: np.ndarray

    def counts(self) -> Columns:
        """Per material met: its "row" in the dataset, and how often "tuned" and "base" drew it; most gained first."""
        tuned, base = (Counter(rows[rows >= 0].tolist()) for rows in (self.tuned, self.base))
        rows = sorted(tuned | base, key=lambda row: (base[row] - tuned[row], -tuned[row], row))
        return {
            "row": np.array(rows, dtype=np.int64),
            "tuned": np.array([tuned[row] for row in rows], dtype=np.int64),
            "base": np.array([base[row] for row in rows], dtype=np.int64),
        }


def discovery_curve(rows: np.ndarray) -> np.ndarray:
    """Distinct materials met after each draw, (n,) int64; `rows` as in `Meetings`."""
    first = np.zeros(len(rows), dtype=np.int64)
    first[np.unique(rows, return_index=True)[1]] = 1
    return np.cumsum(first * (rows >= 0))


def meet(tuned: CrystalBatch, base: CrystalBatch, batches: Iterable[CrystalBatch]) -> Meetings:
    """Match samples with a dataset that streams by; only its crystals of a drawn formula are kept.

    StructureMatcher decides; it asks first those of the same fingerprint. Invalid draws (see `CrystalBatch.valid`)
    meet nothing.
    """
    wanted = {*tuned.formulas(), *base.formulas()}
    candidates, rows, seen = [], [], 0
    for crystals in batches:
        near = [i for i, formula in enumerate(crystals.formulas()) if formula in wanted]
        if near:
            candidates.append(crystals[near])
            rows += [seen + i for i in near]
        seen += len(crystals)
    known = CrystalBatch.cat(candidates).to_structures() if candidates else []
    same = find_duplicates(known)  # a material that the dataset holds twice is one
    rows = [row if same[i] is None else rows[same[i]] for i, row in enumerate(rows)]
    return Meetings(*(_met(crystals, known, rows) for crystals in (tuned, base)))


def _met(crystals: CrystalBatch, known: list[Any], rows: list[int]) -> np.ndarray:
    valid = crystals.valid()
    found = find_known(crystals[valid].to_structures(), known, fingerprints(crystals[valid]))
    met = np.full(len(crystals), -1, dtype=np.int64)
    met[valid.cpu().numpy()] = [-1 if i is None else rows[i] for i in found]
    return met
