"""Train the four predictors that cfrl ships, from the development data: `python scripts/train_predictors.py`.

Descriptors of crystals are kept in the cache folder in pieces, so that an interrupted run goes on where it was. Writes
cfrl/assets/{band_gap,eps_electronic,eps_total,bulk_modulus}.safetensors with a card each; parity plots go to the cache.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from cfrl.assets import ASSETS
from cfrl.commands.rewards_train import card, parity_plot
from cfrl.files import atomic_file
from cfrl.io.datasets import read_structures
from cfrl.potentials import Potential, load_potential
from cfrl.reports.figures import save as save_figure
from cfrl.rewards.predictor_training import PredictorOptions, prototypes_of, train
from cfrl.rewards.predictors import describe
from cfrl.runs.progress import progress_bar

ROOT = Path(__file__).resolve().parents[1]
PIECE = 1000
SOURCES = {
    "band_gap": "Data: Materials Project (CC BY 4.0), PBE and PBE+U band gaps.",
    "eps_electronic": "Data: Petousis et al., Sci. Data 4, 160134 (2017) (CC0); Materials Project (CC BY 4.0). DFPT.",
    "eps_total": "Data: Petousis et al., Sci. Data 4, 160134 (2017) (CC0); Materials Project (CC BY 4.0). DFPT.",
    "bulk_modulus": "Data: Materials Project (CC BY 4.0), Voigt-Reuss-Hill average, binary compounds only.",
}
# name -> (files, column, unit, options)
PREDICTORS = {
    "eps_electronic": (["dielectric"], "eps_electronic", "", PredictorOptions(log=True)),
    "eps_total": (["dielectric"], "eps_total", "", PredictorOptions(log=True)),
    "bulk_modulus": (["elasticity"], "bulk_modulus_vrh", "GPa", PredictorOptions(log=True)),
    "band_gap": (["mp_20", "mpts_52"], "band_gap", "eV", PredictorOptions(zero=0.05, batch_size=256, epochs=30)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", default=list(PREDICTORS), help="which; default: all")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "cfrl" / "predictors")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    console = Console()
    potential = load_potential("chgnet")
    for name in arguments.names:
        files, column, unit, options = PREDICTORS[name]
        paths = [arguments.data / f"{file}.csv.gz" for file in files]
        parts = [known_rows(path, column, arguments.cache, potential, console) for path in paths]
        x, values, formulas, prototypes = (np.concatenate(part) for part in zip(*parts, strict=True))
        header = {
            "target": name,
            "unit": unit,
            "potential": "chgnet",
            "feature_version": potential.feature_version,
            "data": [path.name for path in paths],
            "notes": ["", SOURCES[name], "Rebuilt by `python scripts/train_predictors.py`."],
        }
        with progress_bar(f"{name}: epochs", options.epochs, console) as advance:
            predictor, validation = train(x, values, formulas, prototypes, options, header, advance)
        predictor.save(ASSETS / f"{name}.safetensors")
        (ASSETS / f"{name}.md").write_text(card(predictor), encoding="utf-8")
        save_figure(parity_plot(predictor, validation, name), arguments.cache)
        console.print(card(predictor), highlight=False)


def known_rows(
    path: Path, column: str, cache: Path, potential: Potential, console: Console
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Descriptors (n, d), values, formulas and prototypes (n,) of the rows that have a value and could be evaluated."""
    structures, _, columns, _ = read_structures(path)
    values = np.array([float(v) if v not in ("", None) else np.nan for v in columns[column]])
    known = np.nonzero(np.isfinite(values))[0]
    pieces = []
    with progress_bar(f"{path.name}: features", len(known), console) as advance:
        for start in range(0, len(known), PIECE):
            rows = known[start : start + PIECE]
            piece = cache / f"{path.name.split('.')[0]}-{column}-{start}.npy"
            if not piece.exists():
                some = [structures[i] for i in rows]
                x = describe(some, potential.compute(some, features=True))
                with atomic_file(piece) as temp, temp.open("wb") as file:
                    np.save(file, x)
            pieces.append(np.load(piece))
            advance(start + len(rows))
    x = np.concatenate(pieces)
    usable = np.isfinite(x).all(1)
    some = [structures[i] for i in known[usable]]
    formulas = [s.composition.reduced_formula for s in some]
    return x[usable], values[known][usable], np.array(formulas), np.array(prototypes_of(some))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
