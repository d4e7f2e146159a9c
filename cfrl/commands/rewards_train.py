"""`cfrl rewards train`: learns a column of some files; writes the predictor, its card and a parity plot."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cfrl.config import PredictorConfig
from cfrl.errors import UserError, nearest
from cfrl.files import atomic_file, check_writable
from cfrl.reports.figures import BLUE, ORANGE, Figure, Series
from cfrl.reports.figures import save as save_figure
from cfrl.rewards.predictor_training import (
    CLUSTERS_PER_FOLD,
    LEAST_ROWS,
    TOP,
    CrossValidation,
    PredictorOptions,
    prototypes_of,
    train,
)
from cfrl.rewards.predictors import Predictor, describe, load_predictor
from cfrl.runs.devices import choose_device
from cfrl.runs.progress import progress_bar

if TYPE_CHECKING:
    from rich.console import Console


def run_train(data: Sequence[str], output: str | Path, config: PredictorConfig, console: Console | None = None) -> Path:
    """`cfrl rewards train`: learn a column of one or more files; writes the predictor, its card and a parity plot.

    Returns the path of the predictor. Raises UserError: unreadable data, no such column, too few values, a value
    that has no logarithm.
    """
    from cfrl.potentials import load_potential

    output = Path(output)
    check_writable(output, (".safetensors",))
    if config.target is None:
        raise UserError("target: must be given, the name of the column to learn: --target NAME")
    base = _corrected_by(config)
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
        zero=config.zero,
        members=config.members,
        folds=config.folds,
        hidden=config.hidden,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    formulas = [s.composition.reduced_formula for s in structures]
    x, values = describe(structures, evaluation[used]), values[used]
    if base is not None:
        base.check(potential)
        header["corrects"] = config.correct
        values = base.errors(values, x)
    with progress_bar("epochs", config.epochs, console) as advance:
        predictor, validation = train(
            x,
            values,
            formulas,
            prototypes_of(structures),
            options,
            header,
            advance,
        )
    write_all(predictor, validation, output)
    if console is not None:
        console.print(card(predictor), highlight=False)
        console.print(f"use it: --reward property:{output}", highlight=False)
    return output


def _corrected_by(config: PredictorConfig) -> Predictor | None:
    """The predictor whose errors are to be learnt. Raises UserError: settings that do not fit it."""
    if config.correct is None:
        return None
    base = load_predictor(config.correct)
    if config.log != base.header["log"] or config.zero is not None:
        how = "with --log, as it is one of logarithms, and" if base.header["log"] else "without --log and"
        raise UserError(f"--correct {config.correct}: train {how} without --zero")
    return base


def read_targets(data: Sequence[str], target: str, log: bool) -> tuple[list[Any], np.ndarray]:
    """Structures and values (n,) of the rows that have a value. Raises UserError, see `run_train`."""
    from cfrl.io.datasets import read_structures

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
    h, o = predictor.header, predictor.header["options"]
    scale = f" MAE, RMSE and R2 are of log10({h['target']}), all else of {h['target']}." if h["log"] else ""
    unit = "" if h["log"] or not h["unit"] else f" {h['unit']}"
    splits = {"formula": h["cross_validation"], **h["harder_splits"]}
    top = f"{TOP:.0%} highest predictions"
    rows = [
        ("MAE", "mae", f".3f{unit}"),
        ("RMSE", "rmse", f".3f{unit}"),
        ("R2", "r2", ".3f"),
        ("Spearman", "spearman", ".3f"),
        ("factor of the spread that this split needs", "calibration", ".2f"),
        ("errors within 1 sigma, before calibration", "within_1_sigma_raw", ".1%"),
        ("errors within 1 sigma (68.3% if Gaussian)", "within_1_sigma", ".1%"),
        ("errors within 2 sigma (95.4%)", "within_2_sigma", ".1%"),
        (f"errors within 1 sigma, {top}", "within_1_sigma_top", ".1%"),
        (f"errors within 2 sigma, {top}", "within_2_sigma_top", ".1%"),
        (f"median predicted / true, {top}", "top_ratio", ".2f"),
        ("median predicted - 1 sigma / true, 5% highest of these", "top_cautious_ratio", ".2f"),
        ("Spearman of sigma and error", "spread_error_spearman", ".3f"),
    ]
    if h["zero"] is not None:
        rows += [
            (f"AUC, below {h['zero']:g} or not", "auc", ".4f"),
            (f"MAE of values of at least {h['zero']:g}", "mae_nonzero", f".3f{unit}"),
            (f"MAE of values below {h['zero']:g}", "mae_zero", f".3f{unit}"),
            (f"errors within 1 sigma, values of at least {h['zero']:g}", "within_1_sigma_nonzero", ".1%"),
            (f"errors within 2 sigma, values of at least {h['zero']:g}", "within_2_sigma_nonzero", ".1%"),
        ]
    corrected = [h["corrects"]] if "corrects" in h else []
    left_out = [name for name in ("prototype", "cluster") if name not in splits]
    return "\n".join(
        [
            f"# Predictor: {h['target']}" + (f" ({h['unit']})" if h["unit"] else ""),
            "",
            *(f"Corrects the embedded predictor `{name}`: all below is of its errors." for name in corrected),
            f"Learnt from {h['rows']:,} crystals ({', '.join(h['data'])}), range {_bound(h, 'low')} to "
            f"{_bound(h, 'high')}; predictions stay inside it.",
            f"{o['members']} networks on features of {h['potential']} (`{h['feature_version']}`), composition, energy "
            "and volume.",
            "",
            f"{o['folds']}-fold cross-validation: no formula is on both sides, no prototype (space group and Wyckoff "
            f"sequence), no cluster of the descriptors (k-means, {CLUSTERS_PER_FOLD * o['folds']} clusters).{scale}",
            "",
            f"| unseen | {' | '.join(splits)} |",
            "| --- |" + " --- |" * len(splits),
            *(_row(name, [m[key] for m in splits.values()], style) for name, key, style in rows),
            "",
            f"The spread is that of the mixture of members, times {h['calibration']:.2f}: what the hardest split "
            "needs, for all crystals and for the highest predictions.",
            *(f"No split by {name}: too few of them, or one is half of the data." for name in left_out),
            *h.get("notes", []),
            "",
        ]
    )


def _row(name: str, values: list[float], style: str) -> str:
    style, _, unit = style.partition(" ")
    return f"| {name} | " + " | ".join(f"{v:{style}} {unit}".strip() for v in values) + " |"


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
