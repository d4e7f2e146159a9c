"""What giving up relaxations early saves, and what it loses: draws of a model, relaxed to the end, and asked after ten
steps how far they are above the hull (`cfrl data grow --give-up`)."""

import argparse

import numpy as np
from rich.console import Console
from rich.table import Table

from cfrl.model.files import load_model
from cfrl.model.sampler import sample
from cfrl.potentials import load_potential
from cfrl.potentials.relax import PATIENCE, relax
from cfrl.stability.hull import ReferenceHull

WITHIN = 0.1  # eV/atom


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", type=int, default=1000)
    parser.add_argument("--model", default="default")
    parser.add_argument("--hull", help="reference hull; without: the embedded one")
    args = parser.parse_args()

    crystals = sample(load_model(args.model), args.n, seed=77)
    potential, hull = load_potential("chgnet"), ReferenceHull.load(args.hull)
    end, early = (relax(crystals, potential, steps=steps) for steps in (200, PATIENCE))
    last, first = (hull.e_above_hull(crystals, result.energy).e_above_hull for result in (end, early))
    work, good, long = end.steps * crystals.num_atoms.numpy(), last < WITHIN, end.steps > PATIENCE

    table = Table(
        "given up above, eV/atom", "crystals", "work saved", "good ones lost", title=f"of {good.sum()} good ones"
    )
    for limit in (0.1, 0.2, 0.3, 0.4, 0.6, 0.9):
        gone = long & (first > WITHIN + limit)
        saved = (work * (1 - PATIENCE / np.maximum(end.steps, 1)))[gone].sum() / work.sum()
        table.add_row(f"{WITHIN:g} + {limit:g}", str(gone.sum()), f"{saved:.0%}", str((gone & good).sum()))
    Console().print(table)


if __name__ == "__main__":
    main()
