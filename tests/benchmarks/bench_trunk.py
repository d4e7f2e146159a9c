"""Frozen features or a fine-tuned trunk: which predicts better?

    python tests/benchmarks/bench_trunk.py DATA.csv --target eps_total --log [--folds 1] [--epochs 20]

On the same folds (grouped by formula): the ensemble of `cfrl rewards train` on CHGNet's frozen features, and CHGNet
itself with a head on its pooled features, trained together with its trunk. Both see the same descriptors.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfrl.commands.rewards_train import read_targets
from cfrl.potentials import load_potential
from cfrl.potentials.base import pool_features
from cfrl.potentials.cells import SymmetricCell
from cfrl.potentials.chgnet import CHGNetPotential, Layer, _Batch
from cfrl.potentials.gated import Part
from cfrl.rewards.predictor_training import PredictorOptions, _fit, assign_folds
from cfrl.rewards.predictors import describe, standardise


class TunedTrunk(nn.Module):
    """CHGNet, its trunk free, and a head on pooled features and fixed descriptors."""

    def __init__(self, inputs: int, hidden: int = 128) -> None:
        super().__init__()
        self.potential = CHGNetPotential("0.3.0", torch.device("cpu"))
        self.trunk = self.potential.model.requires_grad_(True)
        self.potential.layers = Layer.of(self.trunk, _trainable)
        self.head = nn.Sequential(
            nn.Linear(inputs, hidden), nn.SiLU(), nn.Dropout(0.2),
            nn.Linear(hidden, hidden), nn.SiLU(), nn.Dropout(0.2), nn.Linear(hidden, 1),
        )  # fmt: skip

    def forward(self, graphs: list, fixed: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        batch = _Batch(graphs, torch.device("cpu"))
        layers = self.potential._forward(batch)[1]
        pooled = [pool_features(layer, batch.orbit_cell, batch.size, batch.n) for layer in layers]
        pooled = torch.cat(pooled, 1)
        known = pooled.shape[1]
        pooled = ((pooled - mean[:known]) / std[:known]).clamp(-6, 6)
        return self.head(torch.cat([pooled, fixed[:, known:]], 1))[:, 0]


def _trainable(mlp: nn.Module, _parts: int) -> Callable[[list[Part]], Tensor]:
    """A gated perceptron as CHGNet has it, to whose weights gradients flow."""
    return lambda parts: mlp(torch.cat([x if rows is None else x[rows] for x, rows in parts], 1))


def tune_trunk(graphs: list, x: Tensor, stats: tuple, y: Tensor, rows: np.ndarray, epochs: int, seed: int) -> Tensor:
    """Predictions (n,) for all rows by a network trained on some."""
    torch.manual_seed(seed)
    net = TunedTrunk(x.shape[1])
    groups = [{"params": net.head.parameters(), "lr": 2e-3}, {"params": net.trunk.parameters(), "lr": 3e-4}]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.05)
    size, rows = 32, torch.from_numpy(rows)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, [2e-3, 3e-4], total_steps=epochs * (len(rows) // size), pct_start=0.1
    )
    for _ in range(epochs):
        for part in rows[torch.randperm(len(rows))][: len(rows) // size * size].split(size):
            loss = F.smooth_l1_loss(net([graphs[i] for i in part], x[part], *stats), y[part], beta=0.3)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            schedule.step()
    net.eval()
    with torch.no_grad():
        return torch.cat([net([graphs[i] for i in p], x[p], *stats) for p in torch.arange(len(y)).split(64)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--target", required=True)
    parser.add_argument("--log", action="store_true")
    parser.add_argument("--folds", type=int, default=1, help="how many of the five")
    parser.add_argument("--members", type=int, default=2, help="of each ensemble")
    parser.add_argument("--epochs", type=int, default=20, help="of the trunk's training")
    given = parser.parse_args()
    structures, values = read_targets(given.data, given.target, given.log)
    potential = load_potential("chgnet")
    evaluation = potential.compute(structures, features=True)
    structures = [s for s, good in zip(structures, evaluation.ok, strict=True) if good]
    values, evaluation = values[evaluation.ok], evaluation[evaluation.ok]
    graphs = [potential.prepare(SymmetricCell.of(s)) for s in structures]
    raw = describe(structures, evaluation)
    stats = torch.from_numpy(raw.mean(0)), torch.from_numpy(raw.std(0)).clamp(min=1e-4)
    x = standardise(raw, *stats)
    y = np.log10(values) if given.log else values
    shift, scale = y.mean(), y.std()
    target = torch.from_numpy((y - shift) / scale).float()
    fold = assign_folds([s.composition.reduced_formula for s in structures], 5)
    options = PredictorOptions(log=given.log, members=given.members)
    print(f"{len(y)} crystals, MAE of {'log10 ' if given.log else ''}{given.target} on formulas not seen")
    for k in range(given.folds):
        seen, held = np.nonzero(fold != k)[0], fold == k
        frozen = _fit(x, target, [seen] * given.members, None, options, None).on_all(x)[..., 0].mean(0)
        start = time.monotonic()
        members = [tune_trunk(graphs, x, stats, target, seen, given.epochs, seed) for seed in range(given.members)]
        tuned = torch.stack(members).mean(0)
        errors = {
            name: np.abs(p.numpy() * scale + shift - y)[held].mean()
            for name, p in (("frozen features", frozen), ("tuned trunk", tuned), ("mean of both", (frozen + tuned) / 2))
        }
        print(f"fold {k}:", *(f"{name} {error:.4f} " for name, error in errors.items()),
              f"({(time.monotonic() - start) / 60:.1f} min)", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
