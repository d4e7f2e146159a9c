"""Training of property predictors, with a cross-validation that says how good they are.

Rows of one formula are held back together, so that no compound is on both sides. All members of all folds are trained
at once, as one batched matrix product; members differ in their initial weights and the order of their data. Nothing
of the potential is trained here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cfrl.config import PredictorConfig, nearest
from cfrl.devices import choose_device
from cfrl.errors import UserError
from cfrl.figures import BLUE, ORANGE, Figure, Series
from cfrl.figures import save as save_figure
from cfrl.files import atomic_file, check_writable, provenance
from cfrl.progress import progress_bar
from cfrl.properties import Ensemble, Predictor, composition_version, describe, mixture, standardise, to_quantity

if TYPE_CHECKING:
    from rich.console import Console

ONE_SIGMA = 0.6827
LEAST_ROWS = 50


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

    truth, mean, spread: (n,); metrics: in units of the target, or of its logarithm if that was learnt
    """

    truth: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    metrics: dict[str, float] = field(default_factory=dict)


def train(
    x: np.ndarray,
    values: np.ndarray,
    groups: Sequence[str],
    options: PredictorOptions,
    header: dict[str, Any],
    progress: Callable[[int], None] | None = None,
) -> tuple[Predictor, CrossValidation]:
    """Train an ensemble on all rows, and one per fold to know how good it is.

    x: (n, d) of `describe`; values: (n,); groups: rows of a group (a formula) are held back together
    header: target, unit, potential and feature_version, kept in the file
    """
    y = np.log10(values) if options.log else np.asarray(values, dtype=np.float64)
    known = y if options.zero is None else y[y >= options.zero]
    shift, scale = (known.mean() if options.zero is None else 0.0), known.std()
    mean = torch.from_numpy(x.mean(0))
    std = torch.from_numpy(x.std(0)).clamp(min=1e-4)
    inputs = standardise(x, mean, std)
    targets = torch.from_numpy((y - shift) / scale).float()
    fold = assign_folds(groups, options.folds, options.seed)
    seen = [np.nonzero(fold != k)[0] for k in range(options.folds)] + [np.arange(len(y))]
    zero = None if options.zero is None else options.zero / scale
    ensemble = _fit(inputs, targets, [rows for rows in seen for _ in range(options.members)], zero, options, progress)

    out = ensemble.on_all(inputs).double().unflatten(0, (options.folds + 1, options.members))
    held_back = torch.stack([out[k, :, i] for i, k in enumerate(fold)], 1)  # (m, n, outputs)
    center, spread = (t.numpy() for t in mixture(held_back, zero is not None))
    center = np.clip(center * scale + shift, y.min(), y.max())
    measured = slice(None) if options.zero is None else y >= options.zero
    calibration = float(np.quantile((np.abs(center - y) / (spread * scale))[measured], ONE_SIGMA))
    metrics = _metrics(y, center, spread * scale, calibration, options)
    if zero is not None:
        positive = torch.sigmoid(held_back[..., 2]).mean(0).numpy()
        metrics |= _zero_metrics(y, center, spread * scale * calibration, positive, options.zero)
    last = slice(options.folds * options.members, None)
    final = Ensemble(options.members, x.shape[1], options.hidden, out.shape[-1])
    with torch.no_grad():
        for kept, trained in zip(final.parameters(), ensemble.parameters(), strict=True):
            kept.copy_(trained[last].half())
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
        "cross_validation": metrics,
        "options": asdict(options),
        "provenance": provenance(),
    }
    quantity = to_quantity(center, spread * scale * calibration, options.log)
    return Predictor(final, mean, std, header), CrossValidation(values, *quantity, metrics)


def assign_folds(groups: Sequence[str], folds: int, seed: int = 0) -> np.ndarray:
    """(n,) fold of each row, 0..folds-1; rows of one group share a fold."""
    unique, inverse = np.unique(np.asarray(groups), return_inverse=True)
    if len(unique) < folds:
        raise UserError(f"only {len(unique)} different formulas: too few for {folds} folds")
    order = np.random.default_rng(seed).permutation(len(unique))
    return (order % folds)[inverse]


def _fit(
    x: Tensor,
    y: Tensor,
    seen: list[np.ndarray],
    zero: float | None,
    options: PredictorOptions,
    progress: Callable[[int], None] | None,
) -> Ensemble:
    """Train one member on each of the row sets `seen`, all at once."""
    generator = torch.Generator().manual_seed(options.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        net = Ensemble(len(seen), x.shape[1], options.hidden, 2 if zero is None else 3, options.dropout)
        rows = [torch.from_numpy(r) for r in seen]
        size = min(options.batch_size, min(len(r) for r in rows))
        steps = min(len(r) for r in rows) // size
        optimiser = torch.optim.AdamW(net.parameters(), lr=options.lr, weight_decay=options.weight_decay, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, options.lr, total_steps=options.epochs * steps, pct_start=0.1
        )
        for epoch in range(options.epochs):
            order = torch.stack([r[torch.randperm(len(r), generator=generator)[: steps * size]] for r in rows])
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


def _metrics(
    y: np.ndarray, center: np.ndarray, spread: np.ndarray, calibration: float, options: PredictorOptions
) -> dict[str, float]:
    from scipy.stats import spearmanr

    error = np.abs(center - y)
    return {
        "mae": float(error.mean()),
        "rmse": float(np.sqrt((error**2).mean())),
        "r2": float(1 - (error**2).sum() / ((y - y.mean()) ** 2).sum()),
        "spearman": float(spearmanr(center, y).statistic),
        "within_1_sigma_raw": float((error <= spread).mean()),
        "within_1_sigma": float((error <= spread * calibration).mean()),
        "within_2_sigma": float((error <= 2 * spread * calibration).mean()),
        "spread_error_spearman": float(spearmanr(spread, error).statistic),
    }


def _zero_metrics(
    y: np.ndarray, center: np.ndarray, spread: np.ndarray, positive: np.ndarray, zero: float
) -> dict[str, float]:
    from scipy.stats import rankdata

    truth = y >= zero
    n1, n0 = truth.sum(), (~truth).sum()
    auc = (rankdata(positive)[truth].sum() - n1 * (n1 + 1) / 2) / (n1 * n0)
    error = np.abs(center - y)
    return {
        "auc": float(auc),
        "mae_nonzero": float(error[truth].mean()),
        "mae_zero": float(error[~truth].mean()),
        "within_1_sigma_nonzero": float((error <= spread)[truth].mean()),
        "within_2_sigma_nonzero": float((error <= 2 * spread)[truth].mean()),
    }


# ---- the command -------------------------------------------------------------------------------------------------


def run_train(data: Sequence[str], output: str | Path, config: PredictorConfig, console: Console | None = None) -> Path:
    """`cfrl rewards train`: learn a column of one or more files; writes the predictor, its card and a parity plot.

    Returns the path of the predictor. Raises UserError: unreadable data, no such column, too few values, a value
    that has no logarithm.
    """
    from cfrl.potentials import load_potential

    output = Path(output)
    check_writable(output, (".safetensors",))
    structures, values = read_targets(data, config.target, config.log)
    potential = load_potential(config.potential, choose_device(config.device))
    with progress_bar(f"features of {potential.name}", len(structures), console) as advance:
        evaluation = potential.compute(structures, features=True, progress=advance)
    used = np.nonzero(evaluation.ok)[0]
    if console is not None and len(used) < len(structures):
        reasons = Counter(reason for reason in evaluation.status if reason)
        console.print(f"left out {len(structures) - len(used)} crystals: {reasons.most_common(3)}", highlight=False)
    structures = [structures[i] for i in used]
    header = {
        "target": config.target,
        "unit": config.unit,
        "potential": config.potential,
        "feature_version": potential.feature_version,
        "data": [Path(name).name for name in data],
    }
    options = PredictorOptions(
        log=config.log,
        zero=None if config.zero < 0 else config.zero,
        members=config.members,
        folds=config.folds,
        hidden=config.hidden,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    formulas = [s.composition.reduced_formula for s in structures]
    with progress_bar("epochs", config.epochs, console) as advance:
        predictor, validation = train(
            describe(structures, evaluation[used]), values[used], formulas, options, header, advance
        )
    write_all(predictor, validation, output)
    if console is not None:
        console.print(card(predictor), highlight=False)
        console.print(f"use it: --reward property:{output}", highlight=False)
    return output


def read_targets(data: Sequence[str], target: str, log: bool) -> tuple[list[Any], np.ndarray]:
    """Structures and values (n,) of the rows that have a value. Raises UserError, see `run_train`."""
    from cfrl.data import read_structures

    structures, values = [], []
    for name in data:
        found, ids, columns, _ = read_structures(name)
        if target not in columns:
            known = f"; it has {', '.join(columns)}" if columns else ""
            raise UserError(f"{name}: no column '{target}'{nearest(target, columns)}{known}")
        try:
            column = np.array([float(v) if v not in ("", None) else math.nan for v in columns[target]])
        except ValueError as error:
            raise UserError(f"{name}: column '{target}' holds words, not numbers ({error})") from error
        for row in np.nonzero(column <= 0)[0] if log else ():
            raise UserError(f"{name}: {target} of {ids[row]} is {column[row]:g}, which has no logarithm")
        structures += [s for s, known in zip(found, np.isfinite(column), strict=True) if known]
        values.append(column[np.isfinite(column)])
    if len(structures) < LEAST_ROWS:
        raise UserError(f"{data[0]}: {len(structures)} crystals have a value of '{target}'; {LEAST_ROWS} are needed")
    return structures, np.concatenate(values)


def write_all(predictor: Predictor, validation: CrossValidation, path: Path) -> None:
    """The predictor, and beside it its card (.md) and the parity plot of the cross-validation (.png, .svg)."""
    predictor.save(path)
    with atomic_file(path.with_suffix(".md")) as temp:
        temp.write_text(card(predictor), encoding="utf-8")
    save_figure(parity_plot(predictor, validation, path.stem), path.parent)


def card(predictor: Predictor) -> str:
    """What a user should know about a predictor, in Markdown."""
    h, m = predictor.header, predictor.header["cross_validation"]
    scale = f"log10({h['target']})" if h["log"] else h["target"]
    unit = "" if h["log"] or not h["unit"] else f" {h['unit']}"
    rows = [
        ("MAE", f"{m['mae']:.3f}{unit}"),
        ("RMSE", f"{m['rmse']:.3f}{unit}"),
        ("R2", f"{m['r2']:.3f}"),
        ("Spearman", f"{m['spearman']:.3f}"),
        ("errors within 1 sigma, before calibration", f"{m['within_1_sigma_raw']:.1%}"),
        ("errors within 1 sigma (68.3% if Gaussian)", f"{m['within_1_sigma']:.1%}"),
        ("errors within 2 sigma (95.4%)", f"{m['within_2_sigma']:.1%}"),
        ("Spearman of sigma and error", f"{m['spread_error_spearman']:.3f}"),
    ]
    if "auc" in m:
        rows += [
            (f"AUC, below {h['zero']:g} or not", f"{m['auc']:.4f}"),
            (f"MAE of values of at least {h['zero']:g}", f"{m['mae_nonzero']:.3f}{unit}"),
            (f"MAE of values below {h['zero']:g}", f"{m['mae_zero']:.3f}{unit}"),
            (f"errors within 1 sigma, values of at least {h['zero']:g} (fitted)", f"{m['within_1_sigma_nonzero']:.1%}"),
            (f"errors within 2 sigma, values of at least {h['zero']:g}", f"{m['within_2_sigma_nonzero']:.1%}"),
        ]
    o = h["options"]
    return "\n".join(
        [
            f"# Predictor: {h['target']}" + (f" ({h['unit']})" if h["unit"] else ""),
            "",
            f"Learnt from {h['rows']:,} crystals ({', '.join(h['data'])}), range {_bound(h, 'low')} to "
            f"{_bound(h, 'high')}; predictions stay inside it.",
            f"{o['members']} networks on features of {h['potential']} (`{h['feature_version']}`), composition, energy "
            "and volume.",
            "",
            f"Errors of {scale}, {o['folds']}-fold cross-validation; no formula is on both sides:",
            "",
            "| | |",
            "| --- | --- |",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
            f"The spread is that of the mixture of members, times {h['calibration']:.2f} (fitted in the "
            "cross-validation).",
            *h.get("notes", []),
            "",
        ]
    )


def parity_plot(predictor: Predictor, validation: CrossValidation, name: str) -> Figure:
    """Predicted against true values of the cross-validation."""
    h = predictor.header
    unit = f" ({h['unit']})" if h["unit"] else ""
    low, high = _bound(h, "low"), _bound(h, "high")
    return Figure(
        name,
        f"{h['target']}: cross-validation",
        f"{h['target']}{unit}, true",
        f"{h['target']}{unit}, predicted",
        [
            Series(validation.truth, validation.mean, "crystals", "points", BLUE),
            Series([low, high], [low, high], "equal", "line", ORANGE),
        ],
        log_x=h["log"],
        log_y=h["log"],
        note="Predictions by members that saw no crystal of the same formula.",
    )


def _bound(header: dict[str, Any], side: str) -> float:
    return float(f"{10 ** header[side] if header['log'] else header[side]:.4g}")
