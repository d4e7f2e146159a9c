"""Rewards at work: accuracy of the shipped predictors, and crystals scored per second.

    python tests/benchmarks/bench_properties.py [NUMBER OF CRYSTALS]

Accuracy is that of the cross-validation kept in the predictors' files (`python scripts/train_predictors.py` measures it
again). Rates are for prototype crystals in turn, cache off, so each crystal costs its full price.
"""

from __future__ import annotations

import sys
import time

import torch
from rich.console import Console
from rich.table import Table

import cfrl
from cfrl.potentials import load_potential
from cfrl.rewards import RewardContext
from cfrl.rewards.predictors import BUILT_IN, load_predictor

REWARDS = (
    "density",
    "hhi",
    "charge_neutral",
    "band_gap",
    "dielectric_bandgap",
    "dielectric_bandgap - 2*bulk_modulus",
    "force",
    "dielectric_bandgap - force",
)


def accuracy(console: Console) -> None:
    table = Table(title="grouped 5-fold cross-validations (MAE and RMSE of log10 except band_gap)")
    columns = {
        "MAE": "mae",
        "RMSE": "rmse",
        "Spearman": "spearman",
        "AUC": "auc",
        "MAE, non-metals": "mae_nonzero",
        "in 1 sigma": "within_1_sigma",
        "in 2 sigma": "within_2_sigma",
        "in 1 sigma, top 5%": "within_1_sigma_top",
        "top 5%, predicted/true": "top_ratio",
        "with caution": "top_cautious_ratio",
    }
    for name in ("predictor", "unseen", "rows", *columns):
        table.add_column(name, justify="right")
    for name in BUILT_IN:
        header = load_predictor(name).header
        for split, m in {"formula": header["cross_validation"], **header["harder_splits"]}.items():
            figures = (f"{m[key]:.3f}" if key in m else "" for key in columns.values())
            table.add_row(name, split, str(header["rows"]), *figures)
    console.print(table)


def rates(console: Console, n: int) -> None:
    crystals = cfrl.load_dataset("prototypes")
    crystals = crystals[(crystals.num_atoms <= 40) & (crystals.species.amax(1) <= 83)]
    crystals = crystals[torch.arange(n) % len(crystals)][: min(n, len(crystals))]
    context = RewardContext(load_potential("chgnet"))
    table = Table(
        title=f"{len(crystals)} prototype crystals, {crystals.num_atoms.double().mean():.1f} atoms on average"
    )
    for name in ("reward", "crystals/s", "again, from the cache"):
        table.add_column(name, justify="right")
    for spec in REWARDS:
        cfrl.build_reward(spec, context=context)(crystals[:3])  # loads what it needs
        reward = cfrl.build_reward(spec, context=context)
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            reward(crystals)
            seconds.append(time.perf_counter() - start)
        table.add_row(spec, *(f"{len(crystals) / s:,.0f}" for s in seconds))
    console.print(table)


if __name__ == "__main__":
    screen = Console(width=180)
    accuracy(screen)
    rates(screen, int(sys.argv[1]) if len(sys.argv) > 1 else 128)
