"""The README's picture: python scripts/make_picture.py RUN OUTPUT.png, of a `dielectric_bandgap` run.

Fresh crystals before and after tuning with their Pareto fronts, and some crystals of the front of the tuned model.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pymatgen.util.string import unicodeify

from cfrl.crystals import display
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.fingerprint import fingerprints, firsts
from cfrl.io.storage import read_columns, read_crystals
from cfrl.reports.figures import BLUE, GREY, ORANGE
from cfrl.reports.pareto import pareto_front

SHOWN = 4
GAP, DIELECTRIC = (f"dielectric_bandgap/{name}" for name in ("band_gap", "dielectric"))


def main(run: Path, output: Path) -> None:
    canvas = Figure(figsize=(9, 3.9), layout="constrained")
    FigureCanvasAgg(canvas)
    grid = canvas.add_gridspec(2, 4, width_ratios=(1.5, 1.5, 1, 1))
    axis = canvas.add_subplot(grid[:, :2])
    for name, color in (("before", GREY), ("after", BLUE)):
        columns = read_columns(run / f"{name}.h5")
        gap, dielectric = columns[GAP], columns[DIELECTRIC]
        front = pareto_front(gap, dielectric)
        axis.scatter(gap, dielectric, s=12, color=color, alpha=0.6, label=f"{name} tuning", linewidths=0)
        axis.plot(gap[front], dielectric[front], color=ORANGE if name == "after" else GREY, linewidth=1)
    axis.set(xlabel="band gap (eV)", ylabel="dielectric constant", yscale="log")
    axis.legend(loc="upper right", frameon=False)
    tuned = read_crystals(run / "after.h5")
    different = front[firsts(fingerprints(tuned[front.tolist()]))]
    shown = different[np.unique(np.linspace(0, len(different) - 1, SHOWN).round().astype(int))]
    crystals = tuned[shown.tolist()]
    for number, row in enumerate(shown):
        axis.annotate("ABCD"[number], (gap[row], dielectric[row]), xytext=(5, 3), textcoords="offset points")
        draw(crystals, number, canvas.add_subplot(grid[number // 2, 2 + number % 2]))
    canvas.savefig(output, dpi=150)


def draw(crystals: CrystalBatch, row: int, axis) -> None:
    display.draw(crystals[row], axis)
    axis.set_title(f"{'ABCD'[row]}: {unicodeify(crystals[row].formulas()[0])}", fontsize=9)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
