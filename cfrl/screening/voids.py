"""How much room there is between the atoms: spheres that fit, by Zeo++ (extra `[pores]`).

Willems et al., Micropor. Mesopor. Mater. 149, 134 (2012): the Voronoi network of atoms taken for hard spheres.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pymatgen.core import Structure


@cache
def installed() -> bool:
    """Whether Zeo++ is there: `pip install 'cfrl[pores]'`."""
    try:
        import pyzeo  # noqa: F401
    except ImportError:
        return False
    return True


def spheres(structure: Structure) -> tuple[float, float]:
    """Diameters, angstrom, of the largest sphere that fits between the atoms and of the largest that can pass through.

    Radii of atoms are those of Zeo++: van der Waals' as the CSD has them, 2 angstrom where it has none. In a crystal
    that is no framework both are small.

    Raises:
        ValueError: Zeo++ gives none.
    """
    from pyzeo import AtomNetwork

    with TemporaryDirectory() as folder:
        path, result = Path(folder) / "crystal.cif", Path(folder) / "spheres.res"
        structure.to(filename=str(path))
        with _silent():
            network = AtomNetwork.read_from_CIF(str(path), rad_flag=True)
            network.calculate_free_sphere_parameters(str(result))
        words = result.read_text().split() if result.exists() else []
    largest, free = map(float, words[-3:-1])
    return largest, free


@contextmanager
def _silent() -> Iterator[None]:
    """Without what a C++ library writes on stdout."""
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
