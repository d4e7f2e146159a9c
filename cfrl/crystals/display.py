"""What a person is shown of crystals: formulas and space groups as they are printed, pictures, a notebook's table."""

from __future__ import annotations

import html as markup
import io
import re
from base64 import b64encode
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from cfrl.crystals.crystal import CrystalBatch

SHOWN, DRAWN = 20, 4  # crystals in the table of a notebook, and above it as pictures
_MOST_ATOMS = 300  # of a crystal that is drawn
_ON_FACE = 1e-4  # fractional


def subscripts(formula: str) -> str:
    """BaTiO3 -> BaTiO<sub>3</sub>."""
    return re.sub(r"(?<=[A-Za-z)])(\d+)", r"<sub>\1</sub>", markup.escape(formula))


def space_group_symbol(number: int) -> str:
    """Such as `P2<sub>1</sub>/m`; bars stand above their digits."""
    from moyopy import SpaceGroupType

    symbol = re.sub(r"_(\d)", r"<sub>\1</sub>", SpaceGroupType(number).hm_short.replace(" ", ""))
    return re.sub(r"-(\d)", "\\1\N{COMBINING OVERLINE}", symbol)


def shown_atoms(crystal: CrystalBatch) -> tuple[np.ndarray, np.ndarray]:
    """Fractional coordinates (N, 3) and atomic numbers (N,) of a conventional cell as one draws it.

    Atoms on the cell's faces are there on every such face.
    """
    frac, numbers, _, _ = crystal.atoms()
    frac, numbers = frac.double().numpy() % 1.0, numbers.numpy()
    frac[frac > 1 - _ON_FACE] = 0.0
    for axis in range(3):  # an atom at 0 is also shown at 1
        face = frac[:, axis] < _ON_FACE
        frac = np.concatenate([frac, frac[face] + np.eye(3)[axis]])
        numbers = np.concatenate([numbers, numbers[face]])
    return frac, numbers


def draw(crystal: CrystalBatch, axes: Axes) -> None:
    """One crystal on matplotlib axes: its conventional cell, nearly along c."""
    from ase import Atoms
    from ase.visualize.plot import plot_atoms

    frac, numbers = shown_atoms(crystal)
    matrix = crystal.lattice_matrix()[0].double().numpy()
    atoms = Atoms(numbers=numbers, scaled_positions=frac, cell=matrix)
    plot_atoms(atoms, axes, rotation="8x,-14y,0z", radii=0.5)
    axes.set_axis_off()


def picture(crystal: CrystalBatch) -> bytes:
    """`draw` as a PNG of 150 by 150 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure, file = Figure(figsize=(1.5, 1.5), layout="constrained"), io.BytesIO()
    FigureCanvasAgg(figure)
    draw(crystal, figure.subplots())
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def html(crystals: CrystalBatch) -> str:
    """The first `SHOWN` crystals as a table, the first `DRAWN` of them that can be drawn as pictures above it."""
    import pandas as pd

    crystals, total = crystals[:SHOWN].to("cpu"), len(crystals)
    atoms = crystals.num_atoms
    names = [subscripts(formula) for formula in crystals.formulas()]
    groups = [f"{space_group_symbol(number)} ({number})" for number in crystals.space_group.tolist()]
    columns = {
        **({"id": [markup.escape(name) for name in crystals.ids]} if crystals.ids is not None else {}),
        "formula": names,
        "space group": groups,
        "sites": crystals.num_sites.tolist(),
        "atoms": atoms.tolist(),
        "density (g/cm<sup>3</sup>)": crystals.densities().tolist(),
        **{markup.escape(name): values.tolist() for name, values in crystals.properties.items()},
    }
    table = pd.DataFrame(columns).to_html(escape=False, border=0, na_rep="", float_format="{:.4g}".format)
    count = f"{total:,} crystal{'s' * (total != 1)}" + (f", the first {SHOWN}" if total > SHOWN else "")
    drawable = crystals.possible_cells() & (atoms > 0) & (atoms <= _MOST_ATOMS)
    figures = "".join(
        f'<figure style="display:inline-block;margin:0 1em 0 0;text-align:center">'
        f'<img alt="" src="data:image/png;base64,{b64encode(picture(crystals[row])).decode()}">'
        f"<figcaption>{names[row]}, {groups[row]}</figcaption></figure>"
        for row in drawable.nonzero()[:DRAWN, 0].tolist()
    )
    return f"<div><p>{count}</p>{figures}{table}</div>"
