"""How good is a ranking of known materials? Precision, enrichment, ROC curve, and the baselines to hold it against.

Arrays in, numbers out: scores and labels of n crystals. What is ranked, and on what data, is retrieve.py's business.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

GOOD_SHARE = 0.05  # of the labelled crystals, those with the best labels, are what a ranking should find
CUTS = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


@dataclass(frozen=True)
class Verdict:
    """How well one ranking finds the good crystals among `crystals` that were judged.

    precision: k -> share of good ones among the first k. enrichment: the same over their share among all.
    auc: area under the ROC curve, the chance that a good crystal ranks above another one.
    """

    name: str
    crystals: int
    good: int
    precision: dict[int, float]
    enrichment: dict[int, float]
    auc: float


def rate_ranking(name: str, scores: np.ndarray, good: np.ndarray) -> Verdict:
    """Hold a ranking against the truth. Ties count as if in random order; NaN ranks last.

    Args:
        scores: (n,) higher is ranked first.
        good: (n,) bool, at least one and not all.
    """
    from scipy.stats import mannwhitneyu

    scores = np.where(np.isnan(scores), -np.inf, scores)
    found = expected_hits(scores, good)
    positives, n = int(good.sum()), len(good)
    precision = {k: float(found[k - 1] / k) for k in CUTS if k <= n}
    auc = mannwhitneyu(scores[good], scores[~good], method="asymptotic").statistic / (positives * (n - positives))
    return Verdict(name, n, positives, precision, {k: p * n / positives for k, p in precision.items()}, float(auc))


def expected_hits(scores: np.ndarray, good: np.ndarray) -> np.ndarray:
    """Good crystals among the first k, k = 1..n, expected over the orders of ties; (n,)."""
    order = np.argsort(-scores, kind="stable")
    _, tie, size = np.unique(-scores[order], return_inverse=True, return_counts=True)
    share = np.bincount(tie, weights=good[order]) / size
    return np.cumsum(share[tie])


def is_good(label: np.ndarray, share: float = GOOD_SHARE) -> np.ndarray:
    """(n,) bool: labels among the highest `share`. Ties at the edge are all in."""
    return label >= np.sort(label)[len(label) - max(1, round(share * len(label)))]


def composition_neighbours(query: np.ndarray, known: np.ndarray, values: np.ndarray | None, k: int = 5) -> np.ndarray:
    """Mean over the k nearest known compositions: of their values, or of minus the distance where there are none.

    Euclidean distance between atomic fractions. With `values`, `query` is `known` and each leaves itself out.

    Args:
        query: (n, 119) atomic fractions. known: (m, 119). values: (m,) or None.
    """
    known_t, known_norm = torch.from_numpy(known).float(), torch.from_numpy(known).float().square().sum(1)
    k = min(k, len(known) - (values is not None))
    scores = []
    for start in range(0, len(query), 512):
        part = torch.from_numpy(query[start : start + 512]).float()
        squared = part.square().sum(1, keepdim=True) + known_norm - 2 * part @ known_t.T
        if values is not None:
            squared[torch.arange(len(part)), torch.arange(start, start + len(part))] = torch.inf
        nearest = squared.topk(k, largest=False)
        near = torch.from_numpy(values)[nearest.indices] if values is not None else -nearest.values.clamp(min=0).sqrt()
        scores.append(near.mean(1))
    return torch.cat(scores).double().numpy()


def rank_correlation(a: np.ndarray, b: np.ndarray, group: np.ndarray, least: int = 10) -> dict[str, float]:
    """Spearman's rank correlation of two scores, over all crystals and within space groups.

    Tuning fixes the ratio up to a constant of the space group, so "within" is what theory speaks of: the mean over
    groups of at least `least` crystals, weighted by their number. NaN where it is undefined.
    """
    from scipy.stats import spearmanr

    known = np.isfinite(a) & np.isfinite(b)
    a, b, group = a[known], b[known], group[known]

    def rho(rows: np.ndarray) -> float:
        constant = len(rows) < 2 or np.ptp(a[rows]) == 0 or np.ptp(b[rows]) == 0
        return np.nan if constant else float(spearmanr(a[rows], b[rows]).statistic)

    groups = [np.flatnonzero(group == g) for g in np.unique(group)]
    inside = [(rho(rows), len(rows)) for rows in groups if len(rows) >= least]
    inside = [(value, size) for value, size in inside if np.isfinite(value)]
    within = sum(value * size for value, size in inside) / sum(size for _, size in inside) if inside else np.nan
    return {"all": rho(np.arange(len(a))), "within": within, "crystals": len(a)}
