"""How good a generator gets with its parameters, its data and its minutes: scaling.py TRAIN.h5 FOLDER

Trains networks of several widths on nested shares of the training crystals, one after the other, as two processes each;
run again, it goes on where it stopped. Then it fits

    L(N, D) = E + A / N^a + B / D^b

to the lowest validation losses (Hoffmann et al. 2022, arXiv 2203.15556, eq. 2; least squares in the place of its Huber
loss), N parameters and D crystals, nats per crystal, and prints what that says of more. With so few runs the exponents
are rough: the fit is repeated without each run in turn, and the spread is printed.
"""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.optimize import least_squares

from cfrl.crystals.crystal import CrystalBatch
from cfrl.io.datasets import Dataset
from cfrl.io.storage import read_crystals, write_crystals
from cfrl.model.files import Extras, save_model
from cfrl.model.options import PRESETS
from cfrl.model.transformer import CrystalTransformer
from cfrl.runs.folder import RunFolder

WIDTHS, SHARES = (64, 128, 256), (0.25, 0.5, 1.0)
EPOCHS = 8  # with all data; the more often, the fewer there are
PROCESSES = 2
WANTED = [("this network, 1.3 M crystals", 256, 1_300_000), ("width 512, 8 layers, 1.3 M crystals", 512, 1_300_000)]
OPTIONS = {"init": "start.safetensors", "preset": "default", "lr": "1.2e-3", "weight-decay": "0.1", "dropout": "0.15"}
OPTIONS |= {"exchange": "0.4"}
FACTORS = {"letters + species": ("wyckoff", "species"), "sum": ("wyckoff", "species", "coords", "lattice")}


def network(width: int, layers: int = 4) -> CrystalTransformer:
    torch.manual_seed(0)
    return CrystalTransformer(
        replace(PRESETS["default"], model_size=width, num_heads=max(width // 64, 2), num_layers=layers)
    )


def size(model: CrystalTransformer) -> int:
    return sum(p.numel() for p in model.parameters())


def train(place: Path, width: int, datasets: list[str], epochs: int, **given: str) -> RunFolder:
    """The run of one training, which is done if it is not yet."""
    place.mkdir(parents=True, exist_ok=True)
    runs = list(place.glob("runs/*"))
    if not (runs and RunFolder.open(runs[0]).finished):
        save_model(network(width), place / "start.safetensors", Extras({}))
        given |= {"dataset": ",".join(datasets), "epochs": str(epochs)}
        options = [word for name, value in (OPTIONS | given).items() for word in (f"--{name}", value)]
        command = ["torchrun", "--nproc-per-node", str(PROCESSES), "-m", "cfrl", "pretrain"]
        with (place / "log").open("a") as log:
            command += ["--resume", "last"] if runs else options
            subprocess.run(command, cwd=place, check=True, stdout=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return RunFolder.open(next(place.glob("runs/*")))


def share_of(data: str, share: float, folder: Path) -> str:
    """A dataset of a share of the training crystals and all that are held apart; smaller shares are part of larger."""
    part = folder / f"{share:g}.h5"
    if not part.exists():
        crystals, held = read_crystals(data, "train"), read_crystals(data, "validation")
        order = torch.randperm(len(crystals), generator=torch.Generator().manual_seed(0))
        some = crystals[order[: round(share * len(crystals))]]
        write_crystals(part, CrystalBatch.cat([some, held]), split=[0] * len(some) + [1] * len(held))
    return str(part.resolve())


def told(run: RunFolder, crystals: int) -> dict[str, float]:
    """The lowest sum of an epoch and of letters and elements alone, and the epoch and minutes of the first."""
    metrics = {name: np.array(column) for name, column in run.metrics().items()}
    losses = {name: sum(metrics[f"validation/{factor}"] for factor in of) for name, of in FACTORS.items()}
    best = losses["sum"].argmin()
    minutes = (crystals / metrics["crystals_per_second"][: best + 1]).sum() / 60
    return {name: found.min() for name, found in losses.items()} | {"epoch": metrics["epoch"][best], "minutes": minutes}


def loss(parameters: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """eq. 2; parameters are E and the logarithms of A, a, B, b, with N in millions and D in ten thousands."""
    e, a, alpha, b, beta = parameters
    return e + np.exp(a) * (n / 1e6) ** -np.exp(alpha) + np.exp(b) * (d / 1e4) ** -np.exp(beta)


def fit(n: np.ndarray, d: np.ndarray, nats: np.ndarray) -> np.ndarray:
    start = np.array([nats.min() - 2, 0.0, np.log(0.3), 0.5, np.log(0.3)])
    return least_squares(lambda p: loss(p, n, d) - nats, start, loss="soft_l1", f_scale=0.1).x


def show(rows: list[tuple[int, int, float, dict[str, float]]]) -> None:
    columns = ("width", "parameters", "crystals", "best epoch", "minutes to it", *FACTORS)
    table = Table(*columns, title="validation, nats per crystal")
    for width, parameters, crystals, found in rows:
        cells = (f"{found['epoch']:.0f}", f"{found['minutes']:.1f}", *(f"{found[name]:.2f}" for name in FACTORS))
        table.add_row(str(width), f"{parameters:,}", f"{crystals:,}", *cells)
    Console().print(table)
    n, d = (np.array([row[i] for row in rows], dtype=float) for i in (1, 2))
    for name in FACTORS:
        nats = np.array([row[3][name] for row in rows])
        fits = [fit(n, d, nats), *(fit(*(np.delete(x, i) for x in (n, d, nats))) for i in range(len(n)))]
        e, a, alpha, b, beta = fits[0]
        off = np.sqrt(np.mean((loss(fits[0], n, d) - nats) ** 2))
        print(
            f"{name}: {e:.2f} + {np.exp(a):.2f} (N / 1e6)^-{np.exp(alpha):.2f} "
            f"+ {np.exp(b):.2f} (D / 1e4)^-{np.exp(beta):.2f}, off by {off:.2f}"
        )
        for text, width, crystals in WANTED:
            layers = 8 if width > 256 else 4
            at = np.array([size(network(width, layers))]), np.array([crystals])
            some = [loss(f, *at)[0] for f in fits]
            print(f"  {text}: {some[0]:.1f} nats ({min(some[1:]):.1f} to {max(some[1:]):.1f})")


if __name__ == "__main__":
    data, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for share, width in product(SHARES, WIDTHS):
        part = share_of(data, share, folder)
        run = train(folder / f"{width}-{share:g}", width, [part], round(EPOCHS / share**0.5))
        crystals = Dataset(part, "train").size
        rows.append((width, size(network(width)), crystals, told(run, crystals)))
        print(rows[-1], flush=True)
    show(rows)
