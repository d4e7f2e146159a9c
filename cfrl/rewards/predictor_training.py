"""Training of property predictors, with cross-validations that say how good they are.

Rows are held back together by formula, so that no compound is on both sides, and again by prototype and by cluster of
the descriptors: tuning leads to crystals that are unlike those of the training, where errors are larger. The spread is
calibrated on the split that needs most, for all crystals and for those of the highest predictions (which are high also
because they err upwards, and are what tuning seeks). One factor does as well there as factors that grow with the
distance to the training data, which raise the rank correlation of spread and error by no more than 0.02.

All members of all folds are trained at once, as one batched matrix product; members differ in their initial weights
and the order of their data. Nothing of the potential is trained here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cfrl.crystals import fingerprint
from cfrl.crystals.crystal import CrystalBatch
from cfrl.errors import UserError
from cfrl.files import provenance
from cfrl.rewards.predictors import (
    Ensemble,
    Predictor,
    composition_version,
    mixture,
    standardise,
    to_quantity,
)

if TYPE_CHECKING:
    pass

ONE_SIGMA = 0.6827
LEAST_ROWS = 50
TOP, LEAST_TOP = 0.05, 30  # the highest predictions: this share of all, but so many rows at least
CLUSTERS_PER_FOLD = 2  # few and large, so that what is held back is far from the rest


@dataclass
class PredictorOptions:
    """How an ensemble is trained.

    log: learn log10 of the target
    zero: values below this are a class of their own (metals among band gaps); None: no such class
    """

    log: bool = False
    zero: float | None = None
    members: int = 5
    folds: int = 5
    hidden: int = 128
    epochs: int = 60
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.05
    dropout: float = 0.2
    seed: int = 0


# ---- training ----------------------------------------------------------------------------------------------------


@dataclass
class CrossValidation:
    """Predictions for crystals of compounds that the predicting members never saw, in units of the target.

    truth, mean, spread: (n,); metrics: see `_metrics`
    """

    truth: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    metrics: dict[str, float] = field(default_factory=dict)


def train(
    x: np.ndarray,
    values: np.ndarray,
    formulas: Sequence[str],
    prototypes: Sequence[str],
    options: PredictorOptions,
    header: dict[str, Any],
    progress: Callable[[int], None] | None = None,
) -> tuple[Predictor, CrossValidation]:
    """Train an ensemble on all rows, and one per fold of each split to know how good it is.

    x: (n, d) of `describe`; values: (n,); formulas, prototypes: (n) of the crystals, see `prototypes_of`
    header: target, unit, potential and feature_version, kept in the file

    Returns the predictor, and the cross-validation by formula; figures of all splits are in the header.
    Raises UserError: fewer formulas than folds.
    """
    y = np.log10(values) if options.log else np.asarray(values, dtype=np.float64)
    known = y if options.zero is None else y[y >= options.zero]
    shift, scale = (known.mean() if options.zero is None else 0.0), known.std()
    mean = torch.from_numpy(x.mean(0))
    std = torch.from_numpy(x.std(0)).clamp(min=1e-4)
    inputs = standardise(x, mean, std)
    targets = torch.from_numpy((y - shift) / scale).float()
    splits = make_splits(inputs.numpy(), formulas, prototypes, options)
    seen = [np.nonzero(fold != k)[0] for fold in splits.values() for k in range(options.folds)] + [np.arange(len(y))]
    zero = None if options.zero is None else options.zero / scale
    ensemble = _fit(inputs, targets, [rows for rows in seen for _ in range(options.members)], zero, options, progress)

    out = ensemble.on_all(inputs).double().unflatten(0, (len(seen), options.members))
    held_back = [
        _HeldBack(out[options.folds * i :], fold, y, shift, scale, options) for i, fold in enumerate(splits.values())
    ]
    calibration = max(held.calibration(values) for held in held_back)
    metrics = {
        name: _metrics(values, y, held, calibration, options) for name, held in zip(splits, held_back, strict=True)
    }
    final = Ensemble(options.members, x.shape[1], options.hidden, out.shape[-1])
    with torch.no_grad():
        for kept, trained in zip(final.parameters(), ensemble.parameters(), strict=True):
            kept.copy_(trained[-options.members :].half())
    header = header | {
        "log": options.log,
        "zero": options.zero,
        "composition": composition_version(),
        "calibration": calibration,
        "shift": float(shift),
        "scale": float(scale),
        "low": float(y.min()),
        "high": float(y.max()),
        "rows": len(y),
        "cross_validation": metrics.pop("formula"),
        "harder_splits": metrics,
        "options": asdict(options),
        "provenance": provenance(),
    }
    by_formula = held_back[0]
    quantity = by_formula.mean, by_formula.spread * calibration
    return Predictor(final, mean, std, header), CrossValidation(values, *quantity, header["cross_validation"])


def make_splits(
    x: np.ndarray, formulas: Sequence[str], prototypes: Sequence[str], options: PredictorOptions
) -> dict[str, np.ndarray]:
    """Folds (n,) of each split by name: formula, prototype, cluster (k-means of the standardised descriptors x).

    Prototypes or clusters that are too few, or one of them half of the data, make no split. Raises UserError: too few
    formulas.
    """
    splits = {"formula": assign_folds(formulas, options.folds, options.seed)}
    for name, groups in (("prototype", prototypes), ("cluster", _clusters(x, options))):
        if len(set(groups)) >= options.folds:
            fold = assign_folds(groups, options.folds, options.seed)
            if np.bincount(fold).max() <= len(fold) / 2:
                splits[name] = fold
    return splits


def prototypes_of(structures: Sequence[Any]) -> list[str]:
    """Space group and Wyckoff sequence of each crystal; the formula of one whose symmetry cannot be described."""
    dropped: dict[int, str] = {}
    crystals = CrystalBatch.from_structures(structures, errors="skip", dropped=dropped)
    found = iter(fingerprint.prototypes(crystals))
    return [s.composition.reduced_formula if i in dropped else next(found) for i, s in enumerate(structures)]


def _clusters(x: np.ndarray, options: PredictorOptions) -> list[int]:
    from scipy.cluster.vq import kmeans2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a cluster that became empty: there is one less
        seed = np.random.default_rng(options.seed)
        return kmeans2(x, CLUSTERS_PER_FOLD * options.folds, iter=30, minit="++", seed=seed)[1].tolist()


def assign_folds(groups: Sequence[str], folds: int, seed: int = 0) -> np.ndarray:
    """(n,) fold of each row, 0..folds-1; rows of one group share a fold, and folds are as equal as that allows."""
    unique, inverse, count = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    if len(unique) < folds:
        raise UserError(f"only {len(unique)} different formulas: too few for {folds} folds")
    order = np.random.default_rng(seed).permutation(len(unique))
    fold, size = np.zeros(len(unique), dtype=np.int64), np.zeros(folds, dtype=np.int64)
    for group in order[np.argsort(-count[order], kind="stable")]:  # the largest first, each to the smallest fold
        fold[group] = size.argmin()
        size[fold[group]] += count[group]
    return fold[inverse]


def _fit(
    x: Tensor,
    y: Tensor,
    seen: list[np.ndarray],
    zero: float | None,
    options: PredictorOptions,
    progress: Callable[[int], None] | None,
) -> Ensemble:
    """Train one member on each of the row sets `seen`, all at once.

    All take the steps of an epoch over the rows that equal folds leave; smaller sets repeat some of theirs.
    """
    generator = torch.Generator().manual_seed(options.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        net = Ensemble(len(seen), x.shape[1], options.hidden, 2 if zero is None else 3, options.dropout)
        rows = [torch.from_numpy(r) for r in seen]
        size = min(options.batch_size, min(len(r) for r in rows))
        steps = max(1, len(x) * (options.folds - 1) // options.folds // size)
        places = torch.arange(steps * size)
        optimiser = torch.optim.AdamW(net.parameters(), lr=options.lr, weight_decay=options.weight_decay, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, options.lr, total_steps=options.epochs * steps, pct_start=0.1
        )
        for epoch in range(options.epochs):
            order = torch.stack([r[torch.randperm(len(r), generator=generator)[places % len(r)]] for r in rows])
            for batch in order.split(size, 1):
                loss = _loss(net(x[batch]), y[batch], zero).mean(1).sum()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
            if progress is not None:
                progress(epoch + 1)
    return net.eval()


def _loss(out: Tensor, y: Tensor, zero: float | None) -> Tensor:
    """(m, b). Outputs are the value, the logarithm of its expected error, and the logit of not being zero.

    The expected error is learnt from the value's errors without moving the value (a Laplace likelihood whose
    centre is held fixed), so that asking for a spread costs no accuracy.
    """
    value, log_error = out[..., 0], out[..., 1].clamp(-6.0, 4.0)
    error = (value - y).abs()
    fit = F.smooth_l1_loss(value, y, beta=0.3, reduction="none") + 0.1 * (error.detach() / log_error.exp() + log_error)
    if zero is None:
        return fit
    positive = (y >= zero).to(y.dtype)
    logit = out[..., 2]
    whole = (torch.sigmoid(logit) * F.relu(value) - y).abs()
    return positive * fit + F.binary_cross_entropy_with_logits(logit, positive, reduction="none") + whole


# ---- how good it is ----------------------------------------------------------------------------------------------


class _HeldBack:
    """Predictions of each row by the members that did not see its group.

    center: (n,) in the scale that was learnt; mean, spread: (n,) in units of the target, not calibrated
    measured: (n,) bool, rows whose errors the calibration looks at: where there is a class of zeros, the others
    top: rows of the highest means
    positive: (n,) probability of not being zero, if there is such a class
    """

    def __init__(
        self, out: Tensor, fold: np.ndarray, y: np.ndarray, shift: float, scale: float, options: PredictorOptions
    ) -> None:
        """out: (folds or more, members, n, outputs)"""
        held_back = torch.stack([out[k, :, i] for i, k in enumerate(fold)], 1)  # (members, n, outputs)
        has_zero = options.zero is not None
        center, spread = (t.numpy() * scale for t in mixture(held_back, has_zero))
        self.center = np.clip(center + shift, y.min(), y.max())
        self.mean, self.spread = to_quantity(self.center, spread, options.log)
        self.measured = y >= options.zero if has_zero else np.full(len(y), True)
        self.top = highest(self.mean)
        self.positive = torch.sigmoid(held_back[..., 2]).mean(0).numpy() if has_zero else None

    def calibration(self, values: np.ndarray) -> float:
        """The factor with which 68% of the errors are within one spread, of all rows and of the highest means."""
        errors = np.abs(self.mean - values) / self.spread
        return max(float(np.quantile(errors[rows], ONE_SIGMA)) for rows in (self.measured, self.top))


def highest(values: np.ndarray) -> np.ndarray:
    """Rows of the largest values: `TOP` of all."""
    return np.argsort(-values)[: max(round(TOP * len(values)), LEAST_TOP)]


def _metrics(
    values: np.ndarray, y: np.ndarray, held: _HeldBack, calibration: float, options: PredictorOptions
) -> dict[str, float]:
    """Figures of one split. MAE, RMSE and R2 are of y, the scale that was learnt; the others of the quantity itself.

    calibration: the factor that this split alone would need
    top_ratio: median prediction over median truth among the highest predictions (means would be those of a few
    extreme crystals); top_cautious_ratio: the same of mean - 1 spread among the highest of those
    """
    from scipy.stats import spearmanr

    error, spread = np.abs(held.mean - values), held.spread * calibration
    cautious = held.mean - spread
    top, best = held.top, highest(cautious)
    metrics = {
        "mae": float(np.abs(held.center - y).mean()),
        "rmse": float(np.sqrt(((held.center - y) ** 2).mean())),
        "r2": float(1 - ((held.center - y) ** 2).sum() / ((y - y.mean()) ** 2).sum()),
        "spearman": float(spearmanr(held.center, y).statistic),
        "calibration": held.calibration(values),
        "within_1_sigma_raw": float((error <= held.spread).mean()),
        "within_1_sigma": float((error <= spread).mean()),
        "within_2_sigma": float((error <= 2 * spread).mean()),
        "within_1_sigma_top": float((error <= spread)[top].mean()),
        "within_2_sigma_top": float((error <= 2 * spread)[top].mean()),
        "top_ratio": float(np.median(held.mean[top]) / np.median(values[top])),
        "top_cautious_ratio": float(np.median(cautious[best]) / np.median(values[best])),
        "spread_error_spearman": float(spearmanr(held.spread, error).statistic),
    }
    return metrics if held.positive is None else metrics | _zero_metrics(error, spread, held)


def _zero_metrics(error: np.ndarray, spread: np.ndarray, held: _HeldBack) -> dict[str, float]:
    from scipy.stats import mannwhitneyu

    truth = held.measured
    above = mannwhitneyu(held.positive[truth], held.positive[~truth], method="asymptotic").statistic
    auc = above / (truth.sum() * (~truth).sum())
    return {
        "auc": float(auc),
        "mae_nonzero": float(error[truth].mean()),
        "mae_zero": float(error[~truth].mean()),
        "within_1_sigma_nonzero": float((error <= spread)[truth].mean()),
        "within_2_sigma_nonzero": float((error <= 2 * spread)[truth].mean()),
    }


# ---- the command -------------------------------------------------------------------------------------------------
